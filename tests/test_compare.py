"""Comparisons: statistics against published figures and scipy; resumed and killed runs; what is grouped and refused."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import scipy.stats
from conftest import ROOT

import compare_architectures
import training_logger
from command_line import Failure, UsageError
from comparison import NotComparable, compare, group_runs, load_runs, table
from comparison.groups import Difference
from comparison.inference import ALPHA, POWER, Verdict, adjust, compare_means, detectable, estimate
from comparison.report import sentence
from configurator import configure
from model_config import resolve
from tests.preloaded import preloaded_python
from training.train_config import KEYS
from training_logger import TrainingLogger

DATASET = {
    "name": "pydocs",
    "fingerprint": "f1",
    "tokenizer": {"name": "bpe-256", "fingerprint": "t1"},
    "splits": {
        "train": {"tokens": 90_000, "bytes": 300_000, "documents": 9},
        "val": {"tokens": 1_001, "bytes": 3_000, "documents": 1},
    },
}
TOKENS_PER_STEP = 64


def make_run(
    folder: Path,
    *options: str,
    val_loss: float = 3.0,
    steps: int = 40,
    first: int = 1,
    length: int = 40,
    outcome: str | None = "finished",
    resumed_from: dict | None = None,
    val_tokens: int = 1000,
    bits_per_byte: float | None = 1.5,
    step_ms: float = 20.0,
    loss: float = 3.2,
    dataset: dict = DATASET,
    dtype: str = "float32",
    eval_interval: int = 10,
    hardware: str = "CPU one",
    started: str | None = None,
) -> Path:
    """A run's log, written by the logger itself with the configuration that `options` give; returns the .jsonl.

    Logs every fifth step; evaluates every `eval_interval` steps, the last time with `val_loss`. outcome None: killed.
    """
    configuration = configure(
        [
            "--n_layer=2",
            "--n_head=2",
            "--n_embd=32",
            "--block_size=16",
            "--vocab_size=256",
            f"--max_iters={length}",
            f"--out_dir={folder}",
            *options,
        ]
    )
    model = configuration.train.model_config(256)
    config, origins = configuration.resolved(model)
    log = TrainingLogger(folder, resumed_from=resumed_from)
    log.start(
        config=config,
        origins=origins,
        dtype=dtype,
        length=length,
        tokens_per_iteration=TOKENS_PER_STEP,
        dataset=dataset,
        hardware={"device_name": hardware},
        model=dict(
            name=model.name,
            fingerprint=model.fingerprint,
            config=model.to_dict(),
            parameters=12_345,
            flops_per_token={"full": 1000, "causal": 900, "hardware": 1000},
        ),
    )
    for step in range(first, steps + 1):
        tokens = step * TOKENS_PER_STEP
        if step % 5 == 0:
            log.step(
                step,
                tokens,
                loss=loss + 1 / step,
                lr=1e-3,
                grad_norm=0.5,
                mfu=0.25,
                memory_gb=0.5,
                tokens_per_s=TOKENS_PER_STEP * 1e3 / step_ms,
                step_ms={"data": 0.0, "compute": step_ms, "optimizer": 0.0, "total": step_ms},
            )
        if step % eval_interval == 0:
            log.evaluation(
                step, tokens, val_loss=val_loss + (steps - step) / 10, val_tokens=val_tokens, bits_per_byte=bits_per_byte
            )
    if outcome:
        log.end(outcome, step=steps, tokens=steps * TOKENS_PER_STEP)
    if started:  # tests make several runs within a second
        lines = log.path.read_text().split("\n")
        log.path.write_text("\n".join([json.dumps({**json.loads(lines[0]), "time": started}), *lines[1:]]))
        log.document_path.unlink()
    return log.path


def seeds_of(folder: Path, name: str, losses, *options: str, **facts) -> list[Path]:
    """A run a loss, with seeds 1, 2, 3 …"""
    return [
        make_run(folder / f"{name}-{seed}", f"--seed={seed}", f"--data_seed={seed}", *options, val_loss=loss, **facts)
        for seed, loss in enumerate(losses, start=1)
    ]


def compared(*folders: Path, by=(), **options):
    return compare(group_runs(load_runs(folders), by), **options)


def command(*arguments, capsys) -> tuple[int, str, str]:
    code = compare_architectures.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


# Statistics.

# Hours of sleep gained under two drugs by ten patients (Student 1908); the expected figures are those that R prints for
# t.test on its dataset `sleep`.
SLEEP_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SLEEP_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def test_students_sleep_data_gives_the_published_paired_test():
    [test] = adjust([compare_means(dict(enumerate(SLEEP_2)), dict(enumerate(SLEEP_1)))])
    assert test.method == "paired t" and test.freedom == 9 and test.n == (10, 10)
    assert test.difference / test.error == pytest.approx(-4.0621, abs=5e-5)
    assert test.p == test.p_holm == pytest.approx(0.002833, abs=5e-7)
    assert (test.low, test.high) == pytest.approx((-2.4598858, -0.7001142), abs=5e-8)
    assert test.shown is True


def test_students_sleep_data_gives_the_published_welch_test():
    [test] = adjust([compare_means(dict(enumerate(SLEEP_2)), {100 + i: value for i, value in enumerate(SLEEP_1)})])
    assert test.method == "Welch t" and test.freedom == pytest.approx(17.776, abs=5e-4)
    assert test.p == pytest.approx(0.07939, abs=5e-6)
    assert (test.low, test.high) == pytest.approx((-3.3654832, 0.2054832), abs=5e-8)
    assert test.shown is False


@pytest.mark.parametrize("a, b", [(2, 2), (3, 3), (3, 5), (10, 4), (6, 6)])
def test_tests_and_intervals_are_scipys(a, b):
    """With the degrees of freedom of two sides of the smaller size where Welch's own are more."""
    random = numpy.random.default_rng(a * 100 + b)
    left, right = random.normal(3, 0.1, a), random.normal(3.1, 0.3, b)
    expected = scipy.stats.ttest_ind(right, left, equal_var=False)
    freedom = min(expected.df, 2 * (min(a, b) - 1))
    error = (right.mean() - left.mean()) / expected.statistic
    half = scipy.stats.t.ppf(0.975, freedom) * error
    [test] = adjust([compare_means({("a", i): x for i, x in enumerate(left)}, {("b", i): x for i, x in enumerate(right)})])
    assert test.method == "Welch t" and test.p == pytest.approx(2 * scipy.stats.t.sf(abs(expected.statistic), freedom), rel=1e-9)
    assert (test.low, test.high) == pytest.approx((test.difference - half, test.difference + half), rel=1e-9)
    if a == b:
        [paired] = adjust([compare_means(dict(enumerate(left)), dict(enumerate(right)))])
        if a < 5:
            assert paired == test
        else:
            expected = scipy.stats.ttest_rel(right, left)
            assert paired.p == pytest.approx(expected.pvalue, rel=1e-9)
            assert (paired.low, paired.high) == pytest.approx(tuple(expected.confidence_interval()), rel=1e-9)
    found = estimate(list(left))
    assert (found.low, found.high) == pytest.approx(
        scipy.stats.t.interval(0.95, a - 1, left.mean(), scipy.stats.sem(left)), rel=1e-9
    )


