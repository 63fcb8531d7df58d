"""What a preparation will take: text, tokens, disk and time, estimated from a sample before anything is written."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

from command_line import duration, labelled
from data import tokenization
from data.encoding import text_digest
from data.hub import Articles, HubRows
from data.plan import BPE_TRAINING_CHARACTERS, Options
from data.sources import Reader, Source, Splits, TextFiles
from data.token_dataset import DTYPES, UINT16_VOCAB

READ_WHOLE = 32 * 2**20  # bytes of files up to which all of them are read in place of a sample
PLACES = 12  # of a larger source that are looked at
SAMPLE_CHARACTERS = 1_500_000  # read at each of them
ENCODED_CHARACTERS = 5_000_000  # of what was read are encoded
WORKER_START = 2.0  # seconds until processes encode


@dataclass
class Stretch:
    """Texts that follow each other somewhere in a source. share: how much of the source they are."""

    texts: list[str] = field(default_factory=list)
    documents: int = 0  # that begin in them
    bytes: int = 0
    share: float = 0.0


@dataclass
class Sample:
    """Places spread evenly over a source, all alike in how much of it they stand for. seconds: it took to read them.

    total: UTF-8 bytes of the whole source, documents: how many it has; None where nobody knows.
    """

    places: list[Stretch]
    seconds: float
    total: float | None
    documents: float | None
    download: int | None = 0  # bytes

    @property
    def bytes(self) -> int:
        return sum(place.bytes for place in self.places)


def take_sample(source: Source) -> list[Sample]:
    """Of each split of a source: files up to READ_WHOLE are read whole, larger ones and what lies on the Hub in places."""
    if isinstance(source, Splits):
        return [sample for part in source.parts.values() for sample in take_sample(part)]
    rows = source.rows if isinstance(source, Articles) else source
    started = time.perf_counter()
    if isinstance(rows, HubRows) and rows.local is None:
        counted, download = rows.extent()
        places = [_read(reader, SAMPLE_CHARACTERS // PLACES) for reader in rows.samples(PLACES)]
        found = [place for place in places if place.texts]
        texts = sum(len(place.texts) for place in found)
        total = counted * sum(place.bytes for place in found) / texts if counted is not None and texts else None
        return [Sample(found, time.perf_counter() - started, total, counted, download)]
    files = rows.local_files() if isinstance(rows, HubRows) else rows if isinstance(rows, TextFiles) else None
    if files is None or sum(file.stat().st_size for file in files.files) <= READ_WHOLE:
        places = [_read(source.read(), None)]
        places[0].share = 1.0
    else:
        places = [_read(reader, SAMPLE_CHARACTERS) for reader in files.samples(PLACES)]
    found = [place for place in places if place.texts and place.share > 0]
    seconds = time.perf_counter() - started
    if not found:
        return [Sample([], seconds, None, None)]
    total, documents = (
        sum(getattr(place, count) / place.share for place in found) / len(found) for count in ("bytes", "documents")
    )
    return [Sample(found, seconds, total, documents)]


def _read(reader: Reader, characters: int | None) -> Stretch:
    """So many characters from a reader on, or (None) everything. Where it begins somewhere, only the first piece tells where."""
    place, begun, read = Stretch(), None, 0
    for piece in reader:
        if characters is not None and begun is None and reader.share() is not None:
            begun = reader.share()
            continue
        place.texts.append(piece.text)
        place.documents += piece.begins
        place.bytes += len(piece.text.encode())
        read += len(piece.text)
        if characters is not None and read >= characters:
            break
    place.share = (reader.share() or 0.0) - (begun or 0.0)
    return place


@dataclass
class Forecast:
    """Of the whole source: text_bytes, download_bytes. Of what is asked for: tokens, disk_bytes, seconds. None: unknown."""

    download_bytes: int | None
    text_bytes: float | None
    tokens: float | None
    disk_bytes: float | None
    seconds: float | None
    sampled_bytes: int
    tokens_per_byte: float
    bytes_per_second: float  # that one process encodes
    duplicates: float | None  # share of the sample's text that came before in it, where duplicates are dropped

    def report(self) -> str:
        """A few lines for people."""
        measured = f"{self.tokens_per_byte:.4f} tokens a byte, {_size(self.bytes_per_second)}/s and process"
        return labelled(
            [
                ("download", "nothing" if self.download_bytes == 0 else _size(self.download_bytes)),
                ("text", _size(self.text_bytes)),
                ("tokens", "unknown" if self.tokens is None else f"{self.tokens:,.0f}"),
                ("disk", _size(self.disk_bytes)),
                ("time", "unknown" if self.seconds is None else f"about {duration(self.seconds)}"),
                ("measured", f"on {_size(self.sampled_bytes)}: {measured}"),
                *([] if self.duplicates is None else [("duplicates", self._said_of_duplicates())]),
            ]
        )

    def _said_of_duplicates(self) -> str:
        dropped = f"{100 * self.duplicates:.3g} % of the text looked at, which is left out above"
        whole = self.text_bytes is not None and self.sampled_bytes >= self.text_bytes
        return dropped if whole else f"{dropped}; the whole may have more, so the figures are the most that it takes"


def _size(value: float | None) -> str:
    """Bytes for people."""
    if value is None:
        return "unknown"
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{value / unit:.4g} {name}"
    return f"{value:.0f} bytes"


def forecast(source: Source, options: Options, num_proc: int | None) -> Forecast:
    """What preparing `source` with these options on so many processes will take."""
    samples = take_sample(source)
    duplicates = _drop_duplicates(samples) if options.deduplicate else None
    several = sum(place.documents for sample in samples for place in sample.places) > 1
    coder, training = _tokenizer(samples, options, several)
    delimiters = ((coder.eos_id is not None) + (coder.bos_id is not None)) * several
    encoded_bytes, encoding, sums = 0, 0.0, {"bytes": 0.0, "tokens": 0.0, "documents": 0.0}
    known = all(sample.total is not None for sample in samples)
    for sample in samples:
        ids_per_byte = []
        for place in sample.places:
            step = 1 + sum(map(len, place.texts)) * len(sample.places) // ENCODED_CHARACTERS
            texts = (place.texts[1::2] or place.texts)[::step]  # a BPE was trained on the others
            started = time.perf_counter()
            ids = sum(len(coder.encode_array(text)) for text in texts)
            encoding += time.perf_counter() - started
            size = sum(len(text.encode()) for text in texts)
            encoded_bytes += size
            ids_per_byte.append(ids / max(1, size) * place.bytes / max(place.share, 1e-12))
        weight = sum(place.bytes / max(place.share, 1e-12) for place in sample.places)
        total = sample.total if known else sample.bytes
        documents = sample.documents if known else sum(place.documents for place in sample.places)
        sums["bytes"] += total or 0
        sums["documents"] += documents or 0
        sums["tokens"] += (total or 0) * sum(ids_per_byte) / max(1.0, weight) + delimiters * (documents or 0)
    per_byte = sums["tokens"] / max(1.0, sums["bytes"])
    limits = [sums["tokens"]] if known else []
    limits += [options.max_tokens] if options.max_tokens is not None else []
    if options.max_samples is not None:
        limits.append(options.max_samples * sums["tokens"] / max(1.0, sums["documents"]))
    tokens = min(limits, default=None)
    seconds = None
    if tokens is not None:
        read_bytes = max(1, sum(sample.bytes for sample in samples))
        encode, read = encoding / max(1, encoded_bytes), sum(sample.seconds for sample in samples) / read_bytes
        if num_proc is None or num_proc == 1:
            seconds = training + tokens / per_byte * (encode + read)
        else:
            slowest = max(read, encode / num_proc, (encode + read) / (os.cpu_count() or 1))
            seconds = training + WORKER_START + tokens / per_byte * slowest
    width = DTYPES["uint16" if coder.vocab_size <= UINT16_VOCAB else "uint32"].itemsize
    downloads = [sample.download for sample in samples]
    return Forecast(
        download_bytes=None if None in downloads else max(downloads),  # each split tells the size of the whole dataset
        text_bytes=sums["bytes"] if known else None,
        tokens=tokens,
        disk_bytes=None if tokens is None else tokens * width,
        seconds=seconds,
        sampled_bytes=sum(sample.bytes for sample in samples),
        tokens_per_byte=per_byte,
        bytes_per_second=encoded_bytes / max(encoding, 1e-9),
        duplicates=duplicates,
    )


def _drop_duplicates(samples: list[Sample]) -> float:
    """Drop texts that came before in the samples, as --deduplicate does; returns the share of the bytes that they were."""
    seen: set[bytes] = set()
    read = kept = 0
    for sample in samples:
        before = sample.bytes
        for place in sample.places:
            digests = [text_digest(text.encode()) for text in place.texts]
            new = [text for text, digest in zip(place.texts, digests) if digest not in seen and not seen.add(digest)]
            place.documents -= len(place.texts) - len(new)
            place.texts, place.bytes = new, sum(len(text.encode()) for text in new)
        share = sample.bytes / max(1, before)
        sample.total = None if sample.total is None else sample.total * share
        sample.documents = None if sample.documents is None else sample.documents * share
        read, kept = read + before, kept + sample.bytes
    return 1 - kept / max(1, read)


def _tokenizer(samples: list[Sample], options: Options, several: bool) -> tuple[tokenization.Tokenizer, float]:
    """The tokenizer asked for, made of half of the sample where it is made of texts; and the seconds that making it will take."""
    places = [place.texts for sample in samples for place in sample.places]
    half = [text for texts in places for text in (texts[::2] or texts)]
    started = time.perf_counter()
    coder = tokenization.make_tokenizer(
        options.tokenizer,
        texts=lambda: (text for texts in places for text in texts),
        training_texts=lambda: half,
        bpe_vocab_size=options.bpe_vocab_size,
        eos=several,
    )
    if options.tokenizer != "bpe":
        return coder, 0.0
    seconds = (time.perf_counter() - started) / max(1, sum(map(len, half)))
    total = samples[0].total if samples[0].total is not None else BPE_TRAINING_CHARACTERS
    return coder, seconds * min(total, BPE_TRAINING_CHARACTERS)
