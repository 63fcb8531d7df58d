"""Prepare a dataset from your own files (see README.md): python data/textfile/prepare.py FILE… --name=NAME [--help]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works from any working directory

from data.prepare_command import run_textfile

if __name__ == "__main__":
    sys.exit(run_textfile())
