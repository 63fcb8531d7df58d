"""Kill a run again and again, at random, and see that it ends as if nothing had happened.

    python -m tests.distributed.chaos --kills 30
    python -m tests.distributed.chaos --kills 10 --strategy fsdp --async --restart torchrun --seed 7

Two processes train with a checkpoint every 5 steps. A kill is `kill -9` of one of them or of both, at a random step or in the
middle of a save. Those left over go down by themselves; then the run is started again with --resume=auto, by hand or
by torchrun --max-restarts. In the end the weights, optimizer state and random states equal those of a run that nobody
disturbed, bit for bit; no temporary file is left; the logs, joined, have every step with the loss that it has there, and no
log has a step twice.

    python -m tests.distributed.chaos --kills 60 --start random         # see chaos_starts.py
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.distributed.launching import SMALL, Launcher, children, torchrun, wait_for  # noqa: E402

LONGEST_LIFE = 14  # steps after its first one, before a run is killed (or before its next save, in which it is)
STEPS_A_KILL = LONGEST_LIFE + 7  # of the run's length, so that it cannot end before it has been killed often enough
SAVE_INTERVAL, EVAL_INTERVAL = 5, 7  # the best so far is saved too


def chaos(
    folder: Path,
    dataset: Path,
    kills: int,
    seed: int = 0,
    strategy: str = "zero1",
    asynchronous: bool = False,
    restart: str = "hand",
    patience: float = 5.0,
    say=print,
) -> Counter:
    """Do it below `folder`; AssertionError where something is not as it has to be. Returns how often what was killed.

    restart: 'hand' or 'torchrun'. patience: seconds that a process which lost contact waits for the reason (by hand only).
    """
    options = (
        *SMALL,
        f"--dataset={dataset}",
        f"--parallelism={strategy}",
        f"--async_checkpoint={asynchronous}",
        f"--save_interval={SAVE_INTERVAL}",
        f"--eval_interval={EVAL_INTERVAL}",
        f"--max_iters={kills * STEPS_A_KILL + 20}",
    )
    whole, parts = folder / "whole", folder / "parts"
    with Launcher() as launcher:
        undisturbed = launcher.start(*options, f"--out_dir={whole}")
        if restart == "torchrun":
            assert undisturbed.wait(600) == [0, 0], undisturbed.err
            done = under_torchrun((*options, f"--out_dir={parts}", "--resume=auto"), parts, kills, random.Random(seed), say)
        else:
            done = by_hand(
                launcher, (*options, f"--out_dir={parts}", "--resume=auto"), parts, kills, random.Random(seed), patience, say
            )
            assert undisturbed.wait(600) == [0, 0], undisturbed.err
    same_tensors(whole, parts)
    same_logs(whole, parts, kills * STEPS_A_KILL + 20)
    left = [
        str(path)
        for path in [*parts.iterdir(), *(parts / "checkpoints").iterdir()]
        if path.name.startswith(".") and path.name != ".lock"
    ]
    assert left == [], f"temporary files are left: {left}"
    others = {path.name for path in parts.iterdir() if not path.name.startswith((".", "run_"))}
    assert others == {"checkpoints"}, others
    return done


def by_hand(
    launcher: Launcher, arguments: tuple, out_dir: Path, kills: int, chance: random.Random, patience: float, say
) -> Counter:
    """Start, kill, see the others end, start again; at last let it finish."""
    impatient, done = f"import training.watch; training.watch.GRACE = {patience}", Counter()
    for number in range(1, kills + 1):
        group = launcher.start(*arguments, inject=impatient)
        victims, moment = plan(chance)
        await_moment(moment, out_dir, lambda: group.out, lambda: bool(group.codes))
        assert not group.codes, f"it ended before it was killed: {group.codes}\n{group.out}{group.err}"
        group.send(signal.SIGKILL, *victims)
        started = time.monotonic()
        codes = group.wait(30)
        assert all(codes[rank] == (-signal.SIGKILL if rank in victims else 1) for rank in (0, 1)), (victims, codes, group.err)
        report(number, victims, out_dir, group.out, done, say, f"the rest ended after {time.monotonic() - started:.1f} s")
    group = launcher.start(*arguments)
    assert group.wait(600) == [0, 0], group.err
    say(f"left alone it went to its end: {resumed_at(group.out)}")
    return done


def under_torchrun(arguments: tuple, out_dir: Path, kills: int, chance: random.Random, say) -> Counter:
    """One torchrun, which restarts what is killed below it."""
    done, folder = Counter(), Path(tempfile.mkdtemp(prefix="torchrun_"))
    with open(folder / "stdout", "w") as out, open(folder / "stderr", "w") as err:
        launcher = torchrun(*arguments, options=(f"--max-restarts={kills}",), stdout=out, stderr=err)

    def printed() -> str:
        return (folder / "stdout").read_text()

    try:
        for number in range(1, kills + 1):
            wait_for(lambda: len(children(launcher.pid)) == 2, 60, "two workers")
            workers, before = children(launcher.pid), len(printed())
            victims, moment = plan(chance)
            await_moment(moment, out_dir, lambda: printed()[before:], lambda: launcher.poll() is not None)
            assert launcher.poll() is None, f"it ended before it was killed:\n{printed()}{(folder / 'stderr').read_text()}"
            for victim in victims:
                kill(workers[victim])
            started = time.monotonic()
            wait_for(lambda: not set(workers) & set(children(launcher.pid)), 60, "the others to end")
            report(
                number,
                victims,
                out_dir,
                printed()[before:],
                done,
                say,
                f"the rest ended after {time.monotonic() - started:.1f} s",
            )
            before = len(printed())
        code = launcher.wait(600)
        assert code == 0, (code, (folder / "stderr").read_text())
        say(f"left alone it went to its end: {resumed_at(printed()[before:])}")
    finally:
        if launcher.poll() is None:
            launcher.send_signal(signal.SIGTERM)
            launcher.wait()
    return done


def plan(chance: random.Random) -> tuple[tuple[int, ...], tuple[int, float | None]]:
    """Who is killed, and when: so many steps after the first one, and None or so many seconds into the save after that."""
    victims = chance.choice(((0,), (1,), (0, 1)))
    return victims, (chance.randint(0, LONGEST_LIFE), chance.choice((None, chance.random() * 0.03)))


def await_moment(moment: tuple[int, float | None], out_dir: Path, printed, over) -> None:
    """Wait until it has come, or the run is over."""
    steps, into_save = moment
    wait_for(lambda: over() or printed().count("\nstep ") > steps, 120, "some steps")
    if into_save is not None:
        wait_for(lambda: over() or any((out_dir / "checkpoints").glob(".writing_*")), 60, "a save", every=0.0005)
        time.sleep(into_save)


def kill(pid: int) -> None:
    subprocess.run(["kill", "-9", str(pid)], check=True)


def report(number: int, victims: tuple, out_dir: Path, printed: str, done: Counter, say, then: str) -> None:
    """Say what was done, and count it."""
    cut = [path.name for path in (out_dir / "checkpoints").glob(".writing_*")]
    done["kills"] += 1
    done["of both" if len(victims) == 2 else f"of rank {victims[0]}"] += 1
    done["cut a save short"] += bool(cut)
    last = [line.split("/")[0] for line in printed.splitlines() if line.startswith("step ")][-1:]
    say(
        f"kill {number}: rank {' and '.join(map(str, victims))} after {last[0] if last else 'no step'}"
        f"{', ' + cut[0] + ' left behind' if cut else ''}; it had {resumed_at(printed)}; {then}"
    )


def resumed_at(printed: str) -> str:
    """Where a run began, from its first step line."""
    first = next((int(line[5:].split("/")[0]) for line in printed.splitlines() if line.startswith("step ")), None)
    return "not begun" if first is None else "started afresh" if first == 1 else f"resumed after step {first - 1}"


# ------------------------------------------------------------------------------------------- what must be true in the end


def same_tensors(one: Path, other: Path) -> None:
    """Every tensor of the two latest checkpoints is the same, read with the safetensors library alone."""
    import torch
    from safetensors.torch import load_file

    found = []
    for out_dir in (one, other):
        folder = out_dir / "checkpoints" / (out_dir / "checkpoints" / "latest").read_text().strip()
        found.append(
            {(file.name, name): tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        )
    assert found[0].keys() == found[1].keys() and len(found[0]) > 40
    different = [name for _, name in found[0] if not torch.equal(found[0][_, name], found[1][_, name])]
    assert different == [], f"these tensors differ: {different}"


def same_logs(whole: Path, parts: Path, length: int) -> None:
    """The joined logs have every step and evaluation, as undisturbed; each log begins where it says and has no gap."""
    expected, found = joined(whole), joined(parts)
    assert list(found["step"]) == list(range(1, length + 1)), "the joined logs lack steps"
    assert found == expected, {
        kind: [step for step in expected[kind] if found[kind].get(step) != expected[kind][step]] for kind in expected
    }


def joined(out_dir: Path, without: Collection[Path] = ()) -> dict[str, dict[int, float]]:
    """{'step': {step: loss}, 'eval': …} over all logs of a folder in the order of their starts; the last one of a step counts.

    `without`: logs of other runs.
    """
    logs = []
    for file in set(out_dir.glob("run_*.jsonl")) - set(without):
        lines = [json.loads(line) for line in file.read_text().split("\n")[:-1]]  # what a kill cut short has no line break
        if lines:
            assert lines[0]["event"] == "run_start", file
            logs.append((lines[0]["time"], file, lines))
    found: dict[str, dict[int, float]] = {"step": {}, "eval": {}}
    for _, file, lines in sorted(logs):
        steps = [line["step"] for line in lines if line["event"] == "step"]
        source = lines[0]["resumed_from"]
        first = source["step"] + 1 if source else 1
        assert steps == list(range(first, first + len(steps))), f"{file} has a gap, or a step twice: {steps}"
        assert first == 1 or source["step"] in found["step"], f"{file} goes on from a step that no log before it has"
        for line in lines:
            if line["event"] in found:
                found[line["event"]][line["step"]] = line["loss" if line["event"] == "step" else "val_loss"]
    return {kind: dict(sorted(of_kind.items())) for kind, of_kind in found.items()}


def main() -> int:
    """The command; 1 if something was not as it has to be."""
    parser = argparse.ArgumentParser(prog="python -m tests.distributed.chaos", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategy", default="zero1", choices=("ddp", "zero1", "zero2", "fsdp"))
    parser.add_argument("--async", action="store_true", dest="asynchronous", help="save in the background")
    parser.add_argument("--restart", default="both", choices=("hand", "torchrun", "both"), help="both: half of the kills each")
    parser.add_argument(
        "--start",
        default="auto",
        choices=("auto", "random"),
        help="random: begin in every way, over an older run, under another strategy and in another number of processes each time",
    )
    given = parser.parse_args()
    from data.preparation import prepare

    by = {"both": [("hand", given.kills - given.kills // 2), ("torchrun", given.kills // 2)]}.get(
        given.restart, [(given.restart, given.kills)]
    )
    started, total = time.monotonic(), Counter()
    with tempfile.TemporaryDirectory() as folder:
        text = Path(argparse.__file__).read_text(encoding="utf-8")[:67_000]
        prepare(lambda: iter([("argparse.py", text)]), Path(folder) / "data", tokenizer="byte")
        if given.start == "random":
            from tests.distributed.chaos_starts import all_starts

            return all_starts(Path(folder), given.kills, given.seed)
        for restart, kills in by:
            print(
                f"restarted by {restart}: {kills} kills, strategy {given.strategy}, seed {given.seed}"
                f"{', saving in the background' if given.asynchronous else ''}",
                flush=True,
            )
            try:
                total += chaos(
                    Path(folder) / restart,
                    Path(folder) / "data",
                    kills,
                    given.seed,
                    given.strategy,
                    given.asynchronous,
                    restart,
                    say=lambda text: print(f"  {text}", flush=True),
                )
            except AssertionError as error:
                print(f"FAILED: {error}", file=sys.stderr)
                return 1
    print(
        f"{dict(total)} in {time.monotonic() - started:.0f} s. Weights, optimizer state, random states and losses are those of "
        "the undisturbed run, bit for bit; nothing temporary is left; no step is missing or twice."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
