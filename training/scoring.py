"""How well a model predicts a text: −log p of its tokens, per token, byte and word; the command is score.py.

A stream of tokens is read in windows so that every token but the first is predicted exactly once:

- whole: windows of `context` inputs side by side. The first tokens of each see little before them.
- sliding: windows of `context` tokens that move by `stride`, of which only the last `stride` are predicted (all of the first
  one), so each token sees at least context − stride tokens before it. As in Hugging Face's guide to the perplexity of
  fixed-length models.
"""

from __future__ import annotations

import codecs
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from command_line import Failure
from training.batch import IGNORE
from training.objectives import next_token_loss
from training.tensor_files import as_bytes

READ_AT_ONCE = 2**20  # tokens whose bytes and words are counted together


class Stream(Protocol):
    """Tokens in a row: `len()`, and `read(start, stop)` → int64. A split of a dataset is one."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray: ...


class TokenList:
    """A stream that lies in memory."""

    def __init__(self, ids: Sequence[int] | np.ndarray):
        self.ids = np.asarray(ids, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop)."""
        return self.ids[start:stop]


@dataclass(frozen=True)
class Window:
    """Tokens [start, stop) of a stream; those from `first` on are predicted."""

    start: int
    first: int
    stop: int


def scored_windows(tokens: int, context: int, stride: int | None = None) -> Iterator[Window]:
    """The windows over a stream of so many tokens; stride None: whole. A window's model input has at most `context` tokens."""
    if stride is None:
        for start in range(0, tokens - 1, context):
            yield Window(start, start + 1, min(start + context + 1, tokens))
        return
    done = 1
    for start in range(0, tokens, stride):
        stop = min(start + context, tokens)
        if stop > done:
            yield Window(min(start, done - 1), done, stop)  # a stride of the whole context: from one token at least
            done = stop
        if stop == tokens:
            return


@dataclass(frozen=True)
class Score:
    """What was found. tokens: predicted ones; bytes, words: of the text of exactly these; None where there is no tokenizer."""

    nll: float  # −log p of all of them, in nats
    tokens: int
    bytes: int | None
    words: int | None

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return _exp(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits of information a byte of UTF-8, which compares across tokenizers."""
        return self.nll / math.log(2) / self.bytes if self.bytes else None

    @property
    def word_perplexity(self) -> float | None:
        """exp of the nats a word; words are what stands between white space."""
        return _exp(self.nll / self.words) if self.words else None

    def to_dict(self) -> dict[str, Any]:
        """All figures, JSON-ready; None for what is infinite."""
        names = ("nll", "tokens", "bytes", "words", "loss", "perplexity", "bits_per_byte", "word_perplexity")
        found = {name: getattr(self, name) for name in names}
        return {name: value if value is None or math.isfinite(value) else None for name, value in found.items()}


def _exp(value: float) -> float:
    return math.inf if value > 700 else math.exp(value)


@torch.no_grad()
def score_stream(
    model: nn.Module,
    stream: Stream,
    tokenizer: Any,
    *,
    context: int,
    stride: int | None = None,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
) -> Score:
    """Score a stream of two tokens or more. Raises Failure where an id is not the model's, or a loss is not finite."""
    if len(stream) < 2:
        raise Failure(f"There are {len(stream)} tokens to score, and it takes two at least; give more text.")
    total, predicted, batch = 0.0, 0, []
    for window in scored_windows(len(stream), context, stride):
        batch.append(window)
        predicted += window.stop - window.first
        if len(batch) == batch_size:
            total += _nll(model, stream, batch, device)
            batch = []
    total += _nll(model, stream, batch, device) if batch else 0.0
    if not math.isfinite(total):
        raise Failure("The model's losses on this text are not finite; its training has diverged, or --dtype is too narrow.")
    counted = count_text(stream, tokenizer, 1) if tokenizer is not None else (None, None)
    return Score(total, predicted, *counted)


def _nll(model: nn.Module, stream: Stream, batch: list[Window], device: torch.device | str) -> float:
    """−log p of what the windows predict, in nats."""
    length = max(window.stop - window.start for window in batch) - 1
    inputs = torch.zeros(len(batch), length, dtype=torch.long)
    targets = torch.full((len(batch), length), IGNORE, dtype=torch.long)
    for row, window in enumerate(batch):
        ids = torch.from_numpy(np.array(stream.read(window.start, window.stop)))
        if (largest := int(ids.max())) >= model.config.vocab_size:
            raise Failure(
                f"The text holds the token id {largest:,}, but the model has a vocabulary of {model.config.vocab_size:,}; it "
                "was made with another tokenizer."
            )
        inputs[row, : len(ids) - 1] = ids[:-1]
        skipped = window.first - window.start - 1
        targets[row, skipped : len(ids) - 1] = ids[1 + skipped :]
    return float(next_token_loss(model, inputs.to(device), targets.to(device)))


def count_text(stream: Stream, tokenizer: Any, first: int) -> tuple[int, int]:
    """(UTF-8 bytes, words) of the text that the tokens from `first` on stand for; eos and bos ids are no text."""
    size = words = 0
    special = [i for i in (tokenizer.eos_id, tokenizer.bos_id) if i is not None]
    counter = _WordCounter()
    held: list[int] = []  # of a document, where ids have no bytes of their own

    def count_held() -> None:
        nonlocal size, words, held
        text = tokenizer.decode(held)
        size, words, held = size + len(text.encode()), words + len(text.split()), []

    for start in range(first, len(stream), READ_AT_ONCE):
        ids = stream.read(start, min(len(stream), start + READ_AT_ONCE))
        cuts = np.flatnonzero(np.isin(ids, special))
        for number, part in enumerate(np.split(ids, cuts)):
            if number:  # begins with a special id
                words += counter.end()
                if not tokenizer.byte_level:
                    count_held()
                part = part[1:]
            if tokenizer.byte_level:
                text = tokenizer.decode_bytes(part.tolist())
                size += len(text)
                words += counter.push(text)
            else:
                held += part.tolist()
    if held:
        count_held()
    return size, words + counter.end()


class _WordCounter:
    """Counts words in bytes that come in pieces, which may end inside of a word or a character."""

    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._inside = False

    def push(self, data: bytes) -> int:
        """How many words begin in these bytes."""
        text = self._decoder.decode(data)
        if not text:
            return 0
        found = len(text.split())
        if self._inside and not text[0].isspace():
            found -= 1
        self._inside = not text[-1].isspace()
        return found

    def end(self) -> int:
        """The text ends here: words that only its last bytes make."""
        rest = self._decoder.decode(b"", final=True)
        found = int(bool(rest) and not self._inside)
        self._decoder.reset()
        self._inside = False
        return found


def weights_fingerprint(model: nn.Module) -> str:
    """16 hex digits that differ where a weight does, whatever files it came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(as_bytes(tensor.detach().cpu().contiguous()))
    return digest.hexdigest()[:16]
