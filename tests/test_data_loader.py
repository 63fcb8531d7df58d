"""The order of data is a pure function of (data_seed, sequence), each window comes once an epoch, and validation is
fixed."""

import threading

import numpy as np
import pytest
import torch

from data.dataset_writer import DatasetWriter
from data.token_dataset import DatasetError, TokenDataset, TokenSplit
from data.tokenization import ByteTokenizer
from training.batch import Batch
from training.data_loader import DataLoader, WindowOrder, validation_batches


def windows(batch: Batch) -> torch.Tensor:
    """The windows (rows, block_size + 1) that a batch was cut from: its targets are the inputs shifted by one."""
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    return torch.cat((batch.inputs, batch.targets[:, -1:]), dim=1)


def make_split(folder, tokens, name="train.bin"):
    """A split whose tokens are 0, 1, 2, … modulo 60,000: a token tells where it stands."""
    (np.arange(tokens) % 60_000).astype("<u2").tofile(folder / name)
    return TokenSplit("train", [folder / name], np.dtype("<u2"))


# ------------------------------------------------------------------------------------------- the order


@pytest.mark.parametrize("windows", [*range(1, 40), 63, 64, 65, 255, 256, 257, 1000, 4096, 5001])
@pytest.mark.parametrize("extra", [0, 7])
def test_an_epoch_reads_each_window_once(windows, extra):
    block = 8
    tokens = max(windows * block + extra, block + 1)
    order = WindowOrder(tokens, block, data_seed=windows)
    assert order.windows_per_epoch == windows
    for epoch in (0, 1, 5):
        starts = order.starts(epoch * windows, windows)
        assert starts.min() >= 0 and starts.max() < tokens
        inputs = (starts[:, None] + np.arange(block)) % tokens  # on the ring, no token is an input twice
        assert len(np.unique(inputs)) == windows * block
        steps = np.diff(np.sort(starts))  # side by side: one gap at most, where the left-out tokens lie
        assert np.isin(steps, [block, block + tokens - windows * block]).all()


@pytest.mark.parametrize("windows", [1, 2, 3, 64, 257])
@pytest.mark.parametrize("extra", [0, 7])
def test_an_epoch_of_version_1_reads_each_window_once(windows, extra):
    block = 8
    order = WindowOrder(windows * block + block + extra, block, data_seed=windows, version=1)
    assert order.windows_per_epoch == order.sequences_per_epoch == windows
    for epoch in (0, 1, 5):
        starts = order.starts(epoch * windows, windows)
        offset = starts.min()
        assert sorted(starts - offset) == [i * block for i in range(windows)]
        assert offset >= 0 and starts.max() + block + 1 <= order.tokens


@pytest.mark.parametrize("tokens", [33, 34, 48, 63, 64, 65, 78, 95, 96, 97, 200, 325, 1000])
def test_every_token_is_read_equally_often_the_ends_as_well(tmp_path, tokens):
    """Issue 10.18. Each input that the loader gives is counted over 2,000 epochs, and each pair of input and target is one
    of the text, or the one that joins its end to its start. Of a share p of the tokens an epoch reads, each is read by
    chance: its count has a standard deviation of √(2000 p (1 - p)), and none is beyond 5 of these."""
    block, epochs = 32, 2000
    loader = DataLoader(make_split(tmp_path, tokens), block, 7, prefetch=False)
    whole = tokens // block
    rows = windows(loader.batch(0, whole * epochs)).numpy()
    assert rows.shape == (whole * epochs, block + 1)
    assert np.array_equal(rows[:, 1:], (rows[:, :-1] + 1) % tokens)
    reads = np.bincount(rows[:, :-1].ravel(), minlength=tokens)
    share = whole * block / tokens
    deviation = np.sqrt(epochs * share * (1 - share))
    assert np.abs(reads - epochs * share).max() <= 5 * deviation
    if deviation == 0:
        assert (reads == epochs).all()
    shown = [len(np.unique(epoch[:, :-1])) for epoch in np.split(rows[: 20 * whole], 20)]
    assert shown == [whole * block] * 20


def test_an_epoch_of_a_small_split_shows_all_windows_that_fit():
    """Issue 10.18: 2,500 tokens hold two windows of 1,024, so 82 % of them are read in an epoch (41 % in version 1)."""
    order = WindowOrder(2500, 1024, data_seed=1)
    assert (order.windows_per_epoch, WindowOrder(2500, 1024, 1, version=1).windows_per_epoch) == (2, 1)
    starts = order.starts(0, 2)
    assert len(np.unique((starts[:, None] + np.arange(1024)) % 2500)) == 2048


