"""The prepare.py commands: each makes its dataset from a copy laid out as on the Hub, and says in a sentence what is wrong."""

import argparse
import importlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from data import estimate, hub, pipeline, prepare_command
from data.plan import Options
from data.preparation import EMBEDDED
from data.prepare_command import run_recipe, run_textfile
from data.sources import Documents, Splits, TextFiles
from data.token_dataset import DATA_DIR, DatasetError, TokenDataset, is_prepared
from tests.preloaded import preloaded_python

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
RECIPES = sorted(path.parent.name for path in DATA_DIR.glob("*/prepare.py") if path.parent.name != "textfile")
TEXT = "Once upon a time there was a little cat. The cat found a toy. " * 20


def recipe(name):
    return importlib.import_module(f"data.{name}.prepare").RECIPE


def command(script, *arguments, cwd, python=None, **options):
    return subprocess.run(
        [python or preloaded_python(), str(DATA_DIR / script / "prepare.py"), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


# ------------------------------------------------------------------------------------------- copies as on the Hub


def texts(name, count):
    return [f"{name} number {i}: the cat sat on the mat, {'é' * (i % 5)}.\n\nAnd so on. " * (1 + i % 3) for i in range(count)]


def write_parquet(path, column):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({"text": column, "meta": [str(i) for i in range(len(column))]}), path)


def write_packed(path, column):
    path.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
        stream.write("".join(json.dumps({"text": text, "meta": {}}) + "\n" for text in column).encode())


WIKI = ["", " = Cats = \n", "", " A cat . \n", " = = Food = = \n", " Fish = food . \n", "", " = Dogs = \n", "", " A dog . \n"]
ARTICLES = ["\n = Cats = \n\n A cat . \n = = Food = = \n Fish = food . \n\n", " = Dogs = \n\n A dog . \n"]


def copy_of(name, folder):
    """Lay out a small copy of a recipe's repository; returns the documents for training and those for validation, or all and
    None where the documents' keys decide."""
    train, val = texts("training", 40), texts("validation", 6)
    if name in ("shakespeare", "shakespeare_char"):
        folder.mkdir()
        (folder / "input.txt").write_text(TEXT)
        return [TEXT], None
    if name.startswith("wikitext"):
        config = {"wikitext2": "wikitext-2-raw-v1", "wikitext103": "wikitext-103-raw-v1"}[name]
        for split in ("train", "validation", "test"):
            write_parquet(folder / config / f"{split}-00000-of-00001.parquet", WIKI)
        return ARTICLES, ARTICLES
    if name == "slimpajama_627b":
        for split, column in (("train", train), ("validation", val), ("test", texts("test", 3))):
            for chunk in (0, 1):
                write_packed(folder / split / "chunk1" / f"example_{split}_{chunk}.jsonl.zst", column[chunk::2])
        return train[0::2] + train[1::2], val[0::2] + val[1::2]
    if name.startswith("slimpajama_6b") or name == "tinystories":
        for split, column in (("train", train), ("validation", val)):
            write_parquet(folder / "data" / f"{split}-00000-of-00001-0123456789abcdef.parquet", column)
        return train, val
    if name == "fineweb_edu":
        write_parquet(folder / "data" / "CC-MAIN-2013-20" / "train-00000-of-00014.parquet", texts("not wanted", 5))
        for number in (0, 1):
            write_parquet(folder / "sample" / "10BT" / f"{number:03d}_00000.parquet", train[number::2])
        return train[0::2] + train[1::2], None
    if name == "openwebtext":
        for number in (0, 1):
            write_parquet(folder / "plain_text" / f"train-{number:05d}-of-00002.parquet", train[number::2])
        return train[0::2] + train[1::2], None
    assert name == "climbmix", f"lay out a copy of {name} here"
    for number in (0, 1):
        write_parquet(folder / f"shard_{number:05d}.parquet", train[number::2])
    return train[0::2] + train[1::2], None


def documents(split, eos):
    ids = split.read(0, len(split)).tolist()
    assert ids[-1] == eos
    return bytes(byte for byte in ids).decode() if eos is None else bytes_between(ids, eos)


def bytes_between(ids, eos):
    found, part = [], []
    for token in ids:
        if token == eos:
            found.append(bytes(part).decode())
            part = []
        else:
            part.append(token)
    return found


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in EMBEDDED])
def test_each_recipe_prepares_a_copy_laid_out_as_on_the_hub(name, tmp_path, capsys):
    """By way of the real `datasets` library, by bytes, so that every document can be read off again; offline."""
    pytest.importorskip("datasets")
    train, val = copy_of(name, tmp_path / "copy")
    arguments = ["--tokenizer=byte", f"--source={tmp_path / 'copy'}", f"--out={tmp_path / 'set'}", "--num_proc=1"]
    assert run_recipe(recipe(name), arguments) == 0, capsys.readouterr().err
    dataset = TokenDataset.open(tmp_path / "set")
    splits = {split: dataset.split(split) for split in ("train", "val")}
    if len(train) == 1:
        got = {split: bytes(part.read(0, len(part)).tolist()).decode() for split, part in splits.items()}
        assert got["train"] + got["val"] == train[0] and len(got["train"]) == int(len(train[0]) * 0.9)
        return
    got = {split: bytes_between(part.read(0, len(part)).tolist(), 256) for split, part in splits.items()}
    if val is not None:
        assert got == {"train": train, "val": val}
    else:
        assert sorted(got["train"] + got["val"]) == sorted(train) and got["val"]
        assert [text for text in train if text in set(got["train"])] == got["train"]
    shown = capsys.readouterr().out
    assert "train with   python train.py" in shown and recipe(name).name in RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_has_a_readme_and_a_help(name, capsys):
    readme = (DATA_DIR / name / "README.md").read_text(encoding="utf-8")
    assert f"python data/{name}/prepare.py" in readme
    with pytest.raises(SystemExit):
        run_recipe(recipe(name), ["--help"])
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--max_tokens", "--num_proc", "--dry_run", "--fallback", "--overwrite"))
    if name not in EMBEDDED:
        assert all(word in readme for word in ("icence", "okens", "isk")), "licence, tokens and disk belong into it"


