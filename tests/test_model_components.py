"""The parts against independent references: Hugging Face's models, formulas written out, and slow obvious code."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, crossed
from torch.utils._python_dispatch import TorchDispatchMode

from model_builder import build_model, sample_next
from model_components import AttentionRules, KVCache
from model_config import PRESETS, component, components, resolve

TRAINABLE = [name for name in components("attention_backend") if name != "flex"]  # which has no backward pass on a CPU


def tokens(batch: int = 3, length: int = 16, vocab_size: int = 60, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def perturbed(config, seed: int = 1, scale: float = 0.2):
    """A model whose every parameter is off its initial value."""
    model, generator = build_model(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


# ------------------------------------------------------------------------------------------- Hugging Face


def gpt2_names(config) -> dict[str, list[tuple[str, bool]]]:
    """Hugging Face's name → ours, in the order they are joined, and whether it is transposed (Conv1D)."""
    names = {
        "transformer.wte.weight": [("embedding.weight", False)],
        "transformer.wpe.weight": [("position.table.weight", False)],
    }
    for kind in ("weight", "bias"):
        names[f"transformer.ln_f.{kind}"] = [(f"norm.{kind}", False)]
        for i in range(config.n_layer):
            theirs, ours, turned = f"transformer.h.{i}.", f"blocks.{i}.", kind == "weight"
            attention, feed_forward = f"{ours}attention.sublayer.", f"{ours}feed_forward.sublayer."
            names[f"{theirs}ln_1.{kind}"] = [(f"{ours}attention.norm.{kind}", False)]
            names[f"{theirs}ln_2.{kind}"] = [(f"{ours}feed_forward.norm.{kind}", False)]
            names[f"{theirs}attn.c_attn.{kind}"] = [(f"{attention}{x}_proj.{kind}", turned) for x in "qkv"]
            names[f"{theirs}attn.c_proj.{kind}"] = [(f"{attention}o_proj.{kind}", turned)]
            names[f"{theirs}mlp.c_fc.{kind}"] = [(f"{feed_forward}up_proj.{kind}", turned)]
            names[f"{theirs}mlp.c_proj.{kind}"] = [(f"{feed_forward}down_proj.{kind}", turned)]
    return names


def llama_names(config) -> dict[str, list[tuple[str, bool]]]:
    names = {"model.embed_tokens.weight": "embedding.weight", "model.norm.weight": "norm.weight"}
    if not config.weight_tying:
        names["lm_head.weight"] = "head.weight"
    for i in range(config.n_layer):
        theirs, ours = f"model.layers.{i}.", f"blocks.{i}."
        names[f"{theirs}input_layernorm.weight"] = f"{ours}attention.norm.weight"
        names[f"{theirs}post_attention_layernorm.weight"] = f"{ours}feed_forward.norm.weight"
        for x in "qkvo":
            names[f"{theirs}self_attn.{x}_proj.weight"] = f"{ours}attention.sublayer.{x}_proj.weight"
        for x in ("q", "k") if config.qk_norm else ():
            names[f"{theirs}self_attn.{x}_norm.weight"] = f"{ours}attention.sublayer.{x}_norm.weight"
        for x in ("gate", "up", "down"):
            names[f"{theirs}mlp.{x}_proj.weight"] = f"{ours}feed_forward.sublayer.{x}_proj.weight"
    return {theirs: [(ours, False)] for theirs, ours in names.items()}


