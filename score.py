"""Score a model on a text: loss, perplexity, bits per byte, perplexity of words.

    python score.py out/quickstart                                  # an out_dir, on its own dataset's validation split
    python score.py out/quickstart --text=README.md --stride=64     # a text; each token sees 192 of 256 tokens at least
    python score.py out/quickstart --dataset=wikitext2 --split=val
    python score.py openai-community/gpt2 --text=wiki.txt --stride=512 --json=gpt2.json   # a model on the Hub, or a folder

Without --stride windows of the context's length are read side by side; with it they overlap, and each token is predicted
once, from context - stride tokens at least. Scores of an out_dir are written there (score_….json), with the step and the
fingerprint of the weights; compare_architectures.py shows them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import Failure, Parser, UsageError, check_target, choose_device, guarded, labelled, printable, whole_number

if TYPE_CHECKING:
    from data.tokenization import Tokenizer
    from training.scoring import Stream

FORMAT_VERSION = 1


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="score.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="an out_dir, a checkpoint, a Hugging Face folder, or the Hub's owner/name of a model")
    parser.add_argument("--best", action="store_true", help="the best checkpoint of the out_dir, not the latest")
    what = parser.add_argument_group(
        "the text (default: the validation split that the run was evaluated on; of a mixture, name a part with --dataset)"
    )
    what.add_argument("--text", metavar="FILE", help="a .txt, .jsonl, .csv or .parquet file, encoded by the model's tokenizer")
    what.add_argument("--text_key", default="text", metavar="KEY", help="the field or column with the text [text]")
    what.add_argument("--dataset", metavar="NAME", help="a prepared dataset")
    what.add_argument("--split", choices=("train", "val"), default="val", help="its split [val]")
    what.add_argument("--max_tokens", type=whole_number, metavar="N", help="only the first N tokens")
    how = parser.add_argument_group("how")
    how.add_argument("--context", type=whole_number, metavar="N", help="tokens that a window holds [the model's block_size]")
    how.add_argument("--stride", type=whole_number, metavar="N", help="by how much a window moves, at most the context")
    how.add_argument("--batch_size", type=whole_number, default=8, metavar="N", help="windows at a time [8]")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N [auto]")
    how.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the computation [float32]"
    )
    how.add_argument("--json", metavar="FILE", help="where the score is written [beside the run; nowhere for other models]")
    how.add_argument("--debug", action="store_true", help="errors with their traceback")
    return parser


def run(options: argparse.Namespace) -> None:
    """Load the model and the text, score, print, write. Raises UsageError or Failure with a sentence."""
    import torch

    from model_builder import COMPUTE_DTYPES
    from training.checkpoint import find_checkpoint, load_model
    from training.huggingface_files import find_folder, is_folder
    from training.manifest import read_state
    from training.precision import set_compute_dtype
    from training.scoring import score_stream, weights_fingerprint

    if options.text is not None and options.dataset is not None:
        raise UsageError("Give either --text or --dataset.")
    if options.json is not None:
        check_target("--json", options.json)
    device, place = choose_device(options.device), Path(options.model).expanduser()
    state: dict[str, Any] = {}
    if place.exists() and not is_folder(place):
        place = find_checkpoint(place, which="best" if options.best else "latest", holding="model")
        state = read_state(place)
    elif options.best:
        raise UsageError("--best is asked of an out_dir, which this is not.")
    else:
        place = find_folder(options.model)
    model, tokenizer = load_model(place, device)
    set_compute_dtype(model, COMPUTE_DTYPES[options.dtype])
    context = options.context or model.config.block_size
    if context > model.config.block_size or context < 2:
        raise UsageError(f"--context={context} is not from 2 to the model's block_size={model.config.block_size}.")
    if options.stride is not None and options.stride > context:
        raise UsageError(f"--stride={options.stride} is more than the context of {context}, so tokens would be left out.")
    stream, described, tokenizer = text_to_score(options, state, tokenizer, model.config.vocab_size)
    if options.max_tokens is not None:
        stream = _First(stream, options.max_tokens)
    with torch.inference_mode():
        found = score_stream(
            model, stream, tokenizer, context=context, stride=options.stride, batch_size=options.batch_size, device=device
        )
    document = {
        "format_version": FORMAT_VERSION,
        "model": {
            "name": options.model,
            "architecture": model.config.name,
            "step": state.get("step"),
            "run": state.get("run"),
            "weights": weights_fingerprint(model),
        },
        "text": {**described, "max_tokens": options.max_tokens},
        "how": {"context": context, "stride": options.stride, "dtype": options.dtype, "device": str(device)},
        "score": found.to_dict(),
    }
    print(printable(score_text(document)))
    if target := write_score(document, options.json, place if state else None):
        print(f"written to  {target}")


class _First:
    """The beginning of a stream."""

    def __init__(self, stream: Stream, tokens: int):
        self.stream, self.tokens = stream, min(tokens, len(stream))

    def __len__(self) -> int:
        return self.tokens

    def read(self, start: int, stop: int):
        return self.stream.read(start, stop)


def text_to_score(
    options: argparse.Namespace, state: dict[str, Any], tokenizer: Tokenizer | None, vocab_size: int
) -> tuple[Stream, dict[str, Any], Tokenizer | None]:
    """The tokens that were asked for, what the score says of them, and the tokenizer that counts their bytes and words.

    Raises Failure where the tokens are not this model's.
    """
    if options.text is not None:
        if tokenizer is None:
            raise Failure("This model has no tokenizer, so it can be scored on a --dataset only, not on a text.")
        return *encoded_text(options.text, tokenizer, options.text_key), tokenizer
    from data.token_dataset import TokenDataset

    name = options.dataset or (state.get("config") or {}).get("dataset")
    if name is None:
        raise UsageError("Say what to score the model on: --text=FILE or --dataset=NAME.")
    if "," in name:
        raise UsageError(f"The run was trained on a mixture ({name}); give one of its parts with --dataset.")
    dataset = TokenDataset.open(name, vocab_size=vocab_size)
    theirs = dataset.tokenizer_fingerprint
    if tokenizer is not None and theirs is not None and theirs != tokenizer.fingerprint:
        raise Failure(
            f"The dataset {name} was made with another tokenizer ({dataset.tokenizer_name}) than the model's ({tokenizer.name}), "
            "so its ids mean something else to it; give its text with --text=FILE."
        )
    if tokenizer is None and (state.get("dataset") or {}).get("fingerprint") != dataset.fingerprint:
        print(
            f"warning: this model has no tokenizer, so nobody can tell whether it knows the ids of {name} "
            f"({dataset.tokenizer_name}); with another tokenizer's the score means nothing.",
            file=sys.stderr,
        )
    if dataset.stand_in:
        print(f"warning: {dataset.stand_in}.", file=sys.stderr)
    described = {"kind": "dataset", "name": name, "split": options.split, "fingerprint": dataset.fingerprint}
    return dataset.split(options.split), described, tokenizer or dataset.tokenizer()


def encoded_text(path: str, tokenizer: Tokenizer, text_key: str = "text") -> tuple[Stream, dict[str, Any]]:
    """A file's documents as one stream, as a dataset of them would be: several end with the eos id, bos begins each."""
    import numpy as np

    from data.files import sha256
    from data.sources import TextFiles, find_text_files
    from training.scoring import TokenList

    before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    documents: list[np.ndarray] = []
    pieces: list[str] = []
    try:
        files = find_text_files([path])
        for piece in TextFiles(files, text_key).read():
            pieces.append(piece.text)
            if piece.ends:
                documents.append(np.array([*before, *tokenizer.encode("".join(pieces))], dtype=np.int64))
                pieces.clear()
    except ValueError as error:
        raise Failure(str(error)) from None
    if len(documents) > 1 and tokenizer.eos_id is not None:
        documents = [np.append(document, tokenizer.eos_id) for document in documents]
    described = {"kind": "text", "name": path, "sha256": [sha256(file)[:16] for file in files], "documents": len(documents)}
    return TokenList(np.concatenate(documents)), described


