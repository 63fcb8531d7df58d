"""The command line of every data/*/prepare.py: a `Recipe` says where the text comes from and how it is prepared."""

from __future__ import annotations

import argparse
import os
import runpy
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from command_line import Parser, UsageError, whole_number
from data import tokenization
from data.dataset_writer import unfinished
from data.estimate import forecast
from data.hub import HUB_NAME
from data.plan import BPE_VOCAB_SIZE, Options
from data.preparation import EMBEDDED, embedded_options, embedded_source, prepare
from data.sources import TEXT_SUFFIXES, Source, TextFiles, find_text_files
from data.token_dataset import DATA_DIR, DatasetError, TokenDataset

POOL_FROM = 32 * 2**20  # bytes of files from which on several processes are worth starting


@dataclass(frozen=True)
class Recipe:
    """How a data/<name>/prepare.py makes its dataset.

    open: the source, from the options of the command line (`source` is a local copy or None, and what `arguments` adds);
    DatasetError if it cannot be reached. options: its tokenizer and the rest. local: whether a local copy can be given.
    size: what is published about its size, for --dry_run.
    """

    name: str
    summary: str
    open: Callable[[argparse.Namespace], Source]
    options: Options = Options()
    arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    local: bool = True
    size: str = ""


def embedded(name: str) -> Recipe:
    """The recipe of a corpus that needs no download."""
    corpus = EMBEDDED[name]
    summary = f"{corpus.summary} of this Python" if corpus.version.startswith("Python") else corpus.summary
    return Recipe(name, summary, lambda given: embedded_source(name), embedded_options(name), local=False)


def run_recipe(recipe: Recipe, arguments: Sequence[str] | None = None) -> int:
    """The command of a recipe; returns the exit code: 1 after an error, 2 for wrong usage, 130 if interrupted."""
    parser = recipe_parser(recipe)
    try:
        given = parser.parse_args(arguments)
        options = options_of(parser, recipe, given)
    except UsageError as error:
        return refused(error)
    return report_errors(given, given.out or DATA_DIR / recipe.name, lambda folder: work(recipe, given, options, folder))


def work(recipe: Recipe, given: argparse.Namespace, options: Options, folder: Path) -> None:
    """Open the source, then prepare it, or (--dry_run) say what that would take."""
    source, more = open_source(recipe, given)
    if given.dry_run:
        print(f"{'source':<11}{source.description}")
        print(forecast(source, options, processes(given, source)).report())
        if recipe.size and "fallback" not in more:
            print(f"{'published':<11}{recipe.size}")
        return
    watched = sys.stderr is not None
    prepare(
        source,
        folder,
        options,
        num_proc=processes(given, source),
        progress=watched,
        overwrite=given.overwrite,
        more=more,
    )
    print(TokenDataset.open(folder.absolute()).describe())
    dataset = folder.name if folder.absolute().parent == DATA_DIR else shlex.quote(str(folder.absolute()))
    print(f"train with   python train.py --dataset={dataset}")


def open_source(recipe: Recipe, given: argparse.Namespace) -> tuple[Source, dict]:
    """The recipe's source, or the first of --fallback that can be reached; and what meta.json says of that."""
    try:
        source = recipe.open(given)
        next(iter(source.read()), None)  # to find out before anything is written
        return source, {}
    except DatasetError as error:
        reason = error
        if not given.fallback:
            raise
    print(f"warning: {reason}", file=sys.stderr)
    for name in given.fallback:
        other = recipe_called(name)
        try:
            source = other.open(argparse.Namespace(**{**vars(other_defaults(other)), "source": None}))
            next(iter(source.read()), None)
        except DatasetError as error:
            print(f"warning: {error}", file=sys.stderr)
            continue
        print(f"warning: {name} is prepared in place of {recipe.name}, as --fallback says.", file=sys.stderr)
        return source, {"fallback": {"instead_of": recipe.name, "used": name, "reason": str(reason)}}
    raise DatasetError(f"None of --fallback={','.join(given.fallback)} can be reached either; the reasons are above.")