def test_pairs_are_made_of_equal_seeds_five_at_least_whatever_the_figures():
    three, five = {1: 1.0, 2: 1.2, 3: 1.1}, {1: 1.0, 2: 1.2, 3: 1.1, 4: 1.3, 5: 1.25}
    for figures in (five, dict.fromkeys(five, 1.0) | {1: 2.0}, {seed: value + 1 for seed, value in five.items()}):
        assert compare_means(five, figures).method == "paired t"
        assert compare_means(three, {seed: figures[seed] for seed in three}).method == "Welch t"
        assert compare_means(five, {seed: figures[seed] for seed in three}).method == "Welch t"
        assert compare_means(five, {seed + 1: value for seed, value in figures.items()}).method == "Welch t"
    single = compare_means(three, {1: 2.0})
    assert single.method is None and single.p is None and single.shown is None
    assert single.difference == pytest.approx(0.9) and single.n == (3, 1)


def test_holm_adjusts_as_in_a_worked_example():
    tests = adjust([Verdict(1.0, "Welch t", (3, 3), 1.0, 4.0, p) for p in (0.01, 0.04, 0.03, 0.005)])
    assert [test.p_holm for test in tests] == pytest.approx([3 * 0.01, 2 * 0.03, 2 * 0.03, 4 * 0.005])
    assert [test.shown for test in tests] == [True, False, False, True]
    assert [test.level for test in tests] == pytest.approx([1 - 0.05 / 3, 1 - 0.05 / 2, 1 - 0.05 / 2, 1 - 0.05 / 4])
    assert adjust([Verdict(0.5), tests[0]])[0].p_holm is None  # what cannot be tested is no comparison


def test_an_interval_holds_zero_exactly_where_no_difference_is_shown():
    random, seen = numpy.random.default_rng(1), set()
    for _ in range(60):
        groups = [dict(enumerate(random.normal(mean, 0.1, 4))) for mean in random.choice([3.0, 3.1, 3.3], 4)]
        for test in adjust([compare_means(groups[0], other) for other in groups[1:]]):
            assert test.shown == (not test.low <= 0 <= test.high)
            seen.add(test.shown)
    assert seen == {True, False}


def test_groups_of_one_distribution_are_told_apart_no_oftener_than_promised():
    random, families = numpy.random.default_rng(2), 400
    false = 0
    for _ in range(families):
        groups = [dict(enumerate(random.normal(3, 0.1, 3))) for _ in range(3)]
        tests = adjust([compare_means(groups[a], groups[b]) for a, b in ((0, 1), (0, 2), (1, 2))])
        false += any(test.shown for test in tests)
    assert false <= families * ALPHA + 4 * math.sqrt(families * ALPHA * (1 - ALPHA))


@pytest.mark.parametrize("freedom", [2, 5, 30])
@pytest.mark.parametrize("alpha", [0.05, 0.05 / 10])
def test_the_detectable_difference_is_detected_with_the_power_it_is_named_for(freedom, alpha):
    random, tries, n = numpy.random.default_rng(3), 20_000, freedom + 1
    samples = random.normal(detectable(1 / math.sqrt(n), freedom, alpha), 1.0, (tries, n))
    t = samples.mean(1) / (samples.std(1, ddof=1) / math.sqrt(n))
    seen = (abs(t) > scipy.stats.t.ppf(1 - alpha / 2, freedom)).mean()
    assert seen == pytest.approx(POWER, abs=4 * math.sqrt(POWER * (1 - POWER) / tries))


def test_repetitions_without_scatter_agree_or_say_nothing():
    """Two runs that give the same figure to the last bit are one run done twice: there is no p < 0.001 in that."""
    same, other = {1: 2.0, 2: 2.0}, {1: 3.0, 2: 3.0}
    shifted = {seed: seed / 7 for seed in range(1, 6)}
    tests = adjust(
        [
            compare_means(same, dict(same)),
            compare_means(same, other),
            compare_means(shifted, {seed: value + 0.1 for seed, value in shifted.items()}),  # pairs, apart by rounding
        ]
    )
    assert [(t.p_holm, t.shown, t.low, t.high) for t in tests] == [(1.0, False, 0.0, 0.0), *[(None, None, None, None)] * 2]
    assert [t.untested for t in tests] == ["", "scatter", "scatter"]
    for test in tests[1:]:
        said = sentence(Difference("a", "b", test), "val_loss")
        assert "nothing is claimed" in said and "p " not in said and "has a lower" not in said


