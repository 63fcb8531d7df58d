"""From documents to a dataset: what every data/*/prepare.py does, and `ensure_prepared` for embedded corpora.

The documents are read twice: once to count them and to build the tokenizer, once to encode them. Nothing but one batch
of texts, and the text a BPE is trained on, is held in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data import corpora, tokenization
from data.corpora import Document
from data.dataset_writer import DatasetWriter, check_folder, finish_publishing, locked
from data.hub import HUB_NAME
from data.token_dataset import DATA_DIR, PUBLISHING, DatasetError, TokenDataset, is_prepared, resolve_dataset

VAL_FRACTION = 0.1
BPE_TRAINING_CHARACTERS = 100_000_000  # a BPE is trained on the first ones: more takes memory, changes little
BATCH_CHARACTERS = 4_000_000  # encoded at a time, on all cores
PIECE_CHARACTERS = 1_000_000  # longer documents are encoded in pieces of about this size


@dataclass(frozen=True)
class Corpus:
    """A corpus that comes with Python: where its documents come from, and the size of BPE that suits it."""

    documents: Callable[[], Iterator[Document]]
    bpe_vocab_size: int
    summary: str

    @property
    def source(self) -> str:
        return f"{self.summary}, Python {platform.python_version()}"


EMBEDDED = {
    "pydocs": Corpus(corpora.pydocs_documents, 4096, "documentation topics and standard-library docstrings"),
    "pystdlib": Corpus(corpora.pystdlib_documents, 8192, "standard-library sources"),
}
TEXTFILE_BPE_VOCAB_SIZE = 4096


# ------------------------------------------------------------------------------------------- preparing


def prepare(
    documents: Callable[[], Iterator[Document]],
    folder: str | os.PathLike,
    *,
    tokenizer: str = "bpe",
    bpe_vocab_size: int = 4096,
    val_fraction: float = VAL_FRACTION,
    source: str = "",
    progress: bool = False,
    only_if_missing: bool = False,
    overwrite: bool = False,
) -> dict | None:
    """Tokenize documents into a dataset in `folder`; returns its meta.json (None if `only_if_missing` found one).

    documents: starts an iteration over (name, text); called twice, and has to give the same both times.
    tokenizer: bpe, char, byte, gpt2, or the path of a Hugging Face tokenizer.
    overwrite: replace a dataset that a prepare made, and put it beside other files; see `check_folder`.
    One document is split by position; of more, whole documents go to validation, and each ends with the eos id and begins
    with the bos id of a tokenizer that has one.
    Safe against other processes preparing the same folder; an interrupt leaves the folder as it was.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(
            f"val_fraction={val_fraction:g} is not between 0 and 1; use for example 0.1 to validate on a tenth of the text."
        )
    folder = Path(folder)
    if not (folder / PUBLISHING).exists() and not only_if_missing:
        check_folder(folder, overwrite)  # before anything is written there
    with locked(folder):
        finish_publishing(folder)
        if only_if_missing:
            if is_prepared(folder):
                return None
            print(f"Preparing {folder} from {source} …", file=sys.stderr, flush=True)
        count = sum(1 for _ in _show(documents(), progress, "reading"))
        if count == 0:
            raise DatasetError(f"There are no documents to prepare {folder} from; check the files given.")
        several = count > 1
        parts = _split_into_parts(documents, count, val_fraction)
        coder = _make_tokenizer(tokenizer, parts, bpe_vocab_size, several)
        ends = dict(append_eos=several and coder.eos_id is not None, prepend_bos=several and coder.bos_id is not None)
        with DatasetWriter(folder, coder, source=source, **ends, overwrite=overwrite) as writer:
            for (split, text), ids in _encoded(coder, _show(parts(), progress, "encoding", count)):
                writer.add(split, ids, len(text.encode()))
            return writer.publish()


def ensure_prepared(name_or_path: str | os.PathLike) -> None:
    """Prepare a corpus that comes with Python when it is asked for and not there yet; do nothing for any other dataset.

    Nor where nanoGPT's own files lie in its folder: they are a dataset too, and not ours to replace. Safe to call from many
    processes at once: one prepares, the others wait.
    """
    folder = resolve_dataset(name_or_path)
    name = folder.name
    if name not in EMBEDDED or folder.resolve() != DATA_DIR / name or is_prepared(folder):
        return
    if (folder / "train.bin").exists() and not (folder / PUBLISHING).exists():
        return
    corpus = EMBEDDED[name]
    try:
        prepare(corpus.documents, folder, bpe_vocab_size=corpus.bpe_vocab_size, source=corpus.source, only_if_missing=True)
    except OSError as error:
        raise DatasetError(
            f"The dataset {name} cannot be written to {folder} ({error.strerror or error}); prepare it "
            f"elsewhere with python data/{name}/prepare.py --out=DIR, then use --dataset=DIR."
        ) from None


