"""One run, one log: `run_<date>_<time>.jsonl`, an event a line as it happens, and `.json`, the same run as one document.

The `.jsonl` is the truth: append-only, one strict-JSON object a line with "event" and "time", what `tail -f` follows.
Events: run_start, step, eval, checkpoint, warning, stats, sample, run_end. The `.json` document is what
`compare_architectures.py` reads; `rebuild` makes the same document from the `.jsonl` of a run that was killed,
through the same `RunDocument`.

JSON has no NaN: a non-finite number under `key` is written as `"key": null, "key_repr": "nan"` ("inf", "-inf"), so that a
diverged loss differs from one that was not measured. Inside a list it becomes null.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import functools
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from command_line import Mandatory, check_shape, parse_json

SCHEMA_VERSION = 1
CURVE_POINTS = 2000  # most points the document keeps of a curve
WARNINGS_KEPT = 100  # the document keeps the first ones and counts all
PENDING_LINES = 10_000  # lines held in memory while the disk is full


class RunLogError(OSError):
    """The log cannot be written. The message says which file, why and what to do."""

    def __init__(self, error: OSError, path: Path):
        remedy = (
            "Free some space"
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            else "Choose an out_dir that can be written to"
        )
        super().__init__(error.errno, f"cannot write the run log {path}: {error.strerror or error}. {remedy}.")

    def __str__(self) -> str:
        return self.strerror


# ------------------------------------------------------------------------------------------ the document


class RunDocument:
    """The events of one run, reduced one by one to one document, whose curves are bounded.

    What happens again at a step (after a resume) replaces what happened there before. Of the steps, one is kept for every
    `stride` numbers: the last logged. The stride doubles whenever more than CURVE_POINTS are kept, so that a step costs
    O(1) amortised; the newest step is always kept.
    """

    def __init__(self, run: str):
        self._facts: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "run": run,
            "outcome": "running",
            "started": None,
            "updated": None,
        }
        self._stride = 1
        self._steps: dict[int, tuple[int, dict | bytes]] = {}  # step // stride -> (step, its last event or line)
        self._last_step: dict | bytes | None = None
        self._evals: dict[int, dict] = {}
        self._checkpoints: dict[int, dict] = {}
        self._warnings: list[dict] = []
        self._warning_count = 0
        self._summary: dict[str, Any] = {}

    def add(self, event: dict[str, Any]) -> None:
        """Take in one event: an object of the `.jsonl`."""
        self._facts["updated"] = event["time"]
        fields = {key: value for key, value in event.items() if key != "event"}
        match event["event"]:
            case "run_start":
                fields["started"] = fields.pop("time")
                self._facts.update(fields)
            case "step":
                self._add_step(fields["step"], fields)
            case "eval":
                self._evals[fields["step"]] = fields
            case "checkpoint":
                self._checkpoints[fields["step"]] = fields
            case "warning":
                self._warning_count += 1
                if len(self._warnings) < WARNINGS_KEPT:
                    self._warnings.append(fields)
            case "run_end":
                fields.pop("time")
                self._facts["outcome"] = fields.pop("outcome")
                self._summary = fields

    def add_step_line(self, step: int, time: str, line: bytes) -> None:
        """Take in a step event by its line, unparsed: of a long run most are thinned out before anybody needs them."""
        self._facts["updated"] = time
        self._add_step(step, line)

    def _add_step(self, step: int, fields: dict[str, Any] | bytes) -> None:
        self._last_step = fields
        self._steps[step // self._stride] = step, fields
        while len(self._steps) > CURVE_POINTS:
            self._stride *= 2
            self._steps = {point[0] // self._stride: point for _, point in sorted(self._steps.items())}

    def as_dict(self) -> dict[str, Any]:
        """The document. `curves` has one column a number of the step events (`step_ms.total` for nested ones)."""
        points = [dict(_flat(_parsed(point))) for _, (_, point) in sorted(self._steps.items())]
        columns = dict.fromkeys(
            key
            for point in points
            for key, value in point.items()
            if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
        )
        return {
            **self._facts,
            "evals": [self._evals[step] for step in sorted(self._evals)],
            "checkpoints": [self._checkpoints[step] for step in sorted(self._checkpoints)],
            "warnings": self._warnings,
            "warning_count": self._warning_count,
            "curves": {"stride": self._stride, **{key: [point.get(key) for point in points] for key in columns}},
            "last_step": _parsed(self._last_step),
            "summary": self._summary,
        }


def _flat(fields: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of a nested dict, the keys joined by dots."""
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _parsed(step: dict[str, Any] | bytes | None) -> dict[str, Any] | None:
    """A step event's fields, from its line where it is one."""
    if isinstance(step, bytes):
        return {key: value for key, value in parse_json(step).items() if key != "event"}
    return step


