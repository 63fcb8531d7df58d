"""The runs of a plan: each a process of train.py, one after the other or several at a time; what is finished stays.

A run is told by the log in its folder: finished with the planned configuration, it is not repeated; begun, it goes on
where its last checkpoint is. A folder that holds a run of another configuration is refused.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from ablation.planning import Seeds, StudyPlan
from ablation.variants import Variant
from command_line import PROJECT, Failure, UsageError, duration
from comparison.runs import RunSummary, load_runs
from training.checkpoint import CheckpointError, CheckpointStore
from training.report import Display
from training.train_config import TrainConfig

OUTPUT = "output.txt"  # what train.py prints, in the run's folder
LOOK = 0.2  # seconds between two looks at the running processes
LAST_LINES = 5  # of the output of a run that failed
TAIL = 1 << 16  # bytes at the end of a run log in which its newest step is looked for


@dataclass(eq=False)
class Job:
    """One run of the study. `summary` once it is finished; `failure` says how it failed."""

    variant: Variant
    seeds: Seeds
    folder: Path
    arguments: list[str]
    expected: dict  # what its configuration has to be
    summary: RunSummary | None = None
    failure: str = ""
    process: subprocess.Popen | None = None
    slot: int = 0
    started: float = 0.0

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return f"{self.variant.name}, seed {' / '.join(map(str, dict.fromkeys(self.seeds)))}"

    def look(self) -> str | None:
        """Find out from the logs in its folder whether it is finished. Returns what is wrong with them, or None."""
        for run in load_runs([self.folder]) if self.folder.exists() else []:
            has = {**run.config, "dataset": run.dataset.get("fingerprint")}
            other = [key for key, value in self.expected.items() if has.get(key, value) != value]
            if other or run.fingerprint != self.variant.model.fingerprint:
                differs = ", ".join(f"{key}={has[key]}" for key in other[:3]) or f"the model {run.architecture}"
                planned = ", ".join(f"{key}={self.expected[key]}" for key in other[:3]) or self.variant.model.name
                return (
                    f"{self.folder} holds a run with {differs}, where this study has {planned}; choose another "
                    "--out_dir, or delete that folder."
                )
            if run.finished and run.length == self.variant.length:
                self.summary = run
        return None

    def steps(self) -> int:
        """The newest step in its log, for the progress bar."""
        logs = sorted(self.folder.glob("run_*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
        if not logs:
            return 0
        with open(logs[-1], "rb") as file:
            file.seek(max(0, os.path.getsize(logs[-1]) - TAIL))
            for line in reversed(file.read().split(b"\n")):
                try:
                    return json.loads(line)["step"]
                except (ValueError, KeyError, TypeError):
                    pass
        return 0


class Study:
    """Runs the jobs of a plan. `stopped`: how often somebody asked it to stop."""

    def __init__(self, plan: StudyPlan):
        """Looks at what is there already. Raises UsageError where a folder holds something else."""
        self.plan, self.display, self.stopped = plan, Display(), 0
        varied = [*plan.levels, *plan.crossed]
        self.jobs = [
            Job(
                setting,
                seeds,
                plan.folder(setting, seeds),
                plan.arguments(setting, seeds),
                setting.experiment(varied) | dict(zip(("seed", "data_seed"), seeds)),
            )
            for seeds in plan.seeds  # seed by seed: soon something to compare
            for setting in plan.trained
        ]
        problems = [problem for job in self.jobs if (problem := job.look())]
        if problems:
            raise UsageError("\n".join(problems))

    @property
    def finished(self) -> list[Job]:
        """The jobs whose runs are finished."""
        return [job for job in self.jobs if job.summary]

    @property
    def failed(self) -> list[Job]:
        """The jobs that were tried and did not come to their end."""
        return [job for job in self.jobs if job.failure]

    def run(self, at_once: int) -> None:
        """Train what is not finished, `at_once` runs at a time, until all are through or somebody asks to stop.

        SIGINT and SIGTERM let the running ones save and end; a second one ends them at once (KeyboardInterrupt).
        """
        store = CheckpointStore(self.plan.out_dir)
        try:
            self.plan.out_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Failure(
                f"out_dir={str(self.plan.out_dir)!r} cannot be written: {error.strerror}. Choose another --out_dir."
            ) from error
        former = {number: signal.signal(number, self._asked_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with store.lock():
                self.display.start_bar(
                    sum(job.variant.length for job in self.finished), sum(job.variant.length for job in self.jobs)
                )
                self._run(at_once)
        finally:
            for job in self.jobs:
                if job.process:  # only where something went wrong here
                    job.process.kill()
                    job.process.wait()
            self.display.close()
            for number, handler in former.items():
                signal.signal(number, handler)
        if self.stopped > 1:
            raise KeyboardInterrupt

    def _run(self, at_once: int) -> None:
        waiting = [job for job in self.jobs if not job.summary]
        running: list[Job] = []
        announced: set[Path] = set()
        while running or (waiting and not self.stopped):
            for job in list(waiting) if not self.stopped else []:
                if len(running) == at_once:
                    break
                if being_trained(job.folder):
                    if job.folder not in announced:
                        self.display.line(f"{job.name}: another process trains in {job.folder}; waiting for it")
                    announced.add(job.folder)
                    continue
                waiting.remove(job)
                job.look()
                if not job.summary:
                    job.slot = min(set(range(at_once)) - {other.slot for other in running})
                    self._start(job, at_once)
                    running.append(job)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                self._ended(job)
            self._show(running)
            time.sleep(LOOK)

    def _start(self, job: Job, at_once: int) -> None:
        """A process of train.py in a session of its own, so that Ctrl-C comes from here alone."""
        job.folder.mkdir(parents=True, exist_ok=True)
        job.started = time.monotonic()
        with open(job.folder / OUTPUT, "ab") as output:
            job.process = subprocess.Popen(
                [sys.executable, str(PROJECT / "train.py"), *job.arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **gpu_of_slot(job.slot, at_once, job.variant.train)},
            )
        if self.stopped:  # the signal came in between
            job.process.terminate()

    def _ended(self, job: Job) -> None:
        """Take note of how a process came out."""
        code, job.process = job.process.returncode, None
        problem = job.look()
        number = f"[{len(self.finished) + len(self.failed) + (not job.summary)}/{len(self.jobs)}] "
        took = duration(time.monotonic() - job.started)
        if job.summary and code == 0 and not problem:
            loss = job.summary.val_loss
            self.display.line(
                f"{number}{job.name}: {job.summary.outcome}, val loss {'not finite' if loss is None else f'{loss:.4f}'} ({took})"
            )
        elif self.stopped:
            self.display.line(f"{job.name}: stopped ({took})")
        else:
            job.summary = None
            said = (job.folder / OUTPUT).read_text(encoding="utf-8", errors="replace").strip().split("\n")[-LAST_LINES:]
            how = problem or (
                f"train.py exited with {code}"
                if code > 0
                else f"train.py was ended by {signal.Signals(-code).name}"
                if code
                else "train.py was stopped"
            )
            job.failure = "\n".join(
                [f"{job.name} failed: {how}. The last lines of {job.folder / OUTPUT}:", *[f"    {line}" for line in said]]
            )
            self.display.line(f"{number}{job.name}: failed ({took})")

    def _show(self, running: list[Job]) -> None:
        """Move the progress bar, if there is one."""
        if self.display.bar is not None:
            self.display.bar.set_description(f"{len(self.finished)}/{len(self.jobs)} runs", refresh=False)
            self.display.bar.n = sum(job.variant.length for job in self.jobs if job.summary or job.failure) + sum(
                job.steps() for job in running
            )
            self.display.bar.refresh()

    def _asked_to_stop(self, number: int, frame: FrameType | None) -> None:
        """The first time the running processes save and end (SIGTERM), the second time they end at once (SIGINT)."""
        self.stopped += 1
        for job in self.jobs:
            if job.process and job.process.poll() is None:
                job.process.send_signal(signal.SIGTERM if self.stopped == 1 else signal.SIGINT)


def being_trained(folder: Path) -> bool:
    """Whether a process (of a study that was killed, say) is training in this folder."""
    if not (folder / ".lock").exists():
        return False
    try:
        with CheckpointStore(folder).lock():
            return False
    except CheckpointError:
        return True


def visible_gpus(train: TrainConfig) -> list[str]:
    """The GPUs that runs may be spread over: none where the configuration names a device, or a CPU."""
    import torch

    if train.device not in ("auto", "cuda") or not torch.cuda.is_available():
        return []
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return listed.split(",") if listed else [str(number) for number in range(torch.cuda.device_count())]


def gpu_of_slot(slot: int, at_once: int, train: TrainConfig) -> dict[str, str]:
    """The environment that gives each of several runs at a time a GPU of its own, as far as there are enough."""
    gpus = visible_gpus(train) if at_once > 1 else []
    return {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}


def failures(study: Study) -> Failure | None:
    """What to end with where runs failed."""
    if not study.failed:
        return None
    return Failure(
        "\n".join(
            [job.failure for job in study.failed]
            + [f"{len(study.failed)} of {len(study.jobs)} runs failed; the same command again tries only these."]
        )
    )