def test_a_dataset_of_the_hub_is_read_on_from_where_it_was_left(tmp_path, monkeypatch, capsys):
    """The state of the `datasets` library is committed with the tokens: interrupted, the rest is read, the bytes are the same."""
    pytest.importorskip("datasets")
    copy_of("slimpajama_627b", tmp_path / "copy")
    monkeypatch.setattr(pipeline, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(pipeline, "BATCH_CHARACTERS", 300)
    arguments = ["--tokenizer=byte", f"--source={tmp_path / 'copy'}", "--num_proc=1"]
    assert run_recipe(recipe("slimpajama_627b"), [*arguments, f"--out={tmp_path / 'whole'}"]) == 0
    write, calls = pipeline.Pipeline.write, []
    for interrupted_at in (5, 4, 3):
        calls.clear()

        def interrupted(self, about, encoded, at=interrupted_at):
            calls.append(1)
            if len(calls) == at:
                raise KeyboardInterrupt
            write(self, about, encoded)

        monkeypatch.setattr(pipeline.Pipeline, "write", interrupted)
        assert run_recipe(recipe("slimpajama_627b"), [*arguments, f"--out={tmp_path / 'set'}"]) == 130
        assert re.search(r"Interrupted: the same command goes on after [\d,]+ tokens", capsys.readouterr().err)
    monkeypatch.setattr(pipeline.Pipeline, "write", write)
    assert run_recipe(recipe("slimpajama_627b"), [*arguments, f"--out={tmp_path / 'set'}"]) == 0
    whole, resumed = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "set"))
    assert whole == resumed


@pytest.mark.parametrize(
    "name, spoil, message",
    [
        ("openwebtext", lambda f: write_parquet(f / "x" / "train.parquet", [1, 2]), "cannot be read|not text"),
        ("climbmix", lambda f: f.mkdir(), "cannot be read as a copy of karpathy/climbmix.*hf download .*--local-dir DIR"),
        ("tinystories", lambda f: None, "there is no folder .*copy.*hf download roneneldan/TinyStories"),
        ("slimpajama_6b_gpt2", lambda f: write_parquet(f / "data" / "train-0.parquet", ["x"]), "cannot be read as a copy"),
        ("shakespeare", lambda f: f.mkdir(), "neither input.txt nor one other .txt"),
    ],
)
def test_a_copy_that_is_none_is_refused_in_a_sentence(name, spoil, message, tmp_path, capsys):
    pytest.importorskip("datasets")
    spoil(tmp_path / "copy")
    arguments = ["--tokenizer=byte", f"--source={tmp_path / 'copy'}", f"--out={tmp_path / 'set'}", "--num_proc=1"]
    assert run_recipe(recipe(name), arguments) == 1
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1 and not (tmp_path / "set").exists(), error


