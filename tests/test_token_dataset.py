"""The on-disk format: what is written is read, and whatever is wrong with it is said in one sentence."""

import hashlib
import json
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from data import token_dataset
from data.dataset_writer import DatasetWriter
from data.token_dataset import DATA_DIR, DatasetError, TokenDataset, resolve_dataset
from data.tokenization import ByteTokenizer, CharTokenizer

TRAIN = [list(range(0, 200, 3)), [7] * 40, [255, 0, 255]]
VAL = [list(range(50))]


def write(folder, tokenizer=None, **options):
    tokenizer = tokenizer or ByteTokenizer(eos=True)
    options.setdefault("append_eos", tokenizer.eos_id is not None)
    with DatasetWriter(folder, tokenizer, source="test", **options) as writer:
        for split, documents in (("train", TRAIN), ("val", VAL)):
            for ids in documents:
                writer.add(split, ids, text_bytes=len(ids))
        writer.publish()
    return folder


def edit_meta(folder, change):
    path = folder / "meta.json"
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "set")


def test_files_are_little_endian_uint16_without_header(folder):
    expected = [token for ids in TRAIN for token in [*ids, 256]]
    content = (folder / "train.bin").read_bytes()
    assert list(struct.unpack(f"<{len(content) // 2}H", content)) == expected


def test_meta_describes_the_files(folder):
    meta = json.loads((folder / "meta.json").read_text())
    train = meta["splits"]["train"]
    assert (train["documents"], train["bytes"], train["tokens"]) == (3, 67 + 40 + 3, 67 + 40 + 3 + 3)
    assert train["files"] == [
        {"name": "train.bin", "size": 226, "sha256": hashlib.sha256((folder / "train.bin").read_bytes()).hexdigest()}
    ]
    assert (meta["dtype"], meta["vocab_size"], meta["special_ids"]) == ("uint16", 257, {"eos_id": 256})


def test_reading_gives_back_what_was_written(folder):
    dataset = TokenDataset.open(folder, vocab_size=257)
    train = dataset.split("train")
    everything = [token for ids in TRAIN for token in [*ids, 256]]
    assert len(train) == len(everything) and train.bytes == 110
    assert train.read(0, len(train)).tolist() == everything
    assert train.read(60, 71).tolist() == everything[60:71]
    assert train.read(0, 1).dtype == np.int64
    assert dataset.tokenizer().fingerprint == ByteTokenizer(eos=True).fingerprint


