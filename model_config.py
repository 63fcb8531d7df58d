"""What a model is: `ModelConfig`, its checks, and the architecture's name and fingerprint.

`resolve(preset, **overrides)` is the way to make a `ModelConfig`. Nothing here names a concrete component: what a component
needs, decides, and adds to the name is asked of the tables in `model_parts/registry.py`, which `model_components.py` fills.
So whoever resolves a model imports `model_components` too, as model_builder, training.train_config and the cost command do.

    python -c "from model_components import list_presets; list_presets()"
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import typing
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, NamedTuple

from command_line import text_table
from model_parts.patterns import expand_pattern, shortest_pattern
from model_parts.presets import PLAIN, PLAIN_BLOCK, PRESETS
from model_parts.registry import (  # noqa: F401  (some for those who import them from here)
    COMPONENT_KINDS,
    EXECUTION_KINDS,
    Component,
    Key,
    Part,
    component,
    components,
    declared_keys,
    did_you_mean,
    linear_part,
    list_components,
    readers,
    register,
    reserve,
    unregister,
)
from model_parts.values import NO, alternatives, as_type, is_truth_value, type_in_words  # noqa: F401

# ------------------------------------------------------------------------------------------- ModelConfig


def _key(help: str, *, group: str = "architecture", **field_arguments) -> Any:
    return dataclasses.field(metadata={"help": help, "group": group}, **field_arguments)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that defines a model, with every default filled in. Made by `resolve`, immutable, hashable.

    A key that a component declares is read like any other (`config.rope_theta`); it is None where no chosen component
    reads it. Raises ValueError that lists all problems found.
    """

    n_layer: int = _key("number of blocks")
    n_head: int = _key("attention heads (of the queries)")
    n_kv_head: int = _key("heads of keys and values: n_head is MHA, 1 is MQA, between is GQA [n_head]")
    head_dim: int = _key("width of one head [n_embd / n_head]")
    n_embd: int = _key("width of the residual stream")
    d_ff: int = _key("hidden width of the feed-forward [4 × n_embd; gated: 8/3 × n_embd, rounded up]")
    vocab_size: int = _key("token ids, special ones included [the dataset's, else the preset's]")
    pad_vocab_multiple: int = _key("round the embedding table up to a multiple of this; padding never wins")
    block_size: int = _key("longest sequence, in tokens; also the length of a learned position table", group="data")
    normalization: str = _key("kind of normalisation")
    norm_eps: float = _key("added to the variance before the square root")
    activation: str = _key("non-linearity of the feed-forward")
    ffn_type: str = _key("kind of feed-forward")
    position_encoding: str = _key("how the positions of tokens enter the model")
    rope_scaling: str | None = _key("stretches RoPE beyond the context it was trained for (RoPE only) [none]", default=None)
    norm_position: str = _key("where the norm sits in a residual branch")
    layer_pattern: tuple[str, ...] = _key(
        "block of each layer, comma-separated, repeated to n_layer; name*k stands for k of them"
    )
    bias: bool = _key("biases in the linear layers of attention and feed-forward")
    qkv_bias: bool = _key("biases in the q, k, v projections [bias]")
    qk_norm: bool | Literal["full"] = _key("RMS-normalise each head's queries and keys; full: all heads together", default=False)
    attention_scale: float | None = _key("factor on the attention scores [1 / √head_dim]", default=None)
    attention_softcap: float | None = _key("attention scores s become cap·tanh(s / cap); 0: off", default=None)
    logit_softcap: float | None = _key("logits become cap·tanh(logit / cap); 0: off", default=None)
    embedding_norm: bool = _key("normalise the embeddings before the first block", default=False)
    embedding_scale: bool = _key("multiply the embeddings by √n_embd (Gemma)", default=False)
    zero_init: bool = _key(
        "projections into the residual stream start at zero, so that (under pre-norm) each block is the identity", default=False
    )
    ffn_expansion_ratio: float | None = _key("d_ff as a multiple of n_embd, instead of d_ff", default=None)
    ffn_multiple: int | None = _key("round the d_ff that is worked out up to a multiple of this", default=None)
    weight_tying: bool = _key("the output head shares the embedding's weights")
    dropout: float = _key("dropout probability: embedding, attention, residual branches", default=0.0)
    attention_backend: str = _key(
        "implementation of attention; the result is the same", group="execution", default=PLAIN["attention_backend"]
    )
    own: tuple[tuple[str, Any], ...] = ()  # the keys that the chosen components declare, with their values, by name

    def __post_init__(self):
        problems = _problems(self)
        if problems:
            raise ValueError("\n".join(problems))

    def __getattr__(self, name: str) -> Any:  # only for what is no field
        own = dict(self.__dict__.get("own", ()))
        if name in own or name in declared_keys():
            return own.get(name)
        raise AttributeError(f"ModelConfig has no key {name!r}{did_you_mean(name, model_keys())}.")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table: vocab_size rounded up to pad_vocab_multiple."""
        return _round_up(self.vocab_size, self.pad_vocab_multiple)

    def chosen(self) -> list[Component]:
        """The components this model is made of, blocks and attention backend included."""
        kinds = [kind for kind in COMPONENT_KINDS if kind != "block" and getattr(self, kind) is not None]
        blocks = [component("block", name) for name in dict.fromkeys(self.layer_pattern)]
        return [component(kind, getattr(self, kind)) for kind in kinds] + blocks

    def uses(self, key: str) -> bool:
        """Whether a chosen component reads this optional key."""
        return any(c.reads(key) for c in self.chosen())

    def problems_on(self, device: str) -> list[str]:
        """What keeps this model from being trained on a device of this type ('cpu', 'cuda'), one sentence each."""
        return [problem for c in self.chosen() if c.check_device for problem in c.check_device(self, device)]

    @property
    def name(self) -> str:
        """The architecture's name: the documented parts, then whatever differs from one fixed baseline (`_TAGS`)."""
        ffn, activation = component("ffn_type", self.ffn_type), component("activation", self.activation)
        if ffn.label is not None:
            feed_forward = ffn.label(self)
        else:
            feed_forward = ffn.short if "activation" in dict(ffn.fixes) else f"{ffn.short}({activation.short})"
        parts = [f"{self.n_layer}L", f"{self.n_head}H", f"{self.n_embd}D"]
        parts += [f"KV{self.n_kv_head}"] if self.n_kv_head != self.n_head else []
        parts += [
            component("position_encoding", self.position_encoding).short,
            component("normalization", self.normalization).short,
            feed_forward,
            component("norm_position", self.norm_position).short,
        ]
        return "-".join(parts + [tag for tag in (make(self) for make in _TAGS) if tag])

    def to_dict(self) -> dict[str, Any]:
        """All keys, JSON-ready; layer_pattern as the text a user types, its repetition taken out."""
        return {
            key: shortest_pattern(self.layer_pattern) if key == "layer_pattern" else getattr(self, key) for key in model_keys()
        }

    def to_json(self) -> str:
        """JSON text that `from_json` reads back to an equal config."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The config that `to_dict` wrote. Raises ValueError on unknown or impossible values."""
        return resolve("custom", **values)

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """The config that `to_json` wrote."""
        return cls.from_dict(json.loads(text))

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the sha256 of the canonical JSON: equal exactly when the architectures are.

        Left out: execution keys, keys no component reads, and optional features that are switched off (so that a
        feature added to kitbash later does not change the fingerprint of the models before it).
        """
        values = {}
        for key in model_keys().values():
            value = shortest_pattern(self.layer_pattern) if key.name == "layer_pattern" else getattr(self, key.name)
            if key.declared is not None:
                off = value is None or value is False
            else:
                off = not key.required and (value == key.default or value == PLAIN.get(key.name, key.default))
            if not off and key.group != "execution":
                values[key.name] = value
        if not self.uses("block_size"):
            del values["block_size"]
        values["pad_vocab_multiple"] = self.padded_vocab_size
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------- keys


class ModelKey(NamedTuple):
    """One key of a model: a field of ModelConfig, or one that a component declares (`declared`)."""

    name: str
    type: Any
    help: str
    group: str
    default: Any = None
    required: bool = False  # a preset or `resolve` always gives it a value
    declared: Key | None = None


_TYPES = typing.get_type_hints(ModelConfig)
FIELDS = {
    field.name: ModelKey(
        field.name,
        _TYPES[field.name],
        field.metadata["help"],
        field.metadata["group"],
        None if field.default is dataclasses.MISSING else field.default,
        field.default is dataclasses.MISSING,
    )
    for field in dataclasses.fields(ModelConfig)
    if field.name != "own"
}
_CHOSEN_BY = {"layer_pattern": "block"}  # key → the kind whose components it chooses, where they differ
_OFF_AT_ZERO = ("attention_scale", "attention_softcap", "logit_softcap")


def model_keys() -> dict[str, ModelKey]:
    """Every key of a model at this moment: the fields, and behind each kind the keys that its components declare."""
    found = {}
    for name, field in FIELDS.items():
        found[name] = field
        kind = _CHOSEN_BY.get(name, name)
        for key in declared_keys(kind).values() if kind in COMPONENT_KINDS else ():
            group = "execution" if kind in EXECUTION_KINDS else "architecture"
            found[key.name] = ModelKey(key.name, key.type | None, key.help_with_default, group, declared=key)
    return found


def architecture_keys() -> tuple[str, ...]:
    """The names of the keys that make a model another one."""
    return tuple(key.name for key in model_keys().values() if key.group == "architecture")


def is_off_at_zero(key: str) -> bool:
    """Whether 0 switches this feature off, as None would only mean that the key is not given."""
    return key in _OFF_AT_ZERO or (key in declared_keys() and declared_keys()[key].is_off_at_zero)


# ------------------------------------------------------------------------------------------- derived values


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def usual_d_ff(ffn_type: str, n_embd: int, ratio: float | None = None, multiple: int | None = None) -> int:
    """The usual hidden width: what the feed-forward says (`usual_ratio`, `usual_multiple`), else 4 × n_embd.

    Another ratio or rounding multiple may be given.
    """
    build = component("ffn_type", ffn_type).build
    if ratio is not None:
        return _round_up(round(Fraction(str(ratio)) * n_embd), multiple or 1)
    usual = getattr(build, "usual_multiple", lambda n_embd: 1)(n_embd) if multiple is None else multiple
    return _round_up(math.ceil(getattr(build, "usual_ratio", Fraction(4)) * n_embd), usual)


# ------------------------------------------------------------------------------------------- the name


def _words(c: ModelConfig, *kinds: str) -> str:
    """What the keys that the chosen components of these kinds declare add to the name.

    A component whose kind is not among the documented parts of the name is there with its short name and all of its keys.
    """
    words = {}
    for one in c.chosen():
        if one.kind not in kinds:
            continue
        if one.kind in _optional_kinds():
            values = [getattr(c, key.name) for key in one.keys if getattr(c, key.name) is not None]
            shown = one.short + "".join(f"_{value!r}".removesuffix(".0") for value in values)
            words[one.kind] = shown if one.name != PLAIN.get(one.kind) else ""
        else:
            words |= {key.name: key.shown(getattr(c, key.name)) for key in one.keys}
    return "-".join(word for word in words.values() if word)


# One line for each way to differ from the baseline, in the fixed order of the name.
_TAGS: tuple[Callable[[ModelConfig], str], ...] = (
    lambda c: f"HD{c.head_dim}" if c.head_dim * c.n_head != c.n_embd else "",
    lambda c: f"FF{c.d_ff}" if c.d_ff != usual_d_ff(c.ffn_type, c.n_embd) else "",
    lambda c: f"V{c.vocab_size}" if c.vocab_size != 50304 else "",
    lambda c: f"Pad{c.padded_vocab_size}" if c.padded_vocab_size != c.vocab_size else "",
    lambda c: f"T{c.block_size}" if c.uses("block_size") and c.block_size != 1024 else "",
    lambda c: _words(c, *(kind for kind in COMPONENT_KINDS if kind not in ("block", *EXECUTION_KINDS))),
    lambda c: f"Eps{c.norm_eps!r}" if c.norm_eps != 1e-5 else "",
    lambda c: "" if not c.qk_norm else "QKNormFull" if c.qk_norm == "full" else "QKNorm",
    lambda c: _words(c, "block"),
    lambda c: f"Scale{c.attention_scale!r}" if c.attention_scale is not None else "",
    lambda c: f"AttnCap{c.attention_softcap!r}" if c.attention_softcap is not None else "",
    lambda c: f"LogitCap{c.logit_softcap!r}" if c.logit_softcap is not None else "",
    lambda c: "EmbNorm" if c.embedding_norm else "",
    lambda c: "EmbScale" if c.embedding_scale else "",
    lambda c: "ZeroInit" if c.zero_init else "",
    lambda c: "Bias" if c.bias else "",
    lambda c: ("QKVBias" if c.qkv_bias else "NoQKVBias") if c.qkv_bias != c.bias else "",
    lambda c: "Tied" if c.weight_tying else "",
    lambda c: f"Drop{c.dropout!r}" if c.dropout else "",
    lambda c: f"[{shortest_pattern(c.layer_pattern)}]" if set(c.layer_pattern) != {PLAIN_BLOCK} else "",
)

_WORDS = "L H D KV HD FF V Pad T Eps QKNorm QKNormFull Scale AttnCap LogitCap EmbNorm EmbScale ZeroInit Bias QKVBias Tied Drop"
reserve("ModelConfig", (*FIELDS, "own", "name", "fingerprint"), _WORDS.split(" "))


# ------------------------------------------------------------------------------------------- checks


def _problems(c: ModelConfig) -> list[str]:
    """Every reason why this config cannot be built, one sentence each."""
    problems = []
    for key in ("n_layer", "n_head", "n_kv_head", "head_dim", "n_embd", "d_ff", "vocab_size", "pad_vocab_multiple", "block_size"):
        if getattr(c, key) < 1:
            problems.append(f"{key}={getattr(c, key)} must be at least 1.")
    if c.n_kv_head >= 1 and c.n_head >= 1 and c.n_head % c.n_kv_head:
        divisors = [k for k in range(1, c.n_head + 1) if c.n_head % k == 0]
        problems.append(
            f"n_kv_head={c.n_kv_head} does not divide n_head={c.n_head}, so query heads cannot share keys "
            f"evenly. Use one of {', '.join(map(str, divisors))}."
        )
    if not 0.0 <= c.dropout < 1.0:
        problems.append(f"dropout={c.dropout} is not a probability in [0, 1).")
    problems += must_be_positive(c, "norm_eps", "attention_scale", "attention_softcap", "logit_softcap")
    if len(c.layer_pattern) != c.n_layer and c.n_layer >= 1:
        problems.append(f"layer_pattern names {len(c.layer_pattern)} layers but n_layer={c.n_layer}.")
    chosen = c.chosen()
    blocks = [one for one in chosen if one.kind == "block"]
    if blocks and not any(block.has_attention for block in blocks):
        problems.append(
            f"layer_pattern={shortest_pattern(c.layer_pattern)} has no block with attention, so no token could see "
            f"another; keep at least one, e.g. {PLAIN_BLOCK!r}."
        )
    for one in chosen:
        try:
            problems += one.check(c) if one.check else []
        except Exception:
            if not problems:  # else the check may have stumbled over what is reported already
                raise
    return problems


def must_be_positive(config: ModelConfig, *keys: str) -> list[str]:
    """A sentence for each of these keys that has a value which is not a positive, finite number."""
    values = {key: getattr(config, key) for key in keys}
    return [
        f"{key}={value} must be positive and finite."
        for key, value in values.items()
        if value is not None and not 0 < value < math.inf
    ]


# ------------------------------------------------------------------------------------------- resolving

# The largest sizes that are taken seriously: far above any model, and small enough to answer at once.
MOST = dict(
    n_layer=10_000,
    n_head=100_000,
    n_kv_head=100_000,
    n_embd=10**7,
    head_dim=10**6,
    d_ff=10**8,
    vocab_size=10**9,
    block_size=10**9,
)


def resolve(preset: str = "custom", **overrides: Any) -> ModelConfig:
    """A preset with some keys overridden → ModelConfig, every derived value filled in. The only way to make one.

    An override of None means "not overridden"; values are converted to the key's type where nothing is lost. Raises
    ValueError, all problems in one, for an unknown preset, key or component, a value of the wrong type, an impossible
    shape, or an override that would change nothing (rope_theta on a model without RoPE).
    """
    if preset not in PRESETS:
        raise ValueError(
            f"arch_preset={preset!r} is not a preset{did_you_mean(preset, PRESETS)}. There is: {', '.join(PRESETS)}."
        )
    given, problems = _converted({key: value for key, value in overrides.items() if value is not None})
    from_preset = {**PLAIN, **PRESETS[preset][1]}
    values = {**from_preset, **given}
    if too_large := [
        f"{key}={values[key]} is more than {most:,}, the most that any model here has."
        for key, most in MOST.items()
        if isinstance(values.get(key), int) and values[key] > most
    ]:
        raise ValueError("\n".join(too_large))  # before anything is worked out from them: that may take minutes
    group = values.pop("queries_per_kv_head", 1)
    for key in [key for key in values if is_off_at_zero(key) and values[key] == 0]:
        values[key] = None
        given.pop(key, None)
    chosen, unknown = _chosen(values, given, from_preset, problems)
    used = _used(chosen)
    problems += _without_effect(values, given, used, unknown)

    heads, width = values["n_head"], values["n_embd"]
    if values.get("head_dim") is None:
        uneven = heads >= 1 and width >= 1 and width % heads
        if uneven:
            problems.append(_uneven_heads(heads, width))
        values["head_dim"] = 2 if uneven else max(1, width // max(1, heads))
    if values.get("attention_scale") == max(1, values["head_dim"]) ** -0.5:
        values["attention_scale"] = None  # what it is anyway
    problems += _settle_d_ff(values, given, width, usable=not problems)
    kv_heads = max((k for k in range(1, heads // group + 1) if heads % k == 0), default=1)
    for key, value in dict(n_kv_head=kv_heads, d_ff=1, qkv_bias=values["bias"]).items():
        if values.get(key) is None:
            values[key] = value
    own = {key.name: values.get(key.name) for c in used for key in c.keys}
    defaults = {key.name: key.default for c in used for key in c.keys}
    own = {name: defaults[name] if own[name] is None else own[name] for name in sorted(own)}
    try:
        config = ModelConfig(**{key: values[key] for key in FIELDS if key in values}, own=tuple(own.items()))
    except ValueError as error:
        problems += str(error).split("\n")
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))
    return config


def _converted(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Overrides as the types their keys declare, and a sentence for each that is unknown or of another type."""
    keys, converted, problems = model_keys(), {}, []
    for key, value in given.items():
        if key not in keys:
            problems.append(f"{key!r} is not a key of a model{did_you_mean(key, keys)}.")
        elif key == "layer_pattern":
            if isinstance(value, str) or (isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)):
                converted[key] = value
            else:
                problems.append(f"layer_pattern={value!r} is not a text or a list of block names.")
        elif (as_declared := as_type(keys[key].type, value)) is NO:
            problems.append(f"{key}={value!r} is not {type_in_words(keys[key].type)}.")
        elif as_declared is not None:
            converted[key] = as_declared
    return converted, problems


