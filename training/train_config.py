"""`TrainConfig`: every configuration key of a training run, with its type, default and meaning.

The keys that define the model are those of `ModelConfig`, each made optional here (None: the preset decides). Components,
objectives, optimizers and strategies may declare keys of their own; `KEYS` lists whatever there is at the moment.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from model_config import FIELDS as MODEL_FIELDS
from model_config import PRESETS, ModelConfig, architecture_keys, is_off_at_zero, model_keys, resolve
from model_parts.registry import Key, reserve
from training.registry import OBJECTIVES, OPTIMIZERS, STRATEGIES, Registry

_ModelKeys = dataclasses.make_dataclass(
    "_ModelKeys",
    [
        (
            key.name,
            (str if key.name == "layer_pattern" else key.type) | None,
            dataclasses.field(default=None, metadata={"help": key.help, "group": key.group}),
        )
        for key in MODEL_FIELDS.values()
    ],
    kw_only=True,
    frozen=True,
)


def _key(
    default: Any,
    help: str,
    group: str,
    *,
    resume: Literal["may change", "fixed"] = "may change",
    registry: Registry | None = None,
    besides: tuple[str, ...] = (),
) -> Any:
    """A field. `registry`: its entries' names are the values there are, and those in `besides`."""
    metadata = {"help": help, "group": group, "resume": resume, "registry": registry, "besides": besides}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(_ModelKeys):
    """One run, completely: a value for every key. Made by `configurator.py`; immutable.

    `resume="fixed"` marks the keys that a resumed run takes from its checkpoint: those that define the model, the
    order of the data and the optimizer. A key that a component or another registered entry declares is read like any other
    (`config.rope_theta`); it is None, or the entry's default, where the user has not set it.
    """

    own: tuple[tuple[str, Any], ...] = ()  # declared keys that the user has set, by name

    arch_preset: str = _key("gpt2", "the preset that the architecture keys override", "architecture", resume="fixed")

    out_dir: str = _key("out", "where checkpoints and logs go", "run")
    init_from: str = _key(
        "scratch",
        "where a new run gets its first weights: scratch | weights:CHECKPOINT_OR_OUT_DIR | hf:NAME_OR_FOLDER; resume and auto "
        "are spellings of --resume=yes and --resume=auto",
        "run",
    )
    resume: Literal["no", "auto", "yes"] = _key(
        "no",
        "whether to go on with the last checkpoint in out_dir; yes (a bare --resume): there must be one; auto: if there is one. "
        "A restart by torchrun or SLURM goes on with what the same launch has saved, whatever is said here",
        "run",
    )
    rescue_dir: str | None = _key(None, "where the last state is saved if out_dir can no longer be written", "run")
    eval_only: bool = _key(False, "evaluate once and stop; writes no checkpoint", "run")
    notice: str = _key("", "one line to print at the start", "run")
    seed: int = _key(1337, "random seed of the initial weights and of dropout", "run", resume="fixed")

    dataset: str = _key(
        "pydocs",
        "a folder below data/, or a path to one (a resumed run: with the same content); or several, each with its share of the "
        "sequences: a:0.7,b:0.3",
        "data",
    )
    mixture_schedule: str | None = _key(
        None,
        "later shares of a mixture, by tokens of training: '50e6 a:0.2,b:0.8; 80e6 b:1'; validation keeps the first ones",
        "data",
        resume="fixed",
    )
    max_train_tokens: int | None = _key(
        None, "train on the first so many tokens of the dataset only (of each part of a mixture)", "data", resume="fixed"
    )
    pack: Literal["stream", "document"] = _key(
        "stream",
        "stream: windows of the token stream, as nanoGPT; document: attention stays inside of a document, whose positions begin "
        "at 0, in training and validation",
        "data",
        resume="fixed",
    )
    data_seed: int = _key(1337, "random seed of the order in which the data is read", "data", resume="fixed")
    batch_size: int = _key(12, "sequences in a micro-batch, at most", "data")
    micro_batch: Literal["auto"] | int | None = _key(
        None,
        "sequences in a micro-batch where it is not batch_size, the global batch staying what it is; auto (also "
        "--batch_size=auto): the largest that fits into memory; a resumed run keeps what was chosen",
        "execution",
    )
    gradient_accumulation_steps: int = _key(
        1, "micro-batches a step: the global batch is batch_size × this many sequences on any machine", "data"
    )
    total_batch_tokens: int | None = _key(
        None, "size of the global batch in tokens, instead of batch_size × gradient_accumulation_steps", "data"
    )

    objective: str = _key("next_token", "what is minimised", "optimizer", resume="fixed", registry=OBJECTIVES)
    optimizer: str = _key(
        "adamw", "muon: for the 2-D weights of blocks, AdamW for the rest", "optimizer", resume="fixed", registry=OPTIMIZERS
    )
    learning_rate: float = _key(6e-4, "peak learning rate", "optimizer", resume="fixed")
    weight_decay: float = _key(0.1, "decoupled weight decay, on matrices only", "optimizer", resume="fixed")
    beta1: float = _key(0.9, "AdamW's decay of the first moment", "optimizer", resume="fixed")
    beta2: float = _key(0.95, "AdamW's decay of the second moment", "optimizer", resume="fixed")
    adam_eps: float = _key(1e-8, "AdamW's epsilon", "optimizer", resume="fixed")
    muon_momentum: float = _key(0.95, "Muon's (Nesterov) momentum", "optimizer", resume="fixed")
    grad_clip: float = _key(1.0, "largest norm of the gradient; 0: no clipping", "optimizer", resume="fixed")

    lr_schedule: Literal["cosine", "linear", "wsd", "constant", "inverse_sqrt"] = _key(
        "cosine",
        "learning rate after the warm-up; wsd: constant, then linear down over the last lr_decay_fraction",
        "schedule",
        resume="fixed",
    )
    warmup_iters: int = _key(0, "iterations over which the learning rate rises linearly to its peak", "schedule", resume="fixed")
    min_lr: float | None = _key(None, "learning rate at the end of the schedule [learning_rate / 10]", "schedule", resume="fixed")
    min_lr_ratio: float | None = _key(None, "min_lr as a share of learning_rate, instead of min_lr", "schedule", resume="fixed")
    lr_decay_iters: int | None = _key(None, "iteration at which the learning rate reaches min_lr [the run's length]", "schedule")
    lr_decay_fraction: float = _key(0.2, "share of lr_decay_iters over which lr_schedule=wsd decays", "schedule", resume="fixed")
    max_iters: int | None = _key(None, "length of the run in iterations", "schedule")
    max_tokens: int | None = _key(None, "length of the run in tokens, instead of max_iters", "schedule")
    epochs: float | None = _key(None, "length of the run in passes over the training data, instead of max_iters", "schedule")

    eval_interval: int = _key(250, "iterations between evaluations, and one at the end; 0: only at the end", "watching")
    eval_iters: int = _key(20, "size of the fixed validation set in global batches; 0: all of it", "watching")
    patience: int = _key(0, "stop after so many evaluations without a better loss; 0: never", "watching")
    log_interval: int = _key(10, "iterations between lines of the log", "watching")
    save_interval: int | None = _key(
        None,
        "iterations between checkpoints, and one at the end; 0: only at the end; -1: none at all [eval_interval]. In between, "
        "a new best is saved when a tenth of these iterations and a quarter of those done have passed since the last save: "
        "10 times in all at most",
        "watching",
    )
    keep_last: int = _key(2, "checkpoints to keep, besides the best", "watching")
    snapshot_epochs: float | None = _key(
        None, "passes over the training data between snapshots: checkpoints that stay, whatever keep_last says", "watching"
    )
    sample_interval: int = _key(0, "iterations between samples of text, on the terminal and in the log; 0: none", "watching")
    sample_prompt: str = _key("", "what samples continue [the end of a document]", "watching")
    sample_tokens: int = _key(64, "tokens of a sample", "watching")
    stats_interval: int = _key(
        0, "iterations between norms of each block's output and gradient and the largest logit, in the log; 0: none", "watching"
    )
    nonfinite_limit: int = _key(20, "skipped updates in a row (non-finite gradients) that stop the run", "watching")

    tensorboard: bool = _key(False, "also write event files to out_dir/tensorboard", "watching")
    wandb_log: bool = _key(False, "also log to Weights & Biases", "watching")
    wandb_project: str = _key("kitbash", "project at Weights & Biases", "watching")
    wandb_run_name: str | None = _key(None, "name of the run at Weights & Biases [the run log's]", "watching")
    wandb_mode: Literal["online", "offline"] | None = _key(
        None, "Weights & Biases offline: kept in out_dir/wandb until 'wandb sync' [wandb's own setting, WANDB_MODE]", "watching"
    )
    profile: bool = _key(False, "write a PyTorch trace of a few steps to out_dir and print the top of it", "watching")
    price_per_gpu_hour: float | None = _key(
        None, "for the estimated cost in the summary: a process's price an hour, in any currency", "watching"
    )

    device: str = _key("auto", "auto | cpu | cuda | cuda:N", "execution")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _key(
        "auto", "compute dtype; auto: bfloat16 where the hardware has it", "execution"
    )
    compile: Literal["auto"] | bool = _key("auto", "torch.compile each block; auto: on a GPU", "execution")
    activation_checkpointing: Literal["none", "full", "selective"] = _key(
        "none", "recompute activations in backward: whole blocks, or all but their matrix products", "execution"
    )
    parallelism: str = _key(
        "auto",
        "how processes share the work; none: one process; auto: the first in this order that fits into memory, hsdp left out; "
        "--use_zero1=True and --use_fsdp=True mean zero1 and fsdp",
        "execution",
        registry=STRATEGIES,
        besides=("auto", "none"),
    )
    hsdp_shard_size: int | None = _key(
        None, "processes that share one copy of the model under parallelism=hsdp [those of a node; half on one node]", "execution"
    )
    async_checkpoint: bool = _key(False, "write checkpoints in the background; training waits only for the copy", "execution")
    collective_timeout: int = _key(
        600, "seconds without progress after which several processes give up and say who hangs", "execution"
    )
    peak_tflops: float | None = _key(
        None,
        "dense peak of one device in the compute dtype, in TFLOP/s, which mfu is measured against, for what is not in the table "
        "of flops_parameter_counting/hardware.py [the table's; a CPU's is measured]",
        "execution",
    )
    threads: int | None = _key(None, "CPU threads [PyTorch's choice; a resumed run: as before]", "execution")

    def __getattr__(self, name: str) -> Any:  # only for what is no field
        own = dict(self.__dict__.get("own", ()))
        if name in own:
            return own[name]
        if name.startswith("_") or name not in KEYS:
            raise AttributeError(f"TrainConfig has no key {name!r}.")
        return next((keys[name].default for keys in self._entries_keys().values() if name in keys), None)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The config with these values, of fields or of declared keys."""
        return cls().with_values(values)

    def with_values(self, values: Mapping[str, Any]) -> TrainConfig:
        """This config with other values of some keys, of fields or of declared ones."""
        own = {**dict(self.own), **{key: value for key, value in values.items() if key not in FIELDS}}
        set_by_user = tuple(sorted((key, value) for key, value in own.items() if value is not None))
        fields = {key: value for key, value in values.items() if key in FIELDS}
        return dataclasses.replace(self, **fields, own=set_by_user)

    def _entries_keys(self) -> dict[str, dict[str, Key]]:
        """The keys that the chosen objective, optimizer and strategy declare, by the key that chooses it."""
        return {registry.key: registry.keys_of(getattr(self, registry.key)) for registry in REGISTRIES}

    def model_config(self, dataset_vocab_size: int | None = None) -> ModelConfig:
        """The model of this run. `vocab_size`: as configured, else the dataset's, else the preset's."""
        import model_components  # noqa: F401  registers what a model can be made of

        keys = {key: getattr(self, key) for key in model_keys()}
        if keys["vocab_size"] is None:
            keys["vocab_size"] = dataset_vocab_size
        return resolve(self.arch_preset, **keys)

    def sequences_per_iteration(self, block_size: int) -> int:
        """Sequences of block_size tokens in the global batch."""
        if self.total_batch_tokens is not None:
            return self.total_batch_tokens // block_size
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def micro_batch_size(self) -> int:
        """Sequences in a micro-batch, at most; batch_size as long as micro_batch=auto is not settled."""
        return self.micro_batch if isinstance(self.micro_batch, int) else self.batch_size

    def problems(self, with_model: bool = True) -> list[str]:
        """Every reason why this run cannot start, one sentence each.

        Without those that a checkpoint may still settle, where it is told so: the model's, and keys without effect.
        """
        problems = [
            f"{key}={getattr(self, key)} must be at least {least} and finite."
            for key, least in _AT_LEAST.items()
            if getattr(self, key) is not None and not least <= getattr(self, key) < math.inf
        ]
        problems += [
            f"{key}={getattr(self, key)} must be below {most:,}."
            for key, most in _BELOW.items()
            if getattr(self, key) is not None and most <= getattr(self, key) < math.inf
        ]
        if isinstance(self.micro_batch, int) and not 1 <= self.micro_batch < 2**31:
            problems.append(f"micro_batch={self.micro_batch} must be at least 1 and below {2**31:,}, or auto.")
        if not self.out_dir:
            problems.append("out_dir='' is empty; name a folder.")
        for key in ("learning_rate", "adam_eps"):
            if not 0 < getattr(self, key) < math.inf:
                problems.append(f"{key}={getattr(self, key)} must be positive and finite.")
        for key in ("beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, key) < 1:
                problems.append(f"{key}={getattr(self, key)} must be in [0, 1).")
        if not 0 < self.lr_decay_fraction <= 1:
            problems.append(f"lr_decay_fraction={self.lr_decay_fraction} must be in (0, 1].")
        if self.min_lr_ratio is not None and not 0 <= self.min_lr_ratio <= 1:
            problems.append(f"min_lr_ratio={self.min_lr_ratio} must be in [0, 1]: it is a share of learning_rate.")
        if self.min_lr is not None and self.min_lr > self.learning_rate:
            problems.append(
                f"min_lr={self.min_lr} is above learning_rate={self.learning_rate}; lower it (the usual choice is a tenth)."
            )
        if self.snapshot_epochs is not None and not 0 < self.snapshot_epochs < math.inf:
            problems.append(f"snapshot_epochs={self.snapshot_epochs} must be above 0 and finite; leave it out for no snapshots.")
        elif self.snapshot_epochs is not None and (self.save_interval or 0) < 0:
            problems.append(
                f"snapshot_epochs={self.snapshot_epochs} needs checkpoints; save_interval={self.save_interval} is none at all."
            )
        if self.init_from != "scratch" and not self.init_from.startswith(("weights:", "hf:")):
            problems.append(
                f"init_from={self.init_from!r} is neither 'scratch' nor 'weights:…' nor 'hf:…'. To start a new run with the "
                f"weights that are there: --init_from=weights:{self.init_from}. To go on with the run that made them: --resume, "
                "with its --out_dir."
            )
        if self.init_from in ("weights:", "hf:"):
            problems.append(
                f"init_from={self.init_from!r} names nothing after the colon; give a path, such as {self.init_from}out/x."
            )
        device = self.device.split(":")[0]
        if device not in ("auto", "cpu", "cuda"):
            problems.append(f"device={self.device!r} is not one of auto, cpu, cuda, cuda:N.")
        if not with_model:
            return problems
        for registry in REGISTRIES:
            for key in registry.declared().keys() & dict(self.own).keys() - self._entries_keys()[registry.key].keys():
                readers = [f"{registry.key}={name!r}" for name in registry if key in registry.keys_of(name)]
                problems.append(f"{key}={getattr(self, key)!r} has no effect on this run: only {' or '.join(readers)} reads it.")
        try:
            block_size = self.model_config().block_size
            if self.total_batch_tokens is not None and self.total_batch_tokens % block_size:
                whole = max(1, round(self.total_batch_tokens / block_size)) * block_size
                problems.append(
                    f"total_batch_tokens={self.total_batch_tokens} is not a multiple of block_size={block_size}. Use {whole}."
                )
        except ValueError as error:
            problems += str(error).split("\n")
        return problems


_AT_LEAST = dict(
    batch_size=1,
    gradient_accumulation_steps=1,
    total_batch_tokens=1,
    weight_decay=0,
    grad_clip=0,
    warmup_iters=0,
    lr_decay_iters=1,
    max_iters=0,
    max_tokens=1,
    max_train_tokens=1,
    epochs=0,
    eval_interval=0,
    eval_iters=0,
    patience=0,
    log_interval=1,
    save_interval=-1,
    keep_last=1,
    nonfinite_limit=1,
    sample_interval=0,
    sample_tokens=1,
    stats_interval=0,
    threads=1,
    min_lr=0,
    seed=0,
    data_seed=0,
    hsdp_shard_size=2,
    collective_timeout=1,
    price_per_gpu_hour=0,
    peak_tflops=1e-6,
)

# Beyond these no run is meant, and counting would overflow, or take until tomorrow, before anything is said.
_COUNTS = ("total_batch_tokens", "max_iters", "max_tokens", "max_train_tokens", "warmup_iters", "lr_decay_iters")
_INTERVALS = ("eval_interval", "eval_iters", "patience", "log_interval", "save_interval", "keep_last", "nonfinite_limit")
_INTERVALS += ("sample_interval", "sample_tokens", "stats_interval")
_BELOW = dict(
    seed=2**63,
    data_seed=2**63,
    threads=1025,
    batch_size=2**31,
    gradient_accumulation_steps=2**31,
    hsdp_shard_size=2**20,
    collective_timeout=10**7,
    epochs=10**9,
    learning_rate=1e40,
    weight_decay=1e40,
    grad_clip=1e40,
    adam_eps=1e40,
    price_per_gpu_hour=10**12,
    peak_tflops=10**9,
    **dict.fromkeys((*_COUNTS, *_INTERVALS), 10**15),
)

FIELDS = {f.name: f for f in dataclasses.fields(TrainConfig) if f.name != "own"}  # the keys that are always there
FIELDS = {"arch_preset": FIELDS["arch_preset"], **FIELDS}
_TYPES = typing.get_type_hints(TrainConfig)
REGISTRIES = (OBJECTIVES, OPTIMIZERS, STRATEGIES)
reserve("TrainConfig", [name for name in FIELDS if name not in MODEL_FIELDS])


class Keys(Mapping[str, dataclasses.Field]):
    """Every key there is at the moment, by name, in the order of --help: fields, and behind each what its values declare."""

    def __getitem__(self, name: str) -> dataclasses.Field:
        return FIELDS[name] if name in FIELDS else self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    @staticmethod
    def _all() -> dict[str, dataclasses.Field]:
        import model_components  # noqa: F401  registers what a model can be made of

        found = {"arch_preset": FIELDS["arch_preset"]}
        for key in model_keys().values():
            declared = dataclasses.field(default=None, metadata={"help": key.help, "group": key.group, "type": key.type})
            found[key.name] = FIELDS.get(key.name, declared)
        for name, field in FIELDS.items():
            found[name] = field
            for key in (field.metadata.get("registry") or Registry(name)).declared().values():
                inherited = {what: field.metadata[what] for what in ("group", "resume")}
                metadata = {"help": key.help_with_default, "type": key.type, **inherited}
                found[key.name] = dataclasses.field(default=None, metadata=metadata)
        return found


KEYS = Keys()


def type_of(key: str) -> Any:
    """The type of a key's values; where a registry has them, the names in it at this moment."""
    metadata = KEYS[key].metadata
    if metadata.get("registry") is not None:
        return Literal[(*metadata["besides"], *metadata["registry"])]
    return metadata["type"] if "type" in metadata else _TYPES[key]


