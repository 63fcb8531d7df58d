"""Repeated seeds as groups, which runs may be compared, and the comparison itself."""

from __future__ import annotations

import collections
import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from command_line import Failure, UsageError
from comparison.inference import Estimate, Verdict, adjust, compare_means, estimate
from comparison.runs import RunSummary
from model_config import ModelConfig, did_you_mean
from training.train_config import FIELDS

METRICS = {
    "val_loss": "validation loss",
    "best_val_loss": "best validation loss",
    "bits_per_byte": "bits per byte",
    "train_loss": "training loss",
}  # all: less is better

# Configuration keys that make no two experiments: what is only watched or executed otherwise, what the seeds decide,
# and what enters by its effect (the model's fingerprint, the dataset's, steps, tokens a step, the compute dtype).
_BY_EFFECT = {
    "dataset",
    "batch_size",
    "gradient_accumulation_steps",
    "total_batch_tokens",
    "max_iters",
    "max_tokens",
    "epochs",
    "arch_preset",
    "data_seed",
} | set(ModelConfig.__dataclass_fields__)
_NO_EXPERIMENT = _BY_EFFECT | {
    name for name, key in FIELDS.items() if name != "patience" and key.metadata.get("group") in ("run", "watching", "execution")
}


OTHER_TOKENIZER = "other tokenizer"  # reason of a Problem


class NotComparable(Failure):
    """Runs that cannot be set side by side; a sentence a line, each naming two runs."""


