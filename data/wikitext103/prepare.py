"""Prepare data/wikitext103 (see README.md): python data/wikitext103/prepare.py [--help]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works from any working directory

from data.hub import ARTICLE, hub_splits
from data.plan import Options
from data.prepare_command import Recipe, run_recipe

RECIPE = Recipe(
    "wikitext103",
    "WikiText-103 (raw), articles of Wikipedia, by GPT-2's BPE",
    lambda given: hub_splits("Salesforce/wikitext", given.source, "wikitext-103-raw-v1", heads=ARTICLE),
    Options(tokenizer="gpt2"),
    size="310 MB to download, 540 MB of text",
)

if __name__ == "__main__":
    sys.exit(run_recipe(RECIPE))
