"""--seeds=auto: how many seeds it takes to see a difference of a given size, from the scatter of a pilot.

The pilot's runs only decide the number; they are not compared afterwards. A test that used them again would find
differences that are not there more often than it says (6 to 8 % of studies instead of 5), because the number is small
exactly where the pilot's scatter came out too small. The scatter of a few runs is itself uncertain (from 3 runs, 90 % of
all estimates lie between 0.2 and 1.7 times the true value), so the number is chosen for the power averaged over that
uncertainty, not for the estimate alone.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ablation.effects import grid_effects
from ablation.execution import Study, failures
from ablation.planning import StudyPlan, seeds_from
from ablation.tuning import groups_of
from command_line import Failure, UsageError
from comparison.groups import default_metric
from comparison.inference import ALPHA, PAIRED_FROM, POWER

MOST_SEEDS = 50  # more are not chosen without asking
QUANTILES = 50  # points at which the distribution of the scatter is taken


@dataclass(frozen=True)
class Needed:
    """How many seeds show a difference: `n`; `low` to `high` at the ends of the scatter's 90 % range.

    `scatter`: standard deviation from seed to seed of the difference of two variants, with its 90 % range.
    """

    n: int
    low: int
    high: int
    scatter: float
    scatter_range: tuple[float, float]


def seeds_needed(figures: Sequence[Mapping], detect: float, tests: int) -> Needed:
    """The number of seeds with which a true difference of `detect` is shown with probability POWER.

    figures: for each variant its figures by seed, the pilot's, the same seeds for all. tests: how many comparisons are
    made together; the difference has to pass the first and strictest step of Holm's procedure. Raises Failure where the
    pilot has no scatter, or more than MOST_SEEDS would be needed.
    """
    from scipy.stats import chi2

    n, k = len(figures[0]), len(figures)
    alone = statistics.fmean(statistics.variance(side.values()) for side in figures)  # of one run
    freedom_alone, freedom_together = k * (n - 1), (k - 1) * (n - 1)
    centred = [{seed: value - statistics.fmean(side.values()) for seed, value in side.items()} for side in figures]
    of_seed = {seed: statistics.fmean(side[seed] for side in centred) for seed in centred[0]}
    residual = sum((side[seed] - of_seed[seed]) ** 2 for side in centred for seed in side) / freedom_together
    if min(alone, residual) <= 0:
        raise Failure(
            "The pilot's figures do not vary from seed to seed, so no number of seeds follows from them; give --seeds=N."
        )

    def enough(part: float | None) -> int | None:
        """The fewest seeds, with the scatter at this quantile of what the pilot leaves possible, or averaged over it."""
        parts = [(i + 0.5) / QUANTILES for i in range(QUANTILES)] if part is None else [part]
        for count in range(2, MOST_SEEDS + 1):
            paired = count >= PAIRED_FROM
            variance, known = (residual, freedom_together) if paired else (alone, freedom_alone)
            freedom = (count - 1) if paired else 2 * (count - 1)
            scatters = [math.sqrt(2 * variance * known / float(chi2.ppf(1 - part, known))) for part in parts]
            powers = [power(detect * math.sqrt(count) / scatter, freedom, ALPHA / tests) for scatter in scatters]
            if statistics.fmean(powers) >= POWER:
                return count
        return None

    ends = [math.sqrt(2 * residual * freedom_together / float(chi2.ppf(1 - part, freedom_together))) for part in (0.05, 0.95)]
    scatter = math.sqrt(2 * residual)
    found = enough(None)
    if found is None:
        raise Failure(
            f"More than {MOST_SEEDS} seeds are needed to see a difference of {detect:g}: that of two variants scatters by "
            f"{scatter:.4f} from seed to seed (90 % range {ends[0]:.4f} to {ends[1]:.4f}). Choose a larger --detect or --seeds=N."
        )
    return Needed(found, enough(0.05) or MOST_SEEDS, enough(0.95) or MOST_SEEDS, scatter, (ends[0], ends[1]))


@functools.cache
def _critical(alpha: float, freedom: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 1 - alpha / 2))


def power(noncentrality: float, freedom: float, alpha: float) -> float:
    """The probability that a two-sided t test at level alpha shows a difference of this many standard errors."""
    from scipy.special import nctdtr

    return float(1 - nctdtr(freedom, noncentrality, _critical(alpha, freedom)))


def after_pilot(pilot: Study) -> StudyPlan:
    """The plan with as many new seeds as the pilot's scatter calls for. Raises Failure where a run of it failed."""
    plan = pilot.plan
    if failed := failures(pilot):
        raise failed
    metric = default_metric([job.summary for job in pilot.finished])
    groups, _ = groups_of(pilot, metric)
    if len(groups) < 2:
        raise UsageError("--seeds=auto needs at least two variants to compare; give --vary.")
    if lost := [f"{group.name}: {group.lost(metric)}" for group in groups if group.lost(metric)]:
        raise Failure(f"The pilot has runs without a figure ({'; '.join(lost)}), so the scatter is not known; give --seeds=N.")
    values = {group.name: group.values(metric) for group in groups}
    tests = len(groups) - 1 if plan.baseline else math.comb(len(groups), 2)
    tests += len(grid_effects(plan, values, metric, {})[0])
    needed = seeds_needed(list(values.values()), plan.detect, tests)
    low, high = needed.scatter_range
    note = (
        f"The number of seeds comes from a pilot of {len(plan.seeds)}, which is not compared: the difference of two variants "
        f"scatters by {needed.scatter:.4f} from seed to seed (90 % range {low:.4f} to {high:.4f}), so {needed.n} seeds show a "
        f"difference of {plan.detect:g} 4 times out of 5 ({needed.low} to {needed.high} seeds at the ends of that range)."
    )
    return replace(plan, seeds=seeds_from(plan.base, len(plan.seeds), needed.n), detect=None, notes=(note, *plan.notes))
