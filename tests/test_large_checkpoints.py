"""Saving, checking and loading a large state: how much memory that takes beyond the state, and how long. Issue 10.13.

    python -m pytest -s -m slow tests/test_large_checkpoints.py        # prints the times beside those of dd

The memory is asserted, the times are only printed: what else the machine does decides them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

PARAMETERS, ROUNDS = 128 << 20, 5  # with AdamW's state 12 bytes each, 1.6 GB; save, dd and load take turns
MOST_BEYOND_THE_STATE = 0.3e9  # bytes; 1 GB is what the issue allows, and a copy of the state would be 1.6 GB


def high_water() -> int:
    """The most memory that this process ever had, in bytes."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def measure(folder: Path, rounds: int, asynchronous: bool) -> dict:
    """In a process of its own: save, check and load `rounds` times; seconds of each, and the memory beyond the state."""
    import torch

    from training.checkpoint import CheckpointStore, load_tensors
    from training.manifest import verify
    from training.saving import BackgroundSaver, Saver

    torch.set_num_threads(1)
    rows = PARAMETERS // 1024 // 16  # 16 matrices of the same size, and each with two moments
    names = [f"model.{i}" for i in range(16)] + [f"optimizer.{i}.{kind}" for i in range(16) for kind in ("exp_avg", "exp_avg_sq")]
    tensors = {name: torch.empty(rows, 1024).uniform_() for name in names}
    store = CheckpointStore(folder / "out")
    saver = BackgroundSaver(store) if asynchronous else Saver(store)
    sums = {name: tensor[::97].double().sum() for name, tensor in tensors.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    found: dict[str, list] = {"save": [], "dd": [], "check": [], "load": []}
    beyond = {}
    for number in range(1, rounds + 1):
        before, started = high_water(), time.perf_counter()
        saver.save(number, tensors, {"model": {}}, lambda path, seconds: None, keep_last=1)
        saver.wait()
        found["save"].append(time.perf_counter() - started)
        beyond.setdefault("save", high_water() - before)
        checkpoint = store.pointed("latest")
        for doing, function in (("check", verify), ("load", lambda where: load_tensors(where, tensors))):
            before, started = high_water(), time.perf_counter()
            function(checkpoint)
            found[doing].append(time.perf_counter() - started)
            beyond.setdefault(doing, high_water() - before)
        started = time.perf_counter()
        dd = ["dd", "if=/dev/zero", f"of={folder / 'dd'}", "bs=16M", f"count={size >> 24}", "conv=fsync"]
        subprocess.run(dd, check=True, capture_output=True)
        found["dd"].append(time.perf_counter() - started)
        (folder / "dd").unlink()
        assert all(tensors[name][::97].double().sum() == total for name, total in sums.items())
    return {"bytes": size, "beyond": beyond, "seconds": found}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("asynchronous", (False, True), ids=("waiting", "in the background"))
def test_a_save_and_a_load_take_little_memory_beyond_the_state(tmp_path, asynchronous):
    """Before: 4.1 GB at a save and 2.1 GB at a load of 3.4 GB."""
    if shutil.disk_usage(tmp_path).free < 6e9:
        pytest.skip("needs 6 GB of disk")
    rounds = 1 if asynchronous else ROUNDS
    call = f"t.measure(p.Path({str(tmp_path)!r}), {rounds}, {asynchronous})"
    command = [sys.executable, "-c", f"import json, test_large_checkpoints as t, pathlib as p; print(json.dumps({call}))"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "tests", ROOT)))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    size, beyond, seconds = found["bytes"], found["beyond"], found["seconds"]
    copy = size if asynchronous else 0
    assert beyond["save"] - copy < MOST_BEYOND_THE_STATE and beyond["load"] < MOST_BEYOND_THE_STATE, found
    assert beyond["check"] < MOST_BEYOND_THE_STATE, found
    median = {doing: statistics.median(times) for doing, times in seconds.items()}
    bound = max(median["dd"], size / 1.5e9)
    memory = ", ".join(f"{what} {most / 1e9:.2f}" for what, most in beyond.items())
    times = ", ".join(f"{what} {took:.2f}" for what, took in median.items())
    print(
        f"\n{size / 1e9:.2f} GB, beyond that {memory} GB\nmedians of {rounds}: {times} s, 1.5 GB/s {size / 1.5e9:.2f} s\n"
        f"of the slower of dd and 1.5 GB/s: save {median['save'] / bound:.2f}, check and load "
        f"{(median['check'] + median['load']) / bound:.2f}\n{seconds}"
    )
