"""Tokenizers behind one small interface, whatever they are made of.

| kind     | vocabulary                                                        | needs        |
|----------|-------------------------------------------------------------------|--------------|
| char     | the characters of a text, sorted                                  | nothing      |
| byte     | the 256 bytes                                                     | nothing      |
| bpe      | byte-level BPE trained on the spot, `<|endoftext|>` included       | `tokenizers` |
| gpt2     | GPT-2's 50,257                                                    | `tiktoken`   |
| tiktoken | GPT-4's cl100k_base (100,277), GPT-4o's o200k_base (200,019)       | `tiktoken`   |
| hf       | any Hugging Face tokenizer: a folder, its tokenizer.json, a name  | `tokenizers` |

Each has `kind`, `name`, `vocab_size` (special ids included), `eos_id` and `bos_id` (or None), `fingerprint`, `encode`,
`encode_batch`, `encode_array`, `decode`, `decode_bytes`, `save(folder)`; `load_tokenizer(folder)` reads what `save` wrote,
and needs neither a network nor a cache. Text is always ordinary text: the characters `<|endoftext|>` in a document never
become the eos id. `byte_level` says that ids stand for bytes one after another, so that `decode_bytes` of parts can be
joined. `bos_id` is an id that the tokenizer itself puts before every text, as Llama's does.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from command_line import Failure, Mandatory, check_shape, parse_json
from data.sources import find_cut

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"  # Hugging Face's name for what tokenizer.json has no room for
# What well-known tokenizers call the end of a document; asked only where tokenizer_config.json does not say.
EOS_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>")
# How tiktoken's encodings cut a text into words before they merge bytes, in the form that was published.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TIKTOKEN_PATTERNS = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    "cl100k_base": r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"""
    r"""\s*[\r\n]+|\s+(?!\S)|\s+""",
    "o200k_base": rf"""[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"""
    rf"""[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"""
    r"""\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
}


BUILT_IN = ("bpe", "char", "byte", *TIKTOKEN_PATTERNS)


class TokenizerError(Failure, ValueError):
    """A tokenizer's files are damaged, or are not a tokenizer's; the message says which and what to do."""


class TokenizerUnavailable(TokenizerError):
    """A tokenizer that is in order cannot be used on this machine: a library or the files that it needs are not here."""


class Tokenizer:
    """What all kinds share. A subclass gives `encode`, `decode_bytes` and `definition`, or overrides more."""

    kind: str
    name: str
    vocab_size: int
    eos_id: int | None = None
    bos_id: int | None = None
    byte_level = True

    def encode(self, text: str) -> list[int]:
        """Token ids of ordinary text."""
        raise NotImplementedError

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores where the library can."""
        return [self.encode(text) for text in texts]

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` as an array of integers, (tokens,), on one core and without a Python number for each token where it can."""
        return np.array(self.encode(text), dtype=np.uint32)

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_array` of each text, on all cores where the library can."""
        return [self.encode_array(text) for text in texts]

    @property
    def cuttable(self) -> bool:
        """Whether a text may be cut where `data.sources.find_cut` says: the ids of its parts are then those of the whole."""
        return self.byte_level

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that ids stand for; they may end inside a character."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD. The eos id reads as its name."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def definition(self) -> dict:
        """Everything that decides which ids a text gets, as JSON."""
        raise NotImplementedError

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the definition: two tokenizers with the same one give every text the same ids."""
        return hashlib.sha256(json.dumps(self.definition(), sort_keys=True).encode()).hexdigest()[:16]

    def save(self, folder: str | os.PathLike) -> None:
        """Write tokenizer.json, from which `load_tokenizer` makes this tokenizer again."""
        path = Path(folder) / TOKENIZER_FILE
        path.write_text(json.dumps(self.definition(), ensure_ascii=False) + "\n", encoding="utf-8")


