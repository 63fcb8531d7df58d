"""The tables of registered components, the configuration keys they declare, and what their parts cost.

The tables are filled by `model_components.py` and by whoever registers a component elsewhere. Nothing here knows any
component, so that `model_config.py` can check, name and count a model by asking the components that it is made of.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from command_line import text_table
from model_parts.values import NO, alternatives, as_type, is_key_type

Config = Any  # a ModelConfig, whose module stands above this one

# Each kind is also the configuration key that chooses a component of it; 'block' is chosen by layer_pattern.
COMPONENT_KINDS = (
    "normalization",
    "activation",
    "ffn_type",
    "position_encoding",
    "rope_scaling",
    "norm_position",
    "block",
    "attention_backend",
)
EXECUTION_KINDS = ("attention_backend",)  # how something is computed, not what: neither in the name nor in the fingerprint


# ------------------------------------------------------------------------------------------- keys


@dataclass(frozen=True)
class Key:
    """A configuration key that a component declares, and that only matters where such a component is chosen.

    It becomes a flag (`--n_experts=8`) and a name in config files and presets by itself. It is converted to `type` and
    checked like any other key, saved with a run, and refused where no chosen component reads it.

    `type`: int, float, str, bool, a Literal, or a union of those with None, as in the annotation of a field. `default`: the
    value where a component that reads the key is chosen and nobody says otherwise. A number whose default is None is a
    feature that is off; 0 switches off what a preset has switched on. `tag`: the word that stands for the key in the
    architecture's name, before a value that is not the default [the key's name in CamelCase].
    """

    name: str
    type: Any
    default: Any
    help: str
    tag: str | None = None

    def __post_init__(self):
        if not (self.name.isidentifier() and self.name == self.name.lower()) or self.name.startswith("_"):
            raise ValueError(f"the key {self.name!r} must be a lower-case Python name that does not begin with '_'.")
        if not is_key_type(self.type):
            raise ValueError(
                f"the key {self.name!r} has the type {self.type!r}; use int, float, str, bool, a Literal, or one of them | None."
            )
        if self.default is not None and as_type(self.type, self.default) is NO:
            raise ValueError(f"the key {self.name!r} has the default {self.default!r}, which is not of its type {self.type!r}.")
        if not re.fullmatch(r"[A-Za-z]([A-Za-z0-9]*[A-Za-z])?", self.word):
            raise ValueError(
                f"the key {self.name!r} has the tag {self.word!r}; a tag is made of letters and digits, a letter first and last."
            )

    @property
    def help_with_default(self) -> str:
        """The help, and in brackets the default, if there is one."""
        return self.help if self.default is None else f"{self.help} [{self.default!r}]".replace(".0]", "]").replace("'", "")

    @property
    def word(self) -> str:
        """What stands for the key in the architecture's name."""
        return self.tag or "".join(part.capitalize() for part in self.name.split("_"))

    @property
    def is_off_at_zero(self) -> bool:
        """Whether 0 means None."""
        return self.default is None and any(member in (int, float) for member in alternatives(self.type))

    def shown(self, value: Any) -> str:
        """What the architecture's name says of this value: nothing for the default."""
        if value == self.default and type(value) is type(self.default):
            return ""
        if isinstance(value, bool):
            return self.word if value else f"No{self.word}"
        return f"{self.word}_{value}" if isinstance(value, str) else f"{self.word}{value!r}".removesuffix(".0")


_TAKEN: dict[str, str] = {}  # name of a key, or word in the architecture's name → whose it is


def reserve(owner: str, keys: Iterable[str], words: Iterable[str] = ()) -> None:
    """Keep names of keys, and words of the architecture's name, for `owner`: no component may declare one of them.

    Raises ValueError where a component or another owner has done so already.
    """
    for key in keys:
        if key in declared_keys() or _TAKEN.get(key, owner) != owner:
            raise ValueError(
                f"{owner} has the key {key!r}, which {_TAKEN.get(key, 'a component')} has already; choose another name for it."
            )
        _TAKEN[key] = owner
    _TAKEN.update({f"-{word}": owner for word in words})


def release(keys: Iterable[str]) -> None:
    """Let names of keys go that were reserved."""
    for key in keys:
        del _TAKEN[key]


# ------------------------------------------------------------------------------------------- components


@dataclass(frozen=True)
class Component:
    """One row of a table: what the configuration calls a part, what the architecture's name calls it, and the part.

    `keys`: configuration keys of its own. `uses`: other optional keys that only matter when this component is chosen.
    `fixes`: keys that it decides itself (SwiGLU's activation is SiLU). `has_attention`: for blocks, whether tokens can see
    each other in it. `label(config)`: what the architecture's name shows instead of `short`. `check(config)`: sentences
    that say what is wrong with a config for it. `check_device(config, device type)`: the same of training on a device.
    """

    kind: str
    name: str
    short: str
    build: Callable
    keys: tuple[Key, ...] = ()
    uses: tuple[str, ...] = ()
    fixes: tuple[tuple[str, Any], ...] = ()
    has_attention: bool = False
    label: Callable[[Config], str] | None = None
    check: Callable[[Config], list[str]] | None = None
    check_device: Callable[[Config, str], list[str]] | None = None

    @property
    def summary(self) -> str:
        """First line of the component's docstring."""
        return (self.build.__doc__ or "").strip().split("\n")[0]

    def reads(self, key: str) -> bool:
        """Whether this optional key matters to the component."""
        return key in self.uses or any(own.name == key for own in self.keys)


