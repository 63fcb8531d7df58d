"""Named entries that a configuration key chooses from: objectives, optimizers, strategies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from model_config import did_you_mean

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """name → entry, in the order of registration. `key` is the configuration key that chooses one of them.

    Each entry is registered in one place, next to its code; configuration, `--help` and messages read the names here.
    """

    def __init__(self, key: str):
        self.key = key
        self._entries: dict[str, T] = {}

    def register(self, name: str, entry: T) -> T:
        """Enter `entry` under `name`. Raises ValueError if the name is taken."""
        if name in self._entries:
            raise ValueError(f"{self.key} {name!r} is already registered; choose another name.")
        self._entries[name] = entry
        return entry

    def registered(self, name: str) -> Callable[[T], T]:
        """A decorator that enters a class or function under `name`."""
        return lambda entry: self.register(name, entry)

    def unregister(self, name: str) -> None:
        """Take an entry out again (for tests and notebooks)."""
        del self._entries[name]

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise ValueError(
                f"{self.key}={name!r} is not registered{did_you_mean(name, self._entries)}. There is: {', '.join(self._entries)}."
            )
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


# Filled by training/objectives.py, training/optimizers.py and training/parallelism.py, which configurator.py imports.
OBJECTIVES: Registry[Any] = Registry("objective")
OPTIMIZERS: Registry[Any] = Registry("optimizer")
STRATEGIES: Registry[Any] = Registry("parallelism")
