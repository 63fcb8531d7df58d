"""Several datasets read as one: `--dataset="a:0.7,b:0.3"`, each with its share of the sequences, which may change over the run.

    dataset = open_dataset("books:0.7,code:0.3")
    dataset.parts, dataset.shares        # two TokenDatasets; 700_000 and 300_000 of SHARES

A plain name is a TokenDataset; both kinds have what a run asks of its data.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from command_line import UsageError
from data.token_dataset import DATA_DIR, DatasetError, TokenDataset, TokenSplit

SHARES = 1_000_000  # a weight is so many millionths
TOLERANCE = 1e-4  # of the sum of weights, so that 0.3333 three times is 1


def parse_mixture(text: str) -> dict[str, float] | None:
    """ "a:0.7,b:0.3" → {"a": 0.7, "b": 0.3}; None for the name or path of one dataset. UsageError where it is neither."""
    if "," not in text and not _has_weight(text):
        return None
    if os.path.isdir(os.path.expanduser(text)):
        return None
    return _parse_weights(text, f"dataset={text!r}")


def _has_weight(text: str) -> bool:
    name, colon, weight = text.rpartition(":")
    try:
        return bool(name and colon) and math.isfinite(float(weight)) or weight.strip() in ("nan", "inf")
    except ValueError:
        return False


def _parse_weights(text: str, key: str) -> dict[str, float]:
    """The weights of a mixture by name, with every complaint about them. key: how messages call it."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, colon, weight = (word.strip() for word in part.rpartition(":"))
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not (name and colon) or not math.isfinite(value):
            raise UsageError(f"{key}: {part.strip()!r} is not NAME:WEIGHT; write a mixture as a:0.7,b:0.3.")
        if value < 0:
            raise UsageError(f"{key}: the weight of {name} is negative ({weight}); weights are shares from 0 to 1.")
        if name in found:
            raise UsageError(f"{key} names {name} twice; give it one weight.")
        found[name] = value
    if abs((total := sum(found.values())) - 1) > TOLERANCE:
        example = ",".join(f"{name}:{value / total:.4g}" for name, value in found.items()) if total else "a:0.7,b:0.3"
        raise UsageError(f"{key}: the weights sum to {total:.6g}, not to 1; for example {example}.")
    return found


def parse_schedule(text: str | None, names: Sequence[str]) -> list[tuple[int, dict[str, float]]]:
    """ "50e6 a:0.2,b:0.8; 80e6 b:1" → [(50_000_000, {…}), (80_000_000, {…})]: from so many tokens of training on, these weights.

    Who is not named has weight 0. UsageError where it names none of `names` or does not rise.
    """
    phases: list[tuple[int, dict[str, float]]] = []
    for phase in filter(None, (part.strip() for part in (text or "").split(";"))):
        start, _, weights = phase.partition(" ")
        key = f"mixture_schedule={phase!r}"
        try:
            tokens = float(start)
            if tokens != int(tokens) or tokens < 1:
                raise ValueError
        except (ValueError, OverflowError):
            raise UsageError(f"{key} does not begin with a number of tokens; write it as '50e6 a:0.2,b:0.8'.") from None
        found = _parse_weights(weights, key)
        if unknown := [name for name in found if name not in names]:
            raise UsageError(f"{key} names {unknown[0]}, which --dataset does not; it has {', '.join(names)}.")
        if phases and tokens <= phases[-1][0]:
            raise UsageError(f"{key} begins no later than the one before it ({phases[-1][0]:,} tokens).")
        phases.append((int(tokens), found))
    return phases


def shares_of(weights: Mapping[str, float], names: Sequence[str]) -> list[int]:
    """Weights as whole millionths that add up to SHARES, in the order of names: rounded down, the rest to the largest remainders.

    UsageError where a weight is too small to be one.
    """
    total = sum(weights.values())
    exact = [weights.get(name, 0.0) / total * SHARES for name in names]
    whole = [math.floor(share) for share in exact]
    for i in sorted(range(len(names)), key=lambda i: whole[i] - exact[i])[: SHARES - sum(whole)]:
        whole[i] += 1
    for name, share in zip(names, whole):
        if share == 0 and weights.get(name, 0.0) > 0:
            raise UsageError(f"the weight {weights[name]:g} of {name} is below a millionth; leave it out, or give it more.")
    return whole


def open_dataset(
    text: str, *, vocab_size: int | None = None, max_train_tokens: int | None = None, schedule: str | None = None
) -> TokenDataset | MixedDataset:
    """A dataset or a mixture of several. Prepares nothing.

    max_train_tokens: only the first so many tokens of the training split, of each part of a mixture. schedule: later weights,
    see `parse_schedule`. DatasetError or UsageError in a sentence.
    """
    weights = parse_mixture(text)
    if weights is None:
        if schedule:
            raise UsageError(f"mixture_schedule needs a mixture, such as dataset=a:0.7,b:0.3; dataset={text!r} is none.")
        dataset = TokenDataset.open(text, vocab_size=vocab_size)
        return dataset if max_train_tokens is None else dataset.shortened(max_train_tokens)
    names = list(weights)
    later = parse_schedule(schedule, names)
    if idle := [name for name in names if not weights[name] and not any(phase.get(name) for _, phase in later)]:
        raise UsageError(f"dataset={text!r}: the weight of {idle[0]} is 0 all run long; leave it out.")
    parts = [TokenDataset.open(name, vocab_size=vocab_size) for name in names]
    if max_train_tokens is not None:
        parts = [part.shortened(max_train_tokens) for part in parts]
    phases = [(0, shares_of(weights, names)), *((tokens, shares_of(phase, names)) for tokens, phase in later)]
    return MixedDataset(names, parts, phases)


