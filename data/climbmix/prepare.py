"""Prepare data/climbmix (see README.md): python data/climbmix/prepare.py [--help]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works from any working directory

from data.hub import HubRows
from data.plan import Options
from data.prepare_command import Recipe, run_recipe

RECIPE = Recipe(
    "climbmix",
    "ClimbMix, a mixture of web text found by clustering, shuffled, by GPT-2's BPE",
    lambda given: HubRows("karpathy/climbmix-400b-shuffle", local=given.source),
    Options(tokenizer="gpt2", val_fraction=0.0001, shard_tokens=10**9),
    size="6,543 files, 400e9 GPT-2 tokens; take a part of it with --max_tokens",
)

if __name__ == "__main__":
    sys.exit(run_recipe(RECIPE))
