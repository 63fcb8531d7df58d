"""Writing a dataset: into a folder that holds nothing else, and shown to readers only when it is whole.

While a dataset is being prepared its files grow in `.staging` inside of its folder; `preparation.json` there says how much
of them counts (`commit`), and the next writer of the same thing goes on after it. Then a list of them is put into the folder
(`.publishing`), they are moved up, meta.json last, and the list is removed; what is killed in between is finished by the
next one that prepares there. Only files that a prepare wrote are ever replaced or removed: those that the folder's meta.json
or such a list names.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.files import chunks, fsync
from data.token_dataset import DATA_DIR, DTYPES, FORMAT_VERSION, PUBLISHING, SPLITS, UINT16_VOCAB, DatasetError

STAGING = ".staging"  # where a writer works; readers never look into it
STAGED_BY = "preparation.json"  # the first file in there, without which the folder is taken for somebody else's
LOCK = ".prepare.lock"
BESIDE = ("meta.json", "meta.pkl", "tokenizer.json", "tokenizer_config.json")  # what a dataset has besides its .bin files
HARMLESS = {"prepare.py", "README.md", "__pycache__", ".gitignore", ".gitkeep", ".DS_Store", "Thumbs.db", "lost+found"}


# ------------------------------------------------------------------------------------------- which folder


def check_folder(folder: Path, overwrite: bool = False) -> None:
    """See that a dataset may be put into `folder`. Changes nothing; DatasetError says what is in the way.

    It may where nothing is, or nothing but what an interrupted preparation left there. With `overwrite`, a dataset that a
    prepare made may be replaced, and other files may lie beside; but none that a prepare did not write is replaced.
    """
    if not os.path.lexists(folder):
        return
    if not folder.exists():
        raise DatasetError(f"{folder} is a link to {os.readlink(folder)}, which does not exist; choose another folder.")
    if not folder.is_dir():
        raise DatasetError(f"{folder} is a file, and a dataset needs a folder of its own; choose another folder.")
    staging = folder / STAGING
    if os.path.lexists(staging) and not _is_staging(staging):
        raise DatasetError(
            f"{staging} was not made by a preparation of this version, which works in a folder of that name; move it away, "
            "or choose another folder."
        )
    written, present = _written_files(folder), {path.name for path in folder.iterdir()}
    if "meta.json" in written and not overwrite:
        raise DatasetError(
            f"{folder} holds a dataset already; choose another folder, use it as it is, or replace it with --overwrite."
        )
    if in_the_way := sorted(name for name in present - written if _is_dataset_file(name)):
        raise DatasetError(
            f"{folder} has {_listed(in_the_way)}, which a prepare of this program did not write and a dataset would replace; "
            "move it away, or choose another folder."
        )
    others = sorted(present - written - HARMLESS - {STAGING, PUBLISHING, LOCK})
    own = folder.resolve().parent == DATA_DIR and "prepare.py" in present
    if others and not overwrite and not own:
        raise DatasetError(
            f"{folder} is not empty: it has {_listed(others)}. Choose a folder of its own for the dataset; --overwrite puts "
            "it beside these files."
        )


def _is_dataset_file(name: str) -> bool:
    """Whether a dataset may have a file of this name."""
    stem = name.removesuffix(".bin")
    split, _, number = stem.partition("_")
    return name in BESIDE or (stem != name and split in SPLITS and (number.isdigit() or stem == split))


def _written_files(folder: Path) -> set[str]:
    """The names of the files in `folder` that a prepare wrote: those of its meta.json, or of a publication cut short."""
    if (folder / PUBLISHING).is_file() and (published := _read_list(folder / PUBLISHING)):
        return {*published["new"], *published["old"]}
    if not (folder / "meta.json").is_file():
        return set()
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["format_version"] != FORMAT_VERSION:
            raise ValueError(f"its format_version is {meta['format_version']!r}")
        names = {file["name"] for split in meta["splits"].values() for file in split["files"]}
        if not all(isinstance(name, str) and _is_dataset_file(name) for name in names):
            raise ValueError("it names files of another kind")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error) if isinstance(error, (OSError, ValueError)) else "it is no description of a dataset"
        raise DatasetError(
            f"{folder / 'meta.json'} does not say which files a prepare of this program wrote ({reason}), so none of them is "
            "replaced; remove the folder yourself, or choose another one."
        ) from None
    return names | {name for name in BESIDE if (folder / name).is_file()}


def _is_staging(staging: Path) -> bool:
    """Whether a folder was made by a writer: it begins by saying so (and is empty before)."""
    return staging.is_dir() and not staging.is_symlink() and ((staging / STAGED_BY).is_file() or not any(staging.iterdir()))


def _listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only process that prepares `folder`, which is made; wait for another one to finish.

    A lock dies with its process. At the end folders that were made for it and stayed empty are removed again.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = open(os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644), "r+")
        except FileNotFoundError:  # the process before us removed the folder it had made
            continue
        _wait_for(file, folder)
        if lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat()):
            break
        file.close()  # the process before us removed the file: lock the new one
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            _remove_staging(folder)  # an interrupt may hit before the writer can tidy up
        with contextlib.suppress(OSError):
            lock.unlink()
        file.close()
        with contextlib.suppress(OSError):  # keeps every folder that has something in it
            for path in missing:
                path.rmdir()


def _wait_for(file, folder: Path) -> None:
    """Lock an open file; where nobody can (Windows, some network file systems), say so and go on."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"Waiting for another process that prepares {folder} …", file=sys.stderr, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        print(
            f"warning: {folder} is on a file system without locks ({error.strerror}); see to it yourself that one process "
            "at a time prepares it.",
            file=sys.stderr,
        )


