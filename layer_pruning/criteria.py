"""How much a block of layers does, by several measures that the field uses: the less, the better it can go.

A criterion reads the states of batch after batch (`add`) and keeps running sums only, so its memory does not depend on the
number of samples. `scores()` then gives one number for every start. To add one: write the class and put
`@criterion("name")` on it; `--criterion=name` then chooses by it.

| name            | of a block from layer i on, n layers long                                   | better | source                |
|-----------------|-----------------------------------------------------------------------------|--------|-----------------------|
| cosine          | mean cosine between what enters layer i and what enters layer i + n         | high   | Chen et al. 2025      |
| block_influence | sum over its layers of 1 − the mean cosine of what enters and leaves them   | low    | Men et al. 2024       |
| angular_last    | mean angle / π between the two states, at the last token of each sequence   | low    | Gromov et al. 2025    |
| linear_fit      | share of the variance of state i + n that the best map of state i leaves    | low    | Shopkhoev et al. 2025 |
| block_ppl       | perplexity of the model without the block                                   | low    | Song et al. 2024      |
| random          | a number drawn by the seed: the control that says what choosing is worth    | low    |                       |
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from layer_pruning.decoder import Decoder
from training.batch import Batch
from training.objectives import next_token_loss

CRITERIA: dict[str, type[Criterion]] = {}


def criterion(name: str) -> Callable[[type[Criterion]], type[Criterion]]:
    """Enter a class under the name by which --criterion chooses it."""

    def enter(cls: type[Criterion]) -> type[Criterion]:
        if name in CRITERIA:
            raise ValueError(f"there is a criterion {name!r} already.")
        CRITERIA[name] = cls
        cls.name = name
        return cls

    return enter


class Criterion:
    """The base of all. n: layers of a block. starts: the first layer of each block that is a candidate.

    `cosines` has taken in the states of every batch before `scores` is asked.
    """

    name: str
    high_is_better = False

    def __init__(self, decoder: Decoder, n: int, starts: Sequence[int], seed: int = 0):
        self.decoder, self.n, self.starts, self.seed = decoder, n, list(starts), seed
        self.cosines = Cosines(len(decoder.layers) + 1)

    def add(self, batch: Batch, states: Sequence[Tensor]) -> None:
        """Take in a batch: its tokens, and all of its states 0 … L, each (B, T, D). Nothing, where the cosines say it all."""

    def scores(self) -> dict[int, float]:
        """start → score."""
        raise TypeError(f"{type(self).__name__} does not define its scores.")

    def best(self, scores: dict[int, float]) -> int:
        """The start that the criterion chooses; of equal ones the first."""
        return (max if self.high_is_better else min)(self.starts, key=lambda start: scores[start])


class Cosines:
    """Mean cosine of every two states over all tokens: `mean[i][j]` for i < j. Sums are kept in fp64."""

    def __init__(self, states: int):
        self.sums, self.count = torch.zeros(states, states, dtype=torch.float64), 0

    def add(self, states: Sequence[Tensor]) -> None:
        """Take in all states of a batch."""
        unit = [F.normalize(state.float(), dim=-1) for state in states]
        for i in range(len(unit)):
            for j in range(i + 1, len(unit)):
                self.sums[i, j] += (unit[i] * unit[j]).sum(dtype=torch.float64).cpu()
        self.count += states[0].size(0) * states[0].size(1)

    def mean(self) -> Tensor:
        """(L + 1, L + 1); 1 on the diagonal, and 0 below it."""
        return self.sums / max(1, self.count) + torch.eye(len(self.sums), dtype=torch.float64)


@criterion("cosine")
class Cosine(Criterion):
    """Mean cosine between what enters the block and what leaves it (LLM-Streamline, Chen et al., ICLR 2025)."""

    high_is_better = True

    def scores(self) -> dict[int, float]:
        means = self.cosines.mean()
        return {start: float(means[start, start + self.n]) for start in self.starts}


@criterion("block_influence")
class BlockInfluence(Criterion):
    """Sum of the layers' own influence, each 1 − mean cosine of its input and output (ShortGPT, Men et al. 2024)."""

    def scores(self) -> dict[int, float]:
        influence = 1 - self.cosines.mean().diagonal(1)
        return {start: float(influence[start : start + self.n].sum()) for start in self.starts}


