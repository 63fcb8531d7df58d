"""Prepare data/slimpajama_627b (see README.md): python data/slimpajama_627b/prepare.py [--help]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works from any working directory

from data.hub import hub_splits
from data.plan import Options
from data.prepare_command import Recipe, run_recipe

RECIPE = Recipe(
    "slimpajama_627b",
    "SlimPajama (web, books, code, papers), streamed, by Llama 2's tokenizer",
    lambda given: hub_splits("cerebras/SlimPajama-627B", given.source),
    Options(tokenizer="TinyLlama/TinyLlama_v1.1", shard_tokens=10**9),  # Llama 2's 32,000 tokens, not gated
    size="895 GB to download in 59,166 files, 627e9 tokens",
)

if __name__ == "__main__":
    sys.exit(run_recipe(RECIPE))
