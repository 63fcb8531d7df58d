"""Checkpoints: written aside, checked, published by a rename; loaded without ever unpickling.

    out_dir/checkpoints/step_000001000/
        shard-*.safetensors   model, optimizer, loss scale, random state of every rank (see shards.py); each process
                              writes its part, files of the model hold nothing else
        state.json            step, resolved config with origins, model, dataset, counters, versions
        tokenizer.json        the tokenizer, so that the folder can be sampled from anywhere
        manifest.json         size and sha256 of every file, and what tensors it holds; the number of the save; written last
    out_dir/checkpoints/latest, best      the name of a folder

A folder under its final name is complete: it was written under a temporary name, fsynced and then renamed. What a
killed save leaves behind is removed at the next start. It can be loaded by any number of processes under any strategy.
Nothing is read but what the manifest lists, and a tensor file or tokenizer beside that is an error.

    python -m training.checkpoint inspect DIR            what is in a checkpoint (or in an out_dir's latest)
    python -m training.checkpoint consolidate DIR OUT    its model alone, in one file, for sample.py and convert.py
"""

from __future__ import annotations

import errno
import functools
import os
import shutil
import sys
import uuid
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from command_line import Failure, parse_json, printable
from data.files import fsync
from training.manifest import (
    FORMAT_VERSION,
    CheckpointError,
    FileEntry,
    Removed,
    UnknownFormat,
    UnlistedFile,
    as_json,
    damage,
    listed_files,
    model_of,
    read_state,
    tensor_entry,
    tokenizer_files,
    verify,
    write_bytes,
    write_manifest,
)
from training.processes import World
from training.shards import StoredTensors, held, kind_of, share_out, write_shards
from training.tensor_files import SUFFIX, Written, write_streamed

_STEP, _TEMPORARY, _REPLACED = "step_", ".writing_", ".replaced_"
LOOKS = 3  # times at which a reader looks for checkpoints that a run removes before they are read
_STREAM_BYTES = 256 << 20


class NonFiniteWeights(CheckpointError):
    """The model to be saved has weights that are not finite: it would be of no use."""


# ------------------------------------------------------------------------------------------- finding


