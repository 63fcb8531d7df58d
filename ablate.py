"""Ablations: vary a configuration's keys, repeat over seeds, train, compare.

    python ablate.py config/arch_gpt2.py --vary normalization=layernorm,rmsnorm --vary norm_position=pre,post
    python ablate.py config/arch_gpt2.py --vary ffn_type=standard,swiglu --seeds=5 --match=params --jobs=2 --threads=1
    python ablate.py config/arch_gpt2.py --vary position_encoding=learned_absolute,rope --vary bias=True,False --grid
    python ablate.py config/arch_gpt2.py --vary "layer_pattern=transformer;transformer,mlp" --max_iters=50 --dry_run

The baseline is the configuration as it stands. Each --vary changes one key of it, one factor at a time; --grid takes
all combinations. Variants share their seeds (of weights and of the data's order); from 5 seeds on they are compared in pairs.
Any other --key=value goes to train.py. Each run has a folder of its own in out_dir; the comparison lies beside them
(comparison.html, .md, .json, .png). The same command again goes on: what is finished is not repeated.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from command_line import Failure, Parser, choose_device, duration, guarded, printable, short, text_table

if TYPE_CHECKING:
    from ablation.execution import Study
    from ablation.planning import StudyPlan
    from comparison import Comparison


def make_parser() -> Parser:
    """ablate.py's own options; what it does not know is train.py's."""
    parser = Parser(
        prog="ablate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="ablate.py [config/x.py] [--vary KEY=A,B …] [options] [--key=value …]",
        epilog="python train.py --help lists the keys.",
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what is compared")
    what.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="KEY=A,B,…",
        help="values of a key, separated by ';' where one holds a comma; may be given for several keys",
    )
    what.add_argument(
        "--grid",
        action="store_true",
        help="all combinations, and each factor's effect averaged over the others [one factor at a time]",
    )
    what.add_argument(
        "--seeds",
        type=number_of_seeds,
        metavar="N|auto",
        help="runs of each variant: the configuration's seed and data_seed and the N - 1 after them [3]. The number has to be "
        "fixed beforehand: adding seeds until a difference shows, from 3 to 10, finds one in 14 %% of the studies where there is "
        "none. auto: a pilot of 3 seeds decides, then as many others as --detect needs are trained and compared",
    )
    what.add_argument(
        "--detect",
        type=float,
        metavar="LOSS",
        help="with --seeds=auto: the difference in loss that is to be shown 4 times out of 5, e.g. 0.02",
    )
    what.add_argument(
        "--cross",
        action="append",
        default=[],
        metavar="KEY=A,B,…",
        help="train every variant at each of these values, of learning_rate for instance, and compare each at its best",
    )
    what.add_argument(
        "--match",
        choices=("none", "params", "flops"),
        default="none",
        help="give variants the baseline's N or FLOPs per token, within 1 %%, by other d_ff or depth",
    )
    what.add_argument("--force", action="store_true", help="train and compare also variants that do not compare, and mark them")
    how = parser.add_argument_group("how")
    how.add_argument("--out_dir", metavar="DIR", help="folder of the whole study [out/ablate_<config>]")
    how.add_argument("--jobs", type=int, default=1, metavar="K", help="runs at a time [1]; of several GPUs each gets its own")
    how.add_argument(
        "--speed",
        action="store_true",
        help="which variant is faster: train nothing to its end, but take steps of all variants in turns on an idle machine",
    )
    how.add_argument("--dry_run", action="store_true", help="print what would run, and train nothing")
    return parser


# ------------------------------------------------------------------------------------------- before


def number_of_seeds(text: str) -> int | str:
    """--seeds → a whole number, or 'auto'."""
    if text != "auto" and not text.strip().lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor 'auto'")
    return text if text == "auto" else int(text)


def plan_in_words(study: Study) -> str:
    """The variants with their sizes and state, and the notes."""
    from ablation.sizes import deviation

    plan, base = study.plan, study.plan.base
    rows = []
    for variant in plan.trained:
        jobs = [job for job in study.jobs if job.variant is variant]
        own = variant is base
        rows.append(
            (
                variant.name + (" (baseline)" if own else ""),
                short(variant.parameters),
                "" if own else deviation(variant.parameters, base.parameters),
                short(variant.flops),
                "" if own else deviation(variant.flops, base.flops),
                short(variant.tokens),
                f"{sum(job.summary is not None for job in jobs)} of {len(jobs)}",
                variant.model.name,
            )
        )
    shown = text_table(("variant", "N", "", "FLOP/token", "", "tokens", "finished", "model"), rows, "lrrrrrrl")
    seeds = ", ".join("/".join(map(str, dict.fromkeys(seeds))) for seeds in plan.seeds)
    each = len(study.jobs) // len(plan.variants) // len(plan.seeds)
    head = (
        f"{len(plan.variants)} variant{'s' * (len(plan.variants) > 1)}{f' × {each} settings' if plan.crossed else ''} × "
        f"{len(plan.seeds)} seed{'s' * (len(plan.seeds) > 1)} ({seeds}) = {len(study.jobs)} runs in {plan.out_dir}"
    )
    pilot = ["note: these are the runs of the pilot; its scatter decides how many others follow"] * (plan.detect is not None)
    return "\n".join([head, "", shown, *pilot, *(f"note: {note}" for note in plan.notes), ""])


def cost_in_words(study: Study) -> str:
    """What the runs that are left would take on this machine, at an assumed MFU, and what that would cost."""
    from ablation.variants import Variant
    from flops_parameter_counting.flops import flops_per_token
    from flops_parameter_counting.hardware import best_dtype, device_peak
    from training.report import ASSUMED_MFU

    train = study.plan.base.train
    device = choose_device(train.device)
    peak = device_peak(device, best_dtype(device) if train.dtype == "auto" else train.dtype)

    def flops(variant: Variant) -> int:
        per_token = flops_per_token(variant.model, checkpointing=variant.train.activation_checkpointing)
        return variant.tokens * per_token.hardware

    left = sum(flops(job.variant) for job in study.jobs if not job.summary)
    text = f"left to train: {left:.3g} FLOPs"
    if peak is None:
        return f"{text}; how long that takes is not known, as there is no peak for this device in {train.dtype}"
    seconds = left / (peak.flops * ASSUMED_MFU)
    text += (
        f", about {duration(seconds)} in all at an assumed MFU of {ASSUMED_MFU:.0%} of {peak.flops / 1e12:.3g} "
        f"TFLOP/s ({'measured' if peak.measured else peak.source})"
    )
    price = train.price_per_gpu_hour
    return text + ("" if price is None else f", at {price:,.2f} an hour {seconds / 3600 * price:,.2f}")


def commands(study: Study) -> list[str]:
    """train.py's command for each run, with its state."""
    return [shlex.join(["python", "train.py", *job.arguments]) + ("   # finished" if job.summary else "") for job in study.jobs]