class CharTokenizer(Tokenizer):
    """One id a character, in sorted order; the eos id, where there is one, comes last."""

    kind = name = "char"

    def __init__(self, characters: Sequence[str], eos: bool = False):
        self.characters = list(characters)
        self._ids = {character: i for i, character in enumerate(self.characters)}
        self._pieces = [character.encode() for character in self.characters] + [END_OF_TEXT.encode()] * eos
        self.eos_id = len(self.characters) if eos else None
        self.vocab_size = len(self._pieces)

    @classmethod
    def from_texts(cls, texts: Iterable[str], eos: bool = False) -> CharTokenizer:
        """The characters that occur in the texts."""
        characters: set[str] = set()
        for text in texts:
            characters.update(text)
        return cls(sorted(characters), eos)

    def encode(self, text: str) -> list[int]:
        try:
            return [self._ids[character] for character in text]
        except KeyError:
            unknown = sorted(set(text) - self._ids.keys())
            shown = ", ".join(repr(character) for character in unknown[:10]) + (", …" if len(unknown) > 10 else "")
            raise ValueError(
                f"The character vocabulary of {len(self.characters)} has no {shown}; leave these "
                f"characters out, or use a dataset prepared with --tokenizer=bpe or byte, which know "
                "every text."
            ) from None

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join([self._pieces[i] for i in ids])

    def definition(self) -> dict:
        return {"kind": "char", "characters": "".join(self.characters), "eos": self.eos_id is not None}


class ByteTokenizer(Tokenizer):
    """One id a byte of UTF-8; 256 is the eos id, where there is one."""

    kind = name = "byte"

    def __init__(self, eos: bool = False):
        self.eos_id = 256 if eos else None
        self.vocab_size = 256 + eos
        self._pieces = [bytes([i]) for i in range(256)] + [END_OF_TEXT.encode()] * eos

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join([self._pieces[i] for i in ids])

    def definition(self) -> dict:
        return {"kind": "byte", "eos": self.eos_id is not None}


class TiktokenTokenizer(Tokenizer):
    """An encoding of the tiktoken library, which fetches its files on first use and caches them.

    A saved one has all it needs, in Hugging Face's form, which `transformers` and `tokenizers` read too: GPT-2's as kind
    "gpt2", the others as "tiktoken".
    """

    def __init__(self, name: str = "gpt2", encoding=None):
        self.kind, self.name = "gpt2" if name == "gpt2" else "tiktoken", name
        self._encoding = encoding or _fetch_encoding(name)
        self.eos_id = self._encoding.eot_token
        self.vocab_size = self._encoding.max_token_value + 1

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)

    def encode_array(self, text: str) -> np.ndarray:
        if not hasattr(self._encoding, "encode_to_numpy"):  # before 0.9
            return super().encode_array(text)
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._encoding.decode_bytes(list(ids))

    def definition(self) -> dict:
        return {"kind": "gpt2"} if self.name == "gpt2" else {"kind": "tiktoken", "encoding": self.name}

    @property
    def _ranks(self) -> dict[bytes, int]:
        return self._encoding._mergeable_ranks

    def save(self, folder: str | os.PathLike) -> None:
        """Write tokenizer.json and tokenizer_config.json in Hugging Face's form."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_TEXT,
            "kitbash_kind": self.kind,
            "kitbash_name": self.name,
            "kitbash_sha256": _hash_of_ranks(self._ranks),
        }
        _as_huggingface(self._ranks, self._encoding._special_tokens, self.name).save(
            str(Path(folder) / TOKENIZER_FILE), pretty=False
        )
        (Path(folder) / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_saved(cls, path: Path, definition: dict, config: dict) -> TiktokenTokenizer:
        """What `save` wrote: its tokenizer.json (at `path`, parsed) and tokenizer_config.json."""
        tiktoken = _import("tiktoken", f"the tokenizer in {path.parent}")
        byte_of, name = _byte_spelling(), config.get("kitbash_name")
        try:
            special = {token["content"]: token["id"] for token in definition["added_tokens"]}
            vocabulary = definition["model"]["vocab"].items()
            ranks = {bytes(byte_of[c] for c in token): i for token, i in vocabulary if token not in special}
            if _hash_of_ranks(ranks) != config["kitbash_sha256"]:
                raise ValueError
            pattern = TIKTOKEN_PATTERNS[name]
        except (KeyError, TypeError, AttributeError, ValueError):
            raise TokenizerError(f"{path} is not as it was written; prepare the dataset again.") from None
        return cls(name, tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special))


def _fetch_encoding(name: str):
    """tiktoken's encoding of this name, whose files are fetched or lie in its cache."""
    tiktoken = _import("tiktoken", f"--tokenizer={name}")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # requests raises many kinds; each means: no files
        raise TokenizerUnavailable(
            f"tiktoken cannot get the files of the {'GPT-2' if name == 'gpt2' else name} tokenizer ({type(error).__name__}); "
            "connect to the network once, point TIKTOKEN_CACHE_DIR to a folder that has them, or use --tokenizer=bpe."
        ) from None


