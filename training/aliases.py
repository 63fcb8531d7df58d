"""Other names of configuration keys and of their values: those that users of other training scripts have in their fingers.

One table. A row says which key is meant; it is that key which is checked, printed, saved and compared on resume. The same thing
may be said twice in one place; two that differ are a mistake there. `--help` lists the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from command_line import PROJECT
from model_config import NO, as_type, type_in_words
from training.train_config import type_of


@dataclass(frozen=True)
class Alias:
    """What another name stands for; made by `rename`, `flag`, `choice` and `answer`."""

    key: str | None = None  # the key that is meant; None: there is none, and `sentence` says what to do
    values: Mapping[Any, Any] = field(default_factory=dict)  # of the alias → of the key; empty: the key's own values
    unit: str | None = None  # a key: the value counts in its value
    sentence: str = ""

    @property
    def is_flag(self) -> bool:
        """Whether it is True or False, and may stand alone on a command line."""
        return bool in map(type, self.values)

    def meaning(self, value: Any) -> Any:
        """The key's value for this value of the alias, `TakenBack`, or NO where it has none."""
        if self.is_flag:
            said = as_type(bool, value)
            return NO if said is NO else self.values[said] if said in self.values else TakenBack(self.values[not said])
        if self.unit is not None:
            number = as_type(int, value)
            return NO if number is NO else InUnits(number, self.unit)
        if self.values:
            return self.values.get(value, NO) if isinstance(value, str) else NO
        return value if typed(self.key, value) is not NO else NO

    def takes(self) -> str:
        """The values there are, in words."""
        if self.is_flag:
            return type_in_words(bool)
        if self.values:
            return "one of " + ", ".join(map(repr, self.values))
        return type_in_words(int if self.unit is not None else type_of(self.key))

    def in_words(self) -> str:
        """What it means, for the help."""
        if self.key is None:
            return self.sentence
        if self.unit is not None:
            return f"{self.key}, in units of {self.unit}"
        return "; ".join(f"{said}: {self.key}={value}" for said, value in self.values.items()) or self.key


@dataclass(frozen=True)
class TakenBack:
    """The 'off' of a flag that only says something when it is on: takes back this value where a weaker source set it."""

    value: Any


@dataclass(frozen=True)
class InUnits:
    """A number that counts in the value of another key, which is only known when all sources have been read."""

    number: int
    unit: str


def rename(key: str, unit: str | None = None) -> Alias:
    """Another name of a key; `unit`: counts in the value of that key."""
    return Alias(key, unit=unit)


def flag(key: str, **values: Any) -> Alias:
    """A flag: `on=` and `off=` are what True and False say of the key. One that is left out takes back what the other said."""
    return Alias(key, {word == "on": value for word, value in values.items()})


def choice(key: str, values: Mapping[str, Any]) -> Alias:
    """Another name of a key, with names of its own for the values."""
    return Alias(key, values)


def answer(sentence: str) -> Alias:
    """A key of others that has no equivalent: whoever gives it is told this sentence."""
    return Alias(sentence=sentence)


_GPT2 = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # nanoGPT's names of OpenAI's weights
_PRESETS = {"tiny": "lm_tiny", "small": "lm_small", "medium": "lm_medium"}

ALIASES: dict[str, Alias] = {
    "use_zero1": flag("parallelism", on="zero1"),
    "use_fsdp": flag("parallelism", on="fsdp"),
    # the training guide of the language-model presets (docs/TRAINING_GUIDE.md)
    "model_preset": choice("arch_preset", _PRESETS),
    "preset": choice("arch_preset", _PRESETS),
    "d_model": rename("n_embd"),
    "num_heads": rename("n_head"),
    "num_layers": rename("n_layer"),
    "max_seq_len": rename("block_size"),
    "lr": rename("learning_rate"),
    "warmup_steps": rename("warmup_iters"),
    "warmup": rename("warmup_iters"),
    "num_epochs": rename("epochs"),
    "gradient_clip": rename("grad_clip"),
    "max_samples": rename("max_train_tokens", unit="block_size"),
    "fp16": flag("dtype", on="float16"),
    "bf16": flag("dtype", on="bfloat16"),
    "gradient_checkpointing": flag("activation_checkpointing", on="full", off="none"),
    # nanoGPT's train.py, where its keys are not ours by the same name
    "always_save_checkpoint": flag("keep_last", off=1),  # the best is kept besides, which is what False wants
    "decay_lr": flag("lr_schedule", on="cosine", off="constant"),
    "backend": answer("the backend follows from the device (nccl on GPUs, gloo on CPUs); leave it out."),
}

