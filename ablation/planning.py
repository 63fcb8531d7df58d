"""A command line → a StudyPlan: every run of a study, checked before the first one starts."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import model_components  # noqa: F401  registers what a model can be made of
from ablation.sizes import MEASURES, SAYS, TOLERANCE, deviation, matched
from ablation.variants import Variant, make_variant
from command_line import UsageError
from configurator import convert, describe_type, parse_command_line
from model_config import COMPONENT_KINDS, component, did_you_mean
from training.train_config import ALIASES, KEYS

NOT_VARIED = {
    "seed": "--seeds repeats every variant over seeds",
    "data_seed": "--seeds repeats every variant over seeds",
    "out_dir": "every run has a folder of its own",
    "eval_only": "a study trains",
    "init_from": "every run starts from its seed's own weights, and goes on where it stopped",
    "resume": "every run goes on where it stopped",
}
Seeds = tuple[int, int]  # (seed, data_seed)


@dataclass(frozen=True, eq=False)
class StudyPlan:
    """All that a study will run. `levels`: the values of each varied key, the config's own first where it is one."""

    config_file: str | None
    levels: dict[str, list]
    variants: tuple[Variant, ...]
    base: Variant  # the configuration as it stands; in `variants` unless a grid leaves it out
    seeds: tuple[Seeds, ...]
    out_dir: Path
    match: str
    grid: bool
    notes: tuple[str, ...]  # what a reader must know, a sentence each

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
    problems += [
        f"--{name}={getattr(options, name)} must be at least 1." for name in ("seeds", "jobs") if getattr(options, name) < 1
    ]
    problems += [f"--{key} cannot be given: {NOT_VARIED[key]}." for key in ("init_from", "resume", "eval_only") if key in given]
    asked = read_varied(options.vary, problems)
    try:
        base = make_variant(config_file, given)
    except ValueError as error:
        raise UsageError("\n".join(dict.fromkeys([*problems, *str(error).split("\n")]))) from error
    problems += [
        f"{config_file} sets {key}={getattr(base.train, key)!r}: {NOT_VARIED[key]}. Leave it out."
        for key, usual in (("init_from", "scratch"), ("resume", "no"), ("eval_only", False))
        if key not in given and getattr(base.train, key) != usual
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
    if not options.force:
        problems += comparison_problems(variants, base)
    if problems:
        raise UsageError("\n".join(dict.fromkeys(problems)))
    levels = {key: sorted(values.values(), key=lambda value: value != base.choice[key]) for key, values in asked.items()}
    seeds = tuple((base.train.seed + i, base.train.data_seed + i) for i in range(options.seeds))
    return StudyPlan(
        config_file,
        levels,
        tuple(variants),
        base,
        seeds,
        Path(options.out_dir or f"out/ablate_{base.name}").expanduser(),
        options.match,
        options.grid,
        tuple(sizes_in_words(variants, base, options.match)),
    )


def read_varied(texts: Sequence[str], problems: list[str]) -> dict[str, dict[str, Any]]:
    """--vary's arguments → {key: {text of a value: the value}}. What cannot be used is added to the problems.

    Values are separated by commas, or by semicolons where one holds commas itself.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        key, _, listed = text.partition("=")
        key = key.strip().replace("-", "_")
        if key in ALIASES:
            problems.append(f"--vary {text}: vary {ALIASES[key][0]} itself.")
        elif key not in KEYS:
            problems.append(f"--vary {text}: {key!r} is not a key{did_you_mean(key, KEYS)}. train.py --help lists all.")
        elif key in NOT_VARIED:
            problems.append(f"--vary {text}: {key} cannot be varied; {NOT_VARIED[key]}.")
        elif key in found:
            problems.append(f"--vary {key} is given twice; give all its values at once: --vary {key}=a,b,c.")
        elif not listed.strip():
            problems.append(f"--vary {text} names no values ({describe_type(key)}); write --vary {key}=a,b.")
        else:
            found[key] = {}
            for word in map(str.strip, listed.split(";" if ";" in listed else ",")):
                try:
                    value = convert(key, word)
                    if key in COMPONENT_KINDS:
                        component(key, value)
                except ValueError as error:
                    problems.append(f"--vary {text}: {error}")
                    continue
                if value in found[key].values():
                    problems.append(f"--vary {text}: {word} is given twice.")
                found[key][word] = value
    return found


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
