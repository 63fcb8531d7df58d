"""What a checkpoint is made of: nothing beside it is read, nothing useless is published, the clock does not matter."""

from __future__ import annotations

import builtins
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import convert
import sample
import train
from data.files import sha256
from tests.conftest import TINY_RUN
from training import checkpoint_commands, manifest
from training.checkpoint import (
    CheckpointError,
    CheckpointStore,
    NonFiniteWeights,
    UnlistedFile,
    find_checkpoint,
    load_model,
    load_tensors,
    verify,
)
from training.manifest import Removed, listed_files, read_state

TENSORS = {
    "model.weight": torch.arange(12.0).view(3, 4),
    "model.bias": torch.tensor([0.5, -2.0]).bfloat16(),
    "optimizer.weight.exp_avg": torch.ones(3, 4) / 3,
    "optimizer.weight.step": torch.tensor(7.0),
    "rng.00000.cpu": torch.arange(16, dtype=torch.uint8),
}


@pytest.fixture(scope="module")
def trained(tiny_dataset, tmp_path_factory) -> Path:
    """A run of 2 steps with a checkpoint of each. Not to be changed."""
    out_dir = tmp_path_factory.mktemp("trained") / "out"
    run = (*TINY_RUN, f"--dataset={tiny_dataset}", f"--out_dir={out_dir}", "--max_iters=2", "--save_interval=1")
    assert train.main([*run, "--eval_interval=0"]) == 0
    return out_dir


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    """A copy of `trained` to spoil."""
    return Path(shutil.copytree(trained, tmp_path / "out"))


def saved(out_dir: Path, step: int = 1, **options) -> Path:
    """A checkpoint of TENSORS."""
    return CheckpointStore(out_dir).save(step, dict(TENSORS), {"model": {}}, **{"keep_last": 2, **options})


def change_manifest(checkpoint: Path, change) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    change(manifest["files"])
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


# ------------------------------------------------------------------------------------------- only what is listed


def spoil_with_tensors(path: Path, checkpoint: Path) -> None:
    """Other weights under the names of the checkpoint's own."""
    own = {name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}
    save_file({name: torch.zeros_like(tensor) for name, tensor in own.items()}, path)


@pytest.mark.parametrize(
    "name",
    (
        "zz.safetensors",
        "ZZ.SafeTensors",
        "deep/er/zz.safetensors",
        "pytorch_model.bin",
        "x.PT",
        ".metadata",
        "._shard.safetensors",
    ),
)
def test_a_tensor_file_that_the_manifest_does_not_list_is_an_error_wherever_it_lies(copy, tmp_path, name, capsys):
    """Issue 10.1: a safetensors file beside the listed ones passed every check and replaced the weights."""
    latest = CheckpointStore(copy).pointed("latest")
    (latest / name).parent.mkdir(parents=True, exist_ok=True)
    spoil_with_tensors(latest / name, latest)
    for read in (
        lambda: verify(latest),
        lambda: find_checkpoint(copy),
        lambda: find_checkpoint(latest, holding="model"),
        lambda: load_tensors(latest, {}),
        lambda: load_model(copy),
    ):
        with pytest.raises(UnlistedFile, match="not of this checkpoint"):
            read()
    (latest / name).unlink()
    verify(latest)


@pytest.mark.parametrize(
    "command",
    (
        lambda out, new: train.main([f"--out_dir={out}", "--init_from=resume", "--max_iters=9"]),
        lambda out, new: train.main([f"--out_dir={out}", "--init_from=auto", "--max_iters=9"]),
        lambda out, new: train.main([*TINY_RUN, f"--out_dir={new}", f"--init_from=weights:{out}", "--max_iters=9"]),
        lambda out, new: sample.main([str(out)]),
        lambda out, new: convert.main([str(out), str(new)]),
        lambda out, new: checkpoint_commands.main(["consolidate", str(out), str(new)]),
        lambda out, new: checkpoint_commands.main(["inspect", str(out)]),
    ),
)
def test_every_command_refuses_it_by_name_and_touches_nothing(copy, tmp_path, capsys, command):
    """Issue 10.1. The checkpoint before it is not used instead: nothing is wrong with this one."""
    latest = CheckpointStore(copy).pointed("latest")
    spoil_with_tensors(latest / "zz.safetensors", latest)
    before = sorted(path for path in (copy / "checkpoints").rglob("*"))
    assert command(copy, tmp_path / "new") == 1
    said = capsys.readouterr()
    assert "zz.safetensors" in said.err + said.out and "manifest" in said.err + said.out and "Traceback" not in said.err
    assert sorted(path for path in (copy / "checkpoints").rglob("*")) == before


