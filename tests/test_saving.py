"""When a run saves: at its interval, and not often for a best in between."""

from __future__ import annotations

import json
import random

import pytest

import train
from tests.conftest import TINY_RUN
from training.checkpoint import CheckpointStore
from training.progress import Judgement
from training.saving import best_is_due

MOST = 10  # saves of a best between the periodic ones, as --help says


def saves(interval: int, length: int, is_best) -> tuple[list[int], list[int]]:
    """The steps of the periodic saves and of those of a best in between."""
    saved, periodic, between = None, [], []
    for step in range(1, length + 1):
        if step % interval == 0:
            periodic.append(step)
        elif is_best(step) and best_is_due(step, saved, interval):
            between.append(step)
        else:
            continue
        saved = step
    return periodic, between


def test_however_often_there_is_a_new_best_few_of_them_are_saved():
    """Issue 10.12: save_interval=10000, eval_interval=250 saved at nearly every evaluation, 39 times in 10,000 steps."""
    assert [len(saves(10_000, length, lambda step: step % 250 == 0)[1]) for length in (10_000, 200_000)] == [6, 9]
    for interval in (1, 2, 7, 100, 1000):
        assert len(saves(interval, 40 * interval, lambda step: True)[1]) <= MOST
        for seed in range(10):
            chance = random.Random(seed)
            bests = {step for step in range(40 * interval) if chance.random() < chance.random()}
            assert len(saves(interval, 40 * interval, bests.__contains__)[1]) <= MOST


@pytest.mark.parametrize("last", (2250, 4000, 9999, 30_000, 123_456))
def test_the_best_of_all_is_near_one_that_is_saved(last):
    """A loss that falls until the step `last` and rises afterwards; evaluated every 250 steps."""
    periodic, between = saves(10_000, 200_000, lambda step: step % 250 == 0 and step <= last)
    best = last // 250 * 250
    nearest = max(step for step in periodic + between if step <= best)
    assert best - nearest < max(1000, best / 4) + 250


def test_only_a_lower_loss_on_the_same_set_makes_another_best():
    judgement = Judgement()
    judgement.judge(5, 3.0, 100)
    assert judgement.better_than(None, 5) and not judgement.better_than(None, 6)  # step 6 was not evaluated
    assert judgement.better_than((3.1, 100), 5) and not judgement.better_than((3.0, 100), 5)
    assert judgement.better_than((2.0, 200), 5), "the loss of another set says nothing"
    judgement.judge(6, float("nan"), 100)
    assert not judgement.better_than(None, 6)


def test_best_is_the_best_of_those_that_were_saved_also_after_going_on(tmp_path, tiny_dataset, monkeypatch):
    """Issue 10.12. The loss falls to 4.3 at step 7 and rises; at step 40 it is 4.35, more than that, but less than was saved."""

    def loss(step: int) -> float:
        return {40: 4.35}.get(step, 5.0 - 0.1 * step if step <= 7 else 4.6)

    steps = iter(range(41))  # each is evaluated, and the untrained model
    monkeypatch.setattr("training.evaluation.mean_loss", lambda *_: (loss(next(steps)), 100))
    run = (*TINY_RUN, f"--dataset={tiny_dataset}", f"--out_dir={tmp_path}", "--eval_interval=1", "--save_interval=20")
    store = CheckpointStore(tmp_path)
    assert train.main([*run, "--max_iters=20", "--lr_decay_iters=40", "--keep_last=9"]) == 0
    assert [int(path.name[-9:]) for path in store.all()] == [2, 4, 6, 20]
    assert store.pointed("best").name == "step_000000006" and store.best_loss() == (pytest.approx(4.4), 100)
    assert train.main([*run, "--max_iters=40", "--lr_decay_iters=40", "--init_from=resume", "--keep_last=9"]) == 0
    assert [int(path.name[-9:]) for path in store.all()] == [2, 4, 6, 20, 40]
    assert store.pointed("best").name == "step_000000040"
    logged = [json.loads(line) for log in tmp_path.glob("run_*.jsonl") for line in log.read_text().splitlines()]
    assert {e["step"]: e["best"] for e in logged if e["event"] == "checkpoint"} == {
        2: True,
        4: True,
        6: True,
        20: False,
        40: True,
    }


def test_a_snapshot_every_n_epochs_stays_also_after_going_on(tmp_path, tiny_dataset):
    """An epoch of 640 tokens is 10 steps. The run stops in mid-epoch, at step 24, and goes on."""
    run = (*TINY_RUN, f"--dataset={tiny_dataset}", f"--out_dir={tmp_path}", "--max_train_tokens=640", "--eval_interval=0")
    run += ("--epochs=6", "--snapshot_epochs=2", "--save_interval=7", "--keep_last=1", "--lr_schedule=constant")
    store = CheckpointStore(tmp_path)
    assert train.main([*run, "--epochs=2.4"]) == 0
    assert [int(path.name[-9:]) for path in store.all()] == [20, 24]
    assert train.main([*run, "--resume"]) == 0
    assert [int(path.name[-9:]) for path in store.snapshots()] == [20, 40, 60]
    others = {path.name for path in store.all()} - {path.name for path in store.snapshots()}
    assert others <= {store.pointed("best").name}


@pytest.mark.parametrize(
    "words, reason", [(["--snapshot_epochs=0"], "above 0"), (["--snapshot_epochs=1", "--save_interval=-1"], "none at all")]
)
def test_snapshots_that_cannot_be_are_refused(words, reason, capsys):
    assert train.main(words) == 2 and reason in capsys.readouterr().err
