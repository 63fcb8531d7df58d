"""What all processes do together with a checkpoint: each checks, writes and reads a part, and nobody waits in a collective."""

from __future__ import annotations

import datetime
import math
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from group import in_processes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from training_runs import world

from training import manifest, shards
from training.checkpoint import CheckpointStore, NonFiniteWeights, UnlistedFile, find_checkpoint, load_tensors
from training.processes import World

ROWS = 10  # which 4 processes share as 3, 3, 3, 1


def whole() -> dict[str, torch.Tensor]:
    """The tensors that the processes share."""
    return {f"{kind}.{n}": torch.arange(ROWS * 4.0).view(ROWS, 4) + n for kind in ("model", "optimizer") for n in range(6)}


def shared(tensors: dict[str, torch.Tensor], dimension: int = 0) -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {name: distribute_tensor(tensor, mesh, [Shard(dimension)]) for name, tensor in tensors.items()}


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    own = {f"rng.{dist.get_rank():05d}": torch.tensor([float(dist.get_rank())])}
    return CheckpointStore(folder, world()).save(1, {**tensors, **own}, {"model": {}}, keep_last=2)


def save_and_check(folder: Path) -> tuple[list[str], list[str], bool]:
    """Save in shards of rows; names of the files that this process has hashed at a check; whether it reads back columns."""
    monkey, hashed, original = pytest.MonkeyPatch(), [], manifest.sha256
    monkey.setattr(shards, "FILE_BYTES", 150)  # several files for each process
    path = save(folder, shared(whole()))
    monkey.setattr(manifest, "sha256", lambda path, **options: hashed.append(path.name) or original(path, **options))
    assert find_checkpoint(folder, world=world()) == path
    of_all, hashed[:] = list(hashed), []
    assert find_checkpoint(path, holding="model", world=world()) == path
    monkey.undo()
    into = shared({name: torch.zeros(ROWS, 4, dtype=torch.float64) for name in whole()}, dimension=1)
    load_tensors(path, into, world=world())
    return of_all, hashed, all(torch.equal(tensor.full_tensor(), whole()[name].double()) for name, tensor in into.items())


def test_each_file_is_checked_by_one_process_mostly_by_the_one_that_wrote_it(tmp_path):
    """Issue 10.13: rank 0 alone hashed everything while the others waited in a collective."""
    found = in_processes(4, save_and_check, tmp_path, timeout=60)
    files = sorted(path.name for path in (tmp_path / "checkpoints" / "step_000000001").iterdir() if path.name != "manifest.json")
    assert len(files) == 4 * (2 * 2 + 1) + 1
    assert sorted(name for of_all, _, _ in found for name in of_all) == files
    for rank, (of_all, of_model, _) in enumerate(found):
        own = [name for name in of_all if name.startswith(f"shard-{rank + 1:05d}")]
        assert len(own) >= len(of_all) / 2 and of_model
    assert sum(len(of_model) for _, of_model, _ in found) == 4 * 2 + 1
    assert all(same for _, _, same in found)


def slowly(folder: Path) -> list[float]:
    """Check, write and read, each much longer than a collective may take, in rank 0 alone; seconds of each."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=1))
    me, size = dist.get_rank(), dist.get_world_size()
    impatient, monkey, seconds = World(me, size, me, size, group=group), pytest.MonkeyPatch(), []

    def slow(original):
        def function(*arguments, **options):
            if me == 0:
                time.sleep(2)
            return original(*arguments, **options)

        return function

    tensors = {"model.0": whole()["model.0"]}
    for module, name in ((manifest, "sha256"), (shards, "write_tensors"), (shards, "read_into")):
        monkey.setattr(module, name, slow(getattr(module, name)))
    for job in (
        lambda: CheckpointStore(folder, impatient).save(1, tensors, {"model": {}}, keep_last=2),
        lambda: CheckpointStore(folder).newest_intact(print, "model", impatient),
        lambda: load_tensors(folder / "checkpoints" / "step_000000001", tensors, world=impatient),
    ):
        started = time.monotonic()
        job()
        seconds.append(time.monotonic() - started)
    monkey.undo()
    return seconds


def test_a_check_a_save_and_a_load_may_take_longer_than_a_collective(tmp_path):
    """Issue 10.13. The group's collectives may take 1 s; each of these takes 2 s or more."""
    assert all(1.9 < seconds < 20 for of_rank in in_processes(2, slowly, tmp_path, timeout=60) for seconds in of_rank)


def outcomes(folder: Path) -> list[str]:
    """What is raised in this process where only one process finds it, or all of them."""
    found, tensors = [], shared({"model.a": torch.zeros(ROWS, 4)})
    path = save(folder, tensors)

    def attempt(job) -> None:
        try:
            job()
            found.append("nothing")
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")

    if dist.get_rank() == 1:
        tensors["model.a"].to_local()[0, 0] = math.nan
    attempt(lambda: save(folder, tensors))
    dist.barrier()
    shard = path / "shard-00002-model-00001-of-00002.safetensors"
    data = shard.read_bytes()
    dist.barrier()
    if dist.get_rank() == 0:
        shard.write_bytes(data[:-1] + b"x")
    dist.barrier()
    attempt(lambda: find_checkpoint(path, world=world()))
    dist.barrier()
    if dist.get_rank() == 0:
        (path / "more.safetensors").write_bytes(data)
    dist.barrier()
    attempt(lambda: find_checkpoint(folder, world=world()))
    attempt(lambda: load_tensors(path, {}, world=world()))
    return found


def test_what_one_process_finds_out_all_of_them_raise_alike(tmp_path):
    """Issues 10.1, 10.9, 10.13."""
    one, other = in_processes(2, outcomes, tmp_path, timeout=60)
    assert one[:3] == other[:3]
    not_finite, damaged, unlisted, reading = one
    assert not_finite.startswith(NonFiniteWeights.__name__) and "model.a" in not_finite
    assert damaged.startswith("CheckpointError") and "shard-00002-model-00001-of-00002.safetensors does not match" in damaged
    assert unlisted.startswith(UnlistedFile.__name__) and "more.safetensors" in unlisted and "more" in reading