def _hash_of_ranks(ranks: dict[bytes, int]) -> str:
    """A checksum of a vocabulary: which bytes have which id."""
    digest = hashlib.sha256()
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        digest.update(b"%d %d " % (rank, len(token)) + token)
    return digest.hexdigest()


def _as_huggingface(ranks: dict[bytes, int], special: dict[str, int], name: str):
    """A tiktoken encoding as a tokenizer of the `tokenizers` library: the same ids for every text.

    tiktoken joins any two neighbours whose bytes together have an id, the lowest first; so each way to cut a token in two
    that have ids is a merge here. `ignore_merges`: a whole word with an id is that id, without merging.
    """
    tokenizers = _import("tokenizers", "saving this tokenizer")
    from tokenizers import decoders, models, pre_tokenizers

    spelled = {byte: character for character, byte in _byte_spelling().items()}
    spelling = {token: "".join([spelled[byte] for byte in token]) for token in ranks}
    merges = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [(ranks[left], ranks[right], left, right) for left, right in cuts if left in ranks and right in ranks]
        merges += [(spelling[left], spelling[right]) for _, _, left, right in sorted(pairs)]
    vocabulary = {**{spelling[token]: rank for token, rank in ranks.items()}, **special}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    words = pre_tokenizers.Split(tokenizers.Regex(TIKTOKEN_PATTERNS[name]), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(sorted(special, key=special.get))
    return backend


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library: `bpe` when trained here, `hf` when it came from elsewhere.

    It is saved in Hugging Face's own form (tokenizer.json, tokenizer_config.json), which `transformers` reads too.
    """

    def __init__(self, backend, *, kind: str, name: str, eos_id: int | None, bos_id: int | None = None):
        from tokenizers import decoders

        self._backend = backend
        self._backend.encode_special_tokens = True  # "<|endoftext|>" in a text is text
        self._backend.no_truncation()
        self._backend.no_padding()
        self.kind, self.name, self.eos_id, self.bos_id = kind, name, eos_id, bos_id
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())  # ids may have gaps
        self.byte_level = isinstance(backend.decoder, decoders.ByteLevel)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> HuggingFaceTokenizer:
        """Byte-level BPE with GPT-2's pre-tokenisation. A short text yields fewer than `vocab_size` tokens."""
        tokenizers = _import("tokenizers", "--tokenizer=bpe")
        from tokenizers import decoders, models, pre_tokenizers, trainers

        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if vocab_size < len(alphabet) + 1:
            raise ValueError(
                f"vocab_size={vocab_size} is too small for a byte-level BPE: 256 bytes and {END_OF_TEXT} "
                f"need {len(alphabet) + 1}; use a larger one, or --tokenizer=byte."
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.decoder = decoders.ByteLevel()
        backend.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=vocab_size, initial_alphabet=sorted(alphabet), special_tokens=[END_OF_TEXT], show_progress=False
            ),
        )
        return cls(backend, kind="bpe", name=f"bpe-{backend.get_vocab_size()}", eos_id=backend.token_to_id(END_OF_TEXT))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike) -> HuggingFaceTokenizer:
        """Read a local tokenizer.json, or a folder that has one. Nothing is fetched; see `given_tokenizer`."""
        tokenizers = _import("tokenizers", "a Hugging Face tokenizer")
        path = Path(path).expanduser()
        file = path / TOKENIZER_FILE if path.is_dir() else path
        if not file.is_file():
            raise TokenizerError(
                f"There is no tokenizer {file}; --tokenizer takes {', '.join(BUILT_IN)}, a folder with a Hugging Face "
                "tokenizer.json, or the Hub's owner/name of one."
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
            backend.encode("a")  # what is wrong with it may show only here
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises bare Exception, and where it panics something below that
            raise TokenizerError(
                f"{file} is not a Hugging Face tokenizer ({error}); export one with tokenizer.save_pretrained(folder)."
            ) from None
        config = _read_tokenizer_config(file.parent / CONFIG_FILE)
        eos = _token_in(config, "eos_token")
        eos_ids = [i for i in map(backend.token_to_id, [eos] if eos else EOS_NAMES) if i is not None]
        return cls(
            backend,
            kind=config.get("kitbash_kind", "hf"),
            eos_id=eos_ids[0] if eos_ids else None,
            bos_id=_bos_id(backend, config),
            name=config.get("kitbash_name", file.resolve().parent.name),
        )

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_array(self, text: str) -> np.ndarray:
        return self.encode_arrays([text])[0]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(ids, dtype=np.uint32) for ids in self.encode_batch(texts)]

    @cached_property
    def cuttable(self) -> bool:
        """Tried out, as a byte-level vocabulary may come with any rule for where a word begins."""
        text = "It's 1 a.b  two,\n three\n\nfour4\t five \n six1\nseven. Eight\r\n nine:\n"
        cuts = [cut for cut in range(1, len(text)) if find_cut(text, cut) == cut]
        whole = self.encode(text)
        return self.byte_level and all(self.encode(text[:cut]) + self.encode(text[cut:]) == whole for cut in cuts)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        if self.byte_level:
            return b"".join([self._pieces[i] for i in ids])
        return self.decode(ids).encode()

    def decode(self, ids: Iterable[int]) -> str:
        if self.byte_level:
            return super().decode(ids)
        return self._backend.decode(list(ids), skip_special_tokens=False)

    @cached_property
    def _pieces(self) -> list[bytes]:
        """The bytes of each id of a byte-level vocabulary, which spells them with 256 printable characters."""
        byte_of, added = _byte_spelling(), self._backend.get_added_tokens_decoder()
        pieces = [b""] * self.vocab_size
        for token, i in self._backend.get_vocab(with_added_tokens=True).items():
            pieces[i] = token.encode() if i in added else bytes(byte_of[character] for character in token)
        return pieces

    def definition(self) -> dict:
        bos = {} if self.bos_id is None else {"bos_id": self.bos_id}
        return {"tokenizer": json.loads(self._backend.to_str()), "eos_id": self.eos_id, **bos}

    def save(self, folder: str | os.PathLike) -> None:
        eos = None if self.eos_id is None else self._backend.id_to_token(self.eos_id)
        bos = {} if self.bos_id is None else {"bos_token": self._backend.id_to_token(self.bos_id)}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": eos,
            **bos,
            "kitbash_kind": self.kind,
            "kitbash_name": self.name,
        }
        self._backend.save(str(Path(folder) / TOKENIZER_FILE))
        (Path(folder) / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _token_in(config: dict, key: str) -> str | None:
    """A special token that tokenizer_config.json names, as a string or as an object."""
    token = config.get(key)
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _read_tokenizer_config(path: Path) -> dict:
    """tokenizer_config.json, empty where there is none. Raises TokenizerError."""
    config = _read_json(path) if path.is_file() else {}
    try:
        check_shape(config, {"kitbash_kind": str, "kitbash_name": str, "kitbash_sha256": str})
    except ValueError as error:
        raise TokenizerError(f"{path}: {error}; restore the file, or prepare the dataset again.") from None
    return config


def _bos_id(backend, config: dict) -> int | None:
    """The id that a Hugging Face tokenizer puts before every text; None if it puts none, or several.

    The post-processor of tokenizer.json decides, as in transformers. What was saved here names the token or has none:
    earlier versions prepared datasets without it.
    """
    if "kitbash_kind" in config:
        token = _token_in(config, "bos_token")
        return backend.token_to_id(token) if token else None
    plain, whole = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    return whole[0] if plain and whole[1 : 1 + len(plain)] == plain and whole[: len(plain)] != plain else None


def _check_characters(characters: object) -> None:
    """Raise ValueError unless this is a text, or a list of characters."""
    if not isinstance(characters, str):
        check_shape(characters, Mandatory([Mandatory(str)]), "characters")


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer | None:
    """The tokenizer saved in a folder, or None where there is none."""
    path = Path(folder) / TOKENIZER_FILE
    if not path.is_file():
        return None
    definition = _read_json(path)
    kind = definition.get("kind", "hf")
    try:
        if kind in ("char", "byte"):
            check_shape(definition, {"eos": Mandatory(bool)})
            _check_characters(definition.get("characters", []))
        if kind == "char":
            return CharTokenizer(definition["characters"], definition["eos"])
        if kind == "byte":
            return ByteTokenizer(definition["eos"])
    except (KeyError, ValueError):
        raise TokenizerError(f"{path} is incomplete; prepare the dataset again.") from None
    if kind == "gpt2":  # as earlier versions saved it: its name alone
        return TiktokenTokenizer("gpt2")
    if kind == "hf":
        config = _read_tokenizer_config(path.with_name(CONFIG_FILE))
        if config.get("kitbash_kind") in ("gpt2", "tiktoken"):
            return TiktokenTokenizer.from_saved(path, definition, config)
        return HuggingFaceTokenizer.from_pretrained(path)
    raise TokenizerError(
        f"{path} is of the unknown kind {kind!r} (known: char, byte, gpt2, or Hugging Face's form); update the program."
    )


def make_tokenizer(
    spec: str,
    *,
    texts: Callable[[], Iterable[str]],
    training_texts: Callable[[], Iterable[str]],
    bpe_vocab_size: int | None,
    eos: bool,
) -> Tokenizer:
    """The tokenizer called `spec`: bpe, char, byte, or one that is given.

    texts, training_texts: read what characters are collected from, and what a BPE is trained on; called only where they are
    needed. bpe_vocab_size: that of a BPE. eos: whether characters and bytes get an id for the end of a document.
    """
    if spec == "bpe":
        return HuggingFaceTokenizer.train(training_texts(), bpe_vocab_size)
    if spec == "char":
        return CharTokenizer.from_texts(texts(), eos=eos)
    if spec == "byte":
        return ByteTokenizer(eos=eos)
    return given_tokenizer(spec)


def given_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer called `spec` that needs no text to be made: tiktoken's, a Hugging Face folder, or a name on the Hub."""
    if spec in TIKTOKEN_PATTERNS:
        return TiktokenTokenizer(spec)
    path = Path(spec).expanduser()
    if not path.exists():
        from data.hub import HUB_NAME, fetch_tokenizer

        if HUB_NAME.fullmatch(spec):
            fetched = HuggingFaceTokenizer.from_pretrained(fetch_tokenizer(spec))
            fetched.name = spec
            return fetched
    if path.is_dir() and (own := load_tokenizer(path)) is not None:  # a dataset's or a checkpoint's, of any kind
        return own
    return HuggingFaceTokenizer.from_pretrained(path)


class StreamDecoder:
    """Turns ids that come one at a time into text, a whole UTF-8 character at a time.

    stream = StreamDecoder(tokenizer)
    for token in tokens:
        print(stream.push(token), end="", flush=True)
    print(stream.flush())
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # For tokenizers whose text is not the sum of its parts (SentencePiece's word marks): the ids since the text
        # last stood whole, preceded by the ids shown before them, which they may need as context.
        self._ids: list[int] = []
        self._shown = 0

    def push(self, token: int) -> str:
        """The text that is complete now and was not before; often empty inside of a character."""
        if self._tokenizer.byte_level:
            return self._utf8.decode(self._tokenizer.decode_bytes([token]))
        self._ids.append(token)
        text = self._new_text()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return text

    def flush(self) -> str:
        """What is left: an unfinished character, as U+FFFD."""
        if self._tokenizer.byte_level:
            return self._utf8.decode(b"", final=True)
        text, self._ids, self._shown = self._new_text(), [], 0
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._shown])
        return self._tokenizer.decode(self._ids)[len(before) :]


def _byte_spelling() -> dict[str, int]:
    """The character by which GPT-2's vocabulary spells each byte: itself if printable, else one from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + i): byte for i, byte in enumerate(others)}}


def _read_json(path: Path) -> dict:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not an object")
        return content
    except ValueError as error:
        raise TokenizerError(
            f"{path} cannot be read as JSON ({error}); restore the file, or prepare the dataset again."
        ) from None


def _import(library: str, purpose: str):
    """Import an optional library, or say what needs it."""
    import importlib

    try:
        return importlib.import_module(library)
    except ImportError:
        raise TokenizerUnavailable(
            f"{purpose} needs the package {library!r}, which is not installed: pip install {library}, "
            f"or use --tokenizer=byte, which needs nothing."
        ) from None
