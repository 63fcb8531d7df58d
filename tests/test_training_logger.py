"""The run log: strict JSON lines that survive kills and full disks, and a document that follows from them alone."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import numpy
import pytest
import torch

import training_logger
from training_logger import CURVE_POINTS, RunLogError, TrainingLogger, hardware_facts, read_run, rebuild, versions

FACTS = {
    "config": {"n_layer": 2},
    "model": {"name": "2L", "parameters": 12_345},
    "hardware": {"device": "cpu"},
    "versions": {"torch": "2"},
}


def strict(line: str | bytes):
    """json.loads that takes nothing beyond the standard."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def events(path: Path) -> list[dict]:
    return [strict(line) for line in path.read_text().splitlines()]


def log_step(log: TrainingLogger, step: int, loss: float = 2.0, **extra) -> None:
    log.step(
        step,
        tokens=step * 128,
        loss=loss,
        lr=1e-3,
        grad_norm=0.5,
        tokens_per_s=1e4,
        step_ms={"data": 0.1, "compute": 9.0, "optimizer": 1.0, "total": 10.5},
        **extra,
    )


def short_run(out_dir: Path) -> TrainingLogger:
    log = TrainingLogger(out_dir)
    log.start(**FACTS)
    for step in range(1, 21):
        log_step(log, step, loss=5 / step, mfu=0.4)
        if step % 10 == 0:
            log.evaluation(step, step * 128, val_loss=6 / step, train_loss=5 / step)
            log.checkpoint(step, out_dir / f"step_{step}", seconds=0.2, best=True)
    log.warning("the loss was not finite", step=7)
    return log


# The lines.


def test_every_line_is_strict_json_with_its_event_and_a_time_with_zone_and_milliseconds(tmp_path):
    log = short_run(tmp_path)
    log.end("completed", best_val_loss=0.3)
    lines = events(log.path)
    assert [line["event"] for line in lines] == (
        ["run_start"] + (["step"] * 10 + ["eval", "checkpoint"]) * 2 + ["warning", "run_end"]
    )
    for line in lines:
        assert datetime.fromisoformat(line["time"]).tzinfo is not None
        assert len(line["time"].split(".")[1]) == len("123+00:00")
    assert lines[0]["schema_version"] == training_logger.SCHEMA_VERSION
    assert lines[0]["config"] == FACTS["config"]
    assert {
        "step",
        "tokens",
        "loss",
        "lr",
        "grad_norm",
        "tokens_per_s",
        "step_ms",
        "mfu",
        "mfu_causal",
        "hfu",
        "memory_gb",
    } <= lines[1].keys()
    assert lines[1]["hfu"] is None  # unknown is null, not absent


def test_each_line_is_in_the_file_when_the_call_returns(tmp_path):
    log = TrainingLogger(tmp_path)
    log.start()
    for step in range(1, 4):
        log_step(log, step)
        text = log.path.read_text()
        assert text.endswith("\n") and strict(text.splitlines()[-1])["step"] == step


@pytest.mark.parametrize(
    "value, text",
    [
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (numpy.float32("nan"), "nan"),
        (torch.tensor(float("inf")), "inf"),
    ],
)
def test_a_number_that_is_not_finite_is_null_with_its_name_beside_it(tmp_path, value, text):
    log = TrainingLogger(tmp_path)
    log.start()
    log_step(log, 1, loss=value)
    log.end("failed")
    line = events(log.path)[1]
    assert line["loss"] is None and line["loss_repr"] == text
    assert "mfu_repr" not in line  # which was unknown
    assert strict(log.document_path.read_text())["curves"]["loss"] == [None]


def test_paths_arrays_tensors_tuples_and_other_types_are_written_as_json_has_them(tmp_path):
    log = TrainingLogger(tmp_path)
    log.start(
        name="x",
        where=Path("a/b"),
        shape=(1, 2),
        array=numpy.arange(3),
        scalar=torch.tensor(1.5),
        number=numpy.int64(7),
        dtype=torch.bfloat16,
        losses=[1.0, math.nan],
        table={1: "one"},
    )
    line = events(log.path)[0]
    assert (line["name"], line["where"], line["shape"], line["array"], line["scalar"], line["number"]) == (
        "x",
        "a/b",
        [1, 2],
        [0, 1, 2],
        1.5,
        7,
    )
    assert (line["dtype"], line["losses"], line["table"]) == ("torch.bfloat16", [1.0, None], {"1": "one"})