_STEP_LINE = re.compile(rb'\{"event": "step", "time": "([^"\\]*)", "step": (\d+), [^\n]*\}\n')

# What readers rely on in an event, by its name, and in a run's document. All else may be there.
_COUNTS = {"tokens": int, "bytes": int, "documents": int}
_FACTS = {
    "schema_version": Mandatory(int),
    "run": str,
    "dtype": str,
    "length": int,
    "tokens_per_iteration": int,
    "resumed_from": {"run": str, "checkpoint": str, "step": int},
    "config": {"dataset": str, "out_dir": str, "*": object},
    "origins": dict,
    "model": {
        "name": str,
        "fingerprint": str,
        "config": {"*": object},
        "parameters": float,
        "flops_per_token": {"full": float, "causal": float, "hardware": float},
    },
    "dataset": {"name": str, "fingerprint": str, "tokenizer": {"fingerprint": str}, "splits": {"*": _COUNTS}},
    "hardware": {"device_name": str},
}
_EVAL = {"step": Mandatory(int), "tokens": Mandatory(int), "val_loss": float, "bits_per_byte": float, "val_tokens": int}
_TIME = {"event": Mandatory(str), "time": Mandatory(str)}
EVENTS = {
    "run_start": _FACTS,
    "step": {"step": Mandatory(int), "tokens": Mandatory(int), "loss": float, "step_ms": {"total": float}},
    "eval": _EVAL,
    "checkpoint": {"step": Mandatory(int)},
    "warning": {"message": str},
    "run_end": {"outcome": Mandatory(str)},
}
DOCUMENT = {
    **_FACTS,
    "outcome": Mandatory(str),
    "started": str,
    "updated": str,
    "evals": [Mandatory(_EVAL)],
    "curves": {"*": [float], "step": [Mandatory(int)], "tokens": [Mandatory(int)], "stride": int},
    "warnings": [Mandatory({"message": str})],
    "warning_count": int,
}


def check_document(document: Any, path: Path) -> None:
    """Hold a run's document against its declared shape. Raises ValueError that names the file and the place in it."""
    try:
        check_shape(document, Mandatory(DOCUMENT))
        curves = document.get("curves") or {}
        steps = curves.get("step") or []
        if any(after <= before for before, after in zip(steps, steps[1:])):
            raise ValueError("curves.step does not grow from one to the next")
        if steps and not curves.get("tokens"):
            raise ValueError("curves has no tokens")
        for key, column in curves.items():
            if isinstance(column, list) and len(column) != len(steps):
                raise ValueError(f"curves.{key} has {len(column)} values for {len(steps)} steps")
    except ValueError as error:
        raise ValueError(f"{path} is not the document of a run: {error}.") from None


def rebuild(jsonl_path: str | os.PathLike) -> dict[str, Any]:
    """The document of a run from its `.jsonl` alone. A last line cut short by a kill is left out.

    Of the step lines that the document's curves leave out, only the outer form is looked at: a million are read in
    seconds. ValueError if the file has no run_start, is damaged elsewhere, or was written by a later version.
    """
    try:
        return _reduced(Path(jsonl_path), skim=True)
    except json.JSONDecodeError:  # in a line that looked sound: find out which
        return _reduced(Path(jsonl_path), skim=False)