@pytest.mark.parametrize("shard_tokens", [1, 7, 40, 1000])
def test_shards_read_like_one_file(tmp_path, shard_tokens):
    whole = TokenDataset.open(write(tmp_path / "whole")).split("train")
    sharded = TokenDataset.open(write(tmp_path / "sharded", shard_tokens=shard_tokens)).split("train")
    assert len(sharded.files) == -(-len(whole) // shard_tokens)
    for start in range(0, len(whole), 11):
        for stop in (start, start + 1, min(start + 30, len(whole)), len(whole)):
            assert np.array_equal(sharded.read(start, stop), whole.read(start, stop))


def test_preparing_again_leaves_no_file_of_the_earlier_dataset(tmp_path):
    write(tmp_path, shard_tokens=20)
    write(tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.glob("*.bin")) == ["train.bin", "val.bin"]
    TokenDataset.open(tmp_path)


def test_large_vocabularies_use_uint32(tmp_path):
    class Large(ByteTokenizer):
        def __init__(self):
            super().__init__(eos=True)
            self.vocab_size = 65537

    with DatasetWriter(tmp_path, Large()) as writer:
        writer.add("train", [65536, 1, 2], 3)
        writer.add("val", [65536], 1)
        assert writer.publish()["dtype"] == "uint32"
    assert (tmp_path / "train.bin").read_bytes() == struct.pack("<3I", 65536, 1, 2)
    assert TokenDataset.open(tmp_path, vocab_size=65537).split("train").read(0, 3).tolist() == [65536, 1, 2]


def test_meta_pkl_serves_nanogpt(tmp_path):
    tokenizer = CharTokenizer("abc")
    with DatasetWriter(tmp_path, tokenizer) as writer:
        writer.add("train", [0, 1, 2], 3)
        writer.add("val", [1], 1)
        writer.publish()
    meta = pickle.loads((tmp_path / "meta.pkl").read_bytes())
    assert meta == {"vocab_size": 3, "itos": {0: "a", 1: "b", 2: "c"}, "stoi": {"a": 0, "b": 1, "c": 2}}


def test_fingerprint_depends_on_content_only(tmp_path):
    first = TokenDataset.open(write(tmp_path / "a")).fingerprint
    assert first == TokenDataset.open(write(tmp_path / "b")).fingerprint
    with DatasetWriter(tmp_path / "c", ByteTokenizer(eos=True)) as writer:
        writer.add("train", [1, 2, 3], 3)
        writer.add("val", [1], 1)
        writer.publish()
    assert first != TokenDataset.open(tmp_path / "c").fingerprint


# ------------------------------------------------------------------------------------------- nanoGPT's folders


def test_a_nanogpt_folder_is_readable_and_noted(tmp_path):
    np.array([5, 1, 2, 60], dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.array([3, 4], dtype=np.uint16).tofile(tmp_path / "val.bin")
    dataset = TokenDataset.open(tmp_path, vocab_size=61)
    assert dataset.split("train").read(0, 4).tolist() == [5, 1, 2, 60]
    assert dataset.split("train").bytes is None and dataset.vocab_size is None and dataset.tokenizer() is None
    assert "uint16" in dataset.note and "largest id 60" in dataset.note and "\n" not in dataset.note
    before = dataset.fingerprint
    np.array([5, 1, 2, 59], dtype=np.uint16).tofile(tmp_path / "train.bin")
    assert TokenDataset.open(tmp_path).fingerprint != before
    with pytest.raises(DatasetError, match="token id 59.*vocab_size=59"):
        TokenDataset.open(tmp_path, vocab_size=59)


@pytest.mark.parametrize("top", [100, 100_276, 200_018])
def test_a_uint32_file_without_meta_is_recognised(tmp_path, top):
    """As are the small ids of a small vocabulary; the same ids as uint16 are not taken for it."""
    ids = np.random.default_rng(1).integers(1, top, 5000)
    for name, dtype in (("wide", np.uint32), ("narrow", np.uint16)):
        (tmp_path / name).mkdir()
        (ids % (2**16 if dtype is np.uint16 else 2**32)).astype(dtype).tofile(tmp_path / name / "train.bin")
        ids[:100].astype(dtype).tofile(tmp_path / name / "val.bin")
    wide, narrow = (TokenDataset.open(tmp_path / name) for name in ("wide", "narrow"))
    assert wide.split("train").read(0, 5000).tolist() == ids.tolist() and "read as uint32" in wide.note
    assert wide.split("val").read(0, 100).tolist() == ids[:100].tolist()
    assert narrow.split("train").read(0, 5000).tolist() == (ids % 2**16).tolist() and "read as uint16" in narrow.note


def nanogpts_characters(folder, text="hello world, it is I"):
    """What nanoGPT's shakespeare_char/prepare.py writes, of another text."""
    characters = sorted(set(text))
    stoi = {character: i for i, character in enumerate(characters)}
    ids = np.array([stoi[character] for character in text], dtype=np.uint16)
    ids.tofile(folder / "train.bin")
    ids.tofile(folder / "val.bin")
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": stoi}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return text


def test_vocabulary_and_decoder_of_a_nanogpt_folder_come_from_its_meta_pkl(tmp_path):
    text = nanogpts_characters(tmp_path)
    dataset = TokenDataset.open(tmp_path)
    split = dataset.split("train")
    assert dataset.vocab_size == len(set(text)) and dataset.tokenizer().decode(split.read(0, len(split)).tolist()) == text
    assert dataset.check_tokenizer() is None and f"vocabulary {len(set(text))} by its meta.pkl" in dataset.note
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 5}))
    with pytest.raises(DatasetError, match=r"but its meta.pkl has vocab_size=5"):
        TokenDataset.open(tmp_path)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 500, "meta": "?"}))
    assert TokenDataset.open(tmp_path).vocab_size == 500 and TokenDataset.open(tmp_path).tokenizer() is None


