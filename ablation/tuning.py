"""--cross: every variant was trained at several settings (learning rates, say) and is compared at its best."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

from ablation.execution import Study
from ablation.variants import Variant
from comparison.groups import METRICS, Group


def groups_of(study: Study, metric: str) -> tuple[list[Group], list[str]]:
    """(a group for each variant that has finished runs, notes).

    Where nothing is crossed a variant's group is its only setting's. Otherwise the setting is chosen for each seed by the
    mean of the other seeds' figures (with a single seed, by its own): the run of that seed had no part in the choice, so that
    luck in choosing does not count as a lower loss. A setting of which a run failed is not chosen, unless all have such.
    """
    plan, groups, notes = study.plan, [], []
    for variant in plan.variants:
        settings = {}
        for setting in plan.settings[variant]:
            jobs = [job for job in study.jobs if job.variant is setting]
            failed = tuple(f"seed {job.seeds[0]} failed" for job in jobs if not job.summary)
            settings[setting] = Group(setting.name, tuple(job.summary for job in jobs if job.summary), failed)
        having = [group for group in settings.values() if group.runs]
        if having and plan.crossed:
            groups.append(at_its_best(variant.name, [group for group in having if not group.lost(metric)] or having, metric))
            notes.append(_in_words(groups[-1], settings, plan.crossed, metric))
        else:
            groups += having
    return groups, notes


def at_its_best(name: str, settings: list[Group], metric: str) -> Group:
    """A group under this name with, for each seed, the run of the setting that is best for the other seeds."""
    runs = []
    for seeds in sorted({run.seeds for group in settings for run in group.runs}):

        def by_the_others(group: Group, seeds=seeds) -> float:
            values = group.values(metric)
            others = [value for other, value in values.items() if other != seeds] or list(values.values())
            return statistics.fmean(others) if others else math.inf

        candidates = [(group, run) for group in settings for run in group.runs if run.seeds == seeds]
        runs.append(min(candidates, key=lambda pair: by_the_others(pair[0]))[1])
    return Group(name, tuple(runs), tuple(failed for group in settings for failed in group.failed))


def _in_words(best: Group, settings: Mapping[Variant, Group], crossed: tuple[str, ...], metric: str) -> str:
    """Which settings were chosen, of which, and whether the best may lie beyond them."""

    def words(setting: Variant) -> str:
        return setting.name.removeprefix(f"{best.name}, ")

    counts = {setting: sum(run in group.runs for run in best.runs) for setting, group in settings.items()}
    chosen = [setting for setting, count in counts.items() if count]
    picked = ", ".join(words(setting) + (f" ({counts[setting]} seeds)" if len(chosen) > 1 else "") for setting in chosen)
    tried = "; ".join(
        f"{words(setting)}: {'no figure' if (mean := group.mean(metric)) is None else f'{mean:.4f}'}"
        + (f" ({lost})" if (lost := group.lost(metric)) else "")
        for setting, group in settings.items()
    )
    said = f"{best.name} is compared at {picked}, chosen for each seed by the {METRICS[metric]} of the others ({tried})"
    for key in crossed:
        values = {setting.values[key] for setting in settings}
        numbers = len(values) > 1 and all(isinstance(value, (int, float)) for value in values)
        if numbers and {min(values), max(values)} & {setting.values[key] for setting in chosen}:
            said += f"; that is at the end of what was tried of {key}, so its best may lie beyond"
    return f"{said}."
