"""Kills at random places of runs that begin in every way, over an older run, in another world after each restart.

    python -m tests.distributed.chaos --kills 60 --start random

A story is one run: it begins from scratch, with a checkpoint's or a Hugging Face folder's weights, or goes on with what an
older start left (`resume` yes, or auto with and without something there). Where it does not go on, an older run's
checkpoints are in its out_dir. Each of its lives has 1, 2 or 4 processes and another strategy, saves while training waits
or in the background, and ends with `kill -9` of some of them: after so many steps, at any point where it changes a file,
while it loads, or while it puts the older run's checkpoints aside. Then it is started again with the same command, as
torchrun or SLURM restart it, or by hand.

In the end the weights, the optimizer's moments and all losses are those of an undisturbed run on one process, but for the
order of sums; each life began with the last checkpoint that was published before it, or, without one, as configured; the
older run's checkpoints are whole and in one place; nothing temporary is left.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import TINY_RUN
from tests.distributed.chaos import joined
from tests.distributed.launching import Group, Launcher, wait_for

STARTS = ("scratch", "weights", "hf", "yes", "auto", "auto, nothing there")
WORLDS = ((1, "none"), (1, "fsdp"), *((2, strategy) for strategy in ("ddp", "zero1", "zero2", "fsdp")), (4, "zero1"))
OLDER_STEPS = 4  # of what an older start left
SAVE_INTERVAL = 3
LONGEST_LIFE = 8  # steps after its first one
STEPS_A_KILL = LONGEST_LIFE + 1
TOLERANCE = 1e-4  # relative, of losses; a step that is lost, or trained twice, changes them by 1e-2

OPTIONS = (
    *TINY_RUN,
    "--batch_size=2",
    "--gradient_accumulation_steps=2",
    "--learning_rate=1e-3",
    "--lr_schedule=constant",
    "--warmup_iters=0",
    f"--save_interval={SAVE_INTERVAL}",
    "--keep_last=2",
    "--eval_interval=7",
)

# A process kills itself at the so-manieth change of a file below a folder, or the so-manieth file that it opens to read
# there. Python tells a hook before each of these; it is called in whatever thread does it.
FATAL = """
import os, sys, signal
if RANK in {victims}:
    seen = []
    def fatal(event, arguments):
        if event not in {events} or not arguments or not isinstance(arguments[0], (str, os.PathLike)):
            return
        path = os.path.abspath(os.fspath(arguments[0]))
        writes = event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not path.startswith({folder!r}) or writes == {reading}:
            return
        if {only_after!r} and not seen and not (event == "os.rename" and path == {only_after!r}):
            return
        seen.append(event)
        if len(seen) == {count}:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(fatal)