def test_resumed_from_stands_in_run_start_and_in_the_document(tmp_path):
    origin = {"run": "run_20260101_000000.jsonl", "checkpoint": "step_000000100", "step": 100}
    log = TrainingLogger(tmp_path, resumed_from=origin)
    log.start(**FACTS)
    assert events(log.path)[0]["resumed_from"] == origin == read_run(log.document_path)["resumed_from"]


# The document.


@pytest.mark.parametrize("steps", [20, 5 * CURVE_POINTS + 7])
def test_the_document_is_what_rebuild_makes_of_the_lines(tmp_path, steps):
    log = TrainingLogger(tmp_path)
    log.start(**FACTS)
    for step in range(steps):
        log_step(log, step, loss=math.nan if step == 3 else 1 / (step + 1), skipped=step == 3)
    log.evaluation(steps, steps * 128, val_loss=2.0)
    assert strict(log.document_path.read_text()) == rebuild(log.path)
    assert rebuild(log.path)["outcome"] == "running"
    log.warning("late")
    log.end("completed", best_val_loss=2.0)
    document = strict(log.document_path.read_text())
    assert document == rebuild(log.path) == read_run(log.path) == read_run(log.document_path)
    assert document["outcome"] == "completed" and document["summary"] == {"best_val_loss": 2.0}
    assert document["run"] == log.path.stem


def test_the_document_holds_the_run(tmp_path):
    log = short_run(tmp_path)
    log.end("stopped")
    document = read_run(log.document_path)
    assert {key: document[key] for key in FACTS} == FACTS
    assert [(entry["step"], entry["val_loss"]) for entry in document["evals"]] == [(10, 0.6), (20, 0.3)]
    assert [entry["path"] for entry in document["checkpoints"]] == [str(tmp_path / "step_10"), str(tmp_path / "step_20")]
    assert document["warnings"][0]["message"] == "the loss was not finite" and document["warning_count"] == 1
    curves = document["curves"]
    assert curves["step"] == list(range(1, 21)) and curves["loss"] == [5 / step for step in range(1, 21)]
    assert curves["step_ms.total"] == [10.5] * 20 and curves["hfu"] == [None] * 20
    assert document["last_step"]["step"] == 20


@pytest.mark.parametrize("interval", [1, 7, 1000])
def test_curves_are_bounded_spread_evenly_and_end_at_the_last_step(tmp_path, interval):
    document = training_logger.RunDocument("run")
    logged = 30_000
    for step in range(0, logged * interval, interval):
        document.add({"event": "step", "time": "", "step": step, "loss": float(step)})
    steps = document.as_dict()["curves"]["step"]
    assert CURVE_POINTS // 2 - 1 <= len(steps) <= CURVE_POINTS
    assert steps[-1] == (logged - 1) * interval
    gaps = [after - before for before, after in zip(steps, steps[1:])]
    assert min(gaps[:-1]) > 0 and max(gaps) <= 2 * max(min(gaps[:-1]), interval)
    assert document.as_dict()["curves"]["loss"] == steps  # the values belong to their steps


def test_the_last_occurrence_of_a_step_counts(tmp_path):
    log = TrainingLogger(tmp_path)
    log.start()
    for step, loss in [(1, 9.0), (2, 8.0), (3, 7.0), (2, 4.0), (3, 3.0), (4, 2.0)]:
        log_step(log, step, loss=loss)
        log.evaluation(step, 0, val_loss=loss + 1)
    for document in (read_run(log.document_path), rebuild(log.path)):
        assert dict(zip(document["curves"]["step"], document["curves"]["loss"])) == {1: 9.0, 2: 4.0, 3: 3.0, 4: 2.0}
        assert [entry["val_loss"] for entry in document["evals"]] == [10.0, 5.0, 4.0, 3.0]


def test_warnings_are_counted_however_many_and_kept_up_to_a_bound(tmp_path):
    log = TrainingLogger(tmp_path)
    log.start()
    for number in range(training_logger.WARNINGS_KEPT + 50):
        log.warning(f"number {number}")
    log.end("completed")
    document = read_run(log.document_path)
    assert document["warning_count"] == training_logger.WARNINGS_KEPT + 50
    assert len(document["warnings"]) == training_logger.WARNINGS_KEPT


