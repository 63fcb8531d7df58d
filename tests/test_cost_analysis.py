"""detailed_cost_analysis.py as a command: its figures against other ways to them, its shipped models, and bad input."""

from __future__ import annotations

import json
import re
import shlex
import struct
from pathlib import Path

import pytest
import torch

from flops_parameter_counting import detailed_cost_analysis as command
from flops_parameter_counting.flops import flops_per_token
from flops_parameter_counting.hardware import peak_flops
from flops_parameter_counting.memory import CARD_SIZES_GB, card_gb, estimate_memory, largest_micro_batch
from flops_parameter_counting.parameters import count_parameters
from flops_parameter_counting.scaling_laws import LAWS
from model_config import PRESETS, resolve
from training.huggingface import config_from_hf
from training.huggingface_families import FAMILIES
from training.parallelism import STRATEGIES

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "flops_parameter_counting" / "detailed_cost_analysis.py"
MODELS = sorted((command.CONFIGS / "models").glob("*.json"))
PUBLISHED = json.loads((command.CONFIGS / "published.json").read_text(encoding="utf-8"))
SMALL = ["n_layer=2", "n_head=4", "n_embd=64", "vocab_size=256", "block_size=128"]
TINY = dict(n_layer=2, n_head=4, n_embd=64, vocab_size=256, block_size=128)


