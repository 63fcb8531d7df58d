"""The five CPU levels: their runs by train.py's own loop, and the models that are kept of them.

Below the study's out_dir:

    runs/level3_small_seed0/                each run's own out_dir: its log, its checkpoint, output.txt
    models/model_small_1000_tokens/         the model that came out, for load_model and sample.py; of seed 0
    models/model_small_1000_tokens_seed1/   the same of seed 1
    models/model_index.json                 what there is, with the losses; written anew after every run
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ablation.execution import LAST_LINES, OUTPUT, Job
from ablation.variants import Variant, make_variant
from command_line import PROJECT, Failure, Mandatory, UsageError, check_shape, duration, parse_json
from comparison.runs import load_runs
from training.checkpoint import CheckpointError, CheckpointStore, find_checkpoint, load_model
from training.checkpoint_commands import consolidate
from training.manifest import read_state
from training.scoring import TokenList, score_stream
from training.signals import STOPS

LEVELS = {1: "ultra_tiny", 2: "tiny", 3: "small", 4: "medium", 5: "large"}
INDEX = "model_index.json"
FORMAT_VERSION = 1
# Keys of train.py that the study itself decides.
DECIDED = ("out_dir", "init_from", "resume", "eval_only", "seed", "data_seed", "save_interval", "eval_interval")
_MODEL = re.compile(rf"model_({'|'.join(LEVELS.values())})_(\d+)_tokens(?:_seed([1-9]\d*))?")
ENTRY = {
    "name": Mandatory(str),
    "level": Mandatory(int),
    "level_name": Mandatory(str),
    "seed": Mandatory(int),
    "tokens": Mandatory(int),
    "iterations": Mandatory(int),
    "parameters": Mandatory(int),
    "epochs": Mandatory(float),
    "dataset": Mandatory({"name": Mandatory(str)}),
    "train_loss": float,
    "val_loss": float,
    "gap": float,
    "best_val_loss": float,
    "iterations_per_second": float,
    "seconds": float,
}


class Stopped(Exception):
    """Somebody asked a run to stop; it has saved what it had."""


@dataclass(frozen=True, eq=False)
class LevelRun:
    """One run of the study: a level with a seed, which is that of the weights and of the order of the data."""

    level: int
    seed: int
    config_file: str
    job: Job

    @property
    def tokens(self) -> int:
        """How many there are to learn from."""
        return len(self.job.variant.dataset.split("train"))

    @property
    def model(self) -> str:
        """The name of the model that is kept of it."""
        return model_name(self.level, self.tokens, self.seed)


def config_of(level: int) -> str:
    """The config file of a level."""
    return str(PROJECT / "config" / f"cpu_level{level}_{LEVELS[level]}.py")


def run_folder(out_dir: Path, level: int, seed: int) -> Path:
    """Where a run has its log and its checkpoint."""
    return out_dir / "runs" / f"level{level}_{LEVELS[level]}_seed{seed}"


def model_name(level: int, tokens: int, seed: int) -> str:
    """model_<level>_<n>_tokens, and the seed where it is not 0."""
    return f"model_{LEVELS[level]}_{tokens}_tokens" + (f"_seed{seed}" if seed else "")


# ------------------------------------------------------------------------------------------- planning


def plan_runs(out_dir: Path, levels: Sequence[int], seeds: int, given: Mapping[str, str | bool]) -> list[LevelRun]:
    """The runs of a study, seed by seed. `given`: keys of train.py for all of them, as on its command line.

    Looks at what is there: a finished run of the same configuration has its summary. Raises UsageError where a key cannot be
    given, or a folder holds the run of another configuration.
    """
    problems = [f"--{key} cannot be given: the study decides it." for key in DECIDED if key in given]
    if problems:
        raise UsageError("\n".join(problems))
    variants = {level: _variant(level, given) for level in levels}
    runs = []
    for seed in range(seeds):
        for level, variant in variants.items():
            folder = run_folder(out_dir, level, seed)
            words = [f"--{key}" if value is True else f"--{key}={value}" for key, value in given.items()]
            words += [f"--seed={seed}", f"--data_seed={seed}", f"--out_dir={folder}", "--resume=auto"]
            words += [f"--eval_interval={variant.train.eval_interval}"]
            expected = variant.experiment(()) | {"seed": seed, "data_seed": seed}
            job = Job(variant, (seed, seed), folder, [config_of(level), *words], expected)
            if problem := job.look():
                problems.append(problem)
            runs.append(LevelRun(level, seed, config_of(level), job))
    if problems:
        raise UsageError("\n".join(problems))
    return runs


def _variant(level: int, given: Mapping[str, str | bool]) -> Variant:
    """The configuration of a level. Its 20 evaluations are spread over the run, however long that is."""
    base = make_variant(config_of(level), dict(given))
    every = max(1, base.length // 20)
    made = base
    if base.train.eval_interval != every:
        made = make_variant(config_of(level), {**given, "eval_interval": str(every)})
    return dataclasses.replace(made, name=f"level {level} ({LEVELS[level].replace('_', ' ')})")


# ------------------------------------------------------------------------------------------- training


def train_runs(out_dir: Path, runs: Sequence[LevelRun], say: Callable[[str], None]) -> None:
    """Train what is not finished, keep the models, write the index. Raises Stopped, or Failure where a run failed.

    say: takes a line for each run.
    """
    try:
        (out_dir / "models").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(f"out_dir={str(out_dir)!r} cannot be written: {error.strerror}. Choose another --out_dir.") from error
    torch.set_num_threads(1)  # as the level's configs say; also for the losses of models that are there already
    with CheckpointStore(out_dir).lock():
        for leftover in (out_dir / "models").glob(".writing_*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for number, run in enumerate(runs, 1):
            before = run.job.summary is not None
            if not before:
                train_through_the_loop(run)
            keep_model(out_dir, run)
            entry = next(one for one in write_index(out_dir) if one["name"] == run.model)
            say(f"[{number}/{len(runs)}] {run.job.name}: {in_words(entry)}{' (was there)' if before else ''}")


def in_words(entry: Mapping[str, Any]) -> str:
    """The losses of an entry of the index, and how long it took."""
    found = {key: "–" if entry[key] is None else f"{entry[key]:.3f}" for key in ("train_loss", "val_loss", "gap")}
    speed = "" if entry["seconds"] is None else f" in {duration(entry['seconds'])}"
    return f"train {found['train_loss']}, val {found['val_loss']}, gap {found['gap']}{speed}"


def train_through_the_loop(run: LevelRun) -> None:
    """One run by train.py, in this process; what it prints goes to its output.txt. Raises Stopped or Failure."""
    import train  # a program: only a study of programs may do so

    run.job.folder.mkdir(parents=True, exist_ok=True)
    place = run.job.folder / OUTPUT
    with (
        open(place, "a", encoding="utf-8") as output,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
        signals_noted() as arrived,
    ):
        code = train.main(run.job.arguments)
    if problem := run.job.look():
        raise Failure(problem)
    if code in (0, 130) and (arrived() or run.job.summary is None):  # also where it was finishing anyway
        raise Stopped
    if code == 0:
        return
    said = place.read_text(encoding="utf-8", errors="replace").strip().split("\n")[-LAST_LINES:]
    lines = [f"{run.job.name} failed: train.py returned {code}. The last lines of {place}:", *[f"    {line}" for line in said]]
    raise Failure("\n".join(lines))


@contextlib.contextmanager
def signals_noted() -> Iterator[Callable[[], bool]]:
    """A function that says whether a signal to stop has arrived in here, whoever handles it."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    former = signal.set_wakeup_fd(write, warn_on_full_buffer=False)  # Python writes the number of each signal there

    def arrived() -> bool:
        try:
            numbers.extend(os.read(read, 1000))
        except (BlockingIOError, OSError):
            pass
        return bool({int(number) for number in STOPS} & set(numbers))

    numbers: list[int] = []
    try:
        yield arrived
    finally:
        arrived()
        signal.set_wakeup_fd(former)
        os.close(write)
        os.close(read)