def _chosen(
    values: dict[str, Any], given: dict[str, Any], from_preset: dict[str, Any], problems: list[str]
) -> tuple[list[Component], set[str]]:
    """The components that `values` name, once what they decide themselves (`fixes`) is entered there.

    A component that does not exist is a problem; the preset's takes its place, to find what else is wrong. Returns the
    components, and the kinds of which an unknown one was asked for.
    """
    unknown: set[str] = set()
    pattern = values.get("layer_pattern", _default_pattern(values))
    for _ in COMPONENT_KINDS:  # what a component decides may be another component
        before, chosen = dict(values), []
        for kind in COMPONENT_KINDS:
            if kind == "block":
                chosen += _blocks(values, pattern, "layer_pattern" in given, problems)
                continue
            try:
                chosen.append(component(kind, values[kind]))
            except ValueError as error:
                problems.append(str(error))
                unknown.add(kind)
                values[kind] = from_preset[kind]
                chosen.append(component(kind, values[kind]))
        problems += _enter_fixes(values, given, _used(chosen))
        if values == before:
            break
    return chosen, unknown


def _default_pattern(values: dict[str, Any]) -> str:
    """The block of all layers where no pattern is given: one of which a key of its own is given, else the plain one."""
    own = [c.name for c in components("block").values() if any(values.get(key.name) is not None for key in c.keys)]
    return own[0] if own else PLAIN_BLOCK


