"""Train a language model: set-up in order, then one loop.

python train.py [config/x.py | run_….json] [--key=value | --key value | --k]
python train.py config/quickstart.py --max_iters=100 --normalization=rmsnorm
python train.py config/quickstart.py --resume
python train.py --help | config/x.py --print_config
python train.py config/x.py --check           # can it run here, at what cost
torchrun --standalone --nproc_per_node=4 train.py config/x.py --parallelism=fsdp
"""

from __future__ import annotations

import dataclasses
import os
import sys
from contextlib import ExitStack

from command_line import Failure, choose_device, guarded  # first: from here on Ctrl-C is quiet, also while torch is imported

# isort: split
import torch

from configurator import (
    ConfigError,
    Configuration,
    configure,
    print_config,
    print_help,
    print_help_all,
    print_introduction,
    switches_in,
)
from data.files import remove_empty
from data.mixture import dataset_names, open_dataset, portable_spec
from data.preparation import ensure_prepared
from data.token_dataset import DatasetError
from flops_parameter_counting.flops import flops_per_token
from flops_parameter_counting.hardware import best_dtype, device_peak
from model_builder import initialize
from model_components import auxiliary_losses
from training.assembly import assemble, compile_blocks
from training.checking import inspected
from training.checkpoint import CheckpointError, CheckpointStore, NonFiniteWeights, read_state
from training.continuing import check_same_objective, go_on, take_model
from training.data_loader import DataLoader, WindowOrder, document_end, repetitions
from training.evaluation import Evaluator
from training.fitting import fit_into_memory, out_of_memory, settle_micro_batch
from training.objectives import OBJECTIVES, Objective, Tally
from training.observing import Observer
from training.optimizers import Optimizer, clip_and_check
from training.parallelism import parallelize
from training.precision import LossScale, SkipCounter, dropout_seed
from training.processes import World, first_to_say, join, launched, launched_as, leave, rank
from training.progress import Diverged, Progress, check_outcome, stop_if_diverged
from training.report import Display, Report, closing_lines, open_report
from training.saving import BackgroundSaver, Checkpoints, Saver, describe, restore, restored_names
from training.schedules import learning_rate, run_length
from training.signals import StopRequest
from training.stages import Data, Learner, Machine, Start
from training.starting import (
    find_origin,
    imported_state,
    launch_warnings,
    prepare_out_dir,
    resume_command,
    starts_from_files,
    tokenizer_warnings,
)
from training_logger import remove_leftovers

# ------------------------------------------------------------------------------------------- set-up, step by step


def find_start(configuration: Configuration, world: World, display: Display) -> Start:
    """Nothing, this run's last checkpoint, or somebody's weights; with the configuration that follows from it."""
    world.check_same("command and config file", dataclasses.asdict(configuration.train))
    notes = [configuration.train.notice] if configuration.train.notice else []
    store = CheckpointStore(configuration.train.out_dir)
    origin = find_origin(configuration.train, store, lambda message: display.line(f"warning: {message}"), world)
    saved, progress = {}, Progress()
    if origin:
        saved = (
            imported_state(origin.path) if origin.huggingface else read_state(origin.path, needs=("model", "config", "origins"))
        )
        if origin.weights_only:
            configuration, overruled = take_model(configuration, saved["config"], str(origin.path))
            notes += overruled
        else:
            configuration = go_on(configuration, saved, str(origin.path))
            progress = Progress.restored(saved, origin.path)
    elif problems := configuration.train.problems():  # resume=auto that found nothing
        raise ConfigError("\n".join(problems))
    if not origin or not store.holds(origin.path):
        progress.saved_step = None
    elif origin.weights_only:
        raise CheckpointError(f"The new run would put aside {origin.path}, which it starts from. Choose another --out_dir.")
    return Start(configuration, origin, saved, progress, store, notes)


def open_out_dir(start: Start, world: World, resources: ExitStack) -> Saver:
    """The out_dir, made and locked for this run; the saver of its checkpoints. An evaluation alone writes none."""
    config, store = start.config, start.store
    store.world = world.beside() if config.async_checkpoint else world
    saver = BackgroundSaver(store) if config.async_checkpoint else Saver(store)
    resources.callback(remove_empty, prepare_out_dir(config.out_dir, world))
    if not config.eval_only:
        world.everywhere(store.check_writable)
        world.from_main(lambda: resources.enter_context(store.lock()))
        resources.callback(saver.leave)
        world.from_main(store.clean)
        world.from_main(lambda: remove_leftovers(config.out_dir))
    return saver


