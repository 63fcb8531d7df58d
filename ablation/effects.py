"""What each factor of a grid does: averaged over the rest of the grid, with the error bars that paired seeds give."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ablation.planning import StudyPlan
from ablation.variants import readable
from comparison.groups import METRICS, Difference
from comparison.inference import Verdict, adjust, compare_means
from comparison.report import p_text, percent, sentence

Values = Mapping[tuple, float]  # seeds → a figure


@dataclass(frozen=True)
class Factor:
    """A varied key going from its first value to another one."""

    key: str
    first: Any
    other: Any

    @property
    def name(self) -> str:
        """'position_encoding=rope'."""
        return f"{self.key}={readable(self.other)}"


def effects_in_words(plan: StudyPlan, values: Mapping[str, Values], metric: str) -> list[str]:
    """Sentences: each factor's effect; of each two, which does more; and whether one's effect depends on the other.

    `values`: of each variant by name. The effect of a value is the difference of two means over the rest of the grid,
    one with it and one with the factor's first value, seed by seed. All tests are adjusted together (Holm). Empty for
    anything but a grid of several keys.
    """
    if not plan.grid or len(plan.levels) < 2:
        return []
    missing = [variant.name for variant in plan.variants if not values.get(variant.name)]
    seeds = [] if missing else sorted(set.intersection(*(set(values[variant.name]) for variant in plan.variants)))
    if not seeds:
        return [
            "The factors' effects need every combination of the grid with a common seed"
            + (f"; not finished: {'; '.join(missing)}." if missing else ".")
        ]

    def effect(factor: Factor, **where: Any) -> Values:
        """By how much the factor's other value is above its first one, averaged over the variants that are so."""

        def mean(level: Any) -> Values:
            names = [
                variant.name
                for variant in plan.variants
                if all(variant.choice[key] == value for key, value in {**where, factor.key: level}.items())
            ]
            return {seed: statistics.fmean(values[name][seed] for name in names) for seed in seeds}

        before, after = mean(factor.first), mean(factor.other)
        return {seed: after[seed] - before[seed] for seed in seeds}

    zero = dict.fromkeys(seeds, 0.0)
    factors = [Factor(key, levels[0], other) for key, levels in plan.levels.items() for other in levels[1:]]
    pairs = [(one, two) for one, two in itertools.combinations(factors, 2) if one.key != two.key]
    inside = [(effect(one, **{two.key: two.first}), effect(one, **{two.key: two.other})) for one, two in pairs]
    tests = adjust(
        [compare_means(zero, effect(factor)) for factor in factors]
        + [compare_means(effect(one), effect(two)) for one, two in pairs]
        + [compare_means(*sides) for sides in inside]
    )
    alone, between, depending = (tests[: len(factors)], tests[len(factors) : -len(pairs)], tests[-len(pairs) :])
    size = {factor: f"{test.difference:+.4f}" for factor, test in zip(factors, alone)}
    said = []
    for factor, test in zip(factors, alone):
        others = ", ".join(key for key in plan.levels if key != factor.key)
        first = f"{factor.key}={readable(factor.first)}"
        said.append(f"averaged over {others}: {sentence(Difference(first, factor.name, test), metric)}")
    for (one, two), test in zip(pairs, between):
        more, less = (one, two) if test.difference > 0 else (two, one)
        said.append(
            _judged(
                f"{more.name} ({size[more]}) does more for the {METRICS[metric]} than {less.name} ({size[less]})",
                f"between {one.name} ({size[one]}) and {two.name} ({size[two]})",
                test,
            )
        )
    for (one, two), sides, test in zip(pairs, inside, depending):
        where = [
            f"{statistics.fmean(side.values()):+.4f} with {two.key}={readable(level)}"
            for side, level in zip(sides, (two.first, two.other))
        ]
        said.append(
            _judged(
                f"what {one.name} does depends on {two.key}: {' and '.join(where)}",
                f"in what {one.name} does: {' and '.join(where)}",
                test,
            )
        )
    return said


def _judged(claim: str, between: str, test: Verdict) -> str:
    """The claim with its error bars, or that no difference is shown."""
    if test.p_holm is None:
        return f"nothing can be said with one seed of a difference {between}."
    made = f"{percent(test.level)} interval {{}} to {{}}; {test.method} over {test.n[0]} seeds, {p_text(test.p_holm)}"
    if not test.shown:
        interval = made.format(f"{test.low:+.4f}", f"{test.high:+.4f}")
        return f"no difference shown {between}, difference {test.difference:+.4f} ({interval})."
    least, most = sorted((abs(test.low), abs(test.high)))
    return f"{claim}, difference {abs(test.difference):.4f} ({made.format(f'{least:.4f}', f'{most:.4f}')})."
