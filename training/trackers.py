"""Where people look besides the log: TensorBoard and Weights & Biases, fed with the log's own events.

A tracker takes each event of the run log as it is written: `add(event)`, then `close()`. Numbers of a step appear as
train/<key>, those of an evaluation as val/<key>, over the step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from command_line import Failure

PREFIX = {"step": "train", "eval": "val", "stats": "stats"}  # the events whose numbers are curves


class TrackerError(Failure):
    """A tracker was asked for and cannot start; the message says why and what to do."""


def numbers(event: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """('train/step_ms/total', 12.3) … of a step or evaluation; nothing of other events."""
    where = prefix or PREFIX.get(event.get("event", ""))
    for key, value in event.items() if where else ():
        if isinstance(value, dict):
            yield from numbers(value, f"{where}/{key}")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and key != "step":
            yield f"{where}/{key}", value


class TensorBoard:
    """Event files in out_dir/tensorboard/<run>, for `tensorboard --logdir out_dir`. A resumed run's is another run."""

    def __init__(self, out_dir: str | Path, run: str):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TrackerError(
                "tensorboard=True needs the package tensorboard, which is not installed here. Install it with "
                "pip install tensorboard, or leave the key out."
            ) from error
        self.writer = SummaryWriter(str(Path(out_dir) / "tensorboard" / run))

    def add(self, event: dict[str, Any]) -> None:
        """Draw the event's numbers; keep the configuration as text."""
        if event["event"] == "run_start":
            self.writer.add_text("run", f"```\n{json.dumps(event, indent=1)}\n```")
        elif event["event"] == "sample":
            self.writer.add_text("sample", event["text"], global_step=event["step"])
        for name, value in numbers(event):
            self.writer.add_scalar(name, value, global_step=event["step"])
        self.writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()


class WeightsAndBiases:
    """A run on wandb.ai, or with mode='offline' in out_dir/wandb, from where `wandb sync` sends it later."""

    def __init__(self, out_dir: str | Path, run: str, *, project: str, name: str | None = None, mode: str | None = None):
        try:
            import wandb
        except ImportError as error:
            raise TrackerError(
                "wandb_log=True needs the package wandb, which is not installed here. Install it with "
                "pip install wandb, or leave the key out."
            ) from error
        try:
            self.run = wandb.init(
                project=project,
                name=name or run,
                mode=mode,
                dir=str(out_dir),
                settings=wandb.Settings(console="off", silent=True),
            )
        except Exception as error:  # not logged in, no network: whatever it is, training has not begun
            raise TrackerError(
                f"Weights & Biases cannot start: {str(error).strip().splitlines()[0]} Log in with 'wandb login', "
                "or use --wandb_mode=offline."
            ) from error
        self.run.define_metric("*", step_metric="step")  # a resumed run may log a step again

    def add(self, event: dict[str, Any]) -> None:
        """Log the event's numbers; keep the configuration and the summary."""
        if event["event"] == "run_start":
            self.run.config.update({key: event.get(key) for key in ("config", "model", "dataset", "hardware", "versions")})
        elif event["event"] == "run_end":
            self.run.summary.update({key: value for key, value in event.items() if key not in ("event", "time")})
        elif found := dict(numbers(event)):
            self.run.log({"step": event["step"], **found})

    def close(self) -> None:
        """Send or write what is left."""
        self.run.finish()


def open_trackers(config, run: str) -> list[TensorBoard | WeightsAndBiases]:
    """The trackers that the configuration asks for. Raises TrackerError."""
    trackers: list[TensorBoard | WeightsAndBiases] = []
    if config.tensorboard:
        trackers.append(TensorBoard(config.out_dir, run))
    if config.wandb_log:
        trackers.append(
            WeightsAndBiases(
                config.out_dir, run, project=config.wandb_project, name=config.wandb_run_name, mode=config.wandb_mode
            )
        )
    return trackers
