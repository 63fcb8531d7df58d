"""Whatever stands in a file or on a command line, a command answers with its result or with a sentence.

Seeded random edits of sound documents: no traceback, no bare name of an error, exit code 1 or 2 where it fails, nothing
changed on disk. What an edit leaves sound may succeed.
"""

from __future__ import annotations

import copy
import json
import random
import re
from pathlib import Path

import pytest
from test_compare import make_run

import compare_architectures
import train
from flops_parameter_counting import detailed_cost_analysis

NESTED = "nested"  # stands for lists in lists, deeper than Python follows
VALUES = (
    *(None, True, "", "text", "-3", "1e5", "NaN", "\x1b[31mred", "=HYPERLINK(1)", [], {}, [None], {"a": {}}, NESTED),
    *(0, -1, 1, 7.5, 1e308, -1e308, 10**30, float("nan"), float("inf"), [1, "x"], {"step": "x"}),
)
EDITS = [pytest.param(40, id="40"), pytest.param(500, id="500", marks=pytest.mark.slow)]


def places(document, path=()):
    """Every path into a document."""
    yield path
    if isinstance(document, (dict, list)):
        for key in document if isinstance(document, dict) else range(min(len(document), 4)):
            yield from places(document[key], (*path, key))


def edited(document, draw: random.Random):
    """The document with one to three values replaced, removed, or renamed."""
    document = copy.deepcopy(document)
    for _ in range(draw.randint(1, 3)):
        found = [path for path in places(document) if path]
        if not found:
            break
        *way, last = draw.choice(found)
        inner = document
        for key in way:
            inner = inner[key]
        how = draw.random()
        if how < 0.15:
            del inner[last]
        elif how < 0.2 and isinstance(inner, dict):
            inner[draw.choice(("x", "", "step", "loss"))] = inner.pop(last)
        else:
            inner[last] = copy.deepcopy(draw.choice(VALUES))
    return document if draw.random() > 0.02 else draw.choice(VALUES)


def as_json(document) -> str:
    return json.dumps(document).replace(f'"{NESTED}"', "[" * 20_000 + "]" * 20_000)


def scratched(text: str, draw: random.Random) -> str:
    """The text with a few characters removed, doubled or replaced."""
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(text) + 1)
        cut = draw.choice((0, 1, 1, 20, len(text)))
        text = (
            text[:at]
            + draw.choice(("", "", "{", '"', "\x00", "\x1b[2J", "=", "(", "'", "é", "9" * 30, "\n", "None"))
            + text[at + cut :]
        )
    return text


def state(folder: Path) -> dict:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}


def answers(main, argv, folder: Path, capsys, about) -> None:
    """Run a command in process; check how it ends."""
    before = state(folder)
    try:
        code = main([str(word) for word in argv])
    except BaseException as error:
        raise AssertionError(f"{about}: {type(error).__name__} came through") from error
    out, err = capsys.readouterr()
    assert code in (0, 1, 2), about
    assert "Traceback" not in err and "--debug shows where" not in err, f"{about}\n{err[-600:]}"
    assert code == 0 or err.strip(), about
    assert not re.search(r"^\S+: (?:\w*Error|\w*Exception|Failure)\b", err, re.M), f"{about}\n{err[-600:]}"
    assert "\x1b" not in out + err and "\x00" not in out + err, f"{about}: control characters"
    assert state(folder) == before, f"{about}: the disk changed"


@pytest.fixture(scope="module")
def run_log(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("sound") / "run", "--seed=3")


@pytest.mark.parametrize("edits", EDITS)
def test_an_edited_document_of_a_run(run_log, tmp_path, capsys, edits):
    draw, sound = random.Random(1), json.loads(run_log.with_suffix(".json").read_text())
    other = make_run(tmp_path / "other")
    for number in range(edits):
        changed = edited(sound, draw)
        path = tmp_path / "run_1.json"
        path.write_text(as_json(changed) if number % 4 else scratched(as_json(sound), draw))
        answers(compare_architectures.main, [path, other, "--force"], tmp_path, capsys, (number, path.read_text()[:3000]))