def test_a_link_to_tensors_elsewhere_and_an_unlisted_tokenizer_are_errors_and_a_note_is_not(copy, tmp_path):
    """Issue 10.1."""
    latest = CheckpointStore(copy).pointed("latest")
    (tmp_path / "elsewhere").mkdir()
    spoil_with_tensors(tmp_path / "elsewhere" / "weights", latest)
    (latest / "zz.safetensors").symlink_to(tmp_path / "elsewhere" / "weights")
    with pytest.raises(UnlistedFile, match="zz.safetensors"):
        verify(latest)
    (latest / "zz.safetensors").unlink()
    (latest / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(UnlistedFile, match="more"):
        verify(latest)
    (latest / "more").unlink()
    (latest / "NOTES.md").write_text("The good one.")
    verify(latest)
    change_manifest(latest, lambda files: files.pop("tokenizer.json"))
    with pytest.raises(UnlistedFile, match="tokenizer.json"):
        load_model(copy)


def test_a_checkpoint_that_its_run_removes_meanwhile_is_not_called_damaged(copy, monkeypatch):
    """A reader lists the checkpoints, then the run saves another one and removes the one that was to be read."""
    store = CheckpointStore(copy)
    latest = store.pointed("latest")
    newer, real, calls = latest.with_name("step_99999999"), manifest.listed_files, []

    def removed_before_it_is_read(checkpoint):
        calls.append(checkpoint.name)
        if len(calls) == 1:
            checkpoint.rename(newer)
        return real(checkpoint)

    monkeypatch.setattr(manifest, "listed_files", removed_before_it_is_read)
    said = []
    assert store.newest_intact(said.append) == newer and calls == [latest.name, newer.name]
    assert not store.damaged and not any("damaged" in line for line in said)
    with pytest.raises(Removed, match="was removed while it was read.*out_dir"):
        read_state(latest)


OUTSIDE = ("../stolen.safetensors", "{absolute}", "deep/stolen.safetensors", "link.safetensors", "..", "", "a\0b")


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_names_files_of_its_folder_alone(tmp_path, name):
    """Issue 10.1."""
    checkpoint = saved(tmp_path / "out")
    (checkpoint / "deep").mkdir()
    stolen = {"model.weight": torch.zeros(3, 4)}
    for place in (checkpoint.parent, tmp_path, checkpoint / "deep"):
        save_file(stolen, place / "stolen.safetensors")
    (checkpoint / "link.safetensors").symlink_to(tmp_path / "stolen.safetensors")
    listed = name.format(absolute=tmp_path / "stolen.safetensors")
    entry = {"bytes": (tmp_path / "stolen.safetensors").stat().st_size, "sha256": sha256(tmp_path / "stolen.safetensors")}
    change_manifest(checkpoint, lambda files: files.update({listed: {**entry, "holds": ["model"]}}))
    for read in (lambda: verify(checkpoint), lambda: load_tensors(checkpoint, {"model.weight": torch.zeros(3, 4)})):
        with pytest.raises(CheckpointError, match="damaged: its manifest lists"):
            read()


def test_a_file_without_model_tensors_cannot_bring_some_in_unchecked(tmp_path):
    """Issue 10.1: of a checkpoint that is only sampled from, only the files that hold the model are checked."""
    checkpoint = saved(tmp_path)
    optimizer = next(name for name, entry in listed_files(checkpoint).items() if entry.get("holds") == ["optimizer"])
    save_file({"model.weight": torch.zeros(3, 4), "model.bias": torch.zeros(2)}, checkpoint / optimizer)
    verify(checkpoint, holding="model")
    into = {"model.weight": torch.ones(3, 4)}
    load_tensors(checkpoint, into)
    assert torch.equal(into["model.weight"], TENSORS["model.weight"])
    for stolen, words in (("model.weight", "do not make up one"), ("model.extra", "does not say")):
        save_file({stolen: torch.zeros(3, 4)}, checkpoint / optimizer)
        with pytest.raises(CheckpointError, match=words):
            load_tensors(checkpoint, {**into, "optimizer.weight.step": torch.zeros(())})


# ------------------------------------------------------------------------------------------- the format


def test_pytorchs_own_reader_reads_it_and_what_pytorchs_own_writer_writes_is_read(tmp_path):
    """Issue 10.13: files are written without torch.distributed.checkpoint, in its format."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter, load, save

    checkpoint = saved(tmp_path / "ours")
    into = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    load(into, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
    assert all(torch.equal(into[name], tensor) for name, tensor in TENSORS.items())
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    numbers = {name: number for number, name in enumerate(TENSORS, start=1)}
    save(dict(TENSORS), storage_writer=HuggingFaceStorageWriter(str(theirs), numbers, save_distributed=True), no_dist=True)
    (theirs / "state.json").write_text("{}")
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in theirs.iterdir()}
    (theirs / "manifest.json").write_text(json.dumps({"format_version": 1, "files": files}))
    into = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    load_tensors(theirs, into)
    assert len(files) == 6 and all(torch.equal(into[name], tensor) for name, tensor in TENSORS.items())


def test_a_save_does_not_read_what_it_writes(tmp_path, monkeypatch):
    """Issue 10.13: the checksum is taken while writing."""
    original = builtins.open

    def no_reading(file, mode="r", *arguments, **options):
        assert "w" in mode or not str(file).endswith((".safetensors", "state.json")), f"{file} is read"
        return original(file, mode, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", no_reading)
        checkpoint = saved(tmp_path)
    verify(checkpoint)


@pytest.mark.parametrize("missing", ("shard-00001-model-00001-of-00003.safetensors", "state.json"))
def test_a_file_dropped_from_the_manifest_is_noticed(tmp_path, missing):
    checkpoint = saved(tmp_path)
    change_manifest(checkpoint, lambda files: files.pop(missing))
    with pytest.raises(CheckpointError):
        verify(checkpoint)
    if missing != "state.json":
        (checkpoint / missing).unlink()
        with pytest.raises(CheckpointError, match="has no tensor 'model.weight'"):
            load_tensors(checkpoint, {"model.weight": torch.zeros(3, 4)})


# ------------------------------------------------------------------------------------------- useless ones are not published


@pytest.mark.parametrize("wrong", (math.nan, math.inf))
def test_weights_that_are_not_finite_are_not_saved_and_latest_stays(tmp_path, wrong):
    """Issue 10.9: a diverged run made its last, useless weights `latest`."""
    store, good = CheckpointStore(tmp_path), saved(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in TENSORS.items()}
    tensors["optimizer.weight.exp_avg"][0, 0] = math.inf  # which alone does no harm: its updates are zero
    store.save(2, tensors, {"model": {}}, keep_last=2)
    tensors["model.bias"][1] = wrong
    with pytest.raises(NonFiniteWeights, match=r"not finite at step 3 \(model.bias\).*step_000000002, is untouched"):
        store.save(3, tensors, {"model": {}}, keep_last=2, best=True)
    assert [path.name for path in store.all()] == [good.name, "step_000000002"] and store.pointed("best") is None
    assert store.pointed("latest").name == "step_000000002" and not list(store.folder.glob(".*"))


# ------------------------------------------------------------------------------------------- whatever the clock says


def test_the_last_ones_are_kept_though_the_clock_is_set_back(tmp_path):
    """Issue 10.14: `keep_last` went by the files' times."""
    store = CheckpointStore(tmp_path)
    for step in range(1, 6):
        checkpoint = saved(tmp_path, step)
        for path in (checkpoint, *checkpoint.iterdir()):
            os.utime(path, (2e9 - 1000 * step,) * 2)
    assert [path.name for path in store.all()] == ["step_000000004", "step_000000005"]
    saved(tmp_path, 4)  # again, by a run that went on from further back
    assert [path.name for path in store.all()] == ["step_000000005", "step_000000004"]
    saved(tmp_path, 3)
    assert [path.name for path in store.all()] == ["step_000000004", "step_000000003"]
    (store.folder / "latest").unlink()
    warnings = []
    assert store.newest_intact(warnings.append).name == "step_000000003" and "newest" in warnings[0]


def test_checkpoints_without_a_number_are_older_than_those_with_one(tmp_path):
    """Issue 10.14: those of the first versions, in the order of their times."""
    store = CheckpointStore(tmp_path)
    for step in (10, 30, 20):  # 30 and then 20: a run that went on from 10
        checkpoint = saved(tmp_path, step, keep_last=0)
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        assert manifest.pop("number") == 1  # as none before it has one
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
        os.utime(checkpoint / "manifest.json", (2e9 + {10: 0, 30: 1, 20: 2}[step],) * 2)
    assert [path.name[-2:] for path in store.all()] == ["10", "30", "20"]
    saved(tmp_path, 25)
    assert [path.name[-2:] for path in store.all()] == ["20", "25"]


# ------------------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize("replaced", (False, True))
def test_an_out_dir_that_is_deleted_meanwhile_is_an_error_and_not_made_again(tmp_path, replaced):
    """Issue 10.11: it was made again, without the lock, so that a second run could write to it."""
    store = CheckpointStore(tmp_path / "out")
    (tmp_path / "out").mkdir()
    with store.lock():
        saved_once = store.save(1, dict(TENSORS), {"model": {}}, keep_last=2)
        assert saved_once.exists()
        shutil.rmtree(tmp_path / "out")
        if replaced:
            (tmp_path / "out").mkdir()
            another = CheckpointStore(tmp_path / "out").lock()
            another.__enter__()
        with pytest.raises(CheckpointError, match="step 2 could not be written.*was deleted or replaced"):
            store.save(2, dict(TENSORS), {"model": {}}, keep_last=2)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_an_out_dir_that_is_deleted_while_saving_is_one_sentence(tmp_path, monkeypatch):
    """Issue 10.11."""
    store = CheckpointStore(tmp_path / "out")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("training.checkpoint.write_manifest", lambda folder, *_: shutil.rmtree(tmp_path / "out"))
    with store.lock(), pytest.raises(CheckpointError, match="step 1 could not be written to .*No such file"):
        store.save(1, dict(TENSORS), {"model": {}}, keep_last=2)


def test_a_folder_of_checkpoints_that_cannot_be_written_is_noticed_before_there_is_anything_to_save(tmp_path, monkeypatch):
    """Issue 10.11. Root writes everywhere: what stands in for a read-only folder is a file, and a file system that says so."""
    store = CheckpointStore(tmp_path)
    store.check_writable()
    assert list(tmp_path.iterdir()) == []  # nothing is made
    saved(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    store.check_writable()
    assert sorted(tmp_path.rglob("*")) == before
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
        with pytest.raises(CheckpointError, match="checkpoints cannot be written .Read-only file system"):
            store.check_writable()
    shutil.rmtree(store.folder)
    store.folder.write_text("")
    with pytest.raises(CheckpointError, match="checkpoints cannot be written"):
        store.check_writable()


def test_a_pointer_cannot_lead_out_of_the_folder(tmp_path):
    saved(tmp_path / "one")
    saved(tmp_path / "other", 2)
    store = CheckpointStore(tmp_path / "one")
    (store.folder / "latest").write_text("../../other/checkpoints/step_000000002\n")
    assert store.pointed("latest") is None
