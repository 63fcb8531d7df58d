"""The parts beyond GPT-2's and LLaMA's, each against its formula, a slow loop, or another implementation."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, crossed

from flops_parameter_counting.flops import flops_per_token
from flops_parameter_counting.parameters import count_parameters, parts
from model_builder import build_model
from model_components import AttentionRules, Context, FlexAttention, KVCache
from model_config import PRESETS, component, components, resolve

TRAINABLE = [name for name in components("attention_backend") if name != "flex"]  # which has no backward pass on a CPU


def tokens(batch: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(60, (batch, length), generator=torch.Generator().manual_seed(length))


def perturbed(config, scale: float = 0.2):
    """A model whose every parameter is off its initial value."""
    model, generator = build_model(config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------- attention, by loops


def press_slopes(n: int) -> list[float]:
    """The slopes of ALiBi as its authors' released code has them (Press et al. 2021)."""
    if math.log2(n).is_integer():
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]
    below = 2 ** math.floor(math.log2(n))
    return press_slopes(below) + press_slopes(2 * below)[0::2][: n - below]


def attention_by_loops(q, k, v, scale, softcap=None, window=None, slopes=None):
    """One head after another, one score after another; the queries are the last of the keys' tokens."""
    B, H, T, _ = q.shape
    K, S = k.shape[1:3]
    rows = []
    for b, h, t in itertools.product(range(B), range(H), range(T)):
        i, key_head = S - T + t, h // (H // K)
        seen = [j for j in range(S) if j <= i and (window is None or i - j < window)]
        scores = []
        for j in seen:
            score = (q[b, h, t] * k[b, key_head, j]).sum() * scale
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            if slopes is not None:
                score = score - slopes[h] * (i - j)
            scores.append(score)
        weights = torch.stack(scores).exp()
        rows.append(sum(weight * v[b, key_head, j] for weight, j in zip(weights / weights.sum(), seen)))
    return torch.stack(rows).view(B, H, T, -1)


LIMITS = {
    "scale": dict(),
    "window 1": dict(window=1),
    "window 3": dict(window=3),
    "window 6": dict(window=6),
    "window 50": dict(window=50),
    "softcap": dict(softcap=0.8),
    "alibi": dict(slopes=press_slopes(4)),
    "all": dict(window=4, softcap=1.5, slopes=press_slopes(4)),
}


@pytest.mark.parametrize("new, seen", [(6, 6), (1, 6), (3, 6), (1, 1)])
@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("backend", components("attention_backend"))
def test_attention_under_every_rule_is_the_written_out_sum(backend, limits, new, seen):
    shapes = [(2, 4, new, 8), (2, 2, seen, 8), (2, 2, seen, 8)]
    q, k, v = inputs = [numbers(*shape, seed=i).double().requires_grad_(backend != "flex") for i, shape in enumerate(shapes)]
    limits = LIMITS[limits]
    expected = attention_by_loops(q, k, v, scale=0.6, **limits)
    slopes = torch.tensor(limits["slopes"]) if "slopes" in limits else None
    rules = AttentionRules(scale=0.6, **{**limits, "slopes": slopes})
    attention = component("attention_backend", backend).build
    y = attention.attend(q, k, v, rules, attention.mask(rules, new, seen, q.device, q.dtype))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    if backend != "flex":
        weight = numbers(*y.shape, seed=9).double()
        mine, theirs = (torch.autograd.grad((out * weight).sum(), inputs) for out in (y, expected))
        for one, other in zip(mine, theirs):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n_head", range(1, 33))
def test_the_slopes_of_alibi_are_those_of_its_authors(n_head):
    config = resolve("custom", n_layer=1, n_head=n_head, n_embd=2 * n_head, position_encoding="alibi")
    position = component("position_encoding", "alibi").build(config)
    slopes = position.slopes(position.tables(torch.arange(5)))
    torch.testing.assert_close(slopes.double(), torch.tensor(press_slopes(n_head), dtype=torch.float64), rtol=1e-6, atol=0)