# Other names of single values: (key, value) → (the key that is meant, its value).
SPELLINGS: dict[tuple[str, str], tuple[str, str]] = {
    ("init_from", "resume"): ("resume", "yes"),  # nanoGPT's
    ("init_from", "auto"): ("resume", "auto"),
    ("batch_size", "auto"): ("micro_batch", "auto"),  # the global batch stays what it is without it
    **{("init_from", name): ("init_from", f"hf:openai-community/{name}") for name in _GPT2},
    ("dataset", "wikitext"): ("dataset", "wikitext2"),
    ("dataset", "wikitext-2"): ("dataset", "wikitext2"),
    ("dataset", "wikitext-103"): ("dataset", "wikitext103"),
}


def typed(key: str, value: Any) -> Any:
    """A value, or text, as the key's type, else NO; a bare --resume is 'yes'."""
    if key == "resume" and as_type(bool, value) is not NO:
        return "yes" if as_type(bool, value) else "no"
    return as_type(type_of(key), value)


def recipe_meant(given: Mapping[str, Any]) -> str | None:
    """The config file that --model_preset=small stands for on a command line that names no config file."""
    for name in ("model_preset", "preset"):
        if given.get(name) in _PRESETS:
            return f"config/{_PRESETS[given[name]]}.py"
    return None


def without_aliases(given: Mapping[str, Any], where: Callable[[str], str], problems: list[str]) -> dict[str, Any]:
    """The keys that one source gives, with real names and values. Adds to the problems what cannot be, after `where(name)`."""
    plain = {key: value for key, value in given.items() if key not in ALIASES}
    for name in [name for name in given if name in ALIASES]:
        alias, value = ALIASES[name], given[name]
        meant = NO if alias.key is None else alias.meaning(value)
        if alias.key is None:
            problems.append(f"{where(name)}{name}={value!r}: {alias.sentence}")
        elif meant is NO:
            said = f"{name}={value!r}" + ("" if alias.values else f", another name of {alias.key}=…,")
            problems.append(f"{where(name)}{said} is not {alias.takes()}.")
        elif isinstance(meant, TakenBack):
            plain.setdefault(alias.key, meant)
        else:
            _say(plain, alias.key, meant, f"{name}={_shown(value, alias)}", where(name), problems)
    for (key, spelled), (meant_key, value) in SPELLINGS.items():
        if plain.get(key) == spelled and not (key == "dataset" and _is_there(spelled)):
            del plain[key]
            _say(plain, meant_key, value, f"{key}={spelled!r}", where(key), problems)
    return plain


def _shown(value: Any, alias: Alias) -> Any:
    return as_type(bool, value) if alias.is_flag else repr(value)


def _say(plain: dict[str, Any], key: str, value: Any, said: str, where: str, problems: list[str]) -> None:
    """Set a key, unless the same source says something else of it, which is a problem."""
    there = plain.get(key, value)
    if isinstance(there, TakenBack):
        there = value
    if there != value and (isinstance(value, InUnits) or typed(key, there) != typed(key, value)):
        now = f"{there.number} × {there.unit}" if isinstance(there, InUnits) else repr(there)
        means = f"{key}={value.number} × {value.unit}" if isinstance(value, InUnits) else f"{key}={value!r}"
        problems.append(f"{where}{said} means {means}, but {key}={now} is given too; give one of them.")
    else:
        plain[key] = value


def _is_there(dataset: str) -> bool:
    """Whether a folder has this very name: then it is what is meant."""
    return (PROJECT / "data" / dataset).is_dir() or Path(dataset).expanduser().is_dir()


def help_lines() -> list[str]:
    """The table, a line a row."""
    spelled = [f"{key}={value}: {meant}={there}" for (key, value), (meant, there) in SPELLINGS.items()]
    return [f"--{name}: {alias.in_words()}" for name, alias in ALIASES.items()] + [f"--{line}" for line in spelled]