def test_a_copy_without_a_text_column_lists_its_columns(tmp_path, capsys):
    pytest.importorskip("datasets")
    (tmp_path / "copy").mkdir()
    parquet.write_table(pyarrow.table({"content": ["x"], "n": [1]}), tmp_path / "copy" / "train.parquet")
    assert run_recipe(recipe("climbmix"), ["--tokenizer=byte", f"--source={tmp_path / 'copy'}", f"--out={tmp_path / 'set'}"]) == 1
    assert "has no column 'text' (it has: content, n)" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- out of reach


def test_what_cannot_be_reached_says_why_and_what_else_there_is(tmp_path, monkeypatch, capsys):
    datasets = pytest.importorskip("datasets")
    errors = pytest.importorskip("huggingface_hub").errors

    def refuse(error):
        def load_dataset(*_, **__):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    monkeypatch.setattr(hub, "current_revision", lambda name: "0123")
    gated = errors.GatedRepoError.__new__(errors.GatedRepoError)
    gated.args = ("gated",)
    for error, message in (
        (gated, "it is gated; accept its licence at https://huggingface.co/datasets/Skylion007/openwebtext"),
        (ConnectionError("no route"), "cannot be reached from here"),
        (datasets.exceptions.DatasetNotFoundError("no"), "no such repository on the Hub, or it is private"),
        (RuntimeError("odd\nlines"), "RuntimeError: odd"),
    ):
        refuse(error)
        assert run_recipe(recipe("openwebtext"), [f"--out={tmp_path / 'set'}", "--tokenizer=byte"]) == 1
        said = capsys.readouterr().err
        assert message in said and "HF_ENDPOINT" in said and "--source=DIR" in said and "--fallback" in said
        assert said.count("\n") == 1 and not (tmp_path / "set").exists()