def assert_equal_to_hugging_face(ours, theirs, names) -> None:
    """Same weights → same logits and same gradients, parameter by parameter."""
    parameters = dict(ours.named_parameters())
    reference = dict(theirs.named_parameters())
    assert set(names) == set(reference)
    used = [name for pieces in names.values() for name, _ in pieces]
    assert sorted(used) == sorted(parameters)

    def theirs_from(values):
        return {
            name: torch.cat([values[piece].t() if turned else values[piece] for piece, turned in pieces], dim=-1)
            for name, pieces in names.items()
        }

    with torch.no_grad():
        for name, value in theirs_from(parameters).items():
            reference[name].copy_(value)
    x = tokens()
    theirs.eval(), ours.eval()
    mine, other = ours(x), theirs(x).logits
    assert mine.shape == other.shape
    assert mine.std() > 0.3  # the comparison sees something
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=2e-5)
    for logits in (mine, other):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
    for name, gradient in theirs_from({name: p.grad for name, p in parameters.items()}).items():
        torch.testing.assert_close(gradient, reference[name].grad, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", TRAINABLE)
def test_the_gpt2_preset_is_hugging_faces_gpt2(backend):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = resolve("gpt2", **TINY, attention_backend=backend)
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=61,
            n_positions=16,
            n_embd=32,
            n_layer=2,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            attn_implementation="eager",
        )
    )
    assert_equal_to_hugging_face(perturbed(config), theirs, gpt2_names(config))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_the_llama_preset_is_hugging_faces_llama(n_kv_head, tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = resolve("llama", **TINY, n_kv_head=n_kv_head, weight_tying=tied, rope_theta=500.0, norm_eps=1e-4)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=config.d_ff,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=n_kv_head,
            max_position_embeddings=16,
            rms_norm_eps=1e-4,
            tie_word_embeddings=tied,
            rope_theta=500.0,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            attn_implementation="eager",
        )
    )
    assert_equal_to_hugging_face(perturbed(config), theirs, llama_names(config))


def test_qk_norm_and_wide_heads_are_hugging_faces_qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = resolve("llama", **TINY, n_kv_head=2, head_dim=16, qk_norm=True, weight_tying=True, rope_theta=1e6, norm_eps=1e-6)
    theirs = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=config.d_ff,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=16,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            rope_theta=1e6,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            attn_implementation="eager",
        )
    )
    assert_equal_to_hugging_face(perturbed(config), theirs, llama_names(config))


# ------------------------------------------------------------------------------------------- norms and activations


def written_down(table: dict, name: str):
    """The formula of a component, or a skip: a part that somebody adds is tested by everything that iterates the registry."""
    if name not in table:
        pytest.skip(f"no formula for {name!r} is written down here")
    return table[name]


NORMS_BY_HAND = dict.fromkeys(("layernorm", "layernorm_nobias", "rmsnorm", "rmsnorm_offset"), True)


def norm_by_hand(name: str, x, weight, bias, eps):
    x = x.double()
    if name.startswith("rmsnorm"):
        weight = 1 + weight if name == "rmsnorm_offset" else weight
        return weight.double() * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    centred = x - x.mean(-1, keepdim=True)
    y = weight.double() * centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", components("normalization"))
def test_a_norm_is_its_formula_with_statistics_in_fp32(name, dtype):
    written_down(NORMS_BY_HAND, name)
    width, eps = 512, 1e-3
    norm = component("normalization", name).build(resolve("custom", norm_eps=eps), width)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.rand(width, generator=generator) + 0.5)
    bias = getattr(norm, "bias", None)
    assert (bias is not None) == (name == "layernorm")
    cast = lambda p: None if p is None else p if name == "rmsnorm_offset" else p.to(dtype)  # whose gain stays in fp32
    # A large offset makes statistics in bf16 (8 bits) useless; small values make eps matter.
    for x in (torch.randn(64, width, generator=generator) + 10, torch.randn(64, width, generator=generator) * 0.01):
        x = x.to(dtype)
        y = norm(x)
        assert y.dtype == dtype
        expected = norm_by_hand(name, x, cast(norm.weight), cast(bias), eps)
        tolerance = dict(rtol=2e-5, atol=2e-5) if dtype == torch.float32 else dict(rtol=2**-7, atol=2**-7)
        torch.testing.assert_close(y.double(), expected, **tolerance)
        if bias is None:  # roundings of single elements average out over a row; a rounded statistic scales it all
            scale = (y * expected).sum(-1) / expected.square().sum(-1)
            assert (scale - 1).abs().max() < 2**-11


