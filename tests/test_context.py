"""What the blocks of one forward pass share is made once: position tables, a mask for each window (issue 9.3)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from model_builder import build_model
from model_components import Context, KVCache, TransformerBlock, register_block
from model_config import component, components, resolve, unregister
from training.activation_checkpointing import apply_activation_checkpointing

TINY = dict(n_layer=4, n_head=4, n_embd=32, vocab_size=61, block_size=16)
TRAINABLE = [name for name in components("attention_backend") if name != "flex"]


def tokens(length: int = 16) -> torch.Tensor:
    return torch.randint(60, (2, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def made(monkeypatch):
    """Counts what a forward pass makes: one entry a call, the window for a mask, 'tables' for position tables."""
    calls = []
    for backend in components("attention_backend").values():
        inner = backend.build.mask
        monkeypatch.setattr(
            backend.build,
            "mask",
            staticmethod(lambda rules, *rest, inner=inner: calls.append(rules.window) or inner(rules, *rest)),
        )
    for encoding in components("position_encoding").values():
        if "tables" in vars(encoding.build):
            inner = encoding.build.tables
            monkeypatch.setattr(encoding.build, "tables", lambda *inputs, inner=inner: calls.append("tables") or inner(*inputs))
    return calls


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (dict(), ["tables", None]),
        (dict(sliding_window=5), ["tables", 5]),
        (dict(sliding_window=5, layer_pattern="sliding,transformer"), ["tables", 5, None]),
        (dict(position_encoding="alibi"), ["tables", None]),
        (dict(layer_pattern="mlp,transformer"), ["tables", None]),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", components("attention_backend"))
def test_tables_and_each_distinct_mask_are_made_once_a_forward_and_not_once_a_layer(made, backend, overrides, expected):
    model = build_model(resolve("custom", **TINY, attention_backend=backend, **overrides)).eval()
    with torch.no_grad():
        model(tokens())
        assert made == expected
        made.clear()
        cache = KVCache(model.config, 2, 16, torch.float32, "cpu")
        model(tokens(7), cache)
        model(tokens(1), cache)
        assert made == 2 * expected


@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_recomputation_in_backward_makes_no_mask_again(made, checkpointing):
    model = build_model(resolve("gemma2", **TINY, sliding_window=5, attention_softcap=0))
    apply_activation_checkpointing(model, checkpointing)
    model(tokens()).sum().backward()
    assert made == ["tables", 5, None]


class Kernels(TorchFunctionMode):
    """Records (has a mask, is causal) of every call of PyTorch's fused attention."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            self.calls.append((kwargs["attn_mask"] is not None, kwargs["is_causal"]))
        return function(*args, **(kwargs or {}))


def test_the_fused_kernel_gets_no_mask_where_there_is_neither_window_nor_slope():
    x = tokens()
    for overrides, expected in (
        (dict(), [(False, True)] * 4),
        (dict(sliding_window=5, layer_pattern="sliding,transformer"), [(True, False), (False, True)] * 2),
        (dict(sliding_window=16), [(False, True)] * 4),  # as long as the sequence
        (dict(position_encoding="alibi"), [(True, False)] * 4),
    ):
        with Kernels() as kernels, torch.no_grad():
            build_model(resolve("custom", **TINY, **overrides))(x)
        assert kernels.calls == expected, overrides


def test_a_block_that_the_model_does_not_know_shares_masks_all_the_same(made):
    @register_block("shrinking", short="shrinking", has_attention=True)
    class Shrinking(TransformerBlock):
        """A transformer block that asks for a window of its own each time."""

        def __init__(self, config, layer):
            super().__init__(config, layer)
            inner = self.attention.sublayer
            inner.register_forward_pre_hook(lambda module, inputs: setattr(module, "window", 3 + layer // 2))

    try:
        build_model(resolve("custom", **TINY, layer_pattern="shrinking"))(tokens())
        assert made == ["tables", None, 3, 4]  # None: what the layers say before the first forward
    finally:
        unregister("block", "shrinking")


def test_compiled_blocks_are_not_compiled_again_for_the_next_batch():
    from torch._dynamo.testing import CompileCounter

    model = build_model(resolve("gemma2", **TINY, sliding_window=5))
    counter = CompileCounter()
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend=counter, fullgraph=True)
    model(tokens()).sum().backward()
    first = counter.frame_count
    for seed in range(2):
        model(torch.randint(60, (2, 16), generator=torch.Generator().manual_seed(seed))).sum().backward()
    torch._dynamo.reset()
    assert 2 <= first == counter.frame_count  # one for each kind of block at least


@pytest.mark.parametrize("backend", TRAINABLE)
@pytest.mark.parametrize("position_encoding", components("position_encoding"))
def test_the_model_is_its_front_its_blocks_and_its_tail(position_encoding, backend):
    config = resolve("gemma2", **TINY, sliding_window=5, position_encoding=position_encoding, attention_backend=backend)
    model = build_model(config)
    x, context = model.front(tokens())
    assert x.shape == (2, 16, 32) and isinstance(context, Context)
    for block in model.blocks:
        x = block(x, context)
    assert torch.equal(model.tail(x), model(tokens()))
    assert torch.equal(model.tail(x, last_only=True), model.tail(x[:, -1:])) and model.tail(x, True).shape == (2, 1, 61)


def test_units_are_every_parameter_once_innermost_first():
    for tied in (True, False):
        model = build_model(resolve("llama", **TINY, weight_tying=tied), device="meta")
        units = list(model.units())
        assert units[-1] is model and all(block in units for block in model.blocks)
        inner = [p for unit in units[:-1] for m in (unit if isinstance(unit, list) else [unit]) for p in m.parameters()]
        assert len(set(map(id, inner))) == len(inner)  # no two units share a parameter
        rest = {id(p) for p in model.parameters()} - set(map(id, inner))
        assert rest == ({id(model.embedding.weight), id(model.norm.weight)} if tied else set())


def test_a_mask_is_in_the_dtype_of_the_residual_stream_and_what_attention_would_add():
    config = resolve("custom", **TINY, position_encoding="alibi", sliding_window=5)
    model = build_model(config)
    model.compute_dtype = torch.bfloat16
    _, context = model.front(tokens())
    mask = context.mask(5)
    assert mask.dtype == torch.bfloat16 and mask.shape == (4, 16, 16)
    slopes = component("position_encoding", "alibi").build(config).tables(torch.arange(16))
    for h in range(4):
        for i in range(16):
            for j in range(16):
                wanted = -float(slopes[h]) * (i - j) if 0 <= i - j < 5 else -float("inf")
                assert float(mask[h, i, j]) == pytest.approx(wanted, rel=2**-7)
