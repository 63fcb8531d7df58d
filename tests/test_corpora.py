"""Sources of documents, their split, and the prepare.py commands."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data import corpora, preparation
from data.corpora import find_text_files, split_position, text_documents, validation_documents
from data.token_dataset import DATA_DIR, DatasetError, TokenDataset, is_prepared
from data.tokenization import HuggingFaceTokenizer

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


# ------------------------------------------------------------------------------------------- files of one's own


def texts(*paths, **options):
    return [text for _, text in text_documents(paths, **options)]


def test_each_format_gives_its_documents(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")

    (tmp_path / "a.txt").write_text("\ufeffone Ω\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n\n{"text": ""}\n{"text": "three", "x": 1}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["four", None, "five"], "n": [1, 2, 3]}), tmp_path / "c.parquet")
    (tmp_path / "ignored.csv").write_text("x")
    assert texts(tmp_path) == ["one Ω\n", "two", "three", "four", "five"]
    assert texts(tmp_path / "*.jsonl", tmp_path / "a.txt", tmp_path / "a.txt") == ["two", "three", "one Ω\n"]


def test_line_ends_are_kept(tmp_path):
    """Issue 10.17: every byte of a text reaches the dataset, carriage returns as well."""
    text = "one\r\ntwo\rthree\n\r\nfour\r\n" * 9
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert texts(tmp_path / "a.txt") == [text]
    meta = preparation.prepare(lambda: text_documents([tmp_path / "a.txt"]), tmp_path / "set", tokenizer="byte")
    assert sum(split["bytes"] for split in meta["splits"].values()) == (tmp_path / "a.txt").stat().st_size
    train, val = (TokenDataset.open(tmp_path / "set").split(name) for name in ("train", "val"))
    assert bytes([*train.read(0, len(train)), *val.read(0, len(val))]) == text.encode()


def test_the_text_field_can_be_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "words", "text": 5}\n')
    assert texts(tmp_path / "a.jsonl", text_key="content") == ["words"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "\xff"}\n', r"a\.jsonl, line 3 is not JSON"),
        ("a.jsonl", b'["x"]\n', "line 1 is no JSON object"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', r"line 1 has no field 'text' \(it has: body, id\).*--text_key"),
        ("a.jsonl", b'{"text": null}\n', "line 1: the field 'text' is NoneType"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: .*surrogate"),
        ("a.jsonl", b"\n", "holds no text"),
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"good \xff\n", "not UTF-8 text .byte 5"),
        ("a.parquet", b"PAR1 but not really", "cannot be read as parquet"),
        ("a.md", b"\xff\xfe", "not UTF-8 text"),
    ],
)
def test_bad_files_are_named_with_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        texts(tmp_path / name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_a_missing_or_wrong_parquet_column_names_those_there(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")

    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"no column 'text' \(it has: body, n\)"):
        texts(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="column 'n' is int64"):
        texts(tmp_path / "a.parquet", text_key="n")


def test_missing_files_and_empty_folders_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no file .*nowhere"):
        find_text_files([tmp_path / "nowhere.txt"])
    with pytest.raises(ValueError, match="has no .txt"):
        find_text_files([tmp_path])


# ------------------------------------------------------------------------------------------- training and validation


def test_the_split_by_documents_has_about_the_fraction_and_both_sides():
    for count in range(2, 60):
        for fraction in (0.001, 0.1, 0.5, 0.999):
            chosen = validation_documents(count, fraction)
            assert len(chosen) == count and 0 < chosen.sum() < count
    assert abs(validation_documents(100_000, 0.1).mean() - 0.1) < 0.005
    assert np.array_equal(validation_documents(1000, 0.1), validation_documents(2000, 0.1)[:1000])
    assert not np.array_equal(validation_documents(1000, 0.1, seed=1), validation_documents(1000, 0.1))
    with pytest.raises(ValueError, match="at least 2"):
        validation_documents(1, 0.1)


def test_one_document_is_split_by_position_as_in_nanogpt():
    text = "x" * 1234
    assert split_position(text, 0.1) == int(1234 * 0.9)
    assert split_position("ab", 0.001) == 1 and split_position("ab", 0.999) == 1
    with pytest.raises(ValueError, match="fewer than 2"):
        split_position("a", 0.1)


# ------------------------------------------------------------------------------------------- preparing

DOCUMENTS = [(str(i), f"Document {i}: the cat sat on the mat, {'ü' * i} and so on. " * 3) for i in range(20)]


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
@pytest.mark.parametrize("count", [1, 20])
def test_a_prepared_dataset_decodes_to_its_documents(tmp_path, tokenizer, count):
    documents = DOCUMENTS[:count]
    meta = preparation.prepare(lambda: iter(documents), tmp_path, tokenizer=tokenizer, bpe_vocab_size=300)
    dataset = TokenDataset.open(tmp_path)
    coder = dataset.tokenizer()
    splits = {name: dataset.split(name) for name in ("train", "val")}
    decoded = {name: coder.decode(split.read(0, len(split)).tolist()) for name, split in splits.items()}
    if count == 1:
        assert decoded["train"] + decoded["val"] == documents[0][1]
    else:
        ended = {name: decoded[name].split("<|endoftext|>") for name in decoded}
        assert ended["train"].pop() == ended["val"].pop() == ""  # each document is followed by the eos id
        assert sorted(ended["train"] + ended["val"]) == sorted(text for _, text in documents)
        assert all(meta["splits"][name]["documents"] == len(ended[name]) for name in ("train", "val"))
    assert sum(split["bytes"] for split in meta["splits"].values()) == sum(len(text.encode()) for _, text in documents)


def test_long_documents_cut_into_pieces_give_the_ids_of_the_whole(tmp_path, monkeypatch):
    text = "".join(f"word{i % 7}, {'x' * (i % 13)}{' ' * (i % 4 + 1)}\n\n  end{i} don't " for i in range(600))
    coder = HuggingFaceTokenizer.train([text], 400)
    monkeypatch.setattr(preparation, "PIECE_CHARACTERS", 50)
    monkeypatch.setattr(preparation, "BATCH_CHARACTERS", 100)
    assert "".join(preparation._pieces(text)) == text and len(preparation._pieces(text)) > 100
    parts = [("train", text), ("val", "short"), ("train", "y" * 1000)]
    assert list(preparation._encoded(coder, iter(parts))) == [(part, coder.encode(part[1])) for part in parts]


def test_the_bpe_does_not_see_the_validation_text():
    def parts():
        return iter([("train", "aaaa bbbb"), ("val", "zzzz")])

    assert list(preparation._training_texts(parts)) == ["aaaa bbbb"]


def test_no_documents_and_bad_fractions_are_errors(tmp_path):
    with pytest.raises(DatasetError, match="no documents"):
        preparation.prepare(lambda: iter(()), tmp_path / "x")
    with pytest.raises(ValueError, match="val_fraction=1 "):
        preparation.prepare(lambda: iter(DOCUMENTS), tmp_path / "x", val_fraction=1.0)
    assert not (tmp_path / "x").exists()


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


# ------------------------------------------------------------------------------------------- the commands


def command(script, *arguments, cwd, **options):
    return subprocess.run(
        [sys.executable, str(DATA_DIR / script / "prepare.py"), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def test_textfile_command_prepares_from_any_working_directory(tmp_path):
    (tmp_path / "story.txt").write_text("Once upon a time there was a little cat. " * 50)
    done = command("textfile", "story.txt", "--tokenizer=char", "--out=cat", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1,845 tokens, 1,845 bytes, 1 document" in done.stdout and str(tmp_path / "cat") in done.stdout
    assert done.stderr == ""  # no progress bar where nobody watches
    assert json.loads((tmp_path / "cat" / "meta.json").read_text())["source"] == "story.txt"
    assert len(TokenDataset.open(tmp_path / "cat").split("val")) == 205


def test_pydocs_command_makes_a_dataset_that_needs_no_download(tmp_path):
    done = command("pydocs", f"--out={tmp_path / 'docs'}", "--vocab_size=1000", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    dataset = TokenDataset.open(tmp_path / "docs")
    assert dataset.vocab_size == 1000 and dataset.split("train").bytes > 1_000_000


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ((), 2, "required: FILE"),
        (("a.txt",), 2, "give either --name=NAME .* or --out=DIR"),
        (("a.txt", "--out=x", "--tokenizer=morse"), 2, "--tokenizer=morse is neither"),
        (("a.txt", "--out=x", "--tokenizer=char", "--vocab_size=5"), 2, "--vocab_size is for --tokenizer=bpe"),
        (("a.txt", "--out=x", "--val_fraction=2"), 2, "not between 0 and 1"),
        (("a.txt", "--name=pydocs"), 2, "--name=pydocs is taken"),
        (("a.txt", "--name=a/b"), 2, "not a plain name"),
        (("missing.txt", "--out=x"), 1, "error: There is no file missing.txt"),
        (("a.txt", "--out=x", "--vocab_size=100"), 1, "error: vocab_size=100 is too small"),
        (("a.txt", "--out=a.txt"), 1, "error: .*a.txt"),
    ],
)
def test_errors_are_one_sentence_and_an_exit_code(tmp_path, arguments, code, message):
    (tmp_path / "a.txt").write_text("some text to read")
    done = command("textfile", *arguments, cwd=tmp_path)
    assert done.returncode == code and re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr and (code == 2 or done.stderr.count("\n") == 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt"]


def test_debug_shows_the_traceback(tmp_path):
    done = command("textfile", "missing.txt", "--out=x", "--debug", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="no file size limit")
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    import resource

    (tmp_path / "a.txt").write_text("some text " * 30_000)
    done = command(
        "textfile",
        "a.txt",
        "--out=out",
        "--tokenizer=byte",
        cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.returncode == 1 and re.fullmatch(r"error: File too large \(out\); .*\n", done.stderr), done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name == "nt", reason="no signals")
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_command_leaves_nothing_that_looks_prepared(tmp_path, signal_number):
    (tmp_path / "long.jsonl").write_text("".join(f'{{"text": "{i} some words and more"}}\n' for i in range(200_000)))
    out = tmp_path / "out"
    script = str(DATA_DIR / "textfile" / "prepare.py")
    process = subprocess.Popen(
        [sys.executable, script, "long.jsonl", "--out=out", "--tokenizer=byte"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.time() + 30
    while not (out / ".staging").exists() and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal_number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == (130 if signal_number != signal.SIGKILL else -9)
    assert not is_prepared(out)
    with pytest.raises(DatasetError, match="no folder" if signal_number != signal.SIGKILL else "no train.bin"):
        TokenDataset.open(out)
    if signal_number != signal.SIGKILL:
        assert error == "Interrupted: nothing was prepared.\n" and not out.exists()
