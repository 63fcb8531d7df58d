"""What a person wants to see while a run trains: loss spikes, norms layer by layer, samples of text.

None of it changes a loss. Norms cost something only at the steps that `stats_interval` names; losses stay on the device
until the log is written anyway.

A *spike* is a loss above median + max(SPREADS × spread, LEAST) of the last WINDOW losses that were none. The spread is
1.4826 / √2 × the median distance of a loss from the one before it: of normal noise the standard deviation, however the
losses fall. The first FEW losses of a start are only taken in, and as many spikes in a row are a new level. A loss that
is not finite is named as well.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from command_line import Failure
from training.progress import Progress
from training.report import Report
from training.stages import Data, Learner, Machine, Start

WINDOW, FEW = 50, 20
SPREADS, LEAST = 6.0, 0.2
SHOWN = 5  # steps of one warning


@dataclass
class Spikes:
    """Finds losses that stand out; see the module's docstring for the rule."""

    usual: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    in_a_row: list[float] = field(default_factory=list)

    def judge(self, loss: float) -> tuple[bool, float]:
        """(whether this loss stands out, the median that it is compared with). Losses come in the order of the steps."""
        middle = statistics.median(self.usual) if self.usual else loss
        if not math.isfinite(loss):
            return True, middle
        apart = [abs(later - earlier) for earlier, later in pairwise(self.usual)]
        spread = 1.4826 / math.sqrt(2) * statistics.median(apart) if apart else 0.0
        if len(self.usual) >= FEW and loss > middle + max(SPREADS * spread, LEAST):
            self.in_a_row.append(loss)
            if len(self.in_a_row) == FEW:
                self.usual.clear()
                self.usual.extend(self.in_a_row)
                self.in_a_row.clear()
            return True, middle
        self.in_a_row.clear()
        self.usual.append(loss)
        return False, middle


