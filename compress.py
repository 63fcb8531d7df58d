"""Compress a pretrained model: find the layers that do least.

    python compress.py analyze out/quickstart --n=2                           # a run's own dataset
    python compress.py analyze MODEL --n=3 --dataset=pydocs --block_size=512 --samples=500 --json=a.json --plot=a.png
    python compress.py analyze openai-community/gpt2 --dataset=wikitext2 --criterion=linear_fit

MODEL is an out_dir or a checkpoint of this project, a Hugging Face folder, or a model's name on the Hub, of any family with a
list of decoder layers. For every block of n layers it is measured how alike what enters it and what leaves it are.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import Failure, Parser, UsageError, check_target, choose_device, guarded, labelled, printable, whole_number

if TYPE_CHECKING:
    from layer_pruning.analysis import Analysis
    from layer_pruning.decoder import Decoder
    from training.batch import Batch


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="compress.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    analyze = commands.add_parser("analyze", help="which block of layers does least", allow_abbrev=False)
    analyze.add_argument("model", metavar="MODEL", help="an out_dir, a checkpoint, a Hugging Face folder, or a name on the Hub")
    analyze.add_argument("--best", action="store_true", help="the best checkpoint of the out_dir, not the latest")
    analyze.add_argument("--n", type=whole_number, metavar="N", help="layers in the block [a quarter of the model's]")
    analyze.add_argument(
        "--criterion",
        default="cosine",
        metavar="NAME",
        help="what decides: cosine, block_influence, angular_last, linear_fit, block_ppl, random [cosine]",
    )
    analyze.add_argument(
        "--first",
        type=int,
        default=1,
        metavar="LAYER",
        help="the earliest layer at which the block may begin; layer 0, at the embedding's end, is redundant in no model [1]",
    )
    analyze.add_argument("--dataset", metavar="NAME", help="a prepared dataset of the model's tokenizer [that of the run]")
    analyze.add_argument("--split", choices=("train", "val"), default="train", help="its split [train]")
    analyze.add_argument("--samples", type=whole_number, default=500, metavar="N", help="sequences to measure on [500]")
    analyze.add_argument("--block_size", type=whole_number, metavar="T", help="tokens a sequence [512, or what the model takes]")
    analyze.add_argument("--batch_size", type=whole_number, default=4, metavar="B", help="sequences at a time [4]")
    analyze.add_argument("--seed", type=int, default=0, help="decides which sequences are read [0]")
    analyze.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N [auto]")
    analyze.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the computation [float32]"
    )
    analyze.add_argument("--json", metavar="FILE", help="write all figures there")
    analyze.add_argument("--plot", metavar="FILE", help="draw the cosine of every block of any length there (.png, .svg, .pdf)")
    analyze.add_argument("--debug", action="store_true", help="errors with their traceback")
    return parser


# ------------------------------------------------------------------------------------------- analyze


def run_analyze(options: argparse.Namespace) -> None:
    """Measure, print, write. Raises UsageError or Failure with a sentence."""
    from layer_pruning.analysis import analyze, block_starts, draw
    from layer_pruning.criteria import CRITERIA
    from layer_pruning.decoder import open_decoder
    from model_config import did_you_mean

    if options.criterion not in CRITERIA:
        raise UsageError(
            f"--criterion={options.criterion} is not known{did_you_mean(options.criterion, CRITERIA)}; there are "
            f"{', '.join(CRITERIA)}."
        )
    for name in ("json", "plot"):
        if getattr(options, name) is not None:
            check_target(f"--{name}", getattr(options, name))
    if options.plot is not None and Path(options.plot).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot={options.plot} is not a .png, .svg or .pdf.")
    decoder = open_decoder(options.model, choose_device(options.device), options.dtype, options.best)
    layers = len(decoder.layers)
    n = max(1, layers // 4) if options.n is None else options.n
    block_starts(layers, n, options.first)  # before anything is read
    batches, described = calibration_text(decoder, options)
    found = analyze(decoder, batches, n, options.criterion, options.first, options.seed)
    document = {
        **found.to_dict(),
        "model": {"name": options.model, **decoder.about},
        "text": described,
        "how": {"dtype": options.dtype, "device": str(decoder.device), "seed": options.seed},
    }
    print(printable(found_in_words(found, decoder, described)))
    if options.json is not None:
        Path(options.json).expanduser().write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        print(f"written to  {options.json}")
    if options.plot is not None:
        draw(found, Path(options.plot).expanduser(), f"{Path(options.model).name}: how alike what enters and leaves is")
        print(f"drawn to    {options.plot}")


def calibration_text(decoder: Decoder, options: argparse.Namespace) -> tuple[Iterator[Batch], dict[str, Any]]:
    """The sequences that are measured on, batch by batch, and what the JSON says of them. Raises UsageError or Failure."""
    from tqdm import tqdm

    from data.token_dataset import TokenDataset
    from training.data_loader import DataLoader

    name = options.dataset or decoder.about.get("dataset")
    if name is None:
        raise UsageError("Say what to measure on: --dataset=NAME, a prepared dataset of the model's tokenizer.")
    if "," in name:
        raise UsageError(f"The run was trained on a mixture ({name}); give one of its parts with --dataset.")
    dataset = TokenDataset.open(name, vocab_size=decoder.vocab_size)
    mine, theirs = decoder.tokenizer, dataset.tokenizer_fingerprint
    if mine is not None and theirs is not None and mine.fingerprint != theirs:
        raise Failure(
            f"The dataset {name} was made with another tokenizer ({dataset.tokenizer_name}) than the model's ({mine.name}), so "
            f"its ids mean something else to it; prepare it again with --tokenizer={decoder.folder}."
        )
    if options.block_size is not None and options.block_size > decoder.block_size:
        raise UsageError(f"--block_size={options.block_size} is more than the {decoder.block_size} tokens that the model takes.")
    block_size = options.block_size or min(512, decoder.block_size)
    split = dataset.split(options.split)
    loader = DataLoader(split, block_size, options.seed, vocab_size=decoder.vocab_size, prefetch=False)
    there_are = max(1, (len(split) - 1) // block_size)
    if options.samples > there_are:
        print(
            f"note: {split.label} has {there_are:,} sequences of {block_size} tokens, which are all that is measured on.",
            file=sys.stderr,
        )
    count = min(options.samples, there_are)

    def batches() -> Iterator[Batch]:
        with tqdm(total=count, unit=" sequences", disable=not sys.stderr.isatty(), leave=False) as bar:
            for first in range(0, count, options.batch_size):
                batch = loader.batch(first, min(options.batch_size, count - first))
                yield batch
                bar.update(len(batch))

    described = {
        "dataset": name,
        "split": options.split,
        "fingerprint": dataset.fingerprint,
        "samples": count,
        "block_size": block_size,
    }
    return batches(), described


def found_in_words(found: Analysis, decoder: Decoder, described: dict[str, Any]) -> str:
    """What was found, for people."""
    layers = f"{found.best} to {found.best + found.n - 1}" if found.n > 1 else str(found.best)
    about = labelled(
        [
            ("model", f"{decoder.name}, {decoder.about['architecture']}, {len(decoder.layers)} layers"),
            ("text", f"{described['samples']} sequences of {described['block_size']} tokens, {described['dataset']}"),
            ("criterion", found.criterion),
        ]
    )
    return f"{about}\n\n{found.table()}\n\nleast is done by layer{'s' * (found.n > 1)} {layers}"


def main(argv: list[str]) -> int:
    """Parse, then do what the command says; returns the exit code."""

    def job() -> int:
        run_analyze(make_parser().parse_args(argv))
        return 0

    return guarded("compress.py", argv, job, "Out of memory. Try a smaller --batch_size or --block_size, or --dtype=bfloat16.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
