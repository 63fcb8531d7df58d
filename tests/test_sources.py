"""Files of texts: every format gives its documents, from any place, in little memory; what is wrong is named with its place."""

import json
import random
import re
import sys

import pytest

from data import sources
from data.sources import Documents, Splits, TextFiles, find_cut, find_text_files
from data.tokenization import ByteTokenizer, HuggingFaceTokenizer

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def texts(*paths, text_key="text"):
    return [piece.text for piece in TextFiles(find_text_files(paths), text_key).read()]


def pack(path, content: bytes):
    """Write .zst in two frames, as pzstd and concatenation do."""
    with open(path, "wb") as file:
        for part in (content[: len(content) // 2], content[len(content) // 2 :]):
            sink = pyarrow.BufferOutputStream()
            with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
                stream.write(part)
            file.write(sink.getvalue())


@pytest.fixture
def folder(tmp_path):
    """A folder with a file of each format, 3 to 30 documents each."""
    (tmp_path / "a.txt").write_text("\ufeffone Ω " + "many words, " * 60 + "\nend\n", encoding="utf-8")
    lines = [json.dumps({"text": f"line {i}\r\n"}) + "\n" * (1 + (i % 3 == 0)) for i in range(30)]
    (tmp_path / "b.jsonl").write_text("".join(lines))
    pack(tmp_path / "c.jsonl.zst", "".join(json.dumps({"text": f"packed {i} é"}) + "\n" for i in range(20)).encode())
    rows = "".join(f'{i},"row {i}, ""quoted""\nand\u2028on",x\r\n' for i in range(7))
    (tmp_path / "d.csv").write_text("\ufeffid,text,more\r\n" + rows, encoding="utf-8", newline="")
    table = pyarrow.table({"text": [f"parquet {i}" if i % 4 else None for i in range(25)], "n": list(range(25))})
    parquet.write_table(table, tmp_path / "e.parquet", row_group_size=10)
    return tmp_path


def test_each_format_gives_its_documents(folder):
    assert texts(folder / "a.txt") == ["one Ω " + "many words, " * 60 + "\nend\n"]
    assert texts(folder / "b.jsonl") == [f"line {i}\r\n" for i in range(30)]
    assert texts(folder / "c.jsonl.zst") == [f"packed {i} é" for i in range(20)]
    assert texts(folder / "d.csv") == [f'row {i}, "quoted"\nand\u2028on' for i in range(7)]
    assert texts(folder / "e.parquet") == [f"parquet {i}" for i in range(25) if i % 4]
    (folder / "ignored.md").write_text("x")
    assert len(texts(folder)) == 1 + 30 + 20 + 7 + 18
    assert texts(folder / "*.jsonl", folder / "a.txt", folder / "a.txt") == texts(folder / "b.jsonl") + texts(folder / "a.txt")


@pytest.mark.parametrize("piece", [1_000_000, 50])
def test_reading_goes_on_from_any_place(folder, monkeypatch, piece):
    """What is left after each document is what a reader from that position, by way of JSON, gives."""
    monkeypatch.setattr(sources, "PIECE_CHARACTERS", piece)
    monkeypatch.setattr(sources, "BLOCK_BYTES", 64)
    monkeypatch.setattr(sources, "PARQUET_ROWS", 3)
    source = TextFiles(find_text_files([folder]))
    whole, reader = list(source.read()), source.read()
    shares = []
    for done, given in enumerate(reader, 1):
        assert given == whole[done - 1]
        shares.append(reader.share())
        position = json.loads(json.dumps(reader.position()))
        assert list(source.read(position)) == whole[done:], position
    assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] > 0.97
    if piece == 50:
        parts = [piece for piece in whole if piece.text in "one Ω " + "many words, " * 60 + "\nend\n"]
        assert len(parts) > 10 and parts[0].begins and parts[-1].ends and not any(part.ends for part in parts[:-1])


def test_line_ends_and_all_other_characters_are_kept(tmp_path, monkeypatch):
    """Issue 10.17: every byte of a text is read, carriage returns as well."""
    monkeypatch.setattr(sources, "BLOCK_BYTES", 7)  # in the middle of characters
    text = "one\r\ntwo\rthree\n\r\nfour\r\n 👩‍👩‍👧 e\u0301 \x1c\x85\u2028 " * 9
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert texts(tmp_path / "a.txt") == [text]
    monkeypatch.setattr(sources, "PIECE_CHARACTERS", 40)
    pieces = texts(tmp_path / "a.txt")
    assert len(pieces) > 5 and "".join(pieces) == text


def test_a_text_is_cut_only_where_its_ids_stay_the_same():
    """At every place that `find_cut` allows in random texts, for the word patterns of GPT-2, GPT-4 and GPT-4o."""
    from test_tokenization import tiktoken_like

    coders = [tiktoken_like(name) for name in ("gpt2", "cl100k_base", "o200k_base")] + [ByteTokenizer()]
    coders.append(HuggingFaceTokenizer.train(["the cat, it's 12 345.\n\n on\r\n the mat"] * 5, 300))
    assert all(coder.cuttable for coder in coders)
    drawn = random.Random(3)
    alphabet = [*"aBé日9½٣.,'’!/_ \n\r\t\u00a0\u2028\u0301\x1c\x85", "'s", "'LL", "  ", "\n\n", "\r\n", "12345", " the", "!\n"]
    places = 0
    for _ in range(150):
        text = "".join(drawn.choices(alphabet, k=25))
        cuts = [cut for cut in range(1, len(text)) if find_cut(text, cut) == cut]
        places += len(cuts)
        for coder in coders:
            whole = coder.encode(text)
            for cut in cuts:
                assert coder.encode(text[:cut]) + coder.encode(text[cut:]) == whole, (text, cut)
    assert places > 300
    assert find_cut("nowhere", 1) == -1 and find_cut("ab cd ef", 4) == 5


def test_a_tokenizer_that_does_not_allow_cuts_is_found_out(tmp_path):
    from test_tokenization import sentencepiece_like
    from tokenizers import pre_tokenizers, trainers

    assert not sentencepiece_like(tmp_path / "sp").cuttable
    joined = HuggingFaceTokenizer.train(["a b a b a b"] * 20, 300)._backend
    joined.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # words may hold spaces
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    joined.train_from_iterator(
        ["It's 1 a.b  two,\n three"] * 20,
        trainers.BpeTrainer(vocab_size=300, show_progress=False, initial_alphabet=alphabet),
    )
    assert not HuggingFaceTokenizer(joined, kind="hf", name="x", eos_id=None).cuttable


def test_a_large_file_is_read_in_little_memory(tmp_path, run_python):
    line = "Once upon a time there was a little cat. " * 250 + "\n"
    with open(tmp_path / "big.txt", "w") as file:
        for _ in range(6000):
            file.write(line)
    size = (tmp_path / "big.txt").stat().st_size
    code = f"""
import resource, sys
sys.path.insert(0, {str(sources.Path(sources.__file__).parents[1])!r})
from pathlib import Path
from data.sources import TextFiles
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(sum(len(piece.text) for piece in TextFiles([Path("big.txt")]).read()))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    characters, more = map(int, run_python("-c", code, cwd=tmp_path).stdout.split())
    assert characters == size > 60e6
    assert more * (1 if sys.platform == "darwin" else 1024) < 40e6


def test_sources_say_what_they_are(folder):
    files = find_text_files([folder])
    source = TextFiles(files)
    assert source.description == "a.txt, b.jsonl, c.jsonl.zst, d.csv, e.parquet" and source.several is True
    assert TextFiles(files[:1]).several is False and TextFiles(files[1:2]).several is None
    identity, facts = source.identity(), source.facts()
    assert identity == json.loads(json.dumps(TextFiles(files).identity())) != TextFiles(files, "n").identity()
    import os

    os.utime(files[0], (1, 1))
    assert TextFiles(files).identity() != identity and TextFiles(files).facts() == facts
    files[0].write_text("shorter")
    assert TextFiles(files).facts() != facts and TextFiles(files).changed() == files[0].stat().st_mtime


def test_splits_are_read_one_after_the_other_and_name_themselves(folder):
    source = Splits({"train": TextFiles([folder / "b.jsonl"]), "val": TextFiles([folder / "c.jsonl.zst"])})
    whole, reader = list(source.read()), source.read()
    assert [piece.split for piece in whole] == ["train"] * 30 + ["val"] * 20
    for done, _ in enumerate(reader, 1):
        assert list(source.read(json.loads(json.dumps(reader.position())))) == whole[done:]


def test_documents_in_memory_are_skipped_to_go_on():
    source = Documents(lambda: iter([("a", "one"), ("b", "two"), ("c", "three")]), "three", "numbers")
    reader = source.read()
    next(iter(reader))
    assert [piece.text for piece in source.read(reader.position())] == ["two", "three"]
    assert source.identity() == {"documents": "numbers", "description": "three"}
    assert Documents(lambda: iter([]), "of unknown origin").identity() is None


def test_samples_are_spread_over_the_source(tmp_path):
    for name in "abcd":
        lines = [json.dumps({"text": f"{name} {i} " + "x" * 200}) for i in range(3000)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    readers = TextFiles(find_text_files([tmp_path])).samples(8)
    firsts = [next(iter(reader)).text.split()[:2] for reader in readers]
    assert [name for name, _ in firsts] == list("aabbccdd")
    for number, (_, i) in enumerate(firsts):
        assert abs(int(i) - (750, 2250)[number % 2]) < 30


# ------------------------------------------------------------------------------------------- what can be wrong


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "\xff"}\n', r"a\.jsonl, line 3 is not JSON"),
        ("a.jsonl", b'["x"]\n', "line 1 is no JSON object"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', r"line 1 has no field 'text' \(it has: body, id\).*--text_key"),
        ("a.jsonl", b'{"text": null}\n', "holds no text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 5}\n', "line 2: the field 'text' is int, not a string"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: .*surrogate"),
        ("a.jsonl", b"[" * 100_000 + b"\n", "line 1 is n"),
        ("a.jsonl", b"\n", "holds no text"),
        ("a.jsonl", b"", "holds no text"),
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\t \n", "holds no text"),
        ("a.txt", b"good \xff\n", "not UTF-8 text .byte 5"),
        ("a.txt", b"good \xe6\x97", "not UTF-8 text .byte 5"),
        ("a.txt", "text".encode("utf-16"), "not UTF-8 text .byte 0.*iconv -f UTF-16"),
        ("a.txt", b"text\0more", "zero bytes"),
        ("a.jsonl.zst", b"not packed", "cannot be read beyond line 0"),
        ("a.parquet", b"PAR1 but not really", "cannot be read as parquet"),
        ("a.md", b"\xff\xfe", "not UTF-8 text"),
        ("a.csv", b"", r"no column 'text' \(it has: none\)"),
        ("a.csv", b"id,body\n1,x\n", r"no column 'text' \(it has: id, body\).*--text_key"),
        ("a.csv", b'text\n"open', "line 2 is not CSV"),
        ("a.csv", b"id,text\n1\n", "line 2 has no column 'text'"),
        ("a.csv", b"text\n\xff\n", "not UTF-8"),
    ],
)
def test_bad_files_are_named_with_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        texts(tmp_path / name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_a_source_that_ends_in_mid_stream_is_named_with_the_place(folder):
    for name, message in (("c.jsonl.zst", "beyond line"), ("e.parquet", "truncated")):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-20])
        with pytest.raises(ValueError, match=rf"{re.escape(name)} cannot be read.*{message}"):
            texts(folder / name)


def test_a_line_or_word_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LONGEST_LINE", 5000)
    monkeypatch.setattr(sources, "LONGEST_WORD", 5000)
    monkeypatch.setattr(sources, "PIECE_CHARACTERS", 1000)
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1024)
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": "' + "y" * 20_000 + '"}\n')
    with pytest.raises(ValueError, match="line 2 has more than 5,000 bytes"):
        texts(tmp_path / "a.jsonl")
    (tmp_path / "a.txt").write_text("words " * 300 + "z" * 20_000 + " words")
    with pytest.raises(ValueError, match="no space or line break in .* characters from byte 1,"):
        texts(tmp_path / "a.txt")


def test_a_missing_or_wrong_parquet_column_names_those_there(tmp_path):
    parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"no column 'text' \(it has: body, n\)"):
        texts(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="column 'n' is int64"):
        texts(tmp_path / "a.parquet", text_key="n")


def test_the_text_field_can_be_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "words", "text": 5}\n')
    assert texts(tmp_path / "a.jsonl", text_key="content") == ["words"]


def test_missing_files_and_empty_folders_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no file .*nowhere"):
        find_text_files([tmp_path / "nowhere.txt"])
    with pytest.raises(ValueError, match="has no .txt"):
        find_text_files([tmp_path])
