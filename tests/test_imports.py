"""Imports point one way: read from the source, absolute and relative, in functions, under TYPE_CHECKING and by name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
from conftest import ROOT

# From the ground floor up. A module may import what stands in its own row or in a row before it; of the last row nobody
# imports anything, as those are programs. The first pattern that fits a module decides; '*' also stands for dots.
LAYERS = (
    ("command_line",),
    (
        "train",
        "sample",
        "score",
        "compress",
        "convert",
        "ablate",
        "compare_architectures",
        "data.show",
        "data.*.prepare",
        "experiments.cpu_levels",
        "flops_*.detailed_cost_analysis",
    ),
    ("data", "data.*"),
    ("model_parts.values", "model_parts.patterns", "model_parts.presets", "model_parts.losses", "model_parts.recomputation"),
    ("model_parts.registry",),
    ("model_config",),
    ("model_parts", "model_parts.*"),
    ("model_components",),
    ("model_builder",),
    ("flops_parameter_counting", "flops_parameter_counting.*"),
    ("training_logger",),
    ("training", "training.*"),
    ("configurator",),
    ("comparison", "comparison.*"),
    ("ablation", "ablation.*"),
    ("layer_pruning", "layer_pruning.*"),
    ("experiments", "experiments.*"),
)
PROGRAMS = LAYERS[1]
STUDIES = "experiments.*"  # made of programs: these may import one
AS_PROGRAM = " as a program"
NO_MODULES = ("tests", "config", "build", "out")  # folders with other Python files
Edge = tuple[str, str, int]  # (who imports, what, in which line)


# ------------------------------------------------------------------------------------------- reading


def modules(root: Path) -> dict[str, Path]:
    """Dotted name → file of every module below a folder."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] not in NO_MODULES and not any(part.startswith(".") for part in parts):
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(root: Path) -> list[Edge]:
    """Every import of one module of the project in another one.

    What a file does under `if __name__ == "__main__"` it does as a program, which is another module to Python (the file is
    run a second time, as `__main__`): those imports are of "<module> as a program".
    """
    files = modules(root)
    return [
        (module + (AS_PROGRAM if line in run_lines else ""), target, line)
        for module, path in files.items()
        for run_lines in [program_lines(path)]
        for name, line in imported_names(path, module)
        if (target := nearest(name, files)) and (target != module or line in run_lines)
    ]


def program_lines(path: Path) -> set[int]:
    """The lines of a file's `if __name__ == "__main__":` blocks at the left margin."""
    blocks = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.If)]
    blocks = [block for block in blocks if ast.unparse(block.test) == "__name__ == '__main__'"]
    return {line for block in blocks for node in block.body for line in range(node.lineno, node.end_lineno + 1)}