# Runs.


def test_a_run_is_summed_up_as_its_log_has_it(tmp_path):
    path = make_run(tmp_path / "a", "--seed=7", val_loss=2.5)
    [run] = load_runs([tmp_path])
    model = resolve("gpt2", n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=256)
    assert (run.name, run.architecture, run.fingerprint) == (str(path.with_suffix("")), model.name, model.fingerprint)
    assert (run.steps, run.tokens, run.parameters, run.flops_per_token) == (40, 2560, 12_345, 1000)
    assert (run.val_loss, run.best_val_loss, run.bits_per_byte, run.val_tokens) == (2.5, 2.5, 1.5, 1000)
    assert run.train_loss == pytest.approx(3.2 + 1 / 40)  # of steps 37 to 40, of which 40 is logged
    assert (run.tokens_per_s, run.mfu, run.memory_gb) == (3200, 0.25, 0.5)
    assert run.seconds == pytest.approx(40 * 0.020)
    assert run.evals["seconds"] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert run.evals["flops"] == [640_000, 1_280_000, 1_920_000, 2_560_000]
    assert run.finished and run.seeds == (7, 1337) and run.state == "finished"


def test_the_json_the_jsonl_and_their_folder_are_one_run(tmp_path):
    path = make_run(tmp_path / "a")
    found = load_runs([tmp_path, path, path.with_suffix(".json"), tmp_path / "a"])
    assert len(found) == 1
    document, lines = load_runs([path.with_suffix(".json")]), load_runs([path])
    assert document[0].evals == lines[0].evals == found[0].evals and document[0].curve == lines[0].curve


def test_a_run_killed_in_mid_line_still_compares(tmp_path, capsys):
    seeds_of(tmp_path, "whole", [3.0, 3.1])
    path = make_run(tmp_path / "killed", "--seed=3", "--data_seed=3", steps=33, outcome=None)
    path.write_bytes(path.read_bytes()[:-25])  # the evaluation at step 30
    killed = load_runs([path])[0]
    assert (killed.steps, killed.outcome, killed.val_loss) == (30, "running", pytest.approx(3.0 + 13 / 10))
    code, out, err = command(tmp_path, capsys=capsys)
    assert code == 1 and f"{killed.name} is unfinished (killed or still running after step 30 of 40)" in err
    code, out, err = command(tmp_path, "--force", capsys=capsys)
    assert code == 0 and "not comparable: unfinished" in out


def test_a_run_killed_before_its_first_document_or_evaluation_is_read(tmp_path):
    path = make_run(tmp_path / "a", steps=8, outcome=None)
    path.with_suffix(".json").unlink()
    [run] = load_runs([tmp_path])
    assert (run.steps, run.val_loss, run.seconds) == (5, None, pytest.approx(0.1))


def test_the_time_of_an_evaluation_between_two_logged_steps_lies_between_theirs(tmp_path):
    [run] = load_runs([make_run(tmp_path, eval_interval=8)])  # logged are 5, 10, 15 …; a step takes 20 ms
    assert run.evals["step"] == [8, 16, 24, 32, 40]
    assert run.evals["seconds"] == pytest.approx([0.16, 0.32, 0.48, 0.64, 0.8])


def resumed(parent: Path, step: int) -> dict:
    return {"run": str(parent), "checkpoint": f"step_{step}", "step": step}


def test_a_resumed_chain_is_one_run_and_the_later_log_counts(tmp_path):
    first = make_run(tmp_path, steps=30, outcome=None, loss=9.0, started="2026-01-01T00:00:00+00:00")
    second = make_run(
        tmp_path,
        "--init_from=resume",
        first=21,
        steps=30,
        resumed_from=resumed(first, 20),
        loss=5.0,
        step_ms=40.0,
        outcome="stopped",
        started="2026-01-01T01:00:00+00:00",
    )
    third = make_run(
        tmp_path, "--init_from=auto", first=31, resumed_from=resumed(second, 30), loss=3.0, started="2026-01-01T02:00:00+00:00"
    )
    [run] = load_runs([tmp_path])
    assert run.paths == tuple(path.with_suffix("") for path in (first, second, third)) and run.finished
    assert run.started.startswith("2026-01-01T00")
    assert run.curve["step"] == list(range(5, 41, 5)) and run.evals["step"] == [10, 20, 30, 40]
    losses = [round(loss - 1 / step) for step, loss in zip(run.curve["step"], run.curve["loss"])]
    assert losses == [9, 9, 9, 9, 5, 5, 3, 3]
    assert run.curve["seconds"] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 0.9, 1.0])
    assert load_runs([third])[0].curve == run.curve  # the others are looked for


def test_the_best_loss_is_of_the_validation_set_that_the_run_ended_with(tmp_path):
    first = make_run(tmp_path, steps=20, outcome="stopped", val_loss=1.0, val_tokens=500, started="2026-01-01T00:00:00+00:00")
    make_run(
        tmp_path,
        "--init_from=resume",
        first=21,
        resumed_from=resumed(first, 20),
        val_loss=3.0,
        started="2026-01-01T01:00:00+00:00",
    )
    [run] = load_runs([tmp_path])
    assert min(run.evals["val_loss"]) == 1.0 and run.best_val_loss == 3.0


def test_steps_between_the_last_log_line_and_the_checkpoint_take_their_time_too(tmp_path):
    first = make_run(tmp_path, steps=12, outcome="stopped", started="2026-01-01T00:00:00+00:00")  # logged up to 10
    make_run(tmp_path, "--init_from=resume", first=13, resumed_from=resumed(first, 12), started="2026-01-01T01:00:00+00:00")
    [run] = load_runs([tmp_path])
    assert run.curve["seconds"] == pytest.approx([step * 0.020 for step in run.curve["step"]])


