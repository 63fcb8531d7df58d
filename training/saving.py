"""When a run saves and what, and whether training waits until a checkpoint is published or only until it is copied."""

from __future__ import annotations

import math
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from command_line import Failure
from model_builder import Transformer
from training.checkpoint import (
    CheckpointError,
    CheckpointStore,
    NonFiniteWeights,
    load_tensors,
    model_tensors,
    random_state,
    set_random_state,
)
from training.huggingface_files import load_weights
from training.manifest import tokenizer_files
from training.parallelism import check_buffers
from training.progress import Progress
from training.report import Report
from training.stages import Data, Learner, Machine, Start
from training.starting import launch_names
from training_logger import versions

LOOK_INTERVAL = 1.0  # seconds between two looks whether the folder of the run is still there
Done = Callable[[Path, float], None]  # called in the loop's thread: (path, seconds that it took)


class Saver:
    """Saves while training waits."""

    def __init__(self, store: CheckpointStore):
        self.store = store
        self.failed = False  # a save in the background came to nothing; `wait` raises why

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], done: Done, **options) -> None:
        """Save a checkpoint; options as for CheckpointStore.save. Raises CheckpointError."""
        started = time.perf_counter()
        path = self.store.save(step, tensors, state, **options)
        done(path, time.perf_counter() - started)

    def poll(self) -> None:
        """See whether a save has ended meanwhile."""

    def wait(self) -> None:
        """Let what is under way end. Raises CheckpointError if it failed."""

    def leave(self) -> None:
        """The run ends, however it does: let a save that needs nobody else end before the lock on the folder goes."""


class BackgroundSaver(Saver):
    """Copies the tensors to host memory and saves the copy while training goes on: one save at a time.

    The copies stay, so that later saves need no new memory; they take the size of what this process saves. What the
    processes tell each other while saving goes through a group of its own, so `store.world` must be `beside()` the loop's.
    """

    def __init__(self, store: CheckpointStore):
        super().__init__(store)
        self.copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], done: Done, **options) -> None:
        """Start to save; `done` is called by the `poll` or `wait` that finds it finished."""
        self.wait()
        started = time.perf_counter()
        copies = self._copy(tensors)

        def job() -> None:
            try:
                self._path = self.store.save(step, copies, state, **options)
                self._seconds = time.perf_counter() - started
            except BaseException as error:
                self._error, self.failed = error, True

        self._done = done
        self._thread = threading.Thread(target=job, name="saver")
        self._thread.start()

    def poll(self) -> None:
        if self._thread is not None and not self._thread.is_alive() and not self.failed:
            self.wait()

    def wait(self) -> None:
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._error is not None:
            error, self._error, self.failed = self._error, None, False
            raise error
        self._done(self._path, self._seconds)

    def leave(self) -> None:
        if self._thread is not None and self.store.world.size == 1:
            self._thread.join()

    def _copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors in host memory, sharded as they are; a sharded one's copy is a DTensor of the same placement."""
        gpus = set()
        for name, tensor in tensors.items():
            if name not in self.copies or self.copies[name].shape != tensor.shape:
                self.copies[name] = _empty_copy(tensor)
            part = _part(tensor)
            _part(self.copies[name]).copy_(part, non_blocking=True)
            if part.is_cuda:
                gpus.add(part.device)
        for gpu in gpus:
            torch.cuda.synchronize(gpu)
        return {name: self.copies[name] for name in tensors}


