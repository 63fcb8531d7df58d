"""Run logs → `RunSummary`: files found, resumed chains joined into one run, curves against tokens, FLOPs and time."""

from __future__ import annotations

import bisect
import os
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from command_line import PROJECT, Failure
from training_logger import read_run

FINISHED = ("finished", "out of patience")  # outcomes of a run that ended by its own rule
LAST_PART = 0.1  # train_loss is the mean over this last part of the run
POSITION = ("step", "tokens", "seconds")  # where a point of a curve lies


@dataclass(frozen=True, eq=False)
class RunSummary:
    """One run as its logs tell it. None: not known, or not measured.

    `curve` has columns of equal length: step, tokens, flops, seconds, loss (of single batches); `evals` the same of the
    evaluations: step, tokens, flops, seconds, val_loss, bits_per_byte. Seconds are those of training, without
    evaluation and saving; FLOPs are those of training by full attention, as in `mfu`.
    """

    name: str  # path of its log (the last one of a resumed chain), without suffix
    paths: tuple[Path, ...]  # the logs joined here, first to last
    started: str  # ISO time of the first log
    ended: str  # ISO time of the last event of the last log
    architecture: str  # the model's name
    fingerprint: str  # the model's
    model: dict[str, Any]  # every field of its ModelConfig
    config: dict[str, Any]  # every key of its configuration, resolved
    dataset: dict[str, Any]  # name, fingerprint; tokenizer and splits where the log has them
    dtype: str | None  # compute dtype
    hardware: str | None
    outcome: str
    steps: int
    length: int | None  # steps it was to make
    tokens_per_step: int | None
    tokens: int  # seen in training
    parameters: int | None  # N
    flops_per_token: int | None
    train_loss: float | None  # mean of what was logged over the last tenth of the run
    val_loss: float | None  # of the last evaluation
    best_val_loss: float | None
    bits_per_byte: float | None  # of the last evaluation
    val_tokens: int | None  # size of its validation set
    tokens_per_s: float | None  # median over the run
    mfu: float | None  # median over the run
    memory_gb: float | None  # peak
    seconds: float | None  # of training
    curve: dict[str, list] = field(repr=False)
    evals: dict[str, list] = field(repr=False)
    notes: tuple[str, ...] = ()  # what a reader must know

    @property
    def seeds(self) -> tuple[Any, Any]:
        """(seed, data_seed)."""
        return self.config.get("seed"), self.config.get("data_seed")

    @property
    def finished(self) -> bool:
        """Whether it ended by its own rule."""
        return self.outcome in FINISHED

    @property
    def state(self) -> str:
        """How it ended, in words: 'finished', 'killed or still running after step 40 of 60' …"""
        if self.finished:
            return self.outcome
        outcome = "killed or still running" if self.outcome == "running" else self.outcome
        return f"{outcome} after step {self.steps}" + (f" of {self.length}" if self.length else "")


# ------------------------------------------------------------------------------------------- finding


def load_runs(
    paths: str | os.PathLike | Iterable[str | os.PathLike],
    latest: int | None = None,
    warn: Callable[[str], None] = lambda message: None,
) -> list[RunSummary]:
    """The runs of these logs (run_*.json or .jsonl) and of all logs below these folders, in the order they started.

    A run that was resumed is one run with what it continued, which is looked for beside it if it was not given.
    `latest`: only so many, the ones that started last. Logs that cannot be read are an error where the file was named;
    of a folder they are left out with a warning. Evaluations (eval_only) are no runs. Raises Failure.
    """
    logs = _Logs()
    evaluations = 0
    for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        path = Path(path).expanduser()
        if not path.exists():
            raise Failure(f"{path} does not exist; give the run_*.json or .jsonl of a run, or a folder of runs.")
        if path.is_dir():
            stems = sorted({_stem(file) for pattern in ("run_*.json", "run_*.jsonl") for file in path.rglob(pattern)})
            if not stems:
                warn(f"{path} holds no run log (run_*.json, run_*.jsonl).")
        else:
            stems = [_stem(path)]
        for stem in stems:
            try:
                evaluations += not logs.add(stem)
            except (ValueError, OSError) as error:
                if not path.is_dir():
                    raise Failure(str(error)) from error
                warn(f"left out: {error}")
    if evaluations:
        warn(f"left out: {evaluations} log{'s' * (evaluations > 1)} of --eval_only, which trained nothing.")
    runs = sorted((logs.summary(stem) for stem in logs.runs()), key=lambda run: run.started)
    return runs if latest is None else runs[-latest:]


