"""Ablations: the plan, sizes counted independently, runs that are paired, resumable and really different, bad input."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import time
from pathlib import Path

import pytest
import scipy.stats
import torch
from conftest import ROOT, pytorchs_flops

import ablate
from ablation.effects import grid_effects
from ablation.execution import being_trained, gpu_of_slot
from ablation.planning import listed_values, make_plan
from command_line import UsageError
from comparison.inference import adjust
from configurator import configure
from model_builder import build_model
from model_config import components, resolve
from tests.preloaded import preloaded_python
from training.checkpoint import CheckpointStore

pytestmark = pytest.mark.usefixtures("preloaded")  # the runs that ablate.py starts
SHAPE = ("--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=16", "--device=cpu", "--dtype=float32", "--threads=1")
SEEDS = (1337, 1338)


def plan_of(dataset: Path, *arguments: str):
    options, rest = ablate.make_parser().parse_known_args([f"--dataset={dataset}", *arguments])
    return make_plan(options, rest)


def models(plan) -> dict:
    """Variant name → the model that train.py would build from the planned command line."""
    return {variant.name: configure(plan.arguments(variant, plan.seeds[0])).train.model_config(256) for variant in plan.variants}


def counted(model, match: str) -> float:
    """N by the built model's own tensors, or FLOPs of training a token by PyTorch's counter."""
    if match == "params":
        return sum(tensor.numel() for tensor in set(build_model(model, device="meta").parameters()))
    return sum(pytorchs_flops(model)) / (2 * model.block_size)


# ------------------------------------------------------------------------------------------- the plan

FACTORS = {
    "normalization": ("layernorm", "rmsnorm", "layernorm_nobias"),
    "dropout": ("0.0", "0.1"),
    "position_encoding": ("learned_absolute", "rope"),
}
VARY_FACTORS = [f"--vary={key}={','.join(values)}" for key, values in FACTORS.items()]


def test_one_factor_at_a_time_is_the_baseline_and_each_other_value(tiny_dataset):
    plan = plan_of(tiny_dataset, *SHAPE, *VARY_FACTORS)
    assert len(plan.variants) == 1 + sum(len(values) - 1 for values in FACTORS.values())
    assert plan.baseline is plan.variants[0] and plan.baseline.name == "defaults"
    changed = [{key for key in FACTORS if v.choice[key] != plan.base.choice[key]} for v in plan.variants[1:]]
    assert all(len(keys) == 1 for keys in changed)
    assert {variant.name for variant in plan.variants[1:]} == {
        "normalization=rmsnorm",
        "normalization=layernorm_nobias",
        "position_encoding=rope",
        "dropout=0.1",
    }


def test_a_grid_is_every_combination(tiny_dataset):
    plan = plan_of(tiny_dataset, *SHAPE, "--grid", *VARY_FACTORS)
    built = [(m.normalization, str(m.dropout), m.position_encoding) for m in models(plan).values()]
    assert sorted(built) == sorted(itertools.product(*FACTORS.values()))
    assert plan.baseline is not None and len({plan.folder(v, s) for v in plan.variants for s in plan.seeds}) == 12 * 3


def test_a_grid_without_the_configs_own_value_has_no_baseline(tiny_dataset):
    plan = plan_of(tiny_dataset, *SHAPE, "--grid", "--vary=position_encoding=rope,none")
    assert plan.baseline is None and len(plan.variants) == 2


def test_every_run_has_its_folder_its_seeds_and_goes_on_by_itself(tiny_dataset):
    plan = plan_of(
        tiny_dataset, *SHAPE, "--vary=ffn_type=standard,swiglu", "--seed=7", "--data_seed=70", "--seeds=3", "--out_dir=somewhere"
    )
    assert plan.seeds == ((7, 70), (8, 71), (9, 72))
    for variant, seeds in itertools.product(plan.variants, plan.seeds):
        train = configure(list(plan.arguments(variant, seeds))).train
        assert (train.seed, train.data_seed, train.resume) == (*seeds, "auto")
        assert Path(train.out_dir) == plan.folder(variant, seeds) and Path(train.out_dir).parts[0] == "somewhere"
    assert len({plan.folder(v, s) for v in plan.variants for s in plan.seeds}) == 6


def test_values_with_commas_are_separated_by_semicolons(tiny_dataset):
    plan = plan_of(tiny_dataset, *SHAPE, "--vary=layer_pattern=transformer;transformer,mlp;mlp,transformer")
    assert {model.layer_pattern for model in models(plan).values()} == {
        ("transformer", "transformer"),
        ("transformer", "mlp"),
        ("mlp", "transformer"),
    }
    assert all("/" not in variant.folder and len(variant.folder) < 130 for variant in plan.variants)


def test_commas_between_the_parts_of_a_mixture_separate_no_values():
    assert listed_values("dataset", "a:0.7,b:0.3") == ["a:0.7,b:0.3"]
    assert listed_values("dataset", "a ; a:0.5,b:0.5") == ["a", "a:0.5,b:0.5"]
    assert listed_values("dataset", "a,b") == ["a", "b"] and listed_values("bias", "True, False") == ["True", "False"]


@pytest.mark.parametrize(
    "key, values",
    [
        ("learning_rate", ("1e-5", "3e-4")),
        ("optimizer", ("adamw", "muon")),
        ("weight_decay", ("0", "0.1")),
        ("arch_preset", ("gpt2", "gpt2_postnorm", "llama")),
        ("norm_position", tuple(components("norm_position"))),
        ("qk_norm", ("False", "full")),
        ("attention_backend", ("sdpa", "manual")),
        ("n_kv_head", ("1", "2")),
    ],
)
def test_any_key_may_be_varied_and_its_value_arrives(tiny_dataset, key, values):
    plan = plan_of(tiny_dataset, *SHAPE, f"--vary={key}={','.join(values)}")
    own = str(plan.base.choice[key])
    arrived = {word for v in plan.variants for word in plan.arguments(v, plan.seeds[0]) if word.startswith(f"--{key}=")}
    assert arrived == {f"--{key}={value}" for value in values if value not in (own, f"{own}.0") and f"{value}.0" != own}
    assert len(plan.variants) == len(values) + (len(arrived) == len(values))


def test_varied_parts_build_models_that_differ(tiny_dataset):
    kinds = ("normalization", "norm_position", "position_encoding")
    plan = plan_of(tiny_dataset, *SHAPE, *(f"--vary={kind}={','.join(components(kind))}" for kind in kinds))
    fingerprints = [model.fingerprint for model in models(plan).values()]
    assert len(set(fingerprints)) == len(fingerprints) == 1 + sum(len(components(kind)) - 1 for kind in kinds)


# ------------------------------------------------------------------------------------------- equal sizes

MATCHED = [
    (vary, match)
    for match in ("params", "flops")
    for vary in (
        "ffn_type=standard,swiglu,geglu",
        "weight_tying=True,False",
        "n_kv_head=4,1",
        "n_layer=8,5,12",
        "n_embd=64,80",
        "position_encoding=learned_absolute,rope,none",
        "norm_position=pre,post,sandwich",
        "bias=True,False",
        "layer_pattern=transformer;transformer*3,mlp",
        "arch_preset=custom,llama",
    )
]
# 8 layers of 4·64² + 2·64·256 weights are 12 of 4·64² + 2·64·128, or 117 where attention's products count too
MATCHED += [("d_ff=256,128", "params"), ("ffn_expansion_ratio=4,2", "params"), ("d_ff=256,117", "flops")]


@pytest.mark.parametrize("vary, match", MATCHED)
def test_matched_variants_have_the_baselines_size_counted_independently(tiny_dataset, vary, match):
    plan = plan_of(
        tiny_dataset,
        "--arch_preset=custom",
        "--n_layer=8",
        "--n_head=4",
        "--n_embd=64",
        "--block_size=32",
        f"--vary={vary}",
        f"--match={match}",
    )
    built = models(plan)
    assert len(built) > 1
    wanted = counted(configure(plan.arguments(plan.base, (1, 1))).train.model_config(256), match)
    key = vary.partition("=")[0]
    for variant in plan.variants:
        assert abs(counted(built[variant.name], match) / wanted - 1) <= 0.01, variant.name
        assert variant.choice[key] == plan.base.choice[key] or variant.name.startswith(f"{key}=")
    notes = [note for note in plan.notes if not note.startswith("All variants have learning_rate=")]
    for note in notes:  # what is said is what is built
        variant = next(v for v in plan.variants if note.startswith(f"{v.name} has "))
        for piece in variant.resized.split(", "):
            changed, _, new = piece.partition(" ")
            assert getattr(built[variant.name], changed) == int(new.rpartition("→ ")[2])
        assert variant.resized in note
    assert len(notes) == sum(bool(variant.resized) for variant in plan.variants)


def test_without_matching_the_same_variants_have_other_sizes(tiny_dataset):
    """That the test above can fail."""
    shape = ("--arch_preset=custom", "--n_layer=8", "--n_head=4", "--n_embd=64", "--block_size=32")
    for vary in ("weight_tying=True,False", "n_layer=8,5,12", "d_ff=256,128", "n_embd=64,80"):
        plan = plan_of(tiny_dataset, *shape, f"--vary={vary}")
        sizes = [counted(model, "params") for model in models(plan).values()]
        assert max(sizes) / min(sizes) > 1.01
        assert any("--match=params" in note for note in plan.notes)


def test_swiglu_at_gpt2s_size_gets_the_usual_two_thirds(tiny_dataset):
    plan = plan_of(tiny_dataset, "--vary=ffn_type=standard,swiglu", "--match=params", "--d_ff=3072")
    assert models(plan)["ffn_type=swiglu"].d_ff == 2048  # 2 × 768 × 3072 = 3 × 768 × 2048
    assert "d_ff 3072 → 2048" in plan.notes[0]


def test_what_is_varied_is_not_resized(tiny_dataset):
    shape = ("--arch_preset=custom", "--n_layer=8", "--n_head=4", "--n_embd=64", "--block_size=32", "--match=params")
    wide = models(plan_of(tiny_dataset, *shape, "--vary=d_ff=256,128"))
    assert wide["d_ff=128"].d_ff == 128 and wide["d_ff=128"].n_layer == 12  # (4·64² + 2·64·d_ff) · n_layer stays
    deep = models(plan_of(tiny_dataset, *shape, "--vary=n_layer=8,12"))
    assert deep["n_layer=12"].n_layer == 12 and deep["n_layer=12"].d_ff == 128
    assert deep["n_layer=12"].d_ff != deep["defaults"].d_ff


def test_a_size_that_cannot_be_matched_is_an_error_that_says_what_comes_closest(tiny_dataset):
    with pytest.raises(UsageError, match=r"n_embd=512 within 1 % of the baseline's N [\d,]+ \(closest is .*=none"):
        plan_of(tiny_dataset, *SHAPE, "--vary=n_embd=32,512", "--match=params")


def test_a_multiple_given_in_a_config_does_not_hinder(tiny_dataset, tmp_path):
    config = tmp_path / "multiple.py"
    config.write_text('arch_preset = "llama"\nn_layer, n_head, n_embd, ffn_multiple, block_size = 8, 4, 64, 64, 32\n')
    plan = plan_of(tiny_dataset, str(config), "--vary=weight_tying=True,False", "--match=params")
    sizes = [counted(model, "params") for model in models(plan).values()]
    assert abs(sizes[0] / sizes[1] - 1) <= 0.01 and plan.variants[1].resized


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "arguments, fragments",
    [
        (["--vary=normalisation=layernorm,rmsnorm"], ["'normalisation' is not a key (did you mean 'normalization'?)"]),
        (["--vary=normalization=layernorm,rmsnrom"], ["normalization='rmsnrom' is not registered (did you mean 'rmsnorm'"]),
        (["--vary=n_layer=2,two"], ["n_layer='two' is not a whole number"]),
        (["--vary=n_head=2,3"], ["n_head=3", "does not divide n_embd=32"]),
        (["--vary=rope_theta=5000,10000"], ["rope_theta=5000", "no effect"]),
        (["--vary=normalization=rmsnorm", "--vary=normalization=layernorm"], ["normalization is given twice"]),
        (["--vary=n_layer=2,3,3"], ["3 is given twice"]),
        (["--vary=normalization"], ["names no values", "--vary normalization=a,b"]),
        (["--vary=normalization=layernorm"], ["varies nothing", "normalization=layernorm already"]),
        (["--vary=arch_preset=llama,team"], ["same experiment"]),
        (["--vary=seed=1,2"], ["seed cannot be varied", "--seeds"]),
        (["--vary=out_dir=a,b"], ["out_dir cannot be varied"]),
        (["--vary=use_fsdp=True,False"], ["vary parallelism itself"]),
        (["--seeds=0"], ["--seeds=0 must be at least 1"]),
        (["--jobs=-1"], ["--jobs=-1 must be at least 1"]),
        (["--seeds=two"], ["'two' is neither a whole number nor 'auto'"]),
        (["--match=size"], ["'params'", "'flops'"]),
        (["--init_from=resume"], ["--init_from cannot be given"]),
        (["--eval_only"], ["--eval_only cannot be given"]),
        (["--print_config"], ["--dry_run shows"]),
        (["config/no_such.py"], ["does not exist"]),
        (["--no_such_key=1"], ["--no_such_key is not a key"]),
        (["--vary=batch_size=4,8", "--max_iters=10"], ["batch_size=8 would train on", "--max_tokens"]),
        (["--vary=batch_size=4,8", "--max_tokens=6400"], ["would be validated on", "--eval_iters=0"]),
        (
            ["--seeds=0", "--n_embd=80x", "--vary=n_layers=2,3", "--vary=activation=gleu,relu"],
            ["--seeds=0", "n_embd='80x'", "'n_layers' is not a key", "activation='gleu' is not registered"],
        ),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith(("--", "config")) else "",
)
def test_bad_input_is_said_in_a_sentence_before_anything_runs(tmp_path, tiny_dataset, capsys, arguments, fragments):
    out = tmp_path / "out"
    assert ablate.main([*SHAPE, f"--dataset={tiny_dataset}", f"--out_dir={out}", "--batch_size=4", *arguments]) == 2
    said = capsys.readouterr().err
    assert all(fragment in said for fragment in fragments), said
    assert all(line.startswith("ablate.py: ") and line[-1] in ".:" or "help" in line for line in said.splitlines())
    assert not out.exists()


def test_a_config_that_starts_from_other_weights_is_refused(tmp_path, tiny_dataset, capsys):
    config = tmp_path / "tuned.py"
    config.write_text('init_from = "weights:out/x"\nn_layer = 2\n')
    assert ablate.main([str(config), f"--dataset={tiny_dataset}", "--dry_run"]) == 2
    assert "sets init_from='weights:out/x'" in capsys.readouterr().err


def test_an_out_dir_that_cannot_be_made_is_said(tmp_path, tiny_dataset, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert ablate.main([*SHAPE, f"--dataset={tiny_dataset}", f"--out_dir={out}", "--seeds=1", "--vary=dropout=0.0,0.1"]) == 1
        assert f"ablate.py: out_dir='{out}' cannot be written: " in capsys.readouterr().err


def test_other_batch_sizes_compare_where_tokens_and_validation_are_the_same(tiny_dataset):
    plan = plan_of(tiny_dataset, *SHAPE, "--batch_size=4", "--vary=batch_size=4,8", "--max_tokens=6400", "--eval_iters=0")
    assert [variant.tokens for variant in plan.variants] == [6400, 6400]


def test_a_dry_run_prints_every_command_sizes_and_cost_and_trains_nothing(tmp_path, tiny_dataset, capsys):
    out = tmp_path / "out"
    words = [
        *SHAPE,
        f"--dataset={tiny_dataset}",
        f"--out_dir={out}",
        "--vary=ffn_type=standard,swiglu",
        "--seeds=2",
        "--price_per_gpu_hour=2.5",
        "--max_iters=10",
        "--dry_run",
    ]
    assert ablate.main(words) == 0
    printed = capsys.readouterr().out
    commands = [line for line in printed.splitlines() if line.startswith("python train.py ")]
    assert len(commands) == 4 and not out.exists()
    swiglu = resolve("gpt2", n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=256, ffn_type="swiglu")
    assert swiglu.name in printed and f"{counted(swiglu, 'params') / 1e3:.4g}K" in printed
    assert "assumed MFU" in printed and "2.50 an hour" in printed


def test_the_commands_of_the_page_are_plans_and_what_it_says_of_sizes_is_true():
    page = (ROOT / "docs" / "ABLATIONS.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python ablate.py (.*)$", page, re.M)
    assert len(commands) >= 5
    for command in commands:
        plan = make_plan(*ablate.make_parser().parse_known_args(shlex.split(command)))
        assert all(note in page for note in plan.notes)
        assert f"{plan.base.tokens:,} tokens" in page
        assert f"N = {counted(plan.base.model, 'params'):,}" in page


# ------------------------------------------------------------------------------------------- what a factor does


def test_the_effects_of_a_grid_are_paired_differences_of_its_margins(tiny_dataset):
    """Against scipy's paired t test and margins taken by hand."""
    plan = plan_of(
        tiny_dataset,
        *SHAPE,
        "--grid",
        "--vary=position_encoding=rope,learned_absolute",
        "--vary=ffn_type=standard,swiglu",
        "--seeds=5",
    )
    figures = {
        "defaults": [3.00, 3.10, 3.05, 3.08, 3.02],
        "position_encoding=rope": [2.80, 2.91, 2.84, 2.88, 2.83],
        "ffn_type=swiglu": [2.97, 3.06, 3.02, 3.04, 2.99],
        "position_encoding=rope, ffn_type=swiglu": [2.70, 2.83, 2.75, 2.79, 2.74],
    }
    assert set(figures) == {variant.name for variant in plan.variants}
    effects, notes = grid_effects(plan, {name: dict(zip(plan.seeds, losses)) for name, losses in figures.items()}, "val_loss", {})
    said = [effect.say(test) for effect, test in zip(effects, adjust([effect.test for effect in effects]))]
    assert not notes
    plain, rope, swiglu, both = (figures[name] for name in figures)

    def mean(one, other):
        return [statistics.fmean(pair) for pair in zip(one, other)]

    def minus(one, other):
        return [a - b for a, b in zip(one, other)]

    effects = [minus(mean(rope, both), mean(plain, swiglu)), minus(mean(swiglu, both), mean(plain, rope))]
    with_standard, with_swiglu = minus(rope, plain), minus(both, swiglu)
    samples = [*effects, minus(*effects), minus(with_swiglu, with_standard)]
    tests = [scipy.stats.ttest_1samp(sample, 0) for sample in samples]
    adjusted, floor = {}, 0.0
    for rank, i in enumerate(sorted(range(4), key=lambda i: tests[i].pvalue)):  # Holm 1979
        floor = adjusted[i] = max(floor, min(1.0, (4 - rank) * tests[i].pvalue))
    assert len(said) == 4
    for i, (sentence, sample) in enumerate(zip(said, samples)):
        assert f"{abs(statistics.fmean(sample)):.4f} (" in sentence, sentence
        assert ("p < 0.001" if adjusted[i] < 0.001 else f"p = {adjusted[i]:.2g}") in sentence, sentence
        assert sentence.startswith("no difference shown") == (adjusted[i] >= 0.05)
    assert said[0].startswith("averaged over ffn_type: position_encoding=rope has a lower validation loss than pos")
    rope_by, swiglu_by, apart, together = (
        f"{statistics.fmean(sample):+.4f}" for sample in (*effects, with_standard, with_swiglu)
    )
    assert said[2].startswith(
        f"position_encoding=rope ({rope_by}) does more for the validation loss than ffn_type=swiglu ({swiglu_by}), difference "
    )
    assert f"depends on ffn_type: {apart} with ffn_type=standard and {together} with ffn_type=swiglu" in said[3]