def test_a_fallback_is_used_only_when_asked_for_and_is_told_and_stored(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise DatasetError("It cannot be reached.")

    monkeypatch.setattr(hub.HubRows, "open", refuse)
    monkeypatch.setattr(hub.urllib.request, "urlopen", lambda *_, **__: exec("raise OSError('no route')"))
    arguments = [f"--out={tmp_path / 'set'}", "--tokenizer=byte", "--max_samples=30"]
    assert run_recipe(recipe("fineweb_edu"), arguments) == 1
    assert not (tmp_path / "set").exists()
    assert run_recipe(recipe("fineweb_edu"), [*arguments, "--fallback=wikitext2,shakespeare"]) == 1
    assert "None of --fallback=wikitext2,shakespeare can be reached either" in capsys.readouterr().err
    assert run_recipe(recipe("fineweb_edu"), [*arguments, "--fallback=pydocs", "--dry_run"]) == 0
    assert "published" not in capsys.readouterr().out  # that would be the size of what cannot be reached
    assert run_recipe(recipe("fineweb_edu"), [*arguments, "--fallback=wikitext2,pydocs"]) == 0
    assert "pydocs is prepared in place of fineweb_edu" in capsys.readouterr().err
    meta = TokenDataset.open(tmp_path / "set").meta
    assert meta["fallback"] == {"instead_of": "fineweb_edu", "used": "pydocs", "reason": "It cannot be reached."}
    assert "documentation topics" in meta["source"]
    assert "holds pydocs, which --fallback took in place of fineweb_edu" in TokenDataset.open(tmp_path / "set").stand_in


def test_a_mistyped_file_is_not_taken_for_a_name_on_the_hub(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_textfile(["texts/corpus.txt", "--out=set", "--tokenizer=byte"]) == 1
    assert "There is no file texts/corpus.txt" in capsys.readouterr().err


def test_no_vocabulary_is_not_the_default_one(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT)
    assert run_textfile([str(tmp_path / "a.txt"), f"--out={tmp_path / 'set'}", "--vocab_size=0"]) == 1
    assert "vocab_size=0 is too small" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- one's own texts


def test_textfile_command_prepares_from_any_working_directory(tmp_path):
    (tmp_path / "story.txt").write_text("Once upon a time there was a little cat. " * 50)
    done = command("textfile", "story.txt", "--tokenizer=char", "--out=cat", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1,845 tokens, 1,845 bytes, 1 document" in done.stdout and str(tmp_path / "cat") in done.stdout
    assert done.stderr == ""  # no progress where it takes a moment
    assert json.loads((tmp_path / "cat" / "meta.json").read_text())["source"] == "story.txt"
    assert len(TokenDataset.open(tmp_path / "cat").split("val")) == 205


def test_pydocs_command_makes_a_dataset_that_needs_no_download(tmp_path, capsys):
    """Of the first 200 documents; the whole is in tests/test_corpora.py."""
    assert run_recipe(recipe("pydocs"), [f"--out={tmp_path / 'docs'}", "--vocab_size=1000", "--max_samples=200"]) == 0
    dataset = TokenDataset.open(tmp_path / "docs")
    assert dataset.vocab_size == 1000 and dataset.split("train").bytes > 200_000


def test_a_name_that_is_no_file_is_a_dataset_on_the_hub(tmp_path, monkeypatch):
    given = argparse.Namespace(files=["owner/name"], split="train", config="en", text_key="body")
    source = prepare_command.open_files(given)
    assert isinstance(source, hub.HubRows) and (source.name, source.config, source.text_key) == ("owner/name", "en", "body")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").write_text("a file")
    assert isinstance(prepare_command.open_files(given), TextFiles)


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ((), 2, "required: FILE"),
        (("a.txt",), 2, "give either --name=NAME .* or --out=DIR"),
        (("a.txt", "--out=x", "--tokenizer=morse"), 2, "--tokenizer=morse is neither"),
        (("a.txt", "--out=x", "--tokenizer=char", "--vocab_size=5"), 2, "--vocab_size is for --tokenizer=bpe"),
        (("a.txt", "--out=x", "--val_fraction=2"), 2, "not between 0 and 1"),
        (("a.txt", "--out=x", "--max_tokens=0"), 2, "'0' is not a whole number from 1 on"),
        (("a.txt", "--out=x", "--max_tokens=1e3.5"), 2, "not a whole number"),
        (("a.txt", "--out=x", "--fallback=nowhere"), 2, "no other data/nowhere/prepare.py"),
        (("a.txt", "--out="), 2, "--out: it is empty"),
        (("a.txt", "--name=pydocs"), 2, "--name=pydocs is taken"),
        (("a.txt", "--name=a/b"), 2, "not a plain name"),
        (("missing.txt", "--out=x"), 1, "error: There is no file missing.txt"),
        (("a.txt", "--out=x", "--vocab_size=100"), 1, "error: vocab_size=100 is too small"),
        (("a.txt", "--out=a.txt"), 1, "error: .*a.txt"),
    ],
)
def test_errors_are_one_sentence_and_an_exit_code(tmp_path, arguments, code, message, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text to read")
    returned = run_textfile(arguments)
    error = capsys.readouterr().err
    assert returned == code and re.search(message, error), error
    assert "Traceback" not in error and error.count("\n") == 1
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
        python=sys.executable,  # a process of its own, whose limit that is
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.returncode == 1 and re.fullmatch(r"error: File too large \(out\); .*\n", done.stderr), done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name == "nt", reason="no signals")
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_command_leaves_nothing_that_looks_prepared(tmp_path, signal_number):
    (tmp_path / "long.jsonl").write_text("".join(f'{{"text": "{i} some words and more"}}\n' for i in range(300_000)))
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
    if signal_number != signal.SIGKILL:  # it had not come to its first commit
        assert error == "Interrupted: nothing was prepared.\n" and not out.exists()


# ------------------------------------------------------------------------------------------- what it will take


@pytest.fixture(scope="module")
def varied(tmp_path_factory):
    """A .jsonl file of 1 MB whose documents differ from its beginning to its end, and a .txt and a .parquet of the same."""
    folder = tmp_path_factory.mktemp("varied")
    drawn = random.Random(2)
    column = [f"{i} " + ("the cat and the dog " if i < 1500 else "Ωμέγα 123 ") * drawn.randint(10, 30) for i in range(3000)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text, "n": "x" * 20}) + "\n" for text in column))
    (folder / "b.txt").write_text("\n".join(column), encoding="utf-8")
    parquet.write_table(pyarrow.table({"text": column}), folder / "c.parquet", row_group_size=100)
    return folder


