"""TensorBoard, Weights & Biases, the profiler and the price: what they show is what the log says."""

from __future__ import annotations

import gzip
import json
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY_RUN

import train
from training.trackers import numbers

SMALL = (*TINY_RUN, "--n_layer=1", "--n_embd=16", "--eval_interval=4", "--save_interval=-1", "--max_iters=8")


def run(out_dir: Path, dataset: Path, *arguments: str) -> int:
    return train.main([*SMALL, f"--dataset={dataset}", f"--out_dir={out_dir}", *arguments])


def logged(out_dir: Path) -> list[dict]:
    log = next(out_dir.glob("run_*.jsonl"))
    return [json.loads(line) for line in log.read_text().splitlines()]


def curves(out_dir: Path) -> dict[str, dict[int, float]]:
    """The log's numbers as curves, by a second way: {'train/loss': {step: value}}."""
    found: dict[str, dict[int, float]] = {}
    for event in logged(out_dir):
        where = {"step": "train", "eval": "val"}.get(event["event"])
        for key, value in event.items() if where else ():
            pairs = [(f"{key}/{lap}", ms) for lap, ms in value.items()] if isinstance(value, dict) else [(key, value)]
            for name, number in pairs:
                if type(number) in (int, float) and name != "step":
                    found.setdefault(f"{where}/{name}", {})[event["step"]] = number
    return found


def test_tensorboard_shows_the_numbers_of_the_log(tmp_path, tiny_dataset):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert run(tmp_path, tiny_dataset, "--tensorboard") == 0
    events = accumulator.EventAccumulator(str(next((tmp_path / "tensorboard").iterdir()))).Reload()
    expected = curves(tmp_path)
    assert set(events.Tags()["scalars"]) == set(expected) and {"train/loss", "val/val_loss", "train/lr"} <= set(expected)
    for name, curve in expected.items():
        shown = {point.step: point.value for point in events.Scalars(name)}
        assert shown == pytest.approx(curve, rel=1e-6), name  # kept there as fp32


def wandb_records(path: Path):
    """The records of a .wandb file: 7 bytes of header, then LevelDB's log format (blocks of 32 KiB, records in pieces)."""
    data, place, pieces = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # no room for a header: the rest of the block is padding
            place += 32768 - place % 32768
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        pieces += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield pieces
            pieces = b""


def wandb_shows(folder: Path, expected: dict) -> tuple[list[str], dict]:
    """(names of runs, {name: {step: value}}) of the run's .wandb file, as far as it has come."""
    from wandb.proto import wandb_internal_pb2

    names, shown = [], {}
    for data in wandb_records(next(folder.glob("wandb/offline-run-*/run-*.wandb"))):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            names.append(record.run.display_name)
        if record.WhichOneof("record_type") == "history":
            row = {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
            for name in row.keys() & expected.keys():
                shown.setdefault(name, {})[row["step"]] = row[name]
    return names, shown


def test_weights_and_biases_offline_keeps_the_numbers_of_the_log(tmp_path, tiny_dataset):
    pytest.importorskip("wandb")
    assert run(tmp_path, tiny_dataset, "--wandb_log", "--wandb_mode=offline", "--wandb_run_name=first") == 0
    expected, deadline = curves(tmp_path), time.monotonic() + 30
    names, shown = wandb_shows(tmp_path, expected)
    while not (names and shown == expected) and time.monotonic() < deadline:
        time.sleep(0.2)  # a process of the package's own writes the file, on a busy machine after the run has ended
        names, shown = wandb_shows(tmp_path, expected)
    assert names[:1] == ["first"]
    assert shown == expected


@pytest.mark.parametrize(
    "flag, module, install",
    [("--tensorboard", "torch.utils.tensorboard", "pip install tensorboard"), ("--wandb_log", "wandb", "pip install wandb")],
)
def test_a_missing_package_is_one_sentence_before_the_training(
    tmp_path, tiny_dataset, capsys, monkeypatch, flag, module, install
):
    monkeypatch.setitem(sys.modules, module, None)
    assert run(tmp_path, tiny_dataset, flag) == 1
    out, err = capsys.readouterr()
    assert install in err and len(err.strip().splitlines()) == 1 and "step 1" not in out


def test_a_tracker_that_fails_later_does_not_stop_the_run(tmp_path, tiny_dataset, capsys, monkeypatch):
    class Broken:
        def add(self, event):
            if event["event"] == "step" and event["step"] == 3:
                raise OSError("the service is gone")

        def close(self):
            raise AssertionError("it was left out")

    monkeypatch.setattr("training.report.open_trackers", lambda config, run: [Broken()])
    assert run(tmp_path, tiny_dataset) == 0
    assert capsys.readouterr().err.count("the service is gone") == 1
    assert [e["step"] for e in logged(tmp_path) if e["event"] == "step"] == list(range(1, 9))


def test_numbers_are_those_of_steps_and_evaluations_only():
    assert dict(numbers({"event": "step", "step": 4, "loss": 1.5, "mfu": None, "time": "now", "step_ms": {"total": 2}})) == {
        "train/loss": 1.5,
        "train/step_ms/total": 2,
    }
    assert dict(numbers({"event": "eval", "step": 4, "val_loss": 2.0, "best": True})) == {"val/val_loss": 2.0}
    assert dict(numbers({"event": "checkpoint", "step": 4, "seconds": 2.0})) == {}


def test_profile_writes_a_trace_of_three_steps_and_its_time_is_not_trainings(tmp_path, tiny_dataset, capsys):
    assert run(tmp_path, tiny_dataset, "--profile") == 0
    out = capsys.readouterr().out
    assert "aten::" in out and "trace_rank0.json.gz" in out
    with gzip.open(tmp_path / "trace_rank0.json.gz", "rt") as file:
        trace = json.load(file)
    steps = {e["name"] for e in trace["traceEvents"] if e.get("cat") == "user_annotation" and "ProfilerStep" in e["name"]}
    assert steps == {"ProfilerStep#3", "ProfilerStep#4", "ProfilerStep#5"}


def test_profile_of_a_run_that_is_too_short_says_so(tmp_path, tiny_dataset, capsys):
    assert run(tmp_path, tiny_dataset, "--profile", "--max_iters=2") == 0
    assert "too short for a trace" in capsys.readouterr().out and not list(tmp_path.glob("trace*"))


def test_the_cost_is_device_hours_times_the_price(tmp_path, tiny_dataset, capsys):
    assert run(tmp_path, tiny_dataset, "--price_per_gpu_hour=3600") == 0
    end = logged(tmp_path)[-1]
    assert end["estimated_cost"] == pytest.approx(end["seconds"]) and end["seconds"] > 0  # one device, 1 a second
    assert end["device_hours"] == pytest.approx(end["seconds"] / 3600)
    assert "estimated cost" in capsys.readouterr().out


def test_without_a_price_there_is_no_cost(tmp_path, tiny_dataset, capsys):
    assert run(tmp_path, tiny_dataset) == 0
    assert logged(tmp_path)[-1]["estimated_cost"] is None and "cost " not in capsys.readouterr().out.split("log ")[1]
