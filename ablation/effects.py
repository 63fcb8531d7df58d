"""What each factor of a grid does: contrasts of its variants' means, to be tested together with all other comparisons."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ablation.planning import StudyPlan
from ablation.variants import readable
from comparison.groups import METRICS, Difference
from comparison.inference import Verdict, contrast
from comparison.report import p_text, percent, sentence

Weights = Mapping[str, float]  # variant's name → its weight in a contrast


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


@dataclass(frozen=True)
class Effect:
    """One question to a grid. `test`: the contrast that answers it, not adjusted; `say`: the adjusted one → a sentence."""

    test: Verdict
    say: Callable[[Verdict], str]


def grid_effects(
    plan: StudyPlan, values: Mapping[str, Mapping[tuple, float]], metric: str, lost: Mapping[str, str]
) -> tuple[list[Effect], list[str]]:
    """(effects, notes): each factor's effect; of each two, which does more; and whether one's effect depends on the other.

    values: variant's name → figures by seed. lost: variant's name → which of its runs failed, in words. The effect of a
    value is the difference of two means over the rest of the grid, one with it and one with the factor's first value. No
    effects for anything but a grid of several keys, or where a combination has no run.
    """
    if not plan.grid or len(plan.levels) < 2:
        return [], []
    missing = [variant.name for variant in plan.variants if not values.get(variant.name)]
    if missing:
        return [], [f"The factors' effects need every combination of the grid; not finished: {'; '.join(missing)}."]
    withheld = "; ".join(f"{name}, {how}" for name, how in lost.items() if how)

    def test(weights: Weights) -> Verdict:
        return contrast([(weight, values[name]) for name, weight in weights.items() if weight])

    factors = [Factor(key, levels[0], other) for key, levels in plan.levels.items() for other in levels[1:]]
    pairs = [(one, two) for one, two in itertools.combinations(factors, 2) if one.key != two.key]
    alone = {factor: _weights(plan, factor) for factor in factors}
    size = {factor: f"{test(weights).difference:+.4f}" for factor, weights in alone.items()}
    effects = []
    for factor, weights in alone.items():
        others = ", ".join(key for key in plan.levels if key != factor.key)
        first = f"{factor.key}={readable(factor.first)}"

        def say(found: Verdict, others=others, first=first, name=factor.name) -> str:
            return f"averaged over {others}: {sentence(Difference(first, name, found, withheld=withheld), metric)}"

        effects.append(Effect(test(weights), say))
    for one, two in pairs:

        def say(found: Verdict, one=one, two=two) -> str:
            more, less = (one, two) if found.difference < 0 else (two, one)
            claim = f"{more.name} ({size[more]}) does more for the {METRICS[metric]} than {less.name} ({size[less]})"
            return _judged(claim, f"between {one.name} ({size[one]}) and {two.name} ({size[two]})", found, withheld)

        effects.append(Effect(test(_minus(alone[one], alone[two])), say))
    for one, two in pairs:
        sides = [_weights(plan, one, **{two.key: level}) for level in (two.first, two.other)]
        where = " and ".join(
            f"{test(side).difference:+.4f} with {two.key}={readable(level)}" for side, level in zip(sides, (two.first, two.other))
        )

        def say(found: Verdict, one=one, two=two, where=where) -> str:
            claim = f"what {one.name} does depends on {two.key}: {where}"
            return _judged(claim, f"in what {one.name} does: {where}", found, withheld)

        effects.append(Effect(test(_minus(sides[1], sides[0])), say))
    return effects, []


def _weights(plan: StudyPlan, factor: Factor, **where: Any) -> Weights:
    """The contrast 'mean of the variants with the factor's other value − mean of those with its first one'.

    where: keys and values to which the variants are restricted.
    """
    weights: dict[str, float] = defaultdict(float)
    for level, sign in ((factor.first, -1), (factor.other, 1)):
        wanted = {**where, factor.key: level}
        names = [v.name for v in plan.variants if all(v.choice[key] == value for key, value in wanted.items())]
        for name in names:
            weights[name] += sign / len(names)
    return weights


def _minus(one: Weights, other: Weights) -> Weights:
    return {name: one.get(name, 0.0) - other.get(name, 0.0) for name in {**one, **other}}


def _judged(claim: str, between: str, test: Verdict, withheld: str) -> str:
    """The claim with its error bars, or that no difference is shown, or why nothing is claimed."""
    if test.p_holm is None:
        reason = "one seed" if test.untested == "seeds" else "figures that do not vary from seed to seed"
        return f"nothing can be said with {reason} of a difference {between}."
    made = f"{percent(test.level)} interval {{}} to {{}}; {test.method} over {test.seeds}, {p_text(test.p_holm)}"
    if not test.shown or withheld:
        interval = made.format(f"{test.low:+.4f}", f"{test.high:+.4f}")
        why = f"nothing is claimed of a difference {between}, as runs failed ({withheld})" if test.shown else ""
        return f"{why or f'no difference shown {between}'}, difference {test.difference:+.4f} ({interval})."
    least, most = sorted((abs(test.low), abs(test.high)))
    return f"{claim}, difference {abs(test.difference):.4f} ({made.format(f'{least:.4f}', f'{most:.4f}')})."
