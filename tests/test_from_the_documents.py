"""docs/FROM_THE_DOCUMENTS.md is read row by row: each command of ours in it runs, each file, test and figure is there.

The page says what its columns and the words in its last column mean, and which flags are appended here to make a command small.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from conftest import ROOT

from configurator import ConfigError, configure

PAGE = ROOT / "docs" / "FROM_THE_DOCUMENTS.md"
DOCUMENTS = (
    "Project Ready Summary",
    "START HERE: Complete Modular Training System",
    "Option A Training Guide (45-50M Parameters)",
    "Summary of MLP-based Changes Made",
    "SLM Training Project - Master Summary",
)
KINDS = ("run", "as is", "refused", "file", "not built", "none")
RUNS = {"run", "as is", "refused", "not built"}  # one of them, or a test, is said of every command of ours
# What makes a command small; the page states the same (test_the_page_states_what_is_appended).
SMALL = {
    "train.py": "--num_layers=2 --num_heads=2 --d_model=32 --d_ff=64 --vocab_size=256 --max_seq_len=16 --eval_iters=1 "
    "--compile=False --device=cpu --threads=1",
    "sample.py": "--max_new_tokens=5 --device=cpu",
    "score.py": "--max_tokens=500 --device=cpu",
    "compare_architectures.py": "",
    "prepare.py": "--tokenizer=byte",
    "experiments/cpu_levels.py": "",
    "compress.py": "--samples=4 --block_size=16 --device=cpu",
    "-c": "",
}
LENGTH, LENGTH_IN_EPOCHS = "--max_iters=1", "--max_samples=16"
DTYPE = "--dtype=float32"  # where the row names none
LEVELS = "--max_iters=6 --seeds=1 --levels=1"
THE_RUNS = ("arch_gpt2", "arch_llama", "arch_team")  # what is sampled, scored, converted and compared


# ------------------------------------------------------------------------------------------- the page


@dataclass(frozen=True)
class Row:
    """One row of a table: what a document has, what there is here, and how that is checked."""

    line: int
    document: str
    there: str
    here: str
    checks: tuple[str, ...]

    @property
    def spans(self) -> list[str]:
        return re.findall(r"`([^`]+)`", self.here)

    @property
    def commands(self) -> list[str]:
        """Commands of ours."""
        return [span for span in self.spans if span.startswith(("python ", "torchrun "))]

    @property
    def files(self) -> list[str]:
        """Files and folders; `*` stands for a part of a name."""
        return [span for span in self.spans if re.fullmatch(r"[\w./*-]*(/|\.\w+)[\w./*-]*", span) and not span.startswith("-")]

    @property
    def promised(self) -> list[str]:
        """What a command prints."""
        return re.findall(r"\*\*([^*]+)\*\*", self.here)

    @property
    def tests(self) -> list[str]:
        return [check.strip("`") for check in self.checks if check.startswith("`")]


def rows_of(page: str) -> list[Row]:
    """The rows of all tables of a page, with the section (`## `) that they stand in."""
    rows, document = [], ""
    for number, line in enumerate(page.splitlines(), 1):
        if line.startswith("## "):
            document = line[3:].strip()
        elif document in DOCUMENTS and line.startswith("|") and not re.match(r"\|[\s|-]*\||\| there \|", line):
            cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
            assert len(cells) == 3, f"line {number} has {len(cells)} cells: {line}"
            rows.append(Row(number, document, cells[0], cells[1], tuple(re.split(r"\s*;\s*", cells[2]))))
    return rows


ROWS = rows_of(PAGE.read_text(encoding="utf-8"))


def problems_of(row: Row) -> list[str]:
    """What can be seen to be wrong with a row without running anything."""
    found = [f"{check!r} says nothing" for check in row.checks if check not in KINDS and not check.startswith("`")]
    if row.commands and not row.tests and not RUNS & set(row.checks):
        found.append("nothing runs its command")
    if not row.commands and {"run", "as is", "refused"} & set(row.checks):
        found.append("there is no command to run")
    if "as is" in row.checks and not row.promised or "refused" in row.checks and not row.promised:
        found.append("it does not say what the command prints")
    if "none" in row.checks and len(re.sub(r"`[^`]*`", "", row.here).split()) < 4:
        found.append("it does not say why")
    if "file" in row.checks and not row.files:
        found.append("no file is named")
    if "file" in row.checks:
        found += [f"{name} is not there" for name in row.files if not is_there(name, ROOT)]
    if "not built" in row.checks:
        found += [f"{name} is there by now: mend the row" for name in row.files if is_there(name, ROOT)]
        found += [f"{command!r} can run by now: mend the row" for command in row.commands if can_start(command)]
        found += [] if row.files or row.commands else ["it does not name what will be there"]
    for test in row.tests:
        path, _, name = test.partition("::")
        if not (ROOT / path).is_file():
            found.append(f"there is no {path}")
        elif not re.search(rf"^def {re.escape(name)}\(", (ROOT / path).read_text(encoding="utf-8"), re.M) or not name:
            found.append(f"{path} has no {name!r}")
    return found


def is_there(name: str, folder: Path) -> bool:
    """Whether a file or folder of this name, which may hold `*`, is in the folder."""
    return any(folder.glob(name.rstrip("/"))) if "*" in name else (folder / name).exists()


def can_start(command: str) -> bool:
    """Whether the program of a command is there and takes what it is given: of train.py all of it, else the first word."""
    words = shlex.split(command)
    if not (ROOT / words[1]).exists():
        return False
    if words[1] != "train.py":
        return run([*words[1:3], "--help"])[0] == 0
    try:
        configure([word for word in words[2:] if word not in ("--print_config", "--help")])
    except ConfigError:
        return False
    return True


def test_every_document_has_its_section():
    page = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)", page, re.M)[-len(DOCUMENTS) :] == list(DOCUMENTS)
    assert {row.document for row in ROWS} == set(DOCUMENTS)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_row_says_what_checks_it_and_that_is_there(document):
    rows = [row for row in ROWS if row.document == document]
    assert rows
    found = [f"{PAGE.name}:{row.line}: {problem}" for row in rows for problem in problems_of(row)]
    assert not found, "\n".join(found)


def test_the_page_states_what_is_appended():
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    for flags in (*SMALL.values(), LENGTH, LENGTH_IN_EPOCHS, DTYPE, LEVELS):
        assert f"`{flags}`" in page or not flags, flags


# ------------------------------------------------------------------------------------------- running


def run(words: list[str], small: bool = False) -> tuple[int, str]:
    """A command of ours in this process; returns its exit code and what it printed.

    words: without "python". small: with what makes it small.
    """
    program, arguments = words[0], words[1:]
    if small:
        arguments = made_small(program, arguments)
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), pytest.MonkeyPatch.context() as patch:
        if program == "-c":
            exec(compile(arguments[0], "<string>", "exec"), {})
            code = 0
        elif program == "-m":
            assert arguments[0] == "training.checkpoint"
            code = importlib.import_module("training.checkpoint_commands").main(arguments[1:])
        elif program.endswith("prepare.py"):
            patch.setattr(sys, "argv", [program, *arguments])
            with pytest.raises(SystemExit) as left:
                runpy.run_path(str(ROOT / program), run_name="__main__")
            code = left.value.code
        else:
            try:
                code = importlib.import_module(program.removesuffix(".py").replace("/", ".")).main(arguments)
            except SystemExit as left:
                code = left.code or 0
    return code, output.getvalue()


@functools.cache
def as_it_stands(command: str) -> tuple[int, str]:
    """What `run` gives for a command that leaves nothing behind; several rows may ask for it."""
    return run(shlex.split(command)[1:])


def made_small(program: str, arguments: list[str]) -> list[str]:
    """The arguments with what the page says is appended."""
    names = {word.partition("=")[0].lstrip("-") for word in arguments}
    words = [str(ROOT / word) if word.startswith("config/") else word for word in arguments]
    key = "prepare.py" if program.endswith("prepare.py") else program
    words += SMALL[key].split()
    if program.endswith("data/textfile/prepare.py"):
        return words
    if key == "prepare.py":
        return [*words, f"--source={Path.cwd() / 'copy'}"]
    if key == "experiments/cpu_levels.py" and arguments[0] in ("train", "all"):
        words += [*LEVELS.split(), f"--dataset={Path.cwd() / 'tiny'}"]
    if key == "compress.py":
        words += [f"--dataset={Path.cwd() / 'tiny'}"]
    if key == "train.py":
        epochs = {"epochs", "num_epochs", "model_preset", "preset"} & names or any("lm_" in word for word in arguments)
        words += [] if {"fp16", "bf16", "dtype"} & names else [DTYPE]
        words += [LENGTH_IN_EPOCHS if epochs else LENGTH, f"--dataset={Path.cwd() / 'tiny'}"]
    return words


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_dataset):
    """A folder with a small dataset `tiny`, a copy of the Hub's texts, and the three runs of START HERE's second phase."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path_factory.mktemp("documents")
    shutil.copytree(tiny_dataset, folder / "tiny")
    texts = [f"Document {number}: the cat sat on the mat, and so on. " * 5 for number in range(40)]
    table = pyarrow.table({"text": texts})
    for split in ("train", "validation"):
        for place in ("data", "wikitext-2-raw-v1", "wikitext-103-raw-v1"):
            (folder / "copy" / place).mkdir(parents=True, exist_ok=True)
            parquet.write_table(table, folder / "copy" / place / f"{split}-00000-of-00001.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in THE_RUNS:
            code, said = run(["train.py", f"config/{name}.py"], small=True)
            assert code == 0, said
    return folder


@pytest.fixture
def place(workplace, tmp_path, monkeypatch):
    """A copy of the workplace, which is the current folder and where datasets are; config/ is the project's."""
    from data import dataset_writer, mixture, preparation, prepare_command, token_dataset

    folder = tmp_path / "place"
    shutil.copytree(workplace, folder)
    monkeypatch.chdir(folder)
    for module in (token_dataset, preparation, dataset_writer, mixture, prepare_command):
        monkeypatch.setattr(module, "DATA_DIR", folder / "data")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


def check_run(row: Row, command: str) -> None:
    """Run the command of a row at a tiny size in the current folder; what the row promises is there afterwards."""
    words = shlex.split(command)
    words = words[words.index("train.py") :] if words[0] == "torchrun" else words[1:]
    if words[0] == "train.py" and goes_on(words):
        code, said = run([word for word in words if not goes_on([word]) and "eval_only" not in word], small=True)
        assert code == 0, said
    if words[0] == "experiments/cpu_levels.py" and words[1] in ("test", "plot", "generate"):
        code, said = run(["experiments/cpu_levels.py", "train"], small=True)
        assert code == 0, said
    code, said = run(words, small=True)
    assert code == 0, f"line {row.line}: {command}\n{said}"
    assert_promised(row, said)
    for name in row.files:
        assert is_there(name, ROOT) or is_there(name, Path.cwd()), f"line {row.line}: {name} is not there after {command}"


def goes_on(words: Iterable[str]) -> bool:
    """Whether train.py goes on with a run."""
    return any(re.match(r"--resume|--init_from=resume", word) for word in words)


def assert_promised(row: Row, said: str) -> None:
    """What the row shows in bold is in what was printed."""
    for promise in row.promised:
        pattern = rf"(?<![\w.,]){re.escape(promise)}(?!\w|[.,]\d)"
        assert re.search(pattern, " ".join(said.split())), (
            f"line {row.line}: {promise!r} is not in what the command prints:\n{said}"
        )


def words_of(command: str) -> set[str]:
    """Programs and flags of a command; not the flags' values, but for the model, the law and the GPU that are asked about."""
    words = shlex.split(command)
    flags = {word if re.match("--(model_config|law|gpu)=", word) else word.partition("=")[0] for word in words}
    return {Path(word).name for word in flags if not word.startswith(("config/", "out/"))}


def costly(command: str) -> bool:
    """Whether a command takes a second or more: the levels, 16 bits on a CPU, sharding, memory of 7B, the shapes for a budget."""
    return bool(re.search(r"cpu_levels|--(bf|fp)16|--use_|=llama2_7b|--backward_config", command))


def commands_checked(kind: str) -> list:
    """(row, command) of every row of this kind; slow are those that are costly or bring no program and no flag that is new."""
    cases, seen, free = [], set(), set()
    for row in ROWS:
        for command in row.commands if kind in row.checks else ():
            new = words_of(command) - seen
            slow = costly(command) or not new and not (kind == "as is" and command in free)
            if not slow:
                seen |= new
                free.add(command)
            elif kind == "run" and command in free and not row.promised:
                continue
            marks = [pytest.mark.slow] if slow else []
            cases.append(pytest.param(row, command, id=f"{row.line}-{command[:70]}", marks=marks))
    return cases


@pytest.mark.parametrize("row, command", commands_checked("run"))
def test_a_command_runs_at_a_tiny_size_and_leaves_what_is_promised(place, row, command):
    check_run(row, command)


@pytest.mark.parametrize("row, command", commands_checked("as is"))
def test_a_command_prints_what_the_row_says(row, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, said = as_it_stands(command)
    assert code == 0, said
    assert_promised(row, said)


@pytest.mark.parametrize("row, command", commands_checked("refused"))
def test_a_command_is_refused_as_the_row_says(row, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, said = run(shlex.split(command)[1:])
    assert code in (1, 2) and "Traceback" not in said, said
    assert_promised(row, said)


@pytest.mark.slow
@pytest.mark.parametrize("row, command", [c for c in commands_checked("run") if c.values[1].startswith("torchrun ")])
def test_torchrun_starts_as_many_processes_as_the_row_says(place, run_python, row, command):
    words = shlex.split(command)
    at = words.index("train.py")
    torchrun = ["-m", "torch.distributed.run", *words[1:at]]
    result = run_python(*torchrun, ROOT / "train.py", *made_small("train.py", words[at + 1 :]), cwd=place, timeout=300)
    assert result.returncode == 0, result.stderr
    [number] = re.findall(r"--nproc_per_node=(\d+)", command)
    assert f"{number} processes" in result.stdout


# ------------------------------------------------------------------------------------------- the tests of the test

PLANTED = Row(1, DOCUMENTS[0], "there", "`python train.py` prints N = **12**", ("as is",))


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(checks=("perhaps",)), "says nothing"),
        (dict(checks=("none",)), "nothing runs its command"),
        (dict(here="`docs/LOG.md`", checks=("run",)), "no command to run"),
        (dict(here="`python train.py`"), "does not say what the command prints"),
        (dict(here="no `x.y`", checks=("none",)), "does not say why"),
        (dict(here="nothing of the kind", checks=("file",)), "no file is named"),
        (dict(here="`docs/NO.md`", checks=("file",)), "docs/NO.md is not there"),
        (dict(here="`docs/LOG.md`", checks=("not built",)), "is there by now"),
        (dict(here="`python train.py --n_layer=2`", checks=("not built",)), "can run by now"),
        (dict(here="later", checks=("not built",)), "does not name what will be there"),
        (dict(checks=("`tests/test_no.py::test_x`",)), "there is no tests/test_no.py"),
        (dict(checks=("`tests/test_from_the_documents.py::test_no`",)), "has no 'test_no'"),
    ],
)
def test_a_row_with_a_fault_is_found(changes, said):
    assert any(said in problem for problem in problems_of(replace(PLANTED, **changes)))


def test_rows_without_fault_have_none():
    assert problems_of(PLANTED) == []
    good = replace(PLANTED, here="`python no_such.py --x=1` and `docs/NO.md` will be there", checks=("not built",))
    assert problems_of(good) == []
    assert problems_of(replace(good, here="`python train.py --no_such_flag=1`")) == []


@pytest.mark.parametrize(
    "said, found",
    [("N = 12", True), ("N = 12.", True), ("N = 123", False), ("3.12", False), ("12,500", False), ("B12", False)],
)
def test_a_promised_figure_is_the_whole_figure(said, found):
    if found:
        assert_promised(PLANTED, said)
    else:
        with pytest.raises(AssertionError, match="is not in what the command prints"):
            assert_promised(PLANTED, said)


def test_a_command_that_fails_or_leaves_nothing_is_found(place):
    with pytest.raises(AssertionError, match="never_heard_of"):
        check_run(PLANTED, "python train.py --never_heard_of=1")
    with pytest.raises(AssertionError, match=r"out-llama/run_\*.jsonl is not there"):
        check_run(replace(PLANTED, here="leaves `out-llama/run_*.jsonl`"), "python train.py config/arch_llama.py")
