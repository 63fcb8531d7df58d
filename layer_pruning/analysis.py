"""Which block of n layers does least: every candidate measured on a sample of text, as a table, JSON and a heat-map."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from command_line import Failure, UsageError, text_table
from layer_pruning.criteria import CRITERIA
from layer_pruning.decoder import Decoder
from training.batch import Batch

FORMAT_VERSION = 1
FIRST = 1  # the block never begins at the embedding's end unless that is asked for: layer 0 is not redundant in any model known


@dataclass(frozen=True)
class Analysis:
    """What was found. cosines[i, j]: mean cosine of states i and j, i < j. scores: by the criterion, of each start."""

    n: int
    criterion: str
    scores: dict[int, float]
    best: int
    cosines: Tensor
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; a score that is infinite becomes None."""
        candidates = [
            {"start": start, "n": self.n, "cosine": self.cosine(start), self.criterion: score if math.isfinite(score) else None}
            for start, score in self.scores.items()
        ]
        return {
            "format_version": FORMAT_VERSION,
            "layers": len(self.cosines) - 1,
            "criterion": self.criterion,
            "best": {"start": self.best, "n": self.n, "cosine": self.cosine(self.best)},
            "candidates": candidates,
            "cosines": [[float(self.cosines[i, j]) for j in range(i, len(self.cosines))] for i in range(len(self.cosines))],
            "tokens": self.tokens,
        }

    def cosine(self, start: int) -> float:
        """Of the block from `start` on."""
        return float(self.cosines[start, start + self.n])

    def table(self) -> str:
        """Candidates in the order of their layers; the chosen one is marked."""
        header = ["layers", "cosine", *([] if self.criterion == "cosine" else [self.criterion])]
        rows = [
            [
                f"{start} to {start + self.n - 1}" if self.n > 1 else f"{start}",
                f"{self.cosine(start):.5f}",
                *([] if self.criterion == "cosine" else [f"{score:.5g}"]),
                "←" if start == self.best else "",
            ]
            for start, score in self.scores.items()
        ]
        return text_table([*header, ""], rows)


def block_starts(layers: int, n: int, first: int = FIRST) -> list[int]:
    """The starts of all blocks of n layers from `first` on. Raises UsageError where there is none."""
    if first < 0 or first >= layers:
        raise UsageError(f"--first={first} is outside of the model, which has layers 0 to {layers - 1}.")
    if n >= layers:
        raise UsageError(f"--n={n} would leave no layer of {layers}; take at most {layers - 1}.")
    if first + n > layers:
        raise UsageError(
            f"--n={n} layers from layer {first} on are more than the model has ({layers}); take at most {layers - first}"
            + (", or let the block begin at the embedding's end: --first=0." if first else ".")
        )
    return list(range(first, layers - n + 1))


def analyze(
    decoder: Decoder, batches: Iterable[Batch], n: int, criterion: str = "cosine", first: int = FIRST, seed: int = 0
) -> Analysis:
    """Measure all blocks of n layers on batches of token ids, each (B, T). Raises UsageError, or Failure for a NaN.

    Memory does not grow with the number of batches: a batch's states, and running sums.
    """
    layers = len(decoder.layers)
    measure = CRITERIA[criterion](decoder, n, block_starts(layers, n, first), seed)
    for batch in batches:
        batch = batch.to(decoder.device)
        states = decoder.states(batch.inputs, range(layers + 1))
        measure.cosines.add(states)
        measure.add(batch, states)
        del states
    means, scores = measure.cosines.mean(), measure.scores()
    if not measure.cosines.count:
        raise Failure("There is no text to measure on; give more of it.")
    if not means.isfinite().all() or any(math.isnan(score) for score in scores.values()):
        raise Failure(f"The states of {decoder.name} hold NaN or infinite numbers; its weights, or --dtype, are the reason.")
    return Analysis(n, criterion, scores, measure.best(scores), means, measure.cosines.count)


def draw(analysis: Analysis, path: Path, title: str) -> None:
    """The mean cosine of every block as a heat-map: its first layer across, its length down; the chosen one is framed."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    layers = len(analysis.cosines) - 1
    values = [
        [float(analysis.cosines[start, start + n]) if start + n <= layers else math.nan for start in range(layers)]
        for n in range(1, layers)
    ]
    figure = Figure(figsize=(max(5.0, 0.32 * layers + 2), max(3.6, 0.28 * layers + 1.4)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, origin="lower", aspect="auto", cmap="viridis", extent=(-0.5, layers - 0.5, 0.5, layers - 0.5))
    axes.add_patch(Rectangle((analysis.best - 0.5, analysis.n - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2))
    axes.set(xlabel="first layer of the block", ylabel="layers in the block", title=title)
    axes.locator_params(integer=True)
    figure.colorbar(image, label="mean cosine of what enters and what leaves")
    figure.savefig(path, dpi=120)
