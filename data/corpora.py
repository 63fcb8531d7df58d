"""Where texts come from: iterators of documents as (name, text), and which of them are for validation.

Two corpora come with every Python, so training needs no download: its documentation (`pydocs_documents`, real English)
and the sources of its standard library (`pystdlib_documents`, real code). Both are the same on every run of one Python
version. `text_documents` reads your own .txt, .jsonl and .parquet files.
"""

from __future__ import annotations

import ast
import glob
import inspect
import json
import os
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data.hashing import GOLDEN, mix64

Document = tuple[str, str]  # name, text

MIN_DOCUMENT = 200  # characters; shorter documentation is mostly a heading
STDLIB_ENOUGH = 10_000_000  # characters of code; below it the tests of the library are added
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages"}
TEST_FOLDERS = {"test", "tests", "idle_test"}
TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")


# ------------------------------------------------------------------------------------------- what comes with Python


def pydocs_documents() -> Iterator[Document]:
    """Python's own documentation: a document for each topic of `help()` and for the docstrings of each module."""
    found = False
    for name, text in _topics():
        found = True
        yield f"topic {name}", text
    for name, source in _stdlib_sources(tests=False):
        if name.startswith(("idlelib", "pydoc_data")):
            continue  # an editor's internals; the topics again
        text = _docstrings(source)
        if len(text) >= MIN_DOCUMENT:
            found = True
            yield name, text
    if not found:
        raise ValueError(
            "This Python has neither documentation topics nor the sources of its standard library; "
            "prepare a text of your own with data/textfile/prepare.py."
        )


def pystdlib_documents() -> Iterator[Document]:
    """The sources of Python's standard library, one document a file; with its tests where it is too small."""
    size = 0
    for name, source in _stdlib_sources(tests=False):
        size += len(source)
        yield name, source
    if size < STDLIB_ENOUGH:
        for name, source in _stdlib_sources(tests=True):
            size += len(source)
            yield name, source
    if not size:
        raise ValueError(
            "This Python has no sources of its standard library (.py files); prepare a text of your own "
            "with data/textfile/prepare.py."
        )


def _topics() -> Iterator[Document]:
    """The topics of `help()`; some minimal Pythons leave them out."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name, text in sorted(topics.items()):
        text = inspect.cleandoc(text)
        if len(text) >= MIN_DOCUMENT:
            yield name, text


def _stdlib_sources(tests: bool) -> Iterator[Document]:
    """(relative path, source) of the library's files that are tests, or that are not, in sorted order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
        relative = Path(folder).relative_to(root)
        if bool(TEST_FOLDERS & set(relative.parts)) != tests:
            continue
        for file in sorted(files):
            if file.endswith(".py"):
                try:
                    with tokenize.open(Path(folder) / file) as source:  # honours the coding line
                        text = source.read()
                except (SyntaxError, UnicodeDecodeError, OSError):
                    continue  # test data for broken encodings
                if text.strip():
                    yield (relative / file).as_posix(), text


def _docstrings(source: str) -> str:
    """All docstrings of a module in the order they stand there, under the names of what they document."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    paragraphs = []

    def visit(node: ast.AST, name: str) -> None:
        if text := ast.get_docstring(node):  # cleaned by inspect.cleandoc
            paragraphs.append(f"{name}\n\n{text}" if name else text)
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                visit(child, f"{name}.{child.name}" if name else child.name)

    visit(tree, "")
    return "\n\n".join(paragraphs).encode("utf-8", errors="ignore").decode()  # "\ud800" in a docstring is no text


# ------------------------------------------------------------------------------------------- files of one's own


def text_documents(paths: Sequence[str | os.PathLike], text_key: str = "text") -> Iterator[Document]:
    """Documents of files, folders and globs: .jsonl (a line is one), .parquet (a row is one), else text (a file is one).

    `text_key` is the field or column that holds the text. Empty texts and lines are passed over. ValueError names the
    file, and the line where there is one.
    """
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    for path in find_text_files(paths):
        empty = True
        for name, text in readers.get(path.suffix.lower(), _read_txt)(path, text_key):
            if text.strip():
                empty = False
                yield name, text
        if empty:
            raise ValueError(f"{path} holds no text; leave it out, or check that it was written whole.")


def find_text_files(paths: Sequence[str | os.PathLike]) -> list[Path]:
    """The files that paths, folders (their .txt, .jsonl and .parquet, to the bottom) and globs stand for, each once."""
    kinds = ", ".join(TEXT_SUFFIXES)
    found: dict[Path, None] = {}
    for given in paths:
        path = Path(given).expanduser()
        if path.is_dir():
            files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in TEXT_SUFFIXES and file.is_file()]
            if not files:
                raise ValueError(f"The folder {path} has no {kinds} files; give another folder, or the files themselves.")
        elif path.is_file():
            files = [path]
        else:
            files = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if Path(match).is_file()]
            if not files:
                raise ValueError(f"There is no file {path}; check the path.")
        found.update(dict.fromkeys(files))
    return list(found)


def _read_txt(path: Path, text_key: str) -> Iterator[Document]:
    try:
        yield path.name, path.read_bytes().decode("utf-8-sig")  # line ends stay as they are
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start:,}: {error.reason}); convert it, for example with iconv."
        ) from None


def _read_jsonl(path: Path, text_key: str) -> Iterator[Document]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both
                raise ValueError(f"{where} is not JSON ({error}); repair or remove the line.") from None
            if not isinstance(record, dict):
                raise ValueError(f'{where} is no JSON object; each line has to be one, such as {{"{text_key}": "…"}}.')
            if text_key not in record:
                raise ValueError(
                    f"{where} has no field {text_key!r} (it has: "
                    f"{', '.join(map(str, record)) or 'none'}); name the field with --text_key."
                )
            text = record[text_key]
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
            yield f"{path.name}:{number}", text


def _read_parquet(path: Path, text_key: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"Reading {path} needs the package 'pyarrow', which is not installed: pip install pyarrow") from None
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
        row = 0
        try:
            for batch in file.iter_batches(columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    yield f"{path.name}:{row}", text or ""
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read beyond row {row} ({error}); fetch or write it again.") from None


# ------------------------------------------------------------------------------------------- training and validation


def validation_documents(count: int, val_fraction: float, seed: int = 0) -> np.ndarray:
    """Which of `count` documents (two or more) are for validation, as booleans.

    A hash of each document's index decides, so the choice neither depends on the texts nor on their number. At least
    one document goes to each side.
    """
    if count < 2:
        raise ValueError(f"{count} documents cannot be split by documents; at least 2 are needed.")
    drawn = _hash01(np.arange(count), seed)
    chosen = drawn < val_fraction
    if not chosen.any():
        chosen[drawn.argmin()] = True
    if chosen.all():
        chosen[drawn.argmax()] = False
    return chosen


def split_position(text: str, val_fraction: float) -> int:
    """Where a single document is cut, in characters: training before it, validation after it (as nanoGPT does)."""
    if len(text) < 2:
        raise ValueError("A text of fewer than 2 characters cannot be split; give a longer one.")
    return min(max(1, int(len(text) * (1 - val_fraction))), len(text) - 1)


def _hash01(values: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) for each value and seed, from the upper 53 bits of a hash."""
    return (mix64(values.astype(np.uint64) * GOLDEN + np.uint64(seed)) >> np.uint64(11)) / 2.0**53