def _split_into_parts(documents: Callable, count: int, val_fraction: float) -> Callable[[], Iterator[tuple[str, str]]]:
    """A function that starts an iteration over (split, text)."""
    if count > 1:
        for_validation = corpora.validation_documents(count, val_fraction)

        def parts():
            for (_, text), validation in zip(documents(), for_validation):
                yield ("val" if validation else "train"), text
    else:

        def parts():
            ((_, text),) = documents()
            position = corpora.split_position(text, val_fraction)
            yield "train", text[:position]
            yield "val", text[position:]

    return parts


def _make_tokenizer(spec: str, parts: Callable, bpe_vocab_size: int, several: bool) -> tokenization.Tokenizer:
    """The tokenizer called `spec`. A BPE sees the training split only; characters are those of both splits."""
    if spec == "bpe":
        return tokenization.HuggingFaceTokenizer.train(_training_texts(parts), bpe_vocab_size)
    if spec == "char":
        return tokenization.CharTokenizer.from_texts((text for _, text in parts()), eos=several)
    if spec == "byte":
        return tokenization.ByteTokenizer(eos=several)
    return tokenization.given_tokenizer(spec)


def _training_texts(parts: Callable) -> Iterator[str]:
    left = BPE_TRAINING_CHARACTERS
    for split, text in parts():
        if split == "train" and left > 0:
            yield text[:left]
            left -= len(text)


def _encoded(coder: tokenization.Tokenizer, parts: Iterator[tuple[str, str]]) -> Iterator[tuple[tuple[str, str], list[int]]]:
    """Yield ((split, text), ids) in order, encoding a batch of texts at a time."""

    def encode(batch: list) -> Iterator:
        pieces = [_pieces(text) if coder.byte_level else [text] for _, text in batch]
        encoded = iter(coder.encode_batch([piece for some in pieces for piece in some]))
        for part, some in zip(batch, pieces):
            yield part, [token for _ in some for token in next(encoded)]

    batch, size = [], 0
    for part in parts:
        batch.append(part)
        size += len(part[1])
        if size >= BATCH_CHARACTERS:
            yield from encode(batch)
            batch, size = [], 0
    yield from encode(batch)


def _pieces(text: str) -> list[str]:
    """Cut a long text before a space that follows a non-space: there GPT-2's and its successors' BPE always starts a
    new word, so the ids of the pieces are those of the whole."""
    pieces, start = [], 0
    while len(text) - start > PIECE_CHARACTERS:
        cut = text.find(" ", start + PIECE_CHARACTERS)
        while cut > 0 and text[cut - 1].isspace():
            cut = text.find(" ", cut + 1)
        if cut < 0:
            break
        pieces.append(text[start:cut])
        start = cut
    return [*pieces, text[start:]]


def _show(items: Iterator, progress: bool, label: str, total: int | None = None) -> Iterator:
    """A progress bar over documents, if asked for and tqdm is there."""
    if progress:
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            return tqdm(items, desc=label, total=total, unit=" documents", leave=False)
    return items


# ------------------------------------------------------------------------------------------- command lines


def prepare_embedded(name: str, arguments: Sequence[str] | None = None) -> int:
    """The command line of data/pydocs/prepare.py and data/pystdlib/prepare.py. Returns the exit code."""
    corpus = EMBEDDED[name]
    parser = _parser(f"data/{name}/prepare.py", f"Prepare data/{name}: {corpus.summary} of this Python.", corpus.bpe_vocab_size)
    options = parser.parse_args(arguments)
    _check_options(parser, options)
    return _run(options, lambda: (corpus.documents, options.out or DATA_DIR / name, corpus.source), corpus.bpe_vocab_size)