def keep_model(out_dir: Path, run: LevelRun) -> None:
    """Copy the run's model, and nothing else of its checkpoint, to models/, unless it is there already."""
    source, target = find_checkpoint(run.job.folder, holding="model"), out_dir / "models" / run.model
    if target.exists():
        try:
            kept = read_state(find_checkpoint(target, holding="model"))
            if all(kept.get(key) == value for key, value in read_state(source).items() if key in ("step", "run")):
                return
        except CheckpointError:
            pass  # damaged: made again
    aside = target.with_name(f".writing_{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    consolidate(str(source), str(aside))
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)


# ------------------------------------------------------------------------------------------- the index


def write_index(out_dir: Path) -> list[dict[str, Any]]:
    """Write models/model_index.json from the models and run logs that are there; returns its entries."""
    entries = sorted(map(dict, _entries(out_dir)), key=lambda entry: (entry["level"], entry["tokens"], entry["seed"]))
    write_document(out_dir / "models" / INDEX, {"format_version": FORMAT_VERSION, "models": entries})
    return entries


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Replace a JSON file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.new")
    aside.write_text(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(aside, path)


def _models_in(out_dir: Path) -> Iterator[Path]:
    """The folders of kept models."""
    for folder in sorted((out_dir / "models").glob("model_*")):
        if (folder / "manifest.json").is_file() and _MODEL.fullmatch(folder.name):
            yield folder


def _entries(out_dir: Path) -> Iterator[Mapping[str, Any]]:
    for folder in _models_in(out_dir):
        manifest = (folder / "manifest.json").stat()
        yield _entry(out_dir.absolute(), folder.name, manifest.st_ino, manifest.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _entry(out_dir: Path, name: str, *version: int) -> Mapping[str, Any]:
    """What the index says of a model. Losses are those of the model that was kept, in windows side by side."""
    folder = out_dir / "models" / name
    found = _MODEL.fullmatch(name)
    state = read_state(folder)
    level, seed = next(number for number, text in LEVELS.items() if text == found[1]), int(found[3] or 0)
    runs = run_folder(out_dir, level, seed)
    summary = next((run for run in load_runs([runs])[::-1] if run.finished), None) if runs.is_dir() else None
    losses = losses_of(folder, state)
    return {
        "name": name,
        "level": level,
        "level_name": found[1],
        "seed": seed,
        "tokens": int(found[2]),
        "iterations": state["step"],
        "epochs": _tokens_read(state) / int(found[2]),
        "architecture": state["model"]["name"],
        "fingerprint": state["model"]["fingerprint"],
        "dataset": {key: state["dataset"].get(key) for key in ("name", "fingerprint")},
        **losses,
        "best_val_loss": summary and summary.best_val_loss,
        "iterations_per_second": summary and summary.tokens_per_s and summary.tokens_per_s / summary.tokens_per_step,
        "seconds": summary and summary.seconds,
    }


def _tokens_read(state: Mapping[str, Any]) -> int:
    """Tokens that the steps of a run have read."""
    config = state["config"]
    tokens = config["batch_size"] * config["gradient_accumulation_steps"] * config["block_size"]
    return state["step"] * (config.get("total_batch_tokens") or tokens)


def losses_of(folder: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """N, and the loss on the text that the model has learnt from and on the validation text; null where that is gone."""
    from data.mixture import open_dataset
    from data.token_dataset import DatasetError

    model, _ = load_model(folder)
    found: dict[str, Any] = {"parameters": model.num_parameters(), "train_loss": None, "val_loss": None, "gap": None}
    config = state["config"]
    try:
        dataset = open_dataset(config["dataset"], max_train_tokens=config["max_train_tokens"])
        if dataset.fingerprint != state["dataset"]["fingerprint"]:
            return found
    except DatasetError:
        return found
    for split in ("train", "val"):
        ids = dataset.split(split)
        stream = TokenList(ids.read(0, min(len(ids), 1_000_000)))
        found[f"{split}_loss"] = score_stream(model, stream, None, context=model.config.block_size, batch_size=64).loss
    found["gap"] = found["val_loss"] - found["train_loss"]
    return found


def read_index(out_dir: Path, levels: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """The entries of these levels, of all that there are where none are named.

    Raises Failure where nothing is there yet, or the file is not what was written.
    """
    path = out_dir / "models" / INDEX
    advice = f"python experiments/cpu_levels.py train --out_dir={out_dir}"
    if not path.is_file() or not list(_models_in(out_dir)):
        raise Failure(f"There are no models in {out_dir / 'models'} yet; train them first: {advice}")
    again = f"the same command as before ({advice} …) writes it anew without training again"
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
        check_shape(document, {"models": Mandatory([ENTRY])})
        if document.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"its format_version is {document.get('format_version')}, not {FORMAT_VERSION}")
        for entry in document["models"]:
            check_entry(out_dir, entry)
    except (OSError, ValueError) as error:
        raise Failure(f"{path} is not as it was written: {error}; {again}.") from None
    entries = [entry for entry in document["models"] if levels is None or entry["level"] in levels]
    if not entries and levels is None:
        raise Failure(f"{path} names no models; {again}.")
    if missing := sorted(set(levels or ()) - {entry["level"] for entry in entries}):
        some = ", ".join(map(str, missing))
        raise Failure(f"{path} has no model of level {some}; train it first: {advice} --levels={some.replace(' ', '')}")
    return entries


def check_entry(out_dir: Path, entry: Mapping[str, Any]) -> None:
    """Raise ValueError where an entry of the index does not fit the model that it names."""
    name = entry["name"]
    expected = (entry["level"] in LEVELS and model_name(entry["level"], entry["tokens"], entry["seed"])) or ""
    if name != expected or entry["level_name"] != LEVELS[entry["level"]]:
        raise ValueError(f"level {entry['level']}, {entry['tokens']} tokens and seed {entry['seed']} are not those of {name!r}")
    if not entry["parameters"]:
        raise ValueError(f"parameters of {name} is 0")
    folder = out_dir / "models" / name
    if not (folder / "manifest.json").is_file():
        raise ValueError(f"{folder} is not there")
    config = read_state(folder)["config"]
    if config["seed"] != entry["seed"] or config["max_train_tokens"] not in (entry["tokens"], None):
        raise ValueError(f"{folder} was trained on {config['max_train_tokens']} tokens with seed {config['seed']}")