def _blocks(values: dict[str, Any], pattern: Any, was_given: bool, problems: list[str]) -> list[Component]:
    """The blocks of a pattern, which is entered in `values` as one name a layer."""
    length = max(1, values["n_layer"])
    try:  # a preset's own pattern may be longer than a small model of its kind
        values["layer_pattern"] = expand_pattern(pattern, length) if was_given else expand_pattern(pattern, length + 99)[:length]
        return [component("block", name) for name in dict.fromkeys(values["layer_pattern"])]
    except ValueError as error:
        problems.append(str(error))
        values["layer_pattern"] = (PLAIN_BLOCK,) * length
        return [component("block", PLAIN_BLOCK)]


def _enter_fixes(values: dict[str, Any], given: dict[str, Any], used: list[Component]) -> list[str]:
    """Enter what components decide themselves, which cannot be overridden to anything else. Returns the problems.

    A model has one value of each key. So what one block decides, and another does not, must be the value anyway.
    """
    problems, decided = [], {}
    blocks = [c for c in used if c.kind == "block"]
    for c in used:
        for key, value in c.fixes:
            others = [b for b in blocks if dict(b.fixes).get(key, NO) != value] if c.kind == "block" else []
            who = f"{c.kind}={c.name!r}"
            if key not in model_keys():
                problems.append(f"{who} decides {key!r}, which is not a key of a model{did_you_mean(key, model_keys())}.")
            elif key in decided and values[key] != value:
                problems.append(
                    f"{who} and {decided[key].kind}={decided[key].name!r} decide different values of {key}: {value!r} and "
                    f"{values[key]!r}. Choose another of one of them."
                )
            elif given.get(key, value) != value:
                problems.append(
                    f"{key}={given[key]!r} has no effect with {who}, whose {key} is {value!r}. Leave it out or choose another "
                    f"{c.kind}."
                )
            elif others and values.get(key) != value:
                problems.append(
                    f"layer_pattern mixes {c.name!r}, whose {key} is {value!r}, with {others[0].name!r}, whose {key} would be "
                    f"{values.get(key)!r}; a model has one {key}. Give --{key}={value}, or use one of the blocks alone."
                )
            else:
                values[key], decided[key] = value, c
    return problems


