"""What a model is: `ModelConfig`, the presets, the architecture's name, and the tables of registered components.

`resolve(preset, **overrides)` is the way to make a `ModelConfig`. The tables live here, empty; `model_components.py`
fills them with its decorators, so that this module can check and name a component without knowing any of them. So whoever
resolves a model imports `model_components` too, as model_builder, training.train_config and the cost command do.

    python -c "from model_components import list_presets; list_presets()"
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from command_line import text_table

# ------------------------------------------------------------------------------------------- components

# Each kind is also the configuration key that chooses a component of it.
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


@dataclass(frozen=True)
class Component:
    """One row of a registry: what the configuration calls a part, what the architecture's name calls it, and the part.

    `uses`: configuration keys that only matter when this component is chosen (rope_theta for RoPE).
    `fixes`: configuration keys this component decides itself (SwiGLU's activation is SiLU).
    `has_attention`: for blocks, whether tokens can see each other in it.
    """

    kind: str
    name: str
    short: str
    build: Callable
    uses: tuple[str, ...] = ()
    fixes: tuple[tuple[str, Any], ...] = ()
    has_attention: bool = False

    @property
    def summary(self) -> str:
        """First line of the component's docstring."""
        return (self.build.__doc__ or "").strip().split("\n")[0]


_REGISTRY: dict[str, dict[str, Component]] = {kind: {} for kind in COMPONENT_KINDS}


def register(
    kind: str,
    name: str,
    *,
    short: str,
    uses: tuple[str, ...] = (),
    fixes: dict[str, Any] | None = None,
    has_attention: bool = False,
) -> Callable:
    """Decorator that enters a class or function under `kind` and `name`. Raises ValueError if name or short is taken.

    Activations and feed-forwards share one place in the architecture's name, so they share their short names too.
    """

    def enter(build: Callable) -> Callable:
        together = ("activation", "ffn_type") if kind in ("activation", "ffn_type") else (kind,)
        for other in (c for shared in together for c in _REGISTRY[shared].values()):
            if (kind, name) == (other.kind, other.name) or short == other.short:
                raise ValueError(
                    f"{kind} {name!r} (short {short!r}) is already registered as {other.kind} "
                    f"{other.name!r} (short {other.short!r}); choose another name."
                )
        _REGISTRY[kind][name] = Component(kind, name, short, build, tuple(uses), tuple((fixes or {}).items()), has_attention)
        return build

    return enter


def unregister(kind: str, name: str) -> None:
    """Take a component out of its registry again (for tests and notebooks)."""
    del _REGISTRY[kind][name]


def components(kind: str) -> dict[str, Component]:
    """All components of one kind by name, in the order they were registered.

    Raises RuntimeError as long as nothing has imported the module that registers them.
    """
    if not any(_REGISTRY.values()):
        raise RuntimeError("No components are registered yet: `import model_components` (or model_builder) comes first.")
    return _REGISTRY[kind]


def component(kind: str, name: str) -> Component:
    """One component. Raises ValueError with the list of what there is (and the nearest name) when it is unknown."""
    known = components(kind)
    if name not in known:
        raise ValueError(f"{kind}={name!r} is not registered{did_you_mean(name, known)}. There is: {', '.join(known)}.")
    return known[name]


def did_you_mean(word: str, known) -> str:
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


# ------------------------------------------------------------------------------------------- types of keys

NO = object()  # what `as_type` returns for a value that is not of the type


def alternatives(kind: Any) -> tuple:
    """The members of a union type, None first; (kind,) for any other type."""
    members = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    return tuple(sorted(members, key=lambda member: member is not type(None)))


def as_type(kind: Any, value: Any) -> Any:
    """`value`, a Python value or text, as `kind` where nothing is lost, else NO.

    1 → 1.0, '3e8' → 300000000, 'True' → True, 'None' → None; 1.5 is no int, True no number.
    """
    for member in alternatives(kind):
        converted = _as_member(member, value)
        if converted is not NO:
            return converted
    return NO


def _as_member(kind: Any, value: Any) -> Any:
    text = isinstance(value, str)
    if kind is type(None):
        return None if value is None or (text and value == "None") else NO
    if typing.get_origin(kind) is Literal:
        return value if value in typing.get_args(kind) else NO
    if kind is bool:
        if text and is_truth_value(value):
            return value.lower() in ("true", "1")
        return bool(value) if isinstance(value, bool) or (type(value) is int and value in (0, 1)) else NO
    if kind is str:
        return value if text else str(value) if isinstance(value, Path) else NO
    if isinstance(value, (bool, bytes)):
        return NO
    try:
        if kind is int:
            if type(value) is int or (text and re.fullmatch(r"[+-]?[0-9_]+", value.strip())):
                return int(value)
            number = float(value)
            return int(number) if number.is_integer() else NO
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return NO


def is_truth_value(text: str) -> bool:
    """Whether text stands for True or False."""
    return text.lower() in ("true", "false", "0", "1")


def type_in_words(kind: Any) -> str:
    """A type in words: 'a whole number', "'cosine' or 'linear'", 'True or False'; that it may be None is not said."""
    words = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}
    pieces = []
    for member in alternatives(kind):
        if member is not type(None):
            pieces += (
                [repr(value) for value in typing.get_args(member)] if typing.get_origin(member) is Literal else [words[member]]
            )
    return pieces[0] if len(pieces) == 1 else ", ".join(pieces[:-1]) + " or " + pieces[-1]


