"""The comparison as text: terminal, Markdown, CSV, JSON."""

from __future__ import annotations

import csv
import dataclasses
import html
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command_line import UsageError, duration, printable, short, text_table
from comparison.groups import METRICS, Comparison, Difference, Group


def _fixed(digits: int) -> Callable[[float | None], str]:
    return lambda value: "–" if value is None else f"{value:,.{digits}f}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)


@dataclass(frozen=True)
class Column:
    """A figure of a run in the table. `better`: −1 where less is, 1 where more is, 0 where neither."""

    key: str  # the attribute of RunSummary, and what --sort takes
    header: str
    show: Callable[[float | None], str]
    better: int = 0
    scatter: bool = False  # with its standard deviation over the seeds
    of_tokens: bool = False  # in nats per token, so comparable between runs of one tokenizer only
    of_hardware: bool = False  # comparable on one kind of hardware only
    of_time: bool = False  # comparable between runs that had the machine for themselves only


COLUMNS = (
    Column("parameters", "N", short),
    Column("flops_per_token", "FLOP/token", short),
    Column("tokens", "tokens", short),
    Column("train_loss", "train loss", _fixed(4), -1, of_tokens=True),
    Column("val_loss", "val loss", _fixed(4), -1, scatter=True, of_tokens=True),
    Column("bits_per_byte", "bits/byte", _fixed(4), -1),
    Column("tokens_per_s", "tok/s", _fixed(0), 1, of_hardware=True, of_time=True),
    Column("mfu", "MFU", lambda value: "–" if value is None else f"{value:.1%}", 1, of_hardware=True, of_time=True),
    Column("memory_gb", "GB", _fixed(2), -1, of_hardware=True),
    Column("seconds", "time", _time, -1, of_hardware=True, of_time=True),
)
SORT_KEYS = ("loss", "name", *(column.key for column in COLUMNS))
FOOTNOTES = (
    "val loss: of the last evaluation, mean ± standard deviation over the seeds; train loss: over the last tenth of the run.",
    "time: of training, without evaluation and saving; FLOP/token: of training, full attention.",
)
MARK = "* the best of its column; whether a difference is more than chance is said below."


# ------------------------------------------------------------------------------------------- the table


def cells(comparison: Comparison, sort: str = "loss") -> tuple[list[str], list[list[str]], set[tuple[int, int]]]:
    """(header, rows of text, {(row, column) that is the best of its column}), a row a group. Raises UsageError."""
    if sort not in SORT_KEYS:
        raise UsageError(f"--sort={sort!r} is not one of {', '.join(SORT_KEYS)}.")
    groups = sorted_groups(comparison, sort)
    columns = list(COLUMNS)
    if comparison.metric == "best_val_loss":
        place = next(i for i, column in enumerate(columns) if column.key == "val_loss")
        columns.insert(place + 1, Column("best_val_loss", "best val loss", _fixed(4), -1, scatter=True, of_tokens=True))
    rows = [[column_text(column, group) for column in columns] for group in groups]
    flagged = comparison.flagged
    lossy = {group.name for group in groups if group.lost(comparison.metric)}
    same_hardware, shared = len({run.hardware for run in comparison.runs}) == 1, comparison.machine_was_shared
    best = set()
    for number, column in enumerate(columns):
        values = {row: group.mean(column.key) for row, group in enumerate(groups) if group.name not in {*flagged, *lossy}}
        shown = {row: column.show(value) for row, value in values.items() if value is not None}
        if column.of_hardware and not same_hardware or column.of_time and shared:
            continue
        if column.of_tokens and comparison.tokenizers_differ:
            continue
        if column.better and len(set(shown.values())) > 1:
            winner = shown[max(shown, key=lambda row: column.better * values[row])]
            best |= {(row, number + 1) for row, text in shown.items() if text == winner}
    header = ["seeds", *[column.header for column in columns], "architecture"]
    body = []
    for group, row in zip(groups, rows):
        name = group.name + (" (baseline)" if group.name == comparison.baseline else "")
        name += f" [not comparable: {flagged[group.name]}]" if group.name in flagged else ""
        body.append([str(len({run.seeds for run in group.runs})), *row, name])
    return header, body, best


def sorted_groups(comparison: Comparison, sort: str = "loss") -> list[Group]:
    """The groups by a column, its best first; unknown figures last."""
    if sort == "name":
        return sorted(comparison.groups, key=lambda group: group.name)
    key = comparison.metric if sort == "loss" else sort
    sign = next((-1 for column in COLUMNS if column.key == key and column.better > 0), 1)
    return sorted(comparison.groups, key=lambda g: (g.mean(key) is None, sign * (g.mean(key) or 0)))


def column_text(column: Column, group: Group) -> str:
    """One figure of a group: the mean, with its scatter where the column shows it."""
    found = group.estimate(column.key)
    text = column.show(found and found.mean)
    return f"{text} ± {found.sd:.4f}" if column.scatter and found and found.sd is not None else text