class CheckpointStore:
    """The checkpoints of one run, below out_dir/checkpoints. `world`: the processes that write one together."""

    def __init__(self, out_dir: str | Path, world: World | None = None):
        self.folder, self.world = Path(out_dir) / "checkpoints", world or World()
        self.damaged: set[Path] = set()  # found so by newest_intact; out of the way from the next save on
        self._lock: int | None = None  # the open lock file, while this process has it

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only process that writes to this out_dir. Raises CheckpointError if another one is."""
        file = self.folder.with_name(".lock")
        made = not file.exists()
        with open(file, "a+", encoding="utf-8") as handle:
            try:
                import fcntl

                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
            except ImportError:  # not a POSIX system: nothing to lock with
                locked = True
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    handle.seek(0)
                    raise CheckpointError(
                        f"Another run (process {handle.read().strip() or 'unknown'}) is writing to "
                        f"{file.parent}. Wait for it, or choose another --out_dir."
                    ) from error
                locked = False  # a file system without locks (Lustre, some NFS)
                warnings.warn(
                    f"{file.parent} is on a file system without locks ({error.strerror}): see to it yourself that "
                    "one run at a time writes there.",
                    stacklevel=2,
                )
            if locked:
                handle.truncate(0)
                handle.write(str(os.getpid()))
                handle.flush()
            self._lock = handle.fileno()
            try:
                yield
            finally:
                self._lock = None
                if made and locked and not self.folder.exists() and not any(file.parent.glob("run_*.jsonl")):
                    with suppress(OSError):  # a start that failed before it wrote anything leaves nothing behind
                        file.unlink()

    def check_still_there(self) -> None:
        """Raise OSError if the out_dir whose lock this process holds was deleted, or is another one by now."""
        if self._lock is None:
            return
        try:
            same = os.path.samestat(os.fstat(self._lock), os.stat(self.folder.with_name(".lock")))
        except FileNotFoundError:
            same = False
        if not same:
            raise OSError(errno.ENOENT, f"{self.folder.parent} was deleted or replaced while this run was writing to it")

    def check_writable(self) -> None:
        """Raise CheckpointError unless this process can write to the folder of the checkpoints, if there is one already."""
        if not self.folder.exists():
            return
        probe = self.folder / f"{_TEMPORARY}probe_{uuid.uuid4().hex}"
        try:
            probe.mkdir()
            probe.rmdir()
        except OSError as error:
            raise CheckpointError(
                f"{self.folder} cannot be written ({error.strerror}), so nothing could be saved. Make it writable, or choose "
                "another --out_dir."
            ) from error

    def best_loss(self) -> tuple[float | None, int | None] | None:
        """Of what 'best' points to: its validation loss and the size of the set that it is of; None where that is unknown."""
        best = self.pointed("best")
        try:
            progress = read_state(best)["progress"] if best else None
            return (progress["val_loss"], progress["val_tokens"]) if progress else None
        except (CheckpointError, KeyError):
            return None

    def holds(self, checkpoint: Path) -> bool:
        """Whether this is one of the store's own checkpoints."""
        return checkpoint.resolve().is_relative_to(self.folder.resolve())

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest save first."""
        found = [p for p in self.folder.glob(f"{_STEP}*") if (p / "manifest.json").is_file()]
        return sorted(found, key=_order)

    def pointed(self, name: str) -> Path | None:
        """The folder that 'latest' or 'best' points to, or None if there is none (or it points to nothing)."""
        try:
            target = self.folder / Path((self.folder / name).read_text(encoding="utf-8").strip()).name
        except (OSError, UnicodeDecodeError):
            return None
        return target if target.name.startswith(_STEP) and (target / "manifest.json").is_file() else None

    def snapshots(self) -> list[Path]:
        """The checkpoints that stay, whatever keep_last says, in the order in which they were saved."""
        try:
            names = (self.folder / "snapshots").read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError):
            return []
        found = [self.folder / Path(name).name for name in names if Path(name).name.startswith(_STEP)]
        return [path for path in found if (path / "manifest.json").is_file()]

    def newest_intact(
        self,
        warn: Callable[[str], None],
        holding: str | None = None,
        world: World | None = None,
        among: Callable[[Path], bool] = lambda checkpoint: True,
    ) -> Path | None:
        """The latest checkpoint, or the one before it where that is damaged (warned about); None if there is none.

        holding: as for `verify`. world: the processes that call this and share the work; alone if it is not given. among:
        which checkpoints count at all; rank 0 asks it. Raises
        CheckpointError if there are checkpoints and every one is damaged, UnknownFormat and UnlistedFile at the first. Where
        a run that goes on removes them meanwhile, those that it has written since are looked at.
        """
        world = world or World()
        for _ in range(LOOKS - 1):
            try:
                return self._newest_intact(warn, holding, world, among)
            except Removed:
                pass
        return self._newest_intact(warn, holding, world, among)

    def _newest_intact(
        self, warn: Callable[[str], None], holding: str | None, world: World, among: Callable[[Path], bool]
    ) -> Path | None:
        """As newest_intact, once; raises Removed where one of the checkpoints goes away meanwhile."""
        names, note = world.from_main(lambda: self._candidates(among))
        if note:
            warn(note)
        reasons = []
        for candidate in [self.folder / name for name in names]:
            try:
                verify(candidate, holding, world)
                return candidate
            except (UnknownFormat, UnlistedFile, Removed):  # not damaged: it is neither passed over nor moved out of the way
                raise
            except CheckpointError as error:
                reasons.append(str(error))
                self.damaged.add(candidate)
                warn(f"{error} Trying the checkpoint before it.")
        if reasons:
            raise CheckpointError(f"No checkpoint in {self.folder} is intact. {reasons[0]}")
        return None

    def _candidates(self, among: Callable[[Path], bool]) -> tuple[list[str], str | None]:
        """The names of the checkpoints that count, in the order in which they are tried, and what is to be said about that."""
        candidates, latest, note = [one for one in self.all()[::-1] if among(one)], self.pointed("latest"), None
        if latest in candidates:
            candidates.remove(latest)
            candidates.insert(0, latest)
        elif candidates and latest is None:
            note = f"{self.folder / 'latest'} does not point to a checkpoint; using the newest, {candidates[0].name}."
        return [candidate.name for candidate in candidates], note

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
        snapshot: bool = False,
    ) -> Path:
        """Write a checkpoint of this step, publish it, point 'latest' (and 'best') at it and drop old ones.

        keep_last: how many to keep besides the best and those saved as a snapshot; 0 keeps all. Every process of `world`
        calls this; each writes and checks its own part, rank 0 publishes.

        `tensors`: flat names → tensors (sharded ones are written by the ranks that hold them), or (name, tensor) pairs
        that are written as they come, without ever being in memory together. `state`: JSON-ready.
        Raises CheckpointError, in every process, if it cannot be written, and NonFiniteWeights if a tensor of the model that
        was given by name is not finite; the former checkpoints are then as before.
        """
        name, world = f"{_STEP}{step:09d}", self.world
        temporary = self.folder / f"{_TEMPORARY}{name}"
        doing = f"writing the checkpoint of step {step}"

        def begin() -> None:
            self.check_still_there()
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

        def write() -> tuple[dict[str, FileEntry], tuple[str, ...]]:
            """This process's tensor files as the manifest lists them; weights that are not finite."""
            entries, not_finite = {}, []

            def note(path: Path, names: list[str], written: Written) -> None:
                entries[path.name] = tensor_entry(written, names)
                not_finite.extend(written.not_finite)

            if plan is None:
                write_streamed(temporary, tensors, _STREAM_BYTES, written=note)
            else:
                write_shards(temporary, tensors, world.rank, plan, lambda name: kind_of(name) == "model", note, world.moved)
            return entries, tuple(not_finite)

        def publish() -> None:
            listed = {name: entry for entries, _ in parts for name, entry in entries.items()}
            document = {"format_version": FORMAT_VERSION, "step": step, **state}
            listed["state.json"] = write_bytes(temporary / "state.json", as_json(document))
            for file in tokenizer_files(tokenizer_folder) if tokenizer_folder is not None else ():
                listed[file.name] = write_bytes(temporary / file.name, file.read_bytes())
            write_manifest(temporary, listed, 1 + max(map(_number, self.all()), default=0))
            for damaged in [folder for folder in self.damaged if folder.exists()]:
                damaged.rename(self.folder / f"damaged_{damaged.name}")
            self.damaged.clear()
            self._publish(temporary, self.folder / name)
            self.point("latest", name)
            if best:
                self.point("best", name)
            if snapshot:
                self.point("snapshots", "\n".join(dict.fromkeys([*(kept.name for kept in self.snapshots()), name])))
            self._prune(keep_last)

        try:
            world.from_main(begin, doing)
            plan = share_out(world.everywhere(lambda: held(tensors))) if isinstance(tensors, dict) else None
            parts = world.everywhere(write, doing)
            if wrong := sorted({name for _, names in parts for name in names}):
                raise NonFiniteWeights(
                    f"The model has weights that are not finite at step {step} ({wrong[0]}"
                    + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else "")
                    + f"), so it is not saved. {self._remaining('go on from it with a lower --learning_rate')}"
                )
            world.from_main(publish, doing)
        except BaseException as error:
            if world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError) or type(error) is Failure:  # here, or in another process
                reason = error.strerror or error if isinstance(error, OSError) else error
                raise CheckpointError(
                    f"The checkpoint of step {step} could not be written to {self.folder}: {reason}. "
                    f"{self._remaining('free some space and go on with --resume')}"
                ) from error
            raise
        return self.folder / name

    def point(self, pointer: str, name: str) -> None:
        """Make 'latest' or 'best' name this folder, or 'snapshots' these, a line each; in one atomic replacement."""
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
        kept = {self.pointed("latest"), self.pointed("best"), *self.snapshots(), *self.all()[-keep_last:]}
        for old in set(self.all()) - kept:
            doomed = self.folder / f"{_TEMPORARY}{old.name}"  # a name that clean() removes if this is cut short
            shutil.rmtree(doomed, ignore_errors=True)
            old.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _remaining(self, advice: str) -> str:
        latest = self.pointed("latest")
        return (
            f"The last good checkpoint, {latest}, is untouched; {advice}."
            if latest
            else "There is no earlier checkpoint; see to the reason, or choose another --out_dir."
        )