class LayerStatistics:
    """Norms of one step: of each block's output and gradient, and the largest logit, over the global batch."""

    def __init__(self, model: nn.Module, world_sum: Callable[[Tensor], Tensor], world_most: Callable[[Tensor], Tensor]):
        self.model, self.world_sum, self.world_most = model, world_sum, world_most
        self.sums: dict[str, Tensor] = {}
        self.largest: Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take note of what the blocks and the head put out meanwhile."""
        hooks = [
            block.register_forward_hook(lambda _, __, output, name=f"blocks.{number}": self._take(name, output))
            for number, block in enumerate(self.model.blocks)
        ]
        hooks.append(self.model.head.register_forward_hook(lambda _, __, output: self._take_logits(output)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _take(self, name: str, output: Tensor) -> None:
        found = torch.stack([output.double().square().sum(), output.new_tensor(output.numel(), dtype=torch.float64)])
        self.sums[name] = self.sums.get(name, 0.0) + found

    @torch.no_grad()
    def _take_logits(self, logits: Tensor) -> None:
        largest = logits.detach()[..., : self.model.config.vocab_size].float().abs().amax()
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)

    @torch.no_grad()
    def of_gradients(self, scale: Tensor) -> dict[str, Any]:
        """Everything that was found, after backward and before clipping; `scale` divides the gradients as clipping will."""
        names = list(self.sums)
        rms = {}
        if names:
            sums = self.world_sum(torch.stack([self.sums[name] for name in names])).tolist()
            rms = {name: math.sqrt(total / max(1.0, count)) for name, (total, count) in zip(names, sums)}
        largest = None if self.largest is None else float(self.world_most(self.largest.reshape(1)))
        gradients = {"all else": [p for n, p in self.model.named_parameters() if not n.startswith("blocks.")]}
        for number, block in enumerate(self.model.blocks):
            gradients[f"blocks.{number}"] = list(block.parameters())
        return dict(
            activation_rms=rms,
            gradient_norm={name: _norm(parameters, scale) for name, parameters in gradients.items()},
            largest_logit=largest,
        )


def _norm(parameters: list[nn.Parameter], scale: Tensor) -> float:
    """The norm of their gradients over all processes that share them."""
    found = [p.grad for p in parameters if p.grad is not None]
    if not found:
        return 0.0
    norm = nn.utils.get_total_norm(found)
    return float((norm.full_tensor() if hasattr(norm, "full_tensor") else norm) / scale)


class Observer:
    """Looks on while a run trains; every process makes the same calls, rank 0 speaks."""

    def __init__(self, start: Start, machine: Machine, data: Data, learner: Learner, report: Report):
        self.config, self.machine, self.learner, self.report = start.config, machine, learner, report
        self.data, self.spikes = data, Spikes()
        self.losses: list[tuple[int, Tensor]] = []
        self.statistics: LayerStatistics | None = None
        self.prompt: list[int] | None = None
        self.tokenizer = None
        if self.config.sample_interval:
            self._read_prompt()

    # --------------------------------------------------------------------------------------- during a step

    @contextmanager
    def forward(self, step: int) -> Iterator[None]:
        """The forward and backward passes of the step after `step` updates; watched where stats_interval says so."""
        interval, self.statistics = self.config.stats_interval, None
        if not interval or (step + 1) % interval:
            yield
            return
        world = self.machine.world
        self.statistics = LayerStatistics(self.learner.model, world.sum, world.largest)
        with self.statistics.watching():
            yield

    def backward_done(self, step: int, scale: Tensor) -> None:
        """Between backward and clipping: log the norms of a step that is watched."""
        if self.statistics is None:
            return
        with self.report.meter.excluded():
            found = self.statistics.of_gradients(scale)
        self.report.statistics(step + 1, found)

    def step_done(self, progress: Progress, loss: Tensor, last: bool) -> None:
        """After a step: remember its loss; say what stood out where the log is written; write a sample where one is due."""
        self.losses.append((progress.step, loss.detach()))
        if last or progress.step % self.config.log_interval == 0 or len(self.losses) >= WINDOW:
            self._say_spikes()
        interval = self.config.sample_interval
        if interval and self.prompt is not None and (last or progress.step % interval == 0):
            with self.report.meter.excluded():
                self._sample(progress, finite=math.isfinite(float(loss)))

    # --------------------------------------------------------------------------------------- spikes

    def _say_spikes(self) -> None:
        values = torch.stack([loss for _, loss in self.losses]).tolist()  # one transfer
        found = []
        for (step, _), loss in zip(self.losses, values):
            stands_out, usual = self.spikes.judge(loss)
            found += [(step, loss, usual)] if stands_out else []
        self.losses.clear()
        if not found:
            return
        listed = ", ".join(f"{loss:.3f} at step {step}" for step, loss, _ in found[:SHOWN])
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        self.report.warn(
            f"loss spike: {listed}{more}, where {found[0][2]:.3f} is usual. What was read: python data/show.py "
            f"--run={self.config.out_dir} --step={found[0][0]} --rows=0",
            step=found[0][0],
            spikes=[step for step, _, _ in found],
            losses=[loss if math.isfinite(loss) else None for _, loss, _ in found],
            usual=found[0][2],
        )

    # --------------------------------------------------------------------------------------- samples

    def _read_prompt(self) -> None:
        """The ids of sample_prompt; where the dataset's tokenizer cannot be had, one id, and samples are ids too."""
        world, part, config = self.machine.world, self.data.dataset.parts[0], self.config

        def read() -> tuple[list[int], str]:
            try:
                self.tokenizer = part.tokenizer()
            except (Failure, ValueError, OSError, ImportError) as error:
                return [0], f"its tokenizer cannot be loaded ({error})"
            if self.tokenizer is None:
                return [0], "it has no tokenizer"
            ids = self.tokenizer.encode(config.sample_prompt) if config.sample_prompt else []
            return list(ids) or [0 if part.eos_id is None else part.eos_id], ""

        self.prompt, problem = world.from_main(read)
        beyond = [token for token in self.prompt if token >= self.data.model_config.vocab_size]
        if beyond:
            self.prompt, problem = [0], f"sample_prompt has the id {beyond[0]}, which the model's vocabulary does not have"
        if problem:
            self.report.warn(f"samples of {config.dataset} are token ids, after the id 0: {problem}")

    def _sample(self, progress: Progress, finite: bool) -> None:
        """Continue the prompt in every process alike, as sharded weights are gathered from all."""
        if not finite:  # nothing can be drawn from such logits
            self.report.sample(progress.step, "(none: the loss is not finite)")
            return
        config, device, model = self.config, self.machine.device, self.learner.model
        generator = torch.Generator(device).manual_seed(config.seed)
        tokens = torch.tensor([self.prompt], device=device)
        new = [
            int(token) for token in model.stream(tokens, config.sample_tokens, temperature=0.8, top_k=200, generator=generator)
        ]
        self.learner.parallel.settle()
        self.report.sample(progress.step, self._as_text(self.prompt, new))

    def _as_text(self, prompt: list[int], new: list[int]) -> str:
        eos = self.data.dataset.parts[0].eos_id
        new = new[: new.index(eos)] if eos in new else new
        if self.tokenizer is None:
            return " ".join(map(str, [*prompt, *new]))
        shown = [token for token in prompt if token != eos] + new
        return self.tokenizer.decode([token for token in shown if token < self.tokenizer.vocab_size])