# Kills.


def test_a_log_cut_at_any_byte_gives_the_document_of_the_whole_lines_before(tmp_path):
    log = short_run(tmp_path)
    whole = log.path.read_bytes()
    first_line, last_line = whole.index(b"\n") + 1, whole.rstrip(b"\n").rindex(b"\n") + 1
    cut = tmp_path / "run_cut.jsonl"
    cut.write_bytes(whole[:last_line])
    expected = rebuild(cut)
    for length in range(last_line + 1, len(whole) - 1):  # up to the closing brace
        cut.write_bytes(whole[:length])
        assert rebuild(cut) == expected
    cut.write_bytes(whole[:-1])  # only the newline is missing
    assert rebuild(cut)["warning_count"] == 1
    cut.write_bytes(whole[: first_line - 2])
    with pytest.raises(ValueError, match="no run_start"):
        rebuild(cut)


def test_a_run_killed_without_warning_can_be_read_up_to_its_last_step(tmp_path, run_python):
    code = (
        "import os, sys; from training_logger import TrainingLogger; log = TrainingLogger(sys.argv[1]); log.start()\n"
        "for step in range(1, 31):\n"
        "    log.step(step, step, 1.0, 0.1, 1.0)\n"
        "    if step == 20: log.evaluation(step, step, val_loss=1.0)\n"
        "os.kill(os.getpid(), 9)"
    )
    assert run_python("-c", code, tmp_path).returncode == -9
    [document_path] = tmp_path.glob("run_*.json")
    assert strict(document_path.read_text())["last_step"]["step"] == 20  # as of the last evaluation
    document = read_run(document_path)  # caught up from the lines
    assert document["last_step"]["step"] == 30 and document["outcome"] == "running"


def test_damage_inside_a_log_is_named_by_its_line(tmp_path):
    log = short_run(tmp_path)
    lines = log.path.read_bytes().split(b"\n")
    lines[4] = lines[4][:17]
    log.path.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match="line 5"):
        rebuild(log.path)


def test_a_log_of_a_later_version_or_of_something_else_is_refused(tmp_path):
    path = tmp_path / "run_x.jsonl"
    path.write_text('{"event": "run_start", "time": "", "schema_version": 99}\n')
    with pytest.raises(ValueError, match="schema version 99"):
        read_run(path)
    other = tmp_path / "run_y.json"
    other.write_text("[1, 2]")
    with pytest.raises(ValueError, match="not the document of a run"):
        read_run(other)


# Names, and who writes.


def test_runs_that_start_in_the_same_second_never_share_a_file(tmp_path, monkeypatch):
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(training_logger, "datetime", Clock)
    (tmp_path / "run_20260102_030405_2.json").write_text("{}")
    logs = [TrainingLogger(tmp_path) for _ in range(3)]
    assert [log.path.name for log in logs] == [f"run_20260102_030405{suffix}.jsonl" for suffix in ("", "_3", "_4")]
    assert (tmp_path / "run_20260102_030405_2.json").read_text() == "{}"


def test_a_disabled_logger_takes_every_call_and_writes_nothing(tmp_path):
    log = TrainingLogger(tmp_path / "out", enabled=False)
    log.start(**FACTS)
    log_step(log, 1)
    log.evaluation(1, 128, val_loss=1.0)
    log.checkpoint(1, "x", 0.1, False)
    log.warning("x")
    log.end("completed")
    assert not (tmp_path / "out").exists() and log.path is None


def test_only_the_first_end_counts_and_nothing_follows_it(tmp_path):
    log = short_run(tmp_path)
    log.end("completed")
    before = log.path.read_bytes(), log.document_path.read_bytes()
    log.end("failed", error="late")
    log_step(log, 99)
    assert (log.path.read_bytes(), log.document_path.read_bytes()) == before


def test_nothing_but_the_two_files_is_left(tmp_path):
    log = short_run(tmp_path)
    log.end("completed")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([log.path.name, log.document_path.name])


# Disks.


def test_an_out_dir_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunLogError, match="cannot write the run log .*file.*Choose an out_dir") as raised:
        TrainingLogger(tmp_path / "file" / "out")
    assert isinstance(raised.value, OSError)
    assert "\n" not in str(raised.value)


