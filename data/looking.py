"""What a dataset is like, for people: statistics, lengths of documents, decoded places. data/show.py is the command."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from command_line import labelled, short, text_table
from data.token_dataset import TokenDataset, TokenSplit

LOOKED_AT = 20_000_000  # tokens of a split that statistics are made of
READ_AT_ONCE = 2**22  # tokens
BAR = 40  # characters of the longest bar of a histogram


def statistics(dataset: TokenDataset, split: TokenSplit) -> str:
    """Which ids occur, how often, and how long documents are, of the first LOOKED_AT tokens of a split."""
    size = min(len(split), LOOKED_AT)
    counts, ends = np.zeros(1, dtype=np.int64), []
    for first in range(0, size, READ_AT_ONCE):
        ids = split.read(first, min(size, first + READ_AT_ONCE))
        found = np.bincount(ids)
        counts = np.pad(counts, (0, max(0, len(found) - len(counts))))
        counts[: len(found)] += found
        if dataset.eos_id is not None:
            ends.append(first + np.flatnonzero(ids == dataset.eos_id))
    used, total = int((counts > 0).sum()), int(counts.sum())
    rows = [("looked at", "all of it" if size == len(split) else f"the first {short(size)} tokens")]
    rows.append(("ids", f"{used:,} different ones" + (f" of {dataset.vocab_size:,}" if dataset.vocab_size else "")))
    if split.bytes:
        rows.append(("text", f"{split.bytes / len(split):.3f} bytes a token"))
    often = np.argsort(-counts, kind="stable")[:8]
    rows.append(("frequent", ", ".join(f"{token_text(dataset, int(i))} {counts[i] / total:.1%}" for i in often if counts[i])))
    lengths = np.diff(np.concatenate([[-1], *ends])) if ends else np.empty(0)
    if not len(lengths):
        return labelled([*rows, ("documents", "nothing marks where they end")])
    quarters = np.percentile(lengths, [0, 25, 50, 75, 100]).astype(int)
    rows.append(("documents", f"{len(lengths):,}, of {' · '.join(f'{q:,}' for q in quarters)} tokens (quartiles)"))
    return labelled(rows) + "\n\n" + histogram(lengths)


def histogram(lengths: np.ndarray) -> str:
    """How many documents have at most 16, 32, 64, … tokens."""
    edges = 2 ** np.arange(4, max(5, int(lengths.max()).bit_length() + 1))
    which = np.searchsorted(edges, lengths)
    counts = np.bincount(which, minlength=len(edges) + 1)
    rows = [(f"≤ {edge:,}", f"{count:,}", "█" * round(BAR * count / counts.max())) for edge, count in zip(edges, counts)]
    return text_table(("tokens", "documents", ""), rows, align="rrl")


def token_text(dataset: TokenDataset, token: int) -> str:
    """An id as a piece of text, or as a number where there is no tokenizer."""
    tokenizer = dataset.tokenizer()
    return str(token) if tokenizer is None else repr(tokenizer.decode([token]))


def places(split: TokenSplit, number: int, length: int, seed: int) -> Iterator[int]:
    """Starts of samples spread over a split, the first at its beginning."""
    drawn = np.random.default_rng(seed)
    room = max(0, len(split) - length)
    yield from ([0] if number else [])
    yield from sorted(int(start) for start in drawn.integers(0, room + 1, max(0, number - 1)))


def decoded(dataset: TokenDataset, ids: np.ndarray) -> str:
    """Token ids as text, with a line where a document ends; as numbers where there is no tokenizer."""
    tokenizer = dataset.tokenizer()
    if tokenizer is None:
        return " ".join(map(str, ids.tolist()))
    ends = np.flatnonzero(ids == dataset.eos_id) if dataset.eos_id is not None else []
    parts = np.split(ids, [end + 1 for end in ends])
    texts = [tokenizer.decode([i for i in part.tolist() if i != dataset.eos_id]) for part in parts]
    return "\n····· end of a document ·····\n".join(texts)