ACTIVATIONS_BY_HAND = dict(
    gelu=lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    gelu_tanh=lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    silu=lambda x: x / (1 + math.exp(-x)),
    relu=lambda x: max(x, 0.0),
    leaky_relu=lambda x: x if x > 0 else 0.01 * x,
    relu2=lambda x: x * x if x > 0 else 0.0,
)


@pytest.mark.parametrize("name", components("activation"))
def test_an_activation_is_its_formula(name):
    x = torch.linspace(-4, 4, 81, dtype=torch.float64)
    by_hand = written_down(ACTIVATIONS_BY_HAND, name)
    expected = torch.tensor([by_hand(v) for v in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(component("activation", name).build(x), expected, rtol=1e-12, atol=1e-12)


def feed_forwards() -> list[dict[str, str]]:
    """Every feed-forward with every activation that may be chosen with it."""
    gated = {dict(c.fixes)["activation"] for c in components("ffn_type").values() if c.fixes}
    return [
        dict(ffn_type=name, activation=activation)
        for name, c in components("ffn_type").items()
        for activation in ([dict(c.fixes)["activation"]] if c.fixes else components("activation"))
        if name != "gated" or activation not in gated
    ]  # which have a name of their own


@pytest.mark.parametrize("parts", feed_forwards(), ids=lambda parts: "-".join(parts.values()))
def test_the_feed_forwards_are_their_formulas(parts):
    ffn = perturbed(resolve("custom", **TINY, bias=True, **parts)).blocks[0].feed_forward.sublayer
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    up = x @ ffn.up_proj.weight.t() + ffn.up_proj.bias
    inner = up if parts["ffn_type"] == "standard" else x @ ffn.gate_proj.weight.t() + ffn.gate_proj.bias
    by_hand = written_down(ACTIVATIONS_BY_HAND, parts["activation"])
    assert parts["ffn_type"] == "standard" or hasattr(ffn, "gate_proj"), "another kind of feed-forward: write it down here"
    hidden = torch.tensor([by_hand(value) for value in inner.flatten().tolist()]).view_as(inner)
    hidden = hidden if parts["ffn_type"] == "standard" else hidden * up
    expected = hidden @ ffn.down_proj.weight.t() + ffn.down_proj.bias
    torch.testing.assert_close(ffn(x), expected, rtol=1e-5, atol=1e-5)


NORM_POSITIONS_BY_HAND = dict(
    pre=lambda x, branch: x + branch.sublayer(branch.norm(x)),
    post=lambda x, branch: branch.norm(x + branch.sublayer(x)),
    output=lambda x, branch: x + branch.norm(branch.sublayer(x)),
    sandwich=lambda x, branch: x + branch.output_norm(branch.sublayer(branch.norm(x))),
)


@pytest.mark.parametrize("where", components("norm_position"))
def test_norm_positions_are_their_formulas(where):
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    branch = perturbed(resolve("custom", **TINY, norm_position=where)).blocks[0].feed_forward
    torch.testing.assert_close(branch(x), written_down(NORM_POSITIONS_BY_HAND, where)(x, branch))


# ------------------------------------------------------------------------------------------- attention


def attend(backend, q, k, v, rules):
    """This backend's attention for the last q.size(2) of k.size(2) tokens."""
    attention = component("attention_backend", backend).build
    return attention.attend(q, k, v, rules, attention.mask(rules, q.size(2), k.size(2), q.device, q.dtype))


def attention_by_loops(q, k, v):
    """Causal grouped attention, one query at a time, in fp64; the queries are the last of the keys' tokens."""
    B, H, T, d = q.shape
    K, S = k.shape[1:3]
    out = torch.zeros(B, H, T, d, dtype=torch.float64)
    for b, h, t in itertools.product(range(B), range(H), range(T)):
        key_head = h // (H // K)
        seen = S - T + t + 1
        scores = [float((q[b, h, t].double() * k[b, key_head, s].double()).sum()) / math.sqrt(d) for s in range(seen)]
        top = max(scores)
        weights = [math.exp(score - top) for score in scores]
        for s in range(seen):
            out[b, h, t] += weights[s] / sum(weights) * v[b, key_head, s].double()
    return out


@pytest.mark.parametrize("new, seen", [(5, 5), (1, 5), (3, 5), (1, 1)])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize("backend", components("attention_backend"))
def test_attention_is_the_written_out_sum_over_the_past(backend, n_kv_head, new, seen):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, new, 8, generator=generator)
    k, v = (torch.randn(2, n_kv_head, seen, 8, generator=generator) for _ in range(2))
    y = attend(backend, q, k, v, AttentionRules(scale=8**-0.5))
    torch.testing.assert_close(y.double(), attention_by_loops(q, k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("new, seen", [(6, 6), (1, 6), (2, 6)])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_sdpa_and_manual_agree_forward_and_backward(n_kv_head, new, seen):
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, 4, new, 8), (2, n_kv_head, seen, 8), (2, n_kv_head, seen, 8)]
    inputs = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    weight = torch.randn(2, 4, new, 8, generator=generator)
    results = []
    for backend in ("sdpa", "manual"):
        y = attend(backend, *inputs, AttentionRules(scale=8**-0.5))
        results.append((y, *torch.autograd.grad((y * weight).sum(), inputs)))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class DtypesOf(TorchDispatchMode):
    """Records the dtype of every input of an operation."""

    def __init__(self, operation):
        super().__init__()
        self.operation, self.dtypes = operation, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is self.operation:
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_manual_attention_has_its_softmax_in_fp32_and_its_products_in_the_compute_dtype():
    q, k, v = (torch.randn(1, 2, 8, 16, generator=torch.Generator().manual_seed(0)).bfloat16() for _ in range(3))
    with DtypesOf(torch.ops.aten._softmax.default) as softmax, DtypesOf(torch.ops.aten.bmm.default) as products:
        y = attend("manual", q, k, v, AttentionRules(scale=0.25))
    assert softmax.dtypes == [torch.float32]
    assert products.dtypes == [torch.bfloat16] * 2 and y.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", components("attention_backend"))
def test_attention_in_bf16_is_the_exact_one_to_bf16s_precision(backend):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 16, generator=generator).bfloat16() for _ in range(3))
    exact = attention_by_loops(q, k, v)
    y = attend(backend, q, k, v, AttentionRules(scale=0.25))
    assert (y.double() - exact).abs().max() < 2**-7 * exact.abs().max()