@pytest.mark.parametrize(
    "name, whole, tokenizer",
    [
        ("a.jsonl", True, "byte"),
        ("a.jsonl", False, "byte"),
        ("b.txt", True, "char"),
        ("b.txt", False, "bpe"),
        ("c.parquet", False, "char"),
    ],
)
def test_a_dry_run_says_tokens_and_disk_within_a_twentieth(varied, tmp_path, monkeypatch, name, whole, tokenizer):
    """Whether the file is small enough to be read whole or only looked at in places; and nothing is written."""
    if not whole:
        monkeypatch.setattr(estimate, "READ_WHOLE", 0)
        monkeypatch.setattr(estimate, "SAMPLE_CHARACTERS", 20_000)
        monkeypatch.setattr(estimate, "ENCODED_CHARACTERS", 500_000)
        monkeypatch.setattr("data.sources.PIECE_CHARACTERS", 4_000)
    options = Options(tokenizer=tokenizer, bpe_vocab_size=400 if tokenizer == "bpe" else None)
    before = sorted(varied.iterdir())
    expected = estimate.forecast(TextFiles([varied / name]), options, None)
    assert sorted(varied.iterdir()) == before
    from data.preparation import prepare

    prepare(TextFiles([varied / name]), tmp_path / "set", options)
    dataset = TokenDataset.open(tmp_path / "set")
    tokens = sum(len(dataset.split(split)) for split in ("train", "val"))
    disk = sum(dataset.split(split).size for split in ("train", "val"))
    assert expected.tokens == pytest.approx(tokens, rel=0.05)
    assert expected.disk_bytes == pytest.approx(disk, rel=0.05)
    assert expected.text_bytes == pytest.approx(sum(dataset.split(split).bytes for split in ("train", "val")), rel=0.05)


def test_a_dry_run_of_the_command_writes_nothing(varied, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_textfile([str(varied / "a.jsonl"), "--out=set", "--tokenizer=byte", "--dry_run", "--max_tokens=1e6"]) == 0
    shown = dict(re.findall(r"^(\w+) +(.*)$", capsys.readouterr().out, re.M))
    assert shown["tokens"] == "1,000,000" and shown["disk"] == "2 MB" and shown["download"] == "nothing"
    assert shown["time"].startswith("about") and not list(tmp_path.iterdir())


def test_limits_and_splits_count_in_a_dry_run(varied):
    options = Options(tokenizer="byte", max_samples=100)
    by_hand = sum(len(json.loads(line)["text"].encode()) + 1 for line in (varied / "a.jsonl").read_text().splitlines())
    assert estimate.forecast(TextFiles([varied / "a.jsonl"]), options, None).tokens == pytest.approx(by_hand / 30, rel=0.05)
    both = Splits({"train": TextFiles([varied / "a.jsonl"]), "val": TextFiles([varied / "c.parquet"])})
    assert estimate.forecast(both, Options(tokenizer="byte"), 2).tokens == pytest.approx(2 * by_hand, rel=0.05)


@pytest.mark.parametrize("whole", [True, False])
def test_a_dry_run_leaves_duplicates_out_as_the_preparation_does(tmp_path, monkeypatch, whole):
    """Every second document is one that came before. Where only places are looked at, it says that this is the most."""
    if not whole:
        monkeypatch.setattr(estimate, "READ_WHOLE", 0)
        monkeypatch.setattr(estimate, "SAMPLE_CHARACTERS", 20_000)
        monkeypatch.setattr("data.sources.PIECE_CHARACTERS", 4_000)
    texts = [f"document {number // 2 * 2} " * 20 for number in range(4_000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source, options = TextFiles([tmp_path / "a.jsonl"]), Options(tokenizer="byte", deduplicate=True)
    expected = estimate.forecast(source, options, None)
    from data.preparation import prepare

    prepare(source, tmp_path / "set", options)
    dataset = TokenDataset.open(tmp_path / "set")
    tokens = sum(len(dataset.split(split)) for split in ("train", "val"))
    assert expected.tokens == pytest.approx(tokens, rel=0.05) and expected.duplicates == pytest.approx(0.5, rel=0.02)
    assert ("the most that it takes" in expected.report()) == (not whole)
    assert "duplicates" not in estimate.forecast(source, Options(tokenizer="byte"), None).report()


def test_little_text_starts_no_processes(varied, tmp_path, monkeypatch):
    given = argparse.Namespace(num_proc=None)
    assert prepare_command.processes(given, TextFiles([varied / "a.jsonl"])) is None
    assert prepare_command.processes(given, Documents(lambda: iter(()), "x", "x")) is None
    monkeypatch.setattr(prepare_command, "POOL_FROM", 1000)
    assert prepare_command.processes(given, TextFiles([varied / "a.jsonl"])) == os.cpu_count()
    assert prepare_command.processes(argparse.Namespace(num_proc=3), TextFiles([varied / "a.jsonl"])) == 3
