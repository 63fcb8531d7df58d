"""What a run says on the terminal: the start print-out, the step line, the evaluation line, and a progress bar."""

from __future__ import annotations

import os
import sys

from command_line import duration, labelled
from flops_parameter_counting.flops import FlopsPerToken
from flops_parameter_counting.parameters import count_padding, count_parameters
from model_config import COMPONENT_KINDS, ModelConfig, component, shortest_pattern

SHOWN_IF_SET = (
    "rope_theta",
    "sliding_window",
    "attention_scale",
    "attention_softcap",
    "logit_softcap",
    "embedding_norm",
    "embedding_scale",
    "zero_init",
)
ASSUMED_MFU = 0.3  # for the time announced before anything has been measured


def start_report(
    model: ModelConfig,
    flops: FlopsPerToken,
    *,
    config,
    dataset,
    sequences: int,
    length: int,
    sequences_per_epoch: float,
    progress,
    hardware: str,
    peak,
    log: str,
    notes: list[str],
) -> str:
    """The print-out at the start of a run: model, every component, N, cost, data, batch, hardware, expected time."""
    tokens, left = sequences * model.block_size, max(0, length - progress.step)
    padding = count_padding(model)
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
            + "".join(f", {key} {getattr(model, key)}" for key in SHOWN_IF_SET if getattr(model, key)),
        ),
        ("parameters", f"N = {count_parameters(model):,}" + (f", of which {padding:,} pad the vocabulary" if padding else "")),
        ("cost", f"{flops.full / 1e9:.4g} GFLOP a token, forward and backward, full attention ({flops.causal / 1e9:.4g} causal)"),
        (
            "data",
            f"{config.dataset}: {len(dataset.split('train')):,} training and {len(dataset.split('val')):,} "
            f"validation tokens, vocabulary {dataset.vocab_size or 'unknown'}",
        ),
        (
            "batch",
            f"{sequences} sequences × {model.block_size} tokens = {tokens:,} tokens per iteration, in "
            f"micro-batches of {min(config.batch_size, sequences)}",
        ),
        (
            "length",
            f"{length:,} iterations = {progress.tokens + left * tokens:,} tokens = "
            f"{(progress.sequences + left * sequences) / sequences_per_epoch:.2f} epochs"
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
    rows += [("note", note) for note in notes] + [("log", log)]
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
) -> str:
    """One line of the log for people; times in ms, memory in GB, the rest of the run in words."""
    laps = ", ".join(f"{name} {ms:.1f}" for name, ms in step_ms.items() if name != "total")
    utilisation = f" | mfu {mfu:.1%}" if mfu is not None else ""
    again = f" | skipped {skipped}" if skipped else ""
    left = duration((length - step) * step_ms["total"] / 1e3)
    return (
        f"step {step}/{length} | loss {loss:.4f} | lr {lr:.2e} | grad norm {grad_norm:.3f} | "
        f"{tokens_per_s:,.0f} tok/s | {step_ms['total']:.1f} ms ({laps}){utilisation} | {memory_gb:.1f} GB{again} | "
        f"{left} left"
    )


def evaluation_line(step: int, loss: float, perplexity: float, bits_per_byte: float | None, seconds: float, best: bool) -> str:
    """One line about an evaluation."""
    bits = f" | {bits_per_byte:.4f} bits per byte" if bits_per_byte is not None else ""
    return f"eval at {step} | val loss {loss:.4f} | perplexity {perplexity:.2f}{bits} | {seconds:.1f} s" + (
        " | best so far" if best else ""
    )


class Display:
    """Lines on stdout; on a terminal also a tqdm bar, in a pipe none. Ranks other than 0 are silent.

    If stdout goes away (`| head`, a full disk) it falls silent too: the log is the truth, and training goes on.
    """

    def __init__(self, enabled: bool = True):
        self.enabled, self.bar = enabled, None

    def start_bar(self, first: int, total: int) -> None:
        """Show a bar of the run's steps, if a person is watching."""
        if self.enabled and sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=first, unit="step", dynamic_ncols=True, leave=False)

    def advance(self) -> None:
        """One step further."""
        if self.bar is not None:
            self.bar.update()

    def line(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if not self.enabled or sys.stdout is None:
            return
        try:
            if self.bar is not None:
                self.bar.write(text)
                sys.stdout.flush()
            else:
                print(text, flush=True)
        except OSError:
            self.enabled = False
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that nothing fails when the process ends either

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