@dataclass(frozen=True)
class Problem:
    """Why a run cannot be compared with the others, in a sentence that names one of them."""

    run: str
    reason: str  # in a word or two
    sentence: str


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in nothing but seeds and what changes no result: repetitions of one experiment.

    `name` may be replaced (dataclasses.replace) by one that says what was varied; names must differ. `failed`: a few words
    about each repetition that is not in `runs` because it did not come to its end.
    """

    name: str
    runs: tuple[RunSummary, ...]
    failed: tuple[str, ...] = ()

    def values(self, metric: str) -> dict[tuple, float]:
        """A figure of the runs by (seed, data_seed); unknown ones are left out.

        The same seeds twice are one experiment done again, no repetition: the run that started last counts.
        """
        found = {run.seeds: getattr(run, metric) for run in sorted(self.runs, key=lambda run: run.started)}
        return {seeds: value for seeds, value in found.items() if value is not None}

    def estimate(self, metric: str) -> Estimate | None:
        """Mean, scatter and interval of a figure over the seeds; None where no run has it."""
        values = list(self.values(metric).values())
        return estimate(values) if values else None

    def mean(self, metric: str) -> float | None:
        """The mean of a figure over the seeds; None where no run has it."""
        values = self.values(metric).values()
        return statistics.fmean(values) if values else None

    def lost(self, metric: str) -> str:
        """Which repetitions did not come to their end or have no such figure, in words; '' if all did.

        A configuration that diverges now and then has low losses in the runs that survive. So a group that lost a
        repetition is never said to be better than another one.
        """
        words = [*self.failed]
        for run in self.runs:
            if not run.finished or getattr(run, metric) is None:
                how = f"no finite {METRICS.get(metric, metric)}" if run.finished else run.state
                words.append(f"seed {run.seeds[0]}: {how}")
        return "; ".join(words)


@dataclass(frozen=True)
class Difference:
    """Two groups compared: `b` against `a`."""

    a: str
    b: str
    test: Verdict
    problems: tuple[str, ...] = ()  # why the two are not comparable, where that was forced
    withheld: str = ""  # why the side with the lower figure is not said to be better

    @property
    def claimed(self) -> bool:
        """Whether it is said that one side is better."""
        return bool(self.test.shown) and not self.withheld


@dataclass(frozen=True, eq=False)
class Comparison:
    """Groups side by side, best first; made by `compare`."""

    groups: tuple[Group, ...]
    metric: str
    baseline: str | None
    differences: tuple[Difference, ...]
    problems: tuple[Problem, ...]  # only where they were forced
    notes: tuple[str, ...]  # what differs besides the model, and what a reader must know
    component_rows: tuple[tuple, ...]  # (key, value of each group …): what differs in the models
    config_rows: tuple[tuple, ...]  # (key, value of each group …): what else differs in the configuration
    also: tuple[Verdict, ...] = ()  # further tests, adjusted together with the differences

    @property
    def runs(self) -> list[RunSummary]:
        """All runs, group by group."""
        return [run for group in self.groups for run in group.runs]

    @property
    def labels(self) -> dict[str, str]:
        """Group name → what is particular to it, for sentences and plots; the whole name if nothing less is unique."""
        names = [group.name for group in self.groups]
        if any(group.name.partition(" (")[0] != group.runs[0].architecture for group in self.groups):
            return dict(zip(names, names))
        heads, tails = zip(*[name.partition(" (")[::2] for name in names])
        words = [head.split("-") for head in heads]
        common = set.intersection(*map(set, words))
        own = ["-".join(word for word in one if word not in common) for one in words]
        short = [head + (f" ({tail}" if tail and head else tail.removesuffix(")")) for head, tail in zip(own, tails)]
        usable = all(short) and len(set(short)) == len(names) > 1
        return dict(zip(names, short if usable else names))

    @property
    def flagged(self) -> dict[str, str]:
        """run or group name → why it is not comparable, in a few words."""
        reasons: dict[str, list[str]] = collections.defaultdict(list)
        for problem in self.problems:
            for name in [problem.run] + [g.name for g in self.groups if any(run.name == problem.run for run in g.runs)]:
                if problem.reason not in reasons[name]:
                    reasons[name].append(problem.reason)
        for group in self.groups:
            if group.failed:
                reasons[group.name].append(f"{len(group.failed)} of {len(group.failed) + len(group.runs)} seeds failed")
        return {name: ", ".join(found) for name, found in reasons.items()}

    @property
    def tokenizers_differ(self) -> bool:
        """Whether a loss in nats per token means different things in different groups."""
        datasets = {run.dataset.get("fingerprint") for run in self.runs}
        return len(datasets) > 1 and len({_tokenizer(run) for run in self.runs}) > 1

    @property
    def machine_was_shared(self) -> bool:
        """Whether two of the runs were on at the same time, on hardware of one name: then neither had it for itself."""
        runs = sorted(self.runs, key=lambda run: run.started)
        return any(
            one.hardware == other.hardware and one.started < other.ended and other.started < one.ended
            for one, other in itertools.combinations(runs, 2)
        )

    @property
    def best(self) -> Group | None:
        """The group with the lowest mean of the metric among those that can be compared."""
        eligible = [
            group
            for group in self.groups
            if group.name not in self.flagged and group.mean(self.metric) is not None and not group.lost(self.metric)
        ]
        return min(eligible, key=lambda group: group.mean(self.metric)) if len(eligible) > 1 else None


# ------------------------------------------------------------------------------------------- grouping


def group_runs(runs: Iterable[RunSummary], by: Iterable[str] = ()) -> list[Group]:
    """Repetitions together, in the order in which their first runs started.

    One group: the same model fingerprint, dataset, compute dtype, length and configuration but for seeds, out_dir, and
    the keys of logging and execution. `by`: configuration keys that separate groups all the same (what an ablation
    varies). A group is named after its model; where several have the same, by what else is different in them.
    """
    by, runs = tuple(by), list(runs)
    known = {**FIELDS, **{key: None for run in runs for key in run.config}}  # components declare keys of their own
    if unknown := [key for key in by if key not in known]:
        raise UsageError(
            f"{unknown[0]!r} is not a configuration key{did_you_mean(unknown[0], known)}; runs can only be grouped by those."
        )
    members: dict[str, list[RunSummary]] = collections.defaultdict(list)
    traits: dict[str, dict] = {}
    for run in runs:
        found = _traits(run, by)
        key = json.dumps(found, sort_keys=True, default=str)
        members[key].append(run)
        traits[key] = found
    architectures = {key: found[0].architecture for key, found in members.items()}
    names = dict(architectures)
    for architecture, same in itertools.groupby(sorted(members, key=architectures.get), key=architectures.get):
        same = list(same)
        if len(same) > 1:
            different = _different(traits[key] for key in same)
            for number, key in enumerate(same, start=1):
                said = ", ".join(f"{trait}={traits[key].get(trait)}" for trait in different)
                names[key] = f"{architecture} ({said or number})"
    return [Group(names[key], tuple(members[key])) for key in members]


def _traits(run: RunSummary, by: tuple[str, ...]) -> dict[str, Any]:
    """What makes this run's experiment: runs in which all of this is equal are repetitions of each other."""
    config = run.config
    origin = str(config.get("init_from", "scratch"))
    return {
        "model": run.fingerprint,
        "dataset": run.dataset.get("fingerprint"),
        "dtype": run.dtype,
        "length": run.length,
        "tokens_per_step": run.tokens_per_step,
        "block_size": config.get("block_size"),
        "init_from": origin if origin.startswith(("weights:", "hf:")) else "scratch",
        **{key: value for key, value in config.items() if value is not None and key not in _NO_EXPERIMENT | run.model.keys()},
        **{key: config.get(key) for key in by},
    }