GROUPS = ("run", "architecture", "data", "optimizer", "schedule", "watching", "execution")

# Of each pair or triple at most one may be set at a time; a stronger source clears what a weaker one set.
EXCLUSIVE = (
    ("max_iters", "max_tokens", "epochs"),
    ("gradient_accumulation_steps", "total_batch_tokens"),
    ("min_lr", "min_lr_ratio"),
    ("d_ff", "ffn_expansion_ratio"),
)

FROM_CHECKPOINT = "checkpoint: "  # before the origin that a value had in the run that goes on
OF_THE_MACHINE = (
    "device",
    "parallelism",
    "hsdp_shard_size",
    "collective_timeout",
    "peak_tflops",
)  # never taken from a checkpoint
OF_THE_START = ("out_dir", "init_from", "resume")  # where this start of the run begins and writes


def keys_of_the_model() -> tuple[str, ...]:
    """The keys that decide what the model is."""
    return ("arch_preset", *architecture_keys(), "block_size")


def fixed_on_resume() -> tuple[str, ...]:
    """What a resumed run takes from its checkpoint; a different value on the command line is refused."""
    return (*keys_of_the_model(), *(name for name, key in KEYS.items() if key.metadata.get("resume") == "fixed"))


@dataclass(frozen=True)
class Configuration:
    """A resolved configuration: the values, and where each came from ('command line', 'config/x.py:12', 'default')."""

    train: TrainConfig
    origins: dict[str, str]

    def given(self, key: str) -> bool:
        """Whether the user set this key, in a file or on the command line."""
        return self.origins[key] != "default"

    def resolved(self, model: ModelConfig) -> tuple[dict[str, Any], dict[str, str]]:
        """Values and origins of all keys, the model's filled in: what --print_config prints and a run saves."""
        values = {key: getattr(self.train, key) for key in KEYS}
        origins = dict(self.origins)
        for key, value in model.to_dict().items():
            if values[key] is None and value is not None:
                preset_value = PRESETS[self.train.arch_preset][1].get(key)
                origins[key] = (
                    f"preset {self.train.arch_preset}"
                    if value == preset_value
                    else "dataset"
                    if key == "vocab_size"
                    else "derived"
                )
                values[key] = value
            elif value is None:  # not read by this model, said by d_ff, or off (where None would bring the preset's back)
                off = is_off_at_zero(key) and PRESETS[self.train.arch_preset][1].get(key) is not None
                values[key] = 0 if off else None
        if self.train.total_batch_tokens is not None:
            values["gradient_accumulation_steps"] = None  # it follows from total_batch_tokens
        return values, origins