# ------------------------------------------------------------------------------------------- positions


def test_rope_scores_depend_on_the_distance_alone():
    config = resolve("llama", n_layer=1, n_head=2, n_embd=32, vocab_size=61)
    rope = component("position_encoding", "rope").build(config)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 1, 16, generator=generator) for _ in range(2))

    def score(at_query: int, at_key: int):
        turned_q = rope.rotate(q, q, rope.tables(torch.tensor([at_query])))[0]
        turned_k = rope.rotate(k, k, rope.tables(torch.tensor([at_key])))[1]
        return (turned_q * turned_k).sum(-1)

    for distance in (0, 1, 7):
        scores = torch.stack([score(start + distance, start) for start in (0, 3, 50, 500)])
        torch.testing.assert_close(scores, scores[:1].expand_as(scores), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(score(7, 0), score(0, 0), atol=1e-2)


def test_rope_turns_the_pair_i_and_i_plus_half_by_position_times_its_frequency():
    config = resolve("llama", n_layer=1, n_head=2, n_embd=16, vocab_size=61, rope_theta=100.0)
    rope = component("position_encoding", "rope").build(config)
    x = torch.randn(1, 1, 3, 8, generator=torch.Generator().manual_seed(0))
    y, _ = rope.rotate(x, x, rope.tables(torch.tensor([0, 1, 5])))
    torch.testing.assert_close(y[:, :, 0], x[:, :, 0])
    for t, position in enumerate((0, 1, 5)):
        for i in range(4):
            turn = complex(math.cos(position * 100.0 ** (-2 * i / 8)), math.sin(position * 100.0 ** (-2 * i / 8)))
            turned = complex(x[0, 0, t, i], x[0, 0, t, i + 4]) * turn
            assert complex(y[0, 0, t, i], y[0, 0, t, i + 4]) == pytest.approx(turned, abs=1e-5)


def test_without_positions_the_last_logits_forget_the_order_of_the_past():
    x = torch.tensor([[1, 2, 3, 4, 5, 6]])
    shuffled = torch.tensor([[3, 1, 5, 2, 4, 6]])
    for encoding in components("position_encoding"):
        model = perturbed(resolve("custom", **{**TINY, "n_layer": 1}, position_encoding=encoding)).eval()
        same = encoding == "none"
        assert torch.allclose(model(x)[:, -1], model(shuffled)[:, -1], atol=1e-5) == same, encoding


# ------------------------------------------------------------------------------------------- causality


@pytest.mark.parametrize("every_pair", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", components("attention_backend"))
@pytest.mark.parametrize("norm_position", components("norm_position"))
@pytest.mark.parametrize("position_encoding", components("position_encoding"))
def test_a_token_changes_no_logits_before_it(position_encoding, norm_position, backend, every_pair):
    """With every norm, feed-forward and block, one at a time; in every combination of them (slow)."""
    x, at = tokens(batch=2, length=8), 5
    changed = x.clone()
    changed[:, at] = (changed[:, at] + 1) % 60
    blocks = ["transformer", *(f"{b},transformer" for b in components("block") if b != "transformer")]
    norms, others = list(components("normalization")), feed_forwards()
    if backend == "flex":  # slow on a CPU, and the parts that see one token at a time are not its own
        norms, others = norms[:1], others[:1]
    firsts = (norms[0], others[0], blocks[0])
    for normalization, parts, pattern in itertools.product(norms, others, blocks):
        if not every_pair and sum(a != b for a, b in zip((normalization, parts, pattern), firsts)) > 1:
            continue
        window = dict(sliding_window=3) if "sliding" in pattern else {}
        config = resolve(
            "custom",
            **TINY,
            position_encoding=position_encoding,
            norm_position=norm_position,
            **parts,
            **window,
            attention_backend=backend,
            normalization=normalization,
            layer_pattern=pattern,
            n_kv_head=2,
        )
        model = perturbed(config).eval()
        with torch.no_grad():
            before, after = model(torch.cat((x, changed))).chunk(2)
        torch.testing.assert_close(before[:, :at], after[:, :at], rtol=0, atol=1e-6)
        assert ((before[:, at:] - after[:, at:]).abs().amax(dim=(0, 2)) > 1e-4).all(), config.name


# ------------------------------------------------------------------------------------------- initial weights


def test_initial_weights_have_the_documented_spread_in_every_block_type():
    config = resolve("llama", n_layer=4, n_head=4, n_embd=256, vocab_size=500, layer_pattern="transformer,mlp", bias=True)
    checked = 0
    for name, parameter in build_model(config).state_dict().items():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name.endswith("bias"):
            assert torch.equal(parameter, torch.zeros_like(parameter)), name
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            expected = 0.02 / math.sqrt(8) if residual else 0.02
            assert float(parameter.std()) == pytest.approx(expected, rel=0.02), name
            assert abs(float(parameter.mean())) < 5 * expected / math.sqrt(parameter.numel()), name
            checked += residual
    assert checked == 6


def test_the_bias_of_a_layernorm_starts_at_zero():
    weights = build_model(resolve("gpt2", **TINY)).state_dict()
    assert all(torch.count_nonzero(w) == 0 for name, w in weights.items() if name.endswith("norm.bias"))
    assert sum(name.endswith("norm.bias") for name in weights) == 5


def test_every_weight_has_a_stream_of_its_own_that_the_seed_changes():
    config = resolve("llama", **TINY)
    one, same, other = (build_model(config, seed=seed).state_dict() for seed in (1, 1, 2))
    matrices = [name for name, w in one.items() if w.dim() == 2]
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in matrices)
    for a, b in itertools.combinations(matrices, 2):
        count = min(one[a].numel(), one[b].numel())
        assert not torch.equal(one[a].flatten()[:count], one[b].flatten()[:count]), (a, b)


def test_initial_weights_do_not_depend_on_the_rest_of_the_model_or_the_random_state():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    reference = build_model(resolve("llama", **TINY)).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    deeper = build_model(resolve("llama", **{**TINY, "n_layer": 5}, qk_norm=True, n_kv_head=2)).state_dict()
    for name, weight in reference.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):  # only their spread changes with depth
            torch.testing.assert_close(weight * math.sqrt(2 * 2), deeper[name] * math.sqrt(2 * 5))
        elif "k_proj" not in name and "v_proj" not in name:
            assert torch.equal(weight, deeper[name]), name