# ------------------------------------------------------------------------------------------- after


def compare_runs(study: Study) -> Comparison:
    """The finished runs of a study, a group a variant; what does not compare is flagged. Failure if there are none."""
    from ablation.effects import grid_effects
    from ablation.tuning import groups_of
    from comparison import compare, default_metric

    plan = study.plan
    if not study.finished:
        raise Failure("No run of the study came to its end, so there is nothing to compare.")
    metric = default_metric([job.summary for job in study.finished])
    groups, tuned = groups_of(study, metric)
    base = plan.baseline and plan.baseline.name
    values = {group.name: group.values(metric) for group in groups}
    effects, notes = grid_effects(plan, values, metric, {group.name: group.lost(metric) for group in groups})
    comparison = compare(
        groups,
        base if any(group.name == base for group in groups) else None,
        force=plan.force,
        also=[effect.test for effect in effects],
    )
    said = [effect.say(test) for effect, test in zip(effects, comparison.also)]
    left_out = [f"left out: {job.failure.splitlines()[0].split(' The last lines')[0]}" for job in study.failed]
    notes = (*said, *notes, *tuned, *extended_in_words(plan), *plan.notes, *left_out, *comparison.notes)
    return replace(comparison, notes=notes)


def extended_in_words(plan: StudyPlan) -> list[str]:
    """That a study has more seeds than when it was compared before, where it has."""
    try:
        before = json.loads((plan.out_dir / "ablation.json").read_text(encoding="utf-8"))
        seeds = {run["seed"] for variant in before["variants"] for run in variant["runs"]}
    except (OSError, ValueError, KeyError, TypeError):
        return []
    now = {seed for seed, _ in plan.seeds}
    if not seeds < now:
        return []
    return [
        f"This study was compared before with {len(seeds)} seeds and has {len(now)} now. p holds for a number of seeds that was "
        "fixed beforehand; adding seeds until a difference shows, from 3 to 10, finds one in 14 % of the studies where there is "
        "none. --seeds=auto --detect=… fixes the number."
    ]


