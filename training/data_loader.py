"""What the model reads next, as a pure function of (data_seed, sequences consumed).

`WindowOrder` says where sequence number i starts; it keeps no state and takes no memory, so the order depends neither
on batch size, accumulation, number of processes or evaluation, nor on how often a run was stopped and resumed.
`MixedOrder` says besides which dataset of a mixture sequence number i is read from.
`DataLoader` reads this rank's slice of a batch, the next one in the background. `validation_batches` is the fixed set
of windows of every evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from command_line import UsageError
from data.hashing import GOLDEN, mix64
from data.mixture import SHARES, MixedDataset
from data.token_dataset import DatasetError, TokenDataset, TokenSplit
from training.batch import IGNORE, Batch, next_token_batch
from training.train_config import TrainConfig

FEISTEL_ROUNDS = 10  # with fewer, some orders of very few windows are visibly favoured


class WindowOrder:
    """Where each training sequence starts, in tokens. `version` is kept in a checkpoint: a run keeps the order it began with.

    Version 2 (of new runs): the split is a ring, its first token follows its last one. An epoch lays ⌊tokens / block_size⌋
    windows of block_size inputs side by side on the ring, from a place drawn at random for each epoch (a window is one token
    longer, as targets are shifted by one), and reads each once, in an order drawn at random for each epoch. So each token is
    read equally often, the first and the last as well, and the cuts between windows fall elsewhere every time. Fewer
    than block_size tokens, somewhere on the ring, are left out of an epoch; one window at most joins the end to the start.

    Version 1 (of checkpoints that name none): windows do not join the ends. An epoch has ⌊(tokens - block_size) /
    block_size⌋ of them, from an offset below tokens - windows × block_size: the two ends are read less often.
    """

    VERSION = 2

    def __init__(self, tokens: int, block_size: int, data_seed: int, version: int = VERSION):
        if version not in (1, 2):
            raise DatasetError(
                f"The order of the data is of version {version!r}, and this program knows 1 and 2; update the program."
            )
        if tokens < block_size + 1:
            raise DatasetError(
                f"The training text has {tokens:,} tokens, too few for one window of "
                f"block_size={block_size:,} and its shifted targets; use "
                f"--block_size={max(1, tokens - 1)} or smaller, or more text."
            )
        self.tokens, self.block_size, self.data_seed, self.version = tokens, block_size, data_seed, version
        if version == 1:
            self.windows_per_epoch = max(1, (tokens - block_size) // block_size)
            self._offsets = tokens - self.windows_per_epoch * block_size  # how many offsets keep every window inside
        else:
            self.windows_per_epoch = tokens // block_size
            self._offsets = tokens
        # The permutation works on pairs of half_bits-bit numbers: the smallest square domain with room for all windows.
        self._half_bits = np.uint64(max(1, ((self.windows_per_epoch - 1).bit_length() + 1) // 2))

    @property
    def sequences_per_epoch(self) -> float:
        """How many sequences hold as many tokens as the split: what "one epoch" of a run's length means.

        It is not whole where block_size does not divide the tokens: then some tokens are read for the second time before
        others are read for the first. Version 1 counted whole orders.
        """
        return self.windows_per_epoch if self.version == 1 else self.tokens / self.block_size

    def places(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(split, token position) of sequences [first, first + count): there is one split, number 0."""
        return np.zeros(count, dtype=np.int64), self.starts(first, count)

    def counts(self, sequences: int) -> list[int]:
        """How many of the first so many sequences each split has."""
        return [sequences]

    def starts(self, first: int, count: int) -> np.ndarray:
        """Token positions, below `tokens`, at which sequences [first, first + count) start."""
        sequence = np.arange(first, first + count, dtype=np.uint64)
        epoch, place = np.divmod(sequence, np.uint64(self.windows_per_epoch))
        key = mix64(epoch + mix64(np.array([self.data_seed % 2**64], dtype=np.uint64)))
        offset = mix64(key) % np.uint64(self._offsets)
        return ((offset + self._permuted(place, key) * np.uint64(self.block_size)) % np.uint64(self.tokens)).astype(np.int64)

    def _permuted(self, place: np.ndarray, key: np.ndarray) -> np.ndarray:
        """The window read at each place of an epoch: a keyed permutation of 0 … W-1 (Black & Rogaway 2002).

        A Feistel network permutes the square domain; a value that falls outside of the windows is sent through again
        until it falls inside ("cycle walking"), so it stays a permutation. The domain is at most 4 W: few turns.
        """
        window = self._feistel(place, key)
        while len(outside := np.flatnonzero(window >= np.uint64(self.windows_per_epoch))):
            window[outside] = self._feistel(window[outside], key[outside])
        return window

    def _feistel(self, value: np.ndarray, key: np.ndarray) -> np.ndarray:
        bits = self._half_bits
        mask = (np.uint64(1) << bits) - np.uint64(1)
        left, right = value >> bits, value & mask
        for turn in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (mix64(key ^ (right + np.uint64(turn << 48))) & mask)
        return (left << bits) | right


