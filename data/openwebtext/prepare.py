"""Prepare data/openwebtext (see README.md): python data/openwebtext/prepare.py [--help]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works from any working directory

from data.hub import HubRows
from data.plan import Options
from data.prepare_command import Recipe, run_recipe

RECIPE = Recipe(
    "openwebtext",
    "OpenWebText, web pages that Reddit links to, by GPT-2's BPE",
    lambda given: HubRows("Skylion007/openwebtext", local=given.source),
    Options(tokenizer="gpt2", val_fraction=0.0005),  # nanoGPT's share
    size="8,013,769 documents, 9.0e9 tokens",
)

if __name__ == "__main__":
    sys.exit(run_recipe(RECIPE))