def dataset_names(text: str) -> list[str]:
    """The names of the datasets that `--dataset=text` reads."""
    return list(parse_mixture(text) or [text])


class MixedDataset:
    """Several datasets of one tokenizer. `phases`: (tokens of training from which on they hold, shares of the parts)."""

    def __init__(self, names: Sequence[str], parts: Sequence[TokenDataset], phases: Sequence[tuple[int, list[int]]]):
        self.names, self.parts, self.phases = list(names), list(parts), list(phases)
        self.folder, self.meta = self.parts[0].folder, None
        kinds = {name: (part.tokenizer_fingerprint, part.vocab_size) for name, part in zip(names, self.parts)}
        first = names[0]
        for name, kind in kinds.items():
            if kind != kinds[first]:
                described = [
                    f"{other} ({part.tokenizer_name})" for other, part in zip(names, self.parts) if other in (first, name)
                ]
                larger = max(self.parts[0], self.parts[names.index(name)], key=lambda part: part.vocab_size)
                raise DatasetError(
                    f"{described[0]} and {described[1]} have different tokenizers, so the same id means different texts in them; "
                    f"prepare the other one again with the tokenizer of this one: --tokenizer={larger.folder}."
                )
        if len({str(part.folder.resolve()) for part in self.parts}) < len(self.parts):
            raise DatasetError(f"Two parts of the mixture {', '.join(names)} are the same folder; give it one weight.")
        unknown = (
            kinds[first][0] is None and "it is not known whether the parts have one tokenizer: they are read as if they had."
        )
        notes = [*(part.note for part in self.parts), unknown]
        self.note = " ".join(note for note in notes if note) or None

    @property
    def shares(self) -> list[int]:
        """Of each part, its share at the start of the run in millionths, or where that is 0 the first that is not."""
        return [next(shares[i] for _, shares in self.phases if shares[i]) for i in range(len(self.parts))]

    @property
    def vocab_size(self) -> int | None:
        """The tokenizer's vocabulary; None where it is not known."""
        return self.parts[0].vocab_size

    @property
    def eos_id(self) -> int | None:
        """The id that ends a document; None where there is none in every part."""
        return self.parts[0].eos_id if all(part.eos_id is not None for part in self.parts) else None

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the content of the parts and their shares over the run."""
        content = [[part.fingerprint for part in self.parts], self.phases]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def split(self, name: str) -> JoinedSplit:
        """The split of all parts, one after the other."""
        return JoinedSplit([part.split(name) for part in self.parts])

    def facts(self) -> dict:
        """What a run's log keeps: of the whole as of one dataset, and of each part its name, fingerprint, share and size."""
        facts = [part.facts() for part in self.parts]
        splits = {}
        for name in ("train", "val"):
            described = [fact.get("splits", {}).get(name, {}) for fact in facts]
            splits[name] = {
                key: None if any(one.get(key) is None for one in described) else sum(one[key] for one in described)
                for key in ("tokens", "bytes", "documents")
            }
        parts = [
            {"name": name, "fingerprint": part.fingerprint, "share": share / SHARES, "tokens": len(part.split("train"))}
            for name, part, share in zip(self.names, self.parts, self.phases[0][1])
        ]
        return {"tokenizer": facts[0].get("tokenizer"), "splits": splits, "parts": parts, "phases": self.phases}

    def tokenizer(self):
        """The tokenizer of all parts; see TokenDataset.tokenizer."""
        return self.parts[0].tokenizer()

    def check_tokenizer(self) -> str | None:
        """As TokenDataset.check_tokenizer, of every part."""
        return next((problem for part in self.parts if (problem := part.check_tokenizer())), None)


class JoinedSplit:
    """Splits one after the other: `len()` tokens, read by position. `bytes`: of their text; None where one is unknown."""

    def __init__(self, splits: Sequence[TokenSplit]):
        self.splits = list(splits)
        known = [split.bytes for split in splits]
        self.bytes = None if None in known else sum(known)
        self.label = " + ".join(split.label for split in splits)

    def __len__(self) -> int:
        return sum(map(len, self.splits))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int64."""
        found, before = [np.empty(0, dtype=np.int64)], 0
        for split in self.splits:
            first, last = max(0, start - before), min(len(split), stop - before)
            if first < last:
                found.append(split.read(first, last))
            before += len(split)
        return np.concatenate(found)


def portable_spec(dataset: TokenDataset | MixedDataset, text: str) -> str:
    """What `--dataset=text` means, from any working directory: datasets outside of data/ by their whole path."""
    if isinstance(dataset, TokenDataset):
        return _portable_name(dataset, text)
    weights = _parse_weights(text, "dataset")
    return ",".join(f"{_portable_name(part, name)}:{weights[name]:g}" for name, part in zip(dataset.names, dataset.parts))


def _portable_name(dataset: TokenDataset, name: str) -> str:
    folder = dataset.folder.resolve()
    return name if folder.is_relative_to(DATA_DIR) else str(folder)