def score_text(document: dict[str, Any]) -> str:
    """A score for people."""
    model, text, how, score = (document[key] for key in ("model", "text", "how", "score"))
    step = "" if model["step"] is None else f", step {model['step']}"
    windows = "side by side" if how["stride"] is None else f"every {how['stride']}"

    def figure(key: str) -> str:
        value = score[key]
        return "unknown" if value is None else f"{value:.4f}" if value < 1e6 else f"{value:.4g}"

    return labelled(
        [
            ("model", f"{model['name']}{step}, weights {model['weights']}"),
            ("text", f"{text['name']}{' (' + text['split'] + ')' if 'split' in text else ''}"),
            ("windows", f"{how['context']} tokens, {windows}, {how['dtype']}"),
            (
                "scored",
                f"{score['tokens']:,} tokens"
                + ("" if score["bytes"] is None else f", {score['bytes']:,} bytes, {score['words']:,} words"),
            ),
            ("loss", f"{score['loss']:.4f} nats a token"),
            ("perplexity", f"{figure('perplexity')} a token, {figure('word_perplexity')} a word"),
            ("bits/byte", figure("bits_per_byte")),
        ]
    )


def write_score(document: dict[str, Any], asked: str | None, checkpoint: Path | None) -> Path | None:
    """Write a score to the file asked for, or beside the run of a checkpoint; returns where, None for nowhere."""
    import hashlib
    import json
    import math
    import os

    if asked is None and checkpoint is None:
        return None
    score = {key: None if value in (math.inf, -math.inf) or value != value else value for key, value in document["score"].items()}
    text = json.dumps({**document, "score": score}, indent=2, allow_nan=False) + "\n"  # JSON has no infinity
    if asked is not None:
        target = Path(asked).expanduser()
    else:
        about = json.dumps([document["model"]["weights"], document["text"], document["how"]], sort_keys=True)
        out_dir = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint
        target = out_dir / f"score_{hashlib.sha256(about.encode()).hexdigest()[:12]}.json"  # the same question, the same file
    temporary = target.with_name(target.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, target)
    return target


def main(argv: list[str]) -> int:
    """Parse, then score; returns the exit code."""

    def job() -> int:
        run(make_parser().parse_args(argv))
        return 0

    return guarded("score.py", argv, job, "Out of memory. Try a smaller --batch_size or --context, or --dtype=bfloat16.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
