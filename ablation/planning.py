"""A command line → a StudyPlan: every run of a study, checked before the first one starts."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import model_components  # noqa: F401  registers what a model can be made of
from ablation.sizes import MEASURES, SAYS, TOLERANCE, deviation, matched
from ablation.variants import Variant, folder_name, make_variant, readable
from command_line import UsageError
from configurator import convert, describe_type, parse_command_line
from model_config import COMPONENT_KINDS, component, did_you_mean
from training.aliases import ALIASES
from training.train_config import KEYS

NOT_VARIED = {
    "seed": "--seeds repeats every variant over seeds",
    "data_seed": "--seeds repeats every variant over seeds",
    "out_dir": "every run has a folder of its own",
    "eval_only": "a study trains",
    "init_from": "every run starts from its seed's own weights, and goes on where it stopped",
    "resume": "every run goes on where it stopped",
}
USUAL_SEEDS = 3
DONE = {"vary": "varied", "cross": "crossed"}  # options, as they are said of a key
Seeds = tuple[int, int]  # (seed, data_seed)
PILOT_SEEDS = 3  # of --seeds=auto


@dataclass(frozen=True, eq=False)
class StudyPlan:
    """All that a study will run.

    `levels`: the values of each varied key, the config's own first where it is one. `settings`: what is trained of each
    variant: itself alone, or itself at each combination of the values that --cross lists (`crossed`).
    """

    config_file: str | None
    levels: dict[str, list]
    variants: tuple[Variant, ...]
    base: Variant  # the configuration as it stands; in `variants` unless a grid leaves it out
    seeds: tuple[Seeds, ...]
    out_dir: Path
    match: str
    grid: bool
    force: bool  # compare also what does not compare
    detect: float | None  # with --seeds=auto: the difference that is to be seen; `seeds` are the pilot's then
    crossed: tuple[str, ...]
    settings: dict[Variant, tuple[Variant, ...]]
    notes: tuple[str, ...]  # what a reader must know, a sentence each

    @property
    def trained(self) -> list[Variant]:
        """What is trained with every seed: the settings of all variants."""
        return [setting for variant in self.variants for setting in self.settings[variant]]

    @property
    def baseline(self) -> Variant | None:
        """The variant that is the configuration as it stands, if the study has it."""
        return self.base if self.base in self.variants else None

    def folder(self, variant: Variant, seeds: Seeds) -> Path:
        """Where a run lies."""
        return self.out_dir / variant.folder / ("seed_" + "_".join(map(str, dict.fromkeys(seeds))))

    def arguments(self, variant: Variant, seeds: Seeds) -> list[str]:
        """The command line of train.py for one run."""
        given = {
            **variant.given,
            "seed": seeds[0],
            "data_seed": seeds[1],
            "out_dir": self.folder(variant, seeds),
            "resume": "auto",
        }
        return [*([self.config_file] if self.config_file else []), *(f"--{key}={text}" for key, text in given.items())]


def make_plan(options: argparse.Namespace, rest: Sequence[str]) -> StudyPlan:
    """The study that a command line asks for: ablate.py's own options, and what goes to train.py.

    Raises UsageError with all problems there are.
    """
    config_file, given, switches = parse_command_line(list(rest))
    problems = [f"--{name} is train.py's; --dry_run shows what this command would do." for name in switches - {"debug"}]
    options = argparse.Namespace(**{**vars(options), "seeds": USUAL_SEEDS}) if (alone := options.seeds is None) else options
    problems += option_problems(options)
    problems += [f"--{key} cannot be given: {NOT_VARIED[key]}." for key in ("init_from", "resume", "eval_only") if key in given]
    asked = read_varied("vary", options.vary, problems)
    crossed = read_varied("cross", options.cross, problems)
    if alone and not options.vary and not options.cross:
        problems.append(
            "What is to be compared? Name a key and its values: --vary normalization=layernorm,rmsnorm (or --seeds=3 alone, to "
            "repeat the configuration as it stands)."
        )
    problems += [f"{key} is both varied and crossed; choose one." for key in crossed if key in asked]
    problems += [
        f"--cross {key}: only keys of the optimizer and its schedule can be crossed; --vary compares {key}."
        for key in crossed
        if KEYS[key].metadata["group"] not in ("optimizer", "schedule")
    ]
    try:
        base = make_variant(config_file, given)
    except ValueError as error:
        raise UsageError("\n".join(dict.fromkeys([*problems, *str(error).split("\n")]))) from error
    problems += [
        f"{config_file} sets {key}={getattr(base.train, key)!r}: {NOT_VARIED[key]}. Leave it out."
        for key, usual in (("init_from", "scratch"), ("resume", "no"), ("eval_only", False))
        if key not in given and getattr(base.train, key) != usual
    ]
    problems += [
        f"--{key}={given[key]} is none of the values that --vary {key} compares: add it to them if it is one, else leave it out."
        for key, values in asked.items()
        if key in given and base.values[key] not in values.values()
    ]
    base = replace(
        base,
        choice={key: base.values[key] for key in asked},
        folder="baseline",
        name=Path(config_file).stem if config_file else "defaults",
    )
    variants = make_variants(config_file, given, asked, base, options.grid, problems)
    if options.match != "none":
        variants = [_or_problem(variant, base, options.match, config_file, problems) for variant in variants]
    settings = {variant: crossed_settings(variant, crossed, config_file, problems) for variant in variants}
    if not options.force:
        problems += comparison_problems([setting for found in settings.values() for setting in found], base)
    if problems:
        raise UsageError("\n".join(dict.fromkeys(problems)))
    levels = {key: sorted(values.values(), key=lambda value: value != base.choice[key]) for key, values in asked.items()}
    seeds = seeds_from(base, 0, PILOT_SEEDS if options.seeds == "auto" else options.seeds)
    return StudyPlan(
        config_file,
        levels,
        tuple(variants),
        base,
        seeds,
        Path(options.out_dir or f"out/ablate_{base.name}").expanduser(),
        options.match,
        options.grid,
        options.force,
        options.detect,
        tuple(crossed),
        settings,
        (*sizes_in_words(variants, base, options.match), *rate_in_words(base, {*asked, *crossed})),
    )


def option_problems(options: argparse.Namespace) -> list[str]:
    """What is wrong with ablate.py's own options."""
    found = [f"--jobs={options.jobs} must be at least 1."] if options.jobs < 1 else []
    if options.seeds == "auto":
        if options.detect is None:
            found.append("--seeds=auto needs the difference that is to be seen: --detect=0.02.")
        elif not 0 < options.detect < math.inf:
            found.append(f"--detect={options.detect:g} must be a positive loss difference.")
    elif options.detect is not None:
        found.append("--detect says which difference --seeds=auto has to show; give both or neither.")
    elif options.seeds < 1:
        found.append(f"--seeds={options.seeds} must be at least 1.")
    return found


