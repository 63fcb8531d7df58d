"""The comparison as pictures: a PNG by matplotlib, and one interactive page by plotly.js that needs nothing else."""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from command_line import printable
from comparison.groups import METRICS, Comparison, Group
from comparison.inference import estimate
from comparison.report import FOOTNOTES, cells, run_rows, said, verdicts
from comparison.runs import RunSummary

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#444444", "#8c6d31")  # Okabe & Ito, nearly
AXES = {"tokens": "training tokens", "flops": "training FLOPs", "seconds": "training time"}
TIME_UNITS = ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))
PAGE = Path(__file__).with_name("page.html")


def write_plot(comparison: Comparison, path: str | os.PathLike) -> None:
    """A PNG: the loss against tokens, FLOPs and training time; a thin line a run, a thick one the mean over the seeds.

    The band is the 95 % confidence interval of a mean over three seeds or more. Runs with fewer than two evaluations
    show their training loss.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    metric = _plotted(comparison)
    figure = Figure(figsize=(15, 4.8 + 0.2 * len(comparison.groups)), layout="constrained")
    axes = figure.subplots(1, len(AXES), sharey=True)
    divisor, unit = time_unit(comparison)
    for (axis, label), plot in zip(AXES.items(), axes):
        for number, group in enumerate(comparison.groups):
            color, style = COLORS[number % len(COLORS)], ("-", "--", ":", "-.")[number // len(COLORS) % 4]
            lines = [points for run in group.runs if (points := _points(run, axis, metric))]
            if axis == "seconds":
                lines = [([x / divisor for x in xs], ys) for xs, ys in lines]
            mean = mean_line(lines)
            for x, y in lines:
                plot.plot(
                    x,
                    y,
                    style,
                    color=color,
                    linewidth=0.7 if mean else 1.6,
                    alpha=0.45 if mean else 1.0,
                    marker="." if len(x) < 30 else None,
                    markersize=4,
                )
            if mean:
                x, y, low, high = mean
                plot.plot(x, y, style, color=color, linewidth=2, zorder=3)
                if len(lines) > 2:  # of two the interval would fill the picture
                    plot.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0, zorder=1)
            if axis == "tokens":
                plot.plot(
                    [], [], style, color=color, linewidth=2, label=_label(comparison, group).replace("$", r"\$")
                )  # no formula
        plot.set_xlabel(f"{label} ({unit})" if axis == "seconds" else label)
        if axis != "seconds":
            plot.xaxis.set_major_formatter(EngFormatter(sep=""))
        plot.grid(alpha=0.25)
        plot.spines[["top", "right"]].set_visible(False)
        plot.margins(x=0.02)
    axes[0].set_ylabel(METRICS[metric])
    low, high = _loss_range(comparison, metric)
    axes[0].set_ylim(low, high)
    figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130, format=Path(path).suffix.lstrip(".") or "png")


def time_unit(comparison: Comparison) -> tuple[int, str]:
    """(seconds, name) of the unit in which the longest run's training time is a number of a few digits."""
    longest = max((run.seconds or 0 for run in comparison.runs), default=0)
    return next((size, name) for size, name in TIME_UNITS if longest >= 2 * size or size == 1)


def _plotted(comparison: Comparison) -> str:
    """What is drawn over time: bits per byte where that is compared, else the validation loss if it was taken twice."""
    metric = "bits_per_byte" if comparison.metric == "bits_per_byte" else "val_loss"
    few = all(len(run.evals["step"]) < 2 for run in comparison.runs)
    return "train_loss" if few or comparison.metric == "train_loss" else metric


def _points(run: RunSummary, axis: str, metric: str) -> tuple[list, list] | None:
    """(x, y) of a run's curve, without what is not known; None if nothing is left."""
    columns = run.curve if metric == "train_loss" else run.evals
    pairs = [
        (x, y)
        for x, y in zip(columns[axis], columns["loss" if metric == "train_loss" else metric])
        if x is not None and y is not None
    ]
    return tuple(map(list, zip(*pairs))) if pairs else None


def mean_line(lines: Sequence[tuple[list, list]]) -> tuple[list, list, list, list] | None:
    """(x, mean, low, high) of several runs' points of equal number; None where there is no mean to draw."""
    if len(lines) < 2 or len({len(x) for x, _ in lines}) > 1:
        return None
    xs = [sum(column) / len(column) for column in zip(*[x for x, _ in lines])]
    found = [estimate(column) for column in zip(*[y for _, y in lines])]
    return xs, [e.mean for e in found], [e.low for e in found], [e.high for e in found]