def prepare_machine(start: Start, world: World, device: torch.device) -> Machine:
    """Choose compute dtype and threads, seed the dropout, and find the peak that MFU is measured against."""
    config = start.config
    if problems := config.model_config().problems_on(device.type):
        raise ConfigError("\n".join(problems))
    dtype = world.from_main(lambda: best_dtype(device)) if config.dtype == "auto" else config.dtype
    as_before = start.resumes and start.saved["world_size"] == world.size
    if as_before and start.saved["threads"] <= (os.cpu_count() or 1):
        torch.set_num_threads(start.saved["threads"])
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(dropout_seed(config.seed, world.data_rank))  # the weights have seeds of their own
    peaks = world.everywhere(lambda: device_peak(device, dtype, config.peak_tflops))
    peak = None if None in peaks else dataclasses.replace(peaks[0], flops=sum(peak.flops for peak in peaks))
    return Machine(world, device, dtype, peak)


def open_data(start: Start, machine: Machine, resources: ExitStack) -> Data:
    """The dataset and its reader: what is read next depends on (data_seed, sequences read) and nothing else."""
    config, world = start.config, machine.world
    named = dataset_names(config.dataset)  # in every process: what is wrong with it is found by all
    mine = named if world.local_rank == 0 else []
    world.everywhere(lambda: [ensure_prepared(name) for name in mine] and None, "preparing the dataset")
    dataset = open_dataset(
        config.dataset,
        vocab_size=config.vocab_size,
        max_train_tokens=config.max_train_tokens,
        schedule=config.mixture_schedule,
    )
    world.check_same("dataset", dict(dataset=dataset.fingerprint))
    if start.resumes and start.saved["dataset"]["fingerprint"] != dataset.fingerprint:
        was = start.saved["dataset"].get("name", config.dataset)
        remedy = "Prepare it as it was" if was == config.dataset else f"Give --dataset={was}"
        raise Failure(
            f"Dataset {config.dataset!r} is not the one this run was trained on (its fingerprint is {dataset.fingerprint}, the "
            f"checkpoint has {start.saved['dataset']['fingerprint']}). {remedy}, or start a new run from the weights "
            "with --init_from=weights:CHECKPOINT."
        )
    warnings = world.from_main(lambda: tokenizer_warnings(start.origin, dataset))
    model_config = config.model_config(dataset.vocab_size)
    sequences = config.sequences_per_iteration(model_config.block_size)
    if sequences % world.data_size:
        raise ConfigError(
            f"{sequences} sequences an iteration (batch_size × gradient_accumulation_steps) cannot be "
            f"shared equally by {world.data_size} processes. Use a multiple of {world.data_size}."
        )
    for part in dataset.parts:
        if len(part.split("val")) < 2:
            raise DatasetError(
                f"The validation split of {part.folder} has {len(part.split('val'))} tokens, too few to "
                "validate on; prepare the dataset with a larger --val_fraction or more text."
            )
    eos_id = document_end(config, dataset)
    loader = DataLoader(
        [part.split("train") for part in dataset.parts],
        model_config.block_size,
        config.data_seed,
        vocab_size=model_config.vocab_size,
        rank=world.data_rank,
        world_size=world.data_size,
        order_version=start.saved["dataset"].get("order", 1) if start.resumes else WindowOrder.VERSION,
        phases=dataset.phases,
        eos_id=eos_id,
    )
    resources.callback(loader.close)
    done = start.progress
    length = run_length(config, model_config.block_size, loader.order.sequences_per_epoch, done.step, done.sequences)
    warnings += [text for part in dataset.parts if (text := part.stand_in)]
    warnings += repetitions(dataset, loader, done.sequences + max(0, length - done.step) * sequences)
    return Data(dataset, portable_spec(dataset, config.dataset), loader, model_config, sequences, length, warnings)