@pytest.mark.parametrize("tokens", [33, 64, 65, 89 * 32, 5000])
def test_the_cuts_between_windows_fall_elsewhere_in_each_epoch(tokens):
    order = WindowOrder(tokens, 32, data_seed=2)
    starts = order.starts(0, 64 * order.windows_per_epoch).reshape(64, -1)
    cuts = {tuple(sorted(epoch)) for epoch in starts.tolist()}
    possible = min(32, tokens) if tokens % 32 == 0 else tokens  # a ring of whole windows has only block_size ways to be cut
    expected = possible * (1 - (1 - 1 / possible) ** 64)  # different ones among 64 drawn
    assert len(cuts) > 0.75 * expected


@pytest.mark.parametrize("tokens", [9, 10, 15, 16, 17, 23, 24, 25, 1000])
def test_an_epoch_of_a_runs_length_is_as_many_tokens_as_the_split_has(tokens):
    order = WindowOrder(tokens, 8, data_seed=3)
    assert order.sequences_per_epoch * 8 == tokens
    assert order.windows_per_epoch <= order.sequences_per_epoch < order.windows_per_epoch + 1


@pytest.mark.parametrize("tokens", [9, 10, 15, 16, 17, 23, 24, 25, 1000])
def test_every_window_of_version_1_fits_and_every_token_is_reached(tokens):
    order = WindowOrder(tokens, 8, data_seed=3, version=1)
    assert order.windows_per_epoch == max(1, (tokens - 8) // 8)
    starts = order.starts(0, 200 * order.windows_per_epoch)
    reached = np.unique(starts[:, None] + np.arange(9))
    assert np.array_equal(reached, np.arange(tokens))


def test_the_order_does_not_depend_on_how_it_is_asked_for():
    order = WindowOrder(5000, 16, data_seed=11)
    whole = order.starts(0, 1000)
    for size in (1, 7, 64, 333):
        parts = [order.starts(i, min(size, 1000 - i)) for i in range(0, 1000, size)]
        assert np.array_equal(np.concatenate(parts), whole)
    assert np.array_equal(WindowOrder(5000, 16, data_seed=11).starts(700, 300), whole[700:])


def test_seeds_and_epochs_have_orders_of_their_own():
    windows = 311
    orders = {
        tuple(WindowOrder(windows * 16 + 16, 16, seed).starts(epoch * windows, windows))
        for seed in (0, 1, 2, -1)
        for epoch in range(4)
    }
    assert len(orders) == 16


def test_the_order_looks_random():
    windows = 20_000
    order = WindowOrder(windows * 4, 4, data_seed=0)
    starts = order.starts(0, windows)
    places = ((starts - starts[0]) % order.tokens).astype(float)[1:]
    for a, b in ((places[1:], places[:-1]), (places, np.arange(windows - 1))):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.03  # four standard deviations
    small = WindowOrder(5 * 8 + 7, 8, data_seed=1)
    starts = np.sort(small.starts(0, 5 * 6000).reshape(6000, 5), axis=1)
    gap = np.argmax((np.roll(starts, -1, axis=1) - starts) % small.tokens, axis=1)  # window 0 follows the left-out tokens
    first = np.take_along_axis(starts, ((gap + 1) % 5)[:, None], axis=1)
    which = (small.starts(0, 5 * 6000).reshape(6000, 5) - first) % small.tokens // 8
    for place in range(5):  # each of 5 windows is as often at each place
        assert np.all(np.abs(np.bincount(which[:, place], minlength=5) / 6000 - 0.2) < 0.025)


@pytest.mark.parametrize("version", [1, 2])
def test_the_order_is_that_of_the_written_definition(version):
    """Plain integers, one sequence at a time. A changed order would make a resumed run read on elsewhere, unnoticed."""

    def mix(x):
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    def start(sequence, tokens, block, seed):
        windows = max(1, (tokens - block) // block) if version == 1 else tokens // block
        key = mix((sequence // windows + mix(seed % 2**64)) % 2**64)
        offset = mix(key) % (tokens - windows * block if version == 1 else tokens)
        bits = 1
        while 4**bits < windows:
            bits += 1
        window = sequence % windows
        while True:
            left, right = window >> bits, window % 2**bits
            for turn in range(10):
                left, right = right, left ^ mix(key ^ (right + (turn << 48))) % 2**bits
            window = left << bits | right
            if window < windows:
                return (offset + window * block) % tokens

    for tokens, block, seed in ((1000, 16, 1337), (17, 16, 0), (5000, 7, -3), (2**40, 1024, 2**63)):
        first = 10**6
        expected = [start(sequence, tokens, block, seed) for sequence in range(first, first + 200)]
        assert WindowOrder(tokens, block, seed, version).starts(first, 200).tolist() == expected


def test_a_huge_dataset_takes_no_memory_for_its_order():
    order = WindowOrder(10**13, 1024, data_seed=1)
    starts = order.starts(10**12, 1000)
    assert len(np.unique(starts)) > 990 and starts.max() < 10**13 and starts.min() >= 0


def test_an_unknown_version_of_the_order_is_refused():
    with pytest.raises(DatasetError, match="version 3, .*update the program"):
        WindowOrder(1000, 8, 0, version=3)


def test_too_short_a_text_names_the_block_size_that_fits():
    with pytest.raises(DatasetError, match="8 tokens.*block_size=8 .*--block_size=7 or smaller"):
        WindowOrder(8, 8, 0)


# ------------------------------------------------------------------------------------------- batches


def test_rows_are_the_windows_at_the_starts(tmp_path):
    split = make_split(tmp_path, 3000)
    with DataLoader(split, 16, 5, vocab_size=60_000) as loader:
        batch = windows(loader.batch(40, 12))
    assert batch.dtype == torch.int64 and batch.shape == (12, 17)
    starts = WindowOrder(3000, 16, 5).starts(40, 12)
    assert torch.equal(batch, torch.from_numpy((starts[:, None] + np.arange(17)) % 3000))


def test_a_checkpoints_version_of_the_order_is_the_loaders(tmp_path):
    loader = DataLoader(make_split(tmp_path, 3000), 16, 5, order_version=1, prefetch=False)
    assert windows(loader.batch(40, 12))[:, 0].tolist() == WindowOrder(3000, 16, 5, version=1).starts(40, 12).tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_ranks_share_the_global_batch(tmp_path, world_size):
    split = make_split(tmp_path, 3000)
    whole = DataLoader(split, 16, 5, prefetch=False)
    ranks = [DataLoader(split, 16, 5, rank=rank, world_size=world_size, prefetch=False) for rank in range(world_size)]
    for first in (0, 12, 996):
        assert torch.equal(torch.cat([windows(rank.batch(first, 12)) for rank in ranks]), windows(whole.batch(first, 12)))
    if world_size > 1:
        with pytest.raises(ValueError, match="shared equally"):
            ranks[0].batch(0, 13)


def test_prefetching_changes_nothing(tmp_path):
    split = make_split(tmp_path, 3000)
    plain = DataLoader(split, 16, 5, prefetch=False)
    with DataLoader(split, 16, 5) as loader:
        for first, count in ((0, 8), (8, 8), (16, 8), (0, 8), (8, 4), (12, 4), (500, 6), (506, 6)):
            assert torch.equal(windows(loader.batch(first, count)), windows(plain.batch(first, count)))


def test_the_next_batch_is_read_ahead_in_the_background(tmp_path, monkeypatch):
    split = make_split(tmp_path, 3000)
    threads = []
    read = split.read
    monkeypatch.setattr(split, "read", lambda *span: threads.append(threading.current_thread().name) or read(*span))
    with DataLoader(split, 16, 5) as loader:
        windows(loader.batch(0, 4))
        loader._guess[1].result()
        assert len(threads) == 8 and all(name.startswith("data_loader") for name in threads[4:])
        windows(loader.batch(4, 4))
        assert threading.main_thread().name not in threads[4:]


def test_close_ends_the_thread_and_batches_can_still_be_read(tmp_path):
    before = threading.active_count()
    loader = DataLoader(make_split(tmp_path, 300), 16, 5)
    windows(loader.batch(0, 4))
    loader.close()
    loader.close()
    assert threading.active_count() == before
    assert windows(loader.batch(4, 4)).shape == (4, 17)


def test_a_dataset_smaller_than_a_batch_turns_epochs_faster(tmp_path):
    loader = DataLoader(make_split(tmp_path, 20), 16, 5, prefetch=False)
    assert loader.order.windows_per_epoch == 1
    assert windows(loader.batch(0, 64)).shape == (64, 17) and len(windows(loader.batch(0, 64))[:, 0].unique()) > 15


def test_ids_beyond_the_vocabulary_name_id_and_vocabulary(tmp_path):
    loader = DataLoader(make_split(tmp_path, 300), 16, 5, vocab_size=200, prefetch=False)
    with pytest.raises(DatasetError, match=f"{tmp_path}.*token id 2.., but the model has vocab_size=200"):
        for first in range(0, 18, 6):
            windows(loader.batch(first, 6))


def test_errors_of_the_background_thread_surface_at_the_call(tmp_path):
    split = make_split(tmp_path, 3000)
    with DataLoader(split, 16, 5) as loader:
        windows(loader.batch(0, 4))
        loader._guess[1].result()
        with open(tmp_path / "train.bin", "r+b") as file:
            file.truncate(100)
        windows(loader.batch(4, 4))  # was read before; its successor cannot be
        with pytest.raises(DatasetError, match="became shorter"):
            windows(loader.batch(8, 4))


def test_sharded_and_whole_datasets_give_the_same_batches(tmp_path):
    batches = []
    for name, shard_tokens in (("whole", None), ("shards", 37)):
        with DatasetWriter(tmp_path / name, ByteTokenizer(), shard_tokens=shard_tokens) as writer:
            writer.add("train", np.arange(500) % 251, 500)
            writer.add("val", [1, 2], 2)
            writer.publish()
        split = TokenDataset.open(tmp_path / name).split("train")
        batches.append(windows(DataLoader(split, 16, 5, prefetch=False).batch(0, 60)))
    assert torch.equal(*batches)


# ------------------------------------------------------------------------------------------- validation


def pairs(batches):
    """Every (input token, target token) that counts, sorted."""
    return sorted(pair for b in batches for pair in zip(b.inputs[b.targets >= 0].tolist(), b.targets[b.targets >= 0].tolist()))


@pytest.mark.parametrize("tokens", [2, 3, 8, 9, 10, 16, 17, 18, 100, 129])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_all_windows_make_every_token_a_target_once_over_all_ranks(tmp_path, tokens, world_size):
    split = make_split(tmp_path, tokens)
    ranks = [list(validation_batches(split, 8, None, 3, rank, world_size)) for rank in range(world_size)]
    assert len({tuple(tuple(b.inputs.shape) for b in rank) for rank in ranks}) == 1  # collectives match
    for inputs, targets in ((b.inputs, b.targets) for rank in ranks for b in rank):
        assert inputs.shape[0] <= 3 and inputs.shape[1] == 8 and targets.shape == inputs.shape
    assert pairs(batch for rank in ranks for batch in rank) == [(i, i + 1) for i in range(tokens - 1)]


@pytest.mark.parametrize("windows", [1, 2, 5, 12, 13, 1000])
def test_some_windows_are_spread_evenly_whatever_the_batch_and_world_size(tmp_path, windows):
    split = make_split(tmp_path, 101)  # 13 windows of 8; the last one has 4 targets
    seen = {
        tuple(pairs(batch for rank in range(world) for batch in validation_batches(split, 8, windows, size, rank, world)))
        for world in (1, 2, 3, 4)
        for size in (1, 2, 5, 64)
    }
    assert len(seen) == 1
    firsts = sorted({first // 8 for first, _ in seen.pop()})
    assert len(firsts) == min(windows, 13) and firsts[0] == 0
    gaps = np.diff([*firsts, 13])
    assert gaps.max() - gaps.min() <= 1


def test_zero_windows_means_all(tmp_path):
    split = make_split(tmp_path, 101)
    assert pairs(validation_batches(split, 8, 0, 4)) == pairs(validation_batches(split, 8, None, 4))


def test_padding_follows_the_text_and_is_ignored(tmp_path):
    (only,) = validation_batches(make_split(tmp_path, 4), 8, None, 16)
    inputs, targets = only.inputs, only.targets
    assert inputs.tolist() == [[0, 1, 2, 0, 0, 0, 0, 0]] and targets.tolist() == [[1, 2, 3, -1, -1, -1, -1, -1]]


def test_validation_text_of_one_token_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="1 tokens, too few"):
        list(validation_batches(make_split(tmp_path, 1), 8, None, 4))


def test_validation_checks_ids_too(tmp_path):
    with pytest.raises(DatasetError, match="vocab_size=50"):
        list(validation_batches(make_split(tmp_path, 100), 8, None, 4, vocab_size=50))