# ------------------------------------------------------------------------------------------- the cost of a part


@dataclass(frozen=True)
class Part:
    """What one part of a model costs; every component lists its own (`parts(config)`).

    `parameters`: trainable numbers. `matmul`: weights multiplied once for each token (2 FLOPs each in forward).
    `attention`: n_head × head_dim of an attention over the context (4 × this × context FLOPs a token in forward), of
    which a sliding `window` sees only that many tokens.
    """

    name: str
    parameters: int = 0
    matmul: int = 0
    attention: int = 0
    window: int | None = None


def linear_part(name: str, d_in: int, d_out: int, bias: bool) -> Part:
    """The cost of a linear projection d_in → d_out."""
    return Part(name, parameters=d_in * d_out + (d_out if bias else 0), matmul=d_in * d_out)


# ------------------------------------------------------------------------------------------- ModelConfig


def _key(help: str, *, group: str = "architecture", **field_arguments) -> Any:
    return dataclasses.field(metadata={"help": help, "group": group}, **field_arguments)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that defines a model, with every default filled in. Made by `resolve`, immutable, hashable.

    A key that the chosen components do not read is None (rope_theta without RoPE). Raises ValueError that lists
    all problems found.
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
    rope_theta: float | None = _key("base of the RoPE frequencies (RoPE only)", default=None)
    rope_scaling: str | None = _key("stretches RoPE beyond the context it was trained for (RoPE only) [none]", default=None)
    rope_factor: float | None = _key("by how much rope_scaling stretches [8]", default=None)
    rope_low_freq_factor: float | None = _key(
        "rope_scaling=llama3 stretches wavelengths above rope_original_context / this [1]", default=None
    )
    rope_high_freq_factor: float | None = _key(
        "rope_scaling=llama3 keeps wavelengths below rope_original_context / this [4]", default=None
    )
    rope_original_context: int | None = _key(
        "context that rope_scaling=llama3 takes for the one trained with [8192]", default=None
    )
    norm_position: str = _key("where the norm sits in a residual branch")
    layer_pattern: tuple[str, ...] = _key(
        "block of each layer, comma-separated, repeated to n_layer; name*k stands for k of them"
    )
    bias: bool = _key("biases in the linear layers of attention and feed-forward")
    qkv_bias: bool = _key("biases in the q, k, v projections [bias]")
    qk_norm: bool | Literal["full"] = _key("RMS-normalise each head's queries and keys; full: all heads together", default=False)
    sliding_window: int | None = _key(
        "tokens that the layers of block 'sliding' see; alone, it makes all layers so; 0: off", default=None
    )
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
    attention_backend: str = _key("implementation of attention; the result is the same", group="execution", default="sdpa")

    def __post_init__(self):
        problems = _problems(self)
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table: vocab_size rounded up to pad_vocab_multiple."""
        return _round_up(self.vocab_size, self.pad_vocab_multiple)

    def chosen(self) -> list[Component]:
        """The components this model is made of, blocks included."""
        kinds = [kind for kind in COMPONENT_KINDS if kind not in ("block", "attention_backend")]
        return [component(kind, getattr(self, kind)) for kind in kinds if getattr(self, kind) is not None] + [
            component("block", name) for name in dict.fromkeys(self.layer_pattern)
        ]

    def uses(self, key: str) -> bool:
        """Whether a chosen component reads this optional key."""
        return any(key in c.uses for c in self.chosen())

    @property
    def name(self) -> str:
        """The architecture's name: the documented parts, then whatever differs from one fixed baseline (`_TAGS`)."""
        ffn = component("ffn_type", self.ffn_type)
        act = component("activation", self.activation)
        parts = [f"{self.n_layer}L", f"{self.n_head}H", f"{self.n_embd}D"]
        parts += [f"KV{self.n_kv_head}"] if self.n_kv_head != self.n_head else []
        parts += [
            component("position_encoding", self.position_encoding).short,
            component("normalization", self.normalization).short,
            ffn.short if ffn.fixes else act.short if ffn.name == "standard" else f"{ffn.short}({act.short})",
            component("norm_position", self.norm_position).short,
        ]
        return "-".join(parts + [tag for tag in (make(self) for make in _TAGS) if tag])

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready; layer_pattern as the text a user types, its repetition taken out."""
        return {**dataclasses.asdict(self), "layer_pattern": shortest_pattern(self.layer_pattern)}

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
        values = self.to_dict()
        for field in dataclasses.fields(self):
            off = field.default is not dataclasses.MISSING and values[field.name] in (field.default, "none")
            if off or field.metadata["group"] == "execution":
                del values[field.name]
        if not self.uses("block_size"):
            del values["block_size"]
        values["pad_vocab_multiple"] = self.padded_vocab_size
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


ARCHITECTURE_KEYS = tuple(f.name for f in dataclasses.fields(ModelConfig) if f.metadata["group"] == "architecture")


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def usual_d_ff(ffn_type: str, n_embd: int, ratio: float | None = None, multiple: int | None = None) -> int:
    """The usual hidden width: 4 × n_embd, or for gated feed-forwards 8/3 × n_embd rounded up (Shazeer 2020).

    Another ratio or rounding multiple may be given. The multiple for gated ones is LLaMA's 256 for wide models and
    shrinks with n_embd, so that a narrow model does not grow by half: the largest power of two up to n_embd / 8,
    between 8 and 256.
    """
    gated = getattr(component("ffn_type", ffn_type).build, "gated", False)
    exact = Fraction(str(ratio)) if ratio is not None else Fraction(8, 3) if gated else Fraction(4)
    if multiple is None:
        usual = gated and ratio is None
        multiple = min(256, max(8, 1 << (n_embd // 8).bit_length() >> 1)) if usual else 1
    return _round_up(math.ceil(exact * n_embd) if ratio is None else round(exact * n_embd), multiple)


def shortest_pattern(names: tuple[str, ...]) -> str:
    """One block name a layer → the shortest pattern, as a user types it: ('a', 'a', 'b', 'a', 'a', 'b') → 'a*2,b'."""
    period = next(p for p in range(1, len(names) + 1) if (names[:p] * len(names))[: len(names)] == names)
    pieces: list[list] = []
    for name in names[:period]:
        if pieces and pieces[-1][0] == name:
            pieces[-1][1] += 1
        else:
            pieces.append([name, 1])
    return ",".join(name if count == 1 else f"{name}*{count}" for name, count in pieces)


def expand_pattern(pattern, n_layer: int) -> tuple[str, ...]:
    """A layer pattern, text or sequence, as one block name a layer, repeated up to n_layer.

    'a*2,b' with n_layer 6 → a a b a a b. Raises ValueError when it is empty, longer than n_layer or has a bad count.
    """
    pieces = pattern.split(",") if isinstance(pattern, str) else list(pattern)
    if not pieces:
        raise ValueError("layer_pattern is empty; name at least one block, e.g. 'transformer'.")
    names: list[str] = []
    for piece in (str(p).strip() for p in pieces):
        name, star, count = piece.partition("*")
        if not name or (star and not (count.strip().isdigit() and int(count) > 0)):
            raise ValueError(
                f"layer_pattern has the piece {piece!r}; write block names separated by commas, name*k for k of them."
            )
        names += [name.strip()] * (int(count) if star else 1)
    if len(names) > n_layer:
        raise ValueError(
            f"layer_pattern names {len(names)} layers but n_layer={n_layer}; shorten it or use n_layer={len(names)}."
        )
    return tuple((names * -(-n_layer // len(names)))[:n_layer])


def _values(config: Any, *keys: str) -> str:
    return "".join(f"_{getattr(config, key)!r}".removesuffix(".0") for key in keys if getattr(config, key) is not None)


# One line for each way to differ from the baseline, in the fixed order of the name.
_TAGS: tuple[Callable[[ModelConfig], str], ...] = (
    lambda c: f"HD{c.head_dim}" if c.head_dim * c.n_head != c.n_embd else "",
    lambda c: f"FF{c.d_ff}" if c.d_ff != usual_d_ff(c.ffn_type, c.n_embd) else "",
    lambda c: f"V{c.vocab_size}" if c.vocab_size != 50304 else "",
    lambda c: f"Pad{c.padded_vocab_size}" if c.padded_vocab_size != c.vocab_size else "",
    lambda c: f"T{c.block_size}" if c.uses("block_size") and c.block_size != 1024 else "",
    lambda c: f"Theta{c.rope_theta!r}".removesuffix(".0") if c.rope_theta not in (None, 10000.0) else "",
    lambda c: (
        f"{component('rope_scaling', c.rope_scaling).short}{_values(c, 'rope_factor', 'rope_low_freq_factor')}"
        f"{_values(c, 'rope_high_freq_factor', 'rope_original_context')}"
        if c.rope_scaling not in (None, "none")
        else ""
    ),
    lambda c: f"Eps{c.norm_eps!r}" if c.norm_eps != 1e-5 else "",
    lambda c: "" if not c.qk_norm else "QKNormFull" if c.qk_norm == "full" else "QKNorm",
    lambda c: f"Win{c.sliding_window}" if c.sliding_window else "",
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
    lambda c: f"[{shortest_pattern(c.layer_pattern)}]" if set(c.layer_pattern) != {"transformer"} else "",
)


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
    if not 0 < c.norm_eps < math.inf:
        problems.append(f"norm_eps={c.norm_eps} must be positive and finite.")
    for key in (
        "rope_factor",
        "rope_low_freq_factor",
        "rope_high_freq_factor",
        "attention_scale",
        "attention_softcap",
        "logit_softcap",
        "sliding_window",
        "rope_original_context",
    ):
        if getattr(c, key) is not None and not 0 < getattr(c, key) < math.inf:
            problems.append(f"{key}={getattr(c, key)} must be positive and finite.")
    if c.rope_factor == 1:
        problems.append("rope_factor=1.0 stretches nothing; leave rope_scaling out, or use a larger factor.")
    if c.attention_backend == "flex" and c.dropout:
        problems.append(f"attention_backend='flex' has no dropout (dropout={c.dropout}); use 'sdpa', or dropout 0.")
    if c.rope_scaling == "llama3" and not c.rope_low_freq_factor < c.rope_high_freq_factor:
        problems.append(
            f"rope_low_freq_factor={c.rope_low_freq_factor} must be below rope_high_freq_factor={c.rope_high_freq_factor}."
        )
    if c.rope_theta is not None and not 1 < c.rope_theta < math.inf:
        problems.append(f"rope_theta={c.rope_theta} must be greater than 1 and finite.")
    if c.position_encoding == "rope" and c.head_dim % 2:
        problems.append(
            f"head_dim={c.head_dim} is odd, but RoPE rotates pairs of dimensions. "
            f"Use another n_head, or --head_dim={c.head_dim + 1}."
        )
    if len(c.layer_pattern) != c.n_layer and c.n_layer >= 1:
        problems.append(f"layer_pattern names {len(c.layer_pattern)} layers but n_layer={c.n_layer}.")
    blocks = [component("block", name) for name in dict.fromkeys(c.layer_pattern)]
    if blocks and not any(block.has_attention for block in blocks):
        problems.append(
            f"layer_pattern={shortest_pattern(c.layer_pattern)} has no block with attention, so no token could see "
            "another; keep at least one, e.g. 'transformer'."
        )
    return problems


# ------------------------------------------------------------------------------------------- presets

_GPT2_SHAPE = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, norm_eps=1e-5, pad_vocab_multiple=1)

_LLAMA = dict(
    _GPT2_SHAPE,
    vocab_size=50304,
    normalization="rmsnorm",
    activation="silu",
    ffn_type="swiglu",
    position_encoding="rope",
    norm_position="pre",
    bias=False,
    weight_tying=False,
)

# name → (one line about it, values). Keys not named here are derived in `resolve` or off. All have GPT-2 124M's shape.
# queries_per_kv_head is no key: n_kv_head follows from it and from n_head, which may be overridden.
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT-2 124M as OpenAI released it: pre-norm, biases, GELU-tanh, tied (Radford et al. 2019)",
        dict(
            _GPT2_SHAPE,
            vocab_size=50257,
            normalization="layernorm",
            activation="gelu_tanh",
            ffn_type="standard",
            position_encoding="learned_absolute",
            norm_position="pre",
            bias=True,
            weight_tying=True,
        ),
    ),
    "gpt2_postnorm": (
        "the post-norm, bias-free variant that the starting documents call GPT-2",
        dict(
            _GPT2_SHAPE,
            vocab_size=50304,
            normalization="layernorm_nobias",
            activation="gelu",
            ffn_type="standard",
            position_encoding="learned_absolute",
            norm_position="post",
            bias=False,
            weight_tying=True,
        ),
    ),
    "llama": ("LLaMA's parts in GPT-2's shape: RoPE, RMSNorm, SwiGLU, pre-norm, untied (Touvron et al. 2023)", _LLAMA),
    "llama3": (
        "LLaMA 3: grouped-query attention (4 : 1), RoPE θ 500,000 (Grattafiori et al. 2024)",
        dict(_LLAMA, queries_per_kv_head=4, rope_theta=500000.0),
    ),
    "mistral": (
        "Mistral 7B: grouped-query attention (4 : 1), sliding window of 4096 tokens (Jiang et al. 2023)",
        dict(_LLAMA, queries_per_kv_head=4, sliding_window=4096),
    ),
    "qwen3": (
        "Qwen3: heads of 128, grouped (2 : 1), QK-norm, RoPE θ 1,000,000, tied (Qwen team 2025)",
        dict(_LLAMA, queries_per_kv_head=2, head_dim=128, qk_norm=True, rope_theta=1000000.0, norm_eps=1e-6, weight_tying=True),
    ),
    "olmo2": (
        "OLMo 2: norms on the branches' outputs, QK-norm over all heads, RoPE θ 500,000 (OLMo team 2024)",
        dict(_LLAMA, norm_position="output", qk_norm="full", rope_theta=500000.0, norm_eps=1e-6),
    ),
    "gemma2": (
        "Gemma 2: sandwich norms, GELU-gated, every other layer sliding, soft caps, tied (Gemma team 2024)",
        dict(
            _LLAMA,
            queries_per_kv_head=2,
            head_dim=128,
            normalization="rmsnorm_offset",
            ffn_type="gated",
            activation="gelu_tanh",
            norm_position="sandwich",
            layer_pattern="sliding,transformer",
            sliding_window=4096,
            attention_softcap=50.0,
            logit_softcap=30.0,
            embedding_scale=True,
            norm_eps=1e-6,
            weight_tying=True,
        ),
    ),
    "modern": (
        "what small-model speed runs settled on: QK-norm, RoPE, ReLU², zero-initialised outputs, untied",
        dict(_LLAMA, ffn_type="standard", activation="relu2", qk_norm=True, zero_init=True),
    ),
    "hybrid": (
        "GPT-2's feed-forward and tied head with RoPE and a bias-free pre-norm",
        dict(
            _GPT2_SHAPE,
            vocab_size=50304,
            normalization="layernorm_nobias",
            activation="gelu",
            ffn_type="standard",
            position_encoding="rope",
            norm_position="pre",
            bias=False,
            weight_tying=True,
        ),
    ),
    "team": ("the starting documents' model_v1: the parts of LLaMA", _LLAMA),
    "custom": (
        "a plain bias-free pre-norm base to mix your own from: LayerNorm, GELU, RoPE, untied",
        dict(
            _GPT2_SHAPE,
            vocab_size=50304,
            normalization="layernorm_nobias",
            activation="gelu",
            ffn_type="standard",
            position_encoding="rope",
            norm_position="pre",
            bias=False,
            weight_tying=False,
        ),
    ),
}


def list_presets() -> None:
    """Print every preset with its architecture's name and what it is."""
    rows = [(name, resolve(name).name, about) for name, (about, _) in PRESETS.items()]
    print(text_table(("arch_preset", "name", "what it is"), rows, "l"))


