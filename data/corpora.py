"""What comes with every Python, so that training needs no download: its documentation (`pydocs_documents`, real English) and
the sources of its standard library (`pystdlib_documents`, real code). Both are the same on every run of one Python version.
Besides: which documents are for validation.
"""

from __future__ import annotations

import ast
import inspect
import os
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.hashing import GOLDEN, mix64

Document = tuple[str, str]  # name, text

MIN_DOCUMENT = 200  # characters; shorter documentation is mostly a heading
STDLIB_ENOUGH = 10_000_000  # characters of code; below it the tests of the library are added
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages"}
TEST_FOLDERS = {"test", "tests", "idle_test"}


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


# ------------------------------------------------------------------------------------------- training and validation


def split_position(characters: int, val_fraction: float) -> int:
    """Where a single document of so many characters is cut: training before it, validation after it (as nanoGPT does)."""
    if characters < 2:
        raise ValueError("A text of fewer than 2 characters cannot be split; give a longer one.")
    return min(max(1, int(characters * (1 - val_fraction))), characters - 1)


def hash01(number: int, seed: int = 0) -> float:
    """A number in [0, 1) that looks random for each document's number and seed: the upper 53 bits of a hash."""
    x = np.array([number], dtype=np.uint64) * GOLDEN + np.uint64(seed)
    return float((mix64(x) >> np.uint64(11))[0] / 2.0**53)