def write_reports(study: Study, comparison: Comparison, argv: Sequence[str]) -> list[str]:
    """comparison.html, .md, .json, .png and ablation.json (the plan and its runs) in out_dir; returns their paths."""
    from comparison import write_html, write_json, write_markdown, write_plot

    plan, paths = study.plan, []
    for name, write in (("html", write_html), ("md", write_markdown), ("json", write_json), ("png", write_plot)):
        paths.append(str(plan.out_dir / f"comparison.{name}"))
        write(comparison, paths[-1])
    variants = [
        {
            "name": variant.name,
            "baseline": variant in plan.settings.get(plan.base, ()),
            "varied": variant.choice,
            "resized": variant.resized,
            "model": variant.model.name,
            "fingerprint": variant.model.fingerprint,
            "parameters": variant.parameters,
            "flops_per_token": variant.flops,
            "runs": [
                {
                    "seed": job.seeds[0],
                    "data_seed": job.seeds[1],
                    "folder": str(job.folder),
                    "log": job.summary and job.summary.name,
                    "failure": job.failure,
                }
                for job in study.jobs
                if job.variant is variant
            ],
        }
        for variant in plan.trained
    ]
    document = {
        "command": again(argv),
        "match": plan.match,
        "grid": plan.grid,
        "varied": plan.levels,
        "notes": comparison.notes,
        "variants": variants,
    }
    (plan.out_dir / "ablation.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return [*paths, str(plan.out_dir / "ablation.json")]


def again(argv: Sequence[str]) -> str:
    """The command as it was given."""
    return shlex.join(["python", "ablate.py", *argv])


# ------------------------------------------------------------------------------------------- command line


def run(argv: Sequence[str]) -> int:
    """Plan, train, compare. Returns the exit code."""
    options, rest = make_parser().parse_known_args(argv)
    from ablation.execution import Study, visible_gpus
    from ablation.planning import make_plan

    study = Study(plan := make_plan(options, rest))
    train = plan.base.train
    print(printable(plan_in_words(study)), flush=True)
    if options.jobs > 1 and train.threads is None and not visible_gpus(train):
        print(
            f"warning: {options.jobs} runs at a time, each with PyTorch's own number of threads, get in each other's "
            "way; --threads=1 gives each one.",
            file=sys.stderr,
        )
    if options.dry_run:
        print(printable("\n".join([cost_in_words(study), "", *commands(study)])))
        return 0
    if options.speed:
        from ablation.speed import compare_speed

        print(compare_speed(plan))
        return 0
    if plan.detect is not None:
        from ablation.repetitions import after_pilot

        if not trained(study, options.jobs, argv):
            return 0
        study = Study(after_pilot(study))
        print(printable(plan_in_words(study)), flush=True)
    return conclude(study, argv) if trained(study, options.jobs, argv) else 0


def trained(study: Study, jobs: int, argv: Sequence[str]) -> bool:
    """Train what is left of a study; False, with a line that says how to go on, if somebody stopped it."""
    study.run(jobs)
    if study.stopped:
        print(f"{len(study.finished)} of {len(study.jobs)} runs are finished. To go on: {again(argv)}")
    return not study.stopped


def conclude(study: Study, argv: Sequence[str]) -> int:
    """Compare the runs, print and write what comes out. Returns the exit code; raises Failure where runs failed."""
    from ablation.execution import failures
    from comparison import table

    failed = failures(study)
    if failed and not study.finished:
        raise failed
    comparison = compare_runs(study)
    print(printable(f"\n{table(comparison)}\n"))
    print(printable("\n".join(write_reports(study, comparison, argv))), file=sys.stderr)
    if failed:
        raise failed
    return 0


def main(argv: list[str]) -> int:
    """Run the study; returns the exit code."""
    return guarded("ablate.py", argv, lambda: run([word for word in argv if word != "--debug"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