class Calls:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize(
    "content, said",
    [
        (lambda p: pickle.dumps({"vocab_size": 5, "itos": Calls(p)}), "asks for .*open"),
        (lambda p: pickle.dumps(Path("x")), "asks for pathlib"),
        (lambda p: b"not a pickle", "is not read"),
        (lambda p: b"", "is not read"),
        (lambda p: pickle.dumps([1, 2]), "holds list"),
        (lambda p: pickle.dumps({"vocab_size": [1]}), "holds list"),
        (lambda p: pickle.dumps({"vocab_size": -3}), "no number of ids"),
        (lambda p: b"cos\nsystem\n(S'touch " + str(p).encode() + b"'\ntR.", "asks for os.system"),
    ],
)
def test_a_meta_pkl_with_anything_but_plain_values_is_refused_and_calls_nothing(tmp_path, content, said):
    nanogpts_characters(tmp_path)
    (tmp_path / "meta.pkl").write_bytes(content(tmp_path / "called"))
    with pytest.raises(DatasetError, match=said):
        TokenDataset.open(tmp_path)
    assert not (tmp_path / "called").exists()


def test_more_shards_than_files_may_be_open_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(token_dataset, "OPEN_FILES", 3)
    split = TokenDataset.open(write(tmp_path, shard_tokens=1)).split("train")
    whole = split.read(0, len(split)).tolist()
    assert len(split.files) > 5 and [int(split.read(i, i + 1)[0]) for i in reversed(range(len(split)))] == whole[::-1]
    assert len(split._open) == 3


def test_the_head_of_a_split_is_its_first_tokens(tmp_path):
    whole = TokenDataset.open(write(tmp_path))
    short = whole.shortened(5)
    assert len(short.split("train")) == 5 and len(whole.split("train")) > 5 and short.split("val") is whole.split("val")
    assert short.split("train").read(0, 5).tolist() == whole.split("train").read(0, 5).tolist()
    with pytest.raises(IndexError):
        short.split("train").read(0, 6)
    assert short.facts()["splits"]["train"] == {"tokens": 5, "bytes": None, "documents": None}
    with pytest.raises(DatasetError, match="max_train_tokens=1,000,000 asks for more than"):
        whole.shortened(10**6)


def test_a_nanogpt_folder_without_val_says_so_when_val_is_asked_for(tmp_path):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "train.bin")
    dataset = TokenDataset.open(tmp_path)
    with pytest.raises(DatasetError, match="no val split"):
        dataset.split("val")


# ------------------------------------------------------------------------------------------- what can be wrong


def truncate(folder):
    os.truncate(folder / "train.bin", 100)


def flip(folder):
    content = bytearray((folder / "val.bin").read_bytes())
    content[10] ^= 1
    (folder / "val.bin").write_bytes(content)


