"""Whatever stands in a file or on a command line, a command answers with its result or with a sentence.

Seeded random edits of sound documents: no traceback, no bare name of an error, exit code 1 or 2 where it fails, nothing
changed on disk. What an edit leaves sound may succeed.
"""

from __future__ import annotations

import copy
import json
import random
import re
import shutil
from pathlib import Path

import pytest
from test_compare import make_run

import ablate
import compare_architectures
import convert
import sample
import train
from data import show, token_dataset
from data.files import sha256
from data.preparation import prepare
from flops_parameter_counting import detailed_cost_analysis
from tests.conftest import TINY_RUN
from training import checkpoint_commands

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


def answers(main, argv, folder: Path, capsys, about, may_write: bool = False) -> int:
    """Run a command in process; check how it ends, and that the folder is as before (`may_write`: if it fails). Exit code."""
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
    assert (may_write and code == 0) or state(folder) == before, f"{about}: the disk changed"
    return code


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


# ------------------------------------------------------------------------------------------- checkpoints and datasets


@pytest.fixture(scope="module")
def trained(tiny_dataset, tmp_path_factory) -> tuple[Path, list[str]]:
    """A tiny run of two steps: its out_dir, and train.py's words but for that."""
    out, words = tmp_path_factory.mktemp("trained") / "run", [*TINY_RUN, f"--dataset={tiny_dataset}", "--max_iters=2"]
    assert train.main([*words, f"--out_dir={out}"]) == 0
    return out, words


def copied(trained, tmp_path: Path) -> tuple[Path, Path, list[str]]:
    """A copy of the run: its out_dir, its checkpoint, and train.py's words."""
    out = tmp_path / "run"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(trained[0], out)
    return out, out / "checkpoints" / "step_000000002", [*trained[1], f"--out_dir={out}"]


def checkpoint_readers(out: Path, words: list[str], target: Path):
    """What reads a checkpoint: (main, argv, whether it writes)."""
    return (
        (checkpoint_commands.main, ["inspect", out], False),
        (train.main, [*words, "--resume", "--print_config"], False),
        (sample.main, [out, "--prompt=a", "--max_new_tokens=1"], False),
        (train.main, [*words, "--resume"], True),
        (convert.main, [out, target, "--no_check"], True),
        (train.main, [*words, f"--init_from=weights:{out}", f"--out_dir={target}"], True),
        (checkpoint_commands.main, ["consolidate", out, target], True),
    )


@pytest.mark.parametrize("edits", EDITS)
@pytest.mark.parametrize("document", ["state.json", "manifest.json"])
def test_an_edited_document_of_a_checkpoint(trained, document, tmp_path, capsys, edits):
    """Issue 14.11."""
    draw, sound = random.Random(7), json.loads((trained[0] / "checkpoints/step_000000002" / document).read_text())
    for number in range(edits):
        out, checkpoint, words = copied(trained, tmp_path)
        changed = edited(sound, draw)
        text = scratched(as_json(sound), draw) if number % 5 == 0 else as_json(changed)
        (checkpoint / document).write_text(text)
        if document == "state.json":  # as somebody writes it who also sets the checksum right
            manifest = json.loads((checkpoint / "manifest.json").read_text())
            manifest["files"][document] = {"bytes": len(text.encode()), "sha256": sha256(checkpoint / document)}
            (checkpoint / "manifest.json").write_text(json.dumps(manifest))
        readers = checkpoint_readers(out, words, tmp_path / "target")
        main, argv, may_write = readers[number % len(readers)]
        answers(main, argv, tmp_path, capsys, (number, argv, text[:3000]), may_write)
        shutil.rmtree(tmp_path / "target", ignore_errors=True)


@pytest.mark.parametrize("edits", EDITS)
@pytest.mark.parametrize("document", ["meta.json", "tokenizer.json"])
def test_an_edited_document_of_a_dataset(tiny_dataset, document, tmp_path, capsys, edits):
    """Issue 14.11."""
    draw, sound = random.Random(8), json.loads((tiny_dataset / document).read_text())
    folder, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(tiny_dataset, folder)
    for number in range(edits):
        text = scratched(as_json(sound), draw) if number % 5 == 0 else as_json(edited(sound, draw))
        (folder / document).write_text(text)
        readers = (
            (token_dataset.main, ["verify", folder], False),
            (show.main, [folder, "--samples=1", "--length=4"], False),
            (train.main, [*TINY_RUN, f"--dataset={folder}", "--eval_only", f"--out_dir={out}"], True),
        )
        main, argv, may_write = readers[number % len(readers)]
        answers(main, argv, tmp_path, capsys, (number, argv, text[:3000]), may_write)
        shutil.rmtree(out, ignore_errors=True)


