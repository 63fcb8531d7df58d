"""Prepare data/tinystories (see README.md): python data/tinystories/prepare.py [--help]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works from any working directory

from data.hub import hub_splits
from data.plan import Options
from data.prepare_command import Recipe, run_recipe

RECIPE = Recipe(
    "tinystories",
    "TinyStories, short stories in the words of a small child, by GPT-2's BPE",
    lambda given: hub_splits("roneneldan/TinyStories", given.source),
    Options(tokenizer="gpt2"),
    size="1 GB to download, 1.9 GB of text in 2,119,719 stories",
)

if __name__ == "__main__":
    sys.exit(run_recipe(RECIPE))
