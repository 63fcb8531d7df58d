"""Prepare data/slimpajama_6b_gpt2 (see README.md): python data/slimpajama_6b_gpt2/prepare.py [--help]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works from any working directory

from data.hub import hub_splits
from data.plan import Options
from data.prepare_command import Recipe, run_recipe

RECIPE = Recipe(
    "slimpajama_6b_gpt2",
    "SlimPajama-6B, a sample of SlimPajama (web, books, code, papers), by GPT-2's BPE",
    lambda given: hub_splits("DKYoon/SlimPajama-6B", given.source),
    Options(tokenizer="gpt2"),
    size="14 GB to download, 24 GB of text in 5,489,000 documents, about 6e9 tokens",
)

if __name__ == "__main__":
    sys.exit(run_recipe(RECIPE))