def seeds_from(base: Variant, first: int, count: int) -> tuple[Seeds, ...]:
    """`count` pairs of seeds, the first one `first` after the configuration's own."""
    return tuple((base.train.seed + i, base.train.data_seed + i) for i in range(first, first + count))


def crossed_settings(
    variant: Variant, crossed: dict[str, dict[str, Any]], config_file: str | None, problems: list[str]
) -> tuple[Variant, ...]:
    """The variant at each combination of the crossed values; itself where nothing is crossed. Adds to the problems."""
    found = []
    for words in itertools.product(*crossed.values()):
        changed = dict(zip(crossed, words))
        if not changed:
            return (variant,)
        suffix = ", ".join(f"{key}={readable(crossed[key][word])}" for key, word in changed.items())
        try:
            setting = make_variant(config_file, variant.given, changed)
        except ValueError as error:
            problems += [f"{suffix}: {line}" for line in str(error).split("\n")]
            continue
        folder = f"{variant.folder},{folder_name(suffix)}"
        name = f"{variant.name}, {suffix}"
        found.append(replace(setting, name=name, folder=folder, choice=variant.choice, resized=variant.resized))
    return tuple(found)


def read_varied(option: str, texts: Sequence[str], problems: list[str]) -> dict[str, dict[str, Any]]:
    """The arguments of --vary or --cross → {key: {text of a value: the value}}. Adds what cannot be used to the problems.

    Values are separated by commas, or by semicolons where one holds commas itself, as mixtures of datasets do.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        key, _, listed = text.partition("=")
        key = key.strip().replace("-", "_")
        if key in ALIASES:
            problems.append(f"--{option} {text}: {option} {ALIASES[key].key or 'the key that is meant'} itself.")
        elif key not in KEYS:
            problems.append(f"--{option} {text}: {key!r} is not a key{did_you_mean(key, KEYS)}. train.py --help lists all.")
        elif key in NOT_VARIED:
            problems.append(f"--{option} {text}: {key} cannot be {DONE[option]}; {NOT_VARIED[key]}.")
        elif key in found:
            problems.append(f"--{option} {key} is given twice; give all its values at once: --{option} {key}=a,b,c.")
        elif not listed.strip():
            problems.append(f"--{option} {text} names no values ({describe_type(key)}); write --{option} {key}=a,b.")
        else:
            found[key] = {}
            for word in listed_values(key, listed):
                try:
                    value = convert(key, word)
                    if key in COMPONENT_KINDS:
                        component(key, value)
                except ValueError as error:
                    problems.append(f"--{option} {text}: {error}")
                    continue
                if value in found[key].values():
                    problems.append(f"--{option} {text}: {word} is given twice.")
                found[key][word] = value
    return found


def listed_values(key: str, listed: str) -> list[str]:
    """The values of a key in a list. Commas between `name:share` are those of one mixture of datasets."""
    mixture = key == "dataset" and ":" in listed
    return [word.strip() for word in listed.split(";" if ";" in listed or mixture else ",")]


def make_variants(
    config_file: str | None,
    given: Mapping[str, str | bool],
    asked: dict[str, dict[str, Any]],
    base: Variant,
    grid: bool,
    problems: list[str],
) -> list[Variant]:
    """The baseline and one variant for each other value of a key; of a grid every combination of values.

    Two that would be the same experiment, and a key that does not differ from the baseline's, are problems.
    """
    if grid:
        choices = [dict(zip(asked, words)) for words in itertools.product(*asked.values())]
    else:
        choices = [{}, *({key: word} for key, words in asked.items() for word in words)]
    found: dict[str, Variant] = {}
    for words in choices:
        choice = base.choice | {key: asked[key][word] for key, word in words.items()}
        changed = {key: word for key, word in words.items() if choice[key] != base.choice[key]}
        try:
            variant = make_variant(config_file, given, changed, choice)
        except ValueError as error:
            said = ", ".join(f"{key}={word}" for key, word in changed.items())
            problems += [f"{said}: {line}" for line in str(error).split("\n")]
            continue
        experiment = json.dumps(variant.experiment(asked), sort_keys=True)
        if experiment == json.dumps(base.experiment(asked), sort_keys=True):
            found[experiment] = base
        elif experiment in found:
            problems.append(
                f"{variant.name} and {found[experiment].name} are the same experiment (model fingerprint "
                f"{variant.model.fingerprint}); leave one of them out."
            )
        else:
            found[experiment] = variant
    if not problems:
        problems += [
            f"--vary {key}={','.join(words)} varies nothing: the configuration has {key}={base.choice[key]} already."
            for key, words in asked.items()
            if all(variant.choice[key] == base.choice[key] for variant in found.values())
        ]
    return list(found.values())


def _or_problem(variant: Variant, base: Variant, match: str, config_file: str | None, problems: list[str]) -> Variant:
    """The variant as --match makes it, or as it was with one problem more."""
    if variant is base:
        return base
    try:
        return matched(variant, base, match, config_file)
    except ValueError as error:
        problems.append(str(error))
        return variant


def comparison_problems(variants: Sequence[Variant], base: Variant) -> list[str]:
    """Why losses of these variants would say nothing about each other, as far as it is known before training."""
    found = []
    if base.train.patience:
        found.append(
            f"patience={base.train.patience} ends runs after different numbers of tokens, so their losses do not compare; leave "
            "it out, or --force."
        )
    for variant in variants:
        if variant.tokens != base.tokens:
            found.append(
                f"{variant.name} would train on {variant.tokens:,} tokens and {base.name} on {base.tokens:,}, "
                "so their losses do not compare; give the length as --max_tokens, a multiple of every batch, "
                "or --force."
            )
        if variant.dataset.fingerprint != base.dataset.fingerprint:
            texts = [[v.dataset.split(name).bytes for name in ("train", "val")] for v in (variant, base)]
            if texts[0] != texts[1] or None in texts[0]:
                found.append(
                    f"{variant.name} is another text than {base.train.dataset}, so their losses do not "
                    "compare; use one text (with several tokenizers, say), or --force."
                )
            elif variant.train.eval_iters or base.train.eval_iters:
                found.append(
                    f"{variant.name} has another tokenizer than {base.name}, so they compare in bits per byte "
                    "over the whole validation text; give --eval_iters=0, or --force."
                )
        elif variant.val_tokens != base.val_tokens:
            found.append(
                f"{variant.name} would be validated on {variant.val_tokens:,} tokens and {base.name} on "
                f"{base.val_tokens:,}; give --eval_iters=0 to validate on all there are, or --force."
            )
    return found


def rate_in_words(base: Variant, chosen: set[str]) -> list[str]:
    """That all variants have one learning rate, where they do."""
    if "learning_rate" in chosen:
        return []
    return [
        f"All variants have learning_rate={readable(base.train.learning_rate)}; one that prefers another rate is not at its "
        "best. --cross learning_rate=a,b,c trains every variant at each of them and compares each at its best."
    ]


def sizes_in_words(variants: Sequence[Variant], base: Variant, match: str) -> list[str]:
    """How --match made sizes equal, or that they are not: a sentence each."""
    if match == "none":
        far = [v.name for v in variants if abs(v.parameters / base.parameters - 1) > TOLERANCE]
        return (
            [
                f"N differs from that of {base.name} by more than 1 % in: {'; '.join(far)}. What is compared is size "
                "too; --match=params or --match=flops makes it equal."
            ]
            if far
            else []
        )
    sizes = {variant: getattr(variant, MEASURES[match]) for variant in (base, *variants)}
    return [
        f"{variant.name} has {variant.resized}, so that its {SAYS[match]} {sizes[variant]:,} equals the "
        f"{sizes[base]:,} of {base.name} within 1 % ({deviation(sizes[variant], sizes[base])})."
        for variant in variants
        if variant.resized
    ]