def test_warnings_in_a_log_are_noted_once_for_all_runs_that_have_them(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        path = make_run(tmp_path / name, f"--seed={seed}", outcome=None)
        line = {"event": "warning", "time": "2026-01-01T00:00:00+00:00", "message": "no peak is known"}
        end = {"event": "run_end", "time": "2026-01-01T00:00:00+00:00", "outcome": "finished"}
        path.write_text(path.read_text() + json.dumps(line) + "\n" + json.dumps(end) + "\n")
    [note] = compared(tmp_path).notes
    assert note.startswith("2 runs, ") and note.endswith("1 warning in its log, the first: no peak is known.")


def test_what_was_logged_after_the_step_that_is_resumed_from_is_superseded(tmp_path):
    first = make_run(tmp_path, steps=20, outcome="stopped", started="2026-01-01T00:00:00+00:00")
    make_run(
        tmp_path,
        "--init_from=resume",
        first=11,
        steps=40,
        resumed_from=resumed(first, 10),
        loss=7.0,
        outcome=None,
        started="2026-01-01T01:00:00+00:00",
    )
    make_run(
        tmp_path,
        "--init_from=resume",
        first=11,
        steps=15,
        resumed_from=resumed(first, 10),
        loss=5.0,
        outcome=None,
        started="2026-01-01T02:00:00+00:00",
    )
    [run] = load_runs([tmp_path])
    assert run.curve["step"] == [5, 10, 15] and round(run.curve["loss"][-1]) == 5 and run.evals["step"] == [10]


def test_a_finished_run_stays_one_when_another_folder_continues_it(tmp_path):
    first = make_run(tmp_path / "a")
    make_run(
        tmp_path / "b",
        "--resume",
        "--max_iters=60",
        first=21,
        steps=60,
        length=60,
        resumed_from=resumed(first, 20),
    )
    runs = {Path(run.name).parent.name: run for run in load_runs([tmp_path])}
    assert {name: run.steps for name, run in runs.items()} == {"a": 40, "b": 60}
    assert runs["b"].curve["step"] == list(range(5, 61, 5)) and len(runs["b"].paths) == 2
    assert [run.steps for run in load_runs([tmp_path / "b"])] == [60]


def test_a_moved_folder_keeps_its_chain_and_a_lost_first_part_is_said(tmp_path):
    first = make_run(tmp_path / "a", steps=20, outcome="stopped", started="2026-01-01T00:00:00+00:00")
    make_run(tmp_path / "a", "--init_from=resume", first=21, resumed_from=resumed(first, 20), started="2026-01-01T01:00:00+00:00")
    (tmp_path / "a").rename(tmp_path / "moved")
    [run] = load_runs([tmp_path / "moved"])
    assert len(run.paths) == 2 and run.curve["step"][0] == 5
    (tmp_path / "moved" / first.name).unlink()
    [run] = load_runs([tmp_path / "moved"])
    assert run.curve["step"][0] == 25 and run.tokens == 2560 and run.seconds == pytest.approx(0.4)
    assert "first 20 steps" in run.notes[0] and "missing" in run.notes[0]


def test_a_start_from_weights_is_a_run_of_its_own(tmp_path):
    first = make_run(tmp_path / "a")
    make_run(tmp_path / "b", f"--init_from=weights:{tmp_path}/a/checkpoints/latest", resumed_from=resumed(first, 0))
    runs = load_runs([tmp_path])
    assert [len(run.paths) for run in runs] == [1, 1] and len(group_runs(runs)) == 2


def test_evaluations_are_no_runs_and_damage_is_said_or_an_error(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", "--eval_only", steps=0, outcome="evaluated")
    broken = tmp_path / "c" / "run_20260101_000000.jsonl"
    broken.parent.mkdir()
    broken.write_text("no log\n")
    (tmp_path / "d").mkdir()
    other = tmp_path / "d" / "run_20260101_000000.json"
    other.write_text('{"schema_version": 1, "outcome": "finished", "config": {}}')
    warnings = []
    assert len(load_runs([tmp_path], warn=warnings.append)) == 1
    assert sum("eval_only" in warning for warning in warnings) == 1
    assert any(str(broken) in warning and "line 1" in warning for warning in warnings)
    assert any("which model" in warning for warning in warnings) and len(warnings) == 3
    for path, message in ((broken, "line 1"), (other, "which model"), (tmp_path / "e", "does not exist")):
        with pytest.raises(Failure, match=message):
            load_runs([path])


def test_a_damaged_document_is_read_from_its_lines(tmp_path):
    path = make_run(tmp_path)
    expected = load_runs([path])[0].curve
    path.with_suffix(".json").write_text("{")
    assert load_runs([tmp_path])[0].curve == expected


def test_latest_takes_the_runs_that_started_last(tmp_path):
    for number in (1, 3, 2):
        make_run(tmp_path / str(number), started=f"2026-01-0{number}T00:00:00+00:00")
    assert [Path(run.name).parent.name for run in load_runs([tmp_path], latest=2)] == ["2", "3"]


# Groups.


def other_value(key: str):
    """A value of a configuration key that is not its default."""
    return {
        "optimizer": "muon",
        "lr_schedule": "linear",
        "dtype": "float32",
        "activation_checkpointing": "full",
        "device": "cpu",
        "notice": "hello",
        "out_dir": "elsewhere",
        "init_from": "auto",
        "min_lr": 1e-5,
        "lr_decay_iters": 77,
        "learning_rate": 1e-5,
        "beta1": 0.5,
        "beta2": 0.5,
        "muon_momentum": 0.5,
        "adam_eps": 1e-3,
        "lr_decay_fraction": 0.5,
        "compile": True,
    }.get(key, 3)


NOT_BY_THEMSELVES = ("eval_only", "parallelism", "epochs", "max_tokens", "max_iters", "total_batch_tokens", "dataset")


@pytest.mark.parametrize(
    "key", [name for name, field in KEYS.items() if name not in NOT_BY_THEMSELVES and field.metadata["group"] != "architecture"]
)
def test_a_key_separates_groups_where_it_makes_another_experiment(tmp_path, key):
    [run] = load_runs([make_run(tmp_path / "a")])
    other = replace(run, config={**run.config, key: other_value(key)})
    assert other.config[key] != run.config[key]
    experiment = KEYS[key].metadata["group"] in ("optimizer", "schedule") or key in (
        "patience",
        "block_size",
        "pack",
        "max_train_tokens",
        "mixture_schedule",
    )
    assert len(group_runs([run, other])) == (2 if experiment else 1)
    assert len(group_runs([run, other], by=[key])) == 2


def test_runs_of_another_model_dataset_dtype_or_batch_are_other_groups(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", dtype="bfloat16")
    make_run(tmp_path / "c", dataset={**DATASET, "fingerprint": "f2"})
    make_run(tmp_path / "d", "--normalization=rmsnorm")
    groups = group_runs(load_runs([tmp_path]))
    assert [len(group.runs) for group in groups] == [1] * 4
    names = [group.name for group in groups]
    assert len(set(names)) == 4
    assert sum("dtype=bfloat16" in name for name in names) == 1 and any("-RMS-" in name for name in names)


def test_an_unknown_key_to_group_by_is_a_usage_error(tmp_path, capsys):
    make_run(tmp_path)
    code, _, err = command(tmp_path, "--group_by=learning_rat", capsys=capsys)
    assert code == 2 and "did you mean 'learning_rate'" in err


def test_the_same_seeds_twice_are_no_repetition(tmp_path):
    make_run(tmp_path / "a", val_loss=3.0, started="2026-01-01T00:00:00+00:00")
    make_run(tmp_path / "b", val_loss=4.0, started="2026-01-02T00:00:00+00:00")
    [group] = group_runs(load_runs([tmp_path]))
    assert len(group.runs) == 2 and list(group.values("val_loss").values()) == [4.0]
    assert group.estimate("val_loss").n == 1
    assert any("the last run counts" in note for note in compare([group]).notes)


def test_labels_say_what_is_particular_to_each_group(tmp_path):
    for number, options in enumerate(
        (
            ("--arch_preset=gpt2",),
            ("--arch_preset=gpt2", "--normalization=rmsnorm"),
            ("--arch_preset=gpt2", "--learning_rate=1e-5"),
        )
    ):
        make_run(tmp_path / str(number), *options)
    comparison = compared(tmp_path)
    assert len(set(comparison.labels.values())) == 3
    assert {label for label in comparison.labels.values() if "RMS" in label} == {"RMS"}
    make_run(tmp_path / "0" / "more", "--seed=2", "--data_seed=2")
    renamed = compare([replace(group, name=f"rate=1e-0{i}") for i, group in enumerate(comparison.groups)])
    assert all(name == label for name, label in renamed.labels.items())  # somebody's own names stay whole
    only_rates = compare(group_runs([run for run in load_runs([tmp_path]) if "RMS" not in run.architecture]))
    assert set(only_rates.labels.values()) == {"learning_rate=0.0006", "learning_rate=1e-05"}


# Comparisons.


def test_the_same_twice_shows_no_difference_and_names_what_could_have_been_seen(tmp_path):
    seeds_of(tmp_path, "a", [3.00, 3.10, 3.05])
    seeds_of(tmp_path, "b", [3.02, 3.07, 3.06], "--normalization=rmsnorm")
    comparison = compared(tmp_path)
    [found] = comparison.differences
    assert found.test.shown is False and found.test.method == "Welch t"
    said = sentence(found, comparison.metric)
    assert said.startswith("no difference shown between") and "would have been seen 4 times out of 5" in said
    assert f"a difference of {found.test.detectable:.4f}" in said


@pytest.mark.parametrize("shift", [-0.2, 0.2])
def test_a_planted_difference_is_found_with_its_sign_and_size(tmp_path, shift):
    seeds_of(tmp_path, "a", [3.00, 3.10, 3.05])
    seeds_of(tmp_path, "b", [3.01 + shift, 3.10 + shift, 3.04 + shift], "--normalization=rmsnorm")
    plain, changed = group_runs(load_runs([tmp_path]))
    comparison = compare([plain, changed], baseline=plain.name)
    [found] = comparison.differences
    assert (found.a, found.b) == (plain.name, changed.name) and found.test.shown
    assert found.test.difference == pytest.approx(shift) and found.test.low <= shift <= found.test.high
    lower = changed if shift < 0 else plain
    assert comparison.best is lower and comparison.groups[0] is lower
    assert sentence(found, "val_loss").startswith(f"{lower.name} has a lower validation loss than")
    assert "by 0.2000" in sentence(found, "val_loss")


def test_pairing_sees_what_scatter_common_to_both_sides_hides(tmp_path):
    losses = [3.05, 3.56, 4.05, 4.57, 5.06]
    seeds_of(tmp_path, "a", [3.0, 3.5, 4.0, 4.5, 5.0])
    seeds_of(tmp_path, "b", losses, "--normalization=rmsnorm")
    [paired] = compared(tmp_path).differences
    assert paired.test.shown and paired.test.method == "paired t"
    for seed, path in enumerate(sorted((tmp_path).glob("b-*")), start=1):
        shutil.rmtree(path)
        make_run(path, f"--seed={seed + 10}", "--normalization=rmsnorm", val_loss=losses[seed - 1])
    [welch] = compared(tmp_path).differences
    assert welch.test.method == "Welch t" and not welch.test.shown


def test_one_seed_each_is_said_to_say_nothing(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", "--normalization=rmsnorm", val_loss=2.0)
    text = table(compared(tmp_path))
    assert "nothing can be said of the difference" in text and "no difference" not in text and "lower" not in text


def test_without_a_baseline_each_is_compared_with_each_and_with_one_only_with_it(tmp_path):
    for number, norm in enumerate(("layernorm", "layernorm_nobias", "rmsnorm")):
        seeds_of(tmp_path, norm, [3.0 + number, 3.1 + number, 3.05 + number], f"--normalization={norm}")
    every = compared(tmp_path)
    assert len(every.differences) == 3 and "3 comparisons" in table(every)
    for wanted in ("rmsnorm-2", str(tmp_path / "rmsnorm-1"), "-RMS-"):
        some = compared(tmp_path, baseline=wanted)
        assert len(some.differences) == 2 and {found.a for found in some.differences} == {some.baseline}
        assert "-RMS-" in some.baseline
    with pytest.raises(UsageError, match="could mean several groups"):
        compared(tmp_path, baseline="-LN")
    with pytest.raises(UsageError, match="none of the groups"):
        compared(tmp_path, baseline="llama")


TOKENIZED_OTHERWISE = {
    **DATASET,
    "fingerprint": "f2",
    "tokenizer": {"name": "byte", "fingerprint": "t2"},
    "splits": {
        "train": {"tokens": 300_000, "bytes": 300_000, "documents": 9},
        "val": {"tokens": 3_000, "bytes": 3_000, "documents": 1},
    },
}


@pytest.mark.parametrize(
    "facts, reason, said",
    [
        (dict(steps=30, length=30), "other tokens", "was trained on 1,920 tokens"),
        (dict(steps=30, outcome=None), "unfinished", "is unfinished (killed or still running after step 30 of 40)"),
        (dict(steps=30, outcome="stopped"), "unfinished", "is unfinished (stopped after step 30 of 40)"),
        (dict(steps=30, outcome="diverged"), "unfinished", "is unfinished (diverged after step 30 of 40)"),
        (dict(val_tokens=500), "other validation set", "was validated on 500 tokens"),
        (dict(val_loss=math.nan), "no validation loss", "has no finite validation loss"),
        (dict(dataset={**DATASET, "fingerprint": "f2"}), "other data", "was trained on the dataset pydocs (f2)"),
        (dict(dataset={"name": "pydocs", "fingerprint": "f2"}), "other data", "was trained on the dataset pydocs (f2)"),
        (dict(dataset={**TOKENIZED_OTHERWISE, "splits": {"val": {"bytes": 1}}}), "other data", "losses on different data"),
        (dict(dataset=TOKENIZED_OTHERWISE, val_tokens=2999, bits_per_byte=None), "other tokenizer", "only bits per byte compare"),
        (dict(dataset=TOKENIZED_OTHERWISE, val_tokens=1000), "other validation set", "--eval_iters=0 validates on all of it"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_what_does_not_compare_is_refused_in_a_sentence_that_names_both_and_flagged_by_force(
    tmp_path, capsys, facts, reason, said
):
    seeds_of(tmp_path, "sound", [3.0, 3.1, 3.2])
    bad = load_runs([make_run(tmp_path / "bad", "--normalization=rmsnorm", **facts)])[0]
    code, out, err = command(tmp_path, capsys=capsys)
    assert code == 1 and out == ""
    [line] = [line for line in err.split("\n") if said in line]
    assert bad.name in line and any(str(tmp_path / f"sound-{seed}") in line for seed in (1, 2, 3))
    assert "--force" in err
    code, out, err = command(tmp_path, "--force", capsys=capsys)
    assert code == 0
    [row] = [line for line in out.split("\n") if "-RMS-" in line and "[not comparable" in line]
    assert reason in row and "*" not in row
    with pytest.raises(NotComparable):
        compared(tmp_path)


def test_a_run_that_does_not_compare_is_never_the_best(tmp_path):
    for number, norm in enumerate(("layernorm", "rmsnorm")):
        make_run(tmp_path / norm, f"--normalization={norm}", val_loss=3.0 + number)
    make_run(tmp_path / "killed", "--norm_position=post", val_loss=0.0, steps=20, outcome=None)
    forced = compared(tmp_path, force=True)
    assert forced.groups[0].runs[0].name.startswith(str(tmp_path / "killed")) and "-LN-" in forced.best.name
    assert "PostNorm" not in forced.best.name


def test_tokenizers_compare_in_bits_per_byte_over_all_of_the_validation_text(tmp_path):
    seeds_of(tmp_path, "a", [3.0, 3.1], bits_per_byte=1.25)
    seeds_of(tmp_path, "b", [1.0, 1.1], bits_per_byte=1.75, dataset=TOKENIZED_OTHERWISE, val_tokens=2999)
    comparison = compared(tmp_path)
    assert comparison.metric == "bits_per_byte" and comparison.problems == ()
    assert comparison.best.mean("bits_per_byte") == 1.25  # though its loss per token is the higher one
    [found] = comparison.differences
    assert abs(found.test.difference) == pytest.approx(0.5)


def test_a_run_by_itself_is_shown_whatever_its_state(tmp_path, capsys):
    make_run(tmp_path, steps=12, outcome=None)
    code, out, _ = command(tmp_path, capsys=capsys)
    assert code == 0 and "640" in out and "-GELUtanh-" in out


def test_what_else_differs_is_noted(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", "--normalization=rmsnorm", "--learning_rate=1e-5", hardware="GPU two")
    comparison = compared(tmp_path)
    assert any("more than the model: learning_rate" in note for note in comparison.notes)
    assert any("different hardware" in note for note in comparison.notes)
    assert {row[0] for row in comparison.component_rows} == {"normalization"}
    assert {"learning_rate": {0.0006, 1e-5}, "hardware": {"CPU one", "GPU two"}} == {
        row[0]: set(row[1:]) for row in comparison.config_rows
    }


# The command.


@pytest.fixture
def three(tmp_path) -> Path:
    """Two groups of three and two seeds."""
    seeds_of(tmp_path, "plain", [3.00, 3.10, 3.05])
    seeds_of(tmp_path, "changed", [2.7, 2.9], "--normalization=rmsnorm", step_ms=30.0)
    return tmp_path


def test_the_files_say_what_the_terminal_says(three, capsys):
    files = {kind: three / f"report.{kind}" for kind in ("csv", "json", "markdown")}
    code, out, err = command(three, *[f"--{kind}={path}" for kind, path in files.items()], capsys=capsys)
    assert code == 0
    document = json.loads(files["json"].read_text(), parse_constant=pytest.fail)
    rows = list(csv.DictReader(files["csv"].open()))
    markdown = files["markdown"].read_text()
    assert sorted(float(row["val_loss"]) for row in rows) == [2.7, 2.9, 3.0, 3.05, 3.1]
    assert [len(group["runs"]) for group in document["groups"]] == [2, 3]
    changed = document["groups"][0]["val_loss"]
    assert (changed["n"], changed["mean"], changed["sd"]) == (2, pytest.approx(2.8), pytest.approx(math.sqrt(0.02)))
    assert document["best"] == document["groups"][0]["name"] and document["differences"][0]["shown"] is False
    assert document["model_differences"]["normalization"] == dict(
        zip([g["name"] for g in document["groups"]], ["rmsnorm", "layernorm"])
    )
    for text in (out, markdown):
        assert "2.8000 ± 0.1414" in text and "3.0500 ± 0.0500" in text and "no difference shown" in text
    assert "| normalization | rmsnorm | layernorm |" in markdown and markdown.count(str(three)) >= 5


@pytest.mark.parametrize("key, first", [("loss", "-RMS-"), ("tokens_per_s", "-LN-"), ("seconds", "-LN-"), ("name", "-LN-")])
def test_sort_puts_the_best_of_a_column_first_and_the_best_are_marked(three, capsys, key, first):
    code, out, _ = command(three, f"--sort={key}", capsys=capsys)
    rows = out.split("\n")[2:4]
    assert code == 0 and first in rows[0]
    [fast] = [row for row in rows if "3,200" in row]
    assert "3,200*" in fast and "2.8000 ± 0.1414*" in out and "3.0500 ± 0.0500*" not in out


def test_wrong_use_exits_2_and_failures_exit_1(three, capsys):
    for arguments, code, said in (
        (["--latest=0"], 2, "--latest=0"),
        (["--latest=x"], 2, "--latest=x"),
        (["--nonsense"], 2, "--nonsense"),
        (["--sort=speed"], 2, "invalid choice: 'speed'"),
        (["--metric=mfu"], 2, "'mfu'"),
        (["--baseline=zzz"], 2, "none of the groups"),
        ([three / "nowhere"], 1, "does not exist"),
        ([f"--csv={three}/no/such/folder.csv"], 2, "there is no folder"),
    ):
        assert command(three, *arguments, capsys=capsys)[0] == code, arguments
        capsys.readouterr()
        compare_architectures.main([str(three), *map(str, arguments)])
        assert said in capsys.readouterr().err
    empty = three / "empty"
    empty.mkdir()
    code, _, err = command(empty, capsys=capsys)
    assert code == 1 and "no run" in err


def test_without_arguments_all_below_out_is_compared_and_out_dir_is_a_folder_too(three, run_python, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    done = run_python(ROOT / "compare_architectures.py", cwd=elsewhere)
    assert done.returncode == 1 and "out does not exist" in done.stderr
    shutil.copytree(three, elsewhere / "out")
    done = run_python(ROOT / "compare_architectures.py", cwd=elsewhere)
    assert done.returncode == 0 and "2.8000 ± 0.1414" in done.stdout, done.stderr
    same = run_python(ROOT / "compare_architectures.py", "--out_dir=out", "--latest=5", cwd=elsewhere)
    assert same.stdout == done.stdout


def test_help_needs_neither_torch_nor_scipy_nor_a_plotting_library(run_python):
    code = (
        "import sys, compare_architectures\n"
        "try:\n"
        "    compare_architectures.main(['--help'])\n"
        "except SystemExit as end:\n"
        "    heavy = {'torch', 'scipy', 'matplotlib', 'plotly', 'numpy'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
        "    sys.exit(end.code)"
    )
    done = run_python("-c", code)
    assert done.returncode == 0 and "--baseline" in done.stdout, done.stderr


@pytest.mark.parametrize("package, option", [("plotly", "--html"), ("matplotlib", "--plot"), ("scipy", "--csv")])
def test_a_package_that_is_missing_is_named(three, capsys, monkeypatch, package, option):
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    code, _, err = command(three, f"{option}={three / 'file.out'}", capsys=capsys)
    assert code == 1 and f"pip install {package}" in err and err.count("\n") == 1


# Long logs.


def write_steps(folder: Path, steps: int, parts: int) -> tuple[Path, list[float]]:
    """A killed run of so many logged steps, and the CPU seconds each part of them took."""
    path = make_run(folder, steps=0, outcome=None, length=steps)
    log = TrainingLogger(folder)
    started = path.read_text().split("\n")[0]
    log.start(
        **{
            key: value
            for key, value in json.loads(started).items()
            if key not in ("event", "time", "schema_version", "resumed_from")
        }
    )
    path.unlink()
    path.with_suffix(".json").unlink()
    seconds, before = [], time.process_time()
    for step in range(1, steps + 1):
        log.step(
            step,
            step * TOKENS_PER_STEP,
            loss=3.0 + 1 / step,
            lr=1e-3,
            grad_norm=0.5,
            skipped=0,
            memory_gb=0.39,
            tokens_per_s=12345.678901234,
            mfu=0.08421942907906714,
            mfu_causal=0.0832888327527791,
            hfu=0.08421942907906714,
            step_ms={"data": 0.0605543498750194, "compute": 17.60404150035538, "optimizer": 1.999098799751664, "total": 20.0},
        )
        if step % (steps // parts) == 0:
            seconds.append(time.process_time() - before)
            before = time.process_time()
    return log.path, seconds


def check_long_log(folder: Path, steps: int) -> float:
    """Write, cut in mid-line, load; returns the seconds of loading."""
    path, seconds = write_steps(folder, steps, parts=20)
    assert min(seconds[10:]) < 1.5 * min(seconds[:10]), seconds  # a line costs at the end what it cost at the start
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 40)
    before = time.perf_counter()
    [run] = load_runs([folder])
    elapsed = time.perf_counter() - before
    assert run.steps == steps - 1 and not run.finished
    assert run.seconds == pytest.approx((steps - 1) * 0.020) and len(run.curve["step"]) <= 2000
    assert run.curve["loss"] == [3.0 + 1 / step for step in run.curve["step"]]
    return elapsed


def test_a_log_line_costs_the_same_however_long_the_log(tmp_path):
    assert check_long_log(tmp_path, 30_000) < 10


@pytest.mark.slow
def test_a_million_logged_steps_are_compared_in_less_than_ten_seconds(tmp_path, run_python):
    assert check_long_log(tmp_path / "one", 1_000_000) < 10
    make_run(tmp_path / "other", "--normalization=rmsnorm")
    before = time.perf_counter()
    done = run_python("compare_architectures.py", tmp_path, "--force", f"--json={tmp_path / 'report.json'}")
    assert done.returncode == 0 and time.perf_counter() - before < 10, done.stderr
    assert sorted(run["steps"] for run in json.loads((tmp_path / "report.json").read_text())["runs"]) == [40, 999_999]
    shutil.rmtree(tmp_path / "one")  # pytest would keep its 430 MB


def test_skimmed_lines_give_the_document_of_parsed_ones_and_damage_is_named(tmp_path):
    path, _ = write_steps(tmp_path, 9_000, parts=10)
    skimmed = training_logger.rebuild(path)
    assert skimmed == training_logger._reduced(path, skim=False) and skimmed["curves"]["stride"] == 8
    lines = path.read_bytes().split(b"\n")
    kept = next(i for i, line in enumerate(lines) if b'"step": 4807,' in line)  # the last of its stride: 4800 to 4807
    sound, lines[kept] = lines[kept], lines[kept].replace(b'"lr": 0.001', b'"lr": 0..01')
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=f"line {kept + 1},"):
        training_logger.rebuild(path)
    lines[kept] = sound
    lines[kept - 3 : kept - 1] = [lines[kept - 3][:100] + lines[kept - 2]]  # half a line grown together with the next
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=f"line {kept - 2},"):
        training_logger.rebuild(path)


# The real thing.


def test_real_runs_compare_and_a_killed_one_is_flagged(tmp_path, tiny_dataset, run_python, capsys):
    import train

    small = [
        f"--dataset={tiny_dataset}",
        "--n_layer=1",
        "--n_head=2",
        "--n_embd=32",
        "--block_size=16",
        "--batch_size=4",
        "--learning_rate=5e-3",
        "--dtype=float32",
        "--device=cpu",
        "--threads=1",
        "--save_interval=-1",
        "--eval_iters=4",
        "--log_interval=2",
        "--eval_interval=10",
    ]
    for preset in ("gpt2", "gpt2_postnorm"):
        for seed in (1, 2, 3):
            assert (
                train.main(
                    [
                        *small,
                        f"--arch_preset={preset}",
                        f"--seed={seed}",
                        f"--data_seed={seed}",
                        "--max_iters=40",
                        f"--out_dir={tmp_path / preset}-{seed}",
                    ]
                )
                == 0
            )
    capsys.readouterr()
    code, out, err = command(tmp_path, "--baseline=gpt2", f"--json={tmp_path / 'report.json'}", capsys=capsys)
    assert code == 0, err
    document = json.loads((tmp_path / "report.json").read_text())
    losses = {
        preset: [
            json.loads(next(folder.glob("run_*.json")).read_text())["evals"][-1]["val_loss"]
            for folder in sorted(tmp_path.glob(f"{preset}-?"))
        ]
        for preset in ("gpt2", "gpt2_postnorm")
    }
    [found] = document["differences"]
    expected = scipy.stats.ttest_ind(losses["gpt2_postnorm"], losses["gpt2"], equal_var=False)  # 3 seeds make no pairs
    assert found["p"] == pytest.approx(expected.pvalue, rel=1e-6) and found["shown"] == bool(expected.pvalue < ALPHA)
    assert found["difference"] == pytest.approx(numpy.mean(losses["gpt2_postnorm"]) - numpy.mean(losses["gpt2"]))
    assert document["model_differences"]["norm_position"] == {found["a"]: "pre", found["b"]: "post"}

    log = subprocess.Popen(
        [
            preloaded_python(),
            "train.py",
            *small,
            "--arch_preset=gpt2",
            "--seed=4",
            "--data_seed=4",
            "--max_iters=100000",
            f"--out_dir={tmp_path / 'killed'}",
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        end = time.monotonic() + 60
        while not any('"eval"' in path.read_text() for path in (tmp_path / "killed").glob("run_*.jsonl")):
            assert log.poll() is None and time.monotonic() < end
            time.sleep(0.05)
    finally:
        log.send_signal(signal.SIGKILL)
        log.wait()
    code, _, err = command(tmp_path, capsys=capsys)
    assert code == 1 and "killed or still running" in err and str(tmp_path / "killed") in err
    code, out, _ = command(tmp_path, "--force", capsys=capsys)
    assert code == 0 and "[not comparable: unfinished]" in out
