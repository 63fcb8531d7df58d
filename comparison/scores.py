"""Scores that score.py wrote beside runs, for compare_architectures.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from command_line import Mandatory, check_shape, parse_json, text_table
from comparison.runs import RunSummary

FIGURES = (("loss", 4), ("perplexity", 3), ("bits_per_byte", 4), ("word_perplexity", 3))

SCORE = Mandatory(  # what is relied on here
    {
        "text": Mandatory({"name": Mandatory(str), "split": str}),
        "model": Mandatory({"step": int}),
        "how": Mandatory({"context": Mandatory(int), "stride": int}),
        "score": Mandatory({"loss": Mandatory(float), "perplexity": float, "bits_per_byte": float, "word_perplexity": float}),
    }
)


def scores_of(run: RunSummary) -> list[dict[str, Any]]:
    """The scores in a run's folder, by the text that they are of and by step; files that are none are passed over."""
    found = []
    for path in sorted(Path(run.paths[-1]).parent.glob("score_*.json")):
        try:
            document = parse_json(path.read_text(encoding="utf-8"))
            check_shape(document, SCORE)
        except (OSError, ValueError):
            continue
        key = (document["text"]["name"], document["model"].get("step") or 0)
        found.append((key, str(path), document))
    return [document for _, _, document in sorted(found, key=lambda entry: entry[:2])]


def scores_table(runs: list[RunSummary]) -> str:
    """A row a score; empty where no run has any. Scores compare where text and windows are the same."""
    rows, folders = [], {}
    for run in runs:
        folders.setdefault(Path(run.paths[-1]).parent, run)  # a folder's scores once
    for run in folders.values():
        for document in scores_of(run):
            text, how, score = document["text"], document["how"], document["score"]
            label = text["name"] + (f" ({text['split']})" if text.get("split") else "")
            window = f"{how['context']}" + (f"/{how['stride']}" if how.get("stride") else "")
            figures = ["" if score.get(key) is None else f"{score[key]:.{digits}f}" for key, digits in FIGURES]
            rows.append([label, window, *figures, str(document["model"].get("step")), run.name])
    if not rows:
        return ""
    header = ("scored on", "window", "loss", "perplexity", "bits/byte", "a word", "step", "run")
    return text_table(header, sorted(rows, key=lambda row: row[:2]), "lrrrrrrl")
