"""--speed: which variant is faster. Training steps of all variants, taken in turns on an idle machine, with their scatter.

A run's own tok/s compares badly: another hour, another neighbour on the machine, another clock of the processor. Here all
variants are in one process and take one step each, again and again, each round in another order; so what the machine
does in a round it does to all of them, and the rounds are compared in pairs.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ablation.planning import StudyPlan
from ablation.variants import Variant
from command_line import UsageError, choose_device, text_table
from comparison.inference import adjust, compare_means
from comparison.report import p_text
from flops_parameter_counting.hardware import best_dtype
from model_builder import COMPUTE_DTYPES, initialize
from model_components import auxiliary_losses
from training.assembly import assemble, compile_blocks
from training.data_loader import DataLoader
from training.objectives import OBJECTIVES, Tally
from training.optimizers import Optimizer, clip_and_check
from training.precision import LossScale

ROUNDS = 30
WARM_UP = 3  # rounds that are not counted: memory is found, kernels are chosen, blocks compiled
BUSY = 0.1  # share of the processors in use by others from which on a machine is not idle
LOOK = 1.0  # seconds over which that is measured


class Stepper:
    """One variant's model, data and optimizer in this process; `step` trains it by one iteration, as train.py does."""

    def __init__(self, variant: Variant, device: torch.device):
        train = variant.train
        self.device, self.train = device, train
        dtype = COMPUTE_DTYPES[best_dtype(device) if train.dtype == "auto" else train.dtype]
        self.objective = OBJECTIVES[train.objective](train, variant.model)
        self.model = assemble(variant.model, self.objective, train, dtype)
        self.model.to_empty(device=device)
        initialize(self.model, train.seed)
        if self.objective.frozen is not None:
            self.objective.frozen.to(device).eval().requires_grad_(False)
        compile_blocks(self.model, train, device)
        self.model.train()
        self.optimizer, self.loss_scale = Optimizer(self.model, train), LossScale(dtype, device)
        self.sequences, self.read = train.sequences_per_iteration(variant.model.block_size), 0
        self.tokens = self.sequences * variant.model.block_size
        self.loader = DataLoader(
            variant.dataset.split("train"), variant.model.block_size, train.data_seed, vocab_size=variant.model.vocab_size
        )

    def step(self) -> float:
        """One iteration at the full learning rate; returns its seconds, with all that the device had to do."""
        batch = self.loader.batch(self.read, self.sequences)  # reading the data is no part of the model
        self._wait()
        before = time.perf_counter()
        tally, scale = Tally(self.tokens, self.device), self.loss_scale.scale / self.tokens
        for micro_batch in batch.split(self.train.micro_batch_size):
            with auxiliary_losses(scale):
                losses, count, figures = self.objective(self.model, micro_batch.to(self.device))
            (losses * scale).backward()
            tally.add(losses, count, figures)
        loss, share, _ = tally.over(lambda sums: sums)
        _, skip = clip_and_check(self.model, loss, self.train.grad_clip, self.loss_scale.scale * share)
        self.optimizer.step(self.train.learning_rate, skip)
        self.optimizer.zero_grad()
        self.loss_scale.update(skip)
        self._wait()
        self.read += self.sequences
        return time.perf_counter() - before

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant's steps, a round after the other, and the tokens of a step."""

    name: str
    seconds: tuple[float, ...]
    tokens: int


def busy_share(path: Path = Path("/proc/stat"), wait: Callable[[float], None] = time.sleep) -> float | None:
    """The share of this machine's processor time that is in use at this moment; None where the system does not say.

    Read twice, LOOK seconds apart, while this process sleeps: all of it is other work.
    """

    def counts() -> tuple[int, int]:
        ticks = [int(word) for word in path.read_text().split("\n")[0].split()[1:9]]
        return sum(ticks), ticks[3] + ticks[4]  # all; idle and waiting for disks

    try:
        total, idle = counts()
        wait(LOOK)
        total_after, idle_after = counts()
    except (OSError, ValueError, IndexError):
        return None
    return 1 - (idle_after - idle) / max(total_after - total, 1)


