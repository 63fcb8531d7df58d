"""Look at a dataset: how large it is, what its documents are like, whether it is whole; or what a step of a run was trained on.

python data/show.py pydocs                               # statistics, lengths of documents, decoded samples
python data/show.py books:0.7,code:0.3 --samples=1       # a mixture, part by part
python data/show.py /mnt/copied --verify                 # every size, checksum and id of files that were copied
python data/show.py --run=out/quickstart --step=100      # the texts of the 100th step, decoded
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from any working directory

from command_line import Failure, Mandatory, Parser, UsageError, check_shape, guarded, parse_json, printable

NEEDED_OF_A_RUN = {
    "config": Mandatory({"block_size": Mandatory(int), "data_seed": Mandatory(int), "dataset": Mandatory(str)}),
    "dataset": Mandatory({"fingerprint": Mandatory(str), "order": int}),
    "tokens_per_iteration": Mandatory(int),
}

# ------------------------------------------------------------------------------------------- command line


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="data/show.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("dataset", nargs="?", help="a dataset or mixture, as --dataset of train.py takes it")
    parser.add_argument("--split", choices=("train", "val"), default="train", help="the split that is looked at [train]")
    parser.add_argument("--samples", type=_whole, default=3, metavar="N", help="decoded places to show [3]")
    parser.add_argument("--length", type=_whole, default=80, metavar="TOKENS", help="length of each [80]")
    parser.add_argument("--seed", type=int, default=1, help="which places are shown [1]")
    parser.add_argument("--verify", action="store_true", help="check every byte: sizes, checksums, ids, tokenizer")
    parser.add_argument("--run", metavar="DIR", help="a run's out_dir, or one of its .jsonl logs; with --step")
    parser.add_argument("--step", type=_whole, metavar="N", help="the step, counted from 1, whose sequences are shown")
    parser.add_argument("--rows", type=_whole, default=4, metavar="N", help="sequences of the step to show; 0: all [4]")
    parser.add_argument("--debug", action="store_true", help="errors with their traceback")
    return parser


def _whole(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def run(options: argparse.Namespace) -> None:
    """Do what was asked for. Raises UsageError or Failure with a sentence."""
    if (options.run is None) != (options.step is None):
        raise UsageError("--run and --step belong together: --run=out/quickstart --step=100.")
    if options.run is not None:
        if options.dataset is not None or options.verify:
            raise UsageError("--run names its dataset itself; give either a dataset or --run with --step.")
        show_step(Path(options.run).expanduser(), options.step, options.rows)
        return
    if options.dataset is None:
        raise UsageError("Name a dataset, such as pydocs, or a run with --run=DIR --step=N.")
    from data.looking import decoded, places, statistics
    from data.mixture import open_dataset

    whole = open_dataset(options.dataset)
    for dataset in whole.parts:
        print(printable(dataset.describe()))
        if options.verify:
            dataset.verify()
            checked = "every file is as meta.json says" if dataset.meta else "sizes and ids only: there is no meta.json"
            print(f"verified     {checked}")
            continue
        split = dataset.split(options.split)
        print(statistics(dataset, split))
        for start in places(split, options.samples, options.length, options.seed):
            ids = split.read(start, min(len(split), start + options.length))
            print(f"\n--- {split.name}, tokens {start:,} to {start + len(ids):,}")
            print(printable(decoded(dataset, ids)))


# ------------------------------------------------------------------------------------------- what a step has read


def show_step(where: Path, step: int, rows: int) -> None:
    """The sequences of a step of a run, decoded: the order is a function of the step, so nothing but the log is needed."""
    from data.looking import decoded
    from data.mixture import open_dataset
    from training.data_loader import DataLoader

    started, first, count = step_of(where, step)
    config, described = started["config"], started["dataset"]
    dataset = open_dataset(
        config["dataset"], max_train_tokens=config.get("max_train_tokens"), schedule=config.get("mixture_schedule")
    )
    if dataset.fingerprint != described["fingerprint"]:
        raise Failure(
            f"The dataset {config['dataset']} is not the one this run was trained on (its fingerprint is {dataset.fingerprint}, "
            f"the log has {described['fingerprint']}), so what the step read cannot be shown."
        )
    block_size = config["block_size"]
    loader = DataLoader(
        [part.split("train") for part in dataset.parts],
        block_size,
        config["data_seed"],
        order_version=described.get("order", 1),
        phases=dataset.phases,
        prefetch=False,
    )
    parts, starts = loader.order.places(first, count)
    inputs = loader.batch(first, count).inputs.numpy()
    print(f"step {step}: sequences {first:,} to {first + count:,} of {block_size:,} tokens")
    for number in range(count if rows == 0 else min(rows, count)):
        part = dataset.parts[parts[number]]
        print(f"\n--- sequence {first + number:,}: {printable(part.folder.name)}, from token {starts[number]:,} on")
        print(printable(decoded(part, inputs[number])))
    if rows and rows < count:
        print(f"\n(and {count - rows:,} more: --rows=0 shows them all)")


def step_of(where: Path, step: int) -> tuple[dict, int, int]:
    """(run_start, first sequence, number of sequences) of a step, from the last log that has it."""
    if where.suffix == ".json" and (beside := where.with_suffix(".jsonl")).is_file():
        where = beside
    from training_logger import EVENTS

    logs = [where] if where.is_file() else sorted(where.glob("run_*.jsonl"))
    if not logs:
        raise Failure(f"{where} has no run log (run_….jsonl); give the out_dir of a run.")
    for log in reversed(logs):
        started, steps = None, []
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                event = parse_json(line)
                check_shape(event, Mandatory({"event": Mandatory(str)}))
                check_shape(event, EVENTS.get(event["event"], {}))
            except ValueError:
                continue  # the last line of a killed run
            if event.get("event") == "run_start":
                started = event
            elif event.get("event") == "step":
                steps.append((event["step"], event["tokens"]))
        if started is None:
            continue
        before = (started.get("resumed_from") or {}).get("step", 0)
        steps = [(number, tokens) for number, tokens in steps if number >= step > before]
        if steps:
            number, tokens = steps[0]
            try:
                check_shape(started, NEEDED_OF_A_RUN)
                block_size = started["config"]["block_size"]
                count = started["tokens_per_iteration"] // block_size
                first = tokens // block_size - (number - step + 1) * count
                if count < 1 or first < 0:
                    raise ValueError(f"{tokens} tokens after step {number}")
            except (ValueError, ZeroDivisionError) as error:
                raise Failure(f"{log} does not say what its steps have read ({error}): it is damaged.") from None
            return started, first, count
    raise Failure(f"No log of {where} has come to step {step} (steps are counted from 1).")


def main(argv: list[str]) -> int:
    """Parse, then show; returns the exit code."""

    def job() -> int:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")
        run(make_parser().parse_args(argv))
        return 0

    return guarded("data/show.py", argv, job)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
