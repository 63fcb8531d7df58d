"""FLOPs, forward and backward and part by part, against PyTorch's counter; what that counter does not count, by hand.

test_every_key.py holds the total of every component against the counter, test_model_config.py N and FLOPs against
published figures, test_new_parts.py the windows.
"""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from conftest import crossed, pytorchs_flops
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from flops_parameter_counting.flops import breakdown, elementwise, flops_per_token
from flops_parameter_counting.parameters import count_parameters
from model_builder import build_model
from model_components import Linear, register_block
from model_config import COMPONENT_KINDS, PRESETS, components, linear_part, resolve, unregister

T, WINDOW = 12, 5
TINY = dict(n_layer=2, n_head=4, n_embd=32, vocab_size=61, block_size=T)
CASES = [
    crossed(preset, kind, name) for kind in COMPONENT_KINDS for name in components(kind) for preset in PRESETS if name != "flex"
]  # no backward pass without a GPU


def with_component(kind: str, name: str, preset: str):
    """A tiny model of this preset with this component, grouped queries, and where it may be one sliding layer."""
    choice = {kind: name}
    if kind == "block":
        choice = dict(layer_pattern=f"transformer,{name}")
    elif kind == "activation" and resolve(preset).ffn_type != "standard":
        choice["ffn_type"] = "standard"
    elif kind == "rope_scaling":
        choice["position_encoding"] = "rope"
    elif (kind, name) == ("ffn_type", "gated"):
        choice["activation"] = "relu2"
    if kind != "block":
        choice["layer_pattern"] = "sliding,transformer"
    if "sliding" in choice["layer_pattern"]:
        choice["sliding_window"] = WINDOW
    return resolve(preset, **{**TINY, "n_kv_head": 2, "head_dim": 12, **choice})


def beyond_windows(config) -> int:
    """4·H·d FLOPs a token and layer for each key beyond a sliding window: the counter, which sees a masked full product,
    counts them, and ours does not."""
    return sum(
        4 * config.n_head * config.head_dim * (T - min(T, config.sliding_window))
        for block in config.layer_pattern
        if block == "sliding"
    )


@pytest.mark.parametrize("kind, name, preset", CASES)
def test_forward_and_backward_are_pytorchs_count_but_for_what_a_window_hides(kind, name, preset):
    config = with_component(kind, name, preset)
    rows = breakdown(config)
    forward, backward = pytorchs_flops(config)
    assert forward == 2 * T * (sum(row.forward for row in rows) + beyond_windows(config))
    assert backward == 2 * T * (sum(row.backward for row in rows) + 2 * beyond_windows(config))


@pytest.mark.parametrize("preset", [*map(crossed, PRESETS)])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        dict(n_kv_head=1),
        dict(layer_pattern="transformer,mlp,transformer"),
        dict(bias=True, qk_norm=True, pad_vocab_multiple=16),
    ],
    ids=str,
)
def test_every_component_costs_what_its_own_module_does(preset, overrides):
    """Forward FLOPs by component against the counter's own books, which it keeps by module."""
    config = resolve(preset, **{**TINY, "n_layer": 3, **overrides})
    model = build_model(config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.zeros(1, T, dtype=torch.long))
    books = {name.partition(".")[2]: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}

    def of(*modules: str) -> int:
        return sum(books.get(name, 0) for name in modules)

    for row in breakdown(config):
        word = row.name.split(" ")[0]
        blocks = [f"blocks.{layer}" for layer in range(config.n_layer)]
        if word.endswith("_proj"):
            found = of(*(f"{block}.{branch}.sublayer.{word}" for block in blocks for branch in ("attention", "feed_forward")))
        elif word == "attention":  # the two products, without the projections around them
            found = of(*(f"{block}.attention.sublayer" for block in blocks)) - of(
                *(f"{block}.attention.sublayer.{x}_proj" for block in blocks for x in "qkvo")
            )
            same = [r for r in breakdown(config) if r.name.startswith("attention")]
            assert found == T * sum(r.forward for r in same)  # windows here are wider than the context
            continue
        elif word == "head":
            found = T * 2 * config.padded_vocab_size * config.n_embd
            assert sum(books[name] for name in ("",)) == T * sum(r.forward for r in breakdown(config))
        else:  # norms, look-ups: no product
            found = of(
                "embedding",
                "position",
                "position.table",
                "norm",
                *(
                    f"{block}.{branch}.{norm}"
                    for block in blocks
                    for branch in ("attention", "feed_forward")
                    for norm in ("norm", "output_norm", "sublayer.q_norm", "sublayer.k_norm")
                ),
            )
            assert found == 0
        assert row.forward * T == found, row.name


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("context", [1, 7, T, 300])
@pytest.mark.parametrize("preset", [*map(crossed, PRESETS)])
def test_the_parts_add_up_to_the_three_figures_and_to_n(preset, context, checkpointing):
    config = resolve(preset, **TINY)
    rows, flops = breakdown(config, context, checkpointing), flops_per_token(config, context, checkpointing)
    assert sum(row.forward + row.backward for row in rows) == flops.full
    assert sum(row.forward + row.backward + row.recompute for row in rows) == flops.hardware
    assert abs(sum(row.causal for row in rows) - flops.causal) <= Fraction(1, 2)  # which is rounded
    assert sum(row.parameters for row in rows) == count_parameters(config)
    assert all(row.backward == 2 * row.forward for row in rows)
    assert len({row.name for row in rows}) == len(rows)


