"""Prepare data/fineweb_edu (see README.md): python data/fineweb_edu/prepare.py [--help]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works from any working directory

from data.hub import HubRows
from data.plan import Options
from data.prepare_command import Recipe, run_recipe

SAMPLES = ("10BT", "100BT", "350BT")
RECIPE = Recipe(
    "fineweb_edu",
    "FineWeb-Edu, web pages chosen for teaching, by GPT-2's BPE",
    lambda given: HubRows(
        "HuggingFaceFW/fineweb-edu", config=f"sample-{given.sample}", folder=f"sample/{given.sample}", local=given.source
    ),
    Options(tokenizer="gpt2", val_fraction=0.0005, shard_tokens=10**9),
    arguments=lambda parser: parser.add_argument(
        "--sample", choices=SAMPLES, default="10BT", help="how large a sample, in 10⁹ GPT-2 tokens [10BT]"
    ),
    size="10, 100 or 350 times 10⁹ GPT-2 tokens (--sample); 10BT is about 28 GB to download",
)

if __name__ == "__main__":
    sys.exit(run_recipe(RECIPE))
