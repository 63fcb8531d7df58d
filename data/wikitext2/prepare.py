"""Prepare data/wikitext2 (see README.md): python data/wikitext2/prepare.py [--help]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works from any working directory

from data.hub import ARTICLE, Articles, HubRows
from data.plan import Options
from data.prepare_command import Recipe, run_recipe
from data.sources import Splits

NAME, CONFIG = "Salesforce/wikitext", "wikitext-2-raw-v1"
RECIPE = Recipe(
    "wikitext2",
    "WikiText-2 (raw), articles of Wikipedia, by GPT-2's BPE",
    lambda given: Splits(
        {
            "train": Articles(HubRows(NAME, "train", config=CONFIG, local=given.source), ARTICLE),
            "val": Articles(HubRows(NAME, "validation", config=CONFIG, local=given.source), ARTICLE),
        }
    ),
    Options(tokenizer="gpt2"),
    size="5 MB to download, 11 MB of text",
)

if __name__ == "__main__":
    sys.exit(run_recipe(RECIPE))