def _different(dicts: Iterable[dict]) -> list[str]:
    """The keys in whose values dicts differ, in their order."""
    dicts = list(dicts)
    keys = dict.fromkeys(key for one in dicts for key in one)
    return [key for key in keys if any(one.get(key) != dicts[0].get(key) for one in dicts)]


# ------------------------------------------------------------------------------------------- what is comparable


def problems_between(run: RunSummary, other: RunSummary, metric: str | None = None) -> list[Problem]:
    """Why the loss of `run` cannot be compared with that of `other`, which is taken to be sound.

    metric: the figure that is asked for; None: validation loss, or bits per byte where tokenizers differ.
    """

    def problem(reason: str, sentence: str) -> Problem:
        return Problem(run.name, reason, sentence)

    found = []
    if not run.finished:
        found.append(
            problem(
                "unfinished",
                f"{run.name} is unfinished ({run.state}), so its loss does not compare with "
                f"that of {other.name} ({other.state}).",
            )
        )
    elif run.tokens != other.tokens:
        found.append(
            problem(
                "other tokens",
                f"{run.name} was trained on {run.tokens:,} tokens, {other.name} on "
                f"{other.tokens:,}; a longer run has the lower loss whatever the model.",
            )
        )
    if run.val_loss is None:
        found.append(
            problem("no validation loss", f"{run.name} has no finite validation loss to compare with that of {other.name}.")
        )
    if run.dataset.get("fingerprint") != other.dataset.get("fingerprint"):
        found += _data_problems(run, other, problem, metric)
    elif run.val_tokens != other.val_tokens:
        found.append(
            problem(
                "other validation set",
                f"{run.name} was validated on {_count(run.val_tokens)} tokens, {other.name} on "
                f"{_count(other.val_tokens)}; the same --eval_iters (and batch) makes the sets equal.",
            )
        )
    return found


def _data_problems(
    run: RunSummary, other: RunSummary, problem: Callable[[str, str], Problem], metric: str | None
) -> list[Problem]:
    """The problems of runs whose datasets differ: they compare in bits per byte, if only the tokenizer is another one."""
    mine, its = (f"{r.dataset.get('name')} ({r.dataset.get('fingerprint')})" for r in (run, other))
    if not _same_text(run, other):
        return [
            problem(
                "other data",
                f"{run.name} was trained on the dataset {mine}, {other.name} on {its}: losses on different data do not compare.",
            )
        ]
    found = []
    lacking = [r.name for r in (run, other) if r.bits_per_byte is None]
    if metric not in (None, "bits_per_byte"):
        found.append(
            problem(
                OTHER_TOKENIZER,
                f"{run.name} and {other.name} have different tokenizers, so {METRICS.get(metric, metric)}, in nats per token, "
                "does not compare; --metric=bits_per_byte does.",
            )
        )
    elif lacking:
        found.append(
            problem(
                OTHER_TOKENIZER,
                f"{run.name} and {other.name} have different tokenizers, so only bits per byte compare, "
                f"and {' and '.join(lacking)} has none.",
            )
        )
    partial = [r.name for r in (run, other) if r.val_tokens != r.dataset["splits"]["val"]["tokens"] - 1]
    if partial:
        found.append(
            problem(
                "other validation set",
                f"{run.name} and {other.name} have different tokenizers and validated on a part of the "
                f"text ({' and '.join(partial)}), which is another part for each; --eval_iters=0 "
                "validates on all of it.",
            )
        )
    return found


def _same_text(run: RunSummary, other: RunSummary) -> bool:
    """Whether two datasets are one text in two tokenizers: as many bytes and documents in each split."""
    sizes = []
    for dataset in (run.dataset, other.dataset):
        splits = dataset.get("splits") or {}
        sizes.append({name: (split.get("bytes"), split.get("documents")) for name, split in splits.items()})
    tokenizers = [_tokenizer(run), _tokenizer(other)]
    if run.dataset.get("phases") != other.dataset.get("phases") or any(size is None for size, _ in sizes[0].values()):
        return False  # other shares of a mixture, or a part of a text
    return bool(sizes[0]) and sizes[0] == sizes[1] and None not in tokenizers and tokenizers[0] != tokenizers[1]