def nearest(name: str, known: dict[str, Path]) -> str | None:
    """The module that a dotted name lies in: 'a.b.Class' → 'a.b'; None for what is not of the project."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


def imported_names(path: Path, module: str) -> Iterator[tuple[str, int]]:
    """(absolute dotted name, line) of what a file imports; of `from x import y` it is 'x.y'."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = absolute("." * node.level + (node.module or ""), package)
            yield from ((f"{start}.{alias.name}".lstrip("."), node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in ("import_module", "__import__", "run_module") and isinstance(node.args[0].value, str):
                yield absolute(node.args[0].value, package), node.lineno


def absolute(name: str, package: str) -> str:
    """A name with leading dots, as it is meant in a module of this package."""
    dots = len(name) - len(name.lstrip("."))
    if not dots:
        return name
    for _ in range(dots - 1):
        package = package.rpartition(".")[0]
    return f"{package}.{name[dots:]}".strip(".")


# ------------------------------------------------------------------------------------------- judging


def circle(edges: list[Edge]) -> list[str] | None:
    """Modules of which each imports the next and the last the first; None if there are no such."""
    targets: dict[str, set[str]] = {}
    for importer, imported, _ in edges:
        targets.setdefault(importer, set()).add(imported)
    done: set[str] = set()

    def search(module: str, way: list[str]) -> list[str] | None:
        if module in way:
            return way[way.index(module) :]
        if module in done:
            return None
        found = next(filter(None, (search(target, [*way, module]) for target in sorted(targets.get(module, ())))), None)
        done.add(module)
        return found

    return next(filter(None, (search(module, []) for module in sorted(targets))), None)


def layer(module: str) -> int:
    """The row of LAYERS that a module stands in. Raises LookupError."""
    if module.endswith(AS_PROGRAM):
        return len(LAYERS)
    for number, row in enumerate(LAYERS):
        if any(fnmatch(module, pattern) for pattern in row):
            return len(LAYERS) if row is PROGRAMS else number
    raise LookupError(f"{module} stands in no row of LAYERS; enter it there.")


def faults(edges: list[Edge]) -> list[str]:
    """A sentence for each import that points upwards, at a program, or from the cost model to what trains.

    A study may import the programs that it is made of, but no other study's command.
    """
    found = []
    for importer, imported, line in edges:
        if any(fnmatch(imported, program) for program in PROGRAMS):
            if not fnmatch(importer, STUDIES) or fnmatch(imported, STUDIES):
                found.append(f"{importer}:{line} imports the program {imported}")
        elif layer(importer) < layer(imported):
            found.append(f"{importer}:{line} imports {imported}, which stands above it")
    return found


# ------------------------------------------------------------------------------------------- the project


@pytest.fixture(scope="module")
def edges() -> list[Edge]:
    return imports(ROOT)


def test_every_module_is_read_and_has_a_layer(edges):
    for module in modules(ROOT):
        layer(module)
    known = {(importer, imported) for importer, imported, _ in edges}
    assert {("train", "training.checkpoint"), ("model_components", "model_config"), ("ablate", "comparison")} <= known
    assert len(known) > 150


def test_no_import_points_upwards_or_at_a_program(edges):
    assert not faults(edges)


def test_no_modules_import_each_other_in_a_circle(edges):
    assert circle(edges) is None


def test_whoever_resolves_a_model_registers_the_components(edges):
    """model_config.py does not import the components, so every module that makes models or lists components has to."""
    names = {module: {name for name, _ in imported_names(path, module)} for module, path in modules(ROOT).items()}
    makers = {module for module, found in names.items() if found & {"model_config.resolve", "model_config.components"}}
    registering = {module for module, target, _ in edges if target in ("model_components", "model_builder")}
    assert len(makers) >= 5 and makers <= registering, makers - registering


def test_nothing_heavy_is_imported_before_a_program_knows_what_it_is_asked(run_python):
    programs = [program for program in PROGRAMS if "*" not in program and program != "train"]
    code = f"import sys, {', '.join(programs)}; print({{'torch', 'numpy', 'scipy', 'transformers'}} & set(sys.modules))\n"
    code += "import train; print({'torch._dynamo', 'sympy', 'transformers', 'datasets', 'scipy'} & set(sys.modules))"
    assert run_python("-c", code, cwd=ROOT).stdout == "set()\nset()\n"


# ------------------------------------------------------------------------------------------- does it bite?

QUIET = {
    "command_line": "import os",
    "model_config": "from command_line import Failure",
    "training/__init__": "",
    "training/saving": "from training import checkpoint",
    "training/checkpoint": "import model_config",
    "train": "from training.saving import save",
}


def planted(root: Path, **files: str) -> list[Edge]:
    """The imports of a small project with these files (path without ending → text) in place of QUIET's."""
    for name, text in {**QUIET, **files}.items():
        path = root / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text + "\n")
    return imports(root)


def test_a_project_without_fault_has_none(tmp_path):
    edges = planted(tmp_path)
    assert circle(edges) is None and not faults(edges) and len(edges) == 4


@pytest.mark.parametrize(
    "statement",
    [
        "import training.saving",
        "import os, training.saving as s",
        "from training.saving import save",
        "from training import saving",
        "from . import saving",
        "from .saving import save",
        "from ..training import saving",
        "def later():\n    from .saving import save",
        "if TYPE_CHECKING:\n    from training.saving import Saver",
        "try:\n    import training.saving\nexcept ImportError:\n    pass",
        "importlib.import_module('training.saving')",
        "import_module('.saving', __package__)",
        "__import__('training.saving')",
        "runpy.run_module('training.saving')",
    ],
)
def test_a_circle_is_found_however_it_is_written(statement, tmp_path):
    edges = planted(tmp_path, **{"training/checkpoint": statement})
    assert sorted(circle(edges)) == ["training.checkpoint", "training.saving"]


@pytest.mark.parametrize(
    "module, statement, said",
    [
        ("model_config", "from training import saving", "model_config:1 imports training.saving, which stands above it"),
        ("command_line", "def f():\n    import model_config", "command_line:2 imports model_config, which stands above it"),
        ("training/checkpoint", "from .. import train", "training.checkpoint:1 imports the program train"),
        ("training/checkpoint", "import train", "training.checkpoint:1 imports the program train"),
        ("sample", "from train import main", "sample:1 imports the program train"),
        ("comparison", "importlib.import_module('train')", "comparison:1 imports the program train"),
        ("flops_parameter_counting/memory", "from training.saving import x", "flops_parameter_counting.memory:1 imports "
         "training.saving, which stands above it"),
    ],
)  # fmt: skip
def test_an_import_upwards_is_found_however_it_is_written(module, statement, said, tmp_path):
    assert faults(planted(tmp_path, **{module: statement})) == [said]


def test_a_study_may_import_programs_and_nobody_imports_a_study(tmp_path):
    study = {
        "experiments/__init__": "",
        "experiments/runs": "import train",
        "experiments/cpu_levels": "from experiments import runs",
    }
    assert not faults(planted(tmp_path, **study))
    edges = planted(tmp_path, **{"model_config": "import experiments.runs", "experiments/other": "from . import cpu_levels"})
    assert faults(edges) == [
        "experiments.other:1 imports the program experiments.cpu_levels",
        "model_config:1 imports experiments.runs, which stands above it",
    ]


@pytest.mark.parametrize("test", ["__name__ == '__main__'", "__name__ != '__main__'", "True"])
def test_only_what_a_file_does_as_a_program_may_point_upwards(test, tmp_path):
    edges = planted(
        tmp_path, **{"training/checkpoint": f"import os\nif {test}:\n    from training import saving\nelse:\n    pass"}
    )
    assert bool(circle(edges)) == (test != "__name__ == '__main__'")
    edges = planted(tmp_path, **{"training/checkpoint": f"if {test}:\n    pass\nelse:\n    from training import saving"})
    assert circle(edges)


def test_a_longer_circle_is_found_and_named_in_order(tmp_path):
    files = {"a": "import b", "b": "from c.d import e", "c/__init__": "", "c/d": "from . import x", "c/x": "import a"}
    assert circle(planted(tmp_path, **files)) == ["a", "b", "c.d", "c.x"]


def test_a_module_without_a_layer_is_refused():
    with pytest.raises(LookupError, match="new_thing stands in no row"):
        layer("new_thing")
