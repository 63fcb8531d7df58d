"""Error bars and tests: what can be said of a few repetitions.

Everything here is for small samples of roughly normal figures: Student's t for intervals, the paired t test where both
sides have the same seeds, Welch's (1947) where not, Holm's (1979) step-down procedure where several comparisons are
made. scipy supplies the distributions.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

ALPHA = 0.05  # chance of claiming at least one difference where there is none
POWER = 0.8  # with which the difference named by `detectable` would have been seen


@dataclass(frozen=True)
class Estimate:
    """A mean over n repetitions with standard deviation and 95 % confidence interval (None of a single one)."""

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Verdict:
    """The difference b − a of two means and what is known of it.

    `low` to `high`: the confidence interval at `level`, the level at which Holm's procedure decides about it; so it
    contains 0 exactly where no difference is shown. Each interval by itself covers the true difference with at least
    95 %. `detectable`: the difference that would have been shown 4 times out of 5, given the scatter seen. With less
    than two repetitions on a side nothing but `difference` and `n` is known.
    """

    difference: float
    method: str | None = None  # "paired t" or "Welch t"
    n: tuple[int, int] = (0, 0)  # repetitions compared (pairs, twice, where paired)
    error: float | None = None  # standard error of the difference
    freedom: float | None = None  # degrees of freedom
    p: float | None = None  # two-sided, by itself
    p_holm: float | None = None  # adjusted for all comparisons made together
    level: float | None = None
    low: float | None = None
    high: float | None = None
    detectable: float | None = None

    @property
    def shown(self) -> bool | None:
        """Whether there is a difference; None where nothing can be said."""
        return None if self.p_holm is None else self.p_holm < ALPHA


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, standard deviation (n − 1) and Student's 95 % confidence interval of the mean."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(len(values), mean, None, None, None)
    sd = statistics.stdev(values)
    half = _quantile(1 - ALPHA / 2, len(values) - 1) * sd / math.sqrt(len(values))
    return Estimate(len(values), mean, sd, mean - half, mean + half)


def compare_means(a: Mapping, b: Mapping) -> Verdict:
    """mean(b) − mean(a) of figures by seed, tested; Holm's adjustment is for `adjust` to make.

    Paired where every seed of the smaller side (two at least) is one of the other's too: then the scatter that a seed
    brings to both sides cancels. Welch's test otherwise, which does not assume equal scatter.
    """
    common = [seed for seed in a if seed in b]
    if len(common) >= 2 and len(common) == min(len(a), len(b)):
        differences = [b[seed] - a[seed] for seed in common]
        n = len(differences)
        error = statistics.stdev(differences) / math.sqrt(n)
        return _tested(Verdict(statistics.fmean(differences), "paired t", (n, n), error, n - 1))
    means = statistics.fmean(b.values()) - statistics.fmean(a.values())
    if min(len(a), len(b)) < 2:
        return Verdict(means, n=(len(a), len(b)))
    parts = [statistics.variance(side.values()) / len(side) for side in (a, b)]
    error = math.sqrt(sum(parts))
    freedom = (
        sum(parts) ** 2 / sum(part**2 / (len(side) - 1) for part, side in zip(parts, (a, b))) if error else len(a) + len(b) - 2
    )  # Welch–Satterthwaite
    return _tested(Verdict(means, "Welch t", (len(a), len(b)), error, freedom))


def _tested(test: Verdict) -> Verdict:
    """With its two-sided p. Repetitions without any scatter either agree (p = 1) or differ (p = 0)."""
    from scipy.stats import t

    if test.error == 0:
        return replace(test, p=1.0 if test.difference == 0 else 0.0)
    return replace(test, p=float(2 * t.sf(abs(test.difference) / test.error, test.freedom)))


def adjust(tests: Sequence[Verdict]) -> list[Verdict]:
    """The same tests with Holm's adjusted p, and intervals at the level at which his procedure decides about each.

    Ordered by p, the k-th of m is held against ALPHA / (m − k + 1); the first that misses, and all after it, are not
    shown, and get the interval of the one that missed first.
    """
    order = sorted((i for i, test in enumerate(tests) if test.p is not None), key=lambda i: tests[i].p)
    result, p_holm, alpha = list(tests), 0.0, ALPHA
    for rank, i in enumerate(order):
        test, stopped = tests[i], p_holm >= ALPHA
        p_holm = max(p_holm, min(1.0, (len(order) - rank) * test.p))
        if not stopped:
            alpha = ALPHA / (len(order) - rank)
        half = _quantile(1 - alpha / 2, test.freedom) * test.error
        result[i] = replace(
            test,
            p_holm=p_holm,
            level=1 - alpha,
            low=test.difference - half,
            high=test.difference + half,
            detectable=detectable(test.error, test.freedom, alpha),
        )
    return result


def detectable(error: float, freedom: float, alpha: float = ALPHA) -> float:
    """The true difference that a two-sided t test at level alpha shows with probability POWER, at a standard error."""
    from scipy.optimize import brentq
    from scipy.stats import nct

    critical = _quantile(1 - alpha / 2, freedom)

    def missing_power(noncentrality: float) -> float:  # the other tail is next to nothing where the power is high
        return nct.sf(critical, freedom, noncentrality) - POWER

    return error * brentq(missing_power, 0.0, 4 * critical + 4)


def _quantile(probability: float, freedom: float) -> float:
    from scipy.stats import t

    return float(t.ppf(probability, freedom))