def recipe_called(name: str) -> Recipe:
    """The recipe of data/<name>/prepare.py. Raises DatasetError if there is none."""
    if not (DATA_DIR / name / "prepare.py").is_file() or name == "textfile":
        raise DatasetError(f"--fallback={name}: there is no data/{name}/prepare.py.")
    return runpy.run_path(str(DATA_DIR / name / "prepare.py"))["RECIPE"]


def other_defaults(recipe: Recipe) -> argparse.Namespace:
    """The options of a recipe as if its command had been given none."""
    return recipe_parser(recipe).parse_args([])


# ------------------------------------------------------------------------------------------- one's own texts


def run_textfile(arguments: Sequence[str] | None = None) -> int:
    """The command of data/textfile/prepare.py. Returns the exit code."""

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "files", nargs="+", metavar="FILE", help="a file, folder or glob; or a dataset's owner/name on the Hub"
        )
        parser.add_argument("--name", help="write to data/NAME; train with --dataset=NAME")
        parser.add_argument("--config", metavar="NAME", help="the configuration of a dataset on the Hub")
        parser.add_argument("--split", default="train", help="the split of a dataset on the Hub [train]")

    summary = "your own texts: .txt (a file is one document), .jsonl and .jsonl.zst (a line), .csv and .parquet (a row)"
    recipe = Recipe("textfile", summary, open_files, arguments=more, local=False)
    parser = recipe_parser(recipe)
    try:
        given = parser.parse_args(arguments)
        options = options_of(parser, recipe, given)
        if (given.name is None) == (given.out is None):
            parser.error("give either --name=NAME (written to data/NAME) or --out=DIR")
        name = given.name
        plain = name is None or (Path(name).name == name.strip() and name not in ("", ".", ".."))
        if not plain or (name is not None and (DATA_DIR / name / "prepare.py").exists()):
            parser.error(f"--name={name} is taken or not a plain name; choose another one, or give --out=DIR")
    except UsageError as error:
        return refused(error)
    return report_errors(given, given.out or DATA_DIR / name, lambda folder: work(recipe, given, options, folder))


def open_files(given: argparse.Namespace) -> Source:
    """The files that were named, or a dataset on the Hub."""
    named = given.files[0]
    a_file = Path(named).expanduser().exists() or named.lower().endswith(TEXT_SUFFIXES)
    if len(given.files) == 1 and HUB_NAME.fullmatch(named) and not a_file:
        from data.hub import HubRows

        return HubRows(named, given.split, config=given.config, text_key=given.text_key)
    return TextFiles(find_text_files(given.files), given.text_key)


# ------------------------------------------------------------------------------------------- options


