"""What goes wrong in one process or on the disk ends all processes with one sentence, said once, and destroys nothing."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from tests.distributed.launching import SMALL, Group, shared_launcher
from training.checkpoint import CheckpointStore, verify

RUN = (*SMALL, "--parallelism=zero1", "--save_interval=5", "--eval_interval=0")


@pytest.fixture(scope="module")
def start(tiny_dataset):
    """start(out_dir, *arguments, **options of Launcher.run) → the ended Group of two processes."""

    def run(out_dir: Path, *arguments: str, **options) -> Group:
        return shared_launcher().run(*RUN, f"--dataset={tiny_dataset}", f"--out_dir={out_dir}", *arguments, **options)

    return run


@pytest.fixture(scope="module")
def trained(start, tmp_path_factory) -> Path:
    """A run of 10 steps by two processes, with checkpoints of step 5 and step 10. Not to be changed."""
    out_dir = tmp_path_factory.mktemp("trained") / "out"
    group = start(out_dir, "--max_iters=10")
    assert group.wait() == [0, 0] and group.err == "", group.err
    assert [path.name for path in CheckpointStore(out_dir).all()] == ["step_000000005", "step_000000010"]
    return out_dir


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    """A copy of `trained` to spoil."""
    return Path(shutil.copytree(trained, tmp_path / "out"))


def refused(group: Group, code: int, *words: str) -> None:
    """Every process ended with this code, and one line was printed, with these words in it."""
    assert set(group.codes.values()) == {code}, (group.codes, group.err)
    assert len(group.complaints) == 1, group.err
    missing = [word for word in words if word not in group.complaints[0]]
    assert not missing, (missing, group.err)
    assert "Traceback" not in group.err


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def shard_of(rank: int, checkpoint: Path) -> Path:
    """One of the files that this rank has written."""
    return sorted(checkpoint.glob(f"shard-{rank + 1:05d}-*.safetensors"))[1]


def resumed_from(out_dir: Path) -> int | None:
    """The step from which the last run of a folder went on."""
    starts = [json.loads(log.read_text().split("\n")[0]) for log in out_dir.glob("run_*.jsonl")]
    source = max(starts, key=lambda event: event["time"])["resumed_from"]
    return source and source["step"]


# ------------------------------------------------------------------------------------------- the disk


@pytest.mark.parametrize(
    "rank, background",
    [(0, True), (1, False), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0, False), (1, True)))],
)
def test_no_space_in_one_process_is_one_sentence_and_the_checkpoints_before_are_untouched(start, copy, rank, background):
    before = contents(copy / "checkpoints")
    limit = f"import resource\nif RANK == {rank}: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))"
    group = start(copy, "--init_from=resume", "--max_iters=20", f"--async_checkpoint={background}", inject=limit)
    refused(group, 1, "step 15", "step_000000010", "untouched", "File too large")
    assert contents(copy / "checkpoints") == before
    if rank:  # with space again it goes on
        group = start(copy, "--init_from=resume", "--max_iters=12")
        assert group.wait() == [0, 0] and resumed_from(copy) == 10


@pytest.mark.parametrize("rank", (0, 1))
def test_a_damaged_shard_is_noticed_and_the_checkpoint_before_it_used(start, copy, rank):
    shard = shard_of(rank, copy / "checkpoints" / "step_000000010")
    flip_byte(shard) if rank else shard.unlink()
    group = start(copy, "--init_from=auto", "--max_iters=12")
    assert group.wait() == [0, 0] and group.err == "", group.err
    warnings = [line for line in group.out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and shard.name in warnings[0] and ("checksum" if rank else "missing") in warnings[0]
    assert resumed_from(copy) == 5
    verify(CheckpointStore(copy).pointed("latest"))


def test_when_every_checkpoint_is_damaged_the_run_refuses_to_start_afresh(start, copy):
    for number, checkpoint in enumerate(CheckpointStore(copy).all()):
        flip_byte(shard_of(number, checkpoint))
    before = contents(copy / "checkpoints")
    refused(start(copy, "--init_from=auto", "--max_iters=12"), 1, "intact", "checksum", "shard-")
    assert contents(copy / "checkpoints") == before


def test_a_latest_that_points_to_nothing_is_said_and_the_newest_used(start, copy):
    (copy / "checkpoints" / "latest").write_text("step_000000077\n")
    group = start(copy, "--init_from=auto", "--max_iters=12")
    assert group.wait() == [0, 0] and group.err == ""
    assert [line for line in group.out.splitlines() if line.startswith("warning")] == [
        f"warning: {copy / 'checkpoints' / 'latest'} does not point to a checkpoint; using the newest, step_000000010."
    ]
    assert resumed_from(copy) == 10 and CheckpointStore(copy).pointed("latest").name == "step_000000012"


def test_an_out_dir_that_cannot_be_written_is_one_sentence(start, tmp_path):
    (tmp_path / "file").write_text("")
    refused(start(tmp_path / "file" / "out", "--max_iters=5"), 1, "out_dir", "Not a directory", "--out_dir")


def test_an_out_dir_that_one_process_cannot_write_is_one_sentence(start, tmp_path):
    readonly = """
