"""The on-disk format of a dataset, read here and written by data/dataset_writer.py.

A dataset is a folder:

    train.bin, val.bin   little-endian uint16 or uint32 token ids, no header (or shards train_00000.bin, …)
    meta.json            dtype, vocab_size, tokenizer, and per split tokens, bytes of text, documents, files with sha256
    tokenizer.json       the tokenizer itself, so that the folder needs nothing else
    meta.pkl             for nanoGPT's tools; not read where there is a meta.json

A folder without meta.json is nanoGPT's own: its ids are uint16, or uint32 where the bytes say so, and a meta.pkl of its
character vocabulary gives the tokenizer (data/nanogpt.py). Inspect or check a dataset with

    python -m data.token_dataset info DIR
    python -m data.token_dataset verify DIR
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from command_line import Mandatory, check_shape, parse_json, printable
from data.files import READ_BYTES, DatasetError, chunks, sha256
from data.nanogpt import Vocabulary, looks_like_uint32, read_vocabulary

FORMAT_VERSION = 1
SPLITS = ("train", "val")
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
UINT16_VOCAB = 2**16  # the largest vocabulary whose ids fit in uint16
FULL_CHECK_BYTES = 256 * 2**20  # splits below this are checked whole when opened (~0.2 s), of larger ones a sample

# What meta.json says, as far as anybody relies on it, and what it says of each split.
SPLIT = {
    **{key: Mandatory(int) for key in ("tokens", "bytes", "documents")},
    "files": Mandatory([Mandatory({"name": Mandatory(str), "size": Mandatory(int), "sha256": Mandatory(str)})]),
}
META = {
    "vocab_size": Mandatory(int),
    "dtype": Mandatory(str),
    "special_ids": Mandatory({"*": int}),
    "tokenizer": Mandatory({"name": Mandatory(str), "fingerprint": Mandatory(str), "kind": str}),
    "splits": Mandatory({"*": Mandatory(SPLIT)}),
    "source": str,
}
DECODED_TOKENS = 256  # to see that a tokenizer works
OPEN_FILES = 100  # of a split at a time: a corpus of 10¹² tokens has more shards than a process may have files open

DATA_DIR = Path(__file__).resolve().parent
PUBLISHING = ".publishing"  # exists while finished files are moved into place: the folder is not consistent


def resolve_dataset(name_or_path: str | os.PathLike) -> Path:
    """The folder of a dataset: a name means data/<name>; a path, or an existing folder, means itself."""
    text = os.path.expanduser(os.fspath(name_or_path))
    if not text.strip():
        raise DatasetError("The dataset's name is empty; give a name such as pydocs, or the path of a folder.")
    path, named = Path(text), DATA_DIR / text
    is_path = path.is_absolute() or text in (".", "..") or os.sep in text or "/" in text
    return path if is_path or (path.is_dir() and not named.is_dir()) else named


def is_prepared(folder: Path) -> bool:
    """Whether a finished dataset of this format lies in `folder` (its content is checked when it is opened)."""
    return (folder / "meta.json").is_file() and not (folder / PUBLISHING).exists()


# ------------------------------------------------------------------------------------------- reading


class TokenSplit:
    """One split of a dataset: `len()` tokens, read by position across its files."""

    def __init__(self, name: str, files: Sequence[Path], dtype: np.dtype, text_bytes: int | None = None):
        self.name, self.files, self.dtype = name, list(files), dtype
        self.bytes = text_bytes  # UTF-8 bytes of text; None where nobody counted
        self.size = sum(path.stat().st_size for path in self.files)
        # ends[i]: position after the last token of file i
        self._ends = np.cumsum([path.stat().st_size // dtype.itemsize for path in self.files])
        self._limit: int | None = None
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()  # the last used one last
        self._lock = threading.Lock()  # the loader's thread and the loop may read at the same time

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._limit is None else self._limit

    def head(self, tokens: int) -> TokenSplit:
        """The first `tokens` of this split, as a split. DatasetError where it has fewer."""
        if not 1 <= tokens <= len(self):
            raise DatasetError(
                f"max_train_tokens={tokens:,} asks for more than {self.label} has ({len(self):,} tokens); use fewer."
                if tokens > 0
                else f"max_train_tokens={tokens:,} is not a number from 1 on."
            )
        part = copy.copy(self)
        part._limit, part.bytes = tokens, None
        return part

    def __repr__(self) -> str:
        return f"TokenSplit({self.name!r}, {len(self):,} tokens, {self.files[0].parent})"

    @property
    def label(self) -> str:
        """How messages call it: the folder and the split."""
        return f"{self.files[0].parent} ({self.name})"

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int64. DatasetError when a file has become shorter than it was when opened."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens [{start}, {stop}) asked of {self.label}, which has {len(self):,}")
        out = np.empty(stop - start, dtype=np.int64)
        done = 0
        while done < len(out):
            shard = int(np.searchsorted(self._ends, start + done, side="right"))
            first = start + done - (int(self._ends[shard - 1]) if shard else 0)
            last = min(first + len(out) - done, self._tokens_of(shard))
            out[done : done + last - first] = np.frombuffer(self._read_file(shard, first, last), self.dtype)
            done += last - first
        return out

    def _tokens_of(self, shard: int) -> int:
        return int(self._ends[shard]) - (int(self._ends[shard - 1]) if shard else 0)

    def _read_file(self, shard: int, first: int, last: int) -> bytes:
        """The bytes of tokens [first, last) of one file, which is opened on first use."""
        width = self.dtype.itemsize
        with self._lock:
            if shard not in self._open:
                self._open[shard] = open(self.files[shard], "rb", buffering=0)
                if len(self._open) > OPEN_FILES:
                    self._open.popitem(last=False)[1].close()
            self._open.move_to_end(shard)
            file = self._open[shard]
            if os.fstat(file.fileno()).st_size < self._tokens_of(shard) * width:
                raise DatasetError(
                    f"{self.files[shard]} became shorter while it was in use ({self._tokens_of(shard):,} tokens expected); "
                    f"prepare or copy the dataset again."
                )
            file.seek(first * width)
            content = file.read((last - first) * width)
            while len(content) < (last - first) * width:  # one call gives 2 GB at most
                more = file.read((last - first) * width - len(content))
                if not more:
                    raise DatasetError(
                        f"{self.files[shard]} became shorter while it was read; prepare or copy the dataset again."
                    )
                content += more
        return content

    def largest_id(self, full: bool) -> int:
        """Largest token id: of all tokens, or of samples spread over the split."""
        return max(int(np.frombuffer(chunk, self.dtype).max()) for path in self.files for chunk in chunks(path, full))


class TokenDataset:
    """A prepared dataset: `split("train")`, `split("val")`, and what meta.json says of it.

    `open` checks that what lies on disk is what was prepared: sizes always, sha256 and ids in full for splits below
    256 MB (for larger ones `python -m data.token_dataset verify DIR` does; the loader checks the ids of every batch).
    """

    def __init__(self, folder: Path, meta: dict | None, splits: dict[str, TokenSplit], note: str | None = None):
        self.folder, self.meta, self.note = folder, meta, note
        self.vocabulary: Vocabulary | None = None  # of a folder of nanoGPT's with a meta.pkl
        self._splits = splits

    @classmethod
    def open(cls, name_or_path: str | os.PathLike, *, vocab_size: int | None = None) -> TokenDataset:
        """Open and check a dataset. `vocab_size` is the model's: every id has to be below it. Prepares nothing."""
        folder = resolve_dataset(name_or_path)
        if not folder.is_dir():
            raise DatasetError(f"No dataset {str(name_or_path)!r}: there is no folder {folder}. {_how_to_prepare(folder)}")
        if (folder / PUBLISHING).exists():
            raise DatasetError(
                f"The dataset in {folder} is half prepared (the preparation is still running, or was "
                f"interrupted). {_how_to_prepare(folder)}"
            )
        dataset = cls._open_with_meta(folder) if (folder / "meta.json").exists() else cls._open_nanogpt(folder)
        dataset._check_ids(vocab_size)
        return dataset

    @classmethod
    def _open_with_meta(cls, folder: Path) -> TokenDataset:
        meta = read_meta(folder)
        dtype, splits = DTYPES[meta["dtype"]], {}
        for name, described in meta["splits"].items():
            paths = [folder / file["name"] for file in described["files"]]
            for path, file in zip(paths, described["files"]):
                _check_size(path, file["size"], dtype)
            splits[name] = split = TokenSplit(name, paths, dtype, described["bytes"])
            if len(split) != described["tokens"]:
                raise DatasetError(
                    f"meta.json of {folder} says {name} has {described['tokens']:,} tokens of "
                    f"{meta['dtype']}, but its files hold {len(split):,} of that dtype; dtype or tokens "
                    f"there is wrong. {_how_to_prepare(folder)}"
                )
            if split.size < FULL_CHECK_BYTES:
                _check_hashes(paths, described["files"])
        return cls(folder, meta, splits)

    @classmethod
    def _open_nanogpt(cls, folder: Path) -> TokenDataset:
        if not (folder / "train.bin").exists():
            raise DatasetError(f"{folder} holds no prepared dataset (no train.bin). {_how_to_prepare(folder)}")
        vocabulary = read_vocabulary(folder / "meta.pkl") if (folder / "meta.pkl").exists() else None
        paths = {name: folder / f"{name}.bin" for name in SPLITS if (folder / f"{name}.bin").exists()}
        wide = vocabulary is not None and vocabulary.size > UINT16_VOCAB
        for path in paths.values():
            _check_size(path, path.stat().st_size, DTYPES["uint16"])
            with open(path, "rb") as file:
                wide = wide or (path.stat().st_size % 4 == 0 and looks_like_uint32(file.read(READ_BYTES)))
        dtype = DTYPES["uint32" if wide else "uint16"]
        for path in paths.values():
            _check_size(path, path.stat().st_size, dtype)
        splits = {name: TokenSplit(name, [path], dtype) for name, path in paths.items()}
        dataset = cls(folder, None, splits)
        dataset.vocabulary = vocabulary
        return dataset

    names, phases = [""], [(0, [1])]  # as of a mixture with one part, see data/mixture.py

    @property
    def stand_in(self) -> str | None:
        """A sentence if another corpus was prepared in this one's place (prepare.py --fallback); else None."""
        fallback = (self.meta or {}).get("fallback")
        if not fallback:
            return None
        return (
            f"the dataset {self.folder.name} holds {fallback['used']}, which --fallback took in place of "
            f"{fallback['instead_of']}: no figure is {fallback['instead_of']}'s"
        )

    @property
    def parts(self) -> list[TokenDataset]:
        """The datasets that it consists of: itself."""
        return [self]

    @property
    def shares(self) -> list[int]:
        """The share of each part."""
        return [1]

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """The fingerprint of the tokenizer it was made with; None where nothing says which that was."""
        if self.meta is not None:
            return self.meta["tokenizer"]["fingerprint"]
        return self.tokenizer().fingerprint if self.vocabulary is not None and self.vocabulary.characters else None

    @property
    def tokenizer_name(self) -> str:
        """How messages call its tokenizer."""
        size = "unknown" if self.vocab_size is None else f"{self.vocab_size:,}"
        return f"{self.meta['tokenizer']['name'] if self.meta else 'tokenizer unknown'}, vocabulary {size}"

    def shortened(self, train_tokens: int) -> TokenDataset:
        """This dataset with only the first so many tokens of its training split; DatasetError where it has fewer."""
        short = copy.copy(self)
        short._splits = {**self._splits, "train": self.split("train").head(train_tokens)}
        return short

    def facts(self) -> dict:
        """What a run's log keeps of it, so that runs on another tokenization of the same text are recognised: the tokenizer,
        and of each split tokens, bytes of text and documents; empty without meta.json."""
        if self.meta is None:
            return {}
        kept = ("tokens", "bytes", "documents")
        splits = {name: {key: split.get(key) for key in kept} for name, split in self.meta["splits"].items()}
        if len(train := self._splits["train"]) < splits["train"]["tokens"]:
            splits["train"] = {"tokens": len(train), "bytes": None, "documents": None}
        return {"tokenizer": self.meta.get("tokenizer"), "splits": splits}

    def _check_ids(self, model_vocab: int | None) -> None:
        """Compare ids and vocabularies; without meta.json, write the note that says how the files were read."""
        if model_vocab is not None and self.vocab_size is not None and self.vocab_size > model_vocab:
            raise DatasetError(
                f"The dataset {self.folder} has a vocabulary of {self.vocab_size:,}, more than the "
                f"model's vocab_size={model_vocab:,}; use --vocab_size={self.vocab_size} or another "
                "dataset."
            )
        limits = [limit for limit in (self.vocab_size, model_vocab) if limit is not None]
        largest, whole = 0, True
        for split in self._splits.values():
            full = split.size < FULL_CHECK_BYTES
            if self.meta is not None and not full:
                continue  # too large to scan: the loader checks each batch
            found = split.largest_id(full)
            if limits and found >= min(limits):
                owner = f"its meta.{'json' if self.meta else 'pkl'}" if min(limits) == self.vocab_size else "the model"
                raise DatasetError(
                    f"{split.label} holds the token id {found:,}, but {owner} has "
                    f"vocab_size={min(limits):,}; the dataset is damaged or was prepared for another "
                    f"vocabulary (at least {found + 1:,})."
                )
            largest, whole = max(largest, found), whole and full
        if self.meta is None:
            dtype = self._splits["train"].dtype.name
            known = "" if self.vocabulary is None else f", vocabulary {self.vocabulary.size:,} by its meta.pkl"
            self.note = (
                f"{self.folder} has no meta.json: read as {dtype} (largest id {largest:,}"
                f"{'' if whole else ' in samples'}{known}); bits per byte are not known."
            )

    def split(self, name: str) -> TokenSplit:
        """The split "train" or "val"."""
        if name not in self._splits:
            raise DatasetError(
                f"The dataset {self.folder} has no {name} split (it has: {', '.join(self._splits)}). "
                f"{_how_to_prepare(self.folder)}"
            )
        return self._splits[name]

    @property
    def vocab_size(self) -> int | None:
        """The tokenizer's vocabulary, special ids included; None without meta.json and meta.pkl."""
        if self.meta is None:
            return self.vocabulary.size if self.vocabulary else None
        return self.meta["vocab_size"]

    @property
    def eos_id(self) -> int | None:
        """The id that ends a document; None without meta.json or where the tokenizer has none."""
        return self.meta["special_ids"].get("eos_id") if self.meta else None

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the content: from the sha256s in meta.json, else from the files (large ones are sampled)."""
        if self.meta:
            hashes = {name: [file["sha256"] for file in split["files"]] for name, split in self.meta["splits"].items()}
            content = [self.meta["dtype"], self.meta["tokenizer"]["fingerprint"], hashes]
        else:
            content = {
                name: [split.size, sha256(split.files[0], full=split.size < FULL_CHECK_BYTES)]
                for name, split in self._splits.items()
            }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def tokenizer(self):
        """The tokenizer the dataset was made with, or None when the folder does not hold it."""
        if not hasattr(self, "_tokenizer"):
            from data.tokenization import CharTokenizer, load_tokenizer

            self._tokenizer = load_tokenizer(self.folder)
            if self._tokenizer is None and self.vocabulary is not None and self.vocabulary.characters:
                self._tokenizer = CharTokenizer(self.vocabulary.characters)
            expected = self.meta["tokenizer"]["fingerprint"] if self.meta and self._tokenizer else None
            if expected and self._tokenizer.fingerprint != expected:
                raise DatasetError(
                    f"{self.folder / 'tokenizer.json'} is not the tokenizer the dataset was made with "
                    f"(fingerprint {self._tokenizer.fingerprint}, meta.json says {expected}). "
                    f"{_how_to_prepare(self.folder)}"
                )
        return self._tokenizer

    def check_tokenizer(self) -> str | None:
        """See at the start of a run that its tokenizer will work at its end, when a checkpoint is sampled from or exported.

        Returns None, or a sentence about what will not be possible here (the folder has no tokenizer, or its library or
        files are not on this machine). DatasetError where it is damaged, not the one the dataset was made with, or cannot
        decode the dataset.
        """
        from data.tokenization import TokenizerUnavailable

        try:
            tokenizer = self.tokenizer()
        except TokenizerUnavailable as error:
            return f"the tokenizer of {self.folder} cannot be used on this machine, so its text cannot be sampled here: {error}"
        except (ValueError, OSError) as error:
            raise DatasetError(f"The tokenizer of {self.folder} is broken: {error}") from None
        if tokenizer is None:
            return f"{self.folder} has no tokenizer.json, so a checkpoint will know ids only, no text." if self.meta else None
        if self.meta and tokenizer.vocab_size != self.vocab_size:
            raise DatasetError(
                f"The tokenizer of {self.folder} has a vocabulary of {tokenizer.vocab_size:,}, but meta.json says "
                f"{self.vocab_size:,}. {_how_to_prepare(self.folder)}"
            )
        split = self._splits["train"]
        ids = [i for i in split.read(0, min(len(split), DECODED_TOKENS)).tolist() if i != tokenizer.eos_id]
        try:
            tokenizer.encode(tokenizer.decode(ids))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a library may even panic; whatever it does, it would do after the training as well
            raise DatasetError(
                f"The tokenizer of {self.folder} cannot decode and encode the dataset's first tokens ({type(error).__name__}: "
                f"{error}). {_how_to_prepare(self.folder)}"
            ) from None
        return None

    def verify(self) -> None:
        """Check every file in full, whatever its size. Raises DatasetError."""
        for name, split in self._splits.items():
            if self.meta:
                _check_hashes(split.files, self.meta["splits"][name]["files"])
                if (found := split.largest_id(full=True)) >= self.vocab_size:
                    raise DatasetError(f"{split.label} holds the token id {found:,}, but its vocab_size is {self.vocab_size:,}.")
        self.check_tokenizer()

    def describe(self) -> str:
        """A few lines for people: where it is, its vocabulary, and the size of each split."""
        lines = [f"dataset      {self.folder}", f"fingerprint  {self.fingerprint}"]
        if self.meta:
            lines += [
                f"source       {self.meta['source']}",
                f"tokenizer    {self.meta['tokenizer']['name']}, vocabulary {self.vocab_size:,}, eos id "
                f"{self.eos_id}, {self.meta['dtype']}",
            ]
        else:
            lines.append(f"note         {self.note}")
        for name, split in self._splits.items():
            counted = "bytes unknown"
            if self.meta:
                documents = self.meta["splits"][name]["documents"]
                counted = f"{split.bytes:,} bytes, {documents:,} document{'s' * (documents != 1)}"
            lines.append(f"{name:<12} {len(split):,} tokens, {counted}")
        return "\n".join(lines)


# ------------------------------------------------------------------------------------------- checks


def _how_to_prepare(folder: Path) -> str:
    """The command that makes the dataset in `folder`, again where there is one, as a sentence."""
    again = " --overwrite" if (folder / "meta.json").exists() else ""
    inside = folder.parent.resolve() == DATA_DIR
    if inside and (DATA_DIR / folder.name / "prepare.py").exists():
        if folder.name == "textfile":
            return "Prepare your own text with: python data/textfile/prepare.py FILE --name=NAME, then use --dataset=NAME"
        return f"Prepare it with: python data/{folder.name}/prepare.py{again}"
    target = f"--name={folder.name}" if inside else f"--out={folder}"
    copied = "Copy it again if it was copied from elsewhere; else prepare" if again else "Prepare"
    return f"{copied} it from your own text with: python data/textfile/prepare.py FILE {target}{again}"


def read_meta(folder: Path) -> dict:
    """meta.json, checked for form: everything the readers rely on is there and of the right type."""
    path = folder / "meta.json"
    try:
        meta = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(meta, dict):
            raise ValueError("it is not an object")
    except (ValueError, OSError) as error:
        raise DatasetError(f"{path} cannot be read as JSON ({error}). {_how_to_prepare(folder)}") from None
    if (version := meta.get("format_version")) != FORMAT_VERSION:
        raise DatasetError(
            f"{path} has format_version {version!r}, and this program reads {FORMAT_VERSION} only; "
            f"update the program, or prepare the dataset again. {_how_to_prepare(folder)}"
        )

    try:
        check_shape(meta, META)
        for name in dict.fromkeys([*SPLITS, *meta["splits"]]):
            check_shape(meta["splits"].get(name), Mandatory(SPLIT), f"splits.{name}")
    except ValueError as error:
        raise DatasetError(f"{path}: {error}. {_how_to_prepare(folder)}") from None
    if meta["dtype"] not in DTYPES:
        raise DatasetError(
            f"{path} has the dtype {meta['dtype']!r}, which is not one of {', '.join(DTYPES)}. {_how_to_prepare(folder)}"
        )
    meta["source"] = meta.get("source") or ""
    for split in meta["splits"].values():
        if not split["files"]:
            raise DatasetError(f"{path} lists no files of a split. {_how_to_prepare(folder)}")
        for file in split["files"]:
            if Path(file["name"]).name != file["name"]:
                raise DatasetError(
                    f"{path} names the file {file['name']!r}, which is not in its folder. {_how_to_prepare(folder)}"
                )
    return meta


def _check_size(path: Path, expected: int, dtype: np.dtype) -> None:
    if not path.is_file():
        raise DatasetError(f"{path} is missing. {_how_to_prepare(path.parent)}")
    size = path.stat().st_size
    if size != expected:
        raise DatasetError(
            f"{path} has {size:,} bytes, but meta.json says {expected:,}; it is truncated or was "
            f"replaced. {_how_to_prepare(path.parent)}"
        )
    if size == 0:
        raise DatasetError(f"{path} is empty. {_how_to_prepare(path.parent)}")
    if size % dtype.itemsize:
        raise DatasetError(
            f"{path} has {size:,} bytes, which is not a whole number of {dtype.name} ids; it is "
            f"truncated or no token file. {_how_to_prepare(path.parent)}"
        )


def _check_hashes(paths: Sequence[Path], described: Sequence[dict]) -> None:
    for path, file in zip(paths, described):
        if sha256(path) != file["sha256"]:
            raise DatasetError(f"{path} is damaged: its sha256 is not the one in meta.json. {_how_to_prepare(path.parent)}")


# ------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> int:
    """`info DIR` prints what a dataset is; `verify DIR` checks every byte of it. Returns the exit code."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m data.token_dataset", description="Inspect or check a prepared dataset.")
    parser.add_argument("command", choices=("info", "verify"))
    parser.add_argument("dataset", help="name of a dataset in data/, or path of its folder")
    options = parser.parse_args(arguments)
    try:
        dataset = TokenDataset.open(options.dataset)
        print(printable(dataset.describe()))
        if options.command == "verify":
            dataset.verify()
            print(f"verified     {'every file is as meta.json says' if dataset.meta else 'sizes only: no meta.json'}")
    except (DatasetError, ValueError, OSError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
