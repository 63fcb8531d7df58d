"""Every tokenizer turns any text into ids and back, alike after a save, and one id at a time."""

import sys

import pytest

from data import tokenization
from data.tokenization import (
    ByteTokenizer,
    CharTokenizer,
    Gpt2Tokenizer,
    HuggingFaceTokenizer,
    StreamDecoder,
    Tokenizer,
    load_tokenizer,
)

NASTY = [
    "",
    " ",
    "\n\n\t  x \r\n",
    "plain words, 1234 and punctuation!?",
    "Straße naïve Ωμέγα",
    "日本語のテキスト",
    "👩‍👩‍👧‍👦🏳️‍🌈",
    "e\u0301 versus \u00e9",
    "\ufeffmark \u200b\u200d\u2028",
    "\x00\x01\x7f",
    "שלום مرحبا",
    "a<|endoftext|>b",
    "\N{REPLACEMENT CHARACTER}",
    "\U0010ffff",
]
TRAINING = ["the cat sat on the mat and the dog sat on the log. " * 20, "Straße, 日本語, 👩‍👩‍👧‍👦 and the cat. " * 5]


def sentencepiece_like(folder):
    """A Hugging Face tokenizer that is not byte-level: word marks and byte fallback, as Llama's, with an </s>."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abcdefghijklmnopqrstuvwxyz.,", "th", "the", "▁the"]
    backend = Backend(
        models.BPE(
            vocab={token: i for i, token in enumerate(vocab)},
            unk_token="<unk>",
            merges=[("t", "h"), ("th", "e"), ("▁", "the")],
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    return HuggingFaceTokenizer.from_pretrained(folder)


@pytest.fixture(params=["char", "byte", "bpe", "hf byte-level", "hf sentencepiece"])
def tokenizer(request, tmp_path):
    if request.param == "char":
        return CharTokenizer.from_texts(NASTY + TRAINING, eos=True)
    if request.param == "byte":
        return ByteTokenizer(eos=True)
    if request.param == "hf sentencepiece":
        return sentencepiece_like(tmp_path / "sp")
    trained = HuggingFaceTokenizer.train(TRAINING, 400)
    if request.param == "bpe":
        return trained
    (tmp_path / "hub").mkdir()
    trained._backend.save(str(tmp_path / "hub" / "tokenizer.json"))
    return HuggingFaceTokenizer.from_pretrained(tmp_path / "hub")


def test_decode_inverts_encode_on_nasty_unicode(tokenizer):
    for text in NASTY + TRAINING:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert all(0 <= token < tokenizer.vocab_size for token in ids)


def test_text_never_becomes_a_special_id(tokenizer):
    eos = tokenizer.decode([tokenizer.eos_id])
    assert eos in ("<|endoftext|>", "</s>")
    assert tokenizer.eos_id not in tokenizer.encode(f"a{eos}b")


def test_a_batch_is_encoded_like_its_texts(tokenizer):
    assert tokenizer.encode_batch(NASTY) == [tokenizer.encode(text) for text in NASTY]
    assert tokenizer.encode_batch([]) == []


def test_saved_and_loaded_tokenizers_are_the_same(tokenizer, tmp_path):
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    for attribute in ("kind", "vocab_size", "eos_id", "fingerprint", "name", "byte_level"):
        assert getattr(loaded, attribute) == getattr(tokenizer, attribute), attribute
    assert loaded.encode_batch(NASTY) == tokenizer.encode_batch(NASTY)


def test_streamed_text_is_the_decoded_text_and_never_half_a_character(tokenizer):
    for text in NASTY + ["the cat, the 👩‍👩‍👧‍👦 the"]:
        if "\N{REPLACEMENT CHARACTER}" in text or tokenizer.kind == "char" and set(text) - set(tokenizer.characters):
            continue
        ids = tokenizer.encode(text)
        stream = StreamDecoder(tokenizer)
        pieces = [stream.push(token) for token in ids]
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
        assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


def test_streaming_survives_bytes_that_are_no_text():
    tokenizer, stream = ByteTokenizer(), StreamDecoder(ByteTokenizer())
    ids = [0x61, 0xF0, 0x9F, 0x62, 0xFF, 0x63, 0xE2, 0x82]
    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)
    assert stream.flush() == ""


# ------------------------------------------------------------------------------------------- each kind


def test_char_vocabulary_is_the_sorted_characters_and_eos_comes_last():
    tokenizer = CharTokenizer.from_texts(["banana", "cab"], eos=True)
    assert tokenizer.characters == ["a", "b", "c", "n"] and (tokenizer.vocab_size, tokenizer.eos_id) == (5, 4)
    assert tokenizer.encode("nab") == [3, 0, 1]
    assert CharTokenizer("abc").eos_id is None and CharTokenizer("abc").vocab_size == 3


def test_unknown_characters_are_named():
    with pytest.raises(ValueError, match="has no 'X', 'é'.*--tokenizer=bpe"):
        CharTokenizer("abc").encode("aXbéX")


def test_byte_ids_are_the_bytes():
    assert ByteTokenizer().encode("é") == [0xC3, 0xA9] and ByteTokenizer().vocab_size == 256


def test_bpe_training_is_deterministic_and_of_the_size_asked_for():
    first, second = HuggingFaceTokenizer.train(TRAINING, 300), HuggingFaceTokenizer.train(iter(TRAINING), 300)
    assert first.fingerprint == second.fingerprint and first.vocab_size == 300
    assert first.fingerprint != HuggingFaceTokenizer.train(TRAINING, 290).fingerprint
    assert len(first.encode(TRAINING[0])) < len(TRAINING[0]) / 3


def test_bpe_knows_bytes_it_never_saw():
    tokenizer = HuggingFaceTokenizer.train(["a"], 300)
    assert tokenizer.vocab_size == 257 and tokenizer.decode(tokenizer.encode("Ж🙂")) == "Ж🙂"


def test_a_vocabulary_too_small_for_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size=256 is too small.*257"):
        HuggingFaceTokenizer.train(TRAINING, 256)


def test_byte_spelling_is_that_of_the_tokenizers_library():
    from tokenizers import pre_tokenizers

    spelling = tokenization._byte_spelling()
    assert sorted(spelling) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(spelling.values()) == list(range(256))


def test_gpt2_without_its_files_names_the_remedies(monkeypatch, tmp_path):
    tiktoken = pytest.importorskip("tiktoken")

    def no_network(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(ValueError, match="TIKTOKEN_CACHE_DIR.*--tokenizer=bpe"):
        Gpt2Tokenizer()


def test_gpt2_ids_when_its_files_are_there():
    try:
        tokenizer = Gpt2Tokenizer()
    except ValueError:
        pytest.skip("the files of the GPT-2 tokenizer are not here")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (50257, 50256)
    assert tokenizer.encode("Hello world") == [15496, 995]  # published ids
    for text in NASTY:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert 50256 not in tokenizer.encode("<|endoftext|>") and tokenizer.decode([50256]) == "<|endoftext|>"


def test_a_missing_library_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="pip install tokenizers"):
        HuggingFaceTokenizer.train(TRAINING, 300)


def test_eos_comes_from_the_tokenizers_own_config(tmp_path):
    tokenizer = sentencepiece_like(tmp_path / "sp")
    assert tokenizer.eos_id == 2 and tokenizer.kind == "hf" and tokenizer.name == "sp"
    (tmp_path / "sp" / "tokenizer_config.json").write_text('{"eos_token": {"content": "<s>"}}')
    assert HuggingFaceTokenizer.from_pretrained(tmp_path / "sp").eos_id == 1


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "cannot be read as JSON"),
        ("[]", "not an object"),
        ('{"kind": "morse"}', "unknown kind 'morse'"),
        ('{"kind": "char"}', "incomplete"),
        ('{"model": 1}', "not a Hugging Face tokenizer"),
    ],
)
def test_a_bad_tokenizer_file_is_refused(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_no_tokenizer_is_none(tmp_path):
    assert load_tokenizer(tmp_path) is None


def test_every_kind_has_the_whole_interface(tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.kind in ("char", "byte", "bpe", "gpt2", "hf") and isinstance(tokenizer.name, str)
    assert isinstance(tokenizer.fingerprint, str) and len(tokenizer.fingerprint) == 16