# Features that are off when None; 0 switches off what a preset has switched on, as None would only mean "not given".
OFF_AT_ZERO = ("sliding_window", "attention_scale", "attention_softcap", "logit_softcap")

# What a preset that does not speak of a part has there, and the values of optional keys where a part reads them.
_PLAIN = dict(rope_scaling="none", attention_backend="sdpa")
_DERIVED = dict(
    rope_theta=10000.0, rope_factor=8.0, rope_low_freq_factor=1.0, rope_high_freq_factor=4.0, rope_original_context=8192
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
    values = {**PRESETS[preset][1], **given}
    group = values.pop("queries_per_kv_head", 1)

    chosen, unknown_kinds = [], set()  # a part that does not exist: go on with the preset's, to find what else is wrong
    values = {**_PLAIN, **values}
    for kind in COMPONENT_KINDS:
        if kind != "block":
            try:
                chosen.append(component(kind, values[kind]))
            except ValueError as error:
                problems.append(str(error))
                unknown_kinds.add(kind)
                values[kind] = {**_PLAIN, **PRESETS[preset][1]}[kind]
                chosen.append(component(kind, values[kind]))
    for key in [key for key in OFF_AT_ZERO if values.get(key) == 0]:
        values[key] = None
        given.pop(key, None)
    all_alike = ("transformer",) if values.get("sliding_window") is None else ("sliding",)
    pattern = values.get("layer_pattern", all_alike)
    try:
        length = max(1, values["n_layer"])
        if "layer_pattern" in given:
            values["layer_pattern"] = expand_pattern(pattern, length)
        else:  # a preset's own pattern may be longer than a small model of its kind
            values["layer_pattern"] = expand_pattern(pattern, length + 99)[:length]
        chosen += [component("block", name) for name in dict.fromkeys(values["layer_pattern"])]
    except ValueError as error:
        problems.append(str(error))
        values["layer_pattern"] = ("transformer",) * max(1, values["n_layer"])

    for c in chosen:  # what a component decides itself cannot be overridden to anything else
        for key, value in c.fixes:
            if given.get(key, value) != value:
                problems.append(
                    f"{key}={given[key]!r} has no effect with {c.kind}={c.name!r}, whose {key} is "
                    f"{value!r}. Leave it out or choose another {c.kind}."
                )
            values[key] = value
    used = {key for c in chosen if c.kind != "rope_scaling" for key in c.uses}
    if "rope_scaling" in used:  # itself a part with keys of its own
        used |= {key for c in chosen if c.kind == "rope_scaling" for key in c.uses}
    optional = {key for kind in COMPONENT_KINDS for c in components(kind).values() for key in c.uses}
    for key in sorted(optional - used - {"block_size"}):  # block_size is also the length of a sequence
        if key in given:
            readers = [f"{c.kind}={c.name!r}" for kind in COMPONENT_KINDS for c in components(kind).values() if key in c.uses]
            if any(reader.split("=")[0] in unknown_kinds for reader in readers):
                continue  # perhaps the part that was meant reads it
            problems.append(f"{key}={given[key]!r} has no effect on this model: only {' or '.join(readers)} reads it.")
        values[key] = None

    heads, width = values["n_head"], values["n_embd"]
    if values.get("head_dim") is None:
        uneven = heads >= 1 and width >= 1 and width % heads
        if uneven:
            problems.append(_uneven_heads(heads, width))
        values["head_dim"] = 2 if uneven else max(1, width // max(1, heads))
    if values.get("attention_scale") == max(1, values["head_dim"]) ** -0.5:
        values["attention_scale"] = None  # what it is anyway
    problems += _settle_d_ff(values, given, width, usable=not problems)
    if "sliding_window" in used and values.get("sliding_window") is None:
        problems.append("layer_pattern has the block 'sliding', which needs a width; give --sliding_window=….")
    if not next(c for c in chosen if c.kind == "ffn_type").fixes:
        problems += [
            f"ffn_type={values['ffn_type']!r} with activation={values['activation']!r} is ffn_type={c.name!r}; say "
            f"so, or choose another activation."
            for c in components("ffn_type").values()
            if values["ffn_type"] == "gated"
            and getattr(c.build, "gated", False)
            and dict(c.fixes).get("activation") == values["activation"]
        ]
    kv_heads = max((k for k in range(1, heads // group + 1) if heads % k == 0), default=1)
    derived = dict(n_kv_head=kv_heads, d_ff=1, qkv_bias=values["bias"])
    derived |= {key: value for key, value in _DERIVED.items() if key in used}
    for key, value in derived.items():
        if values.get(key) is None:
            values[key] = value
    try:
        config = ModelConfig(**values)
    except ValueError as error:
        problems += str(error).split("\n")
    if problems:
        raise ValueError("\n".join(problems))
    return config


def _converted(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Overrides as the types their fields declare, and a sentence for each that is unknown or of another type."""
    kinds, converted, problems = typing.get_type_hints(ModelConfig), {}, []
    for key, value in given.items():
        if key not in kinds:
            problems.append(f"{key!r} is not a key of a model{did_you_mean(key, kinds)}.")
        elif key == "layer_pattern":
            if isinstance(value, str) or (isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)):
                converted[key] = value
            else:
                problems.append(f"layer_pattern={value!r} is not a text or a list of block names.")
        elif (as_declared := as_type(kinds[key], value)) is NO:
            problems.append(f"{key}={value!r} is not {type_in_words(kinds[key])}.")
        elif as_declared is not None:
            converted[key] = as_declared
    return converted, problems


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