"""
CHANGES = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree")


@dataclass
class Life:
    """What one start of the run is, and how it ends."""

    size: int
    strategy: str
    victims: tuple[int, ...]
    moment: str  # 'step', 'file', 'load', 'aside'
    number: int  # of steps, changes of files or files read before it is killed
    asynchronous: bool  # whether it saves in the background

    def inject(self, out_dir: Path, loaded: Path) -> str:
        """What its processes run first."""
        checkpoints = str(out_dir / "checkpoints")
        settings = dict(victims=self.victims, count=self.number, events=CHANGES, folder=checkpoints, reading=False, only_after="")
        if self.moment == "load":
            settings |= dict(events=("open",), folder=str(loaded), reading=True)
        elif self.moment == "aside":
            settings |= dict(only_after=checkpoints)
        return FATAL.format(**settings) if self.moment != "step" else ""


def a_life(chance: random.Random, moments: tuple[str, ...]) -> Life:
    """One at random; `moments`: how it may end."""
    size, strategy = chance.choice(WORLDS)
    moment = chance.choice(moments)
    victims = tuple(sorted(chance.sample(range(size), chance.randint(1, size))))
    if moment == "aside" or (moment == "file" and chance.random() < 0.8):
        victims = (0,)  # who does it
    number = {"step": LONGEST_LIFE, "file": 60, "load": 12, "aside": 3}[moment]
    number = chance.randint(0 if moment == "step" else 1, number)
    return Life(size, strategy, victims, moment, number, chance.random() < 0.3)


def story(
    launcher: Launcher, folder: Path, dataset: Path, start: str, kills: int, chance: random.Random, patience: float, say
) -> Counter:
    """One run that begins in this way and is killed so often; AssertionError where something is not as it has to be."""
    length = kills * STEPS_A_KILL + OLDER_STEPS + 4
    run = [*OPTIONS, f"--dataset={dataset}", f"--max_iters={length}"]
    whole, parts, source = folder / "whole", folder / "parts", folder / "parts" / "checkpoints"
    goes_on = start in ("yes", "auto")
    if start in ("weights", "hf"):
        source = given_weights(launcher, folder, dataset, start)
        run.append(f"--init_from={start}:{source}")
    alone(launcher, *run, f"--out_dir={whole}")
    other = ("--seed=99", "--n_embd=16", f"--dataset={dataset}")
    if goes_on:  # what an older start of the same run left
        alone(launcher, *run, f"--out_dir={parts}", f"--max_iters={OLDER_STEPS}")
    elif start != "auto, nothing there":
        alone(launcher, *OPTIONS, *other, f"--out_dir={parts}", f"--max_iters={OLDER_STEPS}")
    older = set() if goes_on else set(parts.glob("run_*.jsonl"))
    before = {} if goes_on else contents(parts / "checkpoints")
    flags = [f"--resume={start[:4]}"] if start.startswith(("yes", "auto")) else []
    how = chance.choice(("torchrun", "slurm", "hand") if flags else ("torchrun", "slurm"))
    command, done = [*run, *flags, f"--out_dir={parts}"], Counter()
    impatient = f"import training.watch; training.watch.GRACE = {patience}\n"
    say(f"{start}, restarted by {how}, {kills} kills")

    def begin(life: Life | None, number: int) -> tuple[Group, int]:
        """Start it; returns it, and the step that it has to begin with: what was published last."""
        expected = published(parts, older=bool(before) and not (parts / "checkpoints.previous").exists())
        size, strategy = (life.size, life.strategy) if life else chance.choice(WORLDS)
        loaded = parts / "checkpoints" if expected or start not in ("weights", "hf") else source
        inject = impatient + environment(how, number) + (life.inject(parts, loaded) if life else "")
        how_it_saves = f"--async_checkpoint={bool(life and life.asynchronous)}"
        return launcher.start(*command, f"--parallelism={strategy}", how_it_saves, size=size, inject=inject), expected

    for number in range(kills):
        moments = ("step", "file", "file", "load")
        aside_is_due = bool(before) and not (parts / "checkpoints.previous").exists()
        life = a_life(chance, ("aside",) if aside_is_due else moments)
        logs = set(parts.glob("run_*.jsonl"))
        group, expected = begin(life, number)
        wait_for(
            lambda: group.codes or group.out.count("\nstep ") > (life.number if life.moment == "step" else LONGEST_LIFE),
            120,
            lambda: f"some steps:\n{group.out}{group.err}",
        )
        by_itself = any(code == -signal.SIGKILL for code in group.codes.values())
        assert by_itself or not group.codes, f"it ended before it was killed: {group.codes}\n{group.out}{group.err}"
        if not by_itself:
            group.send(signal.SIGKILL, *life.victims)
        codes = group.wait(60)
        killed = [rank for rank, code in enumerate(codes) if code == -signal.SIGKILL]
        assert killed and set(killed) <= set(life.victims), (life, codes, group.err)
        assert all(code in (1, -signal.SIGKILL) for code in codes), (life, codes, group.err)
        began = where_it_began(set(parts.glob("run_*.jsonl")) - logs)
        assert began in (None, expected), f"it began after step {began}, {expected} was published\n{group.out}"
        steps = group.out.count("\nstep ")
        where = f"at {life.moment} {life.number}" if by_itself else "after a step"
        done.update({"kills": 1, f"at {life.moment}" if by_itself else "after a step": 1, "before its first step": steps == 0})
        done[f"of {life.size} processes"] += 1
        done["saving in the background"] += life.asynchronous
        began = "nowhere yet" if began is None else f"from step {began}"
        group_in_words = f"{life.size} ({life.strategy}{', async' * life.asynchronous})"
        say(f"  kill {number + 1}: rank {killed} of {group_in_words} {where}; it went {began}, {steps} steps")
    logs = set(parts.glob("run_*.jsonl"))
    group, expected = begin(None, kills)
    assert not any(group.wait(300)), group.err
    assert where_it_began(set(parts.glob("run_*.jsonl")) - logs) == expected, group.out
    say(f"  left alone it went from step {expected} to its end")
    same_figures(whole, parts, length, older)
    say(f"  differs from the undisturbed run by at most {same_model(whole, parts):.1e} of what its last steps changed")
    previous = list(parts.glob("checkpoints.previous*"))
    assert len(previous) == bool(before) and (not before or contents(previous[0]) == before), previous
    places = [path for place in (parts, parts / "checkpoints") for path in place.iterdir()]
    left = [path.name for path in places if path.name.startswith(".") and path.name != ".lock"]
    assert left == [], f"temporary files are left: {left}"
    return done


def alone(launcher: Launcher, *arguments: str) -> None:
    """An undisturbed run on one process."""
    group = launcher.start(*arguments, "--parallelism=none", size=1)
    assert group.wait(300) == [0], group.err


def given_weights(launcher: Launcher, folder: Path, dataset: Path, kind: str) -> Path:
    """A checkpoint of another run of the same model, or a Hugging Face folder made of it."""
    import convert

    alone(launcher, *OPTIONS, f"--dataset={dataset}", f"--out_dir={folder / 'given'}", "--max_iters=2", "--seed=5")
    if kind == "hf":
        assert convert.main([str(folder / "given"), str(folder / "hf"), "--no_check"]) == 0
    return folder / ("given" if kind == "weights" else "hf")


def environment(how: str, number: int) -> str:
    """What tells a start that it is the number-th restart of one launch."""
    of = {
        "torchrun": dict(TORCHELASTIC_RUN_ID="chaos", TORCHELASTIC_RESTART_COUNT=str(number)),
        "slurm": dict(SLURM_JOB_ID="1234", SLURM_RESTART_COUNT=str(number)),
        "hand": {},
    }
    return f"import os; os.environ.update({of[how]!r})\n"


def published(out_dir: Path, older: bool) -> int:
    """The step that the next start has to begin with: of what `latest` names, which is another run's if `older`."""
    try:
        name = (out_dir / "checkpoints" / "latest").read_text().strip()
    except FileNotFoundError:
        steps = [int(path.name[5:]) for path in (out_dir / "checkpoints").glob("step_*")]
        return 0 if older else max(steps, default=0)
    return 0 if older else int(name[5:])