def attention_of(config, x):
    """The output of the first block's attention on x, the tables and the module itself."""
    model = perturbed(config).eval()
    attention = model.blocks[0].attention.sublayer
    return attention(x, Context(config, model.position, torch.arange(x.size(1)), x.dtype)), attention


def heads(x: torch.Tensor, width: int) -> torch.Tensor:
    return x.view(*x.shape[:2], -1, width).transpose(1, 2)


@pytest.mark.parametrize("backend", TRAINABLE)
@pytest.mark.parametrize(
    "overrides",
    [
        dict(sliding_window=3),
        dict(position_encoding="alibi"),
        dict(attention_softcap=0.7),
        dict(attention_scale=0.9),
        dict(sliding_window=4, position_encoding="alibi", attention_softcap=0.7, attention_scale=0.9, head_dim=6),
    ],
    ids=lambda overrides: "-".join(overrides),
)
def test_the_keys_of_attention_reach_the_sum_they_stand_for(overrides, backend):
    base = dict(position_encoding="none", n_kv_head=2, attention_backend=backend)
    config, x = resolve("custom", **{**TINY, **base, **overrides}), numbers(2, 9, 32)
    y, attention = attention_of(config, x)
    d = config.head_dim
    q, k, v = (heads(x @ getattr(attention, f"{name}_proj").weight.t(), d) for name in "qkv")
    by_hand = attention_by_loops(
        q,
        k,
        v,
        overrides.get("attention_scale", 1 / math.sqrt(d)),
        config.attention_softcap,
        config.sliding_window,
        press_slopes(4) if config.position_encoding == "alibi" else None,
    )
    expected = by_hand.transpose(1, 2).flatten(2) @ attention.o_proj.weight.t()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_a_window_as_long_as_the_sequence_changes_nothing_and_a_shorter_one_hides_exactly_what_is_older():
    model, x = perturbed(resolve("custom", **TINY)).eval(), tokens()
    with torch.no_grad():
        logits = model(x)
        for window in (16, 17, 4096):
            windowed = perturbed(resolve("custom", **TINY, sliding_window=window)).eval()
            torch.testing.assert_close(windowed(x), logits, rtol=0, atol=0)
        one_layer = perturbed(resolve("custom", **{**TINY, "n_layer": 1}, sliding_window=4)).eval()
        for changed in range(16):
            other = x.clone()
            other[:, changed] = (other[:, changed] + 1) % 60
            differs = (one_layer(x) - one_layer(other)).abs().amax(dim=(0, 2)) > 1e-6
            assert differs.tolist() == [changed <= t < changed + 4 for t in range(16)]


def test_windows_of_two_layers_reach_as_far_as_their_sum():
    model, x = perturbed(resolve("custom", **TINY, sliding_window=3)).eval(), tokens()
    other = x.clone()
    other[:, 2] = (other[:, 2] + 1) % 60
    with torch.no_grad():
        differs = (model(x) - model(other)).abs().amax(dim=(0, 2)) > 1e-6
    assert differs.tolist() == [2 <= t < 2 + 3 + 2 for t in range(16)]


def test_flex_attention_refuses_what_it_cannot_do_with_the_remedy():
    q = numbers(1, 2, 4, 16)
    with pytest.raises(ValueError, match="cannot train on a CPU.*'sdpa' or 'manual'"):
        FlexAttention.attend(q.clone().requires_grad_(), q, q, AttentionRules(scale=0.25), None)
    with pytest.raises(ValueError, match="no dropout.*--dropout=0"):
        FlexAttention.attend(q, q, q, AttentionRules(scale=0.25, dropout=0.1), None)


