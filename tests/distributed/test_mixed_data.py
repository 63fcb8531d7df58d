"""Mixtures and packed documents on two processes, and back on one: the run of one process."""

import json

from conftest import TINY_RUN

import train
from data.preparation import prepare
from tests.distributed.launching import shared_launcher


def steps(out):
    """step → (loss, what was read of each part)."""
    lines = [line for path in sorted(out.glob("run_*.jsonl")) for line in path.read_text().splitlines()]
    return {event["step"]: (event["loss"], event["sources"]) for event in map(json.loads, lines) if event["event"] == "step"}


def test_a_mixture_of_packed_documents_is_the_same_on_two_processes_and_resumed_on_one(tmp_path):
    """In the middle of an epoch of the large part, after several of the small one; exact to rounding, and counted alike."""
    large = [(str(i), f"Document {i} says: " + "the cat sat on the mat. " * (i % 5)) for i in range(80)]
    prepare(lambda: iter(large), tmp_path / "large", tokenizer="byte")
    prepare(lambda: iter([(str(i), f"tiny {i}") for i in range(9)]), tmp_path / "small", tokenizer="byte")
    given = [*TINY_RUN, f"--dataset={tmp_path / 'large'}:0.9,{tmp_path / 'small'}:0.1", "--pack=document"]
    given += ["--gradient_accumulation_steps=2", "--lr_decay_iters=8"]
    assert train.main([*given, f"--out_dir={tmp_path / 'one'}", "--max_iters=8"]) == 0
    group = shared_launcher().run(*given, f"--out_dir={tmp_path / 'two'}", "--max_iters=4")
    assert group.codes == {0: 0, 1: 0}, group.err
    assert train.main([*given, f"--out_dir={tmp_path / 'two'}", "--max_iters=8", "--resume"]) == 0
    one, two = steps(tmp_path / "one"), steps(tmp_path / "two")
    assert one.keys() == two.keys() and len(one) == 8
    for step, (loss, sources) in one.items():
        assert abs(loss - two[step][0]) < 1e-5 * loss and sources == two[step][1]
    assert 1 < one[8][1][str(tmp_path / "small")]["epochs"] < 10
