"""Overfitting on a CPU in minutes: five models on 100 to 10,000 tokens of simple stories; docs/OVERFITTING.md has the lesson.

    python experiments/cpu_levels.py all                       # train, test, plot: five levels × 3 seeds
    python experiments/cpu_levels.py train --levels=1,2 --seeds=1
    python experiments/cpu_levels.py test --prompt="Mia saw a"
    python experiments/cpu_levels.py plot
    python experiments/cpu_levels.py generate --level=5 --prompt="Once upon a time"
    python experiments/cpu_levels.py train --levels=5 --dropout=0.3 --out_dir=out/dropout    # keys of train.py go to all runs

Without arguments, on a terminal: a menu. Everything is written below --out_dir: models/, outputs/, runs/. What is finished is
not done again, so an interrupted study goes on with the same command. Options of sample.py go through `generate`.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from any working directory

from command_line import Failure, Parser, UsageError, duration, guarded

OUT_DIR = "out/cpu_levels"
TOKENIZERS = ("bpe", "gpt2")
WHAT = {
    "train": "train the levels; their models are kept in models/",
    "test": "test the kept models on new stories and prompts: outputs/test_results_new_data.json",
    "plot": "draw outputs/training_curves.png",
    "generate": "continue a prompt with a kept model",
    "all": "train, test, plot",
}
GPT2_STORIES = 2_000  # by GPT-2's BPE only so many are prepared: the levels read 130 of them at most


# ------------------------------------------------------------------------------------------- command line


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="cpu_levels.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("what", nargs="?", choices=tuple(WHAT), help="; ".join(f"{key}: {text}" for key, text in WHAT.items()))
    parser.add_argument("--out_dir", default=OUT_DIR, metavar="DIR", help=f"where everything is written [{OUT_DIR}]")
    parser.add_argument(
        "--levels", type=_levels, metavar="1,3-5", help="which levels [all; of test and plot: all that are trained]"
    )
    parser.add_argument("--seeds", type=_from_one, default=3, metavar="N", help="runs of each level, with seeds 0 to N - 1 [3]")
    parser.add_argument(
        "--tokenizer", choices=TOKENIZERS, default="bpe", help="of the stories: a BPE of 1,024 trained on them, or GPT-2's [bpe]"
    )
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="for generate; for test, as often as you like")
    parser.add_argument("--text", metavar="FILE", help="for test: a new text of your own, in place of new stories")
    parser.add_argument("--level", type=_level, metavar="N", help="for generate: whose model [the highest that is trained]")
    parser.add_argument("--debug", action="store_true", help="errors with their traceback")
    return parser


def _level(text: str) -> int:
    if text not in ("1", "2", "3", "4", "5"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a level from 1 to 5")
    return int(text)


def _levels(text: str) -> tuple[int, ...]:
    """'1,3-5' → (1, 3, 4, 5)."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        ends = _level(first.strip()), _level((last if dash else first).strip())
        if ends[0] > ends[1]:
            raise argparse.ArgumentTypeError(f"{part!r} ends before it begins")
        found.update(range(ends[0], ends[1] + 1))
    return tuple(sorted(found))