def table(comparison: Comparison, sort: str = "loss") -> str:
    """What the terminal shows: a row a group, sorted, the best marked; then each difference in a sentence; notes."""
    header, rows, best = cells(comparison, sort)
    rows = [
        [
            text + ("*" if (r, c) in best else " " if any((other, c) in best for other in range(len(rows))) else "")
            for c, text in enumerate(row)
        ]
        for r, row in enumerate(rows)
    ]
    lines = [text_table(header, rows, "r" * (len(header) - 1) + "l")]
    lines += ["", *([MARK] if best else []), *FOOTNOTES]
    if comparison.differences:
        lines += ["", *verdicts(comparison)]
    if comparison.notes or comparison.problems:
        lines += [
            "",
            *[f"note: {note}" for note in comparison.notes],
            *[f"not comparable: {problem.sentence}" for problem in comparison.problems],
        ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------- differences


def verdicts(comparison: Comparison) -> list[str]:
    """A sentence for each difference, one about how many were tested together, one about what cannot be tested."""
    labels = comparison.labels
    tested = [found for found in comparison.differences if found.test.p is not None]
    lines = [sentence(found, comparison.metric, labels) for found in tested]
    further = sum(test.p is not None for test in comparison.also)
    if len(tested) + further > 1:
        lines.append(
            f"{len(tested) + further} comparisons{f' ({further} of them of factors)' if further else ''}: p and intervals are "
            "adjusted by Holm's procedure, so that the chance of any false claim among them is at most 5 %."
        )
    untested = [found for found in comparison.differences if found.test.p is None]
    if any(found.test.untested == "seeds" for found in untested):
        alone = [labels[group.name] for group in comparison.groups if len(group.values(comparison.metric)) == 1]
        lines.append(
            f"nothing can be said of the difference between one that has a single seed ({', '.join(alone)}) "
            "and any other: error bars need at least two seeds of each (--seed, --data_seed)."
        )
    return lines + [sentence(found, comparison.metric, labels) for found in untested if found.test.untested == "scatter"]


def sentence(found: Difference, metric: str, labels: dict[str, str] | None = None) -> str:
    """What a comparison of two groups shows, under these names."""
    test, name = found.test, METRICS[metric]
    a, b = (labels or {}).get(found.a, found.a), (labels or {}).get(found.b, found.b)
    flag = " (not comparable, but forced)" if found.problems else ""
    if test.untested == "scatter":
        return (
            f"{a} and {b}{flag}: {name} {test.difference:+.4f} from the first to the second with every seed. Figures that do "
            "not vary from seed to seed are no independent repetitions, so nothing is claimed."
        )
    if test.p_holm is None:
        return (
            f"{a} and {b}{flag}: {name} {test.difference:+.4f} from the first to the second, of which nothing can "
            f"be said with {test.n[0]} and {test.n[1]} seeds; error bars need at least two of each."
        )
    made = f"{test.method} over {test.seeds}, {p_text(test.p_holm)}"
    if not test.shown:
        return (
            f"no difference shown between {a} and {b}{flag}: {name} {test.difference:+.4f} from the first to the "
            f"second ({percent(test.level)} interval {test.low:+.4f} to {test.high:+.4f}; {made}); a difference of "
            f"{test.detectable:.4f} would have been seen 4 times out of 5."
        )
    lower, higher = (b, a) if test.difference < 0 else (a, b)
    least, most = sorted((abs(test.low), abs(test.high)))
    size = f"by {abs(test.difference):.4f} ({percent(test.level)} interval {least:.4f} to {most:.4f}; {made})"
    if found.withheld:
        return f"nothing better is claimed of {lower}{flag}, whose {name} is lower than {higher}'s {size}: {found.withheld}."
    return f"{lower} has a lower {name} than {higher}{flag}: {size}."


def percent(level: float) -> str:
    """A confidence level: 95 %, 98.3 %."""
    return f"{100 * level:.3g} %" if level < 0.999 else f"{100 * level:.5g} %"


def p_text(p: float) -> str:
    """p = 0.012, or p < 0.001."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


# ------------------------------------------------------------------------------------------- files


def write_markdown(comparison: Comparison, path: str | os.PathLike) -> None:
    """The table, the differences, what differs in model and configuration, and the runs, as Markdown."""
    header, rows, best = cells(comparison)
    rows = [[f"**{text}**" if (r, c) in best else text for c, text in enumerate(row)] for r, row in enumerate(rows)]
    clean = _for_markdown
    parts = [
        "# Comparison",
        _markdown_table(header, rows),
        "\n".join(f"- {clean(line)}" for line in verdicts(comparison)),
        " ".join(("Bold: the best of its column.", *FOOTNOTES)),
    ]
    names = [comparison.labels[group.name] for group in comparison.groups]
    for title, found in (
        ("What differs in the models", comparison.component_rows),
        ("What differs in the configuration", comparison.config_rows),
    ):
        if found:
            parts += [f"## {title}", _markdown_table(["key", *names], [[row[0], *map(said, row[1:])] for row in found])]
    parts += ["## Runs", _markdown_table(*run_rows(comparison))]
    if comparison.notes or comparison.problems:
        parts += [
            "## Notes",
            "\n".join(
                [f"- {clean(note)}" for note in comparison.notes]
                + [f"- Not comparable: {clean(problem.sentence)}" for problem in comparison.problems]
            ),
        ]
    Path(path).write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def run_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """(header, rows), a row a run: which runs a group is made of."""
    header = ["run", "group", "seed", "data_seed", "ended", "tokens", "train loss", "val loss", "bits/byte"]
    loss = _fixed(4)
    return header, [
        [
            run.name,
            comparison.labels[group.name],
            *map(str, run.seeds),
            run.state,
            f"{run.tokens:,}",
            loss(run.train_loss),
            loss(run.val_loss),
            loss(run.bits_per_byte),
        ]
        for group in comparison.groups
        for run in group.runs
    ]


def said(value: Any) -> str:
    """A configuration value as a table shows it."""
    if type(value) is int and value >= 100_000:
        return f"{value:,}"
    return "–" if value is None else str(value)


def _markdown_table(header: list[str], rows: list[list[str]]) -> str:
    def line(row: list[str]) -> str:
        return "| " + " | ".join(_for_markdown(text).replace("|", "\\|").replace("\n", " ") for text in row) + " |"

    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])


RUN_FIELDS = (
    "name",
    "started",
    "architecture",
    "fingerprint",
    "dtype",
    "hardware",
    "outcome",
    "steps",
    "length",
    "tokens",
    "tokens_per_step",
    "parameters",
    "flops_per_token",
    "train_loss",
    "val_loss",
    "best_val_loss",
    "bits_per_byte",
    "val_tokens",
    "tokens_per_s",
    "mfu",
    "memory_gb",
    "seconds",
)


def run_facts(comparison: Comparison) -> list[dict[str, Any]]:
    """Every figure of every run, in full."""
    return [
        {
            "group": group.name,
            "seed": run.seeds[0],
            "data_seed": run.seeds[1],
            "dataset": run.dataset.get("name"),
            **{key: getattr(run, key) for key in RUN_FIELDS},
            "not_comparable": comparison.flagged.get(run.name),
        }
        for group in comparison.groups
        for run in group.runs
    ]


def write_csv(comparison: Comparison, path: str | os.PathLike) -> None:
    """A row a run, every figure in full; empty where it is not known."""
    rows = run_facts(comparison)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=rows[0])
        writer.writeheader()
        writer.writerows({key: _for_sheet(value) for key, value in row.items()} for row in rows)


def _for_sheet(value: Any) -> Any:
    """A cell that a spreadsheet shows as it stands: a text that it would take for a formula gets an apostrophe before it."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.lstrip()[:1] in ("=", "+", "-", "@") else text


def _for_markdown(text: str) -> str:
    """Text that Markdown shows as it stands: no tag, no link, no control character."""
    return printable(html.escape(text, quote=False)).replace("](", "]\\(")


def write_json(comparison: Comparison, path: str | os.PathLike) -> None:
    """The whole comparison as one strict JSON document, without curves."""
    document = {
        "metric": comparison.metric,
        "baseline": comparison.baseline,
        "best": comparison.best and comparison.best.name,
        "groups": [
            {
                "name": group.name,
                "runs": [run.name for run in group.runs],
                **{
                    key: dataclasses.asdict(found) if (found := group.estimate(key)) else None
                    for key in (*METRICS, "tokens_per_s", "mfu", "memory_gb", "seconds")
                },
            }
            for group in comparison.groups
        ],
        "differences": [
            {
                "a": found.a,
                "b": found.b,
                **dataclasses.asdict(found.test),
                "shown": found.test.shown,
                "claimed": found.claimed,
                "withheld": found.withheld,
                "sentence": sentence(found, comparison.metric),
            }
            for found in comparison.differences
        ],
        "model_differences": _by_group(comparison, comparison.component_rows),
        "config_differences": _by_group(comparison, comparison.config_rows),
        "runs": [{**facts, "config": run.config} for facts, run in zip(run_facts(comparison), comparison.runs)],
        "notes": comparison.notes,
        "problems": [problem.sentence for problem in comparison.problems],
    }
    Path(path).write_text(json.dumps(_finite(document), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _by_group(comparison: Comparison, rows: tuple[tuple, ...]) -> dict[str, dict[str, Any]]:
    return {row[0]: dict(zip([group.name for group in comparison.groups], row[1:])) for row in rows}


def _finite(value: Any) -> Any:
    """The value with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