def make_objective(start: Start, data: Data) -> Objective:
    """What is minimised; of a run that goes on, the same as before."""
    objective = OBJECTIVES[start.config.objective](start.config, data.model_config)
    if start.resumes:
        check_same_objective(start.saved, objective.fingerprint(), str(start.origin.path))
    return objective


def make_learner(start: Start, machine: Machine, data: Data, objective: Objective, parallelism: str) -> Learner:
    """Build the model, share it, and give it the weights that the run starts from."""
    config, device = start.config, machine.device
    model = assemble(data.model_config, objective, config, machine.compute_dtype)
    parallel = parallelize(model, parallelism, machine.world, device, machine.compute_dtype, config.hsdp_shard_size)
    model.to_empty(device=device)
    initialize(model, config.seed, parallel.put, but=restored_names(start, model))
    if objective.frozen is not None:
        objective.frozen.to(device).eval().requires_grad_(False)
    flops = flops_per_token(data.model_config, checkpointing=config.activation_checkpointing)
    progress = start.progress
    learner = Learner(
        model,
        objective,
        Optimizer(model, config),
        LossScale(machine.compute_dtype, device),
        SkipCounter(device, progress.skipped, progress.skipped_in_a_row),
        parallel,
        parallelism,
        dataclasses.replace(
            flops, **{f: getattr(flops, f) + objective.flops_per_token() for f in ("full", "causal", "hardware")}
        ),
    )
    restore(start, machine, learner)
    compile_blocks(model, config, device)
    return learner


# ------------------------------------------------------------------------------------------- the loop


def train(
    start: Start,
    machine: Machine,
    data: Data,
    learner: Learner,
    evaluate: Evaluator,
    report: Report,
    checkpoints: Checkpoints,
    observer: Observer,
    stop: StopRequest,
) -> str:
    """Train until the run's length, a request to stop or the end of patience; returns the outcome."""
    config, progress, world, meter = start.config, start.progress, machine.world, report.meter
    model, objective, optimizer, loss_scale = learner.model, learner.objective, learner.optimizer, learner.loss_scale
    if progress.step == 0 < data.length and config.eval_interval:
        report.evaluation(progress, evaluate(0))  # of a model that knows nothing: about ln(vocab_size)
    model.train()
    meter.restart()
    while (
        progress.step < data.length
        and not progress.evaluations.out_of_patience(config.patience)
        and not stop.requested(checkpoints.failed)
    ):
        meter.lap("start")
        batch = data.loader.batch(progress.sequences, data.sequences)  # this process's rows of the global batch
        meter.lap("data")

        tally = Tally(data.tokens, machine.device)
        scale = loss_scale.scale / data.tokens
        with observer.forward(progress.step):
            for micro_batch in learner.parallel.accumulate(batch.split(config.micro_batch_size)):
                with auxiliary_losses(scale) as auxiliary:
                    losses, count, figures = objective(model, micro_batch.to(machine.device))
                (losses * scale).backward()
                tally.add(losses, count, {**figures, **auxiliary.totals})
        loss, share, figures = tally.over(world.sum)  # of the global batch
        meter.lap("compute")

        observer.backward_done(progress.step, loss_scale.scale * share)
        lr = learning_rate(progress.step, config, data.length)
        grad_norm, skip = clip_and_check(model, loss, config.grad_clip, loss_scale.scale * share)
        optimizer.step(lr, skip)  # skip: something is not finite, which only the device knows
        optimizer.zero_grad()
        loss_scale.update(skip)
        learner.skips.update(skip)
        meter.lap("optimizer")

        meter.step_done(data.tokens)
        progress.advance(data.sequences, data.model_config.block_size)
        report.step_done()
        last = progress.step == data.length
        if last or progress.step % config.log_interval == 0:
            report.step(progress, loss, lr, grad_norm, figures, learner.skips)
        observer.step_done(progress, loss, last)
        stop_if_diverged(progress, learner.skips, config.nonfinite_limit, start.store)
        if last or (config.eval_interval and progress.step % config.eval_interval == 0):
            with meter.excluded():
                report.evaluation(progress, evaluate(progress.step))
        if checkpoints.due(progress) or (stop.save and progress.saved_step != progress.step):
            checkpoints.save(progress)
        checkpoints.poll()
    check_outcome(progress, checkpoints.first_step, learner.skips, start.store)
    checkpoints.finish(progress)
    if progress.step >= data.length:
        return "finished"
    return "stopped" if stop.name else "out of patience"