DAMAGES = {
    "truncated": (truncate, "train.bin has 100 bytes, but meta.json says 226"),
    "flipped bit": (flip, "val.bin is damaged"),
    "missing val": (lambda f: (f / "val.bin").unlink(), "val.bin is missing"),
    "missing train": (lambda f: (f / "train.bin").unlink(), "train.bin is missing"),
    "meta not JSON": (lambda f: (f / "meta.json").write_text("{"), "cannot be read as JSON"),
    "meta no object": (lambda f: (f / "meta.json").write_text("[]"), "not an object"),
    "meta not UTF-8": (lambda f: (f / "meta.json").write_bytes(b"\xff"), "cannot be read as JSON"),
    "unknown version": (lambda f: edit_meta(f, lambda m: m.update(format_version=99)), "format_version 99"),
    "unknown dtype": (lambda f: edit_meta(f, lambda m: m.update(dtype="int8")), "'int8'"),
    "wrong dtype": (lambda f: edit_meta(f, lambda m: m.update(dtype="uint32")), "uint32"),
    "wrong tokens": (lambda f: edit_meta(f, lambda m: m["splits"]["val"].update(tokens=1)), "val has 1 tokens"),
    "ids beyond meta": (lambda f: edit_meta(f, lambda m: m.update(vocab_size=100)), "token id 256.*meta.json has vocab_size=100"),
    "outside file": (
        lambda f: edit_meta(f, lambda m: m["splits"]["val"]["files"][0].update(name="../val.bin")),
        "not in its folder",
    ),
    "half published": (lambda f: (f / token_dataset.PUBLISHING).touch(), "half prepared"),
    **{
        f"meta lacks {key}": (lambda f, key=key: edit_meta(f, lambda m: m.pop(key)), f"lacks {key}")
        for key in ("vocab_size", "dtype", "splits", "tokenizer", "special_ids")
    },
    **{
        f"split lacks {key}": (
            lambda f, key=key: edit_meta(f, lambda m: m["splits"]["train"].pop(key)),
            rf"lacks splits\.train\.{key}",
        )
        for key in ("tokens", "bytes", "documents", "files")
    },
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_said_in_one_sentence_with_a_remedy(folder, damage):
    do, message = DAMAGES[damage]
    do(folder)
    with pytest.raises(DatasetError, match=message) as caught:
        TokenDataset.open(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert "prepare" in str(caught.value)


def test_ids_beyond_the_models_vocabulary_are_refused(folder):
    with pytest.raises(DatasetError, match="vocabulary of 257.*vocab_size=256"):
        TokenDataset.open(folder, vocab_size=256)


@pytest.mark.parametrize("content, message", [(b"", "is empty"), (b"abc", "not a whole number")])
def test_a_file_of_no_tokens_is_refused(tmp_path, content, message):
    (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        TokenDataset.open(tmp_path)


def test_large_splits_are_hashed_only_by_verify(folder, monkeypatch, capsys):
    monkeypatch.setattr(token_dataset, "FULL_CHECK_BYTES", 10)
    assert token_dataset.main(["verify", str(folder)]) == 0
    flip(folder)
    TokenDataset.open(folder)
    capsys.readouterr()
    assert token_dataset.main(["verify", str(folder)]) == 1
    assert "val.bin is damaged" in capsys.readouterr().err


def test_another_tokenizer_in_the_folder_is_refused(folder):
    CharTokenizer("xyz").save(folder)
    with pytest.raises(DatasetError, match="is not the tokenizer"):
        TokenDataset.open(folder).tokenizer()


BROKEN_TOKENIZERS = {
    "cut short": (lambda f: os.truncate(f / "tokenizer.json", 10), "is broken: .*cannot be read as JSON"),
    "no object": (lambda f: (f / "tokenizer.json").write_text("[]"), "is broken: .*not an object"),
    "of an unknown kind": (lambda f: (f / "tokenizer.json").write_text('{"kind": "morse"}'), "is broken: .*unknown kind"),
    "another one": (lambda f: CharTokenizer("xyz").save(f), "is not the tokenizer"),
    "unreadable": (lambda f: ((f / "tokenizer.json").unlink(), (f / "tokenizer.json").write_bytes(b"\xff")), "is broken"),
    "of another vocabulary": (lambda f: edit_meta(f, lambda m: m.update(vocab_size=300)), "vocabulary of 257, but .* says 300"),
}


@pytest.mark.parametrize("damage", BROKEN_TOKENIZERS)
def test_a_broken_tokenizer_is_found_before_the_training(folder, damage):
    """Issue 10.17: `check_tokenizer` is asked when a run starts; opening the dataset alone does not look at it."""
    assert TokenDataset.open(folder).check_tokenizer() is None
    do, message = BROKEN_TOKENIZERS[damage]
    do(folder)
    with pytest.raises(DatasetError, match=message) as caught:
        TokenDataset.open(folder).check_tokenizer()
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert token_dataset.main(["verify", str(folder)]) == 1


def test_a_tokenizer_that_fails_on_the_dataset_is_found_before_the_training(folder, monkeypatch):
    """Issue 10.17: the file is as it was written, but the code that reads it (a library's, say) fails on these ids."""

    class Panic(BaseException):
        """As `tokenizers` raises it."""

    def panics(self, ids):
        raise Panic("no entry found for key")

    monkeypatch.setattr(ByteTokenizer, "decode_bytes", panics)
    with pytest.raises(DatasetError, match="cannot decode and encode the dataset's first tokens .Panic: no entry"):
        TokenDataset.open(folder).check_tokenizer()


def test_an_eos_that_the_characters_cannot_spell_is_no_fault(tmp_path):
    folder = write(tmp_path / "set", CharTokenizer([chr(i) for i in range(256)], eos=True), append_eos=True)
    assert TokenDataset.open(folder).check_tokenizer() is None
    few = tmp_path / "few"
    with DatasetWriter(few, CharTokenizer("ab", eos=True), append_eos=True) as writer:
        writer.add("train", [0, 1], 2)
        writer.add("val", [0], 1)
        writer.publish()
    assert TokenDataset.open(few).check_tokenizer() is None


def test_a_tokenizer_that_this_machine_lacks_the_files_of_is_a_note(tmp_path, folder, monkeypatch):
    """Issue 10.17: a server without a network, or without the library, may train; it is told what it cannot do."""
    from data import tokenization

    def no_files(name):
        raise tokenization.TokenizerUnavailable("tiktoken cannot get the files")

    monkeypatch.setattr(tokenization, "_fetch_encoding", no_files)
    (folder / "tokenizer.json").write_text('{"kind": "gpt2"}')
    assert "cannot be used on this machine" in TokenDataset.open(folder).check_tokenizer()
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in TokenDataset.open(folder).check_tokenizer()
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "train.bin")
    assert TokenDataset.open(tmp_path).check_tokenizer() is None  # a folder of nanoGPT's


def test_a_file_that_shrinks_while_in_use_raises_instead_of_crashing(folder):
    train = TokenDataset.open(folder).split("train")
    train.read(0, 5)
    truncate(folder)
    with pytest.raises(DatasetError, match="became shorter"):
        train.read(0, 5)


def test_a_running_reader_keeps_the_old_dataset_when_it_is_prepared_again(folder):
    train = TokenDataset.open(folder).split("train")
    before = train.read(0, len(train))
    with DatasetWriter(folder, ByteTokenizer(), overwrite=True) as writer:
        writer.add("train", [1], 1)
        writer.add("val", [1], 1)
        writer.publish()
    assert np.array_equal(train.read(0, len(train)), before)


def test_info_prints_sizes(folder, capsys):
    assert token_dataset.main(["info", str(folder)]) == 0
    assert "113 tokens, 110 bytes, 3 documents" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- names and commands


def test_a_missing_dataset_names_the_command_that_makes_it(tmp_path, monkeypatch):
    with pytest.raises(DatasetError, match="no folder.*python data/textfile/prepare.py FILE --name=nowhere_at_all"):
        TokenDataset.open("nowhere_at_all")
    with pytest.raises(DatasetError, match="python data/textfile/prepare.py FILE --out="):
        TokenDataset.open(tmp_path / "missing")
    monkeypatch.setattr(token_dataset, "DATA_DIR", tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "prepare.py").touch()
    with pytest.raises(DatasetError, match="no train.bin.*Prepare it with: python data/own/prepare.py"):
        TokenDataset.open("own")


def test_names_resolve_to_data_and_paths_to_themselves(tmp_path, monkeypatch):
    assert resolve_dataset("pydocs") == DATA_DIR / "pydocs"
    assert resolve_dataset(str(tmp_path)) == tmp_path
    assert str(resolve_dataset("~/x")) == os.path.expanduser("~/x")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert resolve_dataset("here").resolve() == tmp_path / "here"
    with pytest.raises(DatasetError, match="empty"):
        resolve_dataset("")
