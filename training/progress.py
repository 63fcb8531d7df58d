"""How far a run has come: what a checkpoint's state.json keeps of it under "progress"."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from command_line import Failure
from training.checkpoint import CheckpointError, CheckpointStore
from training.precision import SkipCounter


@dataclass
class Judgement:
    """The evaluations so far: the last loss, the best one, and for how many evaluations there was no better one."""

    val_loss: float | None = None  # of the last evaluation; None if it was not finite
    val_step: int | None = None  # of the last evaluation
    best_val_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    val_tokens: int | None = None  # size of the validation set that best_val_loss is of

    def judge(self, step: int, val_loss: float, val_tokens: int) -> bool:
        """Take note of an evaluation; True if its set is another one than before: the best loss so far is then forgotten."""
        changed = self.best_val_loss is not None and self.val_tokens not in (None, val_tokens)
        if changed:
            self.best_val_loss, self.best_step, self.evaluations_without_gain = None, None, 0
        self.val_tokens, self.val_step = val_tokens, step
        self.val_loss = val_loss if math.isfinite(val_loss) else None
        if self.val_loss is not None and (self.best_val_loss is None or val_loss < self.best_val_loss):
            self.best_val_loss, self.best_step, self.evaluations_without_gain = val_loss, step, 0
        else:
            self.evaluations_without_gain += 1
        return changed

    @property
    def diverged(self) -> bool:
        """Whether the last evaluation found a loss that is not finite."""
        return self.val_tokens is not None and self.val_loss is None

    @property
    def measured(self) -> tuple[float | None, int | None]:
        """The last loss, and the size of the set that it is of."""
        return self.val_loss, self.val_tokens

    def better_than(self, other: tuple[float | None, int | None] | None, step: int) -> bool:
        """Whether this step was evaluated, with a loss below another one's (as `measured`) unless that is of another set."""
        if self.val_step != step or self.val_loss is None:
            return False
        return other is None or other[0] is None or other[1] != self.val_tokens or self.val_loss < other[0]

    def out_of_patience(self, patience: int) -> bool:
        """Whether so many evaluations in a row brought nothing (0: never)."""
        return bool(patience) and self.evaluations_without_gain >= patience


_NEEDED_TO_GO_ON = ("progress", "dataset", "world_size", "threads", "model")


@dataclass
class Progress:
    """Steps, sequences and tokens so far, skipped updates, the last step saved, and the evaluations."""

    step: int = 0  # updates made (or skipped)
    sequences: int = 0  # read from the training data
    tokens: int = 0
    skipped: int = 0  # updates skipped for a non-finite loss or gradient, as far as the host knows
    skipped_in_a_row: int = 0
    saved_step: int | None = None
    evaluations: Judgement = field(default_factory=Judgement)

    @classmethod
    def restored(cls, state: dict[str, Any], where: Path) -> Progress:
        """The progress that a checkpoint's state.json holds. Raises CheckpointError where it is not of a run that can go on."""
        saved = state.get("progress")
        try:
            if lacking := [key for key in _NEEDED_TO_GO_ON if state.get(key) is None]:
                raise TypeError(f"no {', '.join(lacking)}")
            if state["dataset"].get("fingerprint") is None or not {"step", "sequences", "tokens"} <= saved.keys():
                raise TypeError("no place in the data")
            counters = [f.name for f in dataclasses.fields(cls) if f.name in saved and f.name != "saved_step"]
            if any(saved[key] is None for key in counters):
                raise TypeError("a count is null")
            judged = {f.name: saved[f.name] for f in dataclasses.fields(Judgement) if f.name in saved}
            return cls(**{key: value for key, value in saved.items() if key not in judged}, evaluations=Judgement(**judged))
        except (TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{where} cannot be resumed: it holds weights only, or its state.json is damaged ({error}). Start a "
                f"new run from its weights with --init_from=weights:{where}."
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """All counters in one flat dictionary, JSON-ready."""
        counters = dataclasses.asdict(self)
        judged = counters.pop("evaluations")
        return {**counters, **judged}

    def advance(self, sequences: int, block_size: int) -> None:
        """One step over so many sequences is through."""
        self.step += 1
        self.sequences += sequences
        self.tokens += sequences * block_size

    def note_skips(self, total: int, in_a_row: int) -> int:
        """Take over the counts of skipped updates; returns how many are new."""
        new = total - self.skipped
        self.skipped, self.skipped_in_a_row = total, in_a_row
        return new

    @property
    def is_best(self) -> bool:
        """Whether the best evaluation so far is of this very step."""
        return self.evaluations.best_step == self.step


class Diverged(Failure):
    """The losses, gradients or weights are not finite any more."""


def stop_if_diverged(progress: Progress, skips: SkipCounter, limit: int, store: CheckpointStore) -> None:
    """Raise Diverged once `limit` updates in a row were skipped; the message names the last good checkpoint."""
    if skips.in_a_row() >= limit:
        progress.note_skips(*skips.read())
        _diverged(
            f"The last {progress.skipped_in_a_row} updates were skipped for a non-finite loss or gradient, so the run stops at "
            f"step {progress.step}.",
            store,
        )


def check_outcome(progress: Progress, first_step: int, skips: SkipCounter, store: CheckpointStore) -> None:
    """Raise Diverged if a run that reached its end trained nothing, or ends with a loss that is not finite."""
    made = progress.step - first_step
    progress.note_skips(*skips.read())
    if progress.evaluations.diverged:
        _diverged(f"The validation loss at step {progress.step} is not finite.", store)
    if 0 < made <= progress.skipped_in_a_row:
        _diverged(f"All {made} updates were skipped for a non-finite loss or gradient, so nothing was learned.", store)


def _diverged(what: str, store: CheckpointStore) -> NoReturn:
    latest = store.pointed("latest")
    found = f"The last good checkpoint is {latest}" if latest else "There is no checkpoint yet"
    raise Diverged(f"{what} {found}; lower --learning_rate or raise --warmup_iters.")