def recipe_parser(recipe: Recipe) -> Parser:
    """The options that all have, and those of this recipe."""
    default = recipe.options
    parser = Parser(prog=f"python data/{recipe.name}/prepare.py", description=f"Prepare {recipe.summary}.", allow_abbrev=False)
    recipe.arguments(parser)
    parser.add_argument(
        "--tokenizer",
        default=default.tokenizer,
        metavar="NAME",
        help=f"{', '.join(tokenization.BUILT_IN)}, a folder with a Hugging Face tokenizer.json, or the Hub's owner/name of "
        f"one; bpe is trained on the spot [{default.tokenizer}]",
    )
    size = default.bpe_vocab_size or BPE_VOCAB_SIZE
    parser.add_argument("--vocab_size", type=int, help=f"size of the bpe vocabulary [{size}]")
    if recipe.name == "textfile":
        parser.add_argument("--text_key", default="text", metavar="KEY", help="the field or column with the text [text]")
    parser.add_argument(
        "--val_fraction",
        type=float,
        default=default.val_fraction,
        help=f"share of the documents (of a single one: of its text) kept for validation, where the source has no validation "
        f"split [{default.val_fraction:g}]",
    )
    number = dict(type=whole_number, metavar="N")
    parser.add_argument(
        "--max_tokens",
        **number,
        help="stop after the document that reaches N tokens, such as 1e9; where the source has a validation split of its "
        "own: N of training, and val_fraction × N of validation at most",
    )
    parser.add_argument("--max_samples", **number, help="only the first N documents; of a source with splits as --max_tokens")
    parser.add_argument(
        "--deduplicate", action="store_true", help="drop documents whose text came before; takes 100 bytes of memory each"
    )
    parser.add_argument("--shard_tokens", **number, default=default.shard_tokens, help="start a new file after N tokens")
    parser.add_argument("--num_proc", **number, help="processes that encode [one a core]")
    parser.add_argument("--dry_run", action="store_true", help="say what it takes (download, disk, tokens, time); write nothing")
    if recipe.local:
        parser.add_argument("--source", type=_folder, metavar="DIR", help="a local copy, laid out as on the Hub")
    parser.add_argument(
        "--fallback",
        type=lambda text: [name for name in text.split(",") if name],
        default=[],
        metavar="NAME,…",
        help="datasets of data/ to prepare in its place, the first that can be reached, if this one cannot",
    )
    parser.add_argument(
        "--out", type=_folder, metavar="DIR", help="write to this folder, which holds nothing else, instead of data/"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a dataset that was prepared there before, and drop an interrupted preparation; files that no prepare "
        "wrote are never replaced",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _folder(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; give the path of a folder")
    return Path(text).expanduser()


def options_of(parser: argparse.ArgumentParser, recipe: Recipe, given: argparse.Namespace) -> Options:
    """What decides the content of the dataset. Raises UsageError for what argparse does not see."""
    if given.vocab_size is not None and given.tokenizer != "bpe":
        parser.error(f"--vocab_size is for --tokenizer=bpe; the vocabulary of --tokenizer={given.tokenizer} is given")
    if not 0 < given.val_fraction < 1:
        parser.error(f"--val_fraction={given.val_fraction:g} is not between 0 and 1")
    local = given.tokenizer in tokenization.BUILT_IN or Path(given.tokenizer).expanduser().exists()
    if not local and not HUB_NAME.fullmatch(given.tokenizer):
        parser.error(
            f"--tokenizer={given.tokenizer} is neither {', '.join(tokenization.BUILT_IN)} nor an existing folder, nor an "
            "owner/name on the Hub"
        )
    for name in given.fallback:
        if name in ("textfile", recipe.name) or not (DATA_DIR / name / "prepare.py").is_file():
            parser.error(f"--fallback={name}: there is no other data/{name}/prepare.py")
    size = None
    if given.tokenizer == "bpe":
        size = (recipe.options.bpe_vocab_size or BPE_VOCAB_SIZE) if given.vocab_size is None else given.vocab_size
    return replace(
        recipe.options,
        tokenizer=given.tokenizer,
        bpe_vocab_size=size,
        val_fraction=given.val_fraction,
        max_tokens=given.max_tokens,
        max_samples=given.max_samples,
        deduplicate=given.deduplicate,
        shard_tokens=given.shard_tokens,
    )


def processes(given: argparse.Namespace, source: Source) -> int | None:
    """How many processes encode: those asked for, else one a core, but none besides this one for little text."""
    if given.num_proc is not None:
        return given.num_proc
    if isinstance(source, TextFiles) and sum(file.stat().st_size for file in source.files) < POOL_FROM:
        return None
    return None if source.identity() is not None and "documents" in source.identity() else os.cpu_count()


# ------------------------------------------------------------------------------------------- failing


def refused(error: UsageError) -> int:
    """Say what is wrong with a command line; returns the exit code."""
    print(f"error: {error}", file=sys.stderr)
    return 2


def report_errors(given: argparse.Namespace, folder: Path, job: Callable[[Path], None]) -> int:
    """Do a job; an error becomes one sentence on stderr. Returns the exit code."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # terminated, it cleans up as when interrupted
    try:
        job(folder)
        return 0
    except KeyboardInterrupt:
        left = unfinished(folder)
        if left is None:
            print("Interrupted: nothing was prepared.", file=sys.stderr)
        else:
            tokens = sum(split["tokens"] for split in left["splits"].values())
            print(f"Interrupted: the same command goes on after {tokens:,} tokens.", file=sys.stderr)
        return 130
    except (DatasetError, ValueError, OSError) as error:
        if given.debug:
            raise
        if isinstance(error, OSError):
            error = (
                f"{error.strerror or error} ({error.filename or folder}); check that the file is readable, and "
                f"that {folder} may be written and has room."
            )
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