def _reduced(path: Path, skim: bool) -> dict[str, Any]:
    """What `rebuild` returns. `skim`: leave step lines unparsed until they are needed."""
    document = RunDocument(path.stem)
    started = False
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            step = _STEP_LINE.fullmatch(line) if skim else None
            if step and line.count(b"{") == line.count(b"}"):
                document.add_step_line(int(step[2]), step[1].decode(), line)
                continue
            if not line.strip():
                continue
            try:
                event = parse_json(line)
                check_shape(event, Mandatory(_TIME), "the line")
                check_shape(event, EVENTS.get(event["event"], {}))
                if event["event"] == "run_start":
                    _check_schema(event, path)
                    started = True
                document.add(event)
            except LaterVersion:
                raise
            except (ValueError, KeyError, TypeError) as error:
                if not line.endswith(b"\n"):
                    break  # every whole line ends in a newline: this one was cut
                raise ValueError(
                    f"{path}, line {number}, is not an event of a run log ({error}). The file is damaged; "
                    "remove that line to read the rest."
                ) from None
    if not started:
        raise ValueError(f"{path} has no run_start event: it is not a run log, or its run ended before it began.")
    whole = document.as_dict()
    check_document(whole, path)  # also of the lines that were only looked at
    return whole


class LaterVersion(ValueError):
    """A file that a later version of kitbash wrote."""


