"""Writing a dataset: nothing but what a prepare wrote is ever replaced or removed, and nobody sees half a dataset."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from data import preparation
from data.dataset_writer import PUBLISHING, STAGING, DatasetWriter
from data.preparation import prepare
from data.token_dataset import DATA_DIR, DatasetError, TokenDataset, is_prepared
from data.tokenization import ByteTokenizer, CharTokenizer
from tests.preloaded import preloaded_python

TEXT = "Once upon a time there was a little cat. " * 20


def write(folder, train=(1, 2, 3), **options):
    """A dataset of these training tokens."""
    with DatasetWriter(folder, ByteTokenizer(), **options) as writer:
        writer.add("train", list(train), len(train))
        writer.add("val", [4], 1)
        writer.publish()
    return folder


def contents(folder):
    """Every file and link below a folder, with what is in it."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def nanogpt_folder(folder):
    folder.mkdir()
    np.arange(200, dtype=np.uint16).tofile(folder / "train.bin")
    np.arange(20, dtype=np.uint16).tofile(folder / "val.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 200}))


def home_folder(folder):
    (folder / "documents").mkdir(parents=True)
    (folder / "documents" / "letter.txt").write_text("dear")
    (folder / "notes.txt").write_text("mine")
    (folder / ".bashrc").write_text("alias")


def meta_of_another_program(folder):
    folder.mkdir()
    (folder / "meta.json").write_text('{"title": "mine"}')


def meta_of_a_later_version(folder):
    write(folder)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"format_version": 2}))


def meta_that_names_others(folder):
    write(folder)
    (folder / "thesis.tex").write_text("mine")
    meta = json.loads((folder / "meta.json").read_text())
    meta["splits"]["train"]["files"][0]["name"] = "thesis.tex"
    (folder / "meta.json").write_text(json.dumps(meta))


def damaged_meta(folder):
    write(folder)
    (folder / "meta.json").write_text("{")


def dataset_with_another_shard(folder):
    write(folder)
    np.arange(10, dtype=np.uint16).tofile(folder / "train_00007.bin")


def foreign_staging(folder):
    (folder / STAGING).mkdir(parents=True)
    (folder / STAGING / "work.txt").write_text("mine")


def linked_staging(folder):
    folder.mkdir()
    (folder.parent / "work").mkdir()
    (folder.parent / "work" / "preparation.json").write_text("{}")
    (folder / STAGING).symlink_to(folder.parent / "work")


# what is in the folder → (what is said, what is said with --overwrite: None where it is then allowed)
OTHERS = {
    "home": (home_folder, r"not empty: it has \.bashrc, documents, notes\.txt\. .*--overwrite", None),
    "nanoGPT's dataset": (nanogpt_folder, "has meta.pkl, train.bin, val.bin, which a prepare .* did not write", "did not write"),
    "a dataset": (write, "holds a dataset already.*--overwrite", None),
    "another's meta.json": (meta_of_another_program, "does not say which files", "does not say which files"),
    "a later version's dataset": (meta_of_a_later_version, "format_version is 2", "format_version is 2"),
    "a meta.json that names others": (meta_that_names_others, "names files of another kind", "names files of another kind"),
    "a damaged dataset": (damaged_meta, "does not say which files", "does not say which files"),
    "a dataset and a file like its own": (dataset_with_another_shard, "holds a dataset already", "has train_00007.bin, which"),
    "a .staging of somebody's": (foreign_staging, "was not made by a preparation", "was not made by a preparation"),
    "a .staging that is a link": (linked_staging, "was not made by a preparation", "was not made by a preparation"),
    "a file": (lambda path: path.write_text("mine"), "is a file", "is a file"),
    "a link to nothing": (
        lambda path: path.symlink_to("nowhere"),
        "is a link to nowhere, which does not exist",
        "does not exist",
    ),
    "a .publishing of somebody's": (
        lambda path: (path.mkdir(), (path / PUBLISHING).write_text("mine")),
        "interrupted, or is not of this program",
        "interrupted, or is not of this program",
    ),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path, other, overwrite):
    """Issue 10.8: refused in a sentence without a change, or, if told to overwrite, every file that is not of a dataset stays."""
    make, *refusals = OTHERS[other]
    folder = tmp_path / "folder"
    make(folder)
    before = contents(tmp_path)
    if refusal := refusals[overwrite]:
        with pytest.raises(DatasetError, match=refusal) as caught:
            prepare(lambda: iter([("x", TEXT)]), folder, tokenizer="char", overwrite=overwrite)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
        assert contents(tmp_path) == before
        with pytest.raises(DatasetError, match=refusal):
            DatasetWriter(folder, ByteTokenizer(), overwrite=overwrite)
        assert contents(tmp_path) == before
    else:
        prepare(lambda: iter([("x", TEXT)]), folder, tokenizer="char", overwrite=True)
        after = contents(tmp_path)
        own = {f"folder/{name}" for name in ("meta.json", "meta.pkl", "tokenizer.json", "train.bin", "val.bin")}
        assert {name: content for name, content in after.items() if name not in own} == {
            name: content for name, content in before.items() if name not in own
        }
        assert TokenDataset.open(folder).split("train").bytes == len(TEXT) * 0.9