def _from_one(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def check_options(options: argparse.Namespace, rest: Sequence[str]) -> None:
    """Raise UsageError where options do not go with what is to be done."""
    what, problems = options.what, []
    if not options.out_dir.strip():
        problems.append("--out_dir is empty; name a folder.")
    if options.level is not None and what != "generate":
        problems.append("--level is for generate; --levels=… chooses what is trained, tested and drawn.")
    if options.levels is not None and what == "generate":
        problems.append("generate takes one model: give --level=N.")
    if options.prompt and what not in ("test", "generate", "all"):
        problems.append("--prompt is for test and generate.")
    if what in ("test", "all") and any(not prompt.strip() or len(prompt.splitlines()) > 1 for prompt in options.prompt or ()):
        problems.append("A --prompt of test is one line that is not empty.")
    if options.text is not None and what not in ("test", "all"):
        problems.append("--text is for test.")
    if rest and what in ("test", "plot"):
        problems.append(f"{rest[0]} is not an option of {what}; --help shows what can be given.")
    if problems:
        raise UsageError("\n".join(problems))


# ------------------------------------------------------------------------------------------- what can be done


def train_levels(options: argparse.Namespace, rest: Sequence[str], levels: Sequence[int]) -> bool:
    """Train what is not finished. False, with a line that says how to go on, where somebody stopped it."""
    from configurator import parse_command_line
    from experiments.level_runs import Stopped, plan_runs, train_runs

    config_file, given, switches = parse_command_line(list(rest))
    if config_file is not None:
        raise UsageError(f"{config_file!r} is one argument too many: each level has its own config file.")
    if switches:
        raise UsageError(f"--{sorted(switches)[0]} is train.py's own; of this command: --help.")
    out_dir = Path(options.out_dir).expanduser()
    if options.tokenizer == "gpt2":
        if "dataset" in given:
            raise UsageError("--tokenizer says how the stories are encoded, and --dataset is another text; give one of them.")
        given["dataset"] = str(prepare_for_gpt2(out_dir))
    started, processor = time.monotonic(), time.process_time()
    try:
        train_runs(out_dir, plan_runs(out_dir, levels, options.seeds, given), lambda line: print(line, flush=True))
    except (Stopped, KeyboardInterrupt) as stop:
        print(f"Stopped; what is finished stays. To go on: {to_go_on(options, rest)}", flush=True)
        if isinstance(stop, KeyboardInterrupt):
            raise
        return False
    took = duration(time.monotonic() - started)
    print(f"trained in {took}, {duration(time.process_time() - processor)} of processor time; models: {out_dir / 'models'}")
    return True


def prepare_for_gpt2(out_dir: Path) -> Path:
    """The stories by GPT-2's BPE, below the study's out_dir. Raises Failure where its files cannot be had."""
    from data.preparation import embedded_options, embedded_source, prepare

    folder = out_dir / "data" / "stories_gpt2"
    chosen = dataclasses.replace(embedded_options("stories"), tokenizer="gpt2", bpe_vocab_size=None, max_samples=GPT2_STORIES)
    try:
        prepare(embedded_source("stories"), folder, chosen, only_if_missing=True)
    except ValueError as error:
        raise Failure(str(error)) from None
    return folder.absolute()


def show_tests(options: argparse.Namespace, levels: Sequence[int] | None) -> None:
    """Test the models; print the table and every sample of the first seed."""
    from experiments.level_tests import RESULTS, levels_table, test_models

    out_dir = Path(options.out_dir).expanduser()
    if options.text is not None and not Path(options.text).expanduser().is_file():
        raise UsageError(f"--text={options.text}: there is no such file.")
    document = test_models(out_dir, levels, options.prompt or (), options.text)
    first = {level["level"]: level["seeds"][0] for level in document["levels"]}
    for one in document["models"]:
        if one["seed"] == first[one["level"]]:
            print("\n".join(["", one["name"], *(f"    {written['text']!r}" for written in one["samples"])]))
    print(f"\n{levels_table(document['levels'])}\n")
    print("Medians over the seeds (least–most). quality: generated sentences that the grammar parses; … and new: those of them")
    print(f"that do not stand in the training text. All figures and samples: {out_dir / 'outputs' / RESULTS}")


def draw_curves(options: argparse.Namespace, levels: Sequence[int] | None) -> None:
    """Write the picture."""
    from experiments.level_plots import write_curves

    print(f"curves: {write_curves(Path(options.out_dir).expanduser(), levels)}")


def generate(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Continue a prompt by sample.py with a kept model, that of the first seed. Returns sample.py's exit code."""
    import sample
    from experiments.level_runs import read_index

    if len(options.prompt or ()) > 1:
        raise UsageError("generate takes one --prompt; sample.py's --prompts_file=FILE takes several.")
    out_dir = Path(options.out_dir).expanduser()
    entries = read_index(out_dir, None if options.level is None else (options.level,))
    chosen = min(entries, key=lambda entry: (-entry["level"], entry["seed"]))
    words = [f"--prompt={options.prompt[0]}"] if options.prompt else []
    usual = ["--device=cpu", "--dtype=float32", "--max_new_tokens=60", "--seed=0"]
    return sample.main([str(out_dir / "models" / chosen["name"]), *usual, *words, *rest])


def to_go_on(options: argparse.Namespace, rest: Sequence[str]) -> str:
    """The command that goes on with a study."""
    words = [options.what, f"--out_dir={options.out_dir}", f"--seeds={options.seeds}"]
    words += [f"--levels={','.join(map(str, options.levels))}"] if options.levels else []
    words += [f"--tokenizer={options.tokenizer}"] if options.tokenizer != "bpe" else []
    return shlex.join(["python", "experiments/cpu_levels.py", *words, *rest])


def do(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """What the options ask for; returns the exit code."""
    check_options(options, rest)
    if options.what == "generate":
        return generate(options, rest)
    if options.what in ("train", "all") and not train_levels(options, rest, options.levels or (1, 2, 3, 4, 5)):
        return 0
    if options.what in ("test", "all"):
        show_tests(options, options.levels)
    if options.what in ("plot", "all"):
        draw_curves(options, options.levels)
    return 0


# ------------------------------------------------------------------------------------------- the menu

MENU = (
    ("1", "train all five levels", ["train"]),
    ("2", "train one level, one seed", ["train", "--seeds=1"]),
    ("3", "test the saved models on new stories", ["test"]),
    ("4", "continue a prompt of yours", ["generate"]),
    ("5", "draw the curves", ["plot"]),
    ("6", "all of it: train, test, plot", ["all"]),
)


def menu(ask: Callable[[str], str] = input) -> int:
    """Ask what to do until somebody leaves; returns the exit code."""
    print(f"Five models on 100 to 10,000 tokens of simple stories; everything is written to {OUT_DIR}.")
    choices = {number: words for number, _, words in MENU}
    while True:
        print("\n" + "\n".join(f"  {number}  {text}" for number, text, _ in MENU) + "\n  q  leave")
        try:
            chosen = ask("What shall be done? ").strip().lower()
            if chosen in ("q", "quit", "exit"):
                return 0
            if chosen not in choices:
                print(f"{chosen!r} is none of {', '.join(choices)} and q.")
                continue
            words = list(choices[chosen])
            if chosen == "2":
                words.append(f"--levels={ask('Which level, 1 to 5? ').strip()}")
            if chosen == "4":
                words.append(f"--prompt={ask('The beginning of a story: ')}")
        except EOFError:
            print()
            return 0
        main(words)  # a sentence where it fails; then the menu is there again


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit code."""

    def job() -> int:
        options, rest = make_parser().parse_known_args(argv)
        if options.what is not None:
            return do(options, rest)
        if rest or argv:
            raise UsageError(f"Say first what is to be done: {', '.join(WHAT)}.")
        if not at_a_terminal():
            raise UsageError(f"Say what is to be done: {', '.join(WHAT)}; the menu is for a terminal. --help shows more.")
        return menu()

    return guarded("cpu_levels.py", list(argv), job)


def __getattr__(name: str) -> Any:
    """load_model("out/cpu_levels/models/…") → (model, tokenizer): `training.checkpoint.load_model`, imported when it is used."""
    if name != "load_model":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from training.checkpoint import load_model

    return load_model


def at_a_terminal() -> bool:
    """Whether a person can be asked."""
    streams: tuple[Any, ...] = (sys.stdin, sys.stdout)
    return all(stream is not None and stream.isatty() for stream in streams)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
