"""One configuration of a study: what it changes in the baseline, what model that builds, what it will train on."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from configurator import configure
from model_config import ModelConfig
from training.aliases import ALIASES
from training.train_config import EXCLUSIVE, FIELDS, TrainConfig

if TYPE_CHECKING:
    from data.mixture import MixedDataset
    from data.token_dataset import TokenDataset

# Keys that may differ between a finished run and the plan, as they change nothing in what is compared.
_CHANGES_NOTHING = {"arch_preset"} | {
    name for name, key in FIELDS.items() if key.metadata["group"] in ("run", "watching", "execution")
} - {"seed", "dtype", "patience", "eval_iters", "eval_interval"}


@dataclass(frozen=True, eq=False)
class Variant:
    """One configuration of the study, without seeds.

    `name` says what it changes in the baseline (whose own name is the config's). `choice` is the value of every varied
    key; `given` what train.py gets on its command line; `values` every key of the resolved configuration.
    """

    name: str
    choice: dict[str, Any]
    given: dict[str, str | bool]
    train: TrainConfig
    values: dict[str, Any]
    model: ModelConfig
    dataset: TokenDataset | MixedDataset
    folder: str  # below the study's out_dir
    resized: str = ""  # what --match changed: 'd_ff 3072 → 2048'

    @property
    def parameters(self) -> int:
        """N."""
        return measure("parameters", self.model)

    @property
    def flops(self) -> int:
        """Training FLOPs a token, full attention."""
        return measure("flops", self.model)

    @property
    def tokens(self) -> int:
        """Tokens that a run trains on."""
        return self.length * self.train.sequences_per_iteration(self.model.block_size) * self.model.block_size

    @property
    def length(self) -> int:
        """Iterations of a run."""
        from training.data_loader import WindowOrder
        from training.schedules import run_length

        splits = [part.split("train") for part in self.dataset.parts]
        orders = [WindowOrder(len(split), self.model.block_size, self.train.data_seed) for split in splits]
        return run_length(self.train, self.model.block_size, sum(order.sequences_per_epoch for order in orders))

    @property
    def val_tokens(self) -> int:
        """Tokens that it is validated on, to the nearest window."""
        windows = self.train.eval_iters * self.train.sequences_per_iteration(self.model.block_size)
        available = len(self.dataset.split("val"))
        return min(windows * self.model.block_size or available, available)

    def experiment(self, varied: Iterable[str]) -> dict[str, Any]:
        """Every key that decides what comes out, and those that are varied; the data by its fingerprint."""
        keys = [key for key in self.values if key not in _CHANGES_NOTHING or (key in varied and key != "arch_preset")]
        return {**{key: self.values[key] for key in keys}, "dataset": self.dataset.fingerprint}


def make_variant(
    config_file: str | None,
    given: Mapping[str, str | bool],
    changed: Mapping[str, str] | None = None,
    choice: dict[str, Any] | None = None,
) -> Variant:
    """The configuration that a config file and a command line give, with some keys changed; named after their choice.

    Prepares its dataset if that prepares itself. Raises ValueError (ConfigError) with all that is wrong with it, or
    DatasetError.
    """
    changed = changed or {}
    given = overridden(given, changed)
    words = [f"--{key}={text}" for key, text in given.items()]
    configuration = configure([*([config_file] if config_file else []), *words])
    dataset = opened_dataset(configuration.train)
    model = configuration.train.model_config(dataset.vocab_size)
    values, _ = configuration.resolved(model)
    name = ", ".join(f"{key}={readable(choice[key])}" for key in changed) if choice else ""
    return Variant(name, choice or {}, given, configuration.train, values, model, dataset, folder_name(name))


def overridden(given: Mapping[str, str | bool], changed: Mapping[str, str]) -> dict[str, str | bool]:
    """The keys of a command line with some changed; what says the same in another way goes."""
    merged = dict(given)
    for key, text in changed.items():
        others = {other for group in EXCLUSIVE if key in group for other in group}
        others |= {name for name, alias in ALIASES.items() if alias.key == key}
        merged = {other: value for other, value in merged.items() if other not in others} | {key: text}
    return merged


_OPEN: dict[tuple, Any] = {}


def opened_dataset(train: TrainConfig) -> TokenDataset | MixedDataset:
    """The dataset of a configuration, prepared if it is one that prepares itself; checked once."""
    from data.mixture import dataset_names, open_dataset
    from data.preparation import ensure_prepared

    asked = (train.dataset, train.vocab_size, train.max_train_tokens, train.mixture_schedule)
    if asked not in _OPEN:
        for name in dataset_names(train.dataset):
            ensure_prepared(name)
        name, vocab_size, max_train_tokens, schedule = asked
        _OPEN[asked] = open_dataset(name, vocab_size=vocab_size, max_train_tokens=max_train_tokens, schedule=schedule)
    return _OPEN[asked]


def measure(what: str, model: ModelConfig) -> int:
    """A model's 'parameters' (N) or 'flops' (of training a token, full attention)."""
    from flops_parameter_counting.flops import flops_per_token
    from flops_parameter_counting.parameters import count_parameters

    return count_parameters(model) if what == "parameters" else flops_per_token(model).full


def readable(value: Any) -> str:
    """A value as a name shows it; numbers without an exponent."""
    return format(Decimal(repr(value)), "f") if isinstance(value, float) and math.isfinite(value) else str(value)


def folder_name(name: str) -> str:
    """A variant's name as that of a folder: without separators, and short."""
    plain = re.sub(r"[^\w.=,+*-]+", "_", name.replace(", ", ","))
    return plain if len(plain) <= 120 else f"{plain[:100]}_{hashlib.sha256(name.encode()).hexdigest()[:12]}"
