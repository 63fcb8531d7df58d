"""The corpora that come with Python, and their split."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import corpora, preparation
from data.corpora import hash01, split_position
from data.token_dataset import DATA_DIR, DatasetError

# ------------------------------------------------------------------------------------------- what comes with Python


def first(documents, count):
    return [document for document, _ in zip(documents, range(count))]


def test_pydocs_is_english_and_the_same_every_time():
    documents = first(corpora.pydocs_documents(), 120)
    assert documents == first(corpora.pydocs_documents(), 120)
    text = " ".join(text for _, text in documents).lower()
    words = re.findall(r"[a-z]+", text)
    assert words.count("the") / len(words) > 0.03  # about 6 % of English
    assert all(len(text) >= corpora.MIN_DOCUMENT for _, text in documents)


def test_docstrings_are_read_without_running_the_module():
    source = '"""Module."""\nraise SystemExit\nclass A:\n    """Of A.\n\n    Deeper."""\n    def f(self):\n        "Of f."\n'
    assert corpora._docstrings(source) == "Module.\n\nA\n\nOf A.\n\nDeeper.\n\nA.f\n\nOf f."
    assert corpora._docstrings("def broken(") == ""


def test_pydocs_without_topics_has_docstrings(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert not any(name.startswith("topic") for name, _ in first(corpora.pydocs_documents(), 3))
    monkeypatch.setattr(corpora, "_stdlib_sources", lambda tests: iter(()))
    with pytest.raises(ValueError, match="neither.*data/textfile/prepare.py"):
        list(corpora.pydocs_documents())


def test_pystdlib_documents_are_the_sources(monkeypatch):
    documents = dict(corpora.pystdlib_documents())
    assert documents["argparse.py"] == Path(__import__("argparse").__file__).read_text(encoding="utf-8")
    assert list(documents) == [name for name, _ in corpora.pystdlib_documents()]
    assert not any("site-packages" in name for name in documents)
    monkeypatch.setattr(corpora, "_stdlib_sources", lambda tests: iter([("test/a.py", "x = 1")] if tests else []))
    assert list(corpora.pystdlib_documents()) == [("test/a.py", "x = 1")]  # a small library: its tests are added
    monkeypatch.setattr(corpora, "_stdlib_sources", lambda tests: iter(()))
    with pytest.raises(ValueError, match="no sources"):
        list(corpora.pystdlib_documents())


# ------------------------------------------------------------------------------------------- training and validation


def test_the_hash_of_a_number_is_even_and_its_own_for_each_seed():
    drawn = np.array([hash01(number) for number in range(20_000)])
    assert ((drawn >= 0) & (drawn < 1)).all() and len(np.unique(drawn)) == len(drawn)
    for fraction in (0.001, 0.1, 0.5):
        assert abs((drawn < fraction).mean() - fraction) < 4 * np.sqrt(fraction * (1 - fraction) / len(drawn))
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 0.03
    assert hash01(7, seed=1) != hash01(7)


def test_one_document_is_split_by_position_as_in_nanogpt():
    assert split_position(1234, 0.1) == int(1234 * 0.9)
    assert split_position(2, 0.001) == 1 and split_position(2, 0.999) == 1
    with pytest.raises(ValueError, match="fewer than 2"):
        split_position(1, 0.1)


# ------------------------------------------------------------------------------------------- on first use

ENSURE = """
import sys; sys.path.insert(0, {root!r})
from pathlib import Path
from data import preparation, token_dataset
preparation.DATA_DIR = token_dataset.DATA_DIR = Path({data!r})
def documents():
    for i in range(300):
        yield str(i), f"document {{i}} of some words " * 20
preparation.EMBEDDED["pydocs"] = preparation.Corpus(documents, 300, "words")
preparation.ensure_prepared("pydocs")
print(token_dataset.TokenDataset.open("pydocs").fingerprint)
"""


def test_two_processes_at_once_prepare_it_once(tmp_path):
    code = ENSURE.format(root=str(DATA_DIR.parent), data=str(tmp_path))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(3)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    assert sum(err.count("Preparing") for _, err in outputs) == 1
    assert sorted(path.name for path in (tmp_path / "pydocs").iterdir() if path.name.startswith(".")) == []


def test_other_datasets_are_never_prepared_on_first_use(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "prepare", lambda *_, **__: pytest.fail("prepared"))
    preparation.ensure_prepared("textfile")
    preparation.ensure_prepared(tmp_path / "pydocs")


def test_an_unwritable_data_folder_names_the_way_out(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(preparation, "DATA_DIR", tmp_path)
    monkeypatch.setattr(preparation, "resolve_dataset", lambda name: tmp_path / name)
    monkeypatch.setattr(preparation, "prepare", refuse)
    with pytest.raises(DatasetError, match="cannot be written .*Permission denied.* --out=DIR.*--dataset=DIR"):
        preparation.ensure_prepared("pydocs")