@pytest.mark.parametrize("edits", EDITS)
@pytest.mark.parametrize("document", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_an_edited_document_of_a_hugging_face_folder(huggingface_folder, document, tmp_path, capsys, edits):
    """Issue 14.11."""
    draw, sound = random.Random(9), json.loads((huggingface_folder / document).read_text())
    folder, target = tmp_path / "model", tmp_path / "target"
    shutil.copytree(huggingface_folder, folder)
    for number in range(edits if document == "config.json" else edits // 4):
        text = scratched(as_json(sound), draw) if number % 5 == 0 else as_json(edited(sound, draw))
        (folder / document).write_text(text)
        readers = (
            (convert.main, [folder, target], True),
            (sample.main, [folder, "--prompt=a", "--max_new_tokens=1"], False),
            (train.main, [f"--init_from=hf:{folder}", "--print_config"], False),
        )
        main, argv, may_write = readers[number % len(readers)]
        answers(main, argv, tmp_path, capsys, (number, argv, text[:3000]), may_write)
        shutil.rmtree(target, ignore_errors=True)


@pytest.fixture(scope="module")
def huggingface_folder(tmp_path_factory) -> Path:
    """A tiny GPT-2 with a BPE tokenizer, as transformers would save it."""
    folder = tmp_path_factory.mktemp("theirs")
    texts = [(f"text {n}", f"the cat {n} sat on the mat and the dog sat on the log {n} " * 9) for n in range(20)]
    prepare(lambda: iter(texts), folder / "data", tokenizer="bpe", bpe_vocab_size=300, val_fraction=0.2)
    words = [*TINY_RUN, "--block_size=8", "--batch_size=1", f"--dataset={folder / 'data'}", "--max_iters=1"]
    assert train.main([*words, f"--out_dir={folder / 'run'}"]) == 0
    assert convert.main([str(folder / "run"), str(folder / "model"), "--no_check"]) == 0
    return folder / "model"


@pytest.mark.parametrize(
    "word", ["--vocab_size=1e11", "--n_embd=1e9", "--n_layer=1e8", "--n_head=1e8", "--d_ff=1e12", "--block_size=1e12"]
)
def test_a_size_beyond_any_model_is_a_usage_error_at_once(word, capsys):
    assert train.main([word, "--print_config"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"train.py: {word.split('=')[0][2:]}=") and "the most that any model here has" in said


# ------------------------------------------------------------------------------------------- other command lines


def words_of(parser, draw: random.Random, known: tuple[str, ...]) -> list[str]:
    """A random command line of an argparse parser."""
    options = [action for action in parser._actions if {"--help", "--debug"}.isdisjoint(action.option_strings or ["--help"])]
    chosen = draw.sample(options, min(len(options), draw.randint(1, 3)))
    words = [
        action.option_strings[-1] + ("" if action.nargs == 0 else f"={draw.choice((*VALUES_OF_WORDS, *known))}")
        for action in chosen
    ]
    return words + [draw.choice((*VALUES_OF_WORDS, *known))] * draw.randint(0, 1)


VALUES_OF_WORDS = ("", "0", "-1", "3", "1e9", "1e400", "nan", "x", "x=1", "\x1b[31m", "..", "9" * 40, "/dev/null", "/proc/1/x")


@pytest.mark.parametrize("edits", EDITS)
@pytest.mark.parametrize("program", ["sample", "compare", "cost", "show", "checkpoint", "ablate"])
def test_a_random_command_line_of_other_programs(trained, program, tmp_path, monkeypatch, capsys, edits):
    """Issue 14.11."""
    monkeypatch.chdir(tmp_path)
    out, _, words = copied(trained, tmp_path)
    main, parser, always = {
        "sample": (sample.main, sample.make_parser(), ["--max_new_tokens=2"]),
        "compare": (compare_architectures.main, compare_architectures.make_parser(), []),
        "cost": (detailed_cost_analysis.main, detailed_cost_analysis.make_parser(), ["--batch_size=1", "--context=64"]),
        "show": (show.main, show.make_parser(), ["--samples=1"]),
        "checkpoint": (checkpoint_commands.main, None, []),
        "ablate": (ablate.main, ablate.make_parser(), ["--dry_run", *words]),
    }[program]
    known, draw = (str(out), "gpt2", "llama_1.36b", "seed=1,2", "1e20"), random.Random(10)
    for number in range(edits // 2):
        if parser is None:
            argv = [draw.choice(("inspect", "consolidate", "x")), *(draw.choice((*VALUES_OF_WORDS, str(out))) for _ in range(2))]
        else:
            argv = [*always, *words_of(parser, draw, known)]
        answers(main, argv, tmp_path, capsys, (number, argv), may_write=True)
        for written in set(tmp_path.iterdir()) - {out}:
            shutil.rmtree(written) if written.is_dir() else written.unlink()
