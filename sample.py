"""Text from a checkpoint.

    python sample.py out/quickstart --prompt="The function returns"     # an out_dir, or one checkpoint folder
    python sample.py --out_dir=out/quickstart --start=FILE:prompt.txt   # as with nanoGPT
    echo "To be" | python sample.py out/shakespeare --num_samples=3 --temperature=0.7 --top_p=0.9
    python sample.py out/quickstart --prompts_file=prompts.txt --speed  # a prompt a line, all in one batch
    python sample.py --compare out/a out/b --prompt="The function"      # two models side by side

stdout gets the prompt and its continuation, samples separated by a line of dashes, and nothing else. Sample i is drawn
with seed + i, so it does not depend on num_samples. A prompt read from a file or stdin loses one final line break.
"""

from __future__ import annotations

import argparse
import io
import itertools
import math
import os
import re
import shutil
import stat
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING

from command_line import Failure, Parser, UsageError, choose_device, guarded, printable
from model_config import did_you_mean

if TYPE_CHECKING:
    import torch

    from data.tokenization import StreamDecoder, Tokenizer

SEPARATOR = "---------------"  # nanoGPT's

# option → (type, which values it can have, that in words)
VALUES = {
    "num_samples": (int, lambda n: n >= 1, "a whole number from 1 on"),
    "max_new_tokens": (int, lambda n: n >= 1, "a whole number from 1 on"),
    "temperature": (float, lambda t: 0 <= t < math.inf, "a number from 0 on; 0 always takes the likeliest token"),
    "top_k": (int, lambda k: k >= 1, "a whole number from 1 on, or 'none' for all tokens"),
    "top_p": (float, lambda p: 0 < p <= 1, "a number above 0 and up to 1"),
    "repetition_penalty": (float, lambda r: 0 < r < math.inf, "a positive number; 1 is no penalty"),
    "seed": (int, lambda s: 0 <= s < 2**62, "a whole number from 0 on"),
    "device": (str, re.compile(r"auto|cpu|mps|cuda(:\d+)?").fullmatch, "auto, cpu, cuda, cuda:N or mps"),
    "dtype": (str, re.compile("auto|float32|bfloat16|float16").fullmatch, "auto, float32, bfloat16 or float16"),
}


# ------------------------------------------------------------------------------------------- command line