def _stem(path: Path) -> Path:
    """What a run's two files have in common: the path without suffix."""
    return path.with_suffix("") if path.suffix in (".json", ".jsonl") else path


class _Logs:
    """Documents by stem (folder/run_…), and which of them continues which."""

    def __init__(self):
        self.documents: dict[Path, dict] = {}
        self.names: dict[Path, Path] = {}  # as the user wrote them
        self.given: set[Path] = set()  # not only looked up because another one continues them

    def add(self, stem: Path, given: bool = True) -> bool:
        """Read a log and those it continues. False if it is of an evaluation only. Raises ValueError."""
        key = stem.resolve()
        if key not in self.documents:
            document = _read(stem)
            if document["config"].get("eval_only"):
                return False
            self.documents[key], self.names[key] = document, stem
            if self.parent(key) is None:
                self._find_parent(key)
        if given:
            self.given.add(key)
        return True

    def _find_parent(self, key: Path) -> None:
        for place in self._places_of_parent(key):
            try:
                self.add(place, given=False)
                return
            except (ValueError, OSError):
                pass  # the run's notes say that its first part is missing

    def _places_of_parent(self, key: Path) -> list[Path]:
        """Where the log that this one continues may lie: beside it (out_dir may have moved), or where it was."""
        if not _continues(self.documents[key]):
            return []
        recorded = _stem(Path(self.documents[key]["resumed_from"]["run"]))
        places = key.parent / recorded.name, recorded, PROJECT / recorded
        return [place for place in places if place.resolve() != key]

    def parent(self, key: Path) -> Path | None:
        """The log that this one continues, if it is here."""
        found = [place.resolve() for place in self._places_of_parent(key)]
        return next((place for place in found if place in self.documents), None)

    def chain(self, key: Path) -> list[Path]:
        """A log and all it continues, first to last."""
        chain = [key]
        while (before := self.parent(chain[0])) is not None and before not in chain:
            chain.insert(0, before)
        return chain

    def runs(self) -> list[Path]:
        """The logs at which a run ends.

        A log is a part of another's run if that one continues it in the same folder, or continues it anywhere and it
        was not finished. Where a folder has several continuations of one start, the last one stands for the run.
        """
        continued = set()
        for key in self.documents:
            before = self.parent(key)
            if before is not None and (before.parent == key.parent or self.documents[before]["outcome"] not in FINISHED):
                continued.add(before)
        newest: dict[Path, Path] = {}
        for key in self.documents:
            if key in self.given - continued:
                start = next(part for part in self.chain(key) if part.parent == key.parent)
                newest[start] = max(newest.get(start, key), key, key=lambda k: str(self.documents[k].get("started")))
        return list(newest.values())

    def summary(self, key: Path) -> RunSummary:
        """One run of all the logs of its chain."""
        return _summary([self.documents[part] for part in self.chain(key)], tuple(self.names[part] for part in self.chain(key)))


def _continues(document: dict) -> bool:
    """Whether a log continues another one in every respect: a start from its weights alone is a new run."""
    origin = document.get("resumed_from") or {}
    weights_only = str(document["config"].get("init_from")).startswith(("weights:", "hf:"))
    return isinstance(origin.get("run"), str) and not weights_only


def _read(stem: Path) -> dict[str, Any]:
    """A run's document from its .json, from its .jsonl where that is newer, missing or whole. Raises ValueError."""
    document_path, events = stem.with_suffix(".json"), stem.with_suffix(".jsonl")
    if document_path.exists():
        try:
            document = read_run(document_path)
        except ValueError:
            if not events.exists():
                raise
            document = read_run(events)
    else:
        document = read_run(events)
    model, config = document.get("model"), document.get("config")
    if not (isinstance(model, dict) and isinstance(config, dict) and {"name", "fingerprint"} <= model.keys()):
        raise ValueError(
            f"{stem} does not say which model with which configuration it trained (model, config); it was "
            "not written by this train.py."
        )
    return document


# ------------------------------------------------------------------------------------------- one run