@pytest.mark.parametrize("edits", EDITS)
def test_edited_lines_of_a_log(run_log, tmp_path, capsys, edits):
    draw, sound = random.Random(2), [json.loads(line) for line in run_log.read_text().splitlines()]
    other = make_run(tmp_path / "other")
    for number in range(edits):
        lines = [as_json(event) for event in sound]
        at = draw.randrange(len(lines))
        lines[at] = as_json(edited(sound[at], draw)) if number % 4 else scratched(lines[at], draw)
        path = tmp_path / "run_1.jsonl"
        path.write_text("\n".join(lines) + "\n")
        answers(compare_architectures.main, [path, other, "--force"], tmp_path, capsys, (number, lines[at][:3000]))


@pytest.mark.parametrize("edits", EDITS)
def test_an_edited_run_as_a_configuration(run_log, tmp_path, capsys, edits):
    draw, sound = random.Random(3), json.loads(run_log.with_suffix(".json").read_text())
    for number in range(edits):
        path = tmp_path / "run_1.json"
        path.write_text(as_json({**sound, "config": edited(sound["config"], draw)} if number % 4 else edited(sound, draw)))
        answers(train.main, [path, "--print_config"], tmp_path, capsys, (number, path.read_text()[:3000]))


CONFIG = """\"\"\"A config.\"\"\"
out_dir = "out/x"
n_layer, n_head, n_embd = 2, 2, 32
learning_rate = 1e-3                # a comment
layer_pattern = "transformer,mlp"
max_iters = 10
"""


@pytest.mark.parametrize("edits", EDITS)
def test_an_edited_config_file(tmp_path, capsys, edits):
    draw = random.Random(4)
    for number in range(edits):
        path = tmp_path / "config.py"
        path.write_text(scratched(CONFIG, draw), encoding="utf-8")
        answers(train.main, [path, "--print_config"], tmp_path, capsys, (number, path.read_text()))


@pytest.mark.parametrize("edits", EDITS)
def test_a_random_command_line(tmp_path, capsys, edits):
    from training.train_config import KEYS

    draw = random.Random(5)
    values = (
        "",
        "0",
        "-1",
        "1",
        "3.5",
        "1e11",
        "1e400",
        "nan",
        "inf",
        "None",
        "True",
        "x",
        "a,b",
        "\x1b[31m",
        "..",
        "9" * 40,
        "/dev/null",
    )
    for number in range(edits):
        words = [f"--{draw.choice(list(KEYS))}={draw.choice(values)}" for _ in range(draw.randint(1, 4))]
        words = [scratched(word, draw) if draw.random() < 0.2 else word for word in words]
        words = [word.replace("\x00", "") for word in words if word]  # which no command line can hold
        answers(train.main, [*words, "--print_config"], tmp_path, capsys, (number, words))


@pytest.mark.parametrize("edits", EDITS)
@pytest.mark.parametrize("model", ["gpt2_124m", "llama3_8b", "gemma2_2b"])
def test_an_edited_config_json_of_hugging_face(model, tmp_path, capsys, edits):
    draw, sound = random.Random(6), json.loads((detailed_cost_analysis.CONFIGS / "models" / f"{model}.json").read_text())
    for number in range(edits // 3):
        path = tmp_path / "config.json"
        path.write_text(as_json(edited(sound, draw)))
        argv = [f"--model_config={path}", "--batch_size=1", "--context=64"]
        answers(detailed_cost_analysis.main, argv, tmp_path, capsys, (number, path.read_text()[:3000]))


@pytest.mark.parametrize(
    "word", ["--vocab_size=1e11", "--n_embd=1e9", "--n_layer=1e8", "--n_head=1e8", "--d_ff=1e12", "--block_size=1e12"]
)
def test_a_size_beyond_any_model_is_a_usage_error_at_once(word, capsys):
    assert train.main([word, "--print_config"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"train.py: {word.split('=')[0][2:]}=") and "the most that any model here has" in said