def _tokenizer(run: RunSummary) -> str | None:
    """Fingerprint of the tokenizer that the run's dataset was made with."""
    return (run.dataset.get("tokenizer") or {}).get("fingerprint")


def find_problems(runs: Sequence[RunSummary], reference: Sequence[RunSummary] = (), metric: str | None = None) -> list[Problem]:
    """What keeps these runs from being compared, each with one that most others agree with.

    reference: the runs among which that one is looked for (a baseline's). metric: as for `problems_between`.
    """
    if len(runs) < 2:
        return []
    candidates = {}
    for run in reference or runs:  # one of each kind is enough
        kind = (run.finished, run.tokens, run.dataset.get("fingerprint"), run.val_tokens, run.val_loss is None)
        candidates.setdefault(kind, run)
    found = [
        [problem for run in runs if run is not sound for problem in problems_between(run, sound, metric)]
        + [
            problem
            for problem in problems_between(sound, next(run for run in runs if run is not sound), metric)
            if problem.reason in ("unfinished", "no validation loss")
        ]
        for sound in candidates.values()
    ]
    return min(found, key=lambda problems: len({problem.run for problem in problems}))


def _count(number: int | None) -> str:
    return "an unknown number of" if number is None else f"{number:,}"


# ------------------------------------------------------------------------------------------- comparing


def compare(
    groups: Sequence[Group],
    baseline: str | None = None,
    *,
    metric: str | None = None,
    force: bool = False,
    also: Sequence[Verdict] = (),
) -> Comparison:
    """Groups set side by side: differences with error bars, best first.

    baseline: a group's name (or a part of one that no other has, its preset, the out_dir of one of its runs): every
    other group is compared with it; without one, each with each. metric: one of METRICS, by default as `default_metric`.
    also: further tests of the same runs; all p are adjusted together, so that the chance of any false claim is ALPHA.
    Raises NotComparable, unless `force`: then those runs are flagged. UsageError for a baseline or metric that is not there.
    """
    if not groups:
        raise Failure("There are no runs to compare; train some with train.py, or name their folders.")
    if metric is not None and metric not in METRICS:
        raise UsageError(f"metric={metric!r} is not one of {', '.join(METRICS)}.")
    base = _find_baseline(groups, baseline) if baseline is not None else None
    runs = [run for group in groups for run in group.runs]
    problems = find_problems(runs, base.runs if base else (), metric)
    if problems and not force:
        raise NotComparable("\n".join(_refusal(runs, problems)))
    metric = metric or default_metric(runs)
    values = {group.name: group.values(metric) for group in groups}
    ordered = sorted(groups, key=lambda group: (group.mean(metric) is None, group.mean(metric)))
    pairs = [(base, group) for group in ordered if group is not base] if base else itertools.combinations(ordered, 2)
    pairs = [(a, b) for a, b in pairs if values[a.name] and values[b.name]]
    tests = adjust([*(compare_means(values[a.name], values[b.name]) for a, b in pairs), *also])
    differences = tuple(_difference(a, b, test, metric, problems) for (a, b), test in zip(pairs, tests))
    components, others = _rows(ordered)
    return Comparison(
        tuple(ordered),
        metric,
        base.name if base else None,
        differences,
        tuple(problems),
        tuple(_notes(ordered, others)),
        components,
        others,
        tuple(tests[len(pairs) :]),
    )


def default_metric(runs: Sequence[RunSummary]) -> str:
    """Validation loss; bits per byte where the datasets differ and all runs have them."""
    differ = len({run.dataset.get("fingerprint") for run in runs}) > 1
    return "bits_per_byte" if differ and all(run.bits_per_byte is not None for run in runs) else "val_loss"


def _difference(a: Group, b: Group, test: Verdict, metric: str, problems: Sequence[Problem]) -> Difference:
    """The difference of two groups, with what speaks against a claim."""
    own = [problem for problem in problems if any(problem.run == run.name for group in (a, b) for run in group.runs)]
    lower = b if test.difference < 0 else a
    if any(problem.reason == OTHER_TOKENIZER for problem in own):
        withheld = "their tokenizers differ, and only bits per byte compare then"
    else:
        withheld = lower.lost(metric)
    return Difference(a.name, b.name, test, tuple(problem.sentence for problem in own), withheld)