def _summary(documents: list[dict], paths: tuple[Path, ...]) -> RunSummary:
    """The run that these documents make, each continuing the one before.

    Where one resumes at a step, what those before it logged after that step is superseded.
    """
    first, last = documents[0], documents[-1]
    config, model = last["config"], last["model"]
    flops_per_token = (model.get("flops_per_token") or {}).get("full")
    curve: dict[str, list] = {key: [] for key in (*POSITION, "loss", "tokens_per_s", "mfu", "memory_gb")}
    evals: dict[str, list] = {key: [] for key in (*POSITION, "val_loss", "bits_per_byte", "val_tokens")}
    for document in documents:
        start = (document.get("resumed_from") or {}).get("step") or 0 if _continues(document) else 0
        for columns in (curve, evals):
            kept = sum(step <= start for step in columns["step"])
            for column in columns.values():
                del column[kept:]
        _extend(curve, evals, document, start)
    for columns in (curve, evals):
        columns["flops"] = [flops_per_token and flops_per_token * tokens for tokens in columns["tokens"]]
    losses = [(step, loss) for step, loss in zip(curve["step"], curve["loss"]) if loss is not None]
    steps, tokens = max(
        ((columns["step"][-1], columns["tokens"][-1]) for columns in (curve, evals) if columns["step"]), default=(0, 0)
    )
    val_tokens = evals["val_tokens"][-1] if evals["val_tokens"] else None
    same_set = [loss for loss, size in zip(evals["val_loss"], evals["val_tokens"]) if size == val_tokens]
    notes = []
    if _continues(first):
        origin = first["resumed_from"]
        notes.append(f"the log of its first {origin.get('step')} steps ({origin['run']}) is missing: time counts from there")
    if last.get("warning_count"):
        notes.append(
            f"{last['warning_count']} warning{'s' * (last['warning_count'] > 1)} in its log, the first: "
            f"{last['warnings'][0].get('message')}"
        )
    hardware = last.get("hardware") or {}
    return RunSummary(
        name=str(paths[-1]),
        paths=paths,
        started=str(first.get("started")),
        ended=str(last.get("updated")),
        architecture=str(model["name"]),
        fingerprint=str(model["fingerprint"]),
        model=model.get("config") or {},
        config=config,
        dataset=last.get("dataset") or {},
        dtype=last.get("dtype"),
        hardware=hardware.get("device_name"),
        outcome=last["outcome"],
        steps=steps,
        length=last.get("length"),
        tokens_per_step=last.get("tokens_per_iteration"),
        tokens=tokens,
        parameters=model.get("parameters"),
        flops_per_token=flops_per_token,
        train_loss=_mean(loss for step, loss in losses if step > (1 - LAST_PART) * steps),
        val_loss=evals["val_loss"][-1] if evals["val_loss"] else None,
        best_val_loss=min((loss for loss in same_set if loss is not None), default=None),
        bits_per_byte=evals["bits_per_byte"][-1] if evals["bits_per_byte"] else None,
        val_tokens=val_tokens,
        tokens_per_s=_median(curve["tokens_per_s"]),
        mfu=_median(curve["mfu"]),
        memory_gb=max((value for value in curve["memory_gb"] if value is not None), default=None),
        seconds=curve["seconds"][-1] if curve["seconds"] else None,
        curve=curve,
        evals=evals,
        notes=tuple(notes),
    )


def _extend(curve: dict[str, list], evals: dict[str, list], document: dict, start: int) -> None:
    """Append one document's curves and evaluations; it started at step `start`."""
    logged = document.get("curves") or {}
    count = len(logged.get("step", ()))
    for key in curve.keys() - {"seconds"}:
        curve[key] += logged.get(key) or [None] * count
    seconds = curve["seconds"][-1] if curve["seconds"] else 0.0
    before = curve["step"][-1 - count] if len(curve["step"]) > count else start
    for step, milliseconds in zip(logged.get("step", ()), logged.get("step_ms.total") or [None] * count):
        known = seconds is not None and milliseconds is not None
        seconds = seconds + (step - before) * milliseconds / 1e3 if known else None
        curve["seconds"].append(seconds)
        before = step
    for event in document.get("evals", ()):
        for key in evals.keys() - {"seconds"}:
            evals[key].append(event.get(key))
        evals["seconds"].append(_at(curve["step"], curve["seconds"], event["step"], start))


def _at(steps: list[int], seconds: list[float | None], step: int, start: int) -> float | None:
    """The training time at a step, on the straight line between the logged ones around it, or between `start` and them.

    After the last logged one it is that one's; None where it is not known.
    """
    after = bisect.bisect_left(steps, step)
    if after == len(steps):
        return seconds[-1] if steps else None
    low_step, low = (steps[after - 1], seconds[after - 1]) if after else (start, 0.0)
    if low is None or seconds[after] is None:
        return None
    return low + (seconds[after] - low) * (step - low_step) / (steps[after] - low_step)


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return statistics.fmean(values) if values else None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