def make_parser() -> Parser:
    """The command line; numbers stay text here, so that all their problems can be told at once."""
    parser = Parser(
        prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    where = parser.add_argument_group("the model")
    where.add_argument("checkpoint", nargs="?", help="an out_dir or a checkpoint folder (default: out)")
    where.add_argument("--out_dir", metavar="DIR", help="the out_dir, given by name as for train.py")
    where.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two models on the same prompts, side by side")
    where.add_argument("--best", action="store_true", help="the best checkpoint of the out_dir, not the latest")
    where.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps (default: auto)")
    where.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 (default: auto)")
    prompt = parser.add_argument_group("the prompt (default: what is piped in, else the end-of-text token)")
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue; - reads it from stdin")
    prompt.add_argument(
        "--start", metavar="TEXT", help="text to continue, as nanoGPT takes it; FILE:prompt.txt reads it from a file"
    )
    prompt.add_argument("--prompt_file", metavar="FILE", help="file with the text to continue")
    prompt.add_argument("--prompts_file", metavar="FILE", help="file with a prompt a line, continued in one batch")
    prompt.add_argument("--prompt_ids", metavar="1,2,3", help="token ids to continue (where there is no tokenizer)")
    how = parser.add_argument_group("sampling")
    how.add_argument("--num_samples", metavar="N", default="1", help="continuations of each prompt (default: 1)")
    how.add_argument("--max_new_tokens", metavar="N", default="200", help="tokens to add at most (default: 200)")
    how.add_argument("--temperature", metavar="X", default="0.8", help="0 is greedy (default: 0.8)")
    how.add_argument("--top_k", metavar="K", default="200", help="only the K likeliest tokens; none: all of them (default: 200)")
    how.add_argument(
        "--top_p", metavar="P", default="1", help="only the likeliest tokens whose probabilities add up to P (default: 1)"
    )
    how.add_argument(
        "--repetition_penalty", metavar="X", default="1", help="above 1, tokens seen before get less likely (default: 1)"
    )
    how.add_argument("--seed", metavar="N", default="1337", help="sample i uses seed + i (default: 1337)")
    end = how.add_mutually_exclusive_group()
    end.add_argument("--stop_at_eos", action="store_true", default=True, help="end at the end-of-text token (default)")
    end.add_argument("--ignore_eos", dest="stop_at_eos", action="store_false", help="go on after the end-of-text token")
    how.add_argument("--no_stream", dest="stream", action="store_false", help="print a sample when it is complete")
    how.add_argument(
        "--no_cache", dest="cache", action="store_false", help="compute keys and values of all tokens again for each new token"
    )
    how.add_argument("--speed", action="store_true", help="print the speed on stderr (on a terminal it is printed anyway)")
    how.add_argument("--debug", action="store_true", help="errors with their traceback")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """argv → options: values converted and checked, `prompt` read (or None) and `ids` (or None).

    Raises UsageError with every problem found.
    """
    parser = make_parser()
    options, unknown = parser.parse_known_args([underscored(word) for word in argv])
    known = [option.removeprefix("--") for action in parser._actions for option in action.option_strings]
    problems = []
    for word in unknown:
        key = word.removeprefix("--").partition("=")[0]
        problems.append(
            f'{word!r} is one argument too many; the prompt goes into --prompt="…".'
            if key == word
            else f"--{key} is not an option{did_you_mean(key, known)}. --help lists them all."
        )
    for key, (kind, allowed, meaning) in VALUES.items():
        text = getattr(options, key)
        try:
            value = None if key == "top_k" and text.lower() == "none" else kind(text)
            if value is not None and not allowed(value):
                raise ValueError
            setattr(options, key, value)
        except ValueError:
            problems.append(f"{key}={text!r} must be {meaning}.")
    places = [place for place in (options.checkpoint, options.out_dir) if place is not None]
    if len(places) > 1:
        problems.append(f"{places[0]!r} and --out_dir={places[1]!r} both say where the model is; give one of them.")
    if options.compare and places:
        problems.append(f"--compare names both models, so {places[0]!r} is one too many.")
    options.checkpoint = places[0] if places else "out"
    options.ids = options.prompts = None
    try:
        options.prompt = read_prompt(options)
    except UsageError as error:
        problems.append(str(error))
    if problems:
        raise UsageError("\n".join(problems))
    return options


def underscored(word: str) -> str:
    """--top-k=5 → --top_k=5; anything else stays as it is."""
    key, equals, value = word.partition("=")
    return "--" + key[2:].replace("-", "_") + equals + value if key.startswith("--") else word


def read_prompt(options: argparse.Namespace) -> str | None:
    """The text to continue, "" if none is given; None and `options.ids` where it is given as ids. Raises UsageError."""
    sources = ("prompt", "start", "prompt_file", "prompts_file", "prompt_ids")
    given = {source: getattr(options, source) for source in sources if getattr(options, source) is not None}
    if len(given) > 1:
        raise UsageError(f"{' and '.join(f'--{source}' for source in given)} each give a prompt; use one of them.")
    source, text = next(iter(given.items())) if given else ("prompt", "-" if stdin_is_piped() else "")
    try:
        if source == "prompt_ids":
            options.ids = [int(word) for word in text.split(",")]
            return None
        if source == "prompts_file":
            source = "file"
            options.prompts = [line for line in Path(text).expanduser().read_text(encoding="utf-8").splitlines() if line]
            if not options.prompts:
                raise UsageError(f"The file {text!r} has no prompts; write one a line.")
            return ""
        if source == "prompt_file" or (source == "start" and text.startswith("FILE:")):
            source, text = "file", text.removeprefix("FILE:") if source == "start" else text
            return Path(text).expanduser().read_text(encoding="utf-8").removesuffix("\n")
        if source == "prompt" and text == "-":
            source = "stdin"
            with open(sys.stdin.fileno(), encoding="utf-8", closefd=False) as stdin:
                return stdin.read().removesuffix("\n")
        text.encode()  # raises UnicodeError where the command line is not UTF-8: such bytes arrive as lone surrogates
        return text
    except UsageError:
        raise
    except UnicodeError:
        where = {"file": f"file {text!r}", "stdin": "text on stdin"}.get(source, "text on the command line")
        raise UsageError(f"The prompt cannot be read: the {where} is not UTF-8; convert it first.") from None
    except OSError as error:
        where = repr(text) if source == "file" else "stdin"
        raise UsageError(f"The prompt cannot be read from {where}: {error.strerror or error}.") from None
    except ValueError:
        raise UsageError(f"prompt_ids={text!r} must be token ids separated by commas, e.g. 1,2,3.") from None


def stdin_is_piped() -> bool:
    """Whether something is piped or redirected into the program (a terminal and /dev/null are not)."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # there is no stdin
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


# ------------------------------------------------------------------------------------------- sampling


def run(options: argparse.Namespace) -> None:
    """Load the model, or both, and write the samples."""
    if options.compare:
        columns = [[text for text, _ in Sampler(place, options).batch()] for place in options.compare]
        for number, pair in enumerate(zip(*columns)):
            if number:
                print(SEPARATOR)
            print(side_by_side(options.compare, pair))
        return
    sampler = Sampler(options.checkpoint, options)
    started = time.perf_counter()
    made = 0
    if options.prompts:
        for number, (text, new) in enumerate(sampler.batch()):
            show((SEPARATOR + "\n" + text if number else text) + "\n")
            made += new
    else:
        for number in range(options.num_samples):
            if number:
                print(SEPARATOR)
            made += sampler.one(number)
    if options.speed or (sys.stderr is not None and sys.stderr.isatty()):
        seconds = time.perf_counter() - started
        print(
            f"{made} tokens in {seconds:.2f} s, {made / seconds:.1f} tokens/s ({sampler.device}, {sampler.dtype})",
            file=sys.stderr,
        )


class Sampler:
    """A model, its tokenizer and the options: continues one prompt as it comes, or all prompts in one batch."""

    def __init__(self, place: str, options: argparse.Namespace):
        import torch

        from flops_parameter_counting.hardware import best_dtype
        from training.checkpoint import load_model

        self.options, self.device = options, choose_device(options.device)
        self.model, self.tokenizer = load_model(place, self.device, which="best" if options.best else "latest")
        self.dtype = best_dtype(self.device) if options.dtype == "auto" else options.dtype
        model, tokenizer = self.model, self.tokenizer
        if not all(bool(p.isfinite().all()) for p in model.parameters()):
            raise Failure("The model's weights are not finite: its training has diverged. Use an earlier checkpoint, or --best.")
        model.to(getattr(torch, self.dtype))  # cast once: the same numbers as casting at each use, as training does
        if tokenizer is not None and tokenizer.vocab_size < model.config.vocab_size:  # ids without text can never win
            model.head.weight = torch.nn.Parameter(model.head.weight.detach()[: tokenizer.vocab_size])
        self.vocab_size = min(model.config.vocab_size, model.head.weight.size(0))
        self.eos_id = tokenizer.eos_id if tokenizer is not None and options.stop_at_eos else None
        self.knobs = dict(
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            repetition_penalty=options.repetition_penalty,
            eos_id=self.eos_id,
            use_cache=options.cache,
        )

    def ids(self, prompt: str | None) -> list[int]:
        """The token ids of a prompt (or those given instead), with a note if the model cannot see all of them."""
        ids = prompt_ids(self.options, prompt, self.tokenizer, self.vocab_size)
        if len(ids) > self.model.config.block_size:
            print(
                f"sample.py: the prompt has {len(ids)} tokens; the model sees the last {self.model.config.block_size} "
                "(block_size).",
                file=sys.stderr,
            )
        return ids

    def generator(self, number: int) -> torch.Generator:
        """The random numbers of sample `number`; they do not depend on what else is sampled."""
        import torch

        return torch.Generator(self.device).manual_seed(self.options.seed + number)

    def decoder(self) -> StreamDecoder | IdWriter:
        """What turns tokens into text, or, where there is no tokenizer, writes their ids."""
        from data.tokenization import StreamDecoder

        return IdWriter() if self.tokenizer is None else StreamDecoder(self.tokenizer)

    def one(self, number: int) -> int:
        """Print sample `number` of the prompt, as it comes unless told otherwise; returns the number of tokens made."""
        import torch

        options, decoder, pieces, made = self.options, self.decoder(), [], 0
        ids = self.ids(options.prompt)
        write = show if options.stream else pieces.append
        shown = "" if options.prompt == "" else "".join([decoder.push(token) for token in ids])
        write(shown if options.prompt is None else options.prompt)
        for chosen in self.model.stream(
            torch.tensor([ids], device=self.device), options.max_new_tokens, generator=self.generator(number), **self.knobs
        ):
            token = int(chosen)
            if token == self.eos_id:
                break
            write(decoder.push(token))
            made += 1
        write(decoder.flush())
        if pieces:
            show("".join(pieces))
        print(flush=True)
        return made

    def batch(self) -> list[tuple[str, int]]:
        """All prompts (num_samples times each) in one batch → (prompt and continuation, tokens made) of each."""
        import torch

        options = self.options
        prompts = [prompt for prompt in options.prompts or [options.prompt] for _ in range(options.num_samples)]
        rows = [self.ids(prompt) for prompt in prompts]
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        padded = torch.tensor([row + [0] * (int(lengths.max()) - len(row)) for row in rows], device=self.device)
        stream = self.model.stream(
            padded, options.max_new_tokens, lengths=lengths, generator=[self.generator(i) for i in range(len(rows))], **self.knobs
        )
        new = torch.stack(list(stream), dim=1).tolist()
        shortest, texts = int(lengths.min()), []
        for prompt, row, tokens in zip(prompts, rows, new):
            own = tokens[len(row) - shortest :][: options.max_new_tokens]
            own = own[: own.index(self.eos_id)] if self.eos_id in own else own
            decoder = self.decoder()
            shown = "" if prompt == "" else "".join([decoder.push(token) for token in row])
            text = "".join([decoder.push(token) for token in own]) + decoder.flush()
            texts.append(((shown if prompt is None else prompt) + text, len(own)))
        return texts


def side_by_side(names: list[str], texts: tuple[str, str]) -> str:
    """Two texts in two columns under their models' names, as wide as the terminal."""
    width = max(20, (shutil.get_terminal_size().columns - 3) // 2)
    texts = ["".join(c if c.isprintable() or c == "\n" else " " for c in text.expandtabs()) for text in texts]
    columns = [
        [name[-width:], "-" * min(width, len(name))]
        + [line for paragraph in text.split("\n") for line in textwrap.wrap(paragraph, width) or [""]]
        for name, text in zip(names, texts)
    ]
    return "\n".join(f"{left:<{width}} | {right}".rstrip() for left, right in itertools.zip_longest(*columns, fillvalue=""))


def show(text: str) -> None:
    """Print text as it comes; on a terminal without control characters, which a model may well have learnt."""
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


class IdWriter:
    """Used in place of a StreamDecoder where there is no tokenizer: writes the ids themselves, separated by commas."""

    def __init__(self):
        self._separator = ""

    def push(self, token: int) -> str:
        text, self._separator = f"{self._separator}{token}", ","
        return text

    def flush(self) -> str:
        return ""


def prompt_ids(options: argparse.Namespace, prompt: str | None, tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
    """The token ids to continue, at least one. Raises Failure if the model cannot continue this prompt."""
    if prompt is None:
        ids = options.ids
    elif tokenizer is None:
        raise Failure(
            "This model has no tokenizer (its dataset had none), so text means nothing to it; give token "
            "ids with --prompt_ids=1,2,3."
        )
    elif prompt:
        try:
            ids = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(prompt)
        except ValueError as error:  # characters that a vocabulary of characters does not have
            raise Failure(str(error)) from error
    elif tokenizer.bos_id is not None or tokenizer.eos_id is not None:
        ids = [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id]
    else:
        raise Failure(
            f"The prompt is empty, and this model's {tokenizer.kind} tokenizer has no end-of-text token "
            'to start from; give a prompt with --prompt="…".'
        )
    if not ids:
        raise Failure("The tokenizer makes no tokens of this prompt; give another one.")
    wrong = [token for token in ids if not 0 <= token < vocab_size]
    if wrong:
        raise Failure(
            f"The prompt has the token id {wrong[0]}, which this model does not know; its ids are 0 to {vocab_size - 1}."
        )
    return ids


# ------------------------------------------------------------------------------------------- errors


def main(argv: list[str]) -> int:
    """Parse before anything heavy is imported, then sample; returns the exit code."""

    def job() -> int:
        options = parse(argv)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? for what it lacks
        run(options)
        return 0

    return guarded("sample.py", argv, job, "Out of memory. Try --dtype=bfloat16, a shorter prompt, or --device=cpu.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
