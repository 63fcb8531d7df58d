"""Finished runs side by side: table, error bars, plots, HTML report.

    python compare_architectures.py                                     # all runs below out/
    python compare_architectures.py out/gpt2 out/llama out/x/run_….json # folders and files
    python compare_architectures.py --latest 3                          # the last three runs below out/
    python compare_architectures.py out/ablation --baseline=out/ablation/gpt2 --html report.html --plot loss.png

Runs that differ only in seeds are repetitions: they become one row with mean and standard deviation, and rows are
compared by a paired t test over matching seeds, from 5 on (by Welch's otherwise), adjusted by Holm for the number of
comparisons. Runs that do not compare (other data, tokens or validation set, unfinished) are refused; --force flags
them. A killed run is read from its .jsonl, a resumed one with what it continued.
"""

from __future__ import annotations

import argparse
import sys

from command_line import Failure, Parser, UsageError, check_target, guarded, printable
from comparison.groups import METRICS, Comparison, Group, NotComparable, compare, group_runs
from comparison.pictures import write_html, write_plot
from comparison.report import SORT_KEYS, table, write_csv, write_json, write_markdown
from comparison.runs import RunSummary, load_runs
from comparison.scores import scores_table

__all__ = [
    "Comparison",
    "Group",
    "NotComparable",
    "RunSummary",
    "compare",
    "group_runs",
    "load_runs",
    "table",
    "write_csv",
    "write_html",
    "write_json",
    "write_markdown",
    "write_plot",
]

WRITERS = {
    "html": (write_html, "one self-contained page with interactive plots"),
    "plot": (write_plot, "PNG: loss against tokens, FLOPs and time"),
    "csv": (write_csv, "a row a run, every figure"),
    "json": (write_json, "everything but the curves"),
    "markdown": (write_markdown, "the tables"),
}


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="compare_architectures.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_argument_group("which runs")
    which.add_argument("paths", nargs="*", metavar="PATH", help="run_*.json, run_*.jsonl, or folders (default: out)")
    which.add_argument("--out_dir", metavar="DIR", help="a folder of runs, given by name as for train.py")
    which.add_argument("--latest", metavar="N", help="compare only the N runs that started last")
    which.add_argument("--force", action="store_true", help="compare also runs that do not compare, and mark them")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--baseline",
        metavar="NAME",
        help="compare every other group with this one: its name, a part of it, its preset, or a run's "
        "folder (default: each with each)",
    )
    how.add_argument(
        "--metric",
        default=None,
        choices=METRICS,
        help="what is tested (default: val_loss; bits_per_byte where tokenizers differ)",
    )
    how.add_argument(
        "--group_by",
        metavar="KEYS",
        default="",
        help="configuration keys, separated by commas, that make separate rows where they would not (dtype, threads, seed …)",
    )
    how.add_argument("--sort", default="loss", choices=SORT_KEYS, metavar="KEY", help=f"one of {', '.join(SORT_KEYS)}")
    files = parser.add_argument_group("files to write")
    for name, (_, meaning) in WRITERS.items():
        files.add_argument(f"--{name}", metavar="FILE", help=meaning)
    return parser


def run(options: argparse.Namespace) -> None:
    """Load, compare, print, write."""
    try:
        latest = None if options.latest is None else int(options.latest)
    except ValueError:
        latest = 0
    if latest is not None and latest < 1:
        raise UsageError(f"--latest={options.latest} is not a whole number from 1 on.")
    for name in WRITERS:
        if path := getattr(options, name):
            check_target(f"--{name}", path)
    paths = options.paths + ([options.out_dir] if options.out_dir else [])
    runs = load_runs(paths or ["out"], latest, warn=lambda message: print(f"warning: {printable(message)}", file=sys.stderr))
    groups = group_runs(runs, [key for key in options.group_by.split(",") if key])
    comparison = compare(groups, options.baseline, metric=options.metric, force=options.force)
    print(printable(table(comparison, options.sort)))
    if scores := scores_table(runs):
        print(printable(f"\n{scores}"))
    for name, (write, _) in WRITERS.items():
        if path := getattr(options, name):
            write(comparison, path)
            print(printable(f"{name}: {path}"), file=sys.stderr)


def main(argv: list[str]) -> int:
    """Compare the runs; returns the exit code."""

    def job() -> int:
        options = make_parser().parse_args(argv)
        try:
            run(options)
        except ModuleNotFoundError as error:
            package = error.name.split(".")[0]
            raise Failure(f"This needs {package}, which is not installed: pip install {package}.") from error
        return 0

    return guarded("compare_architectures.py", argv, job)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
