"""What a run tells: on the terminal (start print-out, lines, progress bar) and, through the same calls, to its log."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from command_line import duration, labelled, printable
from flops_parameter_counting.hardware import Peak, measure_cpu_peak
from flops_parameter_counting.parameters import count_active_parameters, count_padding, count_parameters
from model_config import COMPONENT_KINDS, component, model_keys, shortest_pattern
from training.evaluation import Evaluation
from training.meter import StepMeter, peak_memory_gb
from training.profiling import NoProfiler, Profiler
from training.progress import Progress
from training.stages import Data, Learner, Machine, Start
from training.trackers import open_trackers
from training.train_config import TrainConfig
from training_logger import TrainingLogger, hardware_facts

ASSUMED_MFU = 0.3  # for the time announced before anything has been measured


def start_report(start: Start, machine: Machine, data: Data, learner: Learner, device_name: str, log: Path | None) -> str:
    """The print-out at the start of a run: model, every component, N, cost, data, batch, hardware, expected time."""
    config, progress, model, flops, peak = start.config, start.progress, data.model_config, learner.flops, machine.peak
    dataset, sequences, length, world = data.dataset, data.sequences, data.length, machine.world
    tokens, left = data.tokens, max(0, length - progress.step)
    together = f", {world.size} processes, {learner.parallelism}" if world.grouped else ""
    hardware = f"{device_name}, threads: {torch.get_num_threads()}, {machine.dtype}{together}"
    notes = start.notes + ([dataset.note] if dataset.note else [])
    n, active, padding = count_parameters(model), count_active_parameters(model), count_padding(model)
    said_above = {*COMPONENT_KINDS, "qk_norm", "dropout"}
    optional = {
        key.name: getattr(model, key.name)
        for key in model_keys().values()
        if not key.required and key.name not in said_above and getattr(model, key.name)
    }
    rows: list[tuple[str, str]] = [("model", f"{model.name}   (fingerprint {model.fingerprint})")]
    for kind in COMPONENT_KINDS:
        value = shortest_pattern(model.layer_pattern) if kind == "block" else getattr(model, kind)
        if value is not None:
            about = "" if kind == "block" else f"   {component(kind, value).summary}"
            rows.append(("", f"{'layer_pattern' if kind == 'block' else kind:<18} {value}{about}"))
    kv = "" if model.n_kv_head == model.n_head else f", {model.n_kv_head} key/value heads"
    rows += [
        (
            "",
            f"{'shape':<18} {model.n_layer} layers, {model.n_head} heads of {model.head_dim}{kv}, width "
            f"{model.n_embd}, feed-forward {model.d_ff}, context {model.block_size}, vocabulary {model.vocab_size}",
        ),
        (
            "",
            f"{'other':<18} bias {model.bias}, qkv_bias {model.qkv_bias}, qk_norm {model.qk_norm}, weight_tying "
            f"{model.weight_tying}, dropout {model.dropout}, norm_eps {model.norm_eps}"
            + "".join(f", {key} {value}" for key, value in optional.items()),
        ),
        (
            "parameters",
            f"N = {n:,}"
            + (f", of which a token uses {active:,}" if active != n else "")
            + (f", of which {padding:,} pad the vocabulary" if padding else ""),
        ),
        ("cost", f"{flops.full / 1e9:.4g} GFLOP a token, forward and backward, full attention ({flops.causal / 1e9:.4g} causal)"),
        (
            "data",
            f"{config.dataset}: {len(dataset.split('train')):,} training and {len(dataset.split('val')):,} "
            f"validation tokens, vocabulary {dataset.vocab_size or 'unknown'}",
        ),
        (
            "batch",
            f"{sequences} sequences × {model.block_size} tokens = {tokens:,} tokens per iteration, in "
            f"micro-batches of {min(config.micro_batch_size, sequences)}",
        ),
        (
            "length",
            f"{length:,} iterations = {progress.tokens + left * tokens:,} tokens = "
            f"{(progress.sequences + left * sequences) / data.loader.order.sequences_per_epoch:.2f} epochs"
            + (f"; {progress.step:,} done" if progress.step else ""),
        ),
        (
            "hardware",
            hardware
            + (
                "" if peak is None else f", {peak.flops / 1e12:.3g} TFLOP/s peak ({'measured' if peak.measured else peak.source})"
            ),
        ),
    ]
    if peak is not None:
        seconds = left * tokens * flops.hardware / (peak.flops * ASSUMED_MFU)
        rows.append(("time", f"about {duration(seconds)} at an assumed MFU of {ASSUMED_MFU:.0%}; the step lines measure it"))
    rows += [("note", note) for note in notes] + [("log", str(log))]
    return labelled(rows)


def step_line(
    step: int,
    length: int,
    loss: float,
    lr: float,
    grad_norm: float,
    tokens_per_s: float,
    step_ms: dict[str, float],
    mfu: float | None,
    memory_gb: float,
    skipped: int,
    figures: dict[str, float],
    width: int | None = None,
) -> str:
    """One line of the log for people; times in ms, memory in GB, the rest of the run in words.

    width: columns that there are; what is least asked for is then left out until the line fits.
    """
    laps = ", ".join(f"{name} {ms:.1f}" for name, ms in step_ms.items() if name != "total")
    utilisation = f" | mfu {mfu:.1%}" if mfu is not None else ""
    again = f" | skipped {skipped}" if skipped else ""
    more = "".join(f" | {name} {value:.4g}" for name, value in figures.items())
    left = duration((length - step) * step_ms["total"] / 1e3)
    total = f" | {step_ms['total']:.1f} ms"
    pieces = {  # in the order of the line
        "loss": f"step {step}/{length} | loss {loss:.4f}",
        "figures": more,
        "lr": f" | lr {lr:.2e}",
        "norm": f" | grad norm {grad_norm:.3f}",
        "rate": f" | {tokens_per_s:,.0f} tok/s",
        "ms": total,
        "laps": f" ({laps})",
        "mfu": utilisation,
        "memory": f" | {memory_gb:.1f} GB",
        "skipped": again,
        "left": f" | {left} left",
    }
    for least in ("laps", "memory", "ms", "norm", "lr", "figures", "mfu", "rate", "left"):
        if width is not None and sum(map(len, pieces.values())) > width:
            pieces[least] = ""
    return "".join(pieces.values())


def evaluation_line(step: int, evaluation: Evaluation, best: bool) -> str:
    """One line about an evaluation."""
    perplexity = "" if evaluation.perplexity is None else f" | perplexity {evaluation.perplexity:.2f}"
    bits = "" if evaluation.bits_per_byte is None else f" | {evaluation.bits_per_byte:.4f} bits per byte"
    so_far = " | best so far" if best else ""
    parts = "".join(f" | {name} {loss:.4f}" for name, loss in evaluation.by_source.items())
    return f"eval at {step} | val loss {evaluation.loss:.4f}{perplexity}{bits}{parts} | {evaluation.seconds:.1f} s{so_far}"


def closing_lines(
    outcome: str,
    signal_name: str | None,
    progress: Progress,
    config: TrainConfig,
    cost: dict[str, float | None],
    log: Path | None,
    resume_command: str,
) -> str:
    """The last words of a run that did not fail: how it came out, where its log is, what it cost, how to go on."""
    lines = [f"{outcome} after step {progress.step}" + (f" ({signal_name})" if signal_name else "") + f"; log: {log}"]
    if cost["estimated_cost"] is not None:
        lines.append(
            f"estimated cost {cost['estimated_cost']:,.2f}: {cost['device_hours']:.3f} device-hours at "
            f"{config.price_per_gpu_hour:,.2f}"
        )
    if outcome == "stopped" and progress.saved_step == progress.step:
        lines.append(f"To go on: {resume_command}")
    elif outcome == "stopped":
        why = "save_interval is -1." if (config.save_interval or 0) < 0 else "it was stopped before its first step."
        lines.append(f"Nothing was saved: {why}")
    return "\n".join(lines)


class Display:
    """Lines on stdout; on a terminal also a tqdm bar, in a pipe none. Ranks other than 0 are silent.

    If stdout goes away (`| head`, a full disk) it falls silent too: the log is the truth, and training goes on.
    """

    def __init__(self, enabled: bool = True, stream: TextIO | None = None):
        self.enabled, self.bar, self.stream = enabled, None, stream  # stream: another one than stdout

    def start_bar(self, first: int, total: int) -> None:
        """Show a bar of the run's steps, if a person is watching."""
        if self.enabled and sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=first, unit="step", dynamic_ncols=True, leave=False)

    @property
    def width(self) -> int | None:
        """Columns of the terminal that the lines go to; None where it is a pipe or a file, which have all of them."""
        if self.stream is not None or sys.stdout is None or not sys.stdout.isatty():
            return None
        return shutil.get_terminal_size().columns

    def note(self, text: str) -> None:
        """Show a figure behind the bar."""
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)

    def advance(self) -> None:
        """One step further."""
        if self.bar is not None:
            self.bar.update()

    def line(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if not self.enabled or sys.stdout is None:
            return
        text = printable(text)
        try:
            if self.bar is not None:
                self.bar.write(text)
                sys.stdout.flush()
            else:
                print(text, flush=True, file=self.stream)
        except OSError:
            self.enabled = False
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that nothing fails when the process ends either

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


# ------------------------------------------------------------------------------------------- terminal and log together


@dataclass
class Utilisation:
    """What share of the hardware's dense peak a rate of tokens is: mfu, mfu_causal and hfu; null where no peak is known."""

    flops: dict[str, int]  # a token, by figure
    peak: Peak | None  # of all processes together
    dtype: str
    processes: int

    def at(self, tokens_per_s: float, warn: Callable[..., None]) -> dict[str, float | None]:
        """The figures at this rate.

        A CPU's peak is measured. If other work disturbed the measurement the run overtakes it: then it is measured
        again, and if that does not help nothing is claimed.
        """
        most = tokens_per_s * max(self.flops.values())
        if self.peak and self.peak.measured and most > self.peak.flops:
            again = measure_cpu_peak(self.dtype, again=True)
            self.peak = dataclasses.replace(again, flops=again.flops * self.processes)
            if most > self.peak.flops:
                warn(
                    "the measured peak of this CPU is below what the run reaches (other work disturbs the "
                    "measurement), so mfu is null",
                    measured=self.peak.flops,
                )
                self.peak = None
        return {name: tokens_per_s * a_token / self.peak.flops if self.peak else None for name, a_token in self.flops.items()}


@dataclass
class Report:
    """The run's voice: each event goes to the log and, as a line, to the terminal."""

    logger: TrainingLogger
    display: Display
    meter: StepMeter
    utilisation: Utilisation
    device: torch.device
    length: int
    profiler: NoProfiler = field(default_factory=NoProfiler)
    sources: Callable[[int], dict[str, dict[str, float]]] = lambda sequences: {}  # of a mixture: what was read of each part
    started: float = field(default_factory=time.perf_counter)

    def warn(self, message: str, **facts: Any) -> None:
        """A warning, on the terminal and in the run log."""
        self.display.line(f"warning: {message}")
        self.logger.warning(message, **facts)

    def step_done(self) -> None:
        """A training step is through: move the bar, and the profiler."""
        self.profiler.step()
        self.display.advance()

    def step(
        self, progress: Progress, loss: Tensor, lr: float, grad_norm: Tensor, figures: dict[str, Tensor], skips: Any
    ) -> None:
        """One step line, on the terminal and in the run log, with what was skipped since the last one."""
        rate, step_ms = self.meter.read()
        newly_skipped = progress.note_skips(*skips.read())
        if newly_skipped:
            self.warn(f"{newly_skipped} updates skipped for a non-finite loss or gradient", step=progress.step)
        utilisation = self.utilisation.at(rate, self.warn)
        shown = dict(
            loss=float(loss),
            lr=lr,
            grad_norm=float(grad_norm),
            tokens_per_s=rate,
            step_ms=step_ms,
            memory_gb=peak_memory_gb(self.device),
        )
        extra = {name: float(figure) for name, figure in figures.items()}
        sources = {"sources": read} if (read := self.sources(progress.sequences)) else {}
        self.logger.step(progress.step, progress.tokens, **shown, **utilisation, skipped=progress.skipped, **extra, **sources)
        self.display.line(
            step_line(
                progress.step,
                self.length,
                **shown,
                mfu=utilisation["mfu"],
                skipped=progress.skipped,
                figures=extra,
                width=self.display.width,
            )
        )
        self.display.note(f"loss {shown['loss']:.4f}")

    def evaluation(self, progress: Progress, found: Evaluation) -> None:
        """Judge an evaluation; one line on the terminal and in the run log."""
        if progress.evaluations.judge(progress.step, found.loss, found.tokens):
            self.warn("the validation set is not the one of the evaluations before, so the best loss so far is forgotten")
        self.logger.evaluation(
            progress.step,
            progress.tokens,
            val_loss=found.loss,
            perplexity=found.perplexity,
            bits_per_byte=found.bits_per_byte,
            val_tokens=found.tokens,
            seconds=found.seconds,
            best=progress.is_best,
            **({"val_loss_by_source": found.by_source} if found.by_source else {}),
        )
        self.display.line(evaluation_line(progress.step, found, progress.is_best))

    def statistics(self, step: int, found: dict[str, Any]) -> None:
        """Norms of one step: all of them to the log, the extremes to the terminal."""
        self.logger.statistics(step, **found)
        gradients, activations = found["gradient_norm"], found["activation_rms"]
        most = max(gradients, key=gradients.get)
        words = [f"stats at {step}", f"largest gradient norm {gradients[most]:.3g} ({most})"]
        if activations:
            words.append(f"output rms {min(activations.values()):.3g} to {max(activations.values()):.3g}")
        if found["largest_logit"] is not None:
            words.append(f"largest logit {found['largest_logit']:.3g}")
        self.display.line(" | ".join(words))

    def sample(self, step: int, text: str) -> None:
        """A sample of text."""
        self.logger.sample(step, text)
        self.display.line(f"sample at {step} | {printable(text)}")

    def end(self, outcome: str, progress: Progress, processes: int, price_per_hour: float | None) -> dict[str, float | None]:
        """Close bar, profiler and log, with how the run came out. Returns what it took: seconds, device-hours, their price."""
        seconds = time.perf_counter() - self.started
        hours = processes * seconds / 3600
        cost = dict(
            seconds=seconds, device_hours=hours, estimated_cost=None if price_per_hour is None else hours * price_per_hour
        )
        self.display.close()
        self.profiler.close()
        judged = progress.evaluations
        self.logger.end(
            outcome,
            step=progress.step,
            tokens=progress.tokens,
            val_loss=judged.val_loss,
            best_val_loss=judged.best_val_loss,
            best_step=judged.best_step,
            skipped=progress.skipped,
            **cost,
        )
        return cost


def open_report(
    start: Start, machine: Machine, data: Data, learner: Learner, identity: dict[str, Any], display: Display
) -> Report:
    """Open the run log with its trackers, and the profiler if it is asked for; print and log how the run starts.

    `identity` is what `saving.describe` says of the run.
    """
    config, world, origin, progress = start.config, machine.world, start.origin, start.progress
    resumed_from = dict(checkpoint=str(origin.path), step=progress.step, run=start.saved.get("run")) if origin else None
    logger = TrainingLogger(config.out_dir, enabled=world.is_main, resumed_from=resumed_from)
    hardware, flops, peak = hardware_facts(machine.device), dataclasses.asdict(learner.flops), machine.peak
    n, active = learner.model.num_parameters(), count_active_parameters(data.model_config)
    cost = dict(parameters=n, flops_per_token=flops, **({} if active == n else {"active_parameters": active}))
    try:
        logger.trackers = world.from_main(lambda: open_trackers(config, logger.path.stem)) or []
        world.from_main(
            lambda: logger.start(
                **{**identity, "model": {**identity["model"], **cost}},
                hardware=hardware,
                peak=dataclasses.asdict(peak) if peak else None,
                length=data.length,
                tokens_per_iteration=data.tokens,
            )
        )
    except BaseException:
        logger.discard()
        raise
    display.line(start_report(start, machine, data, learner, hardware["device_name"], logger.path))
    meter = StepMeter(machine.device, on_lap=lambda lap: world.at(progress.step, f"after {lap}"))
    figures = {"mfu": flops["full"], "mfu_causal": flops["causal"], "hfu": flops["hardware"]}
    report = Report(logger, display, meter, Utilisation(figures, peak, machine.dtype, world.size), machine.device, data.length)
    if len(data.dataset.parts) > 1:
        report.sources = data.read_of_each
    if config.profile:
        report.profiler = Profiler(config.out_dir, machine.device, world.rank, display.line, meter.excluded)
    if peak is None:
        report.warn(f"no dense peak is known for {hardware['device_name']} in {machine.dtype}, so mfu is null")
    return report
