"""Every tokenizer turns any text into ids and back, alike after a save, and one id at a time."""

import json
import random
import sys

import pytest

from data import tokenization
from data.token_dataset import DatasetError
from data.tokenization import (
    ByteTokenizer,
    CharTokenizer,
    HuggingFaceTokenizer,
    StreamDecoder,
    TiktokenTokenizer,
    Tokenizer,
    given_tokenizer,
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


def tiktoken_like(name):
    """tiktoken's encoding of this name, its own pattern and special ids, with a small vocabulary in place of the real one."""
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken_ext import openai_public

    texts = " ".join([*TRAINING, *NASTY, "it's we'll 1234567 I'LL http://x.y//\n\n\n  a \r\n"] * 3)
    backend = HuggingFaceTokenizer.train([texts], 700)._backend
    byte_of = tokenization._byte_spelling()
    vocabulary = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    words = [bytes(byte_of[c] for c in token) for token, _ in vocabulary if token != "<|endoftext|>"]
    ranks = {word: i for i, word in enumerate(sorted(words, key=len))}
    with pytest.MonkeyPatch.context() as patch:
        for loader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
            patch.setattr(openai_public, loader, lambda *_, **__: ranks)
        described = openai_public.ENCODING_CONSTRUCTORS[name]()
    described.pop("explicit_n_vocab", None)
    return TiktokenTokenizer(name, tiktoken.Encoding(**described))


@pytest.fixture(params=["char", "byte", "bpe", "hf byte-level", "hf sentencepiece", *tokenization.TIKTOKEN_PATTERNS])
def tokenizer(request, tmp_path):
    if request.param in tokenization.TIKTOKEN_PATTERNS:
        return tiktoken_like(request.param)
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
    assert [tokenizer.encode_array(text).tolist() for text in NASTY] == [tokenizer.encode(text) for text in NASTY]


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


@pytest.mark.parametrize("name", tokenization.TIKTOKEN_PATTERNS)
def test_a_tiktoken_encoding_is_saved_whole_and_in_a_form_that_transformers_reads(name, tmp_path):
    """Ids are those of tiktoken's own pattern and merging on words, numbers, spaces and breaks of all kinds, whether the saved
    file is read here (without tiktoken's files), by the tokenizers library, or by transformers."""
    tokenizer = tiktoken_like(name)
    tokenizer.save(tmp_path)
    readers = [load_tokenizer(tmp_path).encode, HuggingFaceTokenizer.from_pretrained(tmp_path).encode]
    try:
        from transformers import AutoTokenizer

        readers.append(AutoTokenizer.from_pretrained(tmp_path).encode)
    except ImportError:
        pass
    drawn, words = random.Random(1), [" it's", " we'LL", "the cat", "\r\n", "  ", "\N{MAN}\u200d\N{GIRL}"]
    alphabet = [*"aZéßЖ日01٣'’ \n\r\t.,!?/\u00a0\u2028\u0301", *words]
    texts = NASTY + TRAINING + ["".join(drawn.choices(alphabet, k=40)) for _ in range(300)]
    for text in texts:
        expected = tokenizer.encode(text)
        assert tokenizer.decode(expected) == text
        if "<|endoftext|>" not in text:  # which transformers takes for the special id
            assert [read(text) for read in readers] == [expected] * len(readers), repr(text)


@pytest.mark.parametrize(
    "name, size, eos", [("gpt2", 50257, 50256), ("cl100k_base", 100277, 100257), ("o200k_base", 200019, 199999)]
)
def test_the_special_ids_of_tiktoken_are_in_the_vocabulary(name, size, eos, tmp_path):
    tokenizer = tiktoken_like(name)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (size, eos)
    assert (tokenizer.decode([eos]), tokenizer.bos_id) == ("<|endoftext|>", None)
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.vocab_size, loaded.eos_id, loaded.decode([eos])) == (size, eos, "<|endoftext|>")


def test_a_saved_encoding_that_was_changed_is_refused(tmp_path):
    tiktoken_like("gpt2").save(tmp_path)
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    definition["model"]["vocab"]["!"], definition["model"]["vocab"]["a"] = 64, 0
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(ValueError, match="not as it was written"):
        load_tokenizer(tmp_path)


def test_gpt2_without_its_files_names_the_remedies(monkeypatch, tmp_path):
    tiktoken = pytest.importorskip("tiktoken")

    def no_network(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(ValueError, match="TIKTOKEN_CACHE_DIR.*--tokenizer=bpe"):
        TiktokenTokenizer("gpt2")


def test_gpt2_ids_when_its_files_are_there(tmp_path):
    try:
        tokenizer = TiktokenTokenizer("gpt2")
    except ValueError:
        pytest.skip("the files of the GPT-2 tokenizer are not here")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (50257, 50256)
    assert tokenizer.encode("Hello world") == [15496, 995]  # published ids
    for text in NASTY:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert 50256 not in tokenizer.encode("<|endoftext|>") and tokenizer.decode([50256]) == "<|endoftext|>"
    (tmp_path / "tokenizer.json").write_text('{"kind": "gpt2"}')  # as earlier versions saved it
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).encode_batch(NASTY + TRAINING) == tokenizer.encode_batch(NASTY + TRAINING)


