"""Sources of documents: read piece by piece from any place, so that memory stays small and an interrupted reading goes on.

A `Source` says what it is (`identity`) and is read by a `Reader`, an iterator of `TextPiece`s. A document is one piece, or
several if it is a long .txt file, which is cut where no tokenizer's word is cut in two (see `find_cut`). After any piece
`reader.position()` is a small JSON value, and `source.read(position)` gives the pieces that follow.
"""

from __future__ import annotations

import bisect
import codecs
import csv
import glob
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

PIECE_CHARACTERS = 1_000_000  # a longer text is cut into pieces of about this size
BLOCK_BYTES = 2**22  # of a .txt file, read at a time
LONGEST_WORD = 64 * 2**20  # characters without a place to cut at: no text for people
LONGEST_LINE = 2**29  # bytes of one JSON record
PARQUET_ROWS = 500  # read at a time
TEXT_SUFFIXES = (".txt", ".jsonl", ".jsonl.zst", ".csv", ".parquet")

Position = Any  # JSON: where to go on; None is the start


@dataclass(frozen=True)
class TextPiece:
    """A text: a document, or its beginning, middle or end. `split`: "train" or "val" where the source says so."""

    text: str
    begins: bool = True
    ends: bool = True
    split: str | None = None


class Reader:
    """Reads the pieces of a source once, in order. A subclass gives `__iter__` and sets `self.at` before each piece."""

    at: Position = None

    def __iter__(self) -> Iterator[TextPiece]:
        raise NotImplementedError

    def position(self) -> Position:
        """Where the piece after the last one given begins."""
        return self.at

    def skip(self, split: str) -> None:
        """Leave out what is left of a split. Only asked of readers of a source that splits itself."""
        raise NotImplementedError

    def share(self) -> float | None:
        """How much of the source has been read, from 0 to 1; None where nobody knows."""
        return None


class Source:
    """Documents from somewhere. `several`: more than one (None: not known before they are read)."""

    description = ""
    several: bool | None = None
    splits_itself = False  # whether each piece names its split

    def identity(self) -> dict | None:
        """JSON that differs where the documents may differ; None where nothing is known, so that no reading can go on."""
        raise NotImplementedError

    def facts(self) -> dict | None:
        """What of the identity is the same on every machine; meta.json keeps it."""
        return self.identity()

    def changed(self) -> float:
        """When the source was changed last, in seconds since 1970; 0 where it never is."""
        return 0.0

    def read(self, position: Position = None) -> Reader:
        """A reader of everything, or of what follows a position."""
        raise NotImplementedError

    def samples(self, number: int) -> list[Reader]:
        """Readers that begin at up to `number` places spread over the source, to estimate the whole by."""
        return [self.read()]


class Documents(Source):
    """What a function gives: an iterator of (name, text), the same at each call. A position is a number of documents."""

    def __init__(self, documents: Callable[[], Iterator[tuple[str, str]]], description: str = "", name: str | None = None):
        self.documents, self.description, self.name = documents, description, name

    def identity(self) -> dict | None:
        return {"documents": self.name, "description": self.description} if self.name else None

    def read(self, position: Position = None) -> Reader:
        return _DocumentsReader(self.documents, position or 0)


class _DocumentsReader(Reader):
    def __init__(self, documents: Callable, skipped: int):
        self.documents, self.at = documents, skipped

    def __iter__(self) -> Iterator[TextPiece]:
        skipped = self.at
        for number, (_, text) in enumerate(self.documents(), 1):
            if number > skipped:
                self.at = number
                yield TextPiece(text)


class Splits(Source):
    """Sources that are splits of one corpus, {"train": …, "val": …}, read one after the other."""

    splits_itself = True
    several = True

    def __init__(self, parts: dict[str, Source]):
        self.parts, self.description = parts, parts["train"].description

    def identity(self) -> dict | None:
        identities = {split: part.identity() for split, part in self.parts.items()}
        return None if None in identities.values() else identities

    def facts(self) -> dict | None:
        return {split: part.facts() for split, part in self.parts.items()}

    def changed(self) -> float:
        return max(part.changed() for part in self.parts.values())

    def read(self, position: Position = None) -> Reader:
        return _SplitsReader(self.parts, *(position or (0, None)))

    def samples(self, number: int) -> list[Reader]:
        return self.parts["train"].samples(number)