def _part(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if hasattr(tensor, "_local_tensor") else tensor


def _empty_copy(tensor: Tensor) -> Tensor:
    """Host memory for a copy, pinned where the tensor is on a GPU."""
    part = _part(tensor.detach())
    copy = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
    if not hasattr(tensor, "device_mesh"):
        return copy
    from torch.distributed.tensor import DTensor

    return DTensor(copy, tensor._spec, requires_grad=False)  # the mesh stays: only its shape matters for saving


# ------------------------------------------------------------------------------------------- a run's checkpoints


def run_tensors(machine: Machine, learner: Learner) -> dict[str, Tensor]:
    """Every tensor that a checkpoint holds, by name: model, optimizer, loss scale, this process's random state."""
    return {
        **model_tensors(learner.model),
        **{f"optimizer.{name}": tensor for name, tensor in learner.optimizer.state().items()},
        **{f"loss_scale.{name}": tensor for name, tensor in learner.loss_scale.state().items()},
        **random_state(machine.device, machine.world.rank),
    }


def restore(start: Start, machine: Machine, learner: Learner) -> None:
    """Load what the run starts from: everything of a run that goes on, only the weights for a new one or an evaluation."""
    origin = start.origin
    if start.resumes and not start.config.eval_only:
        tensors = run_tensors(machine, learner)
        load_tensors(origin.path, tensors, ("rng.",), machine.world)
        learner.loss_scale.load({name: tensors[f"loss_scale.{name}"] for name in learner.loss_scale.state()})
        set_random_state(tensors, machine.device, machine.world.rank)
    elif origin and origin.huggingface:
        load_weights(learner.model, origin.path, learner.parallel.put)
    elif origin:
        of_its_own = () if start.resumes else ("model.objective.",)
        load_tensors(origin.path, model_tensors(learner.model), of_its_own, machine.world)


def restored_names(start: Start, model: Transformer) -> set[str]:
    """The parameters and saved buffers that `restore` fills, all of each, so that they need no first values.

    Given weights may lack an objective's heads, and a Hugging Face folder has no buffers.
    """
    if start.origin is None:
        return set()
    buffers = set() if start.origin.huggingface else set(model.saved_buffers())
    names = buffers | {name for name, _ in model.named_parameters()}
    return names if start.resumes else {name for name in names if not name.startswith("objective.")}


def describe(start: Start, machine: Machine, data: Data, learner: Learner) -> dict[str, Any]:
    """What stays the same all run long, as checkpoints and run log have it."""
    model, dataset = data.model_config, data.dataset
    values, origins = start.configuration.resolved(model)
    values["dataset"] = data.name
    return dict(
        config=values,
        origins=origins,
        dtype=machine.dtype,
        threads=torch.get_num_threads(),
        world_size=machine.world.size,
        parallelism=learner.parallelism,
        objective=dict(name=start.config.objective, fingerprint=learner.objective.fingerprint()),
        model=dict(name=model.name, fingerprint=model.fingerprint, config=model.to_dict()),
        dataset=dict(
            name=start.config.dataset, fingerprint=dataset.fingerprint, order=data.loader.order.version, **dataset.facts()
        ),
        versions=versions(),
        launch=launch_names(machine.world),
        source=start.saved.get("source"),
    )


def best_is_due(step: int, saved_step: int | None, interval: int) -> bool:
    """Whether a new best, found between two periodic saves, is saved.

    It is when a tenth of the interval and a quarter of all steps so far have passed since the last save. So where the loss
    falls from evaluation to evaluation there are at most 10 such saves in all, however long the run; and the best among the
    saved ones is near the best of all, at most a quarter of the steps away from it.
    """
    return step - (saved_step or 0) >= max(interval / 10, step / 4)


class Checkpoints:
    """The checkpoints of one run: when one is due, what it holds, and what is said of it."""

    def __init__(
        self,
        saver: Saver,
        start: Start,
        machine: Machine,
        data: Data,
        learner: Learner,
        report: Report,
        identity: dict[str, Any],
    ):
        """`identity` is what `describe` says of the run."""
        self.saver, self.config, self.machine, self.learner, self.report = saver, start.config, machine, learner, report
        self.identity = identity
        self.tokenizer_folder = data.dataset.folder
        part = data.dataset.parts[0]
        if part.vocabulary is not None and (tokenizer := part.tokenizer()) and not tokenizer_files(part.folder):
            self._made = tempfile.TemporaryDirectory()  # of a folder of nanoGPT's, whose meta.pkl has the characters
            self.tokenizer_folder = Path(self._made.name)
            tokenizer.save(self.tokenizer_folder)
        self.first_step = start.progress.step
        self.started_here = start.resumes and start.store.holds(start.origin.path)
        self.best = machine.world.from_main(start.store.best_loss) if self.started_here else None
        self.epoch = data.loader.order.sequences_per_epoch  # sequences
        self.snapshots = self._snapshots_by(start.progress)

    @property
    def interval(self) -> int:
        """Steps between saves; 0: one at the end only; -1: none."""
        return self.config.eval_interval if self.config.save_interval is None else self.config.save_interval

    @property
    def failed(self) -> bool:
        """Whether a save in the background came to nothing, or the folder of the run is gone; `finish` raises why."""
        return self.saver.failed or self.report.logger.lost(seen_within=LOOK_INTERVAL) is not None

    def due(self, progress: Progress) -> bool:
        """Whether this step ends with a checkpoint: at its interval, or for a new best or a snapshot; not while updates fail."""
        step, interval = progress.step, self.interval
        if interval < 0 or progress.saved_step == step:
            return False
        due = interval > 0 and (step % interval == 0 or (progress.is_best and best_is_due(step, progress.saved_step, interval)))
        due = due or self._snapshots_by(progress) > self.snapshots
        return due and self.learner.skips.read()[1] == 0  # which waits for a GPU, so it is asked last

    def _snapshots_by(self, progress: Progress) -> int:
        """How many snapshots belong to a run that has come so far: one every `snapshot_epochs`."""
        if not self.config.snapshot_epochs:
            return 0
        return math.floor(progress.sequences / (self.config.snapshot_epochs * self.epoch) + 1e-9)

    def save(self, progress: Progress) -> None:
        """Write a checkpoint and point 'latest' at it, and 'best' if it has the lowest loss of those that were saved.

        The first one of a run that did not start in its own out_dir moves what another run left there aside.
        """
        world = self.machine.world
        with self.report.meter.excluded():
            check_buffers(self.learner.model, world)
            if not self.started_here and (aside := world.from_main(self.saver.store.set_aside, "moving checkpoints aside")):
                self.report.warn(f"the checkpoints of another run in {self.config.out_dir} are now in {aside}")
            self.started_here = True
            progress.note_skips(*self.learner.skips.read())
            step, progress.saved_step = progress.step, progress.step
            best = progress.evaluations.better_than(self.best, step)
            self.best = progress.evaluations.measured if best else self.best
            snapshots_before, self.snapshots = self.snapshots, self._snapshots_by(progress)
            logger = self.report.logger
            try:
                self.saver.save(
                    step,
                    run_tensors(self.machine, self.learner),
                    self._state(progress),
                    keep_last=0 if progress.skipped_in_a_row else self.config.keep_last,  # drop nothing for a doubtful one
                    tokenizer_folder=self.tokenizer_folder,
                    best=best,
                    snapshot=self.snapshots > snapshots_before,
                    done=lambda path, seconds: logger.checkpoint(step, str(path), seconds, best),
                )
            except NonFiniteWeights:
                raise
            except CheckpointError as error:  # raised in every process
                raise CheckpointError(f"{error} {self.rescued(progress)}") from error

    def _state(self, progress: Progress) -> dict[str, Any]:
        return dict(self.identity, progress=progress.to_dict(), run=str(self.report.logger.path))

    def rescued(self, progress: Progress) -> str:
        """Save what there is to rescue_dir, if the user named one; a sentence that says what came of it."""
        if self.config.rescue_dir is None:
            return "--rescue_dir=FOLDER would have saved the state there."
        store = CheckpointStore(self.config.rescue_dir, self.machine.world)
        path = store.save(
            progress.step,
            run_tensors(self.machine, self.learner),
            self._state(progress),
            keep_last=self.config.keep_last,
            tokenizer_folder=self.tokenizer_folder if self.tokenizer_folder.is_dir() else None,
        )
        self.machine.world.from_main(lambda: self.report.logger.write_copy(self.config.rescue_dir))
        return (
            f"The state of step {progress.step} is in {path}; go on from there with --out_dir={self.config.rescue_dir} --resume."
        )

    def poll(self) -> None:
        """See whether a save in the background has ended."""
        self.saver.poll()

    def finish(self, progress: Progress) -> None:
        """Save the last step if it is not saved, and wait for what is under way.

        Raises CheckpointError if a save failed, and Failure if the folder of the run is gone.
        """
        if lost := self.machine.world.from_main(self.report.logger.lost):
            raise Failure(f"{lost} {self.rescued(progress)}")
        if self.interval >= 0 and progress.saved_step != progress.step > self.first_step:
            self.save(progress)
        self.saver.wait()