def test_a_saved_encoding_needs_no_files_of_tiktokens(tmp_path, monkeypatch):
    tiktoken_like("gpt2").save(tmp_path)
    monkeypatch.setattr(tokenization, "_fetch_encoding", lambda name: pytest.fail("asked for the files"))
    assert load_tokenizer(tmp_path).decode(load_tokenizer(tmp_path).encode("the cat")) == "the cat"


def test_a_missing_library_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="pip install tokenizers"):
        HuggingFaceTokenizer.train(TRAINING, 300)


def test_eos_comes_from_the_tokenizers_own_config(tmp_path):
    tokenizer = sentencepiece_like(tmp_path / "sp")
    assert tokenizer.eos_id == 2 and tokenizer.kind == "hf" and tokenizer.name == "sp"
    (tmp_path / "sp" / "tokenizer_config.json").write_text('{"eos_token": {"content": "<s>"}}')
    assert HuggingFaceTokenizer.from_pretrained(tmp_path / "sp").eos_id == 1


BOS_CONFIGS = {
    "nothing": {},
    "a name": {"bos_token": "<s>", "eos_token": "</s>"},
    "added": {"bos_token": {"__type": "AddedToken", "content": "<s>"}, "eos_token": "</s>", "add_bos_token": True},
    "not added": {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False},
}


@pytest.mark.parametrize("template", [None, "<s> $A", "<s> $A </s>", "$A </s>"])
@pytest.mark.parametrize("config", BOS_CONFIGS)
def test_bos_is_what_transformers_puts_before_a_text(tmp_path, template, config):
    """Issue 10.17: the id that Hugging Face's own class begins a text with; the same after a save, and for the saved folder."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import processors

    folder = tmp_path / "sp"
    backend = sentencepiece_like(folder)._backend
    if template:
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    backend.encode_special_tokens = False
    backend.save(str(folder / "tokenizer.json"))
    written = {"tokenizer_class": "PreTrainedTokenizerFast", **BOS_CONFIGS[config]}
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    expected = transformers.AutoTokenizer.from_pretrained(folder).encode("the cat")
    tokenizer = HuggingFaceTokenizer.from_pretrained(folder)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    plain = tokenizer.encode("the cat")
    assert 1 not in plain and (bos + plain == expected or bos + plain + [2] == expected)
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert (loaded.bos_id, loaded.fingerprint) == (tokenizer.bos_id, tokenizer.fingerprint)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "saved").encode("the cat")[: len(bos + plain)] == bos + plain


def test_a_tokenizer_saved_before_bos_was_known_has_none(tmp_path):
    """The datasets of earlier versions have no BOS, so neither have the prompts of models trained on them."""
    from tokenizers import processors

    backend = sentencepiece_like(tmp_path / "sp")._backend
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(tmp_path / "sp" / "tokenizer.json"))
    assert HuggingFaceTokenizer.from_pretrained(tmp_path / "sp").bos_id == 1
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "kitbash_kind": "hf", "kitbash_name": "sp"}
    (tmp_path / "sp" / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path / "sp").bos_id is None


# ------------------------------------------------------------------------------------------- names on the Hub


def hub_error(name, status=None):
    """An error as huggingface_hub raises it."""
    errors = pytest.importorskip("huggingface_hub").errors
    error = getattr(errors, name).__new__(getattr(errors, name))
    error.args = ("Some reason.",)
    if status:
        error.response = type("Response", (), {"status_code": status})()
    return error


@pytest.mark.parametrize(
    "error, status, message",
    [
        ("GatedRepoError", 403, "it is gated; accept its licence at https://huggingface.co/meta/llama.*Alternatives: .*gpt2"),
        ("RepositoryNotFoundError", 404, "no such repository on the Hub, or it is private.*Alternatives"),
        ("LocalEntryNotFoundError", None, "cannot be reached from here.*Alternatives: .*HF_ENDPOINT.*local folder"),
        ("OfflineModeIsEnabled", None, "cannot be reached from here.*Alternatives"),
        ("RemoteEntryNotFoundError", 404, "has no tokenizer.json.*save_pretrained.FOLDER."),
    ],
)
def test_a_tokenizer_that_cannot_be_fetched_says_why_and_what_else_there_is(monkeypatch, error, status, message):
    hub = pytest.importorskip("huggingface_hub")

    def refuse(*_, **__):
        raise hub_error(error, status)

    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    with pytest.raises(DatasetError, match=message) as caught:
        given_tokenizer("meta/llama")
    assert "\n" not in str(caught.value) and "meta/llama" in str(caught.value)


def test_a_name_on_the_hub_is_the_tokenizer_of_that_repository(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    sentencepiece_like(tmp_path / "sp")

    def fetch(name, file):
        assert name == "owner/model"
        if not (tmp_path / "sp" / file).exists():
            raise hub_error("RemoteEntryNotFoundError", 404)  # the config is not needed
        return str(tmp_path / "sp" / file)

    monkeypatch.setattr(hub, "hf_hub_download", fetch)
    tokenizer = given_tokenizer("owner/model")
    assert tokenizer.name == "owner/model" and tokenizer.eos_id == 2
    assert tokenizer.fingerprint == given_tokenizer(str(tmp_path / "sp")).fingerprint


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
    assert tokenizer.kind in ("char", "byte", "bpe", "gpt2", "tiktoken", "hf") and isinstance(tokenizer.name, str)
    assert isinstance(tokenizer.fingerprint, str) and len(tokenizer.fingerprint) == 16
