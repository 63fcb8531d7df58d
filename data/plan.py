"""What is to be made of a source: which of its documents are read, to which split each goes, and by which tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from data import corpora, tokenization
from data.encoding import key_digest
from data.files import DatasetError
from data.sources import Reader, Source, TextPiece

VAL_FRACTION = 0.1
BPE_VOCAB_SIZE = 4096
BPE_TRAINING_CHARACTERS = 100_000_000  # a BPE is trained on the first ones: more takes memory, changes little


@dataclass(frozen=True)
class Options:
    """What decides the content of a dataset besides its source. The same options and source give the same bytes.

    tokenizer: bpe, char, byte, one of tiktoken's, a Hugging Face folder or name.
    val_fraction: the share of the documents kept for validation, where the source has no split of its own.
    split_by: a document goes to validation by a hash of its "text" (stable whatever comes before it), or of its "number".
    max_tokens: stop after the document that reaches it. max_samples: so many documents. None: all. Where the source has a
    validation split of its own, both are of the training split, and val_fraction times as much of validation is taken at most.
    deduplicate: drop a document whose text has been seen before.
    shard_tokens: start a new file after so many tokens.
    """

    tokenizer: str = "bpe"
    bpe_vocab_size: int | None = None
    val_fraction: float = VAL_FRACTION
    split_by: str = "text"
    max_tokens: int | None = None
    max_samples: int | None = None
    deduplicate: bool = False
    shard_tokens: int | None = None

    def __post_init__(self):
        if not 0 < self.val_fraction < 1:
            raise ValueError(
                f"val_fraction={self.val_fraction:g} is not between 0 and 1; use for example 0.1 to validate on a tenth of the "
                "text."
            )
        for name in ("max_tokens", "max_samples", "shard_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} is not a number from 1 on.")


class Plan:
    """A source and options, and what follows from them.

    several: whether there is more than one document. cut: where a single one is cut into training and validation, in
    characters. moved: where no document has a key for one of the splits, the one that is nearest to it goes there (its
    number → the split).
    """

    def __init__(self, source: Source, options: Options):
        self.source, self.options = source, options
        self.several, self.cut, self.moved = True, None, {}

    def look_through(self) -> None:
        """Find out what the class says. A single document is read to its end, of several only as many as it takes to see one
        for each split. Raises DatasetError if there are none."""
        self.several, self.cut, self.moved = True, None, {}
        if self.source.splits_itself:
            return
        keys: dict[str, tuple[float, int]] = {}
        characters = number = 0
        for piece in self.pieces():
            characters += len(piece.text)
            if not piece.begins:
                continue
            key, number = self.key(number, key_digest(piece.text)), number + 1
            split = self.side(key)
            keys[split] = min(keys.get(split, (2.0, 0)), (key if split == "train" else -key, number - 1))
            if len(keys) == 2:
                return
        if not number:
            raise DatasetError(f"There are no documents in {self.source.description or 'the source'}; check what was given.")
        if number == 1:
            self.several, self.cut = False, corpora.split_position(characters, self.options.val_fraction)
        else:
            ((split, (_, nearest)),) = keys.items()
            self.moved = {nearest: "val" if split == "train" else "train"}

    def pieces(self, reader: Reader | None = None, begun: dict[str, int] | None = None) -> Iterator[TextPiece]:
        """The pieces of the first max_samples documents. `begun` counts on how many have begun, by the split that the source
        names ("" for one that names none)."""
        reader, begun = self.source.read() if reader is None else reader, {} if begun is None else begun
        for piece in reader:
            split = piece.split or ""
            limit = self.limit(self.options.max_samples, split)
            if piece.begins and limit is not None and begun.get(split, 0) >= limit:
                if not split:
                    return
                reader.skip(split)
                continue
            begun[split] = begun.get(split, 0) + piece.begins
            yield piece

    def limit(self, most: int | None, split: str) -> int | None:
        """How much of a split may be taken, where `most` limits the whole, or the training split of a source with its own."""
        return max(1, round(most * self.options.val_fraction)) if most is not None and split == "val" else most

    def key(self, number: int, digest: bytes) -> float:
        """What decides where a document goes: a number in [0, 1) that looks random."""
        return corpora.hash01(number) if self.options.split_by == "number" else int.from_bytes(digest[:6], "little") / 2**48

    def side(self, key: float) -> str:
        """The split of a document of this key, as long as both splits get some."""
        return "val" if key < self.options.val_fraction else "train"

    def parts_of(self, piece: TextPiece, before: int) -> list[tuple[str, TextPiece]]:
        """(split, part) of a piece that so many characters came before; "" is a split that the document's key decides."""
        if self.cut is None:
            return [(piece.split or "", piece)]
        inside, length = self.cut - before, len(piece.text)
        parts = []
        if inside > 0:
            parts.append(("train", replace(piece, text=piece.text[:inside], ends=inside <= length)))
        if inside < length:
            parts.append(("val", replace(piece, text=piece.text[max(0, inside) :], begins=inside >= 0)))
        return parts

    def labelled_texts(self) -> Iterator[tuple[str, str]]:
        """(split, text) of every piece, read for a tokenizer that is made of them."""
        number, before, decided = 0, 0, ""
        for piece in self.pieces():
            if piece.begins:
                key, number = self.key(number, key_digest(piece.text)), number + 1
                decided = self.moved.get(number - 1, self.side(key))
            for split, part in self.parts_of(piece, before):
                yield split or decided, part.text
            before += len(piece.text)

    def make_tokenizer(self) -> tokenization.Tokenizer:
        """The tokenizer asked for. A BPE sees the training split only; characters are those of both splits."""
        return tokenization.make_tokenizer(
            self.options.tokenizer,
            texts=lambda: (text for _, text in self.labelled_texts()),
            training_texts=self.training_texts,
            bpe_vocab_size=self.options.bpe_vocab_size,
            eos=self.several,
        )

    def training_texts(self) -> Iterator[str]:
        """The training split, as far as a BPE is trained on it."""
        left = BPE_TRAINING_CHARACTERS
        for split, text in self.labelled_texts():
            if split == "train":
                yield text[:left]
                left -= len(text)
            if left <= 0:
                return