LIMITED = """
import os, resource, sys
from training_logger import TrainingLogger
def limit(size):  # a disk with room for files of this size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
log = TrainingLogger(sys.argv[1])
"""


def test_a_disk_full_from_the_start_is_an_error(tmp_path, run_python):
    done = run_python("-c", LIMITED + "limit(50); log.start(note='x' * 100)", tmp_path)
    assert done.returncode == 1
    assert "RunLogError: cannot write the run log" in done.stderr and "Free some space." in done.stderr


def test_a_disk_that_fills_up_warns_once_and_loses_nothing_once_there_is_room_again(tmp_path, run_python):
    code = (
        LIMITED
        + """
log.start()
limit(2000)
for step in range(1, 101):
    log.step(step, step, 1.0, 0.1, 1.0)
    if step % 10 == 0: log.evaluation(step, step, val_loss=1.0)
    if step == 60:
        print(os.path.getsize(log.path), open(log.path).read().endswith("}\\n"))
        limit(resource.RLIM_INFINITY)
log.end("completed")
"""
    )
    done = run_python("-c", code, tmp_path)
    assert done.returncode == 0, done.stderr
    size, whole_lines = done.stdout.split()
    assert 0 < int(size) <= 2000 and whole_lines == "True"
    assert done.stderr.count("warning:") == 1 and "Training goes on" in done.stderr
    [path] = tmp_path.glob("run_*.jsonl")
    assert [event["step"] for event in events(path) if event["event"] == "step"] == list(range(1, 101))
    assert strict(path.with_suffix(".json").read_text()) == rebuild(path)
    assert len(list(tmp_path.iterdir())) == 2


# What the run ran on.


def test_versions_name_the_commit_of_this_repository(monkeypatch):
    versions.cache_clear()
    found = versions()
    home = Path(training_logger.__file__).parent
    git = subprocess.run(["git", "-C", home, "rev-parse", "--verify", "HEAD"], capture_output=True, text=True)
    assert found["git_commit"] == (git.stdout.strip() if git.returncode == 0 else None)
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    monkeypatch.setenv("PATH", "")  # no git to be found
    versions.cache_clear()
    assert versions()["git_commit"] is versions()["git_dirty"] is None
    versions.cache_clear()


def test_a_folder_inside_another_repository_does_not_claim_its_commit(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    try:
        subprocess.run([*git, "init", "-q"], check=True)
    except FileNotFoundError:
        pytest.skip("no git")
    (tmp_path / "module.py").write_text("")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "x"], check=True)
    (tmp_path / "inside").mkdir()

    def seen_from(file: Path) -> tuple:
        monkeypatch.setattr(training_logger, "__file__", str(file))
        versions.cache_clear()
        found = versions()
        versions.cache_clear()
        return found["git_commit"], found["git_dirty"]

    commit, dirty = seen_from(tmp_path / "module.py")
    assert len(commit) == 40 and dirty is False
    (tmp_path / "module.py").write_text("changed")
    assert seen_from(tmp_path / "module.py") == (commit, True)
    assert seen_from(tmp_path / "inside" / "module.py") == (None, None)


def test_hardware_facts_name_the_cpu_and_its_threads():
    facts = hardware_facts("cpu")
    assert facts["device"] == "cpu" and facts["device_count"] == 1
    assert facts["threads"] == torch.get_num_threads() and facts["cpu_cores"] >= 1
    assert json.loads(json.dumps(facts)) == facts
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        assert facts["memory_gb"] == pytest.approx(int(meminfo.read_text().split()[1]) * 1024 / 1e9, rel=0.01)


def test_a_log_is_looked_for_at_most_once_in_the_time_that_is_given(tmp_path, monkeypatch):
    """Each step asks whether the log is still there: two round trips to a network's file system, every time."""
    logger = TrainingLogger(tmp_path / "out")
    looks, stat = [], os.stat
    monkeypatch.setattr(os, "stat", lambda *arguments, **options: looks.append(arguments) or stat(*arguments, **options))
    assert [logger.lost(seen_within=60) for _ in range(100)] == [None] * 100 and len(looks) == 1
    assert logger.lost() is None and len(looks) == 2
    shutil.rmtree(tmp_path / "out")
    assert logger.lost(seen_within=60) is None  # not looked for
    assert "is gone" in logger.lost()
    os.close(logger._file)