@pytest.mark.parametrize("kind", ["nothing", "an empty folder", "a link to an empty folder", "what the program's folders hold"])
def test_a_free_folder_is_used_and_one_that_was_there_stays_if_the_preparation_fails(tmp_path, kind):
    """Issue 10.8: what the preparation did not make it does not remove either, be it empty."""
    folder = tmp_path / "a" / "b"
    if kind != "nothing":
        (tmp_path / "a").mkdir()
        target = folder if kind != "a link to an empty folder" else tmp_path / "elsewhere"
        target.mkdir()
        if target != folder:
            folder.symlink_to(target)
        if kind == "what the program's folders hold":
            (folder / "prepare.py").touch()
            (folder / "README.md").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="fewer than 2"):
        prepare(lambda: iter([("x", "a")]), folder, tokenizer="byte")
    assert sorted(tmp_path.rglob("*")) == before
    prepare(lambda: iter([("x", TEXT)]), folder, tokenizer="byte")
    assert TokenDataset.open(folder).split("train").bytes == len(TEXT) * 0.9


def test_overwriting_removes_every_file_of_the_earlier_dataset_and_no_other(tmp_path):
    folder = write(tmp_path / "set", range(50), shard_tokens=7)
    (folder / "notes.txt").write_text("mine")
    (folder / "train.bin.bak").write_text("mine")
    write(folder, overwrite=True)
    assert sorted(contents(folder)) == [
        "meta.json",
        "meta.pkl",
        "notes.txt",
        "tokenizer.json",
        "train.bin",
        "train.bin.bak",
        "val.bin",
    ]
    assert TokenDataset.open(folder).split("train").read(0, 3).tolist() == [1, 2, 3]


def test_what_turns_up_during_the_preparation_is_not_replaced(tmp_path):
    """Issue 10.8: the folder is looked at again when the files are moved into it."""
    folder = tmp_path / "set"
    with DatasetWriter(folder, ByteTokenizer()) as writer:
        writer.add("train", [1, 2, 3], 3)
        writer.add("val", [4], 1)
        (folder / "val.bin").write_bytes(b"mine")
        with pytest.raises(DatasetError, match="has val.bin, which a prepare"):
            writer.publish()
    assert contents(folder) == {"val.bin": b"mine"}


def test_a_link_to_a_shared_file_is_replaced_and_the_file_is_not(tmp_path):
    """A file of the dataset that was moved to another disk and linked: the link is the dataset's, what it names is not."""
    folder = write(tmp_path / "set")
    (folder / "train.bin").rename(tmp_path / "shared.bin")
    (folder / "train.bin").symlink_to(tmp_path / "shared.bin")
    before = (tmp_path / "shared.bin").read_bytes()
    write(folder, [7, 8, 9, 10], overwrite=True)
    assert (tmp_path / "shared.bin").read_bytes() == before and not (folder / "train.bin").is_symlink()
    assert TokenDataset.open(folder).split("train").read(0, 4).tolist() == [7, 8, 9, 10]