def _optional_kinds() -> set[str]:
    """Kinds of which a component only matters where another one reads it (rope_scaling)."""
    return {kind for kind in COMPONENT_KINDS if readers(kind)}


def _used(chosen: list[Component]) -> list[Component]:
    """Those components that matter: all but the ones of a kind that no other one reads."""
    optional = _optional_kinds()
    used = [c for c in chosen if c.kind not in optional]
    for _ in optional:  # one of them may in turn be read by another
        used += [c for c in chosen if c not in used and any(other.reads(c.kind) for other in used)]
    return used


def _without_effect(values: dict[str, Any], given: dict[str, Any], used: list[Component], unknown: set[str]) -> list[str]:
    """Set the optional keys that no component reads to None; a sentence for each of them that the user has given."""
    problems = []
    optional = {*declared_keys(), *(key for kind in COMPONENT_KINDS for c in components(kind).values() for key in c.uses)}
    for key in sorted(key for key in optional if not (key in FIELDS and FIELDS[key].required)):
        if any(c.reads(key) for c in used):
            continue
        if key in given and not any(c.kind in unknown for c in readers(key)):  # perhaps the part that was meant reads it
            names = [f"{c.kind}={c.name!r}" for c in readers(key)]
            problems.append(f"{key}={given[key]!r} has no effect on this model: only {' or '.join(names)} reads it.")
        values[key] = None
    return problems