def prepare_textfile(arguments: Sequence[str] | None = None) -> int:
    """The command line of data/textfile/prepare.py. Returns the exit code."""
    parser = _parser(
        "data/textfile/prepare.py",
        "Prepare a dataset from your own texts: .txt (a file is one "
        "document), .jsonl (a line) or .parquet (a row) files, folders and globs of them.",
        TEXTFILE_BPE_VOCAB_SIZE,
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a file, folder or glob")
    parser.add_argument("--name", help="write to data/NAME; train with --dataset=NAME")
    parser.add_argument(
        "--text_key", default="text", metavar="KEY", help="field (.jsonl) or column (.parquet) with the text [text]"
    )
    options = parser.parse_args(arguments)
    _check_options(parser, options)
    if (options.name is None) == (options.out is None):
        parser.error("give either --name=NAME (written to data/NAME) or --out=DIR")
    name = options.name
    plain = name is None or (Path(name).name == name.strip() and name not in ("", ".", ".."))
    if not plain or (name is not None and (DATA_DIR / name / "prepare.py").exists()):
        parser.error(f"--name={name} is taken or not a plain name; choose another one, or give --out=DIR")

    def job():
        files = corpora.find_text_files(options.files)
        source = ", ".join(file.name for file in files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")
        return (lambda: corpora.text_documents(files, options.text_key)), options.out or DATA_DIR / options.name, source

    return _run(options, job, TEXTFILE_BPE_VOCAB_SIZE)


def _parser(program: str, description: str, bpe_vocab_size: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python {program}", description=description, allow_abbrev=False)
    parser.add_argument(
        "--tokenizer",
        default="bpe",
        metavar="NAME",
        help=f"{', '.join(tokenization.BUILT_IN)}, a folder with a Hugging Face tokenizer.json, or the Hub's owner/name of "
        "one; bpe is trained on the spot [bpe]",
    )
    parser.add_argument("--vocab_size", type=int, help=f"size of the bpe vocabulary [{bpe_vocab_size}]")
    parser.add_argument(
        "--val_fraction", type=float, default=VAL_FRACTION, help=f"share of the text kept for validation [{VAL_FRACTION}]"
    )
    parser.add_argument(
        "--out", type=_folder, metavar="DIR", help="write to this folder, which holds nothing else, instead of data/"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a dataset that was prepared there before; files that no prepare wrote are never replaced",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _folder(text: str) -> Path:
    """The folder that --out names."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; give the path of a folder")
    return Path(text).expanduser()


def _check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Usage errors that argparse does not see: exit code 2."""
    if options.vocab_size is not None and options.tokenizer != "bpe":
        parser.error(f"--vocab_size is for --tokenizer=bpe; the vocabulary of --tokenizer={options.tokenizer} is given")
    if not 0 < options.val_fraction < 1:
        parser.error(f"--val_fraction={options.val_fraction:g} is not between 0 and 1")
    local = options.tokenizer in tokenization.BUILT_IN or Path(options.tokenizer).expanduser().exists()
    if not local and not HUB_NAME.fullmatch(options.tokenizer):
        parser.error(
            f"--tokenizer={options.tokenizer} is neither {', '.join(tokenization.BUILT_IN)} nor an existing folder, nor an "
            "owner/name on the Hub"
        )


def _run(options: argparse.Namespace, job: Callable, bpe_vocab_size: int) -> int:
    """Prepare, print what was made, and turn an error into one sentence on stderr and exit code 1."""
    folder = options.out
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # terminated, it cleans up as when interrupted
        documents, folder, source = job()
        prepare(
            documents,
            folder,
            tokenizer=options.tokenizer,
            bpe_vocab_size=options.vocab_size or bpe_vocab_size,
            val_fraction=options.val_fraction,
            source=source,
            progress=sys.stderr is not None and sys.stderr.isatty(),
            overwrite=options.overwrite,
        )
        print(TokenDataset.open(folder.absolute()).describe())
        dataset = folder.name if folder.absolute().parent == DATA_DIR else shlex.quote(str(folder.absolute()))
        print(f"train with   python train.py --dataset={dataset}")
        return 0
    except KeyboardInterrupt:
        print("Interrupted: nothing was prepared.", file=sys.stderr)
        return 130
    except (DatasetError, ValueError, OSError) as error:
        if options.debug:
            raise
        if isinstance(error, OSError):
            error = (
                f"{error.strerror or error} ({error.filename or folder}); check that the file is readable, and "
                f"that {folder} may be written and has room."
            )
        print(f"error: {error}", file=sys.stderr)
        return 1