def test_the_first_use_of_a_corpus_does_not_replace_a_nanogpt_dataset_of_that_name(tmp_path, monkeypatch):
    """Issue 10.8: train.py prepares pydocs by itself, but not over files that are there."""
    from data import token_dataset

    nanogpt_folder(tmp_path / "pydocs")
    monkeypatch.setattr(preparation, "DATA_DIR", tmp_path)
    monkeypatch.setattr(token_dataset, "DATA_DIR", tmp_path)
    before = contents(tmp_path)
    preparation.ensure_prepared("pydocs")
    assert contents(tmp_path) == before
    assert len(TokenDataset.open("pydocs").split("train")) == 200


# ------------------------------------------------------------------------------------------- the command


def command(*arguments, cwd):
    script = str(DATA_DIR / "textfile" / "prepare.py")
    return subprocess.run([preloaded_python(), script, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120)


def test_the_command_refuses_to_replace_and_replaces_when_told(tmp_path):
    """Issue 10.8, as it was seen: --out of a folder with other files, --out= (the working directory), and twice the same."""
    home_folder(tmp_path / "home")
    (tmp_path / "home" / "meta.json").write_text("{}")
    (tmp_path / "a.txt").write_text(TEXT)
    before = contents(tmp_path)
    for out, code, message in (("--out=home", 1, "does not say which files"), ("--out=", 2, "it is empty")):
        done = command("a.txt", out, "--tokenizer=char", cwd=tmp_path)
        assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert contents(tmp_path) == before
    assert command("a.txt", "--out=set", "--tokenizer=char", cwd=tmp_path).returncode == 0
    before = contents(tmp_path)
    again = command("a.txt", "--out=set", "--tokenizer=byte", cwd=tmp_path)
    assert again.returncode == 1 and "holds a dataset already" in again.stderr
    assert contents(tmp_path) == before
    assert command("a.txt", "--out=set", "--tokenizer=byte", "--overwrite", cwd=tmp_path).returncode == 0
    assert TokenDataset.open(tmp_path / "set").vocab_size == 256


def test_of_two_preparations_at_once_the_second_finds_the_first_ones_dataset(tmp_path):
    """Issue 10.8: it waits, and then refuses, or has nothing to do if it is the same; the dataset is the first one's, whole."""
    (tmp_path / "a.txt").write_text(TEXT)
    script = str(DATA_DIR / "textfile" / "prepare.py")
    processes = [
        subprocess.Popen(
            [sys.executable, script, "a.txt", "--out=set", f"--tokenizer={kind}"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for kind in ("char", "byte", "char")
    ]
    outputs = [process.communicate(timeout=60) for process in processes]
    kept = TokenDataset.open(tmp_path / "set").tokenizer().kind
    for kind, process, (_, error) in zip(("char", "byte", "char"), processes, outputs):
        assert process.returncode == (kind != kept), outputs
        assert "Traceback" not in error and (kind == kept or "holds a dataset already" in error)
    TokenDataset.open(tmp_path / "set").verify()
    assert not any(path.name.startswith(".") for path in (tmp_path / "set").iterdir())


@pytest.mark.parametrize("when", ["staging", "publishing"])
def test_what_a_killed_preparation_left_does_not_stop_the_next_one(tmp_path, when):
    """Issue 10.8: its own leftovers are no reason to ask for --overwrite."""
    code = f"""
import os, sys
sys.path.insert(0, {str(DATA_DIR.parent)!r})
from data import dataset_writer
from data.preparation import prepare
target, function = {{"staging": (dataset_writer.DatasetWriter, "add"), "publishing": (dataset_writer.os, "replace")}}[{when!r}]
calls, original = [], getattr(target, function)
def killed(*arguments, **options):
    calls.append(1)
    if len(calls) == 3 or {when!r} == "staging":
        os.kill(os.getpid(), 9)
    return original(*arguments, **options)
setattr(target, function, killed)
prepare(lambda: iter([("x", {TEXT!r})]), "set", tokenizer="char")
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=60).returncode == -9
    assert (tmp_path / "set" / (STAGING if when == "staging" else PUBLISHING)).exists() and not is_prepared(tmp_path / "set")
    if when == "staging":
        prepare(lambda: iter([("x", TEXT)]), tmp_path / "set", tokenizer="char")
    else:  # its files were complete: they are moved up, and then there is a dataset
        with pytest.raises(DatasetError, match="holds a dataset already"):
            prepare(lambda: iter([("x", TEXT)]), tmp_path / "set", tokenizer="char")
    dataset = TokenDataset.open(tmp_path / "set")
    assert dataset.tokenizer().fingerprint == CharTokenizer(sorted(set(TEXT))).fingerprint
    assert dataset.split("train").bytes == len(TEXT) * 0.9
    assert sorted(contents(tmp_path / "set")) == ["meta.json", "meta.pkl", "tokenizer.json", "train.bin", "val.bin"]


# ------------------------------------------------------------------------------------------- interrupts


def test_an_interrupt_before_publishing_leaves_the_folder_as_it_was(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with DatasetWriter(tmp_path / "new", ByteTokenizer()) as writer:
            writer.add("train", [1, 2], 2)
            raise KeyboardInterrupt
    assert not list((tmp_path / "new").iterdir())

    before = TokenDataset.open(write(tmp_path / "old")).fingerprint
    with pytest.raises(KeyboardInterrupt):
        with DatasetWriter(tmp_path / "old", ByteTokenizer(), overwrite=True) as writer:
            writer.add("train", [1, 2], 2)
            raise KeyboardInterrupt
    assert TokenDataset.open(tmp_path / "old").fingerprint == before


@pytest.mark.parametrize("before", ["nothing", "dataset", "files"])
def test_a_kill_at_any_moment_of_publishing_never_shows_a_mixture(tmp_path, monkeypatch, before):
    """Whatever change of the folder is the last one before the kill: readers find the old dataset, the new one, or an
    error. The next attempt ends with its dataset whole, whatever was left, and other files stay."""

    class Killed(BaseException):
        pass

    def attempt(folder, allowed):
        """Prepare with only the first `allowed` changes of the folder taking effect; whether it got to the end."""
        changes = 0

        def counted(function):
            def change(*arguments, **options):
                nonlocal changes
                if changes == allowed:
                    raise Killed
                changes += 1
                return function(*arguments, **options)

            return change

        with monkeypatch.context() as patch:
            writer = DatasetWriter(folder, ByteTokenizer(), overwrite=True)
            writer.add("train", [1, 2, 3], 3)
            writer.add("val", [4], 1)
            patch.setattr(os, "replace", counted(os.replace))
            patch.setattr(type(folder), "unlink", counted(type(folder).unlink))
            try:
                writer.publish()
            except Killed:
                return False
        return True

    allowed, seen = 0, set()
    while True:
        folder = tmp_path / str(allowed)
        if before == "dataset":
            write(folder, range(100), shard_tokens=30)
        elif before == "files":
            home_folder(folder)
        finished = attempt(folder, allowed)
        try:
            seen.add(len(TokenDataset.open(folder).split("train")))
        except DatasetError:
            assert not is_prepared(folder)
        left = contents(folder)
        write(folder, range(5), overwrite=True)
        assert TokenDataset.open(folder).split("train").read(0, 5).tolist() == list(range(5))
        expected = {"meta.json", "meta.pkl", "tokenizer.json", "train.bin", "val.bin"}
        if before == "files":
            expected |= {".bashrc", "notes.txt", "documents/letter.txt"}
        assert set(contents(folder)) == expected
        if finished:
            assert set(left) == expected
            break
        allowed += 1
    assert allowed > 6 and seen == ({3, 100} if before == "dataset" else {3})


def test_an_empty_split_is_refused(tmp_path):
    with DatasetWriter(tmp_path, ByteTokenizer()) as writer:
        writer.add("train", [1, 2], 2)
        with pytest.raises(DatasetError, match="val split .* would be empty"):
            writer.publish()
    assert not is_prepared(tmp_path)


def test_the_writer_refuses_ids_outside_of_the_vocabulary(tmp_path):
    with DatasetWriter(tmp_path, ByteTokenizer()) as writer:
        for ids in ([256], [-1]):
            with pytest.raises(ValueError, match="outside of its vocabulary of 256"):
                writer.add("train", ids, 1)