def _loss_range(comparison: Comparison, metric: str) -> tuple[float, float]:
    """Limits of the loss axis that leave out the fall of the first few points and show where the runs part."""
    every = [y for run in comparison.runs if (points := _points(run, "tokens", metric)) for y in points[1]]
    if not every:
        return 0.0, 1.0
    late = [y for run in comparison.runs if (points := _points(run, "tokens", metric)) for y in points[1][len(points[1]) // 10 :]]
    margin = 0.05 * (max(late) - min(every)) or 0.1
    return min(every) - margin, max(late) + margin


def _label(comparison: Comparison, group: Group) -> str:
    count = len(group.runs)
    flag = comparison.flagged.get(group.name)
    label = (
        comparison.labels[group.name]
        + (f" ({count} seeds)" if count > 1 else "")
        + (f" [not comparable: {flag}]" if flag else "")
    )
    return printable(label)


# ------------------------------------------------------------------------------------------- the page


def write_html(comparison: Comparison, path: str | os.PathLike) -> None:
    """One self-contained page: verdicts, table, interactive plots, what differs, the runs. Needs no network.

    The page's own policy forbids the browser to load anything, so that this stays true.
    """
    from plotly.offline import get_plotlyjs

    header, rows, best = cells(comparison)
    names = list(comparison.labels.values())
    warnings = [f"not comparable: {problem.sentence}" for problem in comparison.problems]
    parts = {
        "plotly": get_plotlyjs(),
        "data": _for_script(page_data(comparison)),
        "verdicts": _list(verdicts(comparison)) or "<p>One group: there is nothing to compare.</p>",
        "table": _table(header, rows, best),
        "footnotes": html.escape(" ".join(("Bold: the best of its column.", *FOOTNOTES))),
        "components": _diff(names, comparison.component_rows, "The models are the same."),
        "config": _diff(names, comparison.config_rows, "The configurations are the same."),
        "runs": _table(*run_rows(comparison)),
        "notes": _list(warnings + list(comparison.notes)) or "<p>None.</p>",
    }
    template = PAGE.read_text(encoding="utf-8")
    Path(path).write_text(re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template), encoding="utf-8")


def page_data(comparison: Comparison) -> dict[str, Any]:
    """What the page's script draws: curves of every run by group, and the final figures with their intervals."""
    divisor, unit = time_unit(comparison)

    def columns(source: dict[str, list], *keys: str) -> dict[str, list]:
        return {
            key: [
                value and float(f"{value / (divisor if key == 'seconds' else 1):.7g}")  # more than a screen shows
                for value in source[key]
            ]
            for key in (*AXES, *keys)
        }

    groups = []
    for number, group in enumerate(comparison.groups):
        found = group.estimate(comparison.metric)
        runs = [
            {
                "name": run.name,
                "seed": run.seeds[0],
                "final": getattr(run, comparison.metric),
                "train": columns(run.curve, "loss"),
                "evals": columns(run.evals, "val_loss", "bits_per_byte"),
            }
            for run in group.runs
        ]
        groups.append(
            {
                "name": _label(comparison, group),
                "color": COLORS[number % len(COLORS)],
                "runs": runs,
                "mean": found and found.mean,
                "low": found and found.low,
                "high": found and found.high,
            }
        )
    return {
        "groups": groups,
        "axes": {**AXES, "seconds": f"training time ({unit})"},
        "metric": METRICS[comparison.metric],
        "start": _plotted(comparison),
        "bits": any(run.bits_per_byte is not None for run in comparison.runs),
    }


def _for_script(value: Any) -> str:
    """JSON that stands in a script element without ending it."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def _diff(names: list[str], rows: Sequence[tuple], otherwise: str) -> str:
    """A table of what differs, a column a group."""
    if not rows:
        return f"<p>{html.escape(otherwise)}</p>"
    return _table(["key", *names], [[row[0], *map(said, row[1:])] for row in rows])


def _table(header: list[str], rows: list[list[str]], best: set[tuple[int, int]] = frozenset()) -> str:
    def cell(tag: str, text: str, attributes: str = "") -> str:
        return f"<{tag}{attributes}>{html.escape(text)}</{tag}>"

    lines = ["<tr>" + "".join(cell("th", text) for text in header) + "</tr>"]
    for r, row in enumerate(rows):
        lines.append(
            "<tr>" + "".join(cell("td", text, ' class="best"' if (r, c) in best else "") for c, text in enumerate(row)) + "</tr>"
        )
    return '<div class="scroll"><table>' + "\n".join(lines) + "</table></div>"
