"""Documents become a dataset: exactly the tokens of a straightforward encoding, whatever the processes and interruptions."""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data import dataset_writer, encoding, pipeline, sources
from data.corpora import hash01
from data.dataset_writer import STAGING, unfinished
from data.plan import Options
from data.preparation import prepare
from data.sources import Splits, TextFiles
from data.token_dataset import DATA_DIR, DatasetError, TokenDataset, is_prepared
from data.tokenization import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer

DOCUMENTS = [(str(i), f"Document {i}: the cat sat on the mat, {'ü' * i} and so on. " * 3) for i in range(20)]
SIZES = {"documents": 240, "longest": 900}


TEXT = "The cat sat on the mat.\nAnd so on. " * 30


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A .jsonl file with 240 documents of random words, 20 of them twice."""
    drawn = random.Random(5)
    words = ["the", "cat,", "it's", "12", "Ωμέγα", "\n\n", "a.b", "  two", "日本", "end.\n"]
    texts = [" ".join(drawn.choices(words, k=drawn.randint(3, SIZES["longest"] // 5))) for _ in range(SIZES["documents"] - 20)]
    texts += texts[:20]
    drawn.shuffle(texts)
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def texts_of(path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def streams(folder) -> dict[str, list[int]]:
    dataset = TokenDataset.open(folder)
    return {name: dataset.split(name).read(0, len(dataset.split(name))).tolist() for name in ("train", "val")}


def straightforward(texts: list[str], coder, fraction: float) -> dict[str, list[int]]:
    """Each document encoded by itself and ended, in a loop; it goes where the first 6 bytes of its blake2b say."""
    expected: dict[str, list[int]] = {"train": [], "val": []}
    for text in texts:
        key = int.from_bytes(hashlib.blake2b(text[:100_000].encode(), digest_size=16).digest()[:6], "little") / 2**48
        expected["val" if key < fraction else "train"] += [*coder.encode(text), coder.eos_id]
    return expected


# ------------------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
@pytest.mark.parametrize("count", [1, 20])
def test_a_prepared_dataset_decodes_to_its_documents(tmp_path, tokenizer, count):
    documents = DOCUMENTS[:count]
    meta = prepare(lambda: iter(documents), tmp_path, tokenizer=tokenizer, bpe_vocab_size=300 if tokenizer == "bpe" else None)
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


@pytest.mark.parametrize("num_proc", [None, 1, 2])
def test_the_stream_is_that_of_a_straightforward_encoding(corpus, tmp_path, monkeypatch, num_proc):
    """Documents in their order, however many processes encode them and however they are put together to batches."""
    monkeypatch.setattr(pipeline, "BATCH_CHARACTERS", 3000)
    meta = prepare(TextFiles([corpus]), tmp_path, tokenizer="bpe", bpe_vocab_size=320, val_fraction=0.2, num_proc=num_proc)
    expected = straightforward(texts_of(corpus), load_tokenizer(tmp_path), 0.2)
    assert streams(tmp_path) == expected and min(map(len, expected.values())) > 1000
    assert sum(split["documents"] for split in meta["splits"].values()) == SIZES["documents"]


def test_the_bos_of_a_tokenizer_that_has_one_begins_each_document(corpus, tmp_path):
    from test_tokenization import sentencepiece_like
    from tokenizers import processors

    backend = sentencepiece_like(tmp_path / "sp")._backend
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(tmp_path / "sp" / "tokenizer.json"))
    coder = HuggingFaceTokenizer.from_pretrained(tmp_path / "sp")
    texts = texts_of(corpus)[:30]
    meta = prepare(lambda: iter(enumerate(texts)), tmp_path / "set", tokenizer=str(tmp_path / "sp"), val_fraction=0.3)
    assert meta["special_ids"] == {"eos_id": 2, "bos_id": 1}
    by_split = streams(tmp_path / "set")
    documents = [[1, *coder.encode(text), 2] for text in texts]
    assert sorted(by_split["train"] + by_split["val"]) == sorted(token for document in documents for token in document)
    together = "".join(map(chr, by_split["train"] + [0] + by_split["val"]))
    assert all("".join(map(chr, document)) in together for document in documents)


def test_a_long_text_in_pieces_gives_the_ids_of_the_whole(tmp_path, monkeypatch):
    """A .txt file is cut into pieces of 50 characters, and in two for validation; with a tokenizer of words that allows cuts
    and one that does not."""
    from test_tokenization import sentencepiece_like

    monkeypatch.setattr(sources, "PIECE_CHARACTERS", 50)
    monkeypatch.setattr(pipeline, "BATCH_CHARACTERS", 400)
    sentencepiece_like(tmp_path / "sp")
    text = "".join(f"word{i % 7}, {'x' * (i % 13)}{' ' * (i % 4 + 1)}\n\n  end{i} don't " for i in range(600))
    (tmp_path / "a.txt").write_text(text)
    cut = int(len(text) * 0.9)
    for name in ("bpe", "byte", "char", str(tmp_path / "sp")):
        folder = tmp_path / Path(name).name / "set"
        prepare(TextFiles([tmp_path / "a.txt"]), folder, tokenizer=name)
        coder = load_tokenizer(folder)
        assert streams(folder) == {"train": coder.encode(text[:cut]), "val": coder.encode(text[cut:])}
        assert {name: split["documents"] for name, split in TokenDataset.open(folder).meta["splits"].items()} == {
            "train": 1,
            "val": 1,
        }


def test_long_documents_among_others_are_whole_and_stay_on_their_side(tmp_path, monkeypatch):
    """Two .txt files that are read in pieces: each piece follows the first, with one eos at the end of each document."""
    monkeypatch.setattr(sources, "PIECE_CHARACTERS", 60)
    monkeypatch.setattr(encoding, "KEY_CHARACTERS", 50)
    texts = {name: f"{name} cat sat on the mat and " * 40 for name in "abcdef"}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    prepare(TextFiles(sorted(tmp_path.glob("*.txt"))), tmp_path / "set", tokenizer="byte", val_fraction=0.4, deduplicate=False)
    by_split = streams(tmp_path / "set")
    ended = [bytes(part) for ids in by_split.values() for part in split_at(ids, 256)]
    assert sorted(ended) == sorted(text.encode() for text in texts.values())


def split_at(ids, eos):
    parts, part = [], []
    for token in ids:
        if token == eos:
            parts.append(part)
            part = []
        else:
            part.append(token)
    assert part == []
    return parts


def test_sources_with_splits_of_their_own_keep_them(corpus, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "for validation"}\n{"text": "as well"}\n')
    prepare(Splits({"train": TextFiles([corpus]), "val": TextFiles([other])}), tmp_path / "set", tokenizer="byte")
    by_split = streams(tmp_path / "set")
    assert bytes(token for token in by_split["val"] if token < 256) == b"for validationas well"
    assert by_split["train"].count(256) == SIZES["documents"]


def test_gpt2s_bpe_of_tiny_shakespeare_has_the_published_size(tmp_path):
    """nanoGPT's counts, where tiktoken's files are and TINY_SHAKESPEARE names the text."""
    from data.tokenization import TiktokenTokenizer

    text = Path(os.environ.get("TINY_SHAKESPEARE", ""))
    if not text.is_file():
        pytest.skip("the environment variable TINY_SHAKESPEARE names no file; it would be the text's")
    try:
        TiktokenTokenizer("gpt2")
    except ValueError:
        pytest.skip("the files of the GPT-2 tokenizer are not here")
    meta = prepare(TextFiles([text]), tmp_path / "set", tokenizer="gpt2")
    assert [meta["splits"][name]["tokens"] for name in ("train", "val")] == [301_966, 36_059]


# ------------------------------------------------------------------------------------------- training and validation


def test_a_document_stays_on_its_side_whatever_comes_before_it(corpus, tmp_path):
    """The hash is of its text: order and other documents do not matter, and duplicates are on one side together."""
    texts = texts_of(corpus)
    sides = []
    for name, some in (("all", texts), ("reversed", texts[::-1]), ("half", texts[::2])):
        prepare(lambda some=some: iter(enumerate(some)), tmp_path / name, tokenizer="byte", val_fraction=0.3)
        sides.append({bytes(part): split for split, ids in streams(tmp_path / name).items() for part in split_at(ids, 256)})
    assert sides[0] == sides[1]
    assert all(sides[0][text] == side for text, side in sides[2].items())
    assert len(sides[0]) == SIZES["documents"] - 20 and 0.15 < list(sides[0].values()).count("val") / len(sides[0]) < 0.45


@pytest.mark.parametrize("split_by", ["text", "number"])
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.999])
def test_both_sides_get_a_document_however_few_there_are(tmp_path, split_by, fraction):
    """Where none has a key on the one side, the nearest goes there, and a BPE does not see it in training."""
    for count in (2, 3, 7):
        documents = [(str(i), f"text {i} " * (i + 1)) for i in range(count)]
        folder = tmp_path / str(count)
        prepare(lambda: iter(documents), folder, tokenizer="byte", val_fraction=fraction, split_by=split_by)
        got = {split: {bytes(part).decode() for part in split_at(ids, 256)} for split, ids in streams(folder).items()}
        if split_by == "number":
            keys = {text: hash01(i) for i, (_, text) in enumerate(documents)}
        else:
            digests = {text: hashlib.blake2b(text.encode(), digest_size=16).digest() for _, text in documents}
            keys = {text: int.from_bytes(digest[:6], "little") / 2**48 for text, digest in digests.items()}
        val = {text for text, key in keys.items() if key < fraction} or {min(keys, key=keys.get)}
        if val == keys.keys():
            val.remove(max(keys, key=keys.get))
        assert got == {"val": val, "train": keys.keys() - val}


def test_the_bpe_does_not_see_the_validation_text(tmp_path):
    documents = [("a", "aaaa bbbb " * 50), ("b", "zzzz qqqq " * 50)]
    prepare(lambda: iter(documents), tmp_path, tokenizer="bpe", bpe_vocab_size=270, val_fraction=0.001)
    coder, by_split = load_tokenizer(tmp_path), streams(tmp_path)
    lengths = {split: len(ids) for split, ids in by_split.items()}
    assert lengths["train"] < 0.4 * lengths["val"], lengths
    assert {coder.decode(ids[:-1]) for ids in by_split.values()} == {text for _, text in documents}


def test_no_documents_and_bad_options_are_errors(tmp_path):
    with pytest.raises(DatasetError, match="no documents"):
        prepare(lambda: iter(()), tmp_path / "x")
    wrong = [("val_fraction", 1.0), ("val_fraction", 0.0), ("max_tokens", 0), ("max_samples", 0), ("shard_tokens", 0)]
    for name, value in wrong:
        with pytest.raises(ValueError, match=f"{name}={value:g} is not"):
            prepare(lambda: iter(DOCUMENTS), tmp_path / "x", **{name: value})
    with pytest.raises(ValueError, match="fewer than 2 characters"):
        prepare(lambda: iter([("a", "x")]), tmp_path / "x", tokenizer="byte")
    assert not (tmp_path / "x").exists()


# ------------------------------------------------------------------------------------------- limits, duplicates, shards


@pytest.mark.parametrize("num_proc", [None, 2])
def test_max_tokens_stops_after_the_document_that_reaches_it(corpus, tmp_path, monkeypatch, num_proc):
    monkeypatch.setattr(pipeline, "BATCH_CHARACTERS", 2000)
    whole = straightforward(texts_of(corpus), ByteTokenizer(eos=True), 0.2)
    prepare(TextFiles([corpus]), tmp_path, tokenizer="byte", val_fraction=0.2, max_tokens=9000, num_proc=num_proc)
    by_split = streams(tmp_path)
    assert all(whole[split][: len(ids)] == ids for split, ids in by_split.items())
    total = sum(map(len, by_split.values()))
    documents = texts_of(corpus)
    expected = 0
    for text in documents:
        expected += len(text.encode()) + 1
        if expected >= 9000:
            break
    assert total == expected < sum(map(len, whole.values()))


def test_max_tokens_of_a_single_text_are_the_beginnings_of_both_splits(tmp_path):
    text = "Once upon a time there was a little cat, éé. " * 100
    (tmp_path / "a.txt").write_text(text)
    prepare(TextFiles([tmp_path / "a.txt"]), tmp_path / "whole", tokenizer="byte")
    meta = prepare(TextFiles([tmp_path / "a.txt"]), tmp_path / "set", tokenizer="byte", max_tokens=1000)
    whole, part = streams(tmp_path / "whole"), streams(tmp_path / "set")
    assert part == {"train": whole["train"][:900], "val": whole["val"][:100]}
    assert {name: split["bytes"] for name, split in meta["splits"].items()} == {"train": 900, "val": 100}


def test_max_samples_is_a_number_of_documents(corpus, tmp_path):
    prepare(TextFiles([corpus]), tmp_path / "set", tokenizer="byte", max_samples=37)
    by_split = streams(tmp_path / "set")
    parts = {bytes(part).decode() for ids in by_split.values() for part in split_at(ids, 256)}
    assert parts == set(texts_of(corpus)[:37]) and sum(ids.count(256) for ids in by_split.values()) == 37
    prepare(TextFiles([corpus]), tmp_path / "one", tokenizer="byte", max_samples=1)
    assert bytes(streams(tmp_path / "one")["train"] + streams(tmp_path / "one")["val"]).decode() == texts_of(corpus)[0]


def test_duplicates_are_dropped_when_asked_for(corpus, tmp_path):
    texts = texts_of(corpus)
    meta = prepare(TextFiles([corpus]), tmp_path, tokenizer="byte", val_fraction=0.2, deduplicate=True)
    assert meta["duplicates"] == 20
    assert streams(tmp_path) == straightforward(list(dict.fromkeys(texts)), ByteTokenizer(eos=True), 0.2)


def test_shards_hold_the_same_stream(corpus, tmp_path):
    prepare(TextFiles([corpus]), tmp_path / "whole", tokenizer="byte")
    meta = prepare(TextFiles([corpus]), tmp_path / "shards", tokenizer="byte", shard_tokens=5000)
    assert streams(tmp_path / "whole") == streams(tmp_path / "shards")
    assert len(meta["splits"]["train"]["files"]) > 5
    TokenDataset.open(tmp_path / "shards").verify()


# ------------------------------------------------------------------------------------------- again, and interrupted


def test_the_same_preparation_again_does_nothing_and_another_is_refused(corpus, tmp_path, capsys):
    options = Options(tokenizer="byte", val_fraction=0.2)
    made = prepare(TextFiles([corpus]), tmp_path / "set", options)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()}
    assert prepare(TextFiles([corpus]), tmp_path / "set", options) == made
    assert "is prepared already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()} == before
    for changed in (dict(val_fraction=0.3), dict(tokenizer="char"), dict(max_samples=5)):
        with pytest.raises(DatasetError, match="holds a dataset already"):
            prepare(TextFiles([corpus]), tmp_path / "set", options, **changed)
    copy = tmp_path / corpus.name
    shutil.copyfile(corpus, copy)  # newer than the dataset
    os.utime(copy, (time.time() + 10, time.time() + 10))
    with pytest.raises(DatasetError, match="holds a dataset already"):
        prepare(TextFiles([copy]), tmp_path / "set", options)


KILLED_AT = {
    "reading": (pipeline.Pipeline, "split_of"),
    "encoding": (pipeline.Encoder, "encoded"),
    "writing": (dataset_writer._SplitWriter, "write"),
    "committing": (os, "fsync"),
    "renaming": (os, "replace"),
    "between shards": (dataset_writer._SplitWriter, "_next_file"),
    "hashing": (dataset_writer._SplitWriter, "close"),
    "publishing": (Path, "unlink"),
}


def attempt(job, where: str = "", moment: int = 0) -> int:
    """Do a job in a process of its own, killed when it comes to a place for the moment-th time; returns its exit code."""
    child = os.fork()
    if child == 0:
        try:
            if where:
                module, name = KILLED_AT[where]
                original, calls = getattr(module, name), iter(range(1, 10**9))

                def killing(*arguments, **options):
                    if next(calls) == moment:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return original(*arguments, **options)

                setattr(module, name, killing)
            job()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_killed_anywhere_and_run_again_it_ends_with_the_same_bytes(corpus, tmp_path, monkeypatch):
    """Kill -9 while reading, encoding, writing, hashing, committing, renaming, between shards and while publishing, two kills in
    a row each: the same command again goes on, and the files are those of an unbroken run."""
    monkeypatch.setattr(pipeline, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(pipeline, "BATCH_CHARACTERS", 4000)
    options = Options(tokenizer="byte", val_fraction=0.2, deduplicate=True, shard_tokens=6000)

    def job(folder):
        return lambda: prepare(TextFiles([corpus]), folder, options)

    assert attempt(job(tmp_path / "whole")) == 0
    expected = contents(tmp_path / "whole")
    assert len(expected) > 8
    kills = [("reading", 150), ("writing", 30), ("encoding", 1), ("committing", 7), ("hashing", 4), ("renaming", 3)]
    kills += [("renaming", 20), ("between shards", 5), ("publishing", 1), ("committing", 40)]
    killed = went_on = 0
    for number, (where, moment) in enumerate(kills):
        folder = tmp_path / str(number)
        for again in range(2):
            killed += attempt(job(folder), where, moment + again) == -9
            went_on += unfinished(folder) is not None
        assert attempt(job(folder)) == 0, (where, moment)
        assert contents(folder) == expected, (where, moment)
    assert killed > 12 and went_on > 10, (killed, went_on)


@pytest.mark.parametrize("processes", (None, 2))
@pytest.mark.parametrize("limit", (dict(max_tokens=400), dict(max_samples=10)))
def test_limits_of_a_source_with_its_own_validation_split_leave_both_some(tmp_path, monkeypatch, limit, processes):
    """Issue 11: the limit was reached in the training split, which is read first, so that validation was always empty."""
    monkeypatch.setattr(pipeline, "BATCH_CHARACTERS", 100)
    texts = {split: [f"{split} {i} " + "x" * (i % 7) for i in range(200)] for split in ("train", "val")}
    for split, column in texts.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in column))
    source = Splits({split: TextFiles([tmp_path / f"{split}.jsonl"]) for split in texts})
    prepare(source, tmp_path / "set", tokenizer="byte", val_fraction=0.2, num_proc=processes, **limit)
    for split, share in (("train", 1.0), ("val", 0.2)):
        taken = []
        for text in texts[split]:
            if (
                len(taken) >= limit.get("max_samples", 10**9) * share
                or sum(map(len, taken)) >= limit.get("max_tokens", 10**9) * share
            ):
                break
            taken.append([*text.encode(), 256])
        assert streams(tmp_path / "set")[split] == sum(taken, []), split


def test_such_a_preparation_that_was_interrupted_ends_with_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(pipeline, "BATCH_CHARACTERS", 100)
    for split in ("train", "val"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"text": f"{split} {i}"}) + "\n" for i in range(300)))
    source = Splits({split: TextFiles([tmp_path / f"{split}.jsonl"]) for split in ("train", "val")})
    options = Options(tokenizer="byte", val_fraction=0.5, max_tokens=500, deduplicate=True)
    write, writes = pipeline.Pipeline.write, []
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Pipeline, "write", lambda *arguments: (writes.append(1), write(*arguments)))
        prepare(source, tmp_path / "whole", options)
    assert len(writes) >= 6
    for moment in range(1, len(writes) + 1):
        calls = iter(range(1, 1000))

        def interrupted(self, about, encoded, calls=calls, moment=moment):
            if next(calls) == moment:
                raise KeyboardInterrupt
            write(self, about, encoded)

        with monkeypatch.context() as patch:
            patch.setattr(pipeline.Pipeline, "write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                prepare(source, tmp_path / str(moment), options)
        prepare(source, tmp_path / str(moment), options)
        assert contents(tmp_path / str(moment)) == contents(tmp_path / "whole"), moment


@pytest.mark.parametrize("kind", ("byte", "char"))
def test_the_tokenizer_of_a_dataset_can_be_given_to_another(tmp_path, kind):
    """One text has no end of a document, several have: only a common tokenizer lets them be mixed."""
    prepare(lambda: iter([("a", TEXT), ("b", TEXT + "!")]), tmp_path / "several", tokenizer=kind, val_fraction=0.5)
    prepare(lambda: iter([("a", TEXT)]), tmp_path / "one", tokenizer=str(tmp_path / "several"))
    one, several = (TokenDataset.open(tmp_path / name) for name in ("one", "several"))
    assert one.tokenizer_fingerprint == several.tokenizer_fingerprint and one.vocab_size == several.vocab_size
    assert one.tokenizer().decode(streams(tmp_path / "one")["train"]) == TEXT[: len(streams(tmp_path / "one")["train"])]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.txt.gz", b"\x1f\x8b", "is compressed; unpack it first"),
        ("a.txt.zst", b"\x28\xb5", "is compressed; unpack it first"),
        ("a.json", b'[{"text": "a"}]', "one object with the text a line"),
    ],
)
def test_a_file_of_another_kind_is_not_taken_for_text(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, DatasetError), match=said):
        prepare(TextFiles([tmp_path / name]), tmp_path / "set", tokenizer="byte")


def test_what_was_committed_is_not_read_again(corpus, tmp_path, monkeypatch):
    """After an interruption the rest is read, from where the last commit says."""
    monkeypatch.setattr(pipeline, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(pipeline, "BATCH_CHARACTERS", 2000)
    source, options = TextFiles([corpus]), Options(tokenizer="byte")
    prepare(source, tmp_path / "whole", options)
    writes, write = [], pipeline.Pipeline.write

    def interrupted(self, about, encoded):
        writes.append(len(about.parts))
        if len(writes) == 9:
            raise KeyboardInterrupt
        write(self, about, encoded)

    monkeypatch.setattr(pipeline.Pipeline, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "set", options)
    left = unfinished(tmp_path / "set")
    assert left["state"]["number"] == sum(writes[:8]) and not is_prepared(tmp_path / "set")
    assert sum(split["documents"] for split in left["splits"].values()) == sum(writes[:8])
    monkeypatch.setattr(pipeline.Pipeline, "write", lambda self, *rest: (writes.append(len(rest[0].parts)), write(self, *rest)))
    prepare(source, tmp_path / "set", options)
    assert sum(writes) - writes[8] == SIZES["documents"]
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_what_another_preparation_has_begun_is_not_dropped_unasked(corpus, tmp_path, monkeypatch):
    """Hours of work are not thrown away for a mistyped option."""
    monkeypatch.setattr(pipeline, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(pipeline, "BATCH_CHARACTERS", 2000)
    with monkeypatch.context() as patch:
        patch.setattr(dataset_writer.DatasetWriter, "publish", lambda self, **_: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            prepare(TextFiles([corpus]), tmp_path / "set", tokenizer="byte")
    before = contents(tmp_path / "set" / STAGING)
    with pytest.raises(DatasetError, match=r"interrupted preparation .*\(byte, .*K tokens so far\).*--overwrite"):
        prepare(TextFiles([corpus]), tmp_path / "set", tokenizer="char")
    assert contents(tmp_path / "set" / STAGING) == before
    os.truncate(tmp_path / "set" / STAGING / "train.bin", 100)
    with pytest.raises(DatasetError, match="not as the interrupted preparation left it.*--overwrite"):
        prepare(TextFiles([corpus]), tmp_path / "set", tokenizer="byte")
    prepare(TextFiles([corpus]), tmp_path / "set", tokenizer="char", overwrite=True)
    assert load_tokenizer(tmp_path / "set").kind == "char"


def test_a_source_that_fails_half_way_leaves_what_was_written(corpus, tmp_path, monkeypatch):
    """A broken line is named; once it is repaired by appending nothing before it, the rest is read."""
    monkeypatch.setattr(pipeline, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(pipeline, "BATCH_CHARACTERS", 2000)
    lines = corpus.read_text(encoding="utf-8").splitlines(keepends=True)
    broken = tmp_path / "broken.jsonl"
    broken.write_text("".join(lines[:150]) + "{not json\n", encoding="utf-8")
    with pytest.raises(ValueError, match="broken.jsonl, line 151 is not JSON"):
        prepare(TextFiles([broken]), tmp_path / "set", tokenizer="byte")
    assert unfinished(tmp_path / "set")["state"]["number"] > 100


def test_documents_of_unknown_origin_are_not_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(dataset_writer.DatasetWriter, "publish", lambda self, **_: exec("raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        prepare(lambda: iter(DOCUMENTS), tmp_path / "set", tokenizer="byte")
    assert not (tmp_path / "set").exists()


def test_a_killed_worker_is_said_in_a_sentence(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "BATCH_CHARACTERS", 2000)
    submit = encoding.ProcessPoolExecutor.submit

    def kill_one(self, *arguments):
        future = submit(self, *arguments)
        for process in list((self._processes or {}).values()):
            with contextlib.suppress(ProcessLookupError):  # killed before, by an earlier call
                os.kill(process.pid, signal.SIGKILL)
        return future

    monkeypatch.setattr(encoding.ProcessPoolExecutor, "submit", kill_one)
    with pytest.raises(DatasetError, match="was killed.*smaller --num_proc"):
        prepare(TextFiles([corpus]), tmp_path / "set", tokenizer="byte", num_proc=2)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("error", [OSError("handle is closed"), ValueError("bad value(s) in fds_to_keep")], ids=str)
def test_a_pool_that_breaks_while_it_starts_a_process_is_said_in_the_same_sentence(corpus, tmp_path, monkeypatch, error):
    def torn_down(self, *arguments):
        raise error

    monkeypatch.setattr(encoding.ProcessPoolExecutor, "submit", torn_down)
    with pytest.raises(DatasetError, match="was killed or could not be started.*smaller --num_proc"):
        prepare(TextFiles([corpus]), tmp_path / "set", tokenizer="byte", num_proc=2)
    assert not (tmp_path / "set").exists()


def test_workers_end_with_the_process_that_started_them(corpus, tmp_path):
    code = f"""