def test_initial_weights_are_the_same_under_another_default_device():
    config = resolve("gpt2", **TINY)
    reference = build_model(config).state_dict()
    with torch.device("meta"):
        elsewhere = build_model(config, device="cpu").state_dict()
    assert all(torch.equal(reference[name], elsewhere[name]) for name in reference)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("preset", [*map(crossed, PRESETS)])
def test_a_tied_head_is_the_embedding_wherever_it_is_built(preset, device):
    tied, untied = (build_model(resolve(preset, **TINY, weight_tying=t), device=device) for t in (True, False))
    assert tied.head.weight is tied.embedding.weight
    assert untied.head.weight is not untied.embedding.weight
    assert untied.num_parameters() - tied.num_parameters() == 61 * 32
    assert "head.weight" not in dict(tied.named_parameters())


def test_a_tied_head_stays_tied_when_the_model_moves():
    model = build_model(resolve("gpt2", **TINY), device="meta").to_empty(device="cpu")
    assert model.head.weight is model.embedding.weight
    model = build_model(resolve("gpt2", **TINY)).to(torch.float64)
    assert model.head.weight is model.embedding.weight
    model(tokens()).sum().backward()
    assert model.embedding.weight.grad is not None


def test_the_head_of_a_tied_model_follows_a_training_step():
    model = build_model(resolve("gpt2", **TINY))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(tokens()).logsumexp(-1).sum().backward()
    optimizer.step()
    assert torch.equal(model.head.weight, model.embedding.weight)


