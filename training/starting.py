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
from data.files import remove_empty
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
    if (known_by := _known_by(launch_names(world), world.from_main(_counted_restarts))) and (
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


def starts_from_files(config: TrainConfig) -> bool:
    """Whether the run starts with what lies on this machine's disk, so that it can be looked at before the run."""
    kind, _, name = config.init_from.partition(":")
    return config.resume != "no" or kind == "weights" or (kind == "hf" and Path(name).expanduser().exists())


def launch_names(world: World) -> dict[str, Any]:
    """What identifies this launch of the run, over all its restarts: SLURM's job, torchrun's run id, and its processes.

    torchrun's run id is "none" unless it makes one up (--standalone) or is told one (--rdzv-id); then its process on this
    machine stands for it. Machines may be told different things, so it is rank 0's names that all processes use.
    """

    def names() -> dict[str, Any]:
        run_id = os.environ.get("TORCHELASTIC_RUN_ID")
        if run_id in ("none", ""):
            run_id = f"{socket.gethostname()}:{os.getppid()}"
        return {"slurm_job": os.environ.get("SLURM_JOB_ID"), "torchrun": run_id}

    return {**world.from_main(names), "agents": sorted(set(world.everywhere(agent)) - {None})}


def agent() -> str | None:
    """The torchrun that started this process, by a name that no other process has or had; None where it cannot be known."""
    if _arguments_of_torchrun() is None:
        return None
    try:
        started = Path(f"/proc/{os.getppid()}/stat").read_text().rsplit(")", 1)[1].split()[19]  # clock ticks since the boot
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (OSError, IndexError):
        return None
    return f"{socket.gethostname()}:{boot}:{os.getppid()}:{started}"


def _arguments_of_torchrun() -> list[str] | None:
    """The command line of the torchrun that started this process; None where it is another program, or unknown."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:  # not Linux, or hidden
        return None
    return words if any(os.path.basename(word) in ("torchrun", "torch.distributed.run") for word in words) else None


def launch_warnings() -> list[str]:
    """What is wrong with how torchrun was started: with a range of machines it ends the run where another machine joins.

    Its first round's store is kept, and a machine that joins looks for the address in another one (seen with torchrun 2.13;
    `DistStoreError` about MASTER_ADDR), unless every torchrun's environment has TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
    """
    words = _arguments_of_torchrun()
    if words is None or os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == "1":
        return []
    texts = [word.partition("=")[2] or after for word, after in zip(words, [*words[1:], ""]) if word.startswith("--nnodes")]
    least, _, most = (texts[0] if texts else os.environ.get("PET_NNODES", "")).partition(":")
    if not most or least == most:
        return []
    return [
        f"a machine that joins this run (--nnodes={least}:{most}) would end it: start every torchrun with "
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment (docs/CLUSTER.md)"
    ]


def _counted_restarts() -> list[str]:
    """Whose counts say that this is a restart: 'torchrun', 'slurm_job'. torchrun does not count those for a new machine."""
    counts = {"torchrun": "TORCHELASTIC_RESTART_COUNT", "slurm_job": "SLURM_RESTART_COUNT"}
    return [who for who, name in counts.items() if os.environ.get(name, "").isdigit() and int(os.environ[name]) > 0]


def _known_by(launch: dict[str, Any], restarted: list[str]) -> dict[str, Any]:
    """The part of a launch's names by which a checkpoint of an earlier start can be known; empty if there can be none.

    Whatever a torchrun has started before is an earlier start of the same launch, counted or not.
    """
    return {who: name for who, name in launch.items() if name and (who in restarted or who == "agents")}


def _is_of_launch(checkpoint: Path, known_by: dict[str, Any]) -> bool:
    """Whether an earlier start of this very launch has written the checkpoint."""
    try:
        theirs = read_state(checkpoint).get("launch")
    except CheckpointError:
        return False
    if not isinstance(theirs, dict):
        return False
    agents = theirs.get("agents") if isinstance(theirs.get("agents"), list) else []
    return any(set(agents) & set(this) if who == "agents" else theirs.get(who) == this for who, this in known_by.items())


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


def prepare_out_dir(out_dir: str, world: World) -> list[str]:
    """Make the folder and see that every process can write there. Raises OSError or UsageError with a sentence.

    Returns, in rank 0, the folders that it made: a start that comes to nothing takes them away again (`remove_empty`).
    """
    word = world.from_main(lambda: uuid.uuid4().hex)  # another run may be looking at the same folder
    probes = [Path(out_dir) / f".probe_{word}_{rank}" for rank in range(world.size)]
    mine = probes[world.rank]
    folder = Path(os.path.abspath(out_dir))
    made = world.from_main(lambda: [str(path) for path in (folder, *folder.parents) if not path.exists()])

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
    except BaseException:
        with suppress(OSError):
            mine.unlink()
        remove_empty(made)
        raise
    with suppress(OSError):
        mine.unlink()
    return made if world.is_main else []


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
