"""What the saved models of the five levels can do: how well they predict a new text, and what they write.

Quality is the share of the generated sentences that the corpus's own grammar parses (`story_grammar.parse_sentence`). It is
taken over continuations of prompts from stories that no model has seen: the first sentence of a story and two words of the
second. Sentences that the model itself began and those that it only finished count; the prompt's first sentence does not,
nor does a last one that was cut off, unless it is longer than any sentence of the grammar. Of the grammatical ones, those
that do not stand in the text that the model has learnt from count as new.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from command_line import Failure, text_table
from data import story_grammar
from data.tokenization import END_OF_TEXT
from experiments.level_runs import FORMAT_VERSION, LEVELS, read_index, write_document

RESULTS = "test_results_new_data.json"
NEW_TEXT = "new_text.jsonl"
NEW_PROMPTS = "new_prompts.txt"
PROMPTS = ("Once upon a time", "One sunny day,", "Lily had a", "The little", "Tom and Lily")
NEW_STORIES = 120  # a text of about 10,000 tokens
NEW_TOKENS = 60  # of a sample
TEMPERATURE = 0.8
# What the table shows of each level: key of the results, title, format.
COLUMNS = (
    ("train_loss", "train loss", ".2f"),
    ("val_loss", "val loss", ".2f"),
    ("gap", "gap", ".2f"),
    ("best_val_loss", "lowest val loss", ".2f"),
    ("new_perplexity", "new perplexity", ",.1f"),
    ("quality", "quality", ".0%"),
    ("quality_new", "… and new", ".0%"),
    ("distinct_2", "distinct-2", ".2f"),
    ("repetition", "repetition", ".2f"),
    ("iterations_per_second", "it/s", ".0f"),
    ("seconds", "time (s)", ".0f"),
)


# ------------------------------------------------------------------------------------------- figures of texts


def judge_texts(prompts: Sequence[str], texts: Sequence[str], learnt: str) -> dict[str, Any]:
    """Quality of texts that each begin with their prompt: `sentences` that count, `quality`, `quality_new` (null of none).

    learnt: the text that the model has learnt from.
    """
    known = set(story_grammar.sentences_of(learnt)[0])
    judged: list[tuple[bool, bool]] = []
    for prompt, text in zip(prompts, texts):
        given = len(story_grammar.sentences_of(prompt)[0])
        sentences, rest = story_grammar.sentences_of(text)
        judged += [(story_grammar.parse_sentence(one) is not None, one not in known) for one in sentences[given:]]
        if len(rest.split()) > story_grammar.LONGEST:
            judged.append((False, True))
    share = [right for right, _ in judged]
    return {
        "sentences": len(judged),
        "quality": sum(share) / len(judged) if judged else None,
        "quality_new": sum(right and new for right, new in judged) / len(judged) if judged else None,
    }


def variety(texts: Sequence[str]) -> dict[str, Any]:
    """distinct_1, distinct_2: different words, pairs of words, as shares of all (Li et al. 2016); repetition: of the runs of
    four words of a text, the share that stood in the same text before (Welleck et al. 2020). Null where there are none."""
    found: dict[str, Any] = {}
    words = [text.split() for text in texts]
    for n in (1, 2):
        every = [tuple(one[i : i + n]) for one in words for i in range(len(one) - n + 1)]
        found[f"distinct_{n}"] = len(set(every)) / len(every) if every else None
    runs = [[tuple(one[i : i + 4]) for i in range(len(one) - 3)] for one in words]
    number = sum(map(len, runs))
    found["repetition"] = 1 - sum(len(set(one)) for one in runs) / number if number else None
    return found


# ------------------------------------------------------------------------------------------- testing the models


def test_models(
    out_dir: Path, levels: Sequence[int] | None, prompts: Sequence[str] = (), text: str | None = None
) -> dict[str, Any]:
    """Test the saved models of these levels; returns what outputs/test_results_new_data.json then holds.

    prompts: to be continued and shown, in place of PROMPTS. text: a file with a new text, in place of new stories. Raises
    Failure where there are no models.
    """
    import torch

    import sample
    import score

    torch.set_num_threads(1)  # models this small lose by a second one, and the figures stay the same everywhere
    entries = read_index(out_dir, levels)
    outputs = out_dir / "outputs"
    outputs.mkdir(parents=True, exist_ok=True)
    stories = story_grammar.new_stories(NEW_STORIES)
    starts = [beginning(story) for story in stories]
    shown = list(prompts) or list(PROMPTS)
    (outputs / NEW_TEXT).write_text("".join(json.dumps({"text": story}) + "\n" for story in stories), encoding="utf-8")
    (outputs / NEW_PROMPTS).write_text("\n".join(shown) + "\n", encoding="utf-8")
    place = text if text is not None else str(outputs / NEW_TEXT)
    words = ["--device=cpu", "--dtype=float32", "--seed=0", f"--max_new_tokens={NEW_TOKENS}", f"--temperature={TEMPERATURE}"]
    options = sample.parse([*words, f"--prompts_file={outputs / NEW_PROMPTS}"])
    results = []
    for entry in entries:
        folder = out_dir / "models" / entry["name"]
        sampler = sample.Sampler(str(folder), options)
        if sampler.tokenizer is None:
            raise Failure(f"{folder} has no tokenizer, so it cannot be tested on text.")
        found = new_text_score(score, sampler, place)
        own, theirs = [written for written, _ in sampler.batch()], continued(sampler, starts)
        quality = judge_texts(starts, theirs, learnt_text(folder, sampler.tokenizer)) if of_the_grammar(entry) else {}
        results.append(
            {
                **entry,
                "tokens_per_parameter": entry["tokens"] / entry["parameters"],
                **found,
                "quality": None,
                "quality_new": None,
                **quality,
                **variety([one.removeprefix(start) for one, start in zip(theirs, starts)]),
                "samples": [{"prompt": prompt, "text": written} for prompt, written in zip(shown, own)],
            }
        )
    document = {
        "format_version": FORMAT_VERSION,
        "new_text": place,
        "sampling": {"temperature": TEMPERATURE, "max_new_tokens": NEW_TOKENS, "seed": 0, "prompts": len(starts)},
        "levels": [summary_of(level, results) for level in sorted({one["level"] for one in results})],
        "models": results,
    }
    write_document(outputs / RESULTS, document)
    return document


def continued(sampler: Any, prompts: Sequence[str]) -> list[str]:
    """Each prompt with a continuation. As sample.py does it, but with the random numbers of one seed for all of them."""
    import torch

    rows = [sampler.ids(prompt) for prompt in prompts]
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.tensor([row + [0] * (int(lengths.max()) - len(row)) for row in rows])
    steps = sampler.model.stream(padded, NEW_TOKENS, lengths=lengths, generator=sampler.generator(0), **sampler.knobs)
    with torch.inference_mode():
        new, shortest = torch.stack(list(steps), dim=1).tolist(), int(lengths.min())
    texts = []
    for prompt, row, tokens in zip(prompts, rows, new):
        own = tokens[len(row) - shortest :][:NEW_TOKENS]
        own = own[: own.index(sampler.eos_id)] if sampler.eos_id in own else own
        texts.append(prompt + sampler.tokenizer.decode(own))
    return texts


def beginning(story: str) -> str:
    """A story's first sentence and two words of the second."""
    first = story_grammar.sentences_of(story)[0][0]
    return " ".join([first, *story.removeprefix(first).split()[:2]])