# ------------------------------------------------------------------------------------------- writing


class DatasetWriter:
    """Writes a dataset document by document, and shows it to readers only when it is whole.

    Used as a context manager: files grow in a hidden folder; `publish` moves them into place, meta.json last. An
    exception, a kill or a power cut before that leaves `folder` as it was; one *during* it leaves a list that readers
    refuse and `finish_publishing` works off. One writer a folder at a time (`locked` sees to it).

        with DatasetWriter(folder, tokenizer, source="my texts") as writer:
            writer.add("train", ids, text_bytes=len(text.encode()))
            writer.add("val", …)
            meta = writer.publish()

    append_eos, prepend_bos: end and begin each document with these ids of the tokenizer's (for corpora of more than one).
    shard_tokens: start a new file (train_00000.bin, train_00001.bin, …) after this many tokens.
    overwrite: replace a dataset that is there; see `check_folder`, whose DatasetError this raises.
    identity: JSON that says what is being written. What has been given to `commit` then survives the end of the writer, and
    the next one with the same identity goes on after it: `state` is what the last commit was given (None: from the start).
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        tokenizer,
        *,
        source: str = "",
        append_eos: bool = False,
        prepend_bos: bool = False,
        shard_tokens: int | None = None,
        overwrite: bool = False,
        identity: dict | None = None,
    ):
        for wanted, which in ((append_eos, "eos"), (prepend_bos, "bos")):
            if wanted and getattr(tokenizer, f"{which}_id") is None:
                raise ValueError(f"{tokenizer.name!r} has no {which} id to put between documents.")
        self.folder, self.overwrite, self.identity = Path(folder), overwrite, identity
        finish_publishing(self.folder)
        check_folder(self.folder, overwrite)
        self.tokenizer, self.source = tokenizer, source
        self.dtype = "uint16" if tokenizer.vocab_size <= UINT16_VOCAB else "uint32"
        self._before, self._after = (
            np.array(ids, dtype=DTYPES[self.dtype]) for ids in ([tokenizer.bos_id] * prepend_bos, [tokenizer.eos_id] * append_eos)
        )
        self.staging = self.folder / STAGING
        self.shard_tokens = shard_tokens
        left = unfinished(self.folder)
        self.state = left["state"] if left is not None and identity is not None and left["identity"] == identity else None
        if self.state is None:
            self._begin()
        else:
            self._splits = {split: self._split_writer(split, left["splits"][split]) for split in SPLITS}

    def _begin(self) -> None:
        """Make the hidden folder, which first of all says whose it is, with the tokenizer and empty splits."""
        forget(self.folder)
        self.staging.mkdir(parents=True)
        (self.staging / STAGED_BY).write_text(json.dumps({"format_version": FORMAT_VERSION}) + "\n", encoding="utf-8")
        self.state = None
        self.tokenizer.save(self.staging)
        self._splits = {split: self._split_writer(split) for split in SPLITS}

    def _split_writer(self, split: str, committed: dict | None = None) -> _SplitWriter:
        return _SplitWriter(self.staging, split, DTYPES[self.dtype], self.shard_tokens, committed)

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, *exception) -> None:
        self.discard()

    def add(self, split: str, ids: Sequence[int], text_bytes: int, *, begins: bool = True, ends: bool = True) -> None:
        """Append a document to "train" or "val": its token ids, and how many UTF-8 bytes of text they stand for.

        A long document may come in parts, one after the other: `begins` and `ends` say which part this is.
        """
        ids = np.asarray(ids)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.tokenizer.vocab_size:
            raise ValueError(
                f"the tokenizer {self.tokenizer.name!r} gave ids from {ids.min()} to {ids.max()}, outside "
                f"of its vocabulary of {self.tokenizer.vocab_size:,}."
            )
        parts = [self._before] * begins + [ids.astype(DTYPES[self.dtype], copy=False)] + [self._after] * ends
        self._splits[split].write(np.concatenate(parts), text_bytes, begins)

    def restart(self) -> None:
        """Drop everything that has been added or committed, and begin with the first document again."""
        for writer in self._splits.values():
            writer.close()
        self._begin()

    def tokens(self, split: str) -> int:
        """How many tokens a split has so far, those between documents included."""
        return self._splits[split].tokens

    def documents(self, split: str) -> int:
        """How many documents a split has so far."""
        return self._splits[split].documents

    def commit(self, state: dict) -> None:
        """Make what has been added so far survive a kill or a power cut, with `state` (JSON): what to go on with."""
        content = {
            "format_version": FORMAT_VERSION,
            "identity": self.identity,
            "state": state,
            "splits": {split: writer.commit() for split, writer in self._splits.items()},
        }
        new = self.staging / f"{STAGED_BY}.new"
        new.write_text(json.dumps(content) + "\n", encoding="utf-8")
        fsync(new)
        os.replace(new, self.staging / STAGED_BY)
        fsync(self.staging)
        self.state = state

    def publish(self, **more) -> dict:
        """Finish the files, move them into place, and return the content of meta.json, to which `more` is added."""
        meta = {
            "format_version": FORMAT_VERSION,
            "dtype": self.dtype,
            "vocab_size": self.tokenizer.vocab_size,
            "tokenizer": {"kind": self.tokenizer.kind, "name": self.tokenizer.name, "fingerprint": self.tokenizer.fingerprint},
            "special_ids": {
                "eos_id": self.tokenizer.eos_id,
                **({} if self.tokenizer.bos_id is None else {"bos_id": self.tokenizer.bos_id}),
            },
            "splits": {split: writer.finish() for split, writer in self._splits.items()},
            "source": self.source,
            **more,
        }
        for split, described in meta["splits"].items():
            if not described["tokens"]:
                raise DatasetError(
                    f"The {split} split of {self.folder} would be empty; give more text, a larger max_tokens or max_samples "
                    "(where one was given), or another val_fraction."
                )
        nanogpt = {"vocab_size": self.tokenizer.vocab_size}
        if hasattr(self.tokenizer, "characters"):
            nanogpt["itos"] = dict(enumerate(self.tokenizer.characters))
            nanogpt["stoi"] = {character: i for i, character in enumerate(self.tokenizer.characters)}
        (self.staging / "meta.pkl").write_bytes(pickle.dumps(nanogpt))
        (self.staging / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        self._start_publishing()
        finish_publishing(self.folder)
        return meta

    def _start_publishing(self) -> None:
        """Make sure that every file is on the disk, then put the list of what is to be moved into the folder."""
        new = sorted(path.name for path in self.staging.iterdir() if _is_dataset_file(path.name))
        for name in new:
            fsync(self.staging / name)
        check_folder(self.folder, self.overwrite)  # somebody may have put something there meanwhile
        old = sorted(_written_files(self.folder) - set(new))
        todo = self.staging / PUBLISHING
        todo.write_text(json.dumps({"new": new, "old": old}) + "\n", encoding="utf-8")
        fsync(todo)
        fsync(self.staging)
        os.replace(todo, self.folder / PUBLISHING)
        fsync(self.folder)

    def discard(self) -> None:
        """Close, and remove what has been neither committed nor published. Harmless after `publish`."""
        for writer in self._splits.values():
            with contextlib.suppress(OSError):  # a full disk refuses the last bytes once more
                writer.close()
        _remove_staging(self.folder)


def unfinished(folder: Path) -> dict | None:
    """What a writer that did not finish has committed: its `identity`, `state`, and the files of each of its `splits`."""
    try:
        content = json.loads((folder / STAGING / STAGED_BY).read_text(encoding="utf-8"))
        return content if content["state"] is not None else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def forget(folder: Path) -> None:
    """Remove what an unfinished writer left, be it committed; not what is being published, which is for the next to finish."""
    staging = folder / STAGING
    if staging.exists() and _is_staging(staging) and not (folder / PUBLISHING).exists():
        shutil.rmtree(staging, ignore_errors=True)


def _remove_staging(folder: Path) -> None:
    """Remove what an unfinished writer left and has not committed."""
    if unfinished(folder) is None:
        forget(folder)


def finish_publishing(folder: Path) -> None:
    """Work off the list of a publication: remove the old files, move the new ones up, meta.json last.

    Does nothing where there is no list. Can be cut short at any point and repeated.
    """
    if not (folder / PUBLISHING).is_file():
        return
    todo, staging = _read_list(folder / PUBLISHING), folder / STAGING
    if todo is None:
        raise DatasetError(
            f"{folder / PUBLISHING} was left by a preparation with an earlier version that was interrupted, or is not of this "
            f"program; remove it and the files of the dataset, then prepare again."
        )
    for name in sorted({*todo["old"], "meta.json"} if (staging / "meta.json").exists() else todo["old"]):
        (folder / name).unlink(missing_ok=True)
    for name in sorted(todo["new"], key=lambda name: (name == "meta.json", name)):
        if (staging / name).exists():
            os.replace(staging / name, folder / name)
    fsync(folder)
    shutil.rmtree(staging, ignore_errors=True)
    (folder / PUBLISHING).unlink()
    fsync(folder)


def _read_list(path: Path) -> dict[str, list[str]] | None:
    """The list of a publication: the names of new files to be moved up and of old ones to be removed; None if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = [*content["new"], *content["old"]]
        return content if all(isinstance(name, str) and _is_dataset_file(name) for name in names) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


