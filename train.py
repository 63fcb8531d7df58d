"""Train a language model: one loop, readable from top to bottom.

python train.py [config/x.py | run_….json] [--key=value | --key value | --flag …]
python train.py config/quickstart.py --max_iters=100 --normalization=rmsnorm
python train.py config/quickstart.py --init_from=resume
python train.py --help | config/x.py --print_config
torchrun --standalone --nproc_per_node=4 train.py config/x.py --parallelism=fsdp
"""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
import sys
import time
import uuid
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from command_line import Failure, choose_device, guarded
from configurator import ConfigError, Configuration, configure, continue_from, print_config, print_help, switches_in
from training.processes import World, first_to_say, join, launched, leave, rank


class Run:
    """One training run: made from a configuration, trained by `train()`; the same in each of the processes of `world`.

    What it holds on to (the lock on its out_dir, the data reader) is given back by `resources`.
    """

    def __init__(self, configuration: Configuration, world: World, resources: ExitStack):
        from training.report import Display

        self.world, self.display, self.resources = world, Display(enabled=world.is_main), resources
        self.notes = [configuration.train.notice] if configuration.train.notice else []
        world.agree("command and config file", dataclasses.asdict(configuration.train))
        self.find_start(configuration)
        self.prepare_machine()
        self.open_data()
        self.build_model()
        self.restore()
        self.open_log()

    # ------------------------------------------------------------------------------- the loop

    def train(self, stop) -> str:
        """Train until the length, a stop request or the end of patience; returns the outcome."""
        import torch

        from training.objectives import next_token_loss
        from training.optimizers import clip_and_check
        from training.schedules import learning_rate

        config, model, meter, progress = self.config, self.model, self.meter, self.progress
        sequences, block_size = self.sequences, self.model_config.block_size
        model.train()
        meter.restart()
        while progress.step < self.length and not progress.out_of_patience(config.patience) and not stop.agree(self.saver.failed):
            meter.lap("start")
            batch = self.loader.batch(progress.sequences, sequences)  # this process's rows, block_size + 1
            meter.lap("data")

            loss = torch.zeros((), device=self.device)
            for micro_batch in self.parallel.accumulate(batch.split(config.batch_size)):
                inputs, targets = self.to_device(micro_batch[:, :-1]), self.to_device(micro_batch[:, 1:])
                micro_loss = next_token_loss(model, inputs, targets) / (sequences * block_size)
                (micro_loss * self.loss_scale.scale).backward()
                loss += micro_loss.detach()
            self.world.sum(loss)
            meter.lap("compute")

            lr = learning_rate(progress.step, config, self.length)
            grad_norm, skip = clip_and_check(model, loss, config.grad_clip, self.loss_scale.scale)
            self.optimizer.step(lr, skip)  # skip: not finite, on the device
            self.optimizer.zero_grad()
            self.loss_scale.update(skip)
            self.skips.update(skip)
            meter.lap("optimizer")

            meter.step_done(sequences * block_size)
            progress.advance(sequences, block_size)
            self.profiler.step()
            self.display.advance()
            last = progress.step == self.length
            if last or progress.step % config.log_interval == 0:
                self.log(loss, lr, grad_norm)
            if last or (config.eval_interval and progress.step % config.eval_interval == 0):
                self.evaluate()
            if self.save_is_due() or (stop.save and progress.saved_step != progress.step):
                self.save()
            self.saver.poll()
        if self.save_interval >= 0 and progress.saved_step != progress.step > self.first_step:
            self.save()
        with self.world.taking_its_time():
            self.saver.wait()
        if progress.step >= self.length:
            return "finished"
        return "stopped" if stop.name else "out of patience"

    def to_device(self, tokens):
        """A (B, T) batch of ids on the device, copied while the host goes on where it can be."""
        if self.device.type == "cuda":
            tokens = tokens.contiguous().pin_memory()
        return tokens.to(self.device, non_blocking=True)

    # ------------------------------------------------------------------------------- what interrupts it

    def evaluate(self) -> None:
        """Loss on the fixed validation set, logged."""
        from training.data_loader import validation_batches
        from training.objectives import mean_loss
        from training.report import evaluation_line

        config, split = self.config, self.val_split
        started = time.perf_counter()
        with self.meter.excluded():
            batches = validation_batches(
                split,
                self.model_config.block_size,
                config.eval_iters * self.sequences,
                config.batch_size,
                self.world.rank,
                self.world.size,
                vocab_size=self.model_config.vocab_size,
            )
            loss, tokens = mean_loss(self.model, map(self.watched, batches), self.device, self.world.sum)
            loss = self.world.from_main(lambda: loss)  # what is decided by it is decided alike everywhere
            self.parallel.settle()
        seconds = time.perf_counter() - started
        perplexity = math.inf if loss > 700 else math.exp(loss)
        bits_per_byte = loss / math.log(2) * len(split) / split.bytes if split.bytes else None
        if self.progress.judge(loss, tokens):
            self.warn("the validation set is not the one of the evaluations before, so the best loss is looked for anew")
        self.logger.evaluation(
            self.progress.step,
            self.progress.tokens,
            val_loss=loss,
            perplexity=perplexity,
            bits_per_byte=bits_per_byte,
            val_tokens=tokens,
            seconds=seconds,
            best=self.progress.is_best,
        )
        self.display.line(evaluation_line(self.progress.step, loss, perplexity, bits_per_byte, seconds, self.progress.is_best))

    def watched(self, batch):
        """The batch, after noting that this process is evaluating."""
        self.world.at(self.progress.step, "evaluating")
        return batch

    def save_is_due(self) -> bool:
        """Whether this step ends with a checkpoint: at its interval, or as the best so far; not while updates fail."""
        step = self.progress.step
        due = (
            self.save_interval > 0
            and self.progress.saved_step != step
            and (step % self.save_interval == 0 or self.progress.is_best)
        )
        return due and self.skips.read()[1] == 0

    def save(self) -> None:
        """Write a checkpoint and point 'latest', and 'best' if it is, at it.

        The first one of a run that did not start here moves what another run left in out_dir aside.
        """
        progress = self.progress
        with self.meter.excluded(), self.world.taking_its_time():
            if not self.started_here and (aside := self.world.from_main(self.store.set_aside)):
                self.warn(f"the checkpoints of another run in {self.config.out_dir} are now in {aside}")
            self.started_here = True
            progress.skipped, progress.skipped_in_a_row = self.skips.read()
            step, best, progress.saved_step = progress.step, progress.is_best, progress.step
            state = dict(self.identity, progress=dataclasses.asdict(progress), run=str(self.logger.path))
            keep_last = 0 if progress.skipped_in_a_row else self.config.keep_last  # drop nothing for a doubtful one
            self.saver.save(
                step,
                self.tensors(),
                state,
                keep_last=keep_last,
                tokenizer_folder=self.dataset.folder,
                best=best,
                done=lambda path, seconds: self.logger.checkpoint(step, str(path), seconds, best),
            )

    def log(self, loss, lr: float, grad_norm) -> None:
        """One step line, on the terminal and in the run log. Raises Diverged after too many skipped updates."""
        from training.meter import peak_memory_gb
        from training.report import step_line

        progress = self.progress
        rate, step_ms = self.meter.read()
        skipped, in_a_row = self.skips.read()
        if skipped > progress.skipped:
            message = f"{skipped - progress.skipped} updates skipped for a non-finite loss or gradient"
            self.warn(message, step=progress.step)
        progress.skipped, progress.skipped_in_a_row = skipped, in_a_row
        utilisation = self.utilisation(rate)
        figures = dict(
            loss=float(loss),
            lr=lr,
            grad_norm=float(grad_norm),
            tokens_per_s=rate,
            step_ms=step_ms,
            memory_gb=peak_memory_gb(self.device),
        )
        self.logger.step(progress.step, progress.tokens, **figures, **utilisation, skipped=skipped)
        self.display.line(step_line(progress.step, self.length, **figures, mfu=utilisation["mfu"], skipped=skipped))
        if in_a_row >= self.config.nonfinite_limit:
            latest = self.store.pointed("latest")
            raise Diverged(
                f"The last {in_a_row} updates were skipped for a non-finite loss or gradient, so the run "
                f"stops at step {progress.step}. "
                + (f"The last good checkpoint is {latest}; " if latest else "There is no checkpoint yet; ")
                + "lower --learning_rate or raise --warmup_iters."
            )

    def utilisation(self, tokens_per_s: float) -> dict[str, float | None]:
        """mfu, mfu_causal and hfu at this rate; null where the peak is not known.

        A CPU's peak is measured. If other work disturbed the measurement the run overtakes it: then it is measured
        again, and if that does not help nothing is claimed.
        """
        from flops_parameter_counting.hardware import measure_cpu_peak

        most = tokens_per_s * max(self.flops_by_figure.values())
        if self.peak and self.peak.measured and most > self.peak.flops:
            again = measure_cpu_peak(self.dtype, again=True)
            self.peak = dataclasses.replace(again, flops=again.flops * self.world.size)
            if most > self.peak.flops:
                self.warn(
                    "the measured peak of this CPU is below what the run reaches (other work disturbs the "
                    "measurement), so mfu is null",
                    measured=self.peak.flops,
                )
                self.peak = None
        return {
            name: tokens_per_s * per_token / self.peak.flops if self.peak else None
            for name, per_token in self.flops_by_figure.items()
        }

    def warn(self, message: str, **facts) -> None:
        """A warning, on the terminal and in the run log."""
        self.display.line(f"warning: {message}")
        self.logger.warning(message, **facts)

    # ------------------------------------------------------------------------------- setting up

    def find_start(self, configuration: Configuration) -> None:
        """Nothing, this run's last checkpoint, or somebody's weights; with the configuration that follows from it."""
        from training.checkpoint import CheckpointError, CheckpointStore, read_state
        from training.saving import BackgroundSaver, Saver
        from training_logger import remove_leftovers

        world = self.world
        store = CheckpointStore(configuration.train.out_dir)
        self.origin = world.from_main(
            lambda: find_origin(configuration, store, lambda message: self.display.line(f"warning: {message}"))
        )
        self.saved, self.progress = None, Progress()
        if self.origin:
            self.saved = (
                imported_state(self.origin.path)
                if self.origin.huggingface
                else read_state(self.origin.path, needs=("model", "config", "origins"))
            )
            configuration, overruled = continue_from(
                configuration, self.saved["config"], str(self.origin.path), self.origin.weights_only, self.saved["origins"]
            )
            self.notes += overruled
            if not self.origin.weights_only:
                self.progress = Progress.restored(self.saved.get("progress"), self.origin.path)
        elif problems := configuration.train.problems():  # init_from=auto that found nothing
            raise ConfigError("\n".join(problems))
        self.configuration, self.config = configuration, configuration.train
        if Path(self.config.out_dir) != Path(store.folder.parent):
            store = CheckpointStore(self.config.out_dir)
        self.store = store
        store.world = world.beside() if self.config.async_checkpoint else world
        self.saver = BackgroundSaver(store) if self.config.async_checkpoint else Saver(store)
        self.started_here = self.origin is not None and self.origin.path.resolve().is_relative_to(store.folder.resolve())
        if self.started_here and self.origin.weights_only:
            raise CheckpointError(
                f"The new run would put aside {self.origin.path}, which it starts from. Choose another --out_dir."
            )
        if not self.started_here:
            self.progress.saved_step = None
        self.first_step = self.progress.step
        self.save_interval = self.config.eval_interval if self.config.save_interval is None else self.config.save_interval
        prepare_out_dir(self.config.out_dir, world)
        if self.config.eval_only:
            self.save_interval = -1
        else:
            world.from_main(lambda: self.resources.enter_context(store.lock()))
            self.resources.callback(self.saver.leave)
            world.from_main(store.clean)
            world.from_main(lambda: remove_leftovers(self.config.out_dir))

    @property
    def resumes(self) -> bool:
        """Whether this run continues a checkpoint in every respect (and not only with its weights)."""
        return self.origin is not None and not self.origin.weights_only

    def prepare_machine(self) -> None:
        """Device, compute dtype, threads, random seed, and the peak that MFU is measured against."""
        import torch

        from flops_parameter_counting.hardware import best_dtype, device_peak
        from training.parallelism import choose

        world = self.world
        self.device = choose_device(self.config.device, world.local_rank, world.local_size)
        if self.config.attention_backend == "flex" and self.device.type == "cpu":
            raise ConfigError(
                "attention_backend='flex' cannot train on a CPU, where FlexAttention has no backward pass; use "
                "--attention_backend=sdpa."
            )
        self.dtype = self.config.dtype
        if self.dtype == "auto":
            self.dtype = world.from_main(lambda: best_dtype(self.device))
        as_before = self.resumes and self.saved["world_size"] == world.size
        threads = self.config.threads or (self.saved["threads"] if as_before else None)
        if threads:
            torch.set_num_threads(threads)
        torch.manual_seed(self.config.seed + world.rank)  # dropout; the weights have seeds of their own
        peaks = world.everywhere(lambda: device_peak(self.device, self.dtype))
        self.peak = None if None in peaks else dataclasses.replace(peaks[0], flops=sum(peak.flops for peak in peaks))
        self.parallelism = self.config.parallelism
        if self.parallelism == "auto":
            self.parallelism, why = world.from_main(
                lambda: choose(self.config, self.config.model_config(), world, self.device, self.dtype)
            )
            if as_before and world.size > 1:  # whatever is free at this moment: a restart changes nothing
                self.parallelism, why = self.saved.get("parallelism", self.parallelism), ""
            self.notes += [why] if why else []

    def open_data(self) -> None:
        """The dataset and its reader: what is read next depends on (data_seed, sequences read) and nothing else."""
        from data.preparation import ensure_prepared
        from data.token_dataset import DATA_DIR, DatasetError, TokenDataset
        from training.data_loader import DataLoader, WindowOrder
        from training.schedules import run_length

        config = self.config
        world = self.world
        world.everywhere(lambda: ensure_prepared(config.dataset) if world.local_rank == 0 else None)
        self.dataset = TokenDataset.open(config.dataset, vocab_size=config.vocab_size)
        world.agree("dataset", dict(dataset=self.dataset.fingerprint))
        if self.resumes and self.saved["dataset"]["fingerprint"] != self.dataset.fingerprint:
            raise DatasetChanged(
                f"Dataset {config.dataset!r} is not the one this run was trained on (its fingerprint "
                f"is {self.dataset.fingerprint}, the checkpoint has "
                f"{self.saved['dataset']['fingerprint']}). Prepare it as it was, or start a new run "
                "from the weights with --init_from=weights:CHECKPOINT."
            )
        self.model_config = config.model_config(self.dataset.vocab_size)
        block_size = self.model_config.block_size
        self.sequences = config.sequences_per_iteration(block_size)
        if self.sequences % world.size:
            raise ConfigError(
                f"{self.sequences} sequences an iteration (batch_size × gradient_accumulation_steps) cannot be "
                f"shared equally by {world.size} processes. Use a multiple of {world.size}."
            )
        self.train_split, self.val_split = self.dataset.split("train"), self.dataset.split("val")
        if len(self.val_split) < 2:
            raise DatasetError(
                f"The validation split of {self.dataset.folder} has {len(self.val_split)} tokens, too few to "
                "validate on; prepare the dataset with a larger --val_fraction or more text."
            )
        self.loader = DataLoader(
            self.train_split,
            block_size,
            config.data_seed,
            vocab_size=self.model_config.vocab_size,
            rank=world.rank,
            world_size=world.size,
            order_version=self.saved["dataset"].get("order", 1) if self.resumes else WindowOrder.VERSION,
        )
        self.resources.callback(self.loader.close)
        self.length = run_length(
            config, block_size, self.loader.order.sequences_per_epoch, self.progress.step, self.progress.sequences
        )
        inside = self.dataset.folder.resolve().is_relative_to(DATA_DIR)
        self.dataset_name = config.dataset if inside else str(self.dataset.folder.resolve())

    def build_model(self) -> None:
        """The model with its initial weights, its precision, its optimizer."""
        from model_builder import build_model, initialize
        from training.activation_checkpointing import apply_activation_checkpointing
        from training.meter import StepMeter
        from training.optimizers import Optimizer
        from training.parallelism import parallelize
        from training.precision import DTYPES, LossScale, SkipCounter, set_compute_dtype

        config, dtype = self.config, DTYPES[self.dtype]
        self.model = build_model(self.model_config, device="meta")
        set_compute_dtype(self.model, dtype)
        apply_activation_checkpointing(self.model, config.activation_checkpointing)
        self.parallel = parallelize(self.model, self.parallelism, self.world, self.device, dtype, config.hsdp_shard_size)
        self.model.to_empty(device=self.device)
        initialize(self.model, config.seed, self.parallel.put)
        self.optimizer = Optimizer(self.model, self.config)
        self.loss_scale = LossScale(DTYPES[self.dtype], self.device)
        self.skips = SkipCounter(self.device, self.progress.skipped, self.progress.skipped_in_a_row)
        self.meter = StepMeter(self.device, on_lap=lambda lap: self.world.at(self.progress.step, f"after {lap}"))

    def tensors(self) -> dict:
        """Every tensor that a checkpoint holds, by name: model, optimizer, loss scale, random state."""
        from training.checkpoint import model_tensors, random_state

        return {
            **model_tensors(self.model),
            **{f"optimizer.{name}": tensor for name, tensor in self.optimizer.state().items()},
            **{f"loss_scale.{name}": tensor for name, tensor in self.loss_scale.state().items()},
            **random_state(self.device, self.world.rank),
        }

    def restore(self) -> None:
        """Load what the run starts from, then compile (which changes no name and no result)."""
        import torch

        from training.checkpoint import load_tensors, model_tensors, set_random_state
        from training.huggingface_files import load_weights

        if self.resumes:
            tensors = self.tensors()
            load_tensors(self.origin.path, tensors, optional=("rng.",))
            self.loss_scale.load({name: tensors[f"loss_scale.{name}"] for name in self.loss_scale.state()})
            set_random_state(tensors, self.device, self.world.rank)
        elif self.origin and self.origin.huggingface:
            load_weights(self.model, self.origin.path, self.parallel.put)
        elif self.origin:
            load_tensors(self.origin.path, model_tensors(self.model))
        if self.config.compile is True or (self.config.compile == "auto" and self.device.type == "cuda"):
            for block in self.model.blocks:
                block.forward = torch.compile(block.forward)

    def open_log(self) -> None:
        """The folder, the run log, and the start print-out."""
        import torch

        from flops_parameter_counting.flops import flops_per_token
        from training.profiling import NoProfiler
        from training.report import start_report
        from training_logger import TrainingLogger, hardware_facts, versions

        config, model_config, dataset = self.config, self.model_config, self.dataset
        self.started, self.profiler = time.perf_counter(), NoProfiler()
        self.notes += [dataset.note] if dataset.note else []
        flops = flops_per_token(model_config, checkpointing=config.activation_checkpointing)
        self.flops_by_figure = {"mfu": flops.full, "mfu_causal": flops.causal, "hfu": flops.hardware}
        values, origins = self.configuration.resolved(model_config)
        values["dataset"] = self.dataset_name  # a path from wherever the run is resumed
        self.identity = dict(
            config=values,
            origins=origins,
            dtype=self.dtype,
            threads=torch.get_num_threads(),
            world_size=self.world.size,
            parallelism=self.parallelism,
            model=dict(name=model_config.name, fingerprint=model_config.fingerprint, config=model_config.to_dict()),
            dataset=dict(
                name=config.dataset, fingerprint=dataset.fingerprint, order=self.loader.order.version, **dataset.facts()
            ),
            versions=versions(),
            source=(self.saved or {}).get("source"),
        )
        hardware = hardware_facts(self.device)
        self.logger = TrainingLogger(
            config.out_dir,
            enabled=self.world.is_main,
            resumed_from=dict(checkpoint=str(self.origin.path), step=self.progress.step, run=self.saved["run"])
            if self.origin
            else None,
        )
        self.world.from_main(self.open_trackers)
        self.world.from_main(
            lambda: self.logger.start(
                **{
                    **self.identity,
                    "model": dict(
                        self.identity["model"], parameters=self.model.num_parameters(), flops_per_token=dataclasses.asdict(flops)
                    ),
                },
                hardware=hardware,
                peak=dataclasses.asdict(self.peak) if self.peak else None,
                length=self.length,
                tokens_per_iteration=self.sequences * model_config.block_size,
            )
        )
        self.display.line(
            start_report(
                model_config,
                flops,
                dataset=dataset,
                sequences=self.sequences,
                length=self.length,
                config=config,
                sequences_per_epoch=self.loader.order.sequences_per_epoch,
                progress=self.progress,
                peak=self.peak,
                hardware=f"{hardware['device_name']}, threads: {torch.get_num_threads()}, {self.dtype}"
                + (f", {self.world.size} processes, {self.parallelism}" if self.world.grouped else ""),
                notes=self.notes,
                log=str(self.logger.path),
            )
        )
        if self.peak is None:
            self.warn(f"no dense peak is known for {hardware['device_name']} in {self.dtype}, so mfu is null")

    def open_trackers(self) -> None:
        """What takes the log's events besides the log, and the profiler if it is asked for."""
        from training.profiling import Profiler
        from training.trackers import open_trackers

        self.logger.trackers = open_trackers(self.config, self.logger.path.stem)
        if self.config.profile:
            self.profiler = Profiler(self.config.out_dir, self.device, self.world.rank, self.display.line, self.meter.excluded)

    def cost(self) -> dict[str, float | None]:
        """What the run has taken since its log was opened: seconds, device-hours, and their price."""
        seconds = time.perf_counter() - self.started
        hours, price = self.world.size * seconds / 3600, self.config.price_per_gpu_hour
        return dict(seconds=seconds, device_hours=hours, estimated_cost=None if price is None else hours * price)