def _settle_d_ff(values: dict[str, Any], given: dict[str, Any], width: int, usable: bool) -> list[str]:
    """Let d_ff follow from ratio and multiple unless it is given; it says it all from here on. Returns the problems.

    `usable`: whether the values are sound so far, so that something can be worked out from them.
    """
    ratio, multiple = values.get("ffn_expansion_ratio"), values.get("ffn_multiple")
    problems = []
    if ratio is not None and not 0 < ratio < math.inf:
        problems.append(f"ffn_expansion_ratio={ratio} must be positive and finite.")
    if multiple is not None and multiple < 1:
        problems.append(f"ffn_multiple={multiple} must be at least 1.")
    if values.get("d_ff") is not None:
        problems += [
            f"{key}={given[key]} has no effect, as d_ff={values['d_ff']} is given; leave one of them out."
            for key in ("ffn_expansion_ratio", "ffn_multiple")
            if key in given
        ]
    elif usable and not problems:
        values["d_ff"] = usual_d_ff(values["ffn_type"], max(1, width), ratio, multiple)
    values["ffn_expansion_ratio"] = values["ffn_multiple"] = None
    return problems


def _uneven_heads(heads: int, width: int) -> str:
    """The sentence for a number of heads that does not divide the width, with the nearest that does."""
    divisors = [h for h in range(1, width + 1) if width % h == 0 and (width // h) % 2 == 0] or [1]
    best = min(divisors, key=lambda h: abs(h - heads))
    return (
        f"n_head={heads} does not divide n_embd={width} (head_dim would be {width / heads:.2f}). "
        f"Use n_head={best} for head_dim {width // best}."
    )


def list_presets() -> None:
    """Print every preset with its architecture's name and what it is.

    Where nothing has imported the parts yet (`from model_config import list_presets`), an architecture has no name.
    """
    try:
        rows = [(name, resolve(name).name, about) for name, (about, _) in PRESETS.items()]
    except RuntimeError:
        print(text_table(("arch_preset", "what it is"), [(name, about) for name, (about, _) in PRESETS.items()], "l"))
        return
    print(text_table(("arch_preset", "name", "what it is"), rows, "l"))