class _SplitWriter:
    """The files of one split while they grow, with their sha256. `committed`: go on after what `commit` returned."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int | None, committed: dict | None = None):
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        self.tokens = self.bytes = self.documents = 0
        self.files: list[dict] = []
        self._file: BinaryIO | None = None
        if committed is None:
            self._next_file()
        else:
            self._go_on(committed)

    def _next_file(self) -> None:
        self.close()
        suffix = "" if self.shard_tokens is None else f"_{len(self.files):05d}"
        self.files.append({"name": f"{self.split}{suffix}.bin", "size": 0, "sha256": ""})
        self._file = open(self.folder / self.files[-1]["name"], "wb")
        self._hash = hashlib.sha256()

    def _go_on(self, committed: dict) -> None:
        """Cut the files back to what was committed, and open the last one again."""
        self.tokens, self.bytes, self.documents, self.files = (
            committed[key] for key in ("tokens", "bytes", "documents", "files")
        )
        for path in self.folder.glob(f"{self.split}*.bin"):
            if path.name not in {file["name"] for file in self.files}:
                path.unlink()
        for file in self.files:
            path = self.folder / file["name"]
            size = path.stat().st_size if path.is_file() else -1
            if size < file["size"] or (file["sha256"] and size != file["size"]):
                raise DatasetError(
                    f"{path} is not as the interrupted preparation left it, so it cannot go on; begin anew with --overwrite."
                )
        last = self.files[-1]
        os.truncate(self.folder / last["name"], last["size"])
        self._hash, last["sha256"] = hashlib.sha256(), ""
        for chunk in chunks(self.folder / last["name"]):
            self._hash.update(chunk)
        self._file = open(self.folder / last["name"], "ab")

    def write(self, ids: np.ndarray, text_bytes: int, begins: bool) -> None:
        """Append ids, of the dtype of the files, to the split. `begins`: with them begins a document."""
        self.tokens += len(ids)
        self.bytes += text_bytes
        self.documents += begins
        while len(ids):
            room = len(ids)
            if self.shard_tokens is not None:
                room = self.shard_tokens - self.files[-1]["size"] // self.dtype.itemsize
                if room <= 0:
                    self._next_file()
                    continue
            chunk, ids = ids[:room].tobytes(), ids[room:]
            self._file.write(chunk)
            self._hash.update(chunk)
            self.files[-1]["size"] += len(chunk)

    def commit(self) -> dict:
        """Bring everything onto the disk; returns what `_go_on` needs. Files before the last one have been synced before."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"tokens": self.tokens, "bytes": self.bytes, "documents": self.documents, "files": self.files}

    def finish(self) -> dict:
        self.close()
        return {"tokens": self.tokens, "bytes": self.bytes, "documents": self.documents, "files": self.files}

    def close(self) -> None:
        """Close the open file, on the disk, with its checksum."""
        if self._file is not None and not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self.files[-1]["sha256"] = self._hash.hexdigest()
