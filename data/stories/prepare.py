"""Prepare data/stories (see README.md): python data/stories/prepare.py [--tokenizer=…] [--vocab_size=…] [--help]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works from any working directory

from data.prepare_command import embedded, run_recipe

RECIPE = embedded("stories")

if __name__ == "__main__":
    sys.exit(run_recipe(RECIPE))