import os, sys, time
sys.path.insert(0, {str(DATA_DIR.parent)!r})
from pathlib import Path
from data import encoding
from data.tokenization import ByteTokenizer
if __name__ == "__main__":
    ByteTokenizer().save({str(tmp_path)!r})
    with encoding.Encoder(ByteTokenizer(), Path({str(tmp_path)!r}), 2) as encoder:
        list(encoder.encoded([encoding.TextBatch(["text"], None)] * 4))
        print(*encoder._pool._processes, flush=True)
        os.kill(os.getpid(), 9)
"""
    (tmp_path / "main.py").write_text(code)
    process = subprocess.run([sys.executable, str(tmp_path / "main.py")], capture_output=True, text=True, timeout=60)
    workers = list(map(int, process.stdout.split()))
    assert process.returncode == -9 and workers
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() and running(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(running(worker) for worker in workers)


def running(pid: int) -> bool:
    """Whether a process exists and has not ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_progress_says_how_much_and_how_long(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "SHOW_SECONDS", {True: 0.0, False: 0.0})
    monkeypatch.setattr(pipeline, "BATCH_CHARACTERS", 5000)
    prepare(TextFiles([corpus]), tmp_path, tokenizer="byte", progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 3
    assert "documents" in lines[-1] and "tokens/s" in lines[-1] and "% read" in lines[1] and "left" in lines[1]
