"""Named entries that a configuration key chooses from: objectives, optimizers, strategies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from model_config import did_you_mean
from model_parts.registry import Key, release, reserve

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """name → entry, in the order of registration. `key` is the configuration key that chooses one of them.

    Each entry is registered in one place, next to its code; configuration, `--help` and messages read the names here. An
    entry may declare configuration keys of its own, which are keys of the run where it is chosen and refused elsewhere.
    """

    def __init__(self, key: str):
        self.key = key
        self._entries: dict[str, T] = {}
        self._keys: dict[str, tuple[Key, ...]] = {}

    def register(self, name: str, entry: T, keys: tuple[Key, ...] = ()) -> T:
        """Enter `entry` under `name`. Raises ValueError if the name or one of the keys is taken."""
        if name in self._entries:
            raise ValueError(f"{self.key} {name!r} is already registered; choose another name.")
        for key in keys:
            if self.declared().get(key.name, key) != key:
                raise ValueError(f"{self.key} {name!r} declares the key {key.name!r}, which another one declares otherwise.")
        reserve(f"an entry of {self.key}", [key.name for key in keys])
        self._entries[name], self._keys[name] = entry, tuple(keys)
        return entry

    def registered(self, name: str, keys: tuple[Key, ...] = ()) -> Callable[[T], T]:
        """A decorator that enters a class or function under `name`. `keys`: configuration keys of its own."""
        return lambda entry: self.register(name, entry, keys)

    def unregister(self, name: str) -> None:
        """Take an entry out again (for tests and notebooks)."""
        own = self._keys.pop(name)
        del self._entries[name]
        release(key.name for key in own if key.name not in self.declared())

    def keys_of(self, name: str) -> dict[str, Key]:
        """The keys that the entry of this name declares; none where there is no such entry."""
        return {key.name: key for key in self._keys.get(name, ())}

    def declared(self) -> dict[str, Key]:
        """The keys that all entries declare, by name."""
        return {key.name: key for keys in self._keys.values() for key in keys}

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
