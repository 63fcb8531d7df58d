"""What all tests share: running a command of the project as a user would."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before PyTorch: threads that spin make a shared machine crawl

import signal
import subprocess
import sys
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started in the background of a script: commands would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def run_python():
    """run_python(*arguments, cwd=ROOT, timeout=120, env=None, input=None) → CompletedProcess with text stdout and stderr.

    Runs this Python on `arguments` ("train.py", "--help") with at most 2 threads. `env` adds to the environment. A script
    run from another folder is named by its full path: ROOT / "train.py". Does not check the exit code.
    """

    def run(
        *arguments, cwd=ROOT, timeout: float = 120, env: dict[str, str] | None = None, input: str | None = None
    ) -> subprocess.CompletedProcess:
        threads = os.environ.get("OMP_NUM_THREADS", "2")
        limits = {"OMP_NUM_THREADS": threads if threads == "1" else "2", "PYTHONIOENCODING": "utf-8"}
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=cwd,
            timeout=timeout,
            input=input,
            capture_output=True,
            text=True,
            encoding="utf-8",
            env={**os.environ, **limits, **(env or {})},
        )

    return run


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory) -> Path:
    """A prepared dataset of real text, by bytes: about 60,000 training and 7,000 validation tokens, 256 ids."""
    import argparse

    from data.preparation import prepare

    folder = tmp_path_factory.mktemp("data") / "tiny"
    text = Path(argparse.__file__).read_text(encoding="utf-8")[:67_000]
    prepare(lambda: iter([("argparse.py", text)]), folder, tokenizer="byte")
    return folder
