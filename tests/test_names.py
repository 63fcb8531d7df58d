"""Names: two things that differ are not called alike, and no module takes a name that belongs to somebody else."""

from __future__ import annotations

import ast
from collections import defaultdict

import pytest
from conftest import ROOT
from test_imports import PROGRAMS, modules

OF_EVERY_PROGRAM = {"main", "make_parser", "parse", "run"}
# Top-level names of standard libraries newer than the oldest Python that is supported; each Python adds its own below.
NEWER_PYTHONS = {"annotationlib", "compression", "string.templatelib", "tomllib", "_zstd", "pathlib.types", "profiling"}
NEEDED_BY_OTHERS = {"evaluate"}  # import names of what users have beside this project: lm-eval needs the package evaluate


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