# ------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("backend", TRAINABLE)
def test_dropout_acts_in_train_mode_only(backend):
    model = perturbed(resolve("gpt2", **TINY, dropout=0.3, attention_backend=backend))
    plain = perturbed(resolve("gpt2", **TINY, attention_backend=backend))
    x = tokens()
    with torch.no_grad():
        assert torch.equal(model.eval()(x), plain.eval()(x))
        assert torch.equal(model(x), model(x))
        torch.manual_seed(0)
        one, other = model.train()(x), model(x)
        torch.manual_seed(0)
        again = model(x)
    assert not torch.allclose(one, other) and torch.equal(one, again)
    assert torch.equal(plain.train()(x), plain.eval()(x))


@pytest.mark.parametrize("backend", TRAINABLE)
def test_attention_dropout_keeps_the_mean(backend):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 8, 8, generator=generator) for _ in range(2))
    v = torch.ones(1, 1, 8, 8)
    torch.manual_seed(0)
    drawn = torch.stack([attend(backend, q, k, v, AttentionRules(scale=8**-0.5, dropout=0.25)) for _ in range(200)])
    assert drawn.std() > 0.1
    torch.testing.assert_close(drawn.mean(dim=0), torch.ones_like(v), rtol=0, atol=0.2)


def test_dropout_acts_on_the_embedding_and_on_each_residual_branch():
    for preset in PRESETS:
        model = perturbed(resolve(preset, **TINY, dropout=0.5))
        hit = []
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Dropout):
                assert module.p == 0.5
                module.register_forward_hook(lambda m, a, y, n=name: hit.append((n, float((y == 0).float().mean()))))
        torch.manual_seed(0)
        model.train()(tokens())
        assert len(hit) == 1 + 2 * 2
        assert all(0.4 < share < 0.6 for _, share in hit)


