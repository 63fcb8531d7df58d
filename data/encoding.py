"""Texts → token ids on several processes, in the order of the texts."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

from data.token_dataset import DatasetError
from data.tokenization import Tokenizer, load_tokenizer

DIGEST_BYTES = 16  # two different documents of 10¹² share one with a probability of 10⁻¹⁵
KEY_CHARACTERS = 100_000  # of a document decide its split


@dataclass
class TextBatch:
    """Texts to be encoded together, and whatever the caller wants back with them."""

    texts: list[str]
    about: Any


@dataclass
class Encoded:
    """Of each text of a batch: ids, how many UTF-8 bytes it has, the digest of these and of its beginning."""

    ids: list[np.ndarray]
    sizes: list[int]
    digests: list[bytes]
    keys: list[bytes]


def text_digest(data: bytes) -> bytes:
    """What two texts have in common, given as UTF-8, if they are the same."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def key_digest(text: str) -> bytes:
    """The digest of a text's beginning: the same whether a document is read whole or in pieces."""
    return text_digest(text[:KEY_CHARACTERS].encode())


def encode(coder: Tokenizer, texts: list[str], threads: bool = False) -> Encoded:
    """Encode texts in this process: on one core, or (`threads`) on those that the tokenizer's library uses by itself."""
    arrays = coder.encode_arrays(texts) if threads else [coder.encode_array(text) for text in texts]
    raw = [text.encode() for text in texts]
    digests = [text_digest(data) for data in raw]
    keys = [digest if len(text) <= KEY_CHARACTERS else key_digest(text) for text, digest in zip(texts, digests)]
    return Encoded(arrays, [len(data) for data in raw], digests, keys)


class Encoder:
    """Encodes batches: `num_proc` processes (None: this one, with the threads of the tokenizer's library)."""

    def __init__(self, coder: Tokenizer, folder: Path, num_proc: int | None):
        self.coder, self.folder, self.num_proc = coder, folder, num_proc
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Encoder:
        if self.num_proc is not None and self.num_proc > 1:
            self._pool = ProcessPoolExecutor(
                self.num_proc, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(str(self.folder),)
            )
        return self

    def __exit__(self, *exception) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def encoded(self, batches: Iterable[TextBatch]) -> Iterator[tuple[TextBatch, Encoded]]:
        """(batch, what it gives), in order; a few batches are under way at a time. Raises DatasetError if a process dies."""
        if self._pool is None:
            for batch in batches:
                yield batch, encode(self.coder, batch.texts, threads=self.num_proc is None)
            return
        under_way: deque[tuple[TextBatch, Future]] = deque()
        try:
            for batch in batches:
                under_way.append((batch, self._submit(batch)))
                if len(under_way) > self.num_proc + 1:
                    batch, future = under_way.popleft()
                    yield batch, future.result()
            while under_way:
                batch, future = under_way.popleft()
                yield batch, future.result()
        except BrokenProcessPool:
            raise DatasetError(
                "A process that encodes texts was killed or could not be started, perhaps for want of memory; try again with a "
                "smaller --num_proc."
            ) from None

    def _submit(self, batch: TextBatch) -> Future:
        """Hand a batch to the pool, which starts a process where it has fewer than num_proc.

        Raises BrokenProcessPool if a process was killed. Where the pool is taken down for that reason at the moment at
        which it starts another process, what it raises is one of several errors about closed files and handles.
        """
        try:
            return self._pool.submit(_encode_here, batch.texts)
        except BrokenProcessPool:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            raise BrokenProcessPool(f"a process could not be started: {error}") from error


_coder: Tokenizer | None = None  # of a worker process


def _start_worker(folder: str) -> None:
    """Load the tokenizer; leave interrupts to the main process, and end when that is gone."""
    global _coder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    _coder = load_tokenizer(folder)


def _encode_here(texts: list[str]) -> Encoded:
    """The job of a worker process. Ids travel as the smallest type that holds them."""
    result = encode(_coder, texts)
    if _coder.vocab_size <= 2**16:
        result.ids = [ids.astype(np.uint16, copy=False) for ids in result.ids]
    return result
