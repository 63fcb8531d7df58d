"""Checkpoints: written aside, checked, published by a rename; loaded without ever unpickling.

    out_dir/checkpoints/step_000001000/
        shard-*.safetensors   model, optimizer, loss scale, random state of every rank (torch.distributed.checkpoint);
                              each process writes its part, files of the model hold nothing else
        state.json            step, resolved config with origins, model, dataset, counters, versions
        tokenizer.json        the tokenizer, so that the folder can be sampled from anywhere
        manifest.json         size and sha256 of every file, and what tensors it holds; written last
    out_dir/checkpoints/latest, best      the name of a folder

A folder under its final name is complete: it was written under a temporary name, fsynced and then renamed. What a
killed save leaves behind is removed at the next start. It can be loaded by any number of processes under any strategy.

    python -m training.checkpoint inspect DIR            what is in a checkpoint (or in an out_dir's latest)
    python -m training.checkpoint consolidate DIR OUT    its model alone, in one file, for sample.py and convert.py
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from command_line import Failure
from data.files import fsync, sha256
from training.parallelism import local
from training.processes import World

FORMAT_VERSION = 1
_STEP, _TEMPORARY, _REPLACED = "step_", ".writing_", ".replaced_"
_STREAM_BYTES = 256 << 20
_FILE_BYTES = 2 << 30  # a tensor file is closed at about this size, which also bounds the copy made while saving


class CheckpointError(Failure):
    """A checkpoint cannot be written, found or read; the message says which, why and what to do."""


class UnknownFormat(CheckpointError):
    """A checkpoint of another format version: it is whole, but this code does not know how to read it."""


# ------------------------------------------------------------------------------------------- finding


class CheckpointStore:
    """The checkpoints of one run, below out_dir/checkpoints. `world`: the processes that write one together."""

    def __init__(self, out_dir: str | Path, world: World | None = None):
        self.folder, self.world = Path(out_dir) / "checkpoints", world or World()
        self.damaged: set[Path] = set()  # found so by newest_intact; out of the way from the next save on

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only process that writes to this out_dir. Raises CheckpointError if another one is."""
        file = self.folder.with_name(".lock")
        with open(file, "a+", encoding="utf-8") as handle:
            try:
                import fcntl

                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except ImportError:  # not a POSIX system: nothing to lock with
                pass
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):  # a file system without locks (Lustre, some NFS)
                    warnings.warn(
                        f"{file.parent} is on a file system without locks ({error.strerror}): see to it yourself that "
                        "one run at a time writes there.",
                        stacklevel=2,
                    )
                    yield
                    return
                handle.seek(0)
                raise CheckpointError(
                    f"Another run (process {handle.read().strip() or 'unknown'}) is writing to "
                    f"{file.parent}. Wait for it, or choose another --out_dir."
                ) from error
            handle.truncate(0)
            handle.write(str(os.getpid()))
            handle.flush()
            yield

    def holds(self, checkpoint: Path) -> bool:
        """Whether this is one of the store's own checkpoints."""
        return checkpoint.resolve().is_relative_to(self.folder.resolve())

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest write first."""
        found = [p for p in self.folder.glob(f"{_STEP}*") if (p / "manifest.json").is_file()]
        return sorted(found, key=lambda p: ((p / "manifest.json").stat().st_mtime_ns, p.name))

    def pointed(self, name: str) -> Path | None:
        """The folder that 'latest' or 'best' points to, or None if there is none (or it points to nothing)."""
        try:
            target = self.folder / (self.folder / name).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None
        return target if target.name.startswith(_STEP) and (target / "manifest.json").is_file() else None

    def newest_intact(self, warn: Callable[[str], None], holding: str | None = None) -> Path | None:
        """The latest checkpoint, or the one before it where that is damaged (warned about); None if there is none.

        Raises CheckpointError if there are checkpoints and every one is damaged.
        """
        candidates, latest = self.all()[::-1], self.pointed("latest")
        if latest in candidates:
            candidates.remove(latest)
            candidates.insert(0, latest)
        elif candidates:
            warn(f"{self.folder / 'latest'} does not point to a checkpoint; using the newest, {candidates[0].name}.")
        reasons = []
        for candidate in candidates:
            try:
                verify(candidate, holding)
                return candidate
            except UnknownFormat:  # it is not damaged: it must neither be passed over nor moved out of the way
                raise
            except CheckpointError as error:
                reasons.append(str(error))
                self.damaged.add(candidate)
                warn(f"{error} Trying the checkpoint before it.")
        if reasons:
            raise CheckpointError(f"No checkpoint in {self.folder} is intact. {reasons[0]}")
        return None

    def set_aside(self) -> Path | None:
        """Move a former run's checkpoints to checkpoints.previous (or .previous_2 …, nothing is overwritten)."""
        if not self.all():
            return None
        number, aside = 1, self.folder.with_name("checkpoints.previous")
        while aside.exists():
            number += 1
            aside = self.folder.with_name(f"checkpoints.previous_{number}")
        self.folder.rename(aside)
        return aside

    def clean(self) -> None:
        """Remove what an interrupted save left behind; a folder it had moved away for a replacement comes back."""
        for moved in self.folder.glob(f"{_REPLACED}*"):
            original = self.folder / moved.name.removeprefix(_REPLACED)
            shutil.rmtree(moved, ignore_errors=True) if original.exists() else moved.rename(original)
        for leftover in self.folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for leftover in self.folder.glob(".*.new"):
            leftover.unlink(missing_ok=True)

    # --------------------------------------------------------------------------------------- writing

    def save(
        self,
        step: int,
        tensors: dict[str, Tensor] | Iterator[tuple[str, Tensor]],
        state: dict[str, Any],
        *,
        keep_last: int,
        tokenizer_folder: Path | None = None,
        best: bool = False,
    ) -> Path:
        """Write a checkpoint of this step, publish it, point 'latest' (and 'best') at it and drop old ones.

        keep_last: how many to keep besides the best; 0 keeps all. Every process of `world` calls this; each writes and
        checks its own part, rank 0 publishes.

        `tensors`: flat names → tensors (sharded ones are written by the ranks that hold them), or (name, tensor) pairs
        that are written as they come, without ever being in memory together. `state`: JSON-ready.
        Raises CheckpointError, in every process, if it cannot be written; the former checkpoints are then as before.
        """
        name, world = f"{_STEP}{step:09d}", self.world
        temporary = self.folder / f"{_TEMPORARY}{name}"

        def begin() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

        def describe() -> None:
            _write_json(temporary / "state.json", {"format_version": FORMAT_VERSION, "step": step, **state})
            for file in tokenizer_files(tokenizer_folder) if tokenizer_folder is not None else ():
                shutil.copyfile(file, temporary / file.name)

        def own_files() -> dict[str, dict[str, Any]]:
            """What the manifest says of the files that this process wrote, when they are on the disk for good."""
            own = sorted(temporary.glob(f"shard-{world.rank + 1:05d}-*"))
            if world.is_main:
                own += [path for path in sorted(temporary.iterdir()) if not path.name.startswith("shard-")]
            for path in own:
                fsync(path)
            return {path.name: _entry(path) for path in own}

        def publish() -> None:
            listed = {name: entry for part in parts for name, entry in part.items()}
            _write_json(temporary / "manifest.json", {"format_version": FORMAT_VERSION, "files": dict(sorted(listed.items()))})
            fsync(temporary / "manifest.json")
            fsync(temporary)
            for damaged in [folder for folder in self.damaged if folder.exists()]:
                damaged.rename(self.folder / f"damaged_{damaged.name}")
            self.damaged.clear()
            self._publish(temporary, self.folder / name)
            self.point("latest", name)
            if best:
                self.point("best", name)
            self._prune(keep_last)

        try:
            world.from_main(begin)
            if isinstance(tensors, dict):
                _write_tensors(temporary, tensors, world)
            else:
                write_streamed(temporary, tensors, _STREAM_BYTES)
            world.from_main(describe)
            parts = world.everywhere(own_files)
            world.from_main(publish)
        except BaseException as error:
            if world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError) or type(error) is Failure:  # here, or in another process
                reason = error.strerror or error if isinstance(error, OSError) else error
                raise CheckpointError(
                    f"The checkpoint of step {step} could not be written to {self.folder}: {reason}. {self._remaining()}"
                ) from error
            raise
        return self.folder / name

    def point(self, pointer: str, name: str) -> None:
        """Make 'latest' or 'best' name this folder, in one atomic replacement."""
        temporary = self.folder / f".{pointer}.new"
        temporary.write_text(name + "\n", encoding="utf-8")
        fsync(temporary)
        temporary.replace(self.folder / pointer)
        fsync(self.folder)

    def _publish(self, temporary: Path, final: Path) -> None:
        moved = self.folder / f"{_REPLACED}{final.name}"
        if final.exists():  # the same step again, after a resume from further back
            final.rename(moved)
        temporary.rename(final)
        fsync(self.folder)
        shutil.rmtree(moved, ignore_errors=True)

    def _prune(self, keep_last: int) -> None:
        if keep_last == 0:
            return
        kept = {self.pointed("latest"), self.pointed("best"), *self.all()[-keep_last:]}
        for old in set(self.all()) - kept:
            doomed = self.folder / f"{_TEMPORARY}{old.name}"  # a name that clean() removes if this is cut short
            shutil.rmtree(doomed, ignore_errors=True)
            old.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _remaining(self) -> str:
        latest = self.pointed("latest")
        return (
            f"The last good checkpoint, {latest}, is untouched; free some space and resume with --init_from=resume."
            if latest
            else "There is no earlier checkpoint; choose another --out_dir or free some space."
        )