import errno, pathlib
original = pathlib.Path.write_text
def write_text(path, *arguments, **options):
    if RANK == 1 and path.name.startswith(".probe"):
        raise OSError(errno.EROFS, "Read-only file system")
    return original(path, *arguments, **options)
pathlib.Path.write_text = write_text"""
    refused(start(tmp_path / "out", "--max_iters=5", inject=readonly), 1, "out_dir", "Read-only file system")
    assert not (tmp_path / "out").exists()  # a start that fails takes away what it made


def test_an_out_dir_that_is_not_the_same_for_all_is_refused(start, tmp_path):
    elsewhere = f"import os\nos.makedirs(folder := f'{tmp_path}/{{RANK}}')\nos.chdir(folder)"
    refused(start("out", "--max_iters=5", inject=elsewhere), 2, "not the same folder", "file system")


# ------------------------------------------------------------------------------------------- processes that differ


def test_one_rank_with_another_configuration_is_named_with_the_key(start, tmp_path):
    (tmp_path / "config.py").write_text("import os as _os\nwarmup_iters = 3 if _os.environ['RANK'] == '0' else 4\n")
    refused(start(tmp_path / "out", str(tmp_path / "config.py"), "--max_iters=5"), 2, "warmup_iters=4", "rank 1", "has 3")
    assert not (tmp_path / "out").exists()


def test_one_rank_with_other_data_is_named(start, tmp_path):
    other = "import data.token_dataset\nif RANK == 1: data.token_dataset.TokenDataset.fingerprint = 'another'"
    refused(start(tmp_path / "out", "--max_iters=5", inject=other), 2, "rank 1", "dataset", "another")


def test_one_rank_that_fails_before_they_meet_takes_the_others_along_in_seconds(start, tmp_path):
    (tmp_path / "config.py").write_text("import os as _os\nif _os.environ['RANK'] == '1': nonsense = 3\n")
    started = time.monotonic()
    group = start(tmp_path / "out", str(tmp_path / "config.py"), "--max_iters=5")
    assert group.wait() == [1, 2] and time.monotonic() - started < 30
    assert "nonsense" in group.complaints[0] and group.complaints[1:] == [
        "train.py: rank 0 stops at step 0, because rank 1 failed."
    ]


def test_processes_that_are_restarted_find_each_other_and_not_what_the_former_ones_left():
    """torchrun's store is the same before and after; here the processes of two generations are threads."""
    import random
    import threading

    import torch.distributed as dist

    from training.processes import _name_of_meeting

    store, names = dist.HashStore(), []
    for generation in range(4):
        found: dict[int, str] = {}

        def meet(rank: int) -> None:
            time.sleep(random.Random(generation * 10 + rank).random() * 0.2)
            found[rank] = _name_of_meeting(store, rank, 3)

        if generation == 2:  # one that two of them did not live to see
            store.set("hello/1", "gone")
            store.set("words", "gone gone gone")
        threads = [threading.Thread(target=meet, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(found) == 3 and len(set(found.values())) == 1
        names.append(found[0])
    assert len(set(names)) == 4


@pytest.mark.parametrize(
    "arguments, size, words",
    [
        (("--batch_szie=3",), 2, ("batch_szie", "batch_size")),
        (("--max_iters=5",), 3, ("4 sequences", "3 processes", "multiple of 3")),
        (("--max_iters=5", "--parallelism=none"), 2, ("none", "2 were started")),
        (("--max_iters=5", "--init_from=resume"), 2, ("Nothing to resume",)),
    ],
)
def test_what_concerns_all_of_them_is_said_once(start, tmp_path, arguments, size, words):
    group = start(tmp_path / "out", *arguments, size=size)
    refused(group, 1 if "Nothing" in words[0] else 2, *words)