def answer(capsys, *argv: str) -> dict:
    """The command's --json answer, run in this process."""
    assert command.main([*argv, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def shown(capsys, *argv: str) -> str:
    assert command.main(list(argv)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys, *argv: str) -> str:
    """What a command line is refused with: exit code 2, on stderr, and no traceback."""
    assert command.main(list(argv)) == 2
    said = capsys.readouterr()
    assert not said.out and "Traceback" not in said.err and "(--debug shows where)" not in said.err
    assert all(line.startswith("detailed_cost_analysis.py: ") for line in said.err.splitlines())
    return said.err


# ------------------------------------------------------------------------------------------- the shipped models


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_a_shipped_model_has_as_many_parameters_as_transformers_gives_it(path):
    """Independent of this code but for the file: Hugging Face's own class, built on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    hf = json.loads(path.read_text(encoding="utf-8"))
    config = config_from_hf(hf)
    ours, model_type = count_parameters(config), hf.pop("model_type")
    hf.pop("architectures")
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **hf))
    family = FAMILIES[model_type]
    unread = sum(rule.skipped for rule in family.rules(config)) * config.n_embd  # OPT's rows for padding
    assert ours == theirs.num_parameters() - unread


def test_every_family_is_shipped_and_every_published_figure_has_a_model_and_a_source():
    assert {json.loads(path.read_text(encoding="utf-8"))["model_type"] for path in MODELS} == set(FAMILIES)
    assert set(PUBLISHED) <= {path.stem for path in MODELS} and len(PUBLISHED) >= 10
    assert all(known["source"] and known["parameters"] > 1e8 for known in PUBLISHED.values())


@pytest.mark.parametrize("name, n", [("llama_1.36b", 1_294_159_104), ("gpt2_1.36b", 1_405_452_800)])
def test_the_production_pair_has_its_documented_size(name, n):
    assert count_parameters(config_from_hf(json.loads((command.CONFIGS / "models" / f"{name}.json").read_text()))) == n


def test_validation_passes_and_a_miss_is_exit_code_1(capsys, tmp_path, monkeypatch):
    folder = tmp_path / "configs"
    (folder / "models").mkdir(parents=True)
    for name in ("gpt2_124m", "qwen3_0.6b"):
        (folder / "models" / f"{name}.json").write_text((command.CONFIGS / "models" / f"{name}.json").read_text())
    monkeypatch.setattr(command, "CONFIGS", folder)
    known = {name: dict(PUBLISHED[name]) for name in ("gpt2_124m", "qwen3_0.6b")}
    (folder / "published.json").write_text(json.dumps(known))
    assert "2 of 2 published models met exactly" in shown(capsys, "--validate")
    known["gpt2_124m"]["parameters"] += 1
    (folder / "published.json").write_text(json.dumps(known))
    assert command.main(["--validate"]) == 1
    said = capsys.readouterr().out
    assert "1 of 2 published models met exactly" in said
    assert "MISSED" in next(line for line in said.splitlines() if "gpt2" in line)


def test_all_published_models_are_met(capsys):
    found = answer(capsys, "--validate")
    assert len(found["models"]) >= 10 and not found["missed"]
    assert all(row["published"] == row["counted"] == row["built"] for row in found["models"])


# ------------------------------------------------------------------------------------------- what a model costs


def test_the_figures_are_those_of_the_modules(capsys):
    found = answer(capsys, "--model_config=llama", *SMALL, "--batch_size=3", "--checkpointing=full", "--tokens=1M")
    config = resolve("llama", **TINY)
    flops = flops_per_token(config, checkpointing="full")
    assert found["model"]["parameters"] == count_parameters(config) == sum(row["parameters"] for row in found["components"])
    assert found["flops_per_token"] == dict(full=flops.full, causal=flops.causal, hardware=flops.hardware)
    assert sum(row["forward"] + row["backward"] + row["recompute"] for row in found["components"]) == flops.hardware
    one = estimate_memory(config, batch_size=3, checkpointing="full")
    assert found["memory"]["total"] == one.total == sum(found["memory"]["parts"].values())
    eight = next(row for row in found["memory"]["by_gpus"] if row["gpus"] == 8)
    assert (
        eight["fsdp"]
        == estimate_memory(config, batch_size=3, checkpointing="full", sharding=STRATEGIES["fsdp"].rule, world_size=8).total
    )


def test_time_and_price_follow_from_peak_mfu_and_tokens(capsys):
    found = answer(
        capsys, "--model_config=llama", *SMALL, "--gpu=H100", "--gpus=4", "--mfu=0.5", "--tokens=2B", "--price_per_gpu_hour=3"
    )
    (row,) = found["time"]
    rate = 4 * 0.5 * peak_flops("NVIDIA H100 80GB HBM3", "bfloat16").flops / found["flops_per_token"]["full"]
    assert row["gpu"] == "H100 SXM" and row["tokens_per_s"] == pytest.approx(rate)
    assert row["hours"] == pytest.approx(2e9 / rate / 3600)
    assert row["price"] == pytest.approx(3 * row["gpu_hours"]) == pytest.approx(3 * 4 * row["hours"])
    assert found["predicted"]["compute"] == pytest.approx(2e9 * found["flops_per_token"]["full"])
    free = answer(capsys, "--model_config=llama", *SMALL, "--gpu=H100", "--tokens=2B", "--price_per_gpu_hour=0")
    assert free["time"][0]["price"] == 0 and free["time"][0]["mfu_needed"] is None
    assert "the name also fits H100 PCIe, H100 NVL" in shown(capsys, "--model_config=llama", *SMALL, "--gpu=H100")


def test_recomputation_is_said_to_lower_the_mfu(capsys):
    argv = ["--model_config=llama", *SMALL, "--mfu=0.6"]
    flops = flops_per_token(resolve("llama", **TINY), checkpointing="full")
    left = f"reaches {0.6 * flops.full / flops.hardware:.0%} with it"
    assert left in shown(capsys, *argv, "--checkpointing=full") and "with it" not in shown(capsys, *argv)


def test_without_a_gpu_several_are_compared(capsys):
    found = answer(capsys, "--model_config=gpt2", *SMALL)
    assert [row["gpu"] for row in found["time"]] == list(command.COMPARED)
    assert all(row["hours"] is None and row["price"] is None for row in found["time"]) and "predicted" not in found


def test_six_billion_tokens_on_four_h20_in_six_hours_would_need_four_times_all_that_they_can_do(capsys):
    asked = ["--model_config=config/full_llama_1.36b.py", "--gpu=H20", "--gpus=4", "--tokens=6B", "--hours=6"]
    (row,) = answer(capsys, *asked)["time"]
    assert row["mfu_needed"] == pytest.approx(6e9 * 8.3413e9 / (4 * 148e12 * 6 * 3600), rel=1e-4)
    assert 3.8 < row["mfu_needed"] < 4.0 and row["hours"] == pytest.approx(6 * row["mfu_needed"] / 0.4)
    assert "391%, impossible" in shown(capsys, *asked)


def test_fit_gives_the_largest_micro_batch_of_every_card_and_of_the_one_asked(capsys):
    found = answer(capsys, "--model_config=llama", "--fit=A10", "--gpus=2")["fit"]
    assert [card["gb"] for card in found["cards"]] == sorted([*map(card_gb, CARD_SIZES_GB), 23_028 * 2**20 / 1e9])
    assert found["asked"] == "A10" and found["parallelism"] == "fsdp"
    for card in found["cards"]:
        if card["card"] in ("8 GB", "A10"):
            assert card["micro_batch"] == largest_micro_batch(
                resolve("llama"), card["gb"], sharding=STRATEGIES["fsdp"].rule, world_size=2
            )
    batches = [card["micro_batch"] for card in found["cards"]]
    assert batches == sorted(batches) and batches[0] < batches[-1]


@pytest.mark.parametrize(
    "name, card",
    [
        ("24", ("24 GB", 24_564)),
        ("80", ("80 GB", 81_559)),
        ("36GB", ("36 GB", 36e9 / 2**20)),
        ("12.5 gb", ("12.5 GB", 12.5e9 / 2**20)),
        ("4090", ("RTX 4090", 24_564)),
        ("H100", ("H100 SXM", 81_559)),
        ("A10", ("A10", 23_028)),
        ("a100-40gb", ("A100 SXM 40GB", 40_960)),
    ],
)
def test_a_card_is_a_gpu_or_a_number_of_gb(name, card):
    """Issue 14.9: a card has what its driver reports, in MiB, not the GB that stand on its box."""
    name, gigabytes = command._card(name)
    assert (name, gigabytes) == (card[0], pytest.approx(card[1] * 2**20 / 1e9))


def test_a_recipe_brings_its_run(capsys, tmp_path):
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        'arch_preset = "llama"\nn_layer, n_head, n_embd, block_size = 2, 4, 64, 128\nbatch_size = 5\n'
        'gradient_accumulation_steps = 3\nmax_iters = 10\noptimizer = "muon"\n'
        'activation_checkpointing = "full"\n'
    )
    found = answer(capsys, f"--model_config={recipe}")
    run = found["run"]
    assert run["batch_size"] == 5 and run["optimizer"] == "muon" and run["checkpointing"] == "full"
    assert run["tokens"] == 10 * 5 * 3 * 128
    assert "vocabulary from the dataset" in found["model"]["note"]
    fixed = answer(capsys, f"--model_config={recipe}", "vocab_size=300", "--batch_size=2")
    assert fixed["model"]["note"] is None and fixed["run"]["batch_size"] == 2
    assert fixed["model"]["parameters"] == count_parameters(resolve("llama", **{**TINY, "vocab_size": 300}))


@pytest.mark.parametrize("name", ["qwen3_0.6b", str(command.CONFIGS / "models" / "qwen3_0.6b.json"), "qwen3_0.6b.json"])
def test_a_model_is_found_by_its_name_or_path(name, capsys):
    assert answer(capsys, f"--model_config={name}", "--batch_size=1", "--context=256")["model"]["parameters"] == 596_049_920


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_be_asked_about_and_shown(preset, capsys):
    said = shown(capsys, f"--model_config={preset}", *SMALL, "--tokens=1B", "--price_per_gpu_hour=1")
    assert f"N = {count_parameters(resolve(preset, **TINY)):,}" in said
    for word in ("head", "attention", "Not counted in any of them", "Peak memory", "fsdp", "price", "besiroglu predicts"):
        assert word in said


# ------------------------------------------------------------------------------------------- what a budget buys


@pytest.mark.parametrize(
    "path", sorted((command.CONFIGS / "scaling_laws").rglob("*.jsonc")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_every_shipped_question_is_answered(path, capsys):
    found = answer(capsys, f"--backward_config={path.parent.name}/{path.stem}")
    gear, best = found["gear"], found["shapes"][0]
    peak = float(gear["peak"].split()[0]) * 1e12
    assert found["compute"] == pytest.approx(gear["count"] * gear["hours"] * 3600 * gear["mfu"] * peak)
    assert found["closed_form"]["parameters"] * found["closed_form"]["tokens"] * 6 == pytest.approx(found["compute"])
    assert best["hours"] <= gear["hours"] * (1 + 1e-9) and len(found["shapes"]) > 3
    assert best["loss"] >= (found["limited"] or found["closed_form"])["loss"] * 0.97
    assert f"{gear['count']} × {gear['gpu']}" in shown(capsys, f"--backward_config={path}")


def test_a_grid_search_answers_by_every_law(capsys):
    found = answer(capsys, "--grid_search=1.36e21", "--law=besiroglu", "--preset=qwen3", "vocab_size=50304")
    by_law = {plan["law"]: plan for plan in found["laws"]}
    assert by_law["hoffmann"]["parameters"] == pytest.approx(2.1e9, rel=0.01)
    assert by_law["besiroglu"]["tokens"] == pytest.approx(70e9, rel=0.01)
    assert found["law"]["name"] == "besiroglu" and all("QKNorm" in one["architecture"] for one in found["shapes"])
    assert "kaplan" in shown(capsys, "--grid_search=1e19")


def test_the_plot_is_a_picture(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    for number, argv in enumerate(
        (
            ["--grid_search=1e20"],
            ["--backward_config=besiroglu/h20_4_slimpajama_6b"],
            ["--model_config=llama", *SMALL, "--tokens=1B"],
        )
    ):
        path = tmp_path / f"{number}.png"
        assert f"plot: {path}" in shown(capsys, *argv, f"--plot={path}")
        data = path.read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and width > 1000 and height > 400 and len(data) > 20_000


@pytest.mark.parametrize(
    "argv",
    [
        ["--grid_search=1"],
        ["--grid_search=1e60"],
        ["--grid_search=1e14", "vocab_size=128000"],
        ["--model_config=llama", "--tokens=1e40"],
        ["--model_config=llama", "--gpus=1000000000"],
        ["--backward_config={}"],
    ],
)
def test_a_budget_that_is_none_is_a_usage_error(argv, tmp_path, capsys):
    """Issue 14.9."""
    file = tmp_path / "asked.jsonc"
    file.write_text('{"law": "besiroglu", "gear": {"gpu": "T4", "count": 1, "hours": 1e-9, "mfu": 0.1, "dtype": "float16"}}')
    assert command.main([word.format(file) for word in argv]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Error" not in said, said


def test_hoffmanns_rounded_constants_are_warned_of(capsys):
    """Issue 14.9: 93 tokens a parameter at Chinchilla's own budget, where the paper says 20."""
    n, d = LAWS["hoffmann"].optimum(5.76e23)
    assert round(d / n) == 93
    n, d = LAWS["besiroglu"].optimum(5.76e23)
    assert 15 < d / n < 25
    assert command.main(["--grid_search=1e20", "--law=hoffmann"]) == 0
    assert "warning: hoffmann: its constants are published rounded" in capsys.readouterr().err
    assert command.main(["--grid_search=1e20"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert command.main(["--backward_config=hoffmann/h100_8_one_week"]) == 0
    assert "93 tokens a parameter" in capsys.readouterr().err


def test_the_plot_keeps_the_limit_of_epochs(monkeypatch, capsys, tmp_path):
    """Issue 14.9: --plot drew what the budget buys if the data could be seen without end."""
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    drawn, original = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *a, **k: drawn.append((a, k.get("label"))) or original(self, *a, **k))
    file = tmp_path / "asked.jsonc"
    file.write_text(
        '{"law": "besiroglu", "gear": {"gpu": "H20", "count": 64, "hours": 480, "mfu": 0.4},'
        ' "data": {"unique_tokens": "1B", "max_epochs": 2}}'
    )
    assert command.main([f"--backward_config={file}", f"--plot={tmp_path / 'x.png'}"]) == 0
    law, most = LAWS["besiroglu"], 2e9
    curves = [(words[0], words[1]) for words, label in drawn if label and "FLOPs" in label]
    assert len(curves) == 4
    for factor, (sizes, losses) in zip((0.01, 0.1, 1, 10), curves):
        compute = 64 * 480 * 3600 * 0.4 * 148e12 * factor
        for n, loss in zip(sizes, losses):
            d = min(compute / (6 * n), most)
            assert loss == pytest.approx(law.loss_with_repeats(n, d, 1e9))
    assert any(label and "at most 2 times" in label for _, label in drawn)


# ------------------------------------------------------------------------------------------- the page about it


def blocks() -> list[tuple[list[str], list[str]]]:
    """docs/COST.md's console blocks: (arguments, lines of output; '…' stands for lines left out)."""
    text = (ROOT / "docs" / "COST.md").read_text(encoding="utf-8")
    found = []
    for block in re.findall(r"```console\n\$ (.*?)\n```", text, re.DOTALL):
        first, *lines = block.replace("\\\n", " ").split("\n")
        words = shlex.split(first)
        assert words[:2] == ["python", "flops_parameter_counting/detailed_cost_analysis.py"]
        found.append((words[2:], lines))
    return found


@pytest.mark.parametrize("argv, lines", blocks(), ids=lambda value: value[0] if value and value[0].startswith("--") else "")
def test_the_page_shows_what_the_command_prints(argv, lines, capsys, tmp_path, monkeypatch):
    if not torch.__version__.startswith("2.13."):
        pytest.skip("the page was made with PyTorch 2.13; memory and element-wise steps depend a little on the version")
    printed = iter(
        line.rstrip()
        for line in shown(capsys, *(word.replace("plan.png", str(tmp_path / "plan.png")) for word in argv)).splitlines()
    )
    for line in lines:
        if line.strip() not in ("", "…") and not line.startswith("plot: "):
            assert line.rstrip() in printed, line  # from where the last one was found on


# ------------------------------------------------------------------------------------------- the command


def test_the_script_runs_from_any_folder(run_python, tmp_path):
    said = run_python(SCRIPT, "--grid_search=1e19", cwd=tmp_path)
    assert said.returncode == 0 and "closed forms" in said.stdout, said.stderr
    wrong = run_python(SCRIPT, "--grid_search=-1", cwd=tmp_path)
    assert wrong.returncode == 2 and wrong.stderr.startswith("detailed_cost_analysis.py: --grid_search=-1 must be positive")
    assert run_python(SCRIPT, "--help", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    "argv, said",
    [
        ([], "one of the arguments --model_config --backward_config --grid_search --validate is required"),
        (["--model_config=llama", "--validate"], "not allowed with"),
        (["--model_config=llama", "--batch=3"], "unrecognized arguments"),
        (["--model_config=llama3_8"], "neither a preset nor a file (did you mean 'llama3_8b'?)"),
        (["--model_config=llama", "n_layr=3"], "'n_layr' is not a key of a model (did you mean 'n_layer'?)"),
        (["--model_config=llama", "n_layer"], "'n_layer' is not KEY=VALUE"),
        (["--model_config=llama", "n_layer=-3"], "n_layer=-3 must be"),
        (["--model_config=llama", "n_head=7"], "n_head=7 does not divide"),
        (["--model_config=llama", "--gpu=H1000"], "'H1000' is no GPU whose figures are known here (nearest: H100 SXM"),
        (["--model_config=llama", "--fit=tiny"], "--fit: 'tiny' is no GPU"),
        (["--model_config=llama", "--fit=0"], "--fit: must be positive"),
        (["--model_config=llama", "--gpu=T4"], "No dense bfloat16 peak of T4 is known"),
        (["--model_config=llama", "--mfu=40"], "--mfu=40.0 must be above 0 and at most 1"),
        (["--model_config=llama", "--mfu=nan"], "--mfu=nan"),
        (["--model_config=llama", "--gpus=0"], "--gpus=0 must be at least 1"),
        (["--model_config=llama", "--context=-5"], "--context=-5 must"),
        (["--model_config=llama", "--tokens=-6B"], "--tokens=-6B must be positive"),
        (["--model_config=llama", "--tokens=lots"], "is not a number"),
        (["--model_config=llama", "--hours=0"], "--hours=0.0 must be positive"),
        (["--model_config=llama", "--price_per_gpu_hour=-1"], "must not be negative"),
        (["--model_config=llama", "--plot=x.jpg"], "must end in .png"),
        (["--model_config=llama", *SMALL, "--plot=x.png"], "give --tokens"),
        (["--model_config=gpt2", "--context=4096"], "context"),
        (["--grid_search=0"], "--grid_search=0 must be positive"),
        (["--grid_search=much"], "is not a number"),
        (["--grid_search=1e9"], "--grid_search=1e9 is not between 1e+14 and 1e+30"),
        (["--grid_search=2e14", "vocab_size=2000000"], "No shape of preset 'llama' has about"),
        (["--grid_search=1e19", "n_hed=3"], "'n_hed' is not a key of a model"),
        (["--grid_search=1e19", "vocab_size=x"], "vocab_size"),
        (["--backward_config=nothing"], "is no file. There is: besiroglu/h100_8_one_week"),
        (["--validate", "n_layer=3"], "architecture keys are for"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_used_is_said_in_a_sentence_with_exit_code_2(argv, said, capsys):
    assert said in refused(capsys, *argv)


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "is not JSON"),
        ('{"a": 1} // why', "is not JSON"),
        ("[]", "no Hugging Face config.json"),
        ('{"a": 1}', "it has no model_type"),
        ('{"model_type": "mamba"}', "model_type='mamba' is not one of the families"),
        ('{"model_type": "gpt2", "n_embd": 30, "n_layer": 2}', "n_head=12 does not divide n_embd=30"),  # its class's n_head
        (dict(num_attention_heads=0), "LlamaConfig does not accept this config.json"),
        (dict(hidden_size="wide"), "LlamaConfig does not accept this config.json"),
        (dict(num_hidden_layers=0), "n_layer=0 must be at least 1"),
        (dict(intermediate_size=-8), "d_ff=-8 must be at least 1"),
        (dict(vocab_size=None), "vocab_size is null"),
        (dict(num_hidden_layers=None), "num_hidden_layers is null"),
        (dict(num_key_value_heads=3), "n_kv_head=3 does not divide n_head=4"),
        (dict(hidden_act="cosine"), "hidden_act='cosine' has no counterpart"),
    ],
    ids=str,
)
def test_a_model_file_that_makes_no_model_is_refused(content, said, capsys, tmp_path):
    whole = dict(
        model_type="llama",
        hidden_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        intermediate_size=96,
        vocab_size=99,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
    )
    path = tmp_path / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps({**whole, **content}))
    assert said in refused(capsys, f"--model_config={path}")


def test_a_question_in_a_file_is_refused_with_exit_code_2_too(capsys, tmp_path):
    path = tmp_path / "q.jsonc"
    path.write_text('{"law": "hoffmann", "gear": {"gpu": "https://h100", "count": -8, "hours": 1, "mfu": 0.4}} // "')
    said = refused(capsys, f"--backward_config={path}")
    assert "gear.gpu: 'https://h100' is no GPU" in said and "gear.count=-8 must be positive" in said