class MixedOrder:
    """Of a mixture, which split each training sequence is read from, and where it starts there.

    orders: of each split. phases: (first sequence, shares of the splits in millionths) in rising order, the first at 0.

    Sequence number i stands at the point (i · STRIDE + shift) mod SHARES of a circle, on which each split has an arc of the
    length of its share. STRIDE is SHARES times the golden ratio, so the points of any stretch of sequences are spread evenly
    (Weyl 1916): each split has its share of them but for a few sequences. How many of the first i it had is a sum of rounded
    fractions, found in O(log) steps, so nothing is kept and any sequence can be asked for at once.
    """

    STRIDE = 618_033  # has no divisor in common with SHARES
    version = WindowOrder.VERSION

    def __init__(self, orders: Sequence[WindowOrder], phases: Sequence[tuple[int, Sequence[int]]], data_seed: int):
        self.orders, self.phases = list(orders), [(first, list(shares)) for first, shares in phases]
        self.shift = int(mix64(np.array([data_seed % 2**64], dtype=np.uint64) + GOLDEN)[0]) % SHARES

    @property
    def sequences_per_epoch(self) -> float:
        """How many sequences hold as many tokens as all splits together."""
        return sum(order.sequences_per_epoch for order in self.orders)

    def counts(self, sequences: int) -> list[int]:
        """How many of the first so many sequences each split has."""
        total = [0] * len(self.orders)
        for (first, shares), end in zip(self.phases, [start for start, _ in self.phases[1:]] + [sequences]):
            last, edge = min(end, sequences), 0
            for i, share in enumerate(shares if last > first else ()):
                total[i] += self._inside(first, last, edge, edge + share)
                edge += share
        return total

    def places(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(split, token position) of sequences [first, first + count), each (count,)."""
        numbers = np.arange(first, first + count, dtype=np.int64)
        points = (numbers % SHARES * self.STRIDE + self.shift) % SHARES
        splits = np.empty(count, dtype=np.int64)
        for start, shares in self.phases:
            later = numbers >= start
            splits[later] = np.searchsorted(np.cumsum(shares), points[later], side="right")
        starts = np.empty(count, dtype=np.int64)
        for split, before in enumerate(self.counts(first)):
            own = np.flatnonzero(splits == split)
            if len(own):
                starts[own] = self.orders[split].starts(before, len(own))
        return splits, starts

    def _inside(self, first: int, last: int, low: int, high: int) -> int:
        """How many of sequences [first, last) have a point in [low, high)."""
        return sum(
            sign * sum_of_floors(last - first, SHARES, self.STRIDE, (first * self.STRIDE + self.shift) % SHARES - edge + SHARES)
            for sign, edge in ((1, low), (-1, high))
        )


def sum_of_floors(count: int, divisor: int, factor: int, shift: int) -> int:
    """Σ ⌊(factor · i + shift) / divisor⌋ over 0 ≤ i < count, in O(log) steps; all ≥ 0 (Graham, Knuth & Patashnik, §3.5)."""
    total = 0
    while count > 0:
        total += (factor // divisor) * count * (count - 1) // 2 + (shift // divisor) * count
        factor, shift = factor % divisor, shift % divisor
        largest = factor * count + shift
        # The lattice points under the line, counted by the other axis.
        count, shift, divisor, factor = largest // divisor, largest % divisor, factor, divisor
    return total


class DataLoader:
    """This rank's rows of any batch of training sequences; the batch after it is read in the background meanwhile.

    split: what is read, or the splits of a mixture, whose shares `phases` gives: (tokens of training from which on they hold,
    shares in millionths); the first sequence that begins there or later is the first of a phase. eos_id: documents that end
    with it are kept apart (see next_token_batch).
    """

    def __init__(
        self,
        split: TokenSplit | Sequence[TokenSplit],
        block_size: int,
        data_seed: int,
        *,
        vocab_size: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        prefetch: bool = True,
        order_version: int = WindowOrder.VERSION,
        phases: Sequence[tuple[int, Sequence[int]]] = (),
        eos_id: int | None = None,
    ):
        self.splits = [split] if isinstance(split, TokenSplit) else list(split)
        self.block_size, self.vocab_size, self.eos_id = block_size, vocab_size, eos_id
        self.rank, self.world_size = rank, world_size
        for one in self.splits if len(self.splits) > 1 else ():
            if len(one) <= block_size:
                raise DatasetError(
                    f"{one.label} has {len(one):,} tokens, too few for one window of block_size={block_size:,} and its shifted "
                    "targets; leave it out of the mixture, or use a smaller --block_size."
                )
        seeds = [data_seed + i * int(GOLDEN) for i in range(len(self.splits))]  # an order of its own for each
        orders = [WindowOrder(len(one), block_size, seed, order_version) for one, seed in zip(self.splits, seeds)]
        from_sequence = [(-(-tokens // block_size), shares) for tokens, shares in phases]
        self.order = orders[0] if len(orders) == 1 else MixedOrder(orders, from_sequence, data_seed)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data_loader") if prefetch else None
        self._guess: tuple[tuple[int, int], Future] | None = None

    def batch(self, first_sequence: int, count: int) -> Batch:
        """Rows of sequences [first_sequence, first_sequence + count) that are this rank's.

        `inputs` and `targets` (count / world_size, block_size); rank r has the r-th contiguous slice. DatasetError, also
        of the background thread, when the dataset cannot be read or holds ids beyond the vocabulary.
        """
        if count % self.world_size:
            raise ValueError(f"a batch of {count} sequences cannot be shared equally by {self.world_size} processes")
        wanted, guess = (first_sequence, count), self._guess
        self._guess = None
        rows = guess[1].result() if guess and guess[0] == wanted else self._read(*wanted)
        if self._worker is not None:
            following = (first_sequence + count, count)
            self._guess = (following, self._worker.submit(self._read, *following))
        return next_token_batch(rows, self.eos_id)

    def read_so_far(self, sequences: int) -> list[tuple[int, float]]:
        """Of each split, how many tokens the first so many sequences have read of it, and how many epochs that is."""
        orders = self.order.orders if isinstance(self.order, MixedOrder) else [self.order]
        counts = self.order.counts(sequences)
        return [(count * self.block_size, count / order.sequences_per_epoch) for count, order in zip(counts, orders)]

    def _read(self, first_sequence: int, count: int) -> torch.Tensor:
        rows = count // self.world_size
        splits, starts = self.order.places(first_sequence + self.rank * rows, rows)
        windows = np.empty((rows, self.block_size + 1), dtype=np.int64)
        for number in np.unique(splits):
            own = splits == number
            windows[own] = _read_windows(self.splits[number], starts[own], self.block_size + 1, self.vocab_size)
        return torch.from_numpy(windows)

    def close(self) -> None:
        """Stop the background thread. Batches can still be read after it."""
        if self._worker is not None:
            self._worker.shutdown(wait=True, cancel_futures=True)
        self._worker = self._guess = None

    def __enter__(self) -> DataLoader:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def document_end(config: TrainConfig, dataset: TokenDataset | MixedDataset) -> int | None:
    """The id that keeps documents apart; None for pack=stream. UsageError where the dataset has none."""
    if config.pack == "stream":
        return None
    if dataset.eos_id is None:
        raise UsageError(
            f"pack=document needs the ids where documents end, and {config.dataset} has none (it is a single document, or has no "
            "meta.json). Use --pack=stream."
        )
    return dataset.eos_id


def repetitions(dataset: TokenDataset | MixedDataset, loader: DataLoader, sequences: int) -> list[str]:
    """What is to be said of the parts of a mixture that a run of so many sequences reads more than once."""
    if len(dataset.parts) == 1:
        return []
    return [
        f"{name} has {len(part.split('train')):,} tokens: this run reads it {epochs:.1f} times"
        for name, part, (_, epochs) in zip(dataset.names, dataset.parts, loader.read_so_far(sequences))
        if epochs > 1
    ]


def validation_windows(shares: Sequence[int], windows: int) -> list[int]:
    """How many of the windows of the validation set each part of a mixture gives: by its share, and one at least.

    0 windows are all of each.
    """
    return [0 if not windows else max(1, round(windows * share / sum(shares))) for share in shares]


def validation_batches(
    split: TokenSplit,
    block_size: int,
    windows: int | None,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    *,
    vocab_size: int | None = None,
    eos_id: int | None = None,
) -> Iterator[Batch]:
    """Yield batches, `inputs` and `targets` (rows, block_size), of a fixed set of windows side by side.

    windows: how many, spread evenly over the split; 0 or None for all of them, so that every token but the first is a
    target exactly once. Targets are IGNORE where a window is filled up (the shorter last one; whole rows where the
    windows do not divide). Over all ranks each window comes once; all ranks yield the same number of batches of the
    same shape.
    """
    targets_in_all = len(split) - 1
    if targets_in_all < 1:
        raise DatasetError(
            f"{split.label} has {len(split)} tokens, too few to validate on (2 at least); use more text or a larger val_fraction."
        )
    existing = -(-targets_in_all // block_size)
    used = min(windows or existing, existing)
    chosen = np.arange(used) * existing // used
    batches = -(-used // (batch_size * world_size))
    rows = -(-used // (batches * world_size))  # evenly full batches, batch_size at most
    for batch in range(batches):
        first = (batch * world_size + rank) * rows
        tokens = torch.zeros(rows, block_size + 1, dtype=torch.long)
        filled = torch.zeros(rows, block_size, dtype=torch.bool)  # where there is a target
        for row, window in enumerate(chosen[first : first + rows]):
            start = int(window) * block_size
            length = min(block_size + 1, len(split) - start)
            tokens[row, :length] = torch.from_numpy(_read_windows(split, np.array([start]), length, vocab_size)[0])
            filled[row, : length - 1] = True
        found = next_token_batch(tokens, eos_id)
        inputs = found.inputs.masked_fill(~filled, 0)
        yield Batch(**{**found.tensors, "inputs": inputs, "targets": found.targets.masked_fill(~filled, IGNORE)})


def _read_windows(split: TokenSplit, starts: np.ndarray, length: int, vocab_size: int | None) -> np.ndarray:
    """Tokens [start, start + length) of each start: (len(starts), length), every id checked against the vocabulary.

    The split is a ring: what would stand beyond its last token is read from its first one on. length ≤ len(split).
    """
    windows = np.empty((len(starts), length), dtype=np.int64)
    for row, start in enumerate(starts.tolist()):
        inside = min(length, len(split) - start)
        windows[row, :inside] = split.read(start, start + inside)
        if inside < length:
            windows[row, inside:] = split.read(0, length - inside)
    if vocab_size is not None and windows.size and (largest := windows.max()) >= vocab_size:
        raise DatasetError(
            f"{split.label} holds the token id {largest:,}, but the model has "
            f"vocab_size={vocab_size:,}; use --vocab_size={largest + 1} or larger, or a dataset "
            "prepared for this vocabulary."
        )
    return windows