# ------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("n_embd", [32, 33])
def test_sinusoidal_positions_are_the_papers_position_by_position(n_embd):
    config = resolve("custom", n_layer=1, n_head=1, n_embd=n_embd, position_encoding="sinusoidal")
    position = component("position_encoding", "sinusoidal").build(config)
    at = torch.tensor([0, 1, 2, 7, 100, 1023])
    x = numbers(2, len(at), n_embd)
    expected = x.double().clone()
    for t, pos in enumerate(at.tolist()):
        for i in range(n_embd):
            angle = pos / 10000 ** (2 * (i // 2) / n_embd)
            expected[:, t, i] += math.sin(angle) if i % 2 == 0 else math.cos(angle)
    torch.testing.assert_close(position.embed(x, at).double(), expected, rtol=0, atol=2e-4)
    assert list(position.parameters()) == []


SCALINGS = [
    ("none", {}),
    ("linear", dict(rope_factor=4.0)),
    ("linear", dict(rope_factor=2.5)),
    ("llama3", {}),
    ("llama3", dict(rope_factor=32.0, rope_low_freq_factor=1.0, rope_high_freq_factor=4.0)),
    ("llama3", dict(rope_factor=2.0, rope_low_freq_factor=1.5, rope_high_freq_factor=6.0, rope_original_context=256)),
]


def rope_with(scaling: str, overrides: dict, head_dim: int, theta: float):
    config = resolve("llama", n_layer=1, n_head=2, n_embd=2 * head_dim, rope_theta=theta, rope_scaling=scaling, **overrides)
    return config, component("position_encoding", "rope").build(config)


@pytest.mark.parametrize("head_dim, theta", [(128, 500000.0), (64, 10000.0), (16, 100.0)])
@pytest.mark.parametrize("scaling, overrides", SCALINGS)
def test_scaled_rope_has_the_frequencies_of_hugging_face(scaling, overrides, head_dim, theta):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config, rope = rope_with(scaling, overrides, head_dim, theta)
    at = torch.tensor([0, 1, 5, 1000])
    cos, sin = rope.tables(at)
    if scaling == "none":
        frequencies = torch.tensor([theta ** (-2 * i / head_dim) for i in range(head_dim // 2)])
    else:
        said = {"rope_type": scaling, "rope_theta": theta, "factor": config.rope_factor}
        if scaling == "llama3":
            said |= dict(
                low_freq_factor=config.rope_low_freq_factor,
                high_freq_factor=config.rope_high_freq_factor,
                original_max_position_embeddings=config.rope_original_context,
            )
        theirs = LlamaConfig(
            hidden_size=2 * head_dim,
            num_attention_heads=2,
            head_dim=head_dim,
            rope_parameters=said,
            max_position_embeddings=131072,
        )
        frequencies, factor = ROPE_INIT_FUNCTIONS[scaling](theirs, torch.device("cpu"))
        assert factor == 1.0
    angle = at.float()[:, None] * torch.cat((frequencies, frequencies))
    torch.testing.assert_close(cos, angle.cos(), rtol=0, atol=2e-4)
    torch.testing.assert_close(sin, angle.sin(), rtol=0, atol=2e-4)


def test_llama3s_scaling_keeps_short_waves_and_stretches_long_ones():
    _, plain = rope_with("none", {}, 128, 500000.0)
    _, scaled = rope_with("llama3", dict(rope_factor=8.0, rope_original_context=8192), 128, 500000.0)
    one = torch.tensor([1])
    before, after = (torch.atan2(*reversed(rope.tables(one)))[0, :64].double() for rope in (plain, scaled))
    ratio = before / after
    wave = 2 * math.pi / before
    torch.testing.assert_close(ratio[wave < 8192 / 4], torch.ones_like(ratio[wave < 8192 / 4]), rtol=1e-5, atol=0)
    torch.testing.assert_close(ratio[wave > 8192], torch.full_like(ratio[wave > 8192], 8.0), rtol=1e-4, atol=0)
    between = ratio[(wave > 8192 / 4) & (wave < 8192)]
    assert len(between) and bool((between.diff() > 0).all()) and bool(((between > 1) & (between < 8)).all())


@pytest.mark.parametrize("scaling, overrides", SCALINGS)
def test_scores_under_scaled_rope_depend_on_the_distance_alone(scaling, overrides):
    _, rope = rope_with(scaling, overrides, 16, 10000.0)
    q, k = numbers(1, 2, 1, 16), numbers(1, 2, 1, 16, seed=1)

    def score(at_query: int, at_key: int):
        turned_q = rope.rotate(q, q, rope.tables(torch.tensor([at_query])))[0]
        return (turned_q * rope.rotate(k, k, rope.tables(torch.tensor([at_key])))[1]).sum(-1)

    for distance in (0, 1, 7, 100):
        scores = torch.stack([score(start + distance, start) for start in (0, 3, 50, 500)])
        torch.testing.assert_close(scores, scores[:1].expand_as(scores), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(score(7, 0), score(0, 0), atol=1e-2)


def test_linear_scaling_by_two_is_every_second_position():
    _, plain = rope_with("none", {}, 16, 10000.0)
    _, scaled = rope_with("linear", dict(rope_factor=2.0), 16, 10000.0)
    for one, other in zip(scaled.tables(torch.arange(0, 20, 2)), plain.tables(torch.arange(10))):
        torch.testing.assert_close(one, other)


# ------------------------------------------------------------------------------------------- causality

PATTERNS = [",".join(pair) for pair in itertools.product(components("block"), repeat=2) if pair != ("mlp", "mlp")]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("norm_position", components("norm_position"))
@pytest.mark.parametrize("position_encoding", components("position_encoding"))
def test_no_token_changes_the_logits_before_it_whichever_it_is(position_encoding, norm_position, pattern):
    scalings = components("rope_scaling") if position_encoding == "rope" else [None]
    for backend, scaling in itertools.product(TRAINABLE, scalings):
        window = dict(sliding_window=3) if "sliding" in pattern else {}
        config = resolve(
            "custom",
            **TINY,
            position_encoding=position_encoding,
            norm_position=norm_position,
            **window,
            layer_pattern=pattern,
            rope_scaling=scaling,
            attention_backend=backend,
            attention_softcap=2.0,
            qk_norm="full",
            n_kv_head=2,
            embedding_norm=True,
            embedding_scale=True,
            logit_softcap=5.0,
        )
        x = tokens(batch=1, length=10)
        changed = x.repeat(10, 1)
        changed[torch.arange(10), torch.arange(10)] = (x[0] + 1) % 60  # row t has another token at t
        with torch.no_grad():
            before, after = perturbed(config).eval()(torch.cat((x, changed))).split([1, 10])
        difference = (after - before).abs().amax(dim=-1)
        for t in range(10):
            assert difference[t, :t].max() < 1e-6 if t else True
            assert difference[t, t] > 1e-4


# ------------------------------------------------------------------------------------------- the cache

CACHED = {
    "window 1": dict(sliding_window=1),
    "window 3": dict(sliding_window=3),
    "window 9": dict(sliding_window=9),
    "window over block_size": dict(sliding_window=99),
    "alibi": dict(position_encoding="alibi"),
    "sinusoidal": dict(position_encoding="sinusoidal"),
    "llama3": dict(rope_scaling="llama3", rope_original_context=8),
    "soft caps": dict(attention_softcap=1.0, logit_softcap=3.0),
    "qk_norm full": dict(qk_norm="full"),
    "mixed": dict(
        layer_pattern="sliding,transformer",
        sliding_window=4,
        position_encoding="alibi",
        attention_softcap=2.0,
        norm_position="sandwich",
        embedding_scale=True,
        embedding_norm=True,
    ),
}


@pytest.mark.parametrize("backend", components("attention_backend"))
@pytest.mark.parametrize("case", CACHED)
def test_with_the_cache_as_without_in_any_division(case, backend):
    model = perturbed(resolve("custom", **TINY, n_kv_head=2, attention_backend=backend, **CACHED[case])).eval()
    x = tokens()
    with torch.no_grad():
        whole = model(x)
        for pieces in ([16], [1] * 16, [5, 1, 7, 3], [2, 14])[2 if backend == "flex" else 0 :]:  # flex is slow on a CPU
            cache = KVCache(model.config, 2, 16, torch.float32, "cpu")
            logits = torch.cat([model(piece, cache) for piece in x.split(pieces, dim=1)], dim=1)
            torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [1, 5, 14, 16, 20])  # windows shorter and longer than the prompt, prompts past block_size
@pytest.mark.parametrize("case", CACHED)
def test_generation_with_the_cache_is_generation_without(case, length):
    model, x = perturbed(resolve("custom", **TINY, n_kv_head=2, **CACHED[case]), scale=0.3), tokens(length=length)
    cached, plain = (model.generate(x, 8, temperature=0.0, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain) and cached.shape == (2, length + 8)
    by_hand = x
    with torch.no_grad():
        for _ in range(8):
            by_hand = torch.cat((by_hand, model.eval()(by_hand[:, -16:])[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(cached, by_hand)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_generates_with_the_cache_as_without(preset):
    model, x = perturbed(resolve(preset, **TINY), scale=0.3), tokens(length=5)
    assert torch.equal(*(model.generate(x, 15, temperature=0.0, use_cache=use) for use in (True, False)))


# ------------------------------------------------------------------------------------------- norms of queries and keys


def rms(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize("qk_norm", [False, True, "full"])
def test_queries_and_keys_are_normed_per_head_or_all_heads_together(qk_norm, n_kv_head):
    config = resolve("custom", **TINY, n_kv_head=n_kv_head, qk_norm=qk_norm, position_encoding="none", norm_eps=1e-3)
    x = numbers(2, 7, 32)
    y, attention = attention_of(config, x)
    d = config.head_dim
    q, k, v = (x @ getattr(attention, f"{name}_proj").weight.t() for name in "qkv")
    if qk_norm == "full":
        assert attention.q_norm.weight.shape == (4 * d,) and attention.k_norm.weight.shape == (n_kv_head * d,)
        q, k = rms(q, attention.q_norm.weight, 1e-3), rms(k, attention.k_norm.weight, 1e-3)
    q, k, v = (heads(z, d) for z in (q, k, v))
    if qk_norm is True:
        assert attention.q_norm.weight.shape == attention.k_norm.weight.shape == (d,)
        q, k = rms(q, attention.q_norm.weight, 1e-3), rms(k, attention.k_norm.weight, 1e-3)
    by_hand = attention_by_loops(q, k, v, 1 / math.sqrt(d)).transpose(1, 2).flatten(2) @ attention.o_proj.weight.t()
    torch.testing.assert_close(y, by_hand, rtol=1e-4, atol=1e-5)
    assert ("QKNormFull" in config.name, "QKNorm" in config.name) == (qk_norm == "full", bool(qk_norm))


# ------------------------------------------------------------------------------------------- the whole model, by hand


@pytest.mark.parametrize("normalization", components("normalization"))
@pytest.mark.parametrize("norm_position", components("norm_position"))
def test_a_model_is_its_branches_composed_by_hand(norm_position, normalization):
    model = perturbed(resolve("custom", **TINY, norm_position=norm_position, normalization=normalization)).eval()
    x = tokens()
    context = Context(model.config, model.position, torch.arange(16), torch.float32)
    h = model.embedding.weight[x]
    for block in model.blocks:
        for branch, inputs in ((block.attention, (context,)), (block.feed_forward, ())):
            f = lambda z, branch=branch, inputs=inputs: branch.sublayer(z, *inputs)
            h = {
                "pre": lambda: h + f(branch.norm(h)),
                "post": lambda: branch.norm(h + f(h)),
                "output": lambda: h + branch.norm(f(h)),
                "sandwich": lambda: h + branch.output_norm(f(branch.norm(h))),
            }[norm_position]()
    torch.testing.assert_close(model(x), model.norm(h) @ model.head.weight.t())


@pytest.mark.parametrize("position_encoding", components("position_encoding"))
@pytest.mark.parametrize("scale, norm", [(True, False), (False, True), (True, True)])
def test_embeddings_are_scaled_then_given_positions_then_normed(scale, norm, position_encoding):
    config = resolve("gpt2", **TINY, embedding_scale=scale, embedding_norm=norm, position_encoding=position_encoding)
    model, x = perturbed(config).eval(), tokens()
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0]))
    model(x)
    expected = model.embedding.weight[x] * (math.sqrt(32) if scale else 1.0)
    expected = model.position.embed(expected, torch.arange(16))
    if norm:
        own = model.embedding_norm
        centred = expected - expected.mean(-1, keepdim=True)
        expected = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * own.weight + own.bias
        assert own is not model.norm and count_parameters(config) == sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_the_final_cap_bounds_the_logits_and_keeps_their_order(cap):
    model, plain = (perturbed(resolve("llama", **TINY, logit_softcap=value)).eval() for value in (cap, None))
    with torch.no_grad():
        capped, free = model(tokens()), plain(tokens())
    torch.testing.assert_close(capped, cap * torch.tanh(free / cap))
    assert capped.abs().max() <= cap and not torch.allclose(capped, free)


# ------------------------------------------------------------------------------------------- initial weights


@pytest.mark.parametrize("pattern", ["transformer", "transformer,mlp", "sliding,transformer"])
@pytest.mark.parametrize("preset", [*map(crossed, PRESETS)])
def test_zero_init_makes_every_block_the_identity_at_the_start(preset, pattern):
    window = dict(sliding_window=3) if "sliding" in pattern else {}
    config = resolve(preset, **TINY, zero_init=True, layer_pattern=pattern, **window)
    model, x = build_model(config).eval(), tokens()
    embedded = []
    model.blocks[0].register_forward_pre_hook(lambda block, inputs: embedded.append(inputs[0]))
    logits = model(x)
    h = embedded[0]
    if config.norm_position == "post":  # each branch adds nothing, but norms the stream
        for block in model.blocks:
            for branch in block.children():
                h = branch.norm(h)
    expected = model.norm(h) @ model.head.weight.t()
    if config.logit_softcap is not None:
        expected = config.logit_softcap * torch.tanh(expected / config.logit_softcap)
    assert torch.equal(logits, expected) or torch.allclose(logits, expected, rtol=1e-6, atol=1e-7)
    zero = {name for name, p in model.named_parameters() if p.dim() == 2 and not p.any()}
    assert zero == {name for name, p in model.named_parameters() if name.endswith(("o_proj.weight", "down_proj.weight"))}


@pytest.mark.parametrize("norm_position", components("norm_position"))
def test_a_model_that_starts_at_zero_learns(norm_position):
    model = build_model(resolve("modern", **TINY, norm_position=norm_position))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, losses = tokens(batch=8), []
    for _ in range(12):
        loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


# ------------------------------------------------------------------------------------------- feed-forward


def test_the_parts_of_the_modern_preset_with_a_gate_are_their_formula():
    ffn = perturbed(resolve("modern", **TINY, ffn_type="gated", bias=True)).blocks[0].feed_forward.sublayer
    x = numbers(2, 5, 32)
    gate, up = (x @ proj.weight.t() + proj.bias for proj in (ffn.gate_proj, ffn.up_proj))
    hidden = torch.where(gate > 0, gate * gate, torch.zeros(())) * up
    torch.testing.assert_close(ffn(x), hidden @ ffn.down_proj.weight.t() + ffn.down_proj.bias)


@pytest.mark.parametrize(
    "preset, overrides, d_ff",
    [
        ("gpt2", dict(ffn_expansion_ratio=2.0), 1536),
        ("gpt2", dict(ffn_expansion_ratio=3.5), 2688),
        ("gpt2", dict(ffn_multiple=1000), 4000),
        ("gpt2", dict(ffn_multiple=3072), 3072),
        ("gpt2", dict(ffn_expansion_ratio=0.5, ffn_multiple=256), 512),
        ("llama", dict(ffn_expansion_ratio=3.5), 2688),
        ("llama", dict(ffn_expansion_ratio=8 / 3), 2048),
        ("llama", dict(ffn_multiple=1), 2048),
        ("llama", dict(ffn_multiple=100), 2100),
        ("llama", dict(n_embd=1000, n_head=10, ffn_multiple=1), 2667),
        ("llama3", dict(n_embd=4096, n_head=32, ffn_expansion_ratio=1.3 * 8 / 3, ffn_multiple=1024), 14336),  # LLaMA 3 8B
        ("llama3", dict(n_embd=8192, n_head=64, ffn_expansion_ratio=1.3 * 8 / 3, ffn_multiple=4096), 28672),  # LLaMA 3 70B
        ("llama", dict(n_embd=4096, n_head=32), 11008),
        ("llama", dict(n_embd=4096, n_head=32, ffn_multiple=256), 11008),
    ],
)
def test_d_ff_follows_from_a_ratio_and_a_multiple(preset, overrides, d_ff):
    config = resolve(preset, **overrides)
    assert config.d_ff == d_ff
    assert config.ffn_expansion_ratio is None and config.ffn_multiple is None
    shape = {key: value for key, value in overrides.items() if not key.startswith("ffn_")}
    assert config == resolve(preset, **shape, d_ff=d_ff)  # the same model, however it was said


# ------------------------------------------------------------------------------------------- windows in the FLOP count

WINDOWS = [(1, 1), (1, 16), (3, 16), (15, 16), (16, 16), (17, 16), (100, 16), (256, 1024), (4096, 1024)]


def attention_flops(config, context: int) -> tuple[int, int]:
    """(full, causal) of attention alone: without the matrix products, which a count with no layer sees in the parts."""
    flops, products = flops_per_token(config, context=context), 6 * sum(part.matmul for part in parts(config))
    return flops.full - products, flops.causal - products


@pytest.mark.parametrize("window, context", WINDOWS)
def test_a_window_costs_what_its_tokens_see(window, context):
    config = resolve("llama", **TINY, n_kv_head=2, head_dim=6, sliding_window=window)
    full, causal = attention_flops(config, context)
    each = 12 * config.n_layer * config.n_head * config.head_dim  # forward and backward, of a token that sees one
    assert full == each * min(window, context)
    # Token i of T sees min(i, w): w(w + 1)/2 + (T - w)w of them in all. The convention takes w²/2 for the triangle at the
    # start (T/2 on average without a window, where (T + 1)/2 is exact): w/2 less.
    exact = Fraction(sum(min(i, window) for i in range(1, context + 1)), context)
    convention = exact - Fraction(min(window, context), 2 * context)
    assert abs(causal - each * convention) <= Fraction(1, 2)
    if window >= context:
        plain = flops_per_token(resolve("llama", **TINY, n_kv_head=2, head_dim=6), context=context)
        assert flops_per_token(config, context=context) == plain
        assert causal == each * context // 2


def test_only_the_sliding_layers_of_a_pattern_are_cheaper():
    shape = {**TINY, "n_layer": 4, "block_size": 64}
    plain, mixed, all_of_them = (
        attention_flops(resolve("custom", **shape, layer_pattern=pattern, **window), 64)
        for pattern, window in (
            ("transformer", {}),
            ("sliding,transformer", dict(sliding_window=8)),
            ("sliding", dict(sliding_window=8)),
        )
    )
    for convention in (0, 1):
        assert mixed[convention] * 2 == plain[convention] + all_of_them[convention]
    assert all_of_them[0] * 8 == plain[0]


def test_recomputing_windows_costs_their_own_forward_once_more():
    config = resolve("llama", **TINY, sliding_window=4)
    flops = flops_per_token(config, checkpointing="full")
    blocks = sum(part.matmul for part in parts(config) if part.name.startswith("blocks."))
    assert flops.hardware - flops.full == 2 * blocks + 4 * 2 * 32 * 4


# ------------------------------------------------------------------------------------------- presets and patterns


@pytest.mark.parametrize(
    "n_layer, blocks", [(1, ["sliding"]), (2, ["sliding", "transformer"]), (3, ["sliding", "transformer", "sliding"])]
)
def test_gemma2s_pattern_is_cut_to_the_layers_there_are(n_layer, blocks):
    config = resolve("gemma2", **{**TINY, "n_layer": n_layer})
    assert list(config.layer_pattern) == blocks
    assert build_model(config)(tokens()).shape == (2, 16, 61)
    assert resolve("custom", **config.to_dict()) == config
    with pytest.raises(ValueError, match="layer_pattern names 4 layers"):  # a pattern the user gives is not cut
        resolve("gemma2", **{**TINY, "n_layer": n_layer}, layer_pattern="sliding,transformer,sliding,transformer")


@pytest.mark.parametrize("n_layer", [1, 2, 3])
def test_all_layers_of_mistral_slide_whatever_its_depth(n_layer):
    config = resolve("mistral", **{**TINY, "n_layer": n_layer})
    assert config.layer_pattern == ("sliding",) * n_layer and config.sliding_window == 4096
    assert [block.attention.sublayer.window for block in build_model(config).blocks] == [4096] * n_layer


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_its_pattern_at_any_depth(preset):
    full = resolve(preset, n_layer=12).layer_pattern
    for n_layer in range(1, 12):
        assert resolve(preset, n_layer=n_layer).layer_pattern == full[:n_layer]


@pytest.mark.parametrize(
    "preset, n_head, n_kv_head",
    [
        ("llama3", 32, 8),
        ("llama3", 12, 3),
        ("llama3", 1, 1),
        ("llama3", 2, 1),
        ("llama3", 18, 3),
        ("llama3", 7, 1),
        ("qwen3", 16, 8),
        ("qwen3", 1, 1),
        ("mistral", 32, 8),
        ("gemma2", 8, 4),
        ("llama", 12, 12),
        ("gpt2", 12, 12),
    ],
)
def test_key_heads_follow_from_the_query_heads_in_the_presets_proportion(preset, n_head, n_kv_head):
    assert resolve(preset, n_layer=1, n_head=n_head, n_embd=16 * n_head).n_kv_head == n_kv_head


@pytest.mark.parametrize(
    "preset, overrides",
    [
        ("gemma2", dict(attention_softcap=0)),
        ("gemma2", dict(logit_softcap=0.0)),
        ("mistral", dict(sliding_window=0)),
        ("gemma2", dict(layer_pattern="transformer")),
        ("mistral", dict(layer_pattern="transformer")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_what_a_preset_switches_on_can_be_switched_off(preset, overrides):
    config = resolve(preset, **TINY, **overrides)
    for key in overrides:
        assert getattr(config, "sliding_window" if key == "layer_pattern" else key) is None
    assert config.name != resolve(preset, **TINY).name
    assert resolve("custom", **config.to_dict()) == config


@pytest.mark.parametrize(
    "key, one, other",
    [
        ("rope_original_context", 1048576, 1048577),
        ("rope_factor", 8.0, 8.0000001),
        ("rope_high_freq_factor", 4.0, 4.0000001),
        ("attention_scale", 0.1, 0.10000001),
        ("attention_softcap", 50.0, 50.000001),
        ("logit_softcap", 30.0, 30.000001),
        ("sliding_window", 1048576, 1048577),
    ],
)
def test_close_values_are_two_models_with_two_names(key, one, other):
    beside = dict(rope_scaling="llama3") if key.startswith("rope_") else {}
    a, b = (resolve("llama", **TINY, **beside, **{key: value}) for value in (one, other))
    assert a.name != b.name and a.fingerprint != b.fingerprint


@pytest.mark.parametrize(
    "backend, case",
    [
        pytest.param(backend, case, marks=() if (case == "mixed") == (backend == "sdpa") else pytest.mark.slow)
        for backend in TRAINABLE
        for case in ("window 3", "alibi", "soft caps", "qk_norm full", "mixed")
    ],
)
def test_blocks_compile_whole_and_give_the_same_gradients(case, backend):
    config, x = resolve("custom", **TINY, n_kv_head=2, attention_backend=backend, **CACHED[case]), tokens()
    gradients = []
    for compiled in (False, True):
        model = perturbed(config)
        for block in model.blocks if compiled else ():
            block.compile(backend="aot_eager", fullgraph=True)
        F.cross_entropy(model(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
        gradients.append([p.grad for p in model.parameters()])
    torch._dynamo.reset()
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