def train(configuration: Configuration, resume_command: str) -> int:
    """Make the run, train (or only evaluate) it, close its log whatever happens. Returns the exit code."""
    from training.signals import StopRequest

    config = configuration.train
    device = choose_device(config.device, int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    with ExitStack() as resources:
        world = resources.enter_context(
            join(device, timeout=config.collective_timeout, alone=config.parallelism not in ("auto", "none"))
        )
        run = Run(configuration, world, resources)
        outcome, stop = "failed", StopRequest(world)
        try:
            if run.config.eval_only:
                run.evaluate()
                outcome = "evaluated"
            else:
                run.display.start_bar(run.progress.step, run.length)
                with stop:
                    outcome = run.train(stop)
        except Diverged:
            outcome = "diverged"
            raise
        finally:
            progress, cost = run.progress, run.cost()
            run.display.close()
            run.profiler.close()
            run.logger.end(
                outcome,
                step=progress.step,
                tokens=progress.tokens,
                val_loss=progress.val_loss,
                best_val_loss=progress.best_val_loss,
                best_step=progress.best_step,
                skipped=progress.skipped,
                **cost,
            )
        run.display.line(
            f"{outcome} after step {progress.step}" + (f" ({stop.name})" if stop.name else "") + f"; log: {run.logger.path}"
        )
        if cost["estimated_cost"] is not None:
            run.display.line(
                f"estimated cost {cost['estimated_cost']:,.2f}: {cost['device_hours']:.3f} device-hours at "
                f"{run.config.price_per_gpu_hour:,.2f}"
            )
        if outcome == "stopped":
            run.display.line(
                f"To go on: {resume_command}"
                if progress.saved_step == progress.step
                else "Nothing was saved: "
                + ("save_interval is -1." if run.save_interval < 0 else "it was stopped before its first step.")
            )
    return 0


class Diverged(Failure):
    """Too many non-finite updates in a row."""


class DatasetChanged(Failure):
    """A resumed run finds other data than it was trained on."""


@dataclass
class Progress:
    """How far a run has come; what a checkpoint's state.json keeps of it."""

    step: int = 0  # updates made (or skipped)
    sequences: int = 0  # read from the training data
    tokens: int = 0
    val_loss: float | None = None  # of the last evaluation
    best_val_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    saved_step: int | None = None
    val_tokens: int | None = None  # size of the validation set that best_val_loss is of

    @classmethod
    def restored(cls, saved: dict | None, where: Path) -> Progress:
        """The progress that a checkpoint's state.json holds. Raises CheckpointError where it holds none."""
        from training.checkpoint import CheckpointError

        try:
            return cls(**saved)
        except TypeError as error:
            raise CheckpointError(
                f"{where} cannot be resumed: it holds weights only, or its state.json is damaged. Start a "
                f"new run from its weights with --init_from=weights:{where}."
            ) from error

    def advance(self, sequences: int, block_size: int) -> None:
        """One step over so many sequences is through."""
        self.step += 1
        self.sequences += sequences
        self.tokens += sequences * block_size

    def judge(self, val_loss: float, val_tokens: int) -> bool:
        """Take note of an evaluation; True if it is on another set than those before, so that the best starts anew."""
        changed = self.best_val_loss is not None and self.val_tokens not in (None, val_tokens)
        if changed:
            self.best_val_loss, self.best_step, self.evaluations_without_gain = None, None, 0
        self.val_tokens = val_tokens
        self.val_loss = val_loss if math.isfinite(val_loss) else None
        if self.val_loss is not None and (self.best_val_loss is None or val_loss < self.best_val_loss):
            self.best_val_loss, self.best_step, self.evaluations_without_gain = val_loss, self.step, 0
        else:
            self.evaluations_without_gain += 1
        return changed

    @property
    def is_best(self) -> bool:
        """Whether the best evaluation so far is of this very step."""
        return self.best_step == self.step

    def out_of_patience(self, patience: int) -> bool:
        """Whether so many evaluations in a row brought nothing (0: never)."""
        return bool(patience) and self.evaluations_without_gain >= patience


@dataclass
class Origin:
    """The checkpoint a run starts from: all of it, or only its weights; or a Hugging Face folder's weights."""

    path: Path
    weights_only: bool = False
    huggingface: bool = False


def find_origin(configuration: Configuration, store, warn) -> Origin | None:
    """What init_from means: None for a start from scratch. Raises CheckpointError if it is not there or damaged."""
    from training.checkpoint import CheckpointError, find_checkpoint

    config = configuration.train
    if config.init_from == "scratch":
        return None
    if config.init_from in ("resume", "auto"):
        found = store.newest_intact(warn)
        if found is None and config.init_from == "resume":
            raise CheckpointError(
                f"Nothing to resume: {store.folder} holds no checkpoint. Check --out_dir, or start "
                "with --init_from=scratch (or auto, which does either)."
            )
        return Origin(found) if found else None
    if config.init_from.startswith("hf:"):
        from training.huggingface_files import find_folder

        return Origin(find_folder(config.init_from.removeprefix("hf:")), weights_only=True, huggingface=True)
    path = config.init_from.removeprefix("weights:")
    return Origin(find_checkpoint(path, warn), weights_only=path != config.init_from)


def imported_state(folder: Path) -> dict:
    """What a checkpoint's state would say of a Hugging Face folder: the keys of its model."""
    from training.huggingface_files import read_config, source_of

    return {
        "config": dict(read_config(folder).to_dict(), arch_preset="custom"),
        "origins": {},
        "run": None,
        "source": source_of(folder, str(folder)),
    }


def prepare_out_dir(out_dir: str, world: World) -> None:
    """Make the folder and see that every process can write there. Raises OSError or ConfigError with a sentence."""
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
            raise ConfigError(
                f"out_dir={out_dir!r} is not the same folder on every machine: checkpoints are written by all "
                "processes together. Put it on a file system that all of them share."
            )

    try:
        world.everywhere(write)
        world.everywhere(see_all)
    finally:
        with suppress(OSError):
            mine.unlink()


# ------------------------------------------------------------------------------------------- command line


def main(argv: list[str]) -> int:
    """Parse before anything heavy is imported, then train; returns the exit code."""

    def job() -> int:
        switches = switches_in(argv)
        if "help" in switches:
            print_help(__doc__)
            return 0
        configuration = configure(argv)
        if "print_config" in switches:
            print_config(configuration)
            return 0
        return train(configuration, resume_command(argv))

    return guarded("train.py", argv, job, may_say=first_to_say, rank=rank() if launched() else None)


def resume_command(argv: list[str]) -> str:
    """The command that continues this run."""
    words = iter(argv)
    kept = []
    for word in words:
        if word == "--init_from":
            next(words, None)
        elif not word.startswith("--init_from="):
            kept.append(word)
    launcher = ["python"]
    if launched():
        here, nodes = os.environ.get("LOCAL_WORLD_SIZE", "1"), int(os.environ.get("GROUP_WORLD_SIZE", 1))
        launcher = ["torchrun", "--standalone" if nodes == 1 else f"--nnodes={nodes}", f"--nproc_per_node={here}"]
        launcher += ["--rdzv_backend=c10d", "--rdzv_endpoint=HOST:PORT"] if nodes > 1 else []  # on each of them, as before
    return shlex.join([*launcher, "train.py", *kept, "--init_from=resume"])


if __name__ == "__main__":
    sys.exit(leave(main(sys.argv[1:])))