def test_effects_need_every_combination(tiny_dataset):
    plan = plan_of(
        tiny_dataset, *SHAPE, "--grid", "--vary=position_encoding=rope,learned_absolute", "--vary=ffn_type=standard,swiglu"
    )
    values = {variant.name: {plan.seeds[0]: 3.0} for variant in plan.variants}
    del values["ffn_type=swiglu"]
    effects, [note] = grid_effects(plan, values, "val_loss", {})
    assert not effects and "not finished: ffn_type=swiglu" in note


# ------------------------------------------------------------------------------------------- the runs

TRAINED = (
    *SHAPE,
    "--batch_size=4",
    "--max_iters=60",
    "--eval_interval=20",
    "--eval_iters=4",
    "--save_interval=10",
    "--log_interval=1",
    "--vary=position_encoding=learned_absolute,rope",
    "--seeds=2",
)
FOLDERS = [f"{variant}/seed_{seed}" for seed in SEEDS for variant in ("baseline", "position_encoding=rope")]


def start(out_dir: Path, dataset: Path, *arguments: str) -> subprocess.Popen:
    words = [*TRAINED, f"--dataset={dataset}", f"--out_dir={out_dir}", *arguments]
    return subprocess.Popen(
        [preloaded_python(), "ablate.py", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for(condition, process: subprocess.Popen, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, "it ended, or nothing happened"
        time.sleep(0.005)


def events(folder: Path) -> list[dict]:
    """All events of all logs of a run's folder, oldest log first."""
    logs = sorted(folder.glob("run_*.jsonl"), key=lambda path: path.name)
    lines = [line for log in logs for line in log.read_text().splitlines(keepends=True)]
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(folder: Path) -> dict[int, float]:
    """step → loss, what came later in the place of what came before."""
    return {event["step"]: event["loss"] for event in events(folder) if event["event"] == "step"}


def contents(out_dir: Path, folders) -> dict[Path, tuple[int, bytes]]:
    files = [file for folder in folders for file in (out_dir / folder).glob("run_*")]
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


@pytest.fixture(scope="module")
def killed_study(tmp_path_factory, tiny_dataset):
    """A study killed (-9) with its running process in the third of four runs, then gone on with: what was there
    before, the folder, the output."""
    out = tmp_path_factory.mktemp("study") / "killed"
    process = start(out, tiny_dataset)
    third = out / FOLDERS[2]
    wait_for(lambda: (third / "checkpoints" / "latest").exists(), process)
    process.kill()
    os.kill(int((third / ".lock").read_text()), signal.SIGKILL)
    process.communicate()
    before = contents(out, FOLDERS[:2])
    again = start(out, tiny_dataset)
    output, errors = again.communicate(timeout=600)
    assert again.returncode == 0, errors
    return before, out, output, errors


@pytest.fixture(scope="module")
def whole_study(tmp_path_factory, tiny_dataset):
    """The same study left alone, two runs at a time."""
    out = tmp_path_factory.mktemp("study") / "whole"
    process = start(out, tiny_dataset, "--jobs=2")
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return out, output, errors


@pytest.mark.slow  # a command that was interrupted is in `make test`: test_interrupted_the_running_training_saves…
def test_after_kill_minus_9_finished_runs_are_not_repeated_and_the_half_finished_one_goes_on(killed_study):
    before, out, output, _ = killed_study
    assert len(before) == 4 and contents(out, FOLDERS[:2]) == before
    assert [line.split("]")[0] for line in output.splitlines() if line.startswith("[")] == ["[3/4", "[4/4"]
    origins = [event["resumed_from"] for event in events(out / FOLDERS[2]) if event["event"] == "run_start"]
    assert len(origins) == 2 and origins[0] is None and origins[1]["step"] >= 10
    assert not [event for event in events(out / FOLDERS[3]) if event["event"] == "run_start" and event["resumed_from"]]


@pytest.mark.slow  # the runs that it compares are resumed bit for bit in test_resume.py
def test_killed_or_not_one_or_two_at_a_time_the_losses_are_the_same(killed_study, whole_study):
    _, killed, _, _ = killed_study
    whole = whole_study[0]
    for folder in FOLDERS:
        assert losses(killed / folder) == losses(whole / folder) and len(losses(whole / folder)) == 60
    ends = [
        [event["val_loss"] for event in events(out / folder) if event["event"] == "eval"][-1]
        for out in (killed, whole)
        for folder in FOLDERS
    ]
    assert ends[:4] == ends[4:]


def test_variants_are_paired_by_their_seeds(whole_study):
    starts = {folder: events(whole_study[0] / folder)[0] for folder in FOLDERS}
    for folder, start_event in starts.items():
        seed = int(folder.rpartition("_")[2])
        assert (start_event["config"]["seed"], start_event["config"]["data_seed"]) == (seed, seed)
    first = {folder: losses(whole_study[0] / folder)[1] for folder in FOLDERS}
    assert len(set(first.values())) == 4  # neither the seed nor the variant is without effect


def test_every_variant_trained_the_model_that_was_asked_for(whole_study):
    shape = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=256)
    asked = {"baseline": resolve("gpt2", **shape), "position_encoding=rope": resolve("gpt2", **shape, position_encoding="rope")}
    assert len({model.fingerprint for model in asked.values()}) == 2
    for folder in FOLDERS:
        logged = events(whole_study[0] / folder)[0]["model"]
        assert logged["fingerprint"] == asked[folder.split("/")[0]].fingerprint
        assert logged["config"]["position_encoding"] == asked[folder.split("/")[0]].position_encoding


def test_the_comparison_is_printed_and_written(whole_study):
    out, output, errors = whole_study
    assert "defaults (baseline)" in output and "Welch t over 2 and 2 seeds" in output
    document = json.loads((out / "comparison.json").read_text())
    assert document["baseline"] == "defaults" and len(document["runs"]) == 4
    finals = {
        name: [
            event["val_loss"]
            for folder in FOLDERS
            if folder.startswith(place)
            for event in events(out / folder)
            if event["event"] == "eval" and event["step"] == 60
        ]
        for name, place in (("defaults", "baseline"), ("position_encoding=rope", "position"))
    }
    means = {group["name"]: group["val_loss"]["mean"] for group in document["groups"]}
    assert means == {name: pytest.approx(statistics.fmean(values), rel=1e-12) for name, values in finals.items()}
    for name in ("comparison.html", "comparison.md", "comparison.png", "ablation.json"):
        assert (out / name).stat().st_size > 0 and str(out / name) in errors
    study = json.loads((out / "ablation.json").read_text())
    logs = {run["log"] for variant in study["variants"] for run in variant["runs"]}
    assert logs == {run["name"] for run in document["runs"]}


def test_in_a_pipe_there_is_no_progress_bar(whole_study):
    assert "\r" not in whole_study[1] + whole_study[2] and "it/s" not in whole_study[2]


def test_a_finished_study_is_compared_again_without_training(whole_study, tiny_dataset, capsys):
    out = whole_study[0]
    before = contents(out, FOLDERS)
    assert ablate.main([*TRAINED, f"--dataset={tiny_dataset}", f"--out_dir={out}"]) == 0
    assert "2 of 2" in capsys.readouterr().out and contents(out, FOLDERS) == before


def test_more_seeds_and_factors_add_to_a_study(whole_study, tiny_dataset, capsys):
    out = whole_study[0]
    assert (
        ablate.main(
            [*TRAINED, f"--dataset={tiny_dataset}", f"--out_dir={out}", "--seeds=3", "--vary=bias=True,False", "--dry_run"]
        )
        == 0
    )
    commands = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python train.py")]
    assert len(commands) == 9 and sum(line.endswith("# finished") for line in commands) == 4


def test_a_folder_with_runs_of_another_configuration_is_refused(whole_study, tiny_dataset, capsys):
    out = whole_study[0]
    for other, said in (
        ("--max_iters=61", "max_iters=60, where this study has max_iters=61"),
        ("--learning_rate=0.5", "learning_rate=0.0006, where this study has learning_rate=0.5"),
    ):
        assert ablate.main([*TRAINED, f"--dataset={tiny_dataset}", f"--out_dir={out}", other]) == 2
        assert said in capsys.readouterr().err
    assert ablate.main([*TRAINED, f"--dataset={tiny_dataset}", f"--out_dir={out}", "--log_interval=7", "--dry_run"]) == 0


def test_interrupted_the_running_training_saves_and_the_command_says_how_to_go_on(tmp_path, tiny_dataset):
    out = tmp_path / "study"
    long = ("--max_iters=100000", "--eval_interval=0", "--save_interval=0", "--seeds=1")
    process = start(out, tiny_dataset, *long)
    running = out / FOLDERS[0]
    wait_for(lambda: len(losses(running)) > 5, process)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and "Traceback" not in errors
    command = next(line for line in output.splitlines() if "To go on: " in line)
    assert "0 of 2 runs are finished" in command and str(out) in command
    assert f"python ablate.py {' '.join(TRAINED[:3])}" in command
    assert events(running)[-1]["outcome"] == "stopped"
    assert CheckpointStore(running).pointed("latest").name == f"step_{max(losses(running)):09d}"
    assert not (out / FOLDERS[1]).exists() and not being_trained(running) and not being_trained(out)


def test_a_run_that_fails_is_named_with_its_last_lines_and_the_others_are_compared(tmp_path, tiny_dataset, capsys):
    out = tmp_path / "study"
    assert (
        ablate.main(
            [
                *SHAPE,
                "--batch_size=4",
                "--max_iters=8",
                "--eval_iters=1",
                "--log_interval=1",
                "--seeds=1",
                "--nonfinite_limit=2",
                "--grad_clip=0",
                "--lr_schedule=constant",
                f"--dataset={tiny_dataset}",
                f"--out_dir={out}",
                "--vary=learning_rate=6e-4,1e30",
            ]
        )
        == 1
    )
    said = capsys.readouterr()
    assert all(text in said.err for text in ("failed: train.py exited with 1", "updates were skipped", "1 of 2 runs failed"))
    assert "note: left out: learning_rate=1" in said.out and "defaults (baseline)" in said.out
    assert json.loads((out / "comparison.json").read_text())["runs"][0]["outcome"] == "finished"


def test_a_folder_that_another_process_trains_in_is_waited_for(tmp_path):
    assert not being_trained(tmp_path)
    with CheckpointStore(tmp_path).lock():
        assert being_trained(tmp_path)
    assert not being_trained(tmp_path)


def test_of_several_gpus_each_run_at_a_time_gets_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    auto, cpu = configure([]).train, configure(["--device=cpu"]).train
    assert [gpu_of_slot(slot, 4, auto)["CUDA_VISIBLE_DEVICES"] for slot in range(4)] == ["0", "1", "2", "0"]
    assert gpu_of_slot(0, 1, auto) == gpu_of_slot(0, 4, cpu) == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert gpu_of_slot(1, 2, auto) == {"CUDA_VISIBLE_DEVICES": "7"}