def take_turns(steppers: Sequence[tuple[str, Stepper]], rounds: int = ROUNDS) -> list[Timing]:
    """`rounds` rounds of one step of each, after WARM_UP others; each round starts with another one."""
    seconds: dict[str, list[float]] = {name: [] for name, _ in steppers}
    for number in range(-WARM_UP, rounds):
        first = number % len(steppers)
        for name, stepper in [*steppers[first:], *steppers[:first]]:
            taken = stepper.step()
            if number >= 0:
                seconds[name].append(taken)
    return [Timing(name, tuple(seconds[name]), stepper.tokens) for name, stepper in steppers]


def speed_in_words(timings: Sequence[Timing], busy: float | None) -> str:
    """The table, and of each variant against the first one whether a difference in time is shown.

    Tested are logarithms of seconds a token, in pairs by round, adjusted by Holm's procedure. On a machine that was not
    idle (`busy`: the share in use by others, before or after) nothing is claimed.
    """
    rows = []
    for timing in timings:
        milliseconds = sorted(1e3 * value for value in timing.seconds)
        low, _, high = statistics.quantiles(milliseconds, n=4)
        middle = statistics.median(milliseconds)
        rows.append((timing.name, f"{middle:.2f}", f"{low:.2f} to {high:.2f}", f"{1e3 * timing.tokens / middle:,.0f}"))
    lines = [text_table(("variant", "ms/step", "middle half", "tok/s"), rows, "lrrr"), ""]
    lines.append(f"{len(timings[0].seconds)} steps of each, taken in turns in one process; medians.")
    if busy is not None and busy > BUSY:
        return "\n".join(
            [*lines, f"Other work used {busy:.0%} of this machine's processor time, so nothing is claimed about speed."]
        )
    logarithms = [{i: math.log(value / timing.tokens) for i, value in enumerate(timing.seconds)} for timing in timings]
    tests = adjust([compare_means(logarithms[0], other) for other in logarithms[1:]])
    for timing, test in zip(timings[1:], tests):
        if test.p_holm is None:
            lines.append(f"nothing can be said of {timing.name} and {timings[0].name}: their times do not vary.")
            continue
        by, ends = math.expm1(abs(test.difference)), [math.expm1(end) for end in (test.low, test.high)]
        said = f"{100 * test.level:.3g} % interval {ends[0]:+.1%} to {ends[1]:+.1%} of time; {test.method}, {p_text(test.p_holm)}"
        if test.shown:
            faster, slower = (timing.name, timings[0].name) if test.difference < 0 else (timings[0].name, timing.name)
            lines.append(f"{faster} is faster: {slower} takes {by:.1%} more time ({said}).")
        else:
            lines.append(f"no difference in speed shown between {timings[0].name} and {timing.name} ({said}).")
    return "\n".join(lines)


def compare_speed(plan: StudyPlan) -> str:
    """Measure the variants of a plan; what came out, in words. UsageError on a busy machine, unless the plan is forced."""
    if len(plan.trained) < 2:
        raise UsageError("--speed compares variants; give --vary.")
    before = busy_share()
    if before is not None and before > BUSY and not plan.force:
        raise UsageError(
            f"Other work uses {before:.0%} of this machine's processor time, so step times would say little; wait until it is "
            "idle, or --force measures all the same and claims nothing."
        )
    train = plan.base.train
    if train.threads:
        torch.set_num_threads(train.threads)
    device = choose_device(train.device)
    ordered = sorted(plan.trained, key=lambda variant: variant is not plan.base)
    steppers = [(variant.name, Stepper(variant, device)) for variant in ordered]
    try:
        timings = take_turns(steppers)
    finally:
        for _, stepper in steppers:
            stepper.loader.close()
    busy = [share for share in (before, busy_share()) if share is not None]
    return speed_in_words(timings, max(busy, default=None))