# ------------------------------------------------------------------------------------------- reading


def find_checkpoint(
    path: str | Path, warn: Callable[[str], None] | None = None, which: str = "latest", holding: str | None = None
) -> Path:
    """A checkpoint folder, or an out_dir (its latest intact one, or its best) → a verified checkpoint.

    holding: verify only what this kind of tensors ('model') needs. Raises CheckpointError.
    """
    path = Path(os.path.abspath(Path(path).expanduser()))
    if (path / "manifest.json").is_file():
        if which == "best":
            raise CheckpointError(f"{path} is one checkpoint; the best one can only be asked of an out_dir.")
        verify(path, holding)
        return path
    store = CheckpointStore(path.parent if path.name == "checkpoints" else path)
    if which == "best" and store.all():
        best = store.pointed("best")
        if best is None:
            raise CheckpointError(
                f"{store.folder} has no best checkpoint, as none was saved right after an evaluation; use the latest one."
            )
        verify(best, holding)
        return best
    found = store.newest_intact(warn or (lambda message: print(f"warning: {message}", file=sys.stderr)), holding)
    if found is None:
        what = "has no checkpoint in it" if path.exists() else "does not exist"
        raise CheckpointError(
            f"{path} {what}; give an out_dir or a checkpoint folder (…/checkpoints/step_000001000), or train one first."
        )
    return found