_REGISTRY: dict[str, dict[str, Component]] = {kind: {} for kind in COMPONENT_KINDS}


def register(
    kind: str,
    name: str,
    *,
    short: str,
    keys: tuple[Key, ...] = (),
    uses: tuple[str, ...] = (),
    fixes: dict[str, Any] | None = None,
    has_attention: bool = False,
    label: Callable[[Config], str] | None = None,
    check: Callable[[Config], list[str]] | None = None,
    check_device: Callable[[Config, str], list[str]] | None = None,
) -> Callable:
    """Decorator that enters a class or function under `kind` and `name`. The arguments are `Component`'s.

    Raises ValueError if name, short or a key is taken. Activations and feed-forwards share one place in the architecture's
    name, so they share their short names too. Two components may declare the same key if they say the same of it.
    """

    def enter(build: Callable) -> Callable:
        together = ("activation", "ffn_type") if kind in ("activation", "ffn_type") else (kind,)
        for other in (c for shared in together for c in _REGISTRY[shared].values()):
            if (kind, name) == (other.kind, other.name) or short == other.short:
                raise ValueError(
                    f"{kind} {name!r} (short {short!r}) is already registered as {other.kind} "
                    f"{other.name!r} (short {other.short!r}); choose another name."
                )
        new = Component(
            kind,
            name,
            short,
            build,
            tuple(keys),
            tuple(uses),
            tuple((fixes or {}).items()),
            has_attention,
            label,
            check,
            check_device,
        )
        for key in new.keys:
            _check_key(key, new)
        _REGISTRY[kind][name] = new
        return build

    return enter


def _check_key(key: Key, owner: Component) -> None:
    """Raise ValueError unless a component may declare this key beside those that there are."""
    where = f"{owner.kind} {owner.name!r} declares the key {key.name!r}"
    if key.name in _TAKEN:
        raise ValueError(f"{where}, which {_TAKEN[key.name]} has already; choose another name, or list it in `uses`.")
    if f"-{key.word}" in _TAKEN:
        raise ValueError(f"{where} with the tag {key.word!r}, which {_TAKEN[f'-{key.word}']} has already; choose another tag.")
    for other in declared_keys().values():
        if other.name == key.name and other != key:
            raise ValueError(f"{where}, which another one declares with other words; share one Key, or choose another name.")
        if other.name != key.name and other.word == key.word:
            raise ValueError(f"{where} with the tag {key.word!r}, which the key {other.name!r} has; choose another tag.")


def unregister(kind: str, name: str) -> None:
    """Take a component out of its table again (for tests and notebooks)."""
    del _REGISTRY[kind][name]


def components(kind: str) -> dict[str, Component]:
    """All components of one kind by name, in the order they were registered."""
    if not any(_REGISTRY.values()):
        raise RuntimeError("No components are registered yet: `import model_components` (or model_builder) comes first.")
    return _REGISTRY[kind]


def component(kind: str, name: str) -> Component:
    """One component. Raises ValueError with the list of what there is (and the nearest name) when it is unknown."""
    known = components(kind)
    if name not in known:
        raise ValueError(f"{kind}={name!r} is not registered{did_you_mean(name, known)}. There is: {', '.join(known)}.")
    return known[name]


def declared_keys(*kinds: str) -> dict[str, Key]:
    """The keys that the registered components of these kinds (default: all) declare, by name."""
    return {key.name: key for kind in kinds or COMPONENT_KINDS for c in _REGISTRY[kind].values() for key in c.keys}


def readers(key: str) -> list[Component]:
    """The components to which this optional key matters."""
    return [c for kind in COMPONENT_KINDS for c in _REGISTRY[kind].values() if c.reads(key)]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' (did you mean …?)' for the nearest of the known words, or ''."""
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def list_components() -> None:
    """Print every registered component: configuration key, value, short name and what it is."""
    rows = []
    for kind in COMPONENT_KINDS:
        key = "layer_pattern" if kind == "block" else kind
        rows += [(key, c.name, c.short, c.summary) for c in components(kind).values()]
    print(text_table(("key", "value", "in the name", "what it is"), rows, "l"))


# ------------------------------------------------------------------------------------------- the cost of a part


@dataclass(frozen=True)
class Part:
    """What one part of a model costs; every component lists its own (`parts(config)`).

    `parameters`: trainable numbers. `active`: how many of them a token uses, where that is not all (of a mixture of experts,
    the experts that a token is sent to). `matmul`: weights multiplied once for each token (2 FLOPs each in forward).
    `attention`: n_head × head_dim of an attention over the context (4 × this × context FLOPs a token in forward), of which
    a sliding `window` sees only that many tokens.
    """

    name: str
    parameters: int = 0
    matmul: int = 0
    attention: int = 0
    window: int | None = None
    active: int | None = None

    @property
    def used(self) -> int:
        """Parameters that a token uses."""
        return self.parameters if self.active is None else self.active


def linear_part(name: str, d_in: int, d_out: int, bias: bool) -> Part:
    """The cost of a linear projection d_in → d_out."""
    return Part(name, parameters=d_in * d_out + (d_out if bias else 0), matmul=d_in * d_out)


def renamed(parts: list[Part], prefix: str) -> list[Part]:
    """The same parts with a prefix before their names."""
    return [dataclasses.replace(part, name=prefix + part.name) for part in parts]