# ------------------------------------------------------------------------------------------- padding and precision


@pytest.mark.parametrize("tied", [True, False])
def test_padding_rows_are_cut_and_can_never_be_produced(tied):
    model = perturbed(resolve("llama", **TINY, pad_vocab_multiple=64, weight_tying=tied)).eval()
    assert model.head.weight.shape == (64, 32)
    x = tokens()
    with torch.no_grad():
        kept = model(x)
        model.head.weight[61:] = 1e4 * torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
        logits = model(x)
    assert logits.shape == (3, 16, 61) and torch.equal(logits, kept)
    for temperature in (0.0, 5.0):
        assert int(model.generate(x, 8, temperature=temperature).max()) < 61
    F.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
    assert torch.count_nonzero(model.head.weight.grad[61:]) == 0


@pytest.mark.parametrize("preset", [*map(crossed, PRESETS)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_residual_stream_is_in_the_compute_dtype_and_weights_and_gradients_in_fp32(preset, dtype):
    config = resolve(preset, **TINY, n_kv_head=2, qk_norm=True, dropout=0.0)
    model, reference = perturbed(config, scale=0.05), perturbed(config, scale=0.05)
    model.compute_dtype = dtype
    streams, products = [], []
    for name, module in model.named_modules():
        if name.endswith(("attention", "feed_forward", "norm")) or name.startswith("blocks.") and name.count(".") == 1:
            module.register_forward_hook(lambda m, a, y: streams.append((a[0].dtype, y.dtype)))
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, a, y: products.append((a[0].dtype, y.dtype)))
    x = tokens()
    logits = model(x)
    assert len(streams) > 10 and set(streams) == {(dtype, dtype)}
    assert len(products) >= 13 and set(products) == {(dtype, dtype)} and logits.dtype == dtype
    exact = reference(x)
    assert (logits.float() - exact).abs().max() < 0.05 * exact.abs().max()
    F.cross_entropy(logits.float().flatten(0, 1), x.flatten()).backward()
    F.cross_entropy(exact.flatten(0, 1), x.flatten()).backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters()):
        assert p.dtype == p.grad.dtype == torch.float32, name
        assert (p.grad - q.grad).norm() < 0.1 * q.grad.norm() + 1e-5, name


# ------------------------------------------------------------------------------------------- the cache, sampling input


def test_the_cache_returns_all_keys_in_order_per_layer():
    config = resolve("llama", **TINY, n_kv_head=2)
    cache = KVCache(config, batch=3, max_tokens=6, dtype=torch.float32, device="cpu")
    k = torch.randn(2, 3, 2, 5, 8, generator=torch.Generator().manual_seed(0))  # (layer, B, K, T, d)
    for start, end in ((0, 2), (2, 3), (3, 5)):
        for layer in (0, 1):
            keys, values = cache.update(layer, k[layer, :, :, start:end], -k[layer, :, :, start:end])
            assert torch.equal(keys, k[layer, :, :, :end]) and torch.equal(values, -k[layer, :, :, :end])
        cache.length += end - start


def test_sampling_does_not_change_the_logits_it_is_given():
    logits = torch.randn(2, 10, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    sample_next(logits, torch.tensor([[1, 2], [3, 3]]), temperature=0.5, top_k=3, top_p=0.5, repetition_penalty=2.0)
    assert torch.equal(logits, before)


def test_a_sequence_longer_than_block_size_is_refused_with_both_lengths():
    model = build_model(resolve("llama", **TINY))
    with pytest.raises(ValueError, match="17 tokens is longer than block_size=16"):
        model(tokens(length=17))