def read_run(path: str | os.PathLike) -> dict[str, Any]:
    """The document of a run from its `.json` or its `.jsonl`.

    A `.json` that still says "running" is behind its `.jsonl`, which is then read instead, if it lies beside it.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        return rebuild(path)
    try:
        document = parse_json(path.read_bytes())
        outcome = document["outcome"]
        check_shape(document["schema_version"], Mandatory(int), "schema_version")
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not the document of a run (run_*.json).") from None
    _check_schema(document, path)
    check_document(document, path)
    events = path.with_suffix(".jsonl")
    return rebuild(events) if outcome == "running" and events.exists() else document


def remove_leftovers(out_dir: str | os.PathLike) -> None:
    """Remove what killed training runs left of a document. Only for who holds the out_dir's lock: then they are dead.

    An evaluation needs no lock, and may be writing its own at this moment.
    """
    for probe in Path(out_dir).glob(".probe_*"):  # of a start that was killed
        with contextlib.suppress(OSError):
            if time.time() - probe.stat().st_mtime > 5:
                probe.unlink()
    for aside in Path(out_dir).glob(".run_*.json.tmp"):
        try:
            log = aside.with_name(aside.name.removeprefix(".").removesuffix(".json.tmp") + ".jsonl")
            with open(log, encoding="utf-8") as events:
                if not parse_json(events.readline())["config"]["eval_only"]:
                    aside.unlink()
        except (OSError, ValueError, KeyError, TypeError):
            pass


def _check_schema(facts: dict[str, Any], path: Path) -> None:
    if facts["schema_version"] > SCHEMA_VERSION:
        raise LaterVersion(
            f"{path} has schema version {facts['schema_version']}, this code reads up to {SCHEMA_VERSION}. "
            "Use the version of kitbash that wrote it, or a later one."
        )


# -------------------------------------------------------------------------------------------- the logger


class TrainingLogger:
    """Writes the log of one run into `out_dir`. Rank 0's is enabled; a disabled one takes every call and does nothing.

    A directory or file that cannot be written raises RunLogError from the constructor or `start`. A disk that fills up
    later does not stop the run: one line on stderr, then lines wait in memory and are tried again with each event.

    `resumed_from`: {"run", "checkpoint", "step"} of the run that this one continues. Readers who join the two keep the last
    occurrence of a step.
    """

    def __init__(self, out_dir: str | os.PathLike, *, enabled: bool = True, resumed_from: dict[str, Any] | None = None):
        self.trackers: list[Any] = []  # take every event too; one that fails is left out from then on
        self.path: Path | None = None  # the .jsonl
        self.document_path: Path | None = None  # the .json
        self._resumed_from = resumed_from
        self._file: int | None = None
        self._pending: collections.deque[bytes] = collections.deque(maxlen=PENDING_LINES)
        self._seen = -math.inf  # when the log was last found where it was made
        self._may_fail = False  # true once the run has started
        self._warned = False
        self._reason = ""  # why lines wait
        self.unwritten: str | None = None  # after `end`: a sentence, if events were lost
        if enabled:
            self._create(Path(out_dir))

    # What a run reports.

    def start(self, **facts) -> None:
        """run_start: the resolved config with origins, model, hardware, versions, whatever else identifies the run."""
        self._record("run_start", schema_version=SCHEMA_VERSION, resumed_from=self._resumed_from, **facts)
        self._write_document()
        self._may_fail = True

    def discard(self) -> None:
        """Take away the log of a run whose start failed before anything was written to it."""
        if self._file is not None and os.fstat(self._file).st_size == 0:
            os.close(self._file)
            self._file = None
            with contextlib.suppress(OSError):
                self.path.unlink()

    def step(
        self,
        step: int,
        tokens: int,
        loss: float,
        lr: float,
        grad_norm: float | None,
        tokens_per_s: float | None = None,
        step_ms: dict[str, float] | None = None,
        mfu: float | None = None,
        mfu_causal: float | None = None,
        hfu: float | None = None,
        memory_gb: float | None = None,
        **extra,
    ) -> None:
        """step: one optimizer step. `tokens`: seen so far; `step_ms`: {data, compute, optimizer, total}; None: unknown."""
        self._record(
            "step",
            step=step,
            tokens=tokens,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens_per_s=tokens_per_s,
            step_ms=step_ms,
            mfu=mfu,
            mfu_causal=mfu_causal,
            hfu=hfu,
            memory_gb=memory_gb,
            **extra,
        )

    def evaluation(self, step: int, tokens: int, **results) -> None:
        """eval: losses and what follows from them; the document is replaced."""
        self._record("eval", step=step, tokens=tokens, **results)
        self._write_document()

    def statistics(self, step: int, **found) -> None:
        """stats: norms of each block's output and gradient, and the largest logit, at one step."""
        self._record("stats", step=step, **found)

    def sample(self, step: int, text: str) -> None:
        """sample: a text that the model wrote after so many steps."""
        self._record("sample", step=step, text=text)

    def checkpoint(self, step: int, path: str | os.PathLike, seconds: float, best: bool = False, **facts) -> None:
        """checkpoint: one was saved at `path`, which took `seconds`."""
        self._record("checkpoint", step=step, path=path, seconds=seconds, best=best, **facts)

    def warning(self, message: str, **facts) -> None:
        """warning: something the reader of the results must know."""
        self._record("warning", message=message, **facts)

    def end(self, outcome: str, **summary) -> None:
        """run_end: how it came out ("completed", "stopped", "failed" …) and the summary. Only the first call counts."""
        if self._file is None:
            return
        self._record("run_end", outcome=outcome, **summary)
        self._write_document()
        if self._pending:
            self.unwritten = (
                f"The last {len(self._pending)} events of the run log {self.path} are lost: {self._reason}. What is there ends "
                "before them; free some space and go on with --resume."
            )
        elif gone := self.lost():
            self.unwritten = gone
        os.close(self._file)
        self._file = None
        for tracker in list(self.trackers):
            self._or_without(tracker, tracker.close)

    def lost(self, seen_within: float = 0.0) -> str | None:
        """A sentence if the log is no longer where it was made, as its folder was deleted or moved away; else None.

        A log that was there less than `seen_within` seconds ago is not looked for again: a look costs a network's file system
        a round trip.
        """
        if self._file is None or time.monotonic() - self._seen < seen_within:
            return None
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(self.path), os.fstat(self._file)):
                self._seen = time.monotonic()
                return None
        return (
            f"The run log {self.path} is gone: out_dir was deleted or moved while the run was writing to it, so the log and the "
            "checkpoints that were in it are lost."
        )

    def write_copy(self, folder: str | os.PathLike) -> None:
        """Write the run's document, as far as it has come, to another folder. Raises OSError."""
        if self._file is not None:
            path = Path(folder) / self.document_path.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self._document.as_dict(), allow_nan=False) + "\n", encoding="utf-8")

    # How it is written.

    def _or_without(self, tracker: Any, call: Callable[[], None]) -> None:
        """Do something with a tracker; if it fails, training goes on without it."""
        try:
            call()
        except Exception as error:
            self.trackers.remove(tracker)
            print(f"warning: {type(tracker).__name__} fails ({str(error).strip()}); the run goes on without it.", file=sys.stderr)

    def _create(self, out_dir: Path) -> None:
        """Reserve a name that no other run has."""
        stem = f"run_{datetime.now():%Y%m%d_%H%M%S}"
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
            attempt = 1
            while self._file is None:
                name = stem if attempt == 1 else f"{stem}_{attempt}"
                self.path, self.document_path = out_dir / f"{name}.jsonl", out_dir / f"{name}.json"
                attempt += 1
                if not self.document_path.exists():
                    try:
                        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o666)
                    except FileExistsError:
                        pass
        except OSError as error:
            raise RunLogError(error, out_dir) from error
        self._document = RunDocument(self.path.stem)

    def _record(self, event_name: str, /, **fields) -> None:
        if self._file is None:
            return
        now = datetime.now().astimezone().isoformat(timespec="milliseconds")
        event = _jsonable({"event": event_name, "time": now, **fields})
        self._document.add(event)
        for tracker in list(self.trackers):
            self._or_without(tracker, lambda: tracker.add(event))
        self._pending.append(json.dumps(event, allow_nan=False).encode() + b"\n")
        try:
            while self._pending:
                self._append(self._pending[0])
                self._pending.popleft()
        except OSError as error:
            self._failed(error, self.path)

    def _append(self, line: bytes) -> None:
        """Write a whole line or nothing: what a full disk leaves of it is taken back."""
        size = os.fstat(self._file).st_size
        written = 0
        try:
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError:
            os.ftruncate(self._file, size)
            raise

    def _write_document(self) -> None:
        """Replace the `.json`: readers see the old one or the new one, never a part, even after a power cut."""
        if self._file is None:
            return
        aside = self.document_path.with_name(f".{self.document_path.name}.tmp")
        try:
            with open(aside, "w", encoding="utf-8") as file:  # a line for each part
                parts = (
                    f"{json.dumps(key)}: {json.dumps(part, allow_nan=False)}" for key, part in self._document.as_dict().items()
                )
                file.write("{\n" + ",\n".join(parts) + "\n}\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self.document_path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            self._failed(error, self.document_path)

    def _failed(self, error: OSError, path: Path) -> None:
        """Before the run has started a log that cannot be written is an error, later a warning, given once."""
        if not self._may_fail:
            raise RunLogError(error, path) from error
        self._reason = error.strerror or str(error)
        if not self._warned:
            self._warned = True
            print(f"warning: {RunLogError(error, path)} Training goes on; each event tries again.", file=sys.stderr)


def _jsonable(value: Any) -> Any:
    """`value` as strict JSON has it: see the module's docstring for non-finite numbers. Unknown types become text."""
    if isinstance(value, dict):
        result: dict[str, Any] = {}
        for key, item in value.items():
            result[str(key)] = plain = _jsonable(item)
            if plain is None and item is not None:
                result[f"{key}_repr"] = str(float(item))
        return result
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_jsonable(item) for item in value]
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays
        return _jsonable(value.tolist())
    return str(value)