def where_it_began(logs: set[Path]) -> int | None:
    """The step that a start began after, by its log; None if it got no further than to make one."""
    lines = [line for log in logs for line in log.read_text().split("\n")[:-1]]
    first = json.loads(lines[0]) if lines else None
    return first and (first["resumed_from"] or {"step": 0})["step"]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_figures(whole: Path, parts: Path, length: int, older: set[Path]) -> None:
    """All losses are those of the undisturbed run."""
    expected, found = joined(whole), joined(parts, older)
    assert list(found["step"]) == list(range(1, length + 1)), "the joined logs lack steps"
    missing = set(expected["eval"]) ^ set(found["eval"]) - {OLDER_STEPS}  # where what an older start left was at its end
    assert not missing, f"evaluations that are in one log alone: {missing}"
    for kind, losses in expected.items():
        different = {step: (loss, found[kind][step]) for step, loss in losses.items() if not close(loss, found[kind][step])}
        assert not different, f"{kind}: {different}"


def close(one: float, other: float) -> bool:
    return abs(one - other) <= TOLERANCE * abs(one)


def same_model(whole: Path, parts: Path) -> float:
    """The weights and moments at the end are those of the undisturbed run, but for the order of sums: they differ by less than
    a tenth of what its last few steps have changed in each tensor. Returns the largest such share.
    """
    *_, before, last = sorted((whole / "checkpoints").glob("step_*"))
    former, expected = tensors_of(before), tensors_of(last)
    found = tensors_of(parts / "checkpoints" / (parts / "checkpoints" / "latest").read_text().strip())
    assert found.keys() == expected.keys() and len(found) > 40, found.keys() ^ expected.keys()
    shares = {}
    for name, tensor in expected.items():
        changed, distance = float((tensor - former[name]).norm()), float((tensor - found[name]).norm())
        shares[name] = distance / changed if distance else 0.0
        assert distance <= 0.1 * changed, f"{name} differs by {distance}, where {last.name} and {before.name} do by {changed}"
    return max(shares.values())


def tensors_of(folder: Path) -> dict:
    """All tensors of a checkpoint but the random states, put together by PyTorch's own reader of such files."""
    import torch
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(folder))
    described = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(tuple(about.size), dtype=about.properties.dtype)
        for name, about in described.items()
        if not name.startswith("rng.")
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that one process loads
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return {name: tensor.double() for name, tensor in tensors.items()}


def random_starts(
    launcher: Launcher,
    folder: Path,
    dataset: Path,
    kills: int,
    seed: int = 0,
    patience: float = 2.0,
    starts: tuple[str, ...] = STARTS,
    say=print,
) -> Counter:
    """A story of each start, in a random order, with so many kills in all; AssertionError where one is not as it has to be."""
    chance, done, left = random.Random(seed), Counter(), kills
    count = max(1, min(len(starts), kills))
    for number, start in enumerate(chance.sample(starts, count)):
        of_this = left // (count - number)
        left -= of_this
        done += story(launcher, folder / str(number), dataset, start, of_this, chance, patience, say)
    return done


def all_starts(folder: Path, kills: int, seed: int) -> int:
    """The command; 1 if something was not as it has to be."""
    started = time.monotonic()
    try:
        with Launcher() as launcher:
            done = random_starts(launcher, folder, folder / "data", kills, seed, say=lambda text: print(text, flush=True))
    except AssertionError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    print(
        f"{dict(done)} in {time.monotonic() - started:.0f} s. Weights, optimizer state and losses are those of the undisturbed "
        "runs; each life began with what was published last; older runs' checkpoints are whole; nothing temporary is left."
    )
    return 0