class _SplitsReader(Reader):
    def __init__(self, parts: dict[str, Source], number: int, inner: Position):
        self.parts, self.number, self.inner = list(parts.items()), number, inner
        self.reader = self.parts[number][1].read(inner)
        self.skipped: set[str] = set()

    def __iter__(self) -> Iterator[TextPiece]:
        while True:
            split = self.parts[self.number][0]
            if split not in self.skipped:
                for piece in self.reader:
                    yield TextPiece(piece.text, piece.begins, piece.ends, split)
                    if split in self.skipped:
                        break
            if self.number + 1 == len(self.parts):
                return
            self.number += 1
            self.reader = self.parts[self.number][1].read()

    def position(self) -> Position:
        return [self.number, self.reader.position()]

    def skip(self, split: str) -> None:
        self.skipped.add(split)

    def share(self) -> float | None:
        """Of the first part, which is nearly everything."""
        return 1.0 if self.number else self.reader.share()


# ------------------------------------------------------------------------------------------- files of one's own


class TextFiles(Source):
    """.txt (a file is a document), .jsonl and .jsonl.zst (a line), .csv and .parquet (a row) files.

    text_key: the field or column with the text. Empty texts are passed over. ValueError names the file, and the line or row
    where there is one.
    """

    def __init__(self, files: Sequence[Path], text_key: str = "text"):
        self.files, self.text_key = list(files), text_key
        names = ", ".join(file.name for file in self.files[:5])
        self.description = names + (f" and {len(self.files) - 5} more" if len(self.files) > 5 else "")
        if len(self.files) > 1:
            self.several = True
        elif _read_of(self.files[0]) is _read_txt:
            self.several = False

    def identity(self) -> dict:
        stats = [(str(file.resolve()), file.stat()) for file in self.files]
        return self._hashed([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])

    def facts(self) -> dict:
        return self._hashed([[file.name, file.stat().st_size] for file in self.files])

    def _hashed(self, listed: list) -> dict:
        digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]
        return {"files": len(listed), "sha256": digest, "text_key": self.text_key}

    def changed(self) -> float:
        return max(file.stat().st_mtime for file in self.files)

    def read(self, position: Position = None) -> Reader:
        return _FilesReader(self, *(position or (0, None)))

    def samples(self, number: int) -> list[Reader]:
        ends = list(itertools.accumulate(file.stat().st_size for file in self.files))
        found = {}
        for place in range(number):
            target = (place + 0.5) / number * ends[-1]
            index = bisect.bisect_right(ends, target)
            size = ends[index] - (ends[index - 1] if index else 0)
            at = _near(self.files[index], 1 - (ends[index] - target) / size)
            found[index, json.dumps(at)] = self.read((index, at))
        return list(found.values())


class _FilesReader(Reader):
    def __init__(self, source: TextFiles, index: int, inside: Position):
        self.source, self.index, self.inside = source, index, inside
        self.ends = list(itertools.accumulate(file.stat().st_size for file in source.files))
        self.share_of_file = 0.0

    def __iter__(self) -> Iterator[TextPiece]:
        for index in range(self.index, len(self.source.files)):
            path, start = self.source.files[index], self.inside if index == self.index else None
            empty = start is None
            for text, begins, ends, inside, share in _read_of(path)(path, self.source.text_key, start):
                if text.strip() or not (begins and ends):
                    empty = False
                    self.index, self.inside, self.share_of_file = index, inside, share
                    yield TextPiece(text, begins, ends)
            if empty:
                raise ValueError(f"{path} holds no text; leave it out, or check that it was written whole.")

    def position(self) -> Position:
        return [self.index, self.inside]

    def share(self) -> float:
        before = self.ends[self.index - 1] if self.index else 0
        return (before + (self.ends[self.index] - before) * self.share_of_file) / max(1, self.ends[-1])


def find_text_files(paths: Sequence[str | os.PathLike]) -> list[Path]:
    """The files that paths, folders (their text files, to the bottom) and globs stand for, each once."""
    found: dict[Path, None] = {}
    for given in paths:
        path = Path(given).expanduser()
        if path.is_dir():
            files = [file for file in sorted(path.rglob("*")) if file.name.lower().endswith(TEXT_SUFFIXES) and file.is_file()]
            if not files:
                kinds = ", ".join(TEXT_SUFFIXES)
                raise ValueError(f"The folder {path} has no {kinds} files; give another folder, or the files themselves.")
        elif path.is_file():
            files = [path]
        else:
            files = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if Path(match).is_file()]
            if not files:
                raise ValueError(f"There is no file {path}; check the path.")
        found.update(dict.fromkeys(files))
    return list(found)


# Each reads a file from a place in it (None: its start) and yields (text, begins, ends, place after it, share of the file).
_Read = Callable[[Path, str, Position], Iterator[tuple[str, bool, bool, Position, float]]]

