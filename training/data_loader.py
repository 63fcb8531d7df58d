"""What the model reads next, as a pure function of (data_seed, sequences consumed).

`WindowOrder` says where sequence number i starts; it keeps no state and takes no memory, so the order depends neither
on batch size, accumulation, number of processes or evaluation, nor on how often a run was stopped and resumed.
`DataLoader` reads this rank's slice of a batch, the next one in the background. `validation_batches` is the fixed set
of windows of every evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from data.hashing import mix64
from data.token_dataset import DatasetError, TokenSplit
from training.batch import IGNORE, Batch, next_token_batch

FEISTEL_ROUNDS = 10  # with fewer, some orders of very few windows are visibly favoured


class WindowOrder:
    """Where each training sequence starts, in tokens. `version` is kept in a checkpoint: a run keeps the order it began with.

    Version 2 (of new runs): the split is a ring, its first token follows its last one. An epoch lays ⌊tokens / block_size⌋
    windows of block_size inputs side by side on the ring, from a place drawn anew for each epoch (a window is one token
    longer, as targets are shifted by one), and reads each once, in an order drawn anew for each epoch. So each token is
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


class DataLoader:
    """This rank's rows of any batch of training sequences; the batch after it is read in the background meanwhile."""

    def __init__(
        self,
        split: TokenSplit,
        block_size: int,
        data_seed: int,
        *,
        vocab_size: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        prefetch: bool = True,
        order_version: int = WindowOrder.VERSION,
    ):
        self.split, self.block_size, self.vocab_size = split, block_size, vocab_size
        self.rank, self.world_size = rank, world_size
        self.order = WindowOrder(len(split), block_size, data_seed, order_version)
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
        return next_token_batch(rows)

    def _read(self, first_sequence: int, count: int) -> torch.Tensor:
        rows = count // self.world_size
        starts = self.order.starts(first_sequence + self.rank * rows, rows)
        return torch.from_numpy(_read_windows(self.split, starts, self.block_size + 1, self.vocab_size))

    def close(self) -> None:
        """Stop the background thread. Batches can still be read after it."""
        if self._worker is not None:
            self._worker.shutdown(wait=True, cancel_futures=True)
        self._worker = self._guess = None

    def __enter__(self) -> DataLoader:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def validation_batches(
    split: TokenSplit,
    block_size: int,
    windows: int | None,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    *,
    vocab_size: int | None = None,
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
        inputs = torch.zeros(rows, block_size, dtype=torch.long)
        targets = torch.full((rows, block_size), IGNORE, dtype=torch.long)
        for row, window in enumerate(chosen[first : first + rows]):
            start = int(window) * block_size
            length = min(block_size + 1, len(split) - start)
            tokens = torch.from_numpy(_read_windows(split, np.array([start]), length, vocab_size)[0])
            inputs[row, : length - 1], targets[row, : length - 1] = tokens[:-1], tokens[1:]
        yield Batch(inputs=inputs, targets=targets)


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
