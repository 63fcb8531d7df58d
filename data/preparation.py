"""Documents → dataset: what every data/*/prepare.py does, and `ensure_prepared` for embedded corpora.

One pass reads the documents, encodes them on several processes, and writes them in their order; memory stays small whatever
the size, but for the text that a BPE is trained on. Every few seconds what has been written is committed with the place in
the source, so a preparation that was killed goes on there and ends with the same bytes.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from command_line import short
from data import corpora, story_grammar, tokenization
from data.corpora import Document
from data.dataset_writer import STAGING, DatasetWriter, check_folder, finish_publishing, forget, locked, unfinished
from data.pipeline import Pipeline
from data.plan import BPE_VOCAB_SIZE, Options, Plan
from data.sources import Documents, Source, Splits
from data.token_dataset import DATA_DIR, PUBLISHING, DatasetError, is_prepared, read_meta, resolve_dataset


@dataclass(frozen=True)
class Corpus:
    """A corpus that needs no download: where its documents come from, and the size of BPE that suits it.

    validation: its documents for validation, where it has such of its own. version: what decides its text.
    """

    documents: Callable[[], Iterator[Document]]
    bpe_vocab_size: int
    summary: str
    validation: Callable[[], Iterator[Document]] | None = None
    version: str = f"Python {platform.python_version()}"

    @property
    def source(self) -> str:
        return f"{self.summary}, {self.version}"


EMBEDDED = {
    "pydocs": Corpus(corpora.pydocs_documents, 4096, "documentation topics and standard-library docstrings"),
    "pystdlib": Corpus(corpora.pystdlib_documents, 8192, "standard-library sources"),
    "stories": Corpus(
        story_grammar.training_stories,
        1024,
        f"{story_grammar.STORIES:,} simple stories",
        validation=story_grammar.validation_stories,
        version=f"grammar {story_grammar.fingerprint()}",
    ),
}


# ------------------------------------------------------------------------------------------- preparing


def prepare(
    documents: Source | Callable[[], Iterator[Document]],
    folder: str | os.PathLike,
    options: Options | None = None,
    *,
    source: str = "",
    num_proc: int | None = None,
    progress: bool = False,
    only_if_missing: bool = False,
    overwrite: bool = False,
    more: dict | None = None,
    **chosen,
) -> dict | None:
    """Tokenize documents into a dataset in `folder`; returns its meta.json (None if `only_if_missing` found one).

    documents: a source, or a function that starts an iteration over (name, text), always the same, described by `source`.
    options: what to make of them; single ones can be given by name instead (tokenizer="char").
    num_proc: processes that encode (None: this one alone, with the threads of the tokenizer's library).
    overwrite: replace a dataset that a prepare made, and put it beside other files; see `check_folder`. It also drops what an
    interrupted preparation of something else left there, which is refused otherwise.
    more: further facts for meta.json.

    One document is split by position; of more, whole documents go to validation, and each ends with the eos id and begins
    with the bos id of a tokenizer that has one. Where the same dataset lies there, finished, nothing is done.
    Safe against other processes preparing the same folder.
    """
    options = replace(options or Options(), **chosen)
    if options.tokenizer == "bpe" and options.bpe_vocab_size is None:
        options = replace(options, bpe_vocab_size=BPE_VOCAB_SIZE)
    if not isinstance(documents, Source):
        documents = Documents(documents, source)
    job = _Job(documents, Path(folder), options, num_proc, progress, overwrite, more or {})
    if not (job.folder / PUBLISHING).exists() and not only_if_missing and job.finished() is None:
        check_folder(job.folder, overwrite)  # before anything is written there
    with locked(job.folder):
        finish_publishing(job.folder)
        if only_if_missing:
            if is_prepared(job.folder):
                return None
            print(f"Preparing {job.folder} from {documents.description} …", file=sys.stderr, flush=True)
        if found := job.finished():
            print(f"{job.folder} is prepared already, from this source with these options.", file=sys.stderr)
            return found
        return job.run()


def ensure_prepared(name_or_path: str | os.PathLike) -> None:
    """Prepare a corpus that needs no download when it is asked for and not there yet; do nothing for any other dataset.

    Nor where nanoGPT's own files lie in its folder: they are a dataset too, and not ours to replace. Safe to call from many
    processes at once: one prepares, the others wait.
    """
    folder = resolve_dataset(name_or_path)
    name = folder.name
    if name not in EMBEDDED or folder.resolve() != DATA_DIR / name or is_prepared(folder):
        return
    if (folder / "train.bin").exists() and not (folder / PUBLISHING).exists():
        return
    try:
        prepare(embedded_source(name), folder, embedded_options(name), only_if_missing=True)
    except OSError as error:
        raise DatasetError(
            f"The dataset {name} cannot be written to {folder} ({error.strerror or error}); prepare it "
            f"elsewhere with python data/{name}/prepare.py --out=DIR, then use --dataset=DIR."
        ) from None


def embedded_source(name: str) -> Source:
    """The documents of a corpus that needs no download."""
    corpus = EMBEDDED[name]
    documents = Documents(corpus.documents, corpus.source, name)
    if corpus.validation is None:
        return documents
    return Splits({"train": documents, "val": Documents(corpus.validation, corpus.source, name)})


def embedded_options(name: str) -> Options:
    """How a corpus that needs no download is prepared. Its documents never change, so their numbers decide the split."""
    return Options(bpe_vocab_size=EMBEDDED[name].bpe_vocab_size, split_by="number")


class _Job:
    """One preparation: made from what `prepare` was given, done by `run()`."""

    def __init__(
        self, source: Source, folder: Path, options: Options, num_proc: int | None, progress: bool, overwrite: bool, more: dict
    ):
        self.source, self.folder, self.options = source, folder, options
        self.num_proc, self.progress, self.overwrite, self.more = num_proc, progress, overwrite, more
        identity = source.identity()
        self.identity = None if identity is None else {"source": identity, "options": asdict(options)}

    def prepared(self) -> dict:
        """What meta.json says of how the dataset was made: the same where it would come out the same."""
        return {"source": self.source.facts(), "options": asdict(self.options)}

    def finished(self) -> dict | None:
        """The meta.json of the dataset in the folder, if it is this very one and its source has not been touched since."""
        if self.identity is None or self.overwrite or not is_prepared(self.folder):
            return None
        try:
            meta = read_meta(self.folder)
        except DatasetError:
            return None
        made = (self.folder / "meta.json").stat().st_mtime
        return meta if meta.get("prepared") == self.prepared() and self.source.changed() <= made else None

    def run(self) -> dict:
        """Read, encode, write, publish; or go on where an earlier attempt was interrupted."""
        left = unfinished(self.folder)
        goes_on = left is not None and self.identity is not None and left["identity"] == self.identity
        if left is not None and not goes_on:
            if not self.overwrite:
                raise DatasetError(
                    f"{self.folder} holds an interrupted preparation from another source or with other options "
                    f"({_described(left)}). Repeat its command to go on with it, or drop it with --overwrite."
                )
            forget(self.folder)
        check_folder(self.folder, self.overwrite)
        plan = Plan(self.source, self.options)
        plan.look_through()
        coder = tokenization.load_tokenizer(self.folder / STAGING) if goes_on else plan.make_tokenizer()
        ends = dict(append_eos=plan.several and coder.eos_id is not None, prepend_bos=plan.several and coder.bos_id is not None)
        described = dict(source=self.source.description, shard_tokens=self.options.shard_tokens, identity=self.identity)
        with DatasetWriter(self.folder, coder, **ends, **described, overwrite=self.overwrite) as writer:
            pipeline = Pipeline(plan, writer, coder, self.num_proc, self.progress)
            pipeline.run()
            while moved := pipeline.document_for_the_empty_side():
                pipeline.begin_anew(moved)
                pipeline.run()
            dropped = {"duplicates": pipeline.state["dropped"]} if self.options.deduplicate else {}
            return writer.publish(prepared=self.prepared(), **dropped, **self.more)


def _described(left: dict) -> str:
    """An interrupted preparation in words: its tokenizer and how far it came."""
    tokens = sum(split["tokens"] for split in left["splits"].values())
    made = (left.get("identity") or {}).get("options", {}).get("tokenizer", "unknown tokenizer")
    return f"{made}, {short(tokens)} tokens so far"
