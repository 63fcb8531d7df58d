"""Mixtures: each part gets its share, in an order that is a function of (seed, sequences) alone."""

import json
import re
import time

import numpy as np
import pytest
import torch
from conftest import TINY_RUN

import train
from command_line import UsageError
from data.dataset_writer import DatasetWriter
from data.mixture import SHARES, open_dataset, parse_mixture, parse_schedule, portable_spec, shares_of
from data.token_dataset import DTYPES, DatasetError, TokenSplit
from data.tokenization import ByteTokenizer
from training.data_loader import DataLoader, MixedOrder, WindowOrder, sum_of_floors, validation_windows


def write(folder, lowest, tokens, tokenizer=None):
    """A dataset by bytes, whose ids from `lowest` to lowest + 49 tell where they come from; documents of 40 tokens."""
    with DatasetWriter(folder, tokenizer or ByteTokenizer(eos=True), append_eos=True) as writer:
        for split, size in (("train", tokens), ("val", max(60, tokens // 10))):
            for first in range(0, size, 40):
                writer.add(split, [lowest + i % 50 for i in range(first, first + 39)], 39)
        writer.publish()
    return folder


@pytest.fixture
def two(tmp_path):
    """The --dataset of two parts, one of them small."""
    return f"{write(tmp_path / 'large', 0, 8000)}:0.7,{write(tmp_path / 'small', 100, 800)}:0.3"


# ------------------------------------------------------------------------------------------- shares and order


@pytest.mark.parametrize(
    "shares", [[700_000, 300_000], [333_333, 333_333, 333_334], [999_990, 10], [1, 999_999], [618_033, 381_967]]
)
def test_any_ten_thousand_sequences_have_each_part_by_its_share(shares):
    """Within 0.1 %, wherever the stretch begins."""
    order = MixedOrder([WindowOrder(5000 * (i + 1), 16, i) for i in range(len(shares))], [(0, shares)], data_seed=3)
    splits, _ = order.places(0, 200_000)
    for part, share in enumerate(shares):
        total = np.concatenate([[0], np.cumsum(splits == part)])
        found = (total[10_000:] - total[:-10_000]) / 10_000
        assert np.abs(found - share / SHARES).max() <= 0.001


def test_how_often_each_part_was_read_is_what_counting_gives():
    order = MixedOrder(
        [WindowOrder(50_000, 16, 1), WindowOrder(3000, 16, 2), WindowOrder(999, 16, 3)],
        [(0, [700_000, 299_990, 10]), (5000, [100_000, 0, 900_000]), (5001, [0, SHARES, 0])],
        data_seed=7,
    )
    splits, starts = order.places(0, 12_000)
    for count in (0, 1, 17, 4999, 5000, 5001, 5002, 11_999):
        assert order.counts(count) == [int((splits[:count] == part).sum()) for part in range(3)]
    for part, own in enumerate(order.orders):  # each part is read as it would be alone
        assert np.array_equal(starts[splits == part], own.starts(0, int((splits == part).sum())))
    assert not (splits[5000:5001] == 1).any() and (splits[5001:] == 1).all()
    for first, count in ((0, 1), (4990, 30), (7777, 4000)):
        part, start = order.places(first, count)
        assert np.array_equal(part, splits[first : first + count]) and np.array_equal(start, starts[first : first + count])


def test_a_sum_of_rounded_fractions_is_the_sum():
    drawn = np.random.default_rng(4).integers(0, 60, (300, 4)).tolist()
    for count, divisor, factor, shift in drawn:
        expected = sum((factor * i + shift) // (divisor + 1) for i in range(count))
        assert sum_of_floors(count, divisor + 1, factor, shift) == expected


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_batch_of_a_step_is_the_same_array_at_any_world_size(two, world_size):
    """With mixing and packing on; also where the batch before it was never read, as after a resume."""
    dataset = open_dataset(two)
    options = dict(phases=dataset.phases, eos_id=256, prefetch=False)
    splits = [part.split("train") for part in dataset.parts]
    whole = DataLoader(splits, 16, 5, **options)
    ranks = [DataLoader(splits, 16, 5, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    for step in (0, 1, 50):
        expected = whole.batch(step * 24, 24)
        parts = [rank.batch(step * 24, 24) for rank in ranks]
        for name in ("inputs", "targets", "documents"):
            assert torch.equal(torch.cat([part.tensors[name] for part in parts]), expected.tensors[name])
        for row in expected.inputs:  # each is of one of the two parts
            assert len({bool(token >= 100) for token in row if token != 256}) == 1
    lowest = whole.batch(0, 240).inputs.min(dim=1).values
    assert int((lowest >= 100).sum()) == pytest.approx(72, abs=2)  # of 240, 30 %


def test_a_phase_begins_with_the_first_sequence_that_begins_at_its_tokens_or_later(two):
    parts = [part.split("train") for part in open_dataset(two).parts]
    for tokens, first in ((31, 2), (32, 2), (33, 3)):
        loader = DataLoader(parts, 16, 5, prefetch=False, phases=[(0, [10**6, 0]), (tokens, [0, 10**6])])
        assert loader.order.places(0, 6)[0].tolist() == [0] * first + [1] * (6 - first)


def test_a_trillion_tokens_are_read_at_once(tmp_path):
    """10¹² tokens in 200 sparse files: 2 s at most to the first batch, 5 ms of the processor to any other."""
    files = []
    for shard in range(200):
        files.append(tmp_path / f"train_{shard:05d}.bin")
        with open(files[-1], "wb") as file:
            file.truncate(10**10)  # 5 · 10⁹ tokens, nothing on the disk
    started = time.thread_time()
    split = TokenSplit("train", files, DTYPES["uint16"])
    loader = DataLoader([split, split], 1024, 5, prefetch=False, phases=[(0, [500_000, 500_000])])
    assert len(split) == 10**12 and loader.batch(0, 8).inputs.shape == (8, 1024)
    assert time.thread_time() - started < 2
    seconds = []
    for step in range(1, 40):
        started = time.thread_time()
        loader.batch(step * 8 * 10**6, 8)
        seconds.append(time.thread_time() - started)
    assert sorted(seconds)[20] < 0.005 and len(split._open) <= 100, seconds


# ------------------------------------------------------------------------------------------- what is given


@pytest.mark.parametrize(
    "text, said",
    [
        ("a:0.7,b:0.2", r"the weights sum to 0.9, not to 1; for example a:0.7778,b:0.2222"),
        ("a:1.5,b:-0.5", "the weight of b is negative"),
        ("a:0.5,a:0.5", "names a twice"),
        ("a,b", "'a' is not NAME:WEIGHT"),
        ("a:0.5,b:x", "'b:x' is not NAME:WEIGHT"),
        ("a:nan,b:1", "'a:nan' is not NAME:WEIGHT"),
        ("a:0.5,", "'' is not NAME:WEIGHT"),
        ("a:0.5", "sum to 0.5"),
    ],
)
def test_weights_that_are_none_are_refused_in_a_sentence(text, said):
    with pytest.raises(UsageError, match=said):
        parse_mixture(text)


def test_names_and_paths_of_one_dataset_are_no_mixture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b").mkdir()
    for name in ("pydocs", "/some/where", "a,b", "C:\\data\\x", "x:y"):
        assert parse_mixture(name) is None
    assert parse_mixture("a:0.3333,b:0.3333,c:0.3333") == dict.fromkeys("abc", 0.3333)
    assert sum(shares_of(dict.fromkeys("abc", 0.3333), "abc")) == SHARES


@pytest.mark.parametrize(
    "text, said",
    [
        ("a:1", "does not begin with a number of tokens"),
        ("0 a:1", "does not begin with a number"),
        ("5 a:0.5", "sum to 0.5"),
        ("5 c:1", "names c, which --dataset does not; it has a, b"),
        ("50 a:1; 40 b:1", "begins no later than the one before it"),
    ],
)
def test_a_schedule_that_is_none_is_refused_in_a_sentence(text, said):
    with pytest.raises(UsageError, match=said):
        parse_schedule(text, ["a", "b"])


def test_what_cannot_be_mixed_is_refused_in_a_sentence(tmp_path, two):
    large, small = (part.rpartition(":")[0] for part in two.split(","))
    other = write(
        tmp_path / "other",
        0,
        400,
        tokenizer=type(
            "Other", (ByteTokenizer,), {"kind": "byte", "name": "other", "definition": lambda self: {"kind": "byte", "eos": 1}}
        )(eos=True),
    )
    cases = [
        (f"{large}:0.5,{other}:0.5", {}, r"large \(byte, vocabulary 257\) and .*other \(other, .* have different tokenizers"),
        (f"{large}:0.5,{tmp_path / 'x' / '..' / 'large'}:0.5", {}, "No dataset|same folder"),
        (f"{large}:0.5,{tmp_path}/./large:0.5", {}, "same folder"),
        (f"{large}:1,{small}:0", {}, "the weight of .*small is 0 all run long"),
        (f"{large}:0.99999999,{small}:0.00000001", {}, "below a millionth"),
        (large, {"schedule": "5 a:1"}, "mixture_schedule needs a mixture"),
        (two, {"max_train_tokens": 10**6}, "max_train_tokens=1,000,000 asks for more"),
        (f"{large}:0.5,{tmp_path}/missing:0.5", {}, "No dataset"),
    ]
    for text, options, said in cases:
        with pytest.raises((UsageError, DatasetError), match=said):
            open_dataset(text, **options)


def test_a_part_that_is_shorter_than_a_window_is_named(two):
    parts = [part.split("train") for part in open_dataset(two).parts]
    with pytest.raises(DatasetError, match=r"small \(train\) has 800 tokens, too few for one window of block_size=1,000"):
        DataLoader(parts, 1000, 5, phases=[(0, [700_000, 300_000])], prefetch=False)


def test_the_validation_set_is_shared_by_weight_and_leaves_nobody_out():
    assert validation_windows([700_000, 300_000], 100) == [70, 30]
    assert validation_windows([999_999, 1], 100) == [100, 1]
    assert validation_windows([700_000, 300_000], 0) == [0, 0]


# ------------------------------------------------------------------------------------------- runs


def events(out, kind):
    return [
        event
        for path in sorted(out.glob("run_*.jsonl"))
        for line in path.read_text().splitlines()
        if (event := json.loads(line))["event"] == kind
    ]


def test_a_run_on_a_mixture_counts_its_sources_and_resumes_exactly(two, tmp_path, capsys):
    """Ten steps in one go, or stopped in the middle of an epoch: the same losses; the log tells tokens and epochs by source."""
    common = [
        *TINY_RUN,
        f"--dataset={two}",
        "--mixture_schedule=320 " + two.replace("0.7", "0.25").replace("0.3", "0.75"),
        "--pack=document",
        "--eval_interval=5",
        "--lr_decay_iters=10",
    ]
    assert train.main([*common, f"--out_dir={tmp_path / 'whole'}", "--max_iters=10"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert re.search(r"warning: .*small has 800 tokens: this run reads it 0\.\d times", said) is None
    assert train.main([*common, f"--out_dir={tmp_path / 'parts'}", "--max_iters=5"]) == 0
    assert train.main([*common, f"--out_dir={tmp_path / 'parts'}", "--max_iters=10", "--resume"]) == 0, capsys.readouterr().err
    whole, parts = (events(tmp_path / name, "step") for name in ("whole", "parts"))
    assert [step["loss"] for step in whole] == [step["loss"] for step in parts]
    read = whole[-1]["sources"]
    large, small = (read[part.rpartition(":")[0]] for part in two.split(","))
    assert large["tokens"] + small["tokens"] == whole[-1]["tokens"] == 640
    assert small["tokens"] == pytest.approx(0.3 * 320 + 0.75 * 320, abs=32)
    size = len(open_dataset(two).parts[1].split("train"))
    assert small["epochs"] == pytest.approx(small["tokens"] / size)
    evaluated = events(tmp_path / "whole", "eval")[-1]
    assert set(evaluated["val_loss_by_source"]) == set(read)
    assert min(evaluated["val_loss_by_source"].values()) <= evaluated["val_loss"] <= max(evaluated["val_loss_by_source"].values())
    other = two.replace("0.7", "0.6").replace("0.3", "0.4")
    assert (
        train.main(
            [*common[:-5], f"--dataset={other}", *common[-4:], f"--out_dir={tmp_path / 'parts'}", "--max_iters=11", "--resume"]
        )
        != 0
    )
    assert "not the one this run was trained on" in capsys.readouterr().err


def test_other_weights_are_no_reason_to_prepare_again(two, tmp_path, capsys):
    large, small = (part.rpartition(":")[0] for part in two.split(","))
    arguments = [*TINY_RUN, f"--out_dir={tmp_path / 'out'}", "--block_size=16"]
    assert train.main([*arguments, f"--dataset={two}", "--max_iters=1"]) == 0
    assert train.main([*arguments, f"--dataset={large}:0.5,{small}:0.5", "--max_iters=2", "--resume"]) != 0
    said = capsys.readouterr().err
    assert "is not the one this run was trained on" in said and f"Give --dataset={two}" in said


def test_repeated_epochs_of_a_small_part_are_said(two, tmp_path, capsys):
    assert train.main([*TINY_RUN, f"--dataset={two}", f"--out_dir={tmp_path / 'out'}", "--max_iters=100", "--eval_only"]) == 0
    assert re.search(r"small has 8\d\d tokens: this run reads it 2\.\d times", capsys.readouterr().out)


def test_max_train_tokens_are_the_first_ones(two, tmp_path):
    """A run on the first 200 tokens is the run on a dataset that has no others."""
    large = two.split(",")[0].rpartition(":")[0]
    few = tmp_path / "few"
    with DatasetWriter(few, ByteTokenizer(eos=True)) as writer:
        whole = open_dataset(large)
        writer.add("train", whole.split("train").read(0, 200), 200)
        writer.add("val", whole.split("val").read(0, len(whole.split("val"))), 800)
        writer.publish()
    for name, given in (("a", [f"--dataset={large}", "--max_train_tokens=200"]), ("b", [f"--dataset={few}"])):
        assert train.main([*TINY_RUN, *given, f"--out_dir={tmp_path / name}", "--max_iters=4"]) == 0
    a, b = (events(tmp_path / name, "step") for name in "ab")
    assert [step["loss"] for step in a] == [step["loss"] for step in b]
    assert portable_spec(open_dataset(large), large) == large