def read_state(checkpoint: Path, needs: tuple[str, ...] = ("model",)) -> dict[str, Any]:
    """state.json of a checkpoint. Raises CheckpointError if it is unreadable, of a later format, or lacks what is needed."""
    state = _read_versioned(checkpoint / "state.json")
    missing = [key for key in needs if not isinstance(state.get(key), dict)]
    if missing:
        raise CheckpointError(f"Checkpoint {checkpoint} is damaged: its state.json has no {', '.join(missing)}.")
    return state


def listed_files(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """The manifest's files: name → {bytes, sha256, holds}. Raises CheckpointError, UnknownFormat of another version."""
    files = _read_versioned(checkpoint / "manifest.json").get("files")
    if (
        not isinstance(files, dict)
        or not files
        or not all(isinstance(f, dict) and {"bytes", "sha256"} <= f.keys() for f in files.values())
    ):
        raise CheckpointError(f"Checkpoint {checkpoint} is damaged: its manifest lists no files with size and checksum.")
    return files


def verify(checkpoint: Path, holding: str | None = None) -> None:
    """Check every file of a checkpoint against its manifest. Raises CheckpointError at the first that differs.

    holding: only the tensor files with this kind of tensors ('model'), and what is not a tensor file.
    """
    files = listed_files(checkpoint)
    wanted = {name: entry for name, entry in files.items() if holding is None or holding in entry.get("holds", [holding])}

    def check(name: str) -> str | None:
        path, expected = checkpoint / name, wanted[name]
        if not path.is_file():
            return f"{name} is missing."
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{name} has {size} bytes instead of {expected['bytes']}."
        return None if sha256(path) == expected["sha256"] else f"the checksum of {name} does not match."

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for problem in pool.map(check, wanted):
            if problem:
                raise CheckpointError(f"Checkpoint {checkpoint} is damaged: {problem}")


def load_tensors(checkpoint: Path, into: dict[str, Tensor], optional: tuple[str, ...] = ()) -> None:
    """Fill these tensors in place from the tensors of the same names, however they were or are sharded.

    Those whose names begin with one of `optional` stay as they are where the checkpoint lacks them. Raises
    CheckpointError when another name is missing or a shape differs.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(checkpoint))
    stored = reader.read_metadata().state_dict_metadata
    into = {name: tensor for name, tensor in into.items() if name in stored or not name.startswith(optional)}
    for name, tensor in into.items():
        if name not in stored:
            raise CheckpointError(f"Checkpoint {checkpoint} has no tensor {name!r}.")
        if tuple(stored[name].size) != tuple(tensor.shape):
            raise CheckpointError(
                f"Checkpoint {checkpoint}: {name} has shape {tuple(stored[name].size)}, the model needs {tuple(tensor.shape)}."
            )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            load(into, storage_reader=reader, no_dist=not dist.is_initialized())
    except CheckpointException as error:  # derives from BaseException
        raise CheckpointError(f"Checkpoint {checkpoint} cannot be read: {error}.") from error


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors under their names in a checkpoint, tied ones once."""
    return {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that make up its tokenizer, ours or Hugging Face's, its chat template included."""
    return sorted(
        path for pattern in ("tokenizer*.json", "special_tokens_map.json", "chat_template.jinja") for path in folder.glob(pattern)
    )


def is_checkpoint(path: str | Path) -> bool:
    """Whether this is a checkpoint folder, or an out_dir with checkpoints."""
    path = Path(path).expanduser()
    return (path / "manifest.json").is_file() or bool(CheckpointStore(path).all())


def load_model(path: str | Path, device: torch.device | str = "cpu", which: str = "latest") -> tuple[nn.Module, Any]:
    """A checkpoint folder, an out_dir or a Hugging Face folder → (model in eval mode, its tokenizer or None).

    which: the 'latest' or the 'best' checkpoint of an out_dir. Raises CheckpointError, or ConversionError.
    """
    from data.tokenization import load_tokenizer
    from model_builder import build_model
    from model_config import ModelConfig
    from training import huggingface_files as huggingface

    if huggingface.is_folder(path):
        if which == "best":
            raise CheckpointError(f"{path} is a Hugging Face folder; the best checkpoint can only be asked of an out_dir.")
        folder = Path(path).expanduser()
        model = build_model(huggingface.read_config(folder), device="meta").to_empty(device=device)
        huggingface.load_weights(model, folder)
        return model.eval(), load_tokenizer(folder)
    checkpoint = find_checkpoint(path, which=which, holding="model")
    config = ModelConfig.from_dict(read_state(checkpoint)["model"]["config"])
    model = build_model(config, device="meta").to_empty(device=device)
    load_tensors(checkpoint, model_tensors(model))
    return model.eval(), load_tokenizer(checkpoint)


# ------------------------------------------------------------------------------------------- random state


def random_state(device: torch.device, rank: int = 0) -> dict[str, Tensor]:
    """This rank's random state as tensors."""
    state = {f"rng.{rank:05d}.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state[f"rng.{rank:05d}.cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device, rank: int = 0) -> None:
    """Continue from what `random_state` returned."""
    torch.set_rng_state(state[f"rng.{rank:05d}.cpu"])
    if device.type == "cuda" and f"rng.{rank:05d}.cuda" in state:
        torch.cuda.set_rng_state(state[f"rng.{rank:05d}.cuda"], device)


# ------------------------------------------------------------------------------------------- files


def _write_tensors(folder: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Every process writes its part of the tensors, and those that it alone has, through torch.distributed.checkpoint."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    sizes: dict[str, int] = {}  # of all processes' tensors: the file numbers are given out by one of them
    for part in world.everywhere(lambda: {name: local(t).numel() * t.element_size() for name, t in tensors.items()}):
        sizes = {**part, **sizes}
    file_of, number, filled, before = {}, 1, 0, None
    for name, size in sizes.items():
        if filled and (filled + size > _FILE_BYTES or kind_of(name) != before):
            number, filled = number + 1, 0
        file_of[name], before = number, kind_of(name)
        filled += size
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=file_of, save_distributed=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            save(dict(tensors), storage_writer=writer, process_group=world.group, no_dist=not world.grouped)
    except CheckpointException as error:  # derives from BaseException; carries each rank's exception
        causes = [cause[0] for cause in error.failures.values()]
        raise next((c for c in causes if isinstance(c, OSError)), OSError(str(causes[0]))) from error


def kind_of(name: str) -> str:
    """What kind of tensor this is by its name: 'model', 'optimizer', or 'other' (loss scale, random states)."""
    kind = name.split(".")[0]
    return kind if kind in ("model", "optimizer") else "other"


def _entry(path: Path) -> dict[str, Any]:
    """A file as the manifest lists it."""
    entry: dict[str, Any] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            entry["holds"] = sorted({kind_of(name) for name in file.keys()})
    return entry


def write_streamed(
    folder: Path, tensors: Iterator[tuple[str, Tensor]], file_bytes: int, metadata: dict[str, str] | None = None
) -> tuple[list[tuple[Path, list[str]]], int]:
    """(name, tensor) pairs → safetensors files of about file_bytes; no more than one file's worth is in memory.

    Returns the files with the names in each, and the bytes of all tensors.
    """
    from safetensors.torch import save_file

    files, waiting, filled, total = [], {}, 0, 0

    def write() -> None:
        path = folder / f"part-{len(files) + 1:05d}.safetensors"
        save_file(waiting, path, metadata=metadata)
        files.append((path, list(waiting)))

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if waiting and filled + size > file_bytes:
            write()
            waiting, filled = {}, 0
        waiting[name] = tensor.contiguous()
        filled, total = filled + size, total + size
    if waiting:
        write()
    return files, total


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise ValueError("not a JSON object")
        return document
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Checkpoint {path.parent} is damaged: {path.name} cannot be read ({error}).") from error


def _read_versioned(path: Path) -> dict[str, Any]:
    """state.json or manifest.json. Raises UnknownFormat if it is of another version, CheckpointError if it names none."""
    content = _read_json(path)
    version = content.get("format_version")
    if version is None:
        raise CheckpointError(f"Checkpoint {path.parent} is damaged: its {path.name} does not name a format version.")
    if version != FORMAT_VERSION:
        raise UnknownFormat(
            f"{path.parent} has checkpoint format {version!r}, and this version of kitbash reads {FORMAT_VERSION}. "
            "Use the version of kitbash that wrote it, or a later one."
        )
    return content


if __name__ == "__main__":
    from training.checkpoint_commands import main

    sys.exit(main(sys.argv[1:]))
