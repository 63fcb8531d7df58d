"""Prepare data/shakespeare_char (see README.md): python data/shakespeare_char/prepare.py [--help]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works from any working directory

from data.hub import web_text
from data.plan import Options
from data.prepare_command import Recipe, run_recipe

RECIPE = Recipe(
    "shakespeare_char",
    "Tiny Shakespeare, one text of a million characters, by characters",
    lambda given: web_text(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        local=given.source,
    ),
    Options(tokenizer="char"),
    size="1.1 MB to download",
)

if __name__ == "__main__":
    sys.exit(run_recipe(RECIPE))
