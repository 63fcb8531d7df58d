"""Error bars and tests: what can be said of a few repetitions.

Everything here is for small samples of roughly normal figures: Student's t for intervals, t tests for differences, Holm's
(1979) step-down procedure where several comparisons are made. scipy supplies the distributions.

Which t test is made is fixed beforehand and depends on the seeds alone (see `contrast`), so that a test cannot be chosen
for its result.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

ALPHA = 0.05  # chance of claiming at least one difference where there is none
POWER = 0.8  # with which the difference named by `detectable` would have been seen
# Repetitions from which on the same seeds are compared in pairs. Pairs halve the degrees of freedom and gain where what a
# seed does is common to both sides: with correlation r the error shrinks by √(1 − r). Both ways show differences of the same
# size at r = 0.56 with 3 seeds, 0.37 with 4, 0.28 with 5; the runs of docs/ABLATIONS.md have about 0.46 (6 variants, 3 seeds).
PAIRED_FROM = 5
NO_SCATTER = 1e-9  # standard error below this share of the figures: rounding, no scatter


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
    """A difference of means (b − a, or another contrast) and what is known of it.

    `low` to `high`: the confidence interval at `level`, the level at which Holm's procedure decides about it; so it
    contains 0 exactly where no difference is shown. Each interval by itself covers the true difference with at least
    95 %. `detectable`: the difference that would have been shown 4 times out of 5, given the scatter seen. Where nothing
    can be tested, `p` and what follows from it are None, and `untested` says why.
    """

    difference: float
    method: str | None = None  # "paired t" or "Welch t"
    n: tuple[int, ...] = (0, 0)  # repetitions of each side
    error: float | None = None  # standard error of the difference
    freedom: float | None = None  # degrees of freedom
    p: float | None = None  # two-sided, by itself
    p_holm: float | None = None  # adjusted for all comparisons made together
    level: float | None = None
    low: float | None = None
    high: float | None = None
    detectable: float | None = None
    untested: str = ""  # "seeds": fewer than two on a side; "scatter": the figures do not vary from seed to seed

    @property
    def shown(self) -> bool | None:
        """Whether there is a difference; None where nothing can be said."""
        return None if self.p_holm is None else self.p_holm < ALPHA

    @property
    def seeds(self) -> str:
        """How many repetitions were compared, in words: '5 seeds', '3 and 3 seeds', '2 to 3 seeds each'."""
        if self.method == "paired t":
            return f"{self.n[0]} seeds"
        if len(self.n) == 2:
            return f"{self.n[0]} and {self.n[1]} seeds"
        return (f"{min(self.n)} to " if min(self.n) < max(self.n) else "") + f"{max(self.n)} seeds each"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, standard deviation (n − 1) and Student's 95 % confidence interval of the mean."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(len(values), mean, None, None, None)
    sd = statistics.stdev(values)
    half = _quantile(1 - ALPHA / 2, len(values) - 1) * sd / math.sqrt(len(values))
    return Estimate(len(values), mean, sd, mean - half, mean + half)


def compare_means(a: Mapping, b: Mapping) -> Verdict:
    """mean(b) − mean(a) of figures by seed, tested as in `contrast`."""
    return contrast([(-1.0, a), (1.0, b)])


def contrast(sides: Sequence[tuple[float, Mapping]]) -> Verdict:
    """Σ weight × mean(figures) over sides of (weight, figures by seed), and its t test against 0; not yet Holm's adjustment.

    All figures of every side are used, so the difference is that of the means. Where all sides have the same seeds, at
    least PAIRED_FROM of them, the weighted sum is formed seed by seed (paired t test): then the scatter that a seed brings
    to all sides cancels. Otherwise Welch's (1947) test, which does not assume equal scatter. It has at most the degrees of
    freedom of sides that all have the smallest number of seeds: with Welch's own, 10 seeds against 2 would show a
    difference in 10 % of the cases where there is none.
    """
    n = tuple(len(figures) for _, figures in sides)
    value = sum(weight * statistics.fmean(figures.values()) for weight, figures in sides)
    if min(n) < 2:
        return Verdict(value, n=n, untested="seeds")
    if all(figures.keys() == sides[0][1].keys() for _, figures in sides) and n[0] >= PAIRED_FROM:
        sums = [sum(weight * figures[seed] for weight, figures in sides) for seed in sides[0][1]]
        method, error, freedom = "paired t", statistics.stdev(sums) / math.sqrt(len(sums)), float(len(sums) - 1)
    else:
        parts = [weight**2 * statistics.variance(figures.values()) / len(figures) for weight, figures in sides]
        method, error, freedom = "Welch t", math.sqrt(sum(parts)), float(len(n) * (min(n) - 1))
        if error:  # Welch–Satterthwaite
            freedom = min(freedom, sum(parts) ** 2 / sum(part**2 / (number - 1) for part, number in zip(parts, n)))
    size = max(abs(figure) for _, figures in sides for figure in figures.values())
    if error > NO_SCATTER * size:
        from scipy.special import stdtr  # Student's distribution function

        return Verdict(value, method, n, error, freedom, p=float(2 * stdtr(freedom, -abs(value) / error)))
    if abs(value) > NO_SCATTER * size:  # every seed says the same: then they are no independent repetitions
        return Verdict(value, method, n, untested="scatter")
    return Verdict(value, method, n, 0.0, freedom, p=1.0)


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
    from scipy.special import nctdtr  # the distribution function of Student's t around another value than 0

    critical = _quantile(1 - alpha / 2, freedom)

    def missing_power(noncentrality: float) -> float:  # the other tail is next to nothing where the power is high
        return 1 - nctdtr(freedom, noncentrality, critical) - POWER

    return error * brentq(missing_power, 0.0, 4 * critical + 4)


def _quantile(probability: float, freedom: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, probability))