# ------------------------------------------------------------------------------------------- from command line to exit code


def run(configuration: Configuration, to_go_on: str) -> int:
    """Set up, train (or only evaluate), close the log whatever happens; `to_go_on` is the command that continues. Exit code."""
    asked = configuration.train
    here = launched_as()
    device = choose_device(asked.device, here.local_rank, here.local_size)
    alone = asked.parallelism not in ("auto", "none")
    with ExitStack() as resources:
        world = resources.enter_context(join(device, timeout=asked.collective_timeout, alone=alone))
        display = Display(enabled=world.is_main)
        start = find_start(configuration, world, display)
        progress = start.progress
        saver = open_out_dir(start, world, resources)
        machine = prepare_machine(start, world, device)
        data = open_data(start, machine, resources)
        if start.resumes and progress.step >= data.length and not start.config.eval_only:
            display.line(f"nothing to do: {progress.step} of {data.length} iterations are done; --max_iters says how many.")
            return 0
        objective = make_objective(start, data)
        fit = fit_into_memory(start, machine, data, objective)
        if fit.too_large:
            display.line(f"warning: {fit.in_words()}")  # now, as the next line may be the last one
        learner = make_learner(start, machine, data, objective, fit.parallelism)
        start = settle_micro_batch(start, machine, data, learner, fit)
        config, identity = start.config, describe(start, machine, data, learner)
        report = open_report(start, machine, data, learner, identity, display)
        for warning in [*data.warnings, *world.from_main(launch_warnings)]:
            report.warn(warning)
        evaluate = Evaluator(start, machine, data, learner)
        outcome, stop = "failed", StopRequest(world, can_save=(config.save_interval or 0) >= 0)
        try:
            if config.eval_only:
                report.evaluation(progress, evaluate(progress.step))
                outcome = "evaluated"
            else:
                checkpoints = Checkpoints(saver, start, machine, data, learner, report, identity)
                observer = Observer(start, machine, data, learner, report)
                display.start_bar(progress.step, data.length)
                with stop:
                    outcome = train(start, machine, data, learner, evaluate, report, checkpoints, observer, stop)
        except (Diverged, NonFiniteWeights):
            outcome = "diverged"
            raise
        finally:
            cost = report.end(outcome, progress, world.size, config.price_per_gpu_hour)
        if lost := world.from_main(lambda: report.logger.unwritten):
            raise Failure(lost)
        display.line(closing_lines(outcome, stop.name, progress, config, cost, report.logger.path, to_go_on))
    return 0


def check(configuration: Configuration) -> int:
    """Say whether the run could start on this machine and what it would cost, without writing anything. Exit code."""
    asked, here = configuration.train, launched_as()
    device = choose_device(asked.device, here.local_rank, here.local_size)
    with ExitStack() as resources:
        world = resources.enter_context(join(device, timeout=asked.collective_timeout))
        display = Display(enabled=world.is_main)
        start = find_start(configuration, world, display)
        machine = prepare_machine(start, world, device)
        said, possible = inspected(start, machine, lambda: open_data(start, machine, resources))
        display.line(said)
    return 0 if possible else 1


def main(argv: list[str]) -> int:
    """Parse, then train; returns the exit code."""

    def job() -> int:
        switches = switches_in(argv)
        if not argv:
            print_introduction()
            return 2
        if switches & {"help", "help_all"}:
            (print_help_all if "help_all" in switches else print_help)(__doc__)
            return 0
        configuration, vocabulary = configure(argv), None
        if "print_config" in switches:
            if starts_from_files(configuration.train):  # its configuration is then theirs in part
                start = find_start(configuration, World(), Display(stream=sys.stderr))
                configuration, vocabulary = start.configuration, start.vocabulary
            print_config(configuration, vocabulary)
            return 0
        if "check" in switches:
            return check(configuration)
        return run(configuration, resume_command(argv))

    advice = lambda: out_of_memory(configure(argv).train)  # noqa: E731  asked only where it is needed
    return guarded("train.py", argv, job, advice, may_say=first_to_say, rank=rank() if launched() else None)


if __name__ == "__main__":
    sys.exit(leave(main(sys.argv[1:])))
