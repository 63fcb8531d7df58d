"""Where a run starts from, and the folder that it writes to."""

from __future__ import annotations

import os
import shlex
import socket
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command_line import UsageError
from data.token_dataset import TokenDataset
from data.tokenization import load_tokenizer
from training.checkpoint import CheckpointError, CheckpointStore, find_checkpoint
from training.huggingface_files import find_folder, read_config, source_of
from training.manifest import read_state
from training.processes import World, launched
from training.train_config import TrainConfig

COMPARED_TOKENS = 512  # of the dataset, to see whether two tokenizers are the same


@dataclass(frozen=True)
class Origin:
    """The checkpoint a run starts from: all of it, or only its weights; or a Hugging Face folder's weights."""

    path: Path
    weights_only: bool = False
    huggingface: bool = False


def find_origin(config: TrainConfig, store: CheckpointStore, warn: Callable[[str], None], world: World) -> Origin | None:
    """What this start of the run begins with; None for new weights.

    A restart goes on with what the same launch has saved; where that is nothing yet, it begins as configured: with the last
    checkpoint in out_dir (`resume`), or with what `init_from` names. Raises CheckpointError if that is not there or damaged.
    All processes of `world` call this, and share the checking of a checkpoint's files.
    """
    needed = "model" if config.eval_only else None
    if (known_by := world.from_main(_restarted)) and (
        found := store.newest_intact(warn, needed, world, lambda checkpoint: _is_of_launch(checkpoint, known_by))
    ):
        return Origin(found)
    if config.resume != "no":
        found = store.newest_intact(warn, needed, world)
        if found is None and config.resume == "yes":
            raise CheckpointError(
                f"Nothing to resume: {store.folder} holds no checkpoint. Check --out_dir, or leave --resume out "
                "(--resume=auto goes on only if there is something)."
            )
        if found is not None:
            return Origin(found)
    kind, _, name = config.init_from.partition(":")
    if kind == "hf":
        folder = world.from_main(lambda: find_folder(name), "fetching a Hugging Face model")
        return Origin(folder, weights_only=True, huggingface=True)
    if kind == "weights":
        return Origin(find_checkpoint(name, warn, holding="model", world=world), weights_only=True)
    return None


def launch_names() -> dict[str, str | None]:
    """What identifies this launch of the run, over all its restarts: SLURM's job and torchrun's run id, where there are any.

    torchrun's run id is "none" unless it makes one up (--standalone) or is told one (--rdzv-id); then its process on this
    machine stands for it.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id in ("none", ""):
        run_id = f"{socket.gethostname()}:{os.getppid()}"
    return {"slurm_job": os.environ.get("SLURM_JOB_ID"), "torchrun": run_id}


def _restarted() -> dict[str, str]:
    """The part of `launch_names()` by which a checkpoint of an earlier start can be known; empty if this is no restart.

    Machines may count restarts differently, so rank 0's answer is the one that all processes use.
    """
    this, counts = launch_names(), {"torchrun": "TORCHELASTIC_RESTART_COUNT", "slurm_job": "SLURM_RESTART_COUNT"}
    restarted = [who for who, name in counts.items() if os.environ.get(name, "").isdigit() and int(os.environ[name]) > 0]
    return {who: this[who] for who in restarted if this[who]}


def _is_of_launch(checkpoint: Path, known_by: dict[str, str]) -> bool:
    """Whether an earlier start of this very launch has written the checkpoint."""
    try:
        theirs = read_state(checkpoint).get("launch")
    except CheckpointError:
        return False
    return isinstance(theirs, dict) and any(theirs.get(who) == this for who, this in known_by.items())


def imported_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint's state would say of a Hugging Face folder: the keys of its model."""
    return {
        "config": dict(read_config(folder).to_dict(), arch_preset="custom"),
        "origins": {},
        "run": None,
        "source": source_of(folder, str(folder)),
    }


def tokenizer_warnings(origin: Origin | None, dataset: TokenDataset) -> list[str]:
    """What the dataset's tokenizer cannot do here, and whether the weights that a run starts from know another tokenizer.

    Two tokenizers are the same if their fingerprints are, or if they end documents with the same id and give the same ids to
    the dataset's first tokens (GPT-2's by tiktoken and by tokenizers). Raises DatasetError where the dataset's is broken.
    """
    problem = dataset.check_tokenizer()
    warnings = [problem] if problem else []
    if origin is None or not origin.weights_only or problem or (own := dataset.tokenizer()) is None:
        return warnings
    try:
        theirs = load_tokenizer(origin.path)
    except ValueError as error:
        return [*warnings, f"the tokenizer of {origin.path} cannot be compared with the dataset's: {error}"]
    if theirs is None or theirs.fingerprint == own.fingerprint:
        return warnings
    split = dataset.split("train")
    ids = [i for i in split.read(0, min(len(split), COMPARED_TOKENS)).tolist() if i != own.eos_id]
    try:
        text = own.decode(ids)
        same = theirs.eos_id == own.eos_id and theirs.encode(text) == own.encode(text)
    except ValueError:  # a vocabulary of characters that lacks some
        same = False
    if not same:
        warnings.append(
            f"the weights of {origin.path} were made with another tokenizer ({theirs.name}, vocabulary {theirs.vocab_size:,}) "
            f"than the dataset ({own.name}, vocabulary {own.vocab_size:,}), so they know nothing of what its ids mean; prepare "
            f"it with --tokenizer={origin.path}"
        )
    return warnings


def prepare_out_dir(out_dir: str, world: World) -> None:
    """Make the folder and see that every process can write there. Raises OSError or UsageError with a sentence."""
    word = world.from_main(lambda: uuid.uuid4().hex)  # another run may be looking at the same folder
    probes = [Path(out_dir) / f".probe_{word}_{rank}" for rank in range(world.size)]
    mine = probes[world.rank]

    def write() -> None:
        try:
            Path(out_dir).mkdir(parents=True, exist_ok=True)
            mine.write_text("")
        except OSError as error:
            raise OSError(f"out_dir={out_dir!r} cannot be written: {error.strerror}. Choose another --out_dir.") from error

    def see_all() -> None:
        if not all(probe.exists() for probe in probes):
            raise UsageError(
                f"out_dir={out_dir!r} is not the same folder on every machine: checkpoints are written by all "
                "processes together. Put it on a file system that all of them share."
            )

    try:
        world.everywhere(write)
        world.everywhere(see_all)
    finally:
        with suppress(OSError):
            mine.unlink()


def resume_command(argv: list[str]) -> str:
    """The command that continues the run of this command line."""
    words, kept = iter(argv), []
    for word in words:
        if word in ("--init_from", "--resume"):
            word = next(words, "")
            if word.startswith("--"):  # behind a bare --resume
                kept.append(word)
        elif not word.startswith(("--init_from=", "--resume=")):
            kept.append(word)
    launcher = ["python"]
    if launched():
        here, nodes = os.environ.get("LOCAL_WORLD_SIZE", "1"), int(os.environ.get("GROUP_WORLD_SIZE", 1))
        launcher = ["torchrun", "--standalone" if nodes == 1 else f"--nnodes={nodes}", f"--nproc_per_node={here}"]
        launcher += ["--rdzv_backend=c10d", "--rdzv_endpoint=HOST:PORT"] if nodes > 1 else []  # on each of them, as before
    return shlex.join([*launcher, "train.py", *kept, "--resume"])