# --------------------------------------------------------------------------------- what the run ran on


@functools.cache
def versions() -> dict[str, Any]:
    """{python, torch, numpy, git_commit, git_dirty}; null where unknown, as the commit is without git or a repository."""
    from importlib import metadata

    def installed(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    home = Path(__file__).resolve().parent
    top = _git(home, "rev-parse", "--show-toplevel")
    ours = top is not None and Path(top) == home  # not a repository that this folder merely lies in
    commit = _git(home, "rev-parse", "--verify", "HEAD") if ours else None
    changes = _git(home, "status", "--porcelain", "--untracked-files=no") if commit else None
    return {
        "python": platform.python_version(),
        "torch": installed("torch"),
        "numpy": installed("numpy"),
        "git_commit": commit,
        "git_dirty": None if changes is None else changes != "",
    }


def _git(folder: Path, *arguments: str) -> str | None:
    """What a git command prints, None if it fails or there is no git."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def hardware_facts(device) -> dict[str, Any]:
    """What this process runs on: the device, and the machine around it. Null where the system does not tell."""
    import torch

    device = torch.device(device)
    cpu = _cpu_model()
    facts: dict[str, Any] = {"device": str(device), "device_name": cpu, "device_count": 1, "device_memory_gb": None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device_name": torch.cuda.get_device_name(device),
            "device_count": torch.cuda.device_count(),
            "device_memory_gb": round(properties.total_memory / 1e9, 2),
        }
    elif device.type != "cpu":
        facts["device_name"] = device.type
    try:
        cores, memory = len(os.sched_getaffinity(0)), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not Linux
        cores, memory = os.cpu_count(), None
    return facts | {
        "cpu_model": cpu,
        "cpu_cores": cores,
        "memory_gb": memory and round(memory / 1e9, 2),
        "threads": torch.get_num_threads(),
        "os": platform.platform(),
    }


def _cpu_model() -> str | None:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or None
