"""The five levels as a picture: how training and validation loss part at each, and what is left of the gap."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comparison.runs import RunSummary, load_runs
from experiments.level_runs import LEVELS, read_index, run_folder
from experiments.level_tests import RESULTS

DPI = 110
TRAIN, VALIDATION, SMOOTHED = "#0072b2", "#d55e00", 9  # colours; logged losses that a point of the training curve is the mean of


def write_curves(out_dir: Path, levels: Sequence[int] | None) -> Path:
    """outputs/training_curves.png, from the run logs of the models in the index. Raises Failure where there are none."""
    from matplotlib.figure import Figure

    entries = read_index(out_dir, levels)
    shown = sorted({entry["level"] for entry in entries})
    figure = Figure(figsize=(15, 8.8))
    margins = {"left": 0.045, "right": 0.955, "top": 0.93, "bottom": 0.065, "hspace": 0.4, "wspace": 0.2}
    panels = figure.subplots(2, 3, gridspec_kw=margins).flatten()
    highest = 1.0
    for panel, level in zip(panels, shown):
        of_level = [entry for entry in entries if entry["level"] == level]
        for number, entry in enumerate(of_level):
            run = finished_run(out_dir, level, entry["seed"])
            if run is None:
                continue
            label = {"label": "training (mean of a few batches)"} if not number else {}
            steps, losses = smoothed(run.curve["step"], run.curve["loss"])
            panel.plot(steps, losses, color=TRAIN, linewidth=1.2, alpha=0.75, **label)
            label = {"label": "validation"} if not number else {}
            panel.plot(run.evals["step"], run.evals["val_loss"], color=VALIDATION, linewidth=1.6, alpha=0.85, **label)
            highest = max([highest, *losses, *(loss for loss in run.evals["val_loss"] if loss is not None)])
        gaps = [entry["gap"] for entry in of_level if entry["gap"] is not None]
        gap = f"gap at the end {statistics.median(gaps):.2f}" if gaps else "gap unknown"
        name, seeds = LEVELS[level].replace("_", " "), len(of_level)
        panel.set_title(f"level {level}, {name}: {of_level[0]['tokens']:,} tokens\n{gap}, {seeds} seed{'s' * (seeds > 1)}")
        panel.set_xlabel("iteration")
        panel.set_ylabel("loss (nats a token)")
    for panel in panels[: len(shown)]:
        panel.set_ylim(0, highest * 1.04)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(shown) : -1]:
        panel.set_visible(False)
    panels[0].legend(frameon=False, fontsize=9)
    plot_gaps(panels[-1], entries, results_of(out_dir))
    path = out_dir / "outputs" / "training_curves.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.new")
    figure.savefig(aside, dpi=DPI, format="png")
    aside.replace(path)
    return path


def plot_gaps(panel: Any, entries: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]]) -> None:
    """The gap of every model against the tokens it has learnt from; beside it the quality, where that was tested."""
    panel.set_title("what is left at the end\na point a seed, lines through the medians")
    by_tokens: dict[int, list[float]] = {}
    for entry in entries:
        if entry["gap"] is not None:
            by_tokens.setdefault(entry["tokens"], []).append(entry["gap"])
    line = {"color": VALIDATION, "linewidth": 1.6, "marker": "o", "markersize": 4}
    panel.plot(sorted(by_tokens), [statistics.median(by_tokens[one]) for one in sorted(by_tokens)], label="gap", **line)
    for tokens, gaps in by_tokens.items():
        panel.plot([tokens] * len(gaps), gaps, ".", color=VALIDATION, alpha=0.6)
    panel.set_xscale("log")
    panel.set_xlabel("tokens to learn from")
    panel.set_ylabel("gap (nats a token)")
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.25)
    panel.spines[["top"]].set_visible(False)
    quality: dict[int, list[float]] = {}
    for one in results:
        if one.get("quality") is not None:
            quality.setdefault(one["tokens"], []).append(one["quality"])
    handles = panel.get_lines()[:1]
    if quality:
        other = panel.twinx()
        other.spines[["top"]].set_visible(False)
        line = {"color": "#009e73", "linewidth": 1.6, "linestyle": "--", "marker": "o", "markersize": 4}
        other.plot(sorted(quality), [statistics.median(quality[one]) for one in sorted(quality)], label="quality", **line)
        for tokens, shares in quality.items():
            other.plot([tokens] * len(shares), shares, ".", color="#009e73", alpha=0.6)
        other.set_ylim(0, 1)
        other.set_ylabel("quality: share of grammatical sentences")
        handles = [*handles, other.get_lines()[0]]
    panel.legend(handles=handles, frameon=False, fontsize=9, loc="upper center")


def results_of(out_dir: Path) -> list[Mapping[str, Any]]:
    """The models that were tested; none where they were not, or the file is not as it was written."""
    try:
        models = json.loads((out_dir / "outputs" / RESULTS).read_text(encoding="utf-8"))["models"]
        return [one for one in models if isinstance(one.get("tokens"), int) and isinstance(one.get("quality"), (int, float))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def finished_run(out_dir: Path, level: int, seed: int) -> RunSummary | None:
    """The finished run of a level and seed; None where its log is gone."""
    folder = run_folder(out_dir, level, seed)
    return next((run for run in load_runs([folder])[::-1] if run.finished), None) if folder.is_dir() else None


def smoothed(steps: Sequence[int], losses: Sequence[float | None]) -> tuple[list[int], list[float]]:
    """Running means over SMOOTHED logged losses, fewer at the ends; what is not known is left out."""
    known = [(step, loss) for step, loss in zip(steps, losses) if loss is not None]
    half = SMOOTHED // 2
    means = [statistics.fmean(loss for _, loss in known[max(0, i - half) : i + half + 1]) for i in range(len(known))]
    return [step for step, _ in known], means
