"""The wheel: it holds every module and data file, and works from a folder that knows nothing of the repository."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from test_imports import modules

SETUPTOOLS = 77  # pyproject.toml's build-system


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the wheel's content, as pip would install it. Not to be changed."""
    setuptools = pytest.importorskip("setuptools", reason="building a wheel needs setuptools")
    if int(setuptools.__version__.split(".")[0]) < SETUPTOOLS:
        pytest.skip(f"building a wheel needs setuptools {SETUPTOOLS}, here is {setuptools.__version__}")
    folder = tmp_path_factory.mktemp("wheel")
    copy_project(folder / "source")
    (folder / "built").mkdir()
    build = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"  # what pip calls
    done = subprocess.run(
        [sys.executable, "-c", build, str(folder / "built")], cwd=folder / "source", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    [wheel] = (folder / "built").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def copy_project(target: Path) -> None:
    """The project's files without runs, datasets and environments; building leaves files in the folder it works in."""
    target.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    data = [*ROOT.glob("config/*"), *ROOT.glob("*/*.html"), *ROOT.glob("flops_parameter_counting/configs/**/*.json*")]
    for path in [*modules(ROOT).values(), *data]:
        if path.is_file():
            copy = target / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)


def test_the_wheel_holds_every_module_and_nothing_but_the_project(installed):
    expected = {path.relative_to(ROOT) for path in (*modules(ROOT).values(), *ROOT.glob("config/*.py"))}
    found = {path.relative_to(installed) for path in installed.rglob("*.py")}
    assert found == expected
    others = {path.suffix for path in installed.rglob("*") if path.is_file() and ".dist-info" not in str(path)}
    assert others == {".py", ".html", ".json", ".jsonc"}


COMMANDS = """
import contextlib, io, sys
import train, sample, score, convert, compress, ablate, compare_architectures, comparison.pictures, data.preparation
from experiments import cpu_levels
from flops_parameter_counting import detailed_cost_analysis

for module in (train, ablate, detailed_cost_analysis, comparison.pictures, data.preparation):
    assert module.__file__.startswith(sys.argv[1]), module.__file__
assert comparison.pictures.PAGE.is_file()
recipes = {path.parent.name for path in data.preparation.DATA_DIR.glob("*/prepare.py")}
assert {"pydocs", "pystdlib", "stories", "textfile"} <= recipes

def said(program, *words):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        try:
            code = program.main(list(words))
        except SystemExit as end:
            code = end.code
    assert not code, (program, words, code)
    return text.getvalue()

for program in (train, sample, score, convert, compress, ablate, compare_architectures, detailed_cost_analysis, cpu_levels):
    assert "--" in said(program, "--help")
assert "quickstart" in said(train, "config/quickstart.py", "--print_config")
options = detailed_cost_analysis.parse(["--model_config=config/full_llama_1.36b.py"])
assert detailed_cost_analysis.read_model(options)[1].n_embd == 2304
assert "GPU hours" in said(detailed_cost_analysis, "--backward_config=besiroglu/h20_4_slimpajama_6b")
"""


def test_every_command_runs_from_the_wheel_in_any_folder(installed, tmp_path, run_python):
    done = run_python("-c", COMMANDS, installed, cwd=tmp_path, env={"PYTHONPATH": str(installed)})
    assert done.returncode == 0, done.stderr
    done = run_python("-m", "train", "--help", cwd=tmp_path, env={"PYTHONPATH": str(installed)})
    assert done.returncode == 0 and "--arch_preset" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_and_a_study_work_from_the_wheel_with_a_dataset_that_prepares_itself(installed, tmp_path, run_python):
    site, folder = tmp_path / "site", tmp_path / "work"
    shutil.copytree(installed, site)
    folder.mkdir()
    words = ("config/quickstart.py", "--max_iters=2", "--eval_iters=1", "--device=cpu", "--n_layer=1", "--n_embd=32")
    for module, more in (
        ("train", ()),
        ("ablate", ("--vary", "bias=True,False", "--seeds=2", "--out_dir=study", "--dataset=pydocs")),
    ):
        done = run_python("-m", module, *words, *more, cwd=folder, env={"PYTHONPATH": str(site)}, timeout=600)
        assert done.returncode == 0, done.stderr
    assert (site / "data" / "pydocs" / "meta.json").is_file() and (folder / "study" / "comparison.html").is_file()
