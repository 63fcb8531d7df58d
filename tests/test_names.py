"""Names: two things that differ are not called alike, and no module takes a name that belongs to somebody else."""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from importlib import metadata

import pytest
from conftest import ROOT
from test_imports import PROGRAMS, modules

OF_EVERY_PROGRAM = {"main", "make_parser", "parse", "run"}
# Top-level names of standard libraries newer than the oldest Python that is supported; each Python adds its own below.
NEWER_PYTHONS = {"tomllib", "annotationlib", "compression", "profiling"}
NEEDED_BY_OTHERS = {"lm_eval", "evaluate"}  # a benchmark harness that users have beside this project, and what it needs


# ------------------------------------------------------------------------------------------- names inside


def public_names(text: str) -> dict[str, str]:
    """Public functions and classes of a module → the name of what they return or derive from, as far as it is written."""
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            returns = getattr(node, "returns", None)
            found[node.name] = ast.unparse(returns) if returns else ""
    return found


def alike(sources: dict[str, str]) -> list[str]:
    """Names of functions and classes in different modules (name → text) that differ in nothing but case and underscores.

    A function may be called like the class that it returns.
    """
    places = defaultdict(list)
    for module, text in sources.items():
        for name, returned in public_names(text).items():
            if not (module in PROGRAMS and name in OF_EVERY_PROGRAM or name == "main"):
                places[name.lower().replace("_", "")].append((module, name, returned))
    found = []
    for same in places.values():
        classes = {name for _, name, _ in same if name[0].isupper()}
        different = [(module, name) for module, name, returned in same if not (returned and returned in classes)]
        if len({module for module, _ in different}) > 1:
            found.append(" and ".join(f"{module}.{name}" for module, name in different))
    return found


def test_public_names_of_different_things_do_not_read_alike():
    sources = {module: path.read_text(encoding="utf-8") for module, path in modules(ROOT).items()}
    assert sum(len(public_names(text)) for text in sources.values()) > 300
    assert not alike(sources)


@pytest.mark.parametrize(
    "one, other, said",
    [
        ("class Plan: pass", "class Plan: pass", ["a.Plan and b.Plan"]),
        ("class NotComparable: pass", "def not_comparable(): pass", ["a.NotComparable and b.not_comparable"]),
        ("def short(x): pass", "import short", []),
        ("class Estimate: pass", "def estimate(x) -> Estimate: pass", []),
        ("def _size(): pass", "def _size(): pass", []),
    ],
)
def test_names_that_read_alike_are_found(one, other, said):
    assert alike({"a": one, "b": other}) == said


# ------------------------------------------------------------------------------------------- names outside


def top_level(names) -> set[str]:
    """The names that a project takes at the top level of the import path: its modules, packages and folders of config files."""
    return {name.partition(".")[0] for name in names}


def required(requirements: str) -> dict[str, metadata.Distribution]:
    """The installed distributions that requirements.txt names, and all that those need in turn."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [line.partition("#")[0] for line in requirements.splitlines()]
    while waiting:
        name = re.match(r"\s*([\w.-]*)", waiting.pop())[1]
        if name and name.lower() not in found:
            try:
                found[name.lower()] = metadata.distribution(name)
            except metadata.PackageNotFoundError:
                continue  # for another system, or for an extra that is not used
            waiting += found[name.lower()].requires or ()
    return found


def import_names(distribution: metadata.Distribution) -> set[str]:
    """What a distribution has at the top level: 'torch', 'torchgen', 'functorch'."""
    files = [file for file in distribution.files or () if file.suffix in (".py", ".so", ".pyd") and ".." not in file.parts]
    return {file.parts[0].partition(".")[0] for file in files}


def taken(names: set[str], requirements: str) -> dict[str, str]:
    """Of these names, those that are somebody else's → whose."""
    owners = dict.fromkeys(sys.stdlib_module_names | NEWER_PYTHONS, "the standard library")
    owners |= dict.fromkeys(NEEDED_BY_OTHERS, "lm-eval")
    for name, distribution in required(requirements).items():
        owners |= dict.fromkeys(import_names(distribution), name)
    return {name: owners[name] for name in sorted(names & owners.keys())}


def test_no_module_takes_the_name_of_a_library():
    """Run as a script, a program's folder comes first on the path, so such a module would hide the library."""
    names = top_level(modules(ROOT)) | {"config"}
    assert {"train", "command_line", "training", "data"} <= names
    assert not taken(names, (ROOT / "requirements.txt").read_text(encoding="utf-8"))


def test_a_taken_name_is_found_whoever_took_it():
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    names = {"inspect", "compression", "evaluate", "tokenizers", "functorch", "markupsafe", "train"}
    assert taken(names, requirements) == {
        "inspect": "the standard library",
        "compression": "the standard library",
        "evaluate": "lm-eval",
        "tokenizers": "tokenizers",
        "functorch": "torch",
        "markupsafe": "markupsafe",  # which torch needs only by way of jinja2
    }