def of_the_grammar(entry: Mapping[str, Any]) -> bool:
    """Whether a model has learnt from the stories of the grammar, so that the grammar can judge it."""
    return "stories" in Path(entry["dataset"]["name"]).name.split("_")


def learnt_text(folder: Path, tokenizer: Any) -> str:
    """The text that a model has learnt from; "" where its dataset is gone."""
    from data.mixture import open_dataset
    from data.token_dataset import DatasetError
    from training.manifest import read_state

    config = read_state(folder)["config"]
    try:
        ids = open_dataset(config["dataset"], max_train_tokens=config["max_train_tokens"]).split("train")
    except DatasetError:
        return ""
    return tokenizer.decode(ids.read(0, min(len(ids), 1_000_000)).tolist()).replace(END_OF_TEXT, " ")


def new_text_score(score: Any, sampler: Any, path: str) -> dict[str, Any]:
    """Loss, perplexity and bits per byte on a new text, by score.py's own reading of it."""
    from training.scoring import score_stream

    stream, described = score.encoded_text(path, sampler.tokenizer)
    context = sampler.model.config.block_size
    found = score_stream(sampler.model, stream, sampler.tokenizer, context=context, batch_size=64).to_dict()
    names = {"loss": "new_loss", "perplexity": "new_perplexity", "bits_per_byte": "new_bits_per_byte", "tokens": "new_tokens"}
    return {name: found[key] for key, name in names.items()} | {"new_text_sha256": described["sha256"]}


# ------------------------------------------------------------------------------------------- over the seeds


def summary_of(level: int, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A level over its seeds: of each figure [median, least, most]; null where it is not known of every seed."""
    of_level = [one for one in results if one["level"] == level]
    fixed = {key: of_level[0][key] for key in ("level", "level_name", "tokens", "iterations", "epochs", "parameters")}
    found: dict[str, Any] = {**fixed, "tokens_per_parameter": of_level[0]["tokens"] / of_level[0]["parameters"]}
    found["seeds"] = [one["seed"] for one in of_level]
    for key in ("new_loss", "distinct_1", *(column for column, _, _ in COLUMNS)):
        values = [one.get(key) for one in of_level]
        found[key] = None if None in values else [statistics.median(values), min(values), max(values)]
    return found


def rows_of(levels: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the study's table: a level a row; medians over the seeds, with the least and the most of them."""
    header = ["level", "tokens", "N", "tokens/N", "epochs", *(title for _, title, _ in COLUMNS)]
    rows = []
    for one in levels:
        cells = [f"{one['level']} {LEVELS[one['level']].replace('_', ' ')}", f"{one['tokens']:,}", f"{one['parameters']:,}"]
        cells += [f"{one['tokens_per_parameter']:.4f}", f"{one['epochs']:.0f}"]
        rows.append(cells + [spread(one[key], style) for key, _, style in COLUMNS])
    return header, rows


def spread(values: Sequence[float] | None, style: str) -> str:
    """Median and range: '0.80 (0.75–0.83)'; the median alone where the range says no more."""
    if values is None:
        return "–"
    median, least, most = (format(value, style) for value in values)
    return median if least == most else f"{median} ({least}–{most})"


def levels_table(levels: Sequence[Mapping[str, Any]]) -> str:
    """The table for a terminal."""
    header, rows = rows_of(levels)
    return text_table(header, rows)


def levels_markdown(levels: Sequence[Mapping[str, Any]]) -> str:
    """The table for a page: levels as columns."""
    header, rows = rows_of(levels)
    lines = [" | ".join(cells) for cells in zip(header, *rows)]
    return "\n".join([f"| {lines[0]} |", "|" + "---|" * (len(rows) + 1), *(f"| {line} |" for line in lines[1:])])