# A place where a text can be cut so that its parts have the ids of the whole: the vocabularies of GPT-2 and its successors
# never join a space to what stands before it, nor a line break to a letter or number before it.
_CUT = re.compile(r"(?<=\S) |(?<=[^\W_])\n")


def find_cut(text: str, start: int) -> int:
    """The first place from `start` (1 at least) on where a text can be cut without changing its ids; -1 if there is none."""
    match = _CUT.search(text, start)
    return match.start() if match else -1


def _read_txt(path: Path, text_key: str, at: Position) -> Iterator[tuple[str, bool, bool, Position, float]]:
    """One document, in pieces of PIECE_CHARACTERS or a little more. Places are bytes."""
    size, start = path.stat().st_size, at or 0
    with open(path, "rb") as file:
        if not start and file.read(3) == codecs.BOM_UTF8:
            start = 3
        begins, position = at is None, start
        file.seek(start)
        decoder, text, ended = codecs.getincrementaldecoder("utf-8")(), "", False
        while not (ended and not text):
            cut = find_cut(text, PIECE_CHARACTERS) if len(text) > PIECE_CHARACTERS else -1
            if cut < 0 and not ended:
                if len(text) > LONGEST_WORD:
                    raise ValueError(
                        f"{path} has no space or line break in {len(text):,} characters from byte {position:,} on, so it seems "
                        "to hold something else than text; leave it out."
                    )
                block = file.read(BLOCK_BYTES)
                ended = not block
                text += _decoded(decoder, block, ended, path, file.tell() - len(block))
                continue
            piece, text = (text, "") if cut < 0 else (text[:cut], text[cut:])
            position += len(piece.encode())
            yield piece, begins, ended and not text, position, position / max(1, size)
            begins = False


def _decoded(decoder, block: bytes, final: bool, path: Path, offset: int) -> str:
    """A block of a file as text. Raises ValueError where it is none."""
    try:
        pending = len(decoder.getstate()[0])
        text = decoder.decode(block, final)
    except UnicodeDecodeError as error:
        hint = "iconv -f UTF-16 -t UTF-8" if block[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) and not offset else "iconv"
        raise ValueError(
            f"{path} is not UTF-8 text (byte {offset - pending + error.start:,}: {error.reason}); convert it, for example with "
            f"{hint}."
        ) from None
    if "\0" in text:
        raise ValueError(f"{path} has zero bytes in it (the first after byte {offset:,}), so it is no text; leave it out.")
    return text


