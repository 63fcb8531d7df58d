"""`python train.py config/x.py --check`: whether a run can start on this machine, and what it will cost, on one screen.

Nothing is written and nothing is prepared. Each line is one thing that a run needs; a line that says FAIL is a reason why it
would not start, or would not come far. What is checked is what the run itself would use: `find_start`, `prepare_machine` and
`open_data` of train.py are handed in.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from command_line import Failure, UsageError, duration, is_out_of_memory, short
from data.mixture import dataset_names
from data.preparation import EMBEDDED, embedded_options
from data.token_dataset import is_prepared, resolve_dataset
from flops_parameter_counting.flops import flops_per_token
from flops_parameter_counting.parameters import count_parameters
from flops_parameter_counting.scaling_laws import LAWS
from model_builder import initialize
from model_components import auxiliary_losses
from model_config import ModelConfig
from training.assembly import assemble
from training.batch import next_token_batch
from training.fitting import Demand, Fit, laid_out
from training.meter import free_memory
from training.objectives import OBJECTIVES, Objective
from training.optimizers import OPTIMIZERS, Optimizer, clip_and_check
from training.report import ASSUMED_MFU
from training.stages import Data, Machine, Start

WIDTH = 80
LONGEST_TRIAL = 60.0  # seconds that a micro-batch may take by a rough guess; else one sequence is tried
LAW = "besiroglu"  # that the predicted loss is of
LAW_HOLDS_FROM = 10_000_000  # parameters; of a vocabulary of 10,000 or more


@dataclass
class Inspection:
    """The lines found so far, and whether the run could start."""

    lines: list[str] = field(default_factory=list)
    failed: int = 0

    def note(self, what: str, text: str, good: bool | None = True) -> None:
        """One finding: good, bad (False) or only worth knowing (None). A failure is shown in full, the others in two lines."""
        self.failed += good is False
        mark = {True: "ok  ", False: "FAIL", None: "note"}[good]
        wrapped = textwrap.wrap(" ".join(text.split()), WIDTH - 14, max_lines=4 if good is False else 2, placeholder=" …")
        self.lines += [f"{mark} {what:<8} {wrapped[0]}", *(" " * 14 + line for line in wrapped[1:])]

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        """What goes wrong inside with a sentence for the user is a failure of `what`."""
        try:
            yield
        except (UsageError, Failure, OSError, ValueError) as error:
            self.note(what, str(error), good=False)


def inspected(start: Start, machine: Machine, open_data: Callable[[], Data]) -> tuple[str, bool]:
    """What is said about the run that `start` describes, and whether it could start."""
    found, config, world = Inspection(), start.config, machine.world
    data = _look_at_data(found, start, open_data)
    model = data.model_config if data else config.model_config(_vocabulary_to_come(start))
    found.lines.insert(0, f"     model    {model.name}, N = {count_parameters(model):,}")
    _look_at_packages(found, start)
    _look_at_device(found, machine)
    sequences = config.sequences_per_iteration(model.block_size)
    if sequences % world.data_size:
        found.note("batch", f"{sequences} sequences cannot be shared equally by {world.data_size} processes.", good=False)
    objective = None
    with found.of("memory"):
        objective = OBJECTIVES[config.objective](config, model)
        fit = _look_at_memory(found, start, machine, objective, model, sequences)
    _look_at_disk(found, start, model, data)
    seconds = None
    if objective is not None and not (fit.needed and fit.needed > fit.available):
        seconds = _try_a_step(found, start, machine, objective, data, fit, model)
    _say_what_it_costs(found, start, machine, model, data, sequences, seconds)
    verdict = "nothing stands in the way" if not found.failed else f"{found.failed} of these would stop the run"
    return "\n".join([*found.lines, verdict]), not found.failed


def _look_at_data(found: Inspection, start: Start, open_data: Callable[[], Data]) -> Data | None:
    """The dataset, opened as the run would; None where it is not there (yet)."""
    with found.of("data"):
        to_come = [name for name in dataset_names(start.config.dataset) if _prepares_itself(name)]
        if to_come:
            found.note("data", f"{', '.join(to_come)} is not there yet; the run prepares it at its start.", good=None)
            return None
        data = open_data()
        train, val = (len(data.dataset.split(name)) for name in ("train", "val"))
        epochs = (data.length * data.sequences) / data.loader.order.sequences_per_epoch
        found.note(
            "data",
            f"{start.config.dataset}: {train:,} training and {val:,} validation tokens; the run reads them {epochs:.2f} times",
        )
        for warning in data.warnings:
            found.note("data", warning, good=None)
        return data
    return None


def _prepares_itself(name: str) -> bool:
    folder = resolve_dataset(name)
    return folder.name in EMBEDDED and not is_prepared(folder) and not (folder / "train.bin").exists()


def _vocabulary_to_come(start: Start) -> int | None:
    """The vocabulary of a dataset that the run will prepare; None where it is not known."""
    sizes = [embedded_options(name).bpe_vocab_size for name in dataset_names(start.config.dataset) if name in EMBEDDED]
    return sizes[0] if sizes else None


def _look_at_packages(found: Inspection, start: Start) -> None:
    config = start.config
    wanted = {
        "tensorboard": config.tensorboard,
        "wandb": config.wandb_log,
        "transformers": config.init_from.startswith("hf:"),
        "triton": config.compile is True and torch.cuda.is_available(),
    }
    missing = [name for name, asked in wanted.items() if asked and importlib.util.find_spec(name) is None]
    if missing:
        install = f"pip install {' '.join(missing)}"
        found.note("packages", f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: {install}", good=False)
    else:
        asked = "".join(f", {name}" for name, wanting in wanted.items() if wanting)
        found.note("packages", f"torch {torch.__version__}{asked}")


def _look_at_device(found: Inspection, machine: Machine) -> None:
    """The device, how many GPUs there are for how many processes, and the peak."""
    world, gpus = machine.world, torch.cuda.device_count() if machine.device.type == "cuda" else 0
    name = torch.cuda.get_device_name(machine.device) if gpus else "CPU"
    peak = f", {machine.peak.flops / 1e12:.3g} TFLOP/s peak" if machine.peak else ""
    processes = f", {world.size} processes" if world.grouped else ""
    found.note("device", f"{name}, {torch.get_num_threads()} threads, {machine.dtype}{processes}{peak}")
    if gpus > world.local_size:
        found.note(
            "device",
            f"{gpus} GPUs are here and {world.local_size} would work: torchrun --standalone --nproc_per_node={gpus} train.py …",
            good=None,
        )


def _look_at_memory(
    found: Inspection, start: Start, machine: Machine, objective: Objective, model: ModelConfig, sequences: int
) -> Fit:
    """What the run needs and what there is; the strategy and micro-batch that it would have."""
    world, device = machine.world, machine.device
    demand = Demand(
        model, start.config, machine.dtype, device.type, sequences, lambda rows: objective.memory(rows, model.block_size)
    )
    available = min(world.everywhere(lambda: free_memory(device, world.local_size)))
    fit = world.from_main(lambda: laid_out(start, demand, world, device, available, closely=True))
    if fit.needed is None:
        found.note("memory", f"what it needs cannot be predicted; {fit.available / 1e9:.1f} GB are free", good=None)
    elif fit.too_large:
        found.note("memory", fit.in_words(), good=False)
    else:
        needed, free = fit.needed / 1e9, fit.available / 1e9
        together = "" if fit.parallelism == "none" else f", {fit.parallelism}"
        found.note("memory", f"{needed:.2f} of {free:.1f} GB free, in micro-batches of {fit.micro_batch}{together}")
    return fit


def _look_at_disk(found: Inspection, start: Start, model: ModelConfig, data: Data | None) -> None:
    """Room for the checkpoints that stay, the best, and the one that is being written."""
    config = start.config
    if config.save_interval is not None and config.save_interval < 0 or config.eval_only:
        found.note("disk", "no checkpoints", good=None)
        return
    n = count_parameters(model)
    size = 4 * n + OPTIMIZERS[config.optimizer].rule.state(n, 0)
    snapshots = 0
    if config.snapshot_epochs and data is not None:
        snapshots = math.floor(data.length * data.sequences / data.loader.order.sequences_per_epoch / config.snapshot_epochs)
    number = config.keep_last + 2 + snapshots
    folder = Path(config.out_dir).expanduser().absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    with found.of("disk"):
        if not os.access(existing, os.W_OK):
            raise Failure(f"{existing} cannot be written; choose another --out_dir.")
        free = shutil.disk_usage(existing).free
        text = f"{number} checkpoints of {size / 1e9:.2f} GB are {number * size / 1e9:.1f} GB; {free / 1e9:.1f} GB are free"
        advice = "; a smaller --keep_last needs less" if number * size > free else ""
        found.note("disk", f"{text} in {config.out_dir}{advice}", good=number * size <= free)


def _try_a_step(
    found: Inspection, start: Start, machine: Machine, objective: Objective, data: Data | None, fit: Fit, model: ModelConfig
) -> float | None:
    """Seconds a sequence of a real step: build the model, two micro-batches forward and backward, an update."""
    if machine.world.grouped:
        found.note("step", "not tried with several processes: one alone tries it", good=None)
        return None
    config, device = start.config, machine.device
    flops = flops_per_token(model, checkpointing=config.activation_checkpointing).hardware * model.block_size
    rate = ASSUMED_MFU * machine.peak.flops if machine.peak else math.inf
    rows = fit.micro_batch if flops * fit.micro_batch / rate < LONGEST_TRIAL else 1
    try:
        network = assemble(model, objective, config, machine.compute_dtype)
        network.to_empty(device=device)
        initialize(network, config.seed)
        if objective.frozen is not None:
            objective.frozen.to(device).eval().requires_grad_(False)
        network.train()
        optimizer = Optimizer(network, config)
        if data is not None:
            batch = data.loader.batch(start.progress.sequences, data.sequences)[:rows]
        else:
            batch = next_token_batch(torch.randint(0, model.vocab_size, (rows, model.block_size + 1)))
        began = time.perf_counter()
        for attempt in range(2):
            if attempt and time.perf_counter() - began < LONGEST_TRIAL / 4:
                began = time.perf_counter()  # the first one warms up
            elif attempt:
                break
            with auxiliary_losses(torch.ones((), device=device)):
                losses, count, _ = objective(network, batch.to(device))
            (losses / count).backward()
            loss = float(losses.detach() / count)
        _, skip = clip_and_check(network, losses.detach(), config.grad_clip, torch.ones((), device=device))
        optimizer.step(config.learning_rate, skip)
        if not math.isfinite(loss):
            found.note("step", f"the first loss is {loss}: try --dtype=float32.", good=False)
            return None
        seconds = time.perf_counter() - began
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        found.note("step", f"out of memory with {rows} sequences, although the prediction fits.", good=False)
        return None
    found.note(
        "step",
        f"a micro-batch of {rows} sequences, forward, backward and update: {seconds:.2f} s, first loss {loss:.3f} "
        f"(ln of the vocabulary: {math.log(model.vocab_size):.3f})",
    )
    return seconds / rows


def _say_what_it_costs(
    found: Inspection,
    start: Start,
    machine: Machine,
    model: ModelConfig,
    data: Data | None,
    sequences: int,
    seconds: float | None,
) -> None:
    """Tokens, FLOPs, time, price, and the loss that a scaling law predicts."""
    config = start.config
    flops = flops_per_token(model, checkpointing=config.activation_checkpointing)
    if data is not None:
        steps = max(0, data.length - start.progress.step)
    elif config.epochs is not None:
        found.note("cost", f"{config.epochs:g} epochs of data that is not there: the length is not known", good=None)
        return
    else:
        steps = -(-config.max_tokens // (sequences * model.block_size)) if config.max_tokens else config.max_iters or 1000
    tokens = steps * sequences * model.block_size
    text = f"{steps:,} iterations, {short(tokens)} tokens, {short(tokens * flops.full)}FLOP"
    took = None
    if seconds is not None:
        took = seconds * steps * sequences / machine.world.data_size
        text += f", about {duration(took)} by the step above"
    elif machine.peak is not None:
        took = tokens * flops.hardware / (machine.peak.flops * ASSUMED_MFU)
        text += f", about {duration(took)} at an MFU of {ASSUMED_MFU:.0%}"
    if took is not None and config.price_per_gpu_hour is not None:
        text += f", price {machine.world.size * took / 3600 * config.price_per_gpu_hour:,.2f}"
    found.note("cost", text)
    if model.vocab_size >= 10_000 and count_parameters(model) >= LAW_HOLDS_FROM and tokens:
        law, unique = LAWS[LAW], len(data.dataset.split("train")) if data is not None else tokens
        loss = law.loss_with_repeats(count_parameters(model), start.progress.tokens + tokens, unique)
        found.note("loss", f"about {loss:.2f} at the end by {law.source.split(',')[0]}'s law for text from the web", good=None)
