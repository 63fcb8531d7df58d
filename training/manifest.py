"""What makes a folder a checkpoint: its manifest, which lists every file with size and checksum.

What is read of a checkpoint is what its manifest lists. A file beside that which somebody would read (a tensor file, a
tokenizer) is an error, as it would change the model without anybody being told.
"""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from command_line import Failure, Mandatory, check_shape, parse_json
from data.files import fsync, sha256
from model_config import ModelConfig
from training.processes import World
from training.shards import kind_of, threads
from training.tensor_files import HashedStream, Written

FORMAT_VERSION = 1
_TENSOR_FILES = frozenset(  # what may hold tensors, for us or for others who read a folder
    (".safetensors", ".bin", ".pt", ".pth", ".th", ".ckpt", ".pkl", ".pickle", ".npz", ".npy", ".distcp", ".metadata")
    + (".gguf", ".ggml", ".h5", ".hdf5", ".msgpack", ".onnx")
)
_TOKENIZER_FILES = ("tokenizer*.json", "special_tokens_map.json", "chat_template.jinja")
# What state.json says, as far as anybody relies on it; of a run's, what `training/continuing.py` and `Progress` need besides.
_JUDGED = {"val_loss": float, "val_step": int, "best_val_loss": float, "best_step": int, "evaluations_without_gain": int}
STATE = {
    "step": Mandatory(int),
    "config": {"*": object},
    "origins": {"*": str},
    "run": str,
    "dtype": str,
    "parallelism": str,
    "world_size": int,
    "threads": int,
    "versions": {"*": object},
    "model": {"name": str, "fingerprint": str, "config": Mandatory({"*": object})},
    "progress": {"step": int, "sequences": int, "tokens": int, "skipped": int, "skipped_in_a_row": int, "saved_step": int}
    | _JUDGED
    | {"val_tokens": int},
    "dataset": {
        "name": str,
        "fingerprint": str,
        "order": int,
        "tokenizer": {"name": str, "fingerprint": str},
        "splits": {"*": {"tokens": int, "bytes": int, "documents": int}},
    },
    "objective": {"name": str, "fingerprint": str},
    "launch": {"slurm_job": str, "torchrun": str, "agents": [str]},
    "source": {"huggingface": str, "config": dict, "generation": dict, "dtype": str, "dtypes": {"*": str}, "ids": dict},
}
MANIFEST = {
    "number": int,
    "files": Mandatory({"*": Mandatory({"bytes": Mandatory(int), "sha256": Mandatory(str), "holds": [str]})}),
}
FileEntry = dict[str, Any]  # of the manifest: bytes, sha256, and what kinds of tensors a tensor file holds


class CheckpointError(Failure):
    """A checkpoint cannot be written, found or read; the message says which, why and what to do."""


class UnknownFormat(CheckpointError):
    """A checkpoint of another format version: it is whole, but this code does not know how to read it."""


class Removed(CheckpointError):
    """A checkpoint that was there is there no more: its run goes on, and keeps the latest ones only."""


class UnlistedFile(CheckpointError):
    """A checkpoint's folder holds a file that its manifest does not list, and that would be read by somebody."""


def damage(checkpoint: Path, problem: str) -> CheckpointError:
    """The error that says what is wrong with a checkpoint. A folder that is gone was not damaged, it was removed."""
    if not checkpoint.exists():
        return Removed(
            f"Checkpoint {checkpoint} was removed while it was read; a run that goes on keeps its latest ones only (keep_last). "
            "Try again with the run's out_dir, whose latest one is taken."
        )
    return CheckpointError(f"Checkpoint {checkpoint} is damaged: {problem}.")


def read_state(checkpoint: Path, needs: tuple[str, ...] = ("model",)) -> dict[str, Any]:
    """state.json of a checkpoint. Raises CheckpointError if it is unreadable, of a later format, or not as STATE declares it,
    or lacks an object that is needed."""
    state = _read_versioned(checkpoint / "state.json", STATE)
    missing = [key for key in needs if not isinstance(state.get(key), dict)]
    if missing:
        raise damage(checkpoint, f"its state.json has no {', '.join(missing)}")
    return state


def model_of(checkpoint: Path, state: dict[str, Any] | None = None) -> ModelConfig:
    """The model of a checkpoint, from its state.json (or what was read of it). Raises CheckpointError."""
    state = state or read_state(checkpoint)
    try:
        return ModelConfig.from_dict(state["model"]["config"])
    except (ValueError, TypeError) as error:
        reason = "; ".join(str(error).split("\n"))
        raise CheckpointError(f"Checkpoint {checkpoint} is damaged, or of another version: model.config: {reason}") from error


# ------------------------------------------------------------------------------------------- reading