@contextmanager
def _plain(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """(the bytes of a file unpacked, the file itself)."""
    with open(path, "rb") as file:
        if not path.name.lower().endswith(".zst"):
            yield file, file
            return
        pyarrow = _import_pyarrow(path)
        with pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd") as stream:
            yield stream, file


def _lines(path: Path, at: Position) -> Iterator[tuple[bytes, int, Position, float]]:
    """(line, its number, place after it, share): lines of a file that may be packed. Places are (bytes, lines) unpacked."""
    offset, number = at or (0, 0)
    size = max(1, path.stat().st_size)
    with _plain(path) as (stream, file):
        try:
            if stream is file:
                stream.seek(offset)
            else:
                left = offset
                while left and (skipped := stream.read(min(left, BLOCK_BYTES))):
                    left -= len(skipped)
            rest = b""
            while True:
                block = stream.read(BLOCK_BYTES)
                lines = (rest + block).split(b"\n")
                rest = lines.pop()
                if not block and rest:
                    lines, rest = [rest], b""
                if len(rest) > LONGEST_LINE:
                    raise ValueError(
                        f"{path}, line {number + len(lines) + 1} has more than {LONGEST_LINE:,} bytes; is it a file of lines of "
                        "JSON?"
                    )
                for line in lines:
                    offset, number = offset + len(line) + 1, number + 1
                    yield line, number, [offset, number], (min(offset, size) if stream is file else file.tell()) / size
                if not block:
                    return
        except OSError as error:  # of the unpacking
            raise ValueError(f"{path} cannot be read beyond line {number} ({error}); fetch or write it again.") from None


def _read_jsonl(path: Path, text_key: str, at: Position) -> Iterator[tuple[str, bool, bool, Position, float]]:
    for line, number, place, share in _lines(path, at):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both
            raise ValueError(f"{where} is not JSON ({error}); repair or remove the line.") from None
        except RecursionError:
            raise ValueError(f"{where} is nested too deeply; repair or remove the line.") from None
        if not isinstance(record, dict):
            raise ValueError(f'{where} is no JSON object; each line has to be one, such as {{"{text_key}": "…"}}.')
        if text_key not in record:
            raise ValueError(
                f"{where} has no field {text_key!r} (it has: {', '.join(map(str, record)) or 'none'}); name the field with "
                "--text_key."
            )
        text = record[text_key]
        if text is None:  # passed over, as in a .parquet file
            text = ""
        if not isinstance(text, str):
            raise ValueError(
                f"{where}: the field {text_key!r} is {type(text).__name__}, not a string; name another field with --text_key."
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{where}: the field {text_key!r} has half of a surrogate pair, which is no text; repair or remove the line."
            ) from None
        yield text, True, True, place, share


def _read_csv(path: Path, text_key: str, at: Position) -> Iterator[tuple[str, bool, bool, Position, float]]:
    """Rows after a header. A place is a number of rows: a field may hold line breaks, so rows before it are read again."""
    csv.field_size_limit(2**31 - 1)
    skipped, size, row = at or 0, max(1, path.stat().st_size), 0
    with open(path, "rb") as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        try:
            header = next(rows, [])
            if text_key not in header:
                raise ValueError(
                    f"{path} has no column {text_key!r} (it has: {', '.join(header) or 'none'}); name the column with --text_key."
                )
            column = header.index(text_key)
            for row, fields in enumerate(rows, 1):
                if row <= skipped or not fields:
                    continue
                if len(fields) <= column:
                    raise ValueError(f"{path}, line {rows.line_num} has no column {text_key!r}; repair or remove the row.")
                yield fields[column], True, True, row, raw.tell() / size
        except csv.Error as error:
            raise ValueError(f"{path}, line {rows.line_num} is not CSV ({error}); repair the row.") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text (after row {row}: {error.reason}); convert it with iconv.") from None


def _read_parquet(path: Path, text_key: str, at: Position) -> Iterator[tuple[str, bool, bool, Position, float]]:
    """Rows. A place is a number of rows."""
    pyarrow = _import_pyarrow(path)
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet ({error}); it may be truncated: fetch or write it again.") from None
    with file:
        columns = file.schema_arrow.names
        if text_key not in columns:
            raise ValueError(
                f"{path} has no column {text_key!r} (it has: {', '.join(columns)}); name the column with --text_key."
            )
        kind = file.schema_arrow.field(text_key).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise ValueError(f"{path}: the column {text_key!r} is {kind}, not text; name another column with --text_key.")
        skipped, row, total = at or 0, 0, max(1, file.metadata.num_rows)
        try:
            for group in range(file.num_row_groups):
                if row + (rows := file.metadata.row_group(group).num_rows) <= skipped:
                    row += rows
                    continue
                for batch in file.iter_batches(PARQUET_ROWS, row_groups=[group], columns=[text_key]):
                    for text in batch.column(0).to_pylist():
                        row += 1
                        if row > skipped:
                            yield text or "", True, True, row, row / total
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read beyond row {row} ({error}); fetch or write it again.") from None


def _import_pyarrow(path: Path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"Reading {path} needs the package 'pyarrow', which is not installed: pip install pyarrow") from None
    return pyarrow


def _read_of(path: Path) -> _Read:
    """How a file is read, by the end of its name; any other than the known ones is text."""
    formats: dict[str, _Read] = {
        ".jsonl": _read_jsonl,
        ".jsonl.zst": _read_jsonl,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    name = path.name.lower()
    if name.endswith((".gz", ".zst", ".bz2", ".xz", ".zip")) and not name.endswith(".jsonl.zst"):
        raise ValueError(f"{path} is compressed; unpack it first (of compressed files only .jsonl.zst is read).")
    if name.endswith(".json"):
        raise ValueError(f"{path} is JSON and no text; write one object with the text a line, into a .jsonl file.")
    return next((read for suffix, read in formats.items() if name.endswith(suffix)), _read_txt)


def _near(path: Path, share: float) -> Position:
    """A place to begin at, about this share into a file; its start (None) where only that can be found quickly."""
    read = _read_of(path)
    if read is _read_parquet:
        return int(_import_pyarrow(path).parquet.read_metadata(path).num_rows * share) or None
    if read is _read_csv or path.name.lower().endswith(".zst"):
        return None
    with open(path, "rb") as file:
        file.seek(int(path.stat().st_size * share))
        if read is _read_jsonl:
            file.readline(LONGEST_LINE)
            return [file.tell(), 1]
        place, block = file.tell(), file.read(BLOCK_BYTES)
        space = re.search(rb"[!-~] ", block)
        return place + space.start() + 1 if space else None