@criterion("angular_last")
class AngularLast(Criterion):
    """Mean angular distance arccos(cosine) / π at the last token (Gromov et al., "The Unreasonable Ineffectiveness of the
    Deeper Layers", ICLR 2025)."""

    def __init__(self, decoder: Decoder, n: int, starts: Sequence[int], seed: int = 0):
        super().__init__(decoder, n, starts, seed)
        self.sums, self.count = dict.fromkeys(self.starts, 0.0), 0

    def add(self, batch: Batch, states: Sequence[Tensor]) -> None:
        last = [state[:, -1].float() for state in states]
        for start in self.starts:
            cosine = F.cosine_similarity(last[start], last[start + self.n], dim=-1).clamp(-1, 1)
            self.sums[start] += float(cosine.arccos().sum(dtype=torch.float64)) / math.pi
        self.count += len(batch)

    def scores(self) -> dict[int, float]:
        return {start: total / max(1, self.count) for start, total in self.sums.items()}


@criterion("linear_fit")
class LinearFit(Criterion):
    """Unexplained variance of the best affine map from one state to the other, by least squares in one streaming pass.

    The map that ReplaceMe (Shopkhoev et al. 2025) puts in the block's place without training. Keeps two matrices of (D + 1)²
    and (D + 1)·D numbers in fp64 for each start.
    """

    def __init__(self, decoder: Decoder, n: int, starts: Sequence[int], seed: int = 0):
        super().__init__(decoder, n, starts, seed)
        self.sums: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def add(self, batch: Batch, states: Sequence[Tensor]) -> None:
        for start in self.starts:
            x, y = (states[i].flatten(0, 1).double() for i in (start, start + self.n))
            x = torch.cat((x, x.new_ones(len(x), 1)), dim=1)
            found = (x.T @ x, x.T @ y, y.square().sum(), y.sum(dim=0))
            before = self.sums.get(start)
            self.sums[start] = found if before is None else tuple(a + b for a, b in zip(before, found))

    def scores(self) -> dict[int, float]:
        result = {}
        for start, (xx, xy, yy, y) in self.sums.items():
            ridge = 1e-9 * xx.diagonal().mean()  # where fewer tokens than dimensions were seen, or some never vary
            fitted = torch.linalg.solve(xx + ridge * torch.eye(len(xx), dtype=xx.dtype, device=xx.device), xy)
            left = yy - 2 * (fitted * xy).sum() + (fitted * (xx @ fitted)).sum()
            total = yy - y.square().sum() / xx[-1, -1]  # around the mean; the last entry counts the tokens
            result[start] = float((left / total).clamp(min=0))
        return result


@criterion("block_ppl")
class BlockPerplexity(Criterion):
    """Perplexity of the model without the block (SLEB, Song et al. 2024): a forward pass for every start."""

    def __init__(self, decoder: Decoder, n: int, starts: Sequence[int], seed: int = 0):
        super().__init__(decoder, n, starts, seed)
        self.sums, self.count = dict.fromkeys(self.starts, 0.0), 0

    def add(self, batch: Batch, states: Sequence[Tensor]) -> None:
        for start in self.starts:
            with self.decoder.without(start, self.n):
                self.sums[start] += float(next_token_loss(self.decoder.logits, batch.inputs, batch.targets))
        self.count += batch.targets.numel()

    def scores(self) -> dict[int, float]:
        means = {start: total / max(1, self.count) for start, total in self.sums.items()}
        return {start: math.exp(mean) if mean < 700 else math.inf for start, mean in means.items()}


@criterion("random")
class Random(Criterion):
    """A number in [0, 1) that the seed and the start decide."""

    def scores(self) -> dict[int, float]:
        digests = {start: hashlib.sha256(f"{self.seed} {start} {self.n}".encode()).digest() for start in self.starts}
        return {start: int.from_bytes(digest[:6], "big") / 2**48 for start, digest in digests.items()}
