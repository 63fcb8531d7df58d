"""Prepare data/shakespeare_char (see README.md): python data/shakespeare_char/prepare.py [--help]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works from any working directory

from data.hub import tiny_shakespeare
from data.plan import Options
from data.prepare_command import Recipe, run_recipe

RECIPE = Recipe(
    "shakespeare_char",
    "Tiny Shakespeare, one text of a million characters, by characters",
    lambda given: tiny_shakespeare(given.source),
    Options(tokenizer="char"),
    size="1.1 MB to download",
)

if __name__ == "__main__":
    sys.exit(run_recipe(RECIPE))