def _order(checkpoint: Path) -> tuple[int, int, str]:
    """Checkpoints in the order of their saves, whatever the clock said: by their numbers.

    The first versions gave them none; those are older, and in the order of their times.
    """
    number = _number(checkpoint)
    return number, 0 if number else (checkpoint / "manifest.json").stat().st_mtime_ns, checkpoint.name


def _number(checkpoint: Path) -> int:
    """The number of this save among those of its run, counted from 1; 0 where the manifest has none."""
    status = (checkpoint / "manifest.json").stat()
    return _number_in(checkpoint / "manifest.json", status.st_ino, status.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _number_in(manifest: Path, *version: int) -> int:
    try:
        number = parse_json(manifest.read_text(encoding="utf-8")).get("number", 0)
    except (OSError, ValueError, AttributeError):  # damaged: whoever wants to use it will say so
        return 0
    return number if isinstance(number, int) and not isinstance(number, bool) else 0


# ------------------------------------------------------------------------------------------- reading


def find_checkpoint(
    path: str | Path,
    warn: Callable[[str], None] | None = None,
    which: str = "latest",
    holding: str | None = None,
    world: World | None = None,
) -> Path:
    """A checkpoint folder, or an out_dir (its latest intact one, or its best) → a verified checkpoint.

    holding, world: as for `verify`. Raises CheckpointError.
    """
    path = Path(os.path.abspath(Path(path).expanduser()))
    if (path / "manifest.json").is_file():
        if which == "best":
            raise CheckpointError(f"{path} is one checkpoint; the best one can only be asked of an out_dir.")
        verify(path, holding, world)
        return path
    store = CheckpointStore(path.parent if path.name == "checkpoints" else path)
    if which == "best" and store.all():
        name = (world or World()).from_main(lambda: (store.pointed("best") or Path()).name)
        best = store.folder / name
        if not name:
            raise CheckpointError(
                f"{store.folder} has no best checkpoint, as none was saved right after an evaluation; use the latest one."
            )
        verify(best, holding, world)
        return best
    found = store.newest_intact(
        warn or (lambda message: print(f"warning: {printable(message)}", file=sys.stderr)), holding, world
    )
    if found is None:
        what = "has no checkpoint in it" if path.exists() else "does not exist"
        raise CheckpointError(
            f"{path} {what}; give an out_dir or a checkpoint folder (…/checkpoints/step_000001000), or train one first."
        )
    return found


def stored_tensors(checkpoint: Path, kinds: Collection[str] | None = None) -> StoredTensors:
    """What the listed tensor files hold; only those with tensors of these kinds, if they are given. Raises CheckpointError."""
    entries = {name: entry for name, entry in listed_files(checkpoint).items() if name.lower().endswith(SUFFIX)}
    if kinds is not None:
        entries = {name: entry for name, entry in entries.items() if not kinds.isdisjoint(entry.get("holds") or kinds)}
    try:
        stored = StoredTensors(checkpoint / name for name in entries)
        for name, parts in stored.parts.items():
            for part in parts:
                if kind_of(name) not in (entries[part.path.name].get("holds") or [kind_of(name)]):
                    raise ValueError(f"{part.path.name} holds {name}, which the manifest does not say of it")
        return stored
    except (OSError, ValueError) as error:
        raise damage(checkpoint, str(error)) from error


def load_tensors(checkpoint: Path, into: dict[str, Tensor], optional: tuple[str, ...] = (), world: World | None = None) -> None:
    """Fill these tensors in place from the tensors of the same names, however they were or are sharded.

    Those whose names begin with one of `optional` stay as they are where the checkpoint lacks them. world: the processes
    that call this, each for its own part: if one fails, all do. Raises CheckpointError when another name is missing or a
    shape differs.
    """
    world = world or World()

    def load() -> None:
        stored = stored_tensors(checkpoint, frozenset(map(kind_of, into)))
        wanted = {name: tensor for name, tensor in into.items() if name in stored.parts or not name.startswith(optional)}
        for name, tensor in wanted.items():
            if name not in stored.parts:
                raise CheckpointError(f"Checkpoint {checkpoint} has no tensor {name!r}.")
            if stored.shape(name) != tuple(tensor.shape):
                raise CheckpointError(
                    f"Checkpoint {checkpoint}: {name} has shape {stored.shape(name)}, the model needs {tuple(tensor.shape)}."
                )
        try:
            stored.load(wanted, world.moved)
        except (OSError, ValueError) as error:
            raise damage(checkpoint, f"it cannot be read ({error})") from error

    world.everywhere(load, f"reading {checkpoint}")


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters, tied ones once, and persistent buffers, under their names in a checkpoint."""
    return {f"model.{name}": tensor.detach() for name, tensor in [*model.named_parameters(), *model.saved_buffers().items()]}


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
    from training import huggingface_files as huggingface

    if huggingface.is_folder(path):
        if which == "best":
            raise CheckpointError(f"{path} is a Hugging Face folder; the best checkpoint can only be asked of an out_dir.")
        folder = Path(path).expanduser()
        model = build_model(huggingface.read_config(folder), device="meta").to_empty(device=device)
        huggingface.load_weights(model, folder)
        return model.eval(), load_tokenizer(folder)
    checkpoint = find_checkpoint(path, which=which, holding="model")
    config = model_of(checkpoint)
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


if __name__ == "__main__":
    from training.checkpoint_commands import main

    sys.exit(main(sys.argv[1:]))