def _find_baseline(groups: Sequence[Group], wanted: str) -> Group:
    """The group of this name. Raises UsageError where none or several could be meant."""

    def places(run: RunSummary) -> set[str]:
        return {run.name, str(run.paths[-1].parent), run.paths[-1].parent.name, str(run.config.get("out_dir"))}

    for fits in (
        lambda group: group.name == wanted,
        lambda group: any(wanted.rstrip("/") in places(run) for run in group.runs),
        lambda group: any(run.config.get("arch_preset") == wanted for run in group.runs),
        lambda group: wanted in group.name,
    ):
        found = [group for group in groups if fits(group)]
        if len(found) == 1:
            return found[0]
        if found:
            break
    names = ", ".join(group.name for group in found or groups)
    raise UsageError(
        f"--baseline={wanted!r} could mean several groups: {names}. Give a whole name."
        if found
        else f"--baseline={wanted!r} is none of the groups: {names}."
    )


def _refusal(runs: Sequence[RunSummary], problems: Sequence[Problem], shown: int = 20) -> list[str]:
    """The sentences, and what to do."""
    lines = [problem.sentence for problem in problems[:shown]]
    if len(problems) > shown:
        lines.append(f"… and {len(problems) - shown} more of that kind.")
    bad = {problem.run for problem in problems}
    good = [run.name for run in runs if run.name not in bad]
    advice = "--force compares all the same, with these runs flagged"
    if len(good) > 1:
        advice += f"; comparable are: {' '.join(good[:shown])}{' …' if len(good) > shown else ''}"
    return [*lines, advice + "."]


def _rows(groups: Sequence[Group]) -> tuple[tuple[tuple, ...], tuple[tuple, ...]]:
    """What differs between groups: (rows of the models, rows of everything else), each (key, value of each group …)."""

    def values(group: Group, get) -> Any:
        seen = list(dict.fromkeys(json.dumps(get(run), default=str) for run in group.runs))
        return json.loads(seen[0]) if len(seen) == 1 else " | ".join(str(json.loads(text)) for text in seen)

    def differing(getters: dict[str, Any]) -> tuple[tuple, ...]:
        rows = [(key, *[values(group, get) for group in groups]) for key, get in getters.items()]
        return tuple(row for row in rows if any(value != row[1] for value in row[1:]))

    def of(attribute: str, key: str):
        return lambda run: getattr(run, attribute).get(key)

    runs = [run for group in groups for run in group.runs]
    models = {key: of("model", key) for key in dict.fromkeys(key for run in runs for key in run.model)}
    models |= {"N": lambda run: run.parameters, "FLOPs/token": lambda run: run.flops_per_token}
    keys = dict.fromkeys(key for run in runs for key in run.config)
    others = {
        key: of("config", key)
        for key in keys
        if key not in models and key not in ("seed", "data_seed", "out_dir", "notice", "eval_only")
    }
    others |= {
        "dataset fingerprint": of("dataset", "fingerprint"),
        "compute dtype": lambda run: run.dtype,
        "hardware": lambda run: run.hardware,
    }
    return differing(models), differing(others)


def _notes(groups: Sequence[Group], config_rows: Sequence[tuple]) -> list[str]:
    """What a reader must know about the comparison, a sentence each."""
    notes = []
    runs = [run for group in groups for run in group.runs]
    of_the_run = {key for run in runs for key in run.config.keys() - run.model.keys()} - _NO_EXPERIMENT
    important = [row[0] for row in config_rows if row[0] in of_the_run]
    important += [row[0] for row in config_rows if row[0] in ("compute dtype", "init_from")]
    if important and len({group.runs[0].fingerprint for group in groups}) > 1:
        notes.append(f"The groups differ in more than the model: {', '.join(important)}.")
    if len({run.config.get("block_size") for run in runs}) > 1:
        notes.append("Context lengths differ, so the validation windows do too.")
    if len({run.hardware for run in runs}) > 1:
        notes.append("tok/s, MFU, memory and time are of different hardware.")
    for group in groups:
        again = len(group.runs) - len({run.seeds for run in group.runs})
        if again:
            notes.append(
                f"{group.name}: {again} run{'s' * (again > 1)} with seeds that another has too; of equal "
                "seeds the last run counts."
            )
    said: dict[str, list[str]] = collections.defaultdict(list)
    for run in runs:
        for note in run.notes:
            said[note].append(run.name)
    return notes + [
        f"{names[0] if len(names) == 1 else f'{len(names)} runs, {names[0]} first'}: {note}." for note, names in said.items()
    ]
