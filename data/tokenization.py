"""Tokenizers behind one small interface, whatever they are made of.

| kind | vocabulary                                                            | needs        |
|------|-----------------------------------------------------------------------|--------------|
| char | the characters of a text, sorted                                      | nothing      |
| byte | the 256 bytes                                                         | nothing      |
| bpe  | byte-level BPE trained on the spot, `<|endoftext|>` included           | `tokenizers` |
| gpt2 | GPT-2's 50,257                                                        | `tiktoken`   |
| hf   | any local Hugging Face tokenizer (a folder, or its tokenizer.json)     | `tokenizers` |

Each has `kind`, `name`, `vocab_size` (special ids included), `eos_id` (or None), `fingerprint`, `encode`,
`encode_batch`, `decode`, `decode_bytes`, `save(folder)`; `load_tokenizer(folder)` reads what `save` wrote. Text is
always ordinary text: the characters `<|endoftext|>` in a document never become the eos id. `byte_level` says that ids
stand for bytes one after another, so that `decode_bytes` of parts can be joined.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"  # Hugging Face's name for what tokenizer.json has no room for
# What well-known tokenizers call the end of a document; asked only where tokenizer_config.json does not say.
EOS_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>")


class TokenizerUnavailable(ValueError):
    """A tokenizer that is in order cannot be used on this machine: a library or the files that it needs are not here."""


class Tokenizer:
    """What all kinds share. A subclass gives `encode`, `decode_bytes` and `definition`, or overrides more."""

    kind: str
    name: str
    vocab_size: int
    eos_id: int | None = None
    byte_level = True

    def encode(self, text: str) -> list[int]:
        """Token ids of ordinary text."""
        raise NotImplementedError

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores where the library can."""
        return [self.encode(text) for text in texts]

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

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join([self._pieces[i] for i in ids])

    def definition(self) -> dict:
        return {"kind": "byte", "eos": self.eos_id is not None}


class Gpt2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE through tiktoken, which fetches its two files on first use and caches them."""

    kind = name = "gpt2"
    vocab_size, eos_id = 50257, 50256

    def __init__(self):
        tiktoken = _import("tiktoken", "--tokenizer=gpt2")
        try:
            self._encoding = tiktoken.get_encoding("gpt2")
        except Exception as error:  # requests raises many kinds; each means: no files
            raise TokenizerUnavailable(
                f"tiktoken cannot get the files of the GPT-2 tokenizer ({type(error).__name__}); connect "
                f"to the network once, point TIKTOKEN_CACHE_DIR to a folder that has them, or use "
                "--tokenizer=bpe."
            ) from None

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._encoding.decode_bytes(list(ids))

    def definition(self) -> dict:
        return {"kind": "gpt2"}


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library: `bpe` when trained here, `hf` when it came from elsewhere.

    It is saved in Hugging Face's own form (tokenizer.json, tokenizer_config.json), which `transformers` reads too.
    """

    def __init__(self, backend, *, kind: str, name: str, eos_id: int | None):
        from tokenizers import decoders

        self._backend = backend
        self._backend.encode_special_tokens = True  # "<|endoftext|>" in a text is text
        self._backend.no_truncation()
        self._backend.no_padding()
        self.kind, self.name, self.eos_id = kind, name, eos_id
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
        """Read a local tokenizer.json, or a folder that has one. Nothing is downloaded."""
        tokenizers = _import("tokenizers", "a Hugging Face tokenizer")
        path = Path(path).expanduser()
        file = path / TOKENIZER_FILE if path.is_dir() else path
        if not file.is_file():
            raise ValueError(
                f"There is no tokenizer {file}; --tokenizer takes char, byte, bpe, gpt2, or a folder with "
                "a Hugging Face tokenizer.json."
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(
                f"{file} is not a Hugging Face tokenizer ({error}); export one with tokenizer.save_pretrained(folder)."
            ) from None
        config = _read_json(file.parent / CONFIG_FILE) if (file.parent / CONFIG_FILE).is_file() else {}
        eos = config.get("eos_token")
        candidates = [eos.get("content") if isinstance(eos, dict) else eos] if eos else EOS_NAMES
        eos_ids = [i for i in map(backend.token_to_id, candidates) if i is not None]
        return cls(
            backend,
            kind=config.get("kitbash_kind", "hf"),
            eos_id=eos_ids[0] if eos_ids else None,
            name=config.get("kitbash_name", file.resolve().parent.name),
        )

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

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
        return {"tokenizer": json.loads(self._backend.to_str()), "eos_id": self.eos_id}

    def save(self, folder: str | os.PathLike) -> None:
        eos = None if self.eos_id is None else self._backend.id_to_token(self.eos_id)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": eos,
            "kitbash_kind": self.kind,
            "kitbash_name": self.name,
        }
        self._backend.save(str(Path(folder) / TOKENIZER_FILE))
        (Path(folder) / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer | None:
    """The tokenizer saved in a folder, or None where there is none."""
    path = Path(folder) / TOKENIZER_FILE
    if not path.is_file():
        return None
    definition = _read_json(path)
    kind = definition.get("kind", "hf")
    try:
        if kind == "char":
            return CharTokenizer(definition["characters"], definition["eos"])
        if kind == "byte":
            return ByteTokenizer(definition["eos"])
    except (KeyError, TypeError):
        raise ValueError(f"{path} is incomplete; prepare the dataset again.") from None
    if kind == "gpt2":
        return Gpt2Tokenizer()
    if kind == "hf":
        return HuggingFaceTokenizer.from_pretrained(path)
    raise ValueError(
        f"{path} is of the unknown kind {kind!r} (known: char, byte, gpt2, or Hugging Face's form); update the program."
    )


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
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not an object")
        return content
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}); restore the file, or prepare the dataset again.") from None


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