def test_fused_kernels_recompute_the_scores_which_no_mfu_counts():
    """On a GPU the counter finds a fused attention kernel and books five products in backward: the scores once more."""
    H, d, B = 4, 12, 2
    q = k = v = (B, H, T, d)
    forward = flop_registry[torch.ops.aten._scaled_dot_product_flash_attention]
    backward = flop_registry[torch.ops.aten._scaled_dot_product_flash_attention_backward]
    tensors = [torch.empty(shape, device="meta") for shape in (q, k, v)]
    ours = 4 * H * d * T * B * T
    assert forward(*tensors, out_val=None) == ours
    assert backward(torch.empty(q, device="meta"), *tensors, out_val=None) == 2 * ours + ours // 2


# ------------------------------------------------------------------------------------------- parts that come later


@pytest.fixture
def mixer():
    @register_block("mixer", short="mixer", has_attention=True)
    class Mixer(nn.Module):
        """Mixes channels twice over, and knows nothing of attention."""

        def __init__(self, config, layer):
            super().__init__()
            self.into, self.out = Linear(config.n_embd, 7, False), Linear(7, config.n_embd, True)

        @staticmethod
        def parts(config):
            return [linear_part("into", config.n_embd, 7, False), linear_part("out", 7, config.n_embd, True)]

        def forward(self, x, context):
            return x + self.out(self.into(x).relu())

    yield Mixer
    unregister("block", "mixer")


def test_a_component_registered_elsewhere_brings_its_own_count(mixer):
    config = resolve("llama", **{**TINY, "n_layer": 3}, layer_pattern="mixer,transformer,mixer")
    rows = {row.name: row for row in breakdown(config, checkpointing="full")}
    assert rows["into"].count == 2 and rows["into"].parameters == 2 * 7 * 32
    assert rows["into"].forward == rows["into"].recompute == 2 * 2 * 7 * 32
    forward, backward = pytorchs_flops(config)
    assert forward == 2 * T * sum(row.forward for row in rows.values())
    assert backward == 2 * T * sum(row.backward for row in rows.values())
    assert elementwise(config)[""] == 2 * (32 + 7)  # residual addition and ReLU of two layers, in no module of their own


# ------------------------------------------------------------------------------------------- what is not counted


def test_elementwise_work_is_what_the_formulas_need():
    config = resolve("llama", n_layer=2, n_head=4, n_embd=64, n_kv_head=2, d_ff=96, vocab_size=61, block_size=T)
    found, H, K, d = elementwise(config), 4, 2, 16
    rotation = 2 * (H + K) * d * Fraction(7, 2)  # two layers: x·cos + rotated·sin, half of it negated
    assert found["position.rotate"] == rotation
    scores = 2 * H * T * (1 + 1 + 5)  # scaled, masked, softmax in five steps
    assert found["attention.sublayer"] == scores + rotation
    assert found["attention"] == found["feed_forward"] == 2 * 64
    assert found["feed_forward.sublayer"] == 2 * 2 * 96  # SiLU, and the product with the gate
    assert 2 * 64 <= found["attention.norm"] <= 2 * 64 * 8  # a few steps for each element
    assert found["attention.norm"] == found["feed_forward.norm"]


@pytest.mark.parametrize("preset", PRESETS)
def test_elementwise_work_is_little_and_needs_no_declaration(preset):
    config = resolve(preset)
    found = elementwise(config)
    total = sum(value for name, value in found.items() if name != "position.rotate")
    assert 0 < total < 0.03 * flops_per_token(config).full / 3
    assert ("position.rotate" in found) == (config.position_encoding == "rope")