def listed_files(checkpoint: Path) -> dict[str, FileEntry]:
    """The manifest's files: name → {bytes, sha256, holds}.

    Raises CheckpointError where the manifest is not one, or names what is not a file of this folder; UnknownFormat where it
    is of another version; UnlistedFile where there are tensors or a tokenizer beside what it lists.
    """
    files = _read_versioned(checkpoint / "manifest.json", MANIFEST)["files"]
    if "state.json" not in files:
        raise damage(checkpoint, "its manifest lists no files with size and checksum")
    for name in files:
        plain = name == os.path.basename(name) and not set("\\\0") & set(name)
        if not plain or (checkpoint / name).resolve().parent != checkpoint.resolve():
            raise damage(checkpoint, f"its manifest lists {name!r}, which is not a file in it")
    for unlisted in _unlisted(checkpoint, files):
        raise UnlistedFile(
            f"{unlisted} is not of this checkpoint: its manifest does not list it. Nothing but what is listed is loaded; move it "
            "elsewhere."
        )
    return files


def _unlisted(checkpoint: Path, files: dict[str, FileEntry]) -> Iterator[Path]:
    """Files with tensors or a tokenizer, and links to other folders, that the manifest does not list."""
    for folder, folders, names in os.walk(checkpoint):
        here = Path(folder)
        yield from (here / name for name in folders if (here / name).is_symlink())
        for name in names:
            tensors = os.path.splitext("_" + name.lower())[1] in _TENSOR_FILES
            tokenizer = any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in _TOKENIZER_FILES)
            if (tensors or tokenizer) and (here != checkpoint or name not in files):
                yield here / name


def verify(checkpoint: Path, holding: str | None = None, world: World | None = None) -> None:
    """Check every file of a checkpoint against its manifest. Raises CheckpointError at the first that differs.

    holding: only the tensor files with this kind of tensors ('model'), and what is not a tensor file. world: the processes
    that call this; each checks a part of the files, alike in bytes, and all learn of what any of them finds.
    """
    world = world or World()

    def check() -> tuple[type[CheckpointError], str] | None:
        try:
            if problem := _problem(checkpoint, holding, world):
                raise damage(checkpoint, problem)
            return None
        except CheckpointError as error:
            return type(error), str(error)

    for problem in filter(None, world.everywhere(check, f"checking {checkpoint}")):
        kind, text = problem
        raise kind(text)


def _problem(checkpoint: Path, holding: str | None, world: World) -> str | None:
    """What is wrong with this process's share of the files, or None."""
    files = listed_files(checkpoint)
    wanted = {name: entry for name, entry in sorted(files.items()) if holding in (None, *(entry.get("holds") or [holding]))}
    total, before, mine = sum(entry["bytes"] for entry in wanted.values()), 0, []
    for name, entry in wanted.items():  # a process that reads what it wrote checks its own files: they are in order of rank
        if (before + entry["bytes"] // 2) * world.size // max(total, 1) == world.rank:
            mine.append(name)
        before += entry["bytes"]

    def check(name: str) -> str | None:
        path, expected = checkpoint / name, wanted[name]
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            return None if sha256(path, moved=world.moved) == expected["sha256"] else f"the checksum of {name} does not match"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"

    with ThreadPoolExecutor(threads()) as pool:
        return next(filter(None, pool.map(check, mine)), None)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that make up its tokenizer, ours or Hugging Face's, its chat template included."""
    return sorted(path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern))


def _read_versioned(path: Path, shape: dict[str, Any]) -> dict[str, Any]:
    """state.json or manifest.json, held against its declared shape.

    Raises UnknownFormat if it is of another version, CheckpointError if it names none or is of another shape.
    """
    content = _read_json(path)
    version = content.get("format_version")
    if version is None:
        raise damage(path.parent, f"its {path.name} does not name a format version")
    if version != FORMAT_VERSION:
        raise UnknownFormat(
            f"{path.parent} has checkpoint format {version!r}, and this version of kitbash reads {FORMAT_VERSION}. "
            "Use the version of kitbash that wrote it, or a later one."
        )
    try:
        check_shape(content, shape)
    except ValueError as error:
        raise damage(path.parent, f"in its {path.name}, {error}") from error
    return content


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise ValueError("not a JSON object")
        return document
    except (OSError, ValueError) as error:
        raise damage(path.parent, f"{path.name} cannot be read ({error})") from error


# ------------------------------------------------------------------------------------------- writing


def tensor_entry(written: Written, names: Iterable[str]) -> FileEntry:
    """A tensor file as the manifest lists it."""
    return {"bytes": written.bytes, "sha256": written.sha256, "holds": sorted(set(map(kind_of, names)))}


def write_bytes(path: Path, data: bytes) -> FileEntry:
    """Write a small file for good; as the manifest lists it."""
    with HashedStream(path) as stream:
        stream.write(data)
    return {"bytes": stream.size, "sha256": stream.sha256}


def write_manifest(folder: Path, files: dict[str, FileEntry], number: int) -> None:
    """Write what makes a folder a checkpoint: its files, and the how many-th save of its run it is."""
    document = {"format_version": FORMAT_VERSION, "number": number, "files": dict(sorted(files.items()))}
    write_bytes(folder / "manifest.json", as_json(document))
    fsync(folder)


def as_json(document: dict[str, Any]) -> bytes:
    """A JSON document as it is written to a file; numbers that are not finite are refused with a ValueError."""
    return (json.dumps(document, indent=1, allow_nan=False) + "\n").encode()
