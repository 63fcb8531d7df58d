"""Every key does what it says on every preset: architecture keys change the model, execution keys change nothing.

Parametrised over the keys, presets and registries: a new key without values here, or a new component that is not counted,
named or trained, fails.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, crossed, pytorchs_flops
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flops_parameter_counting.flops import flops_per_token
from flops_parameter_counting.parameters import count_parameters
from model_builder import COMPUTE_DTYPES, build_model
from model_config import COMPONENT_KINDS, PRESETS, architecture_keys, components, resolve
from training.activation_checkpointing import apply_activation_checkpointing
from training.precision import set_compute_dtype
from training.train_config import KEYS, TrainConfig, keys_of_the_model

ARCHITECTURE_KEYS = architecture_keys()
SLOW = (pytest.mark.slow,)

# Values of which every two are different models. Component keys: everything registered.
VALUES = dict(
    n_layer=[1, 2, 3],
    n_head=[2, 4, 8],
    n_kv_head=[1, 2, 4],
    head_dim=[4, 8, 16],
    n_embd=[32, 64],
    d_ff=[32, 100],
    vocab_size=[60, 61],
    pad_vocab_multiple=[1, 7, 64],
    norm_eps=[1e-6, 1e-5, 1e-2],
    rope_theta=[100.0, 10000.0],
    layer_pattern=["transformer", "transformer,mlp", "mlp,transformer"],
    bias=[False, True],
    qkv_bias=[False, True],
    qk_norm=[False, True, "full"],
    weight_tying=[False, True],
    dropout=[0.0, 0.1, 0.5],
    rope_factor=[2.0, 8.0],
    rope_low_freq_factor=[1.0, 2.0],
    rope_high_freq_factor=[6.0, 8.0],
    rope_original_context=[32, 64],
    sliding_window=[1, 3, 9],
    attention_scale=[0.1, 0.5],
    attention_softcap=[0.5, 2.0],
    logit_softcap=[0.5, 30.0],
    embedding_norm=[False, True],
    embedding_scale=[False, True],
    zero_init=[False, True],
    ffn_expansion_ratio=[1.0, 2.0, 3.5],
    ffn_multiple=[48, 100],
    **{kind: list(components(kind)) for kind in COMPONENT_KINDS if kind in ARCHITECTURE_KEYS},
)

# What must be refused, because the preset's parts do not read it: (key, preset) → the values that are still accepted.
# What else must be chosen for a key to matter at all.
_STRETCHED = {"rope_scaling": "llama3", "rope_original_context": 32, "rope_low_freq_factor": 1.0, "rope_high_freq_factor": 8.0}
BESIDE = {
    "rope_factor": {"rope_scaling": "linear"},
    "rope_low_freq_factor": _STRETCHED,
    "rope_high_freq_factor": _STRETCHED,
    "rope_original_context": _STRETCHED,
}

# What must be refused, because the preset's parts do not read it: (key, preset) → the values that are still accepted.
WITHOUT_ROPE = [preset for preset in PRESETS if resolve(preset).position_encoding != "rope"]
ROPE_KEYS = [key for key in ARCHITECTURE_KEYS if key.startswith("rope_")]
GATED = [name for name in PRESETS if resolve(name).ffn_type == "swiglu"]
REFUSED = {(key, preset): [] for key in ROPE_KEYS for preset in WITHOUT_ROPE}
REFUSED |= {("activation", preset): ["silu"] for preset in GATED}
REFUSED |= {
    ("ffn_type", preset): [name for name in components("ffn_type") if name != "gated"]
    for preset in PRESETS
    if resolve(preset).activation in ("silu", "gelu")
}  # those are called swiglu and geglu
REFUSED |= {
    ("activation", preset): [name for name in components("activation") if name not in ("silu", "gelu")]
    for preset in ("gemma", "gemma2")
}


def tokens(batch: int = 3, length: int = 16, vocab_size: int = 60) -> torch.Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))


def perturb(model: torch.nn.Module) -> None:
    """Move every parameter off its initial value, so that a zero bias or a unit gain hides nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


@torch.no_grad()
def witness_logits(model) -> torch.Tensor:
    torch.manual_seed(0)
    return model.train()(tokens())


def perturbed(config):
    model = build_model(config)
    perturb(model)
    return model


def assert_all_differ(configs) -> None:
    """Every two of the models differ: in N, or in shapes, or in the logits that the same weights give."""
    models = [perturbed(config) for config in configs]
    shapes = [{name: weight.shape for name, weight in model.state_dict().items()} for model in models]
    logits = []
    for model, shape in zip(models, shapes):
        model.load_state_dict(models[shapes.index(shape)].state_dict())
        logits.append(witness_logits(model))
    for one, other in itertools.combinations(range(len(models)), 2):
        if models[one].num_parameters() == models[other].num_parameters():
            assert shapes[one] != shapes[other] or not torch.allclose(logits[one], logits[other], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------- architecture keys


def test_the_witness_does_not_tell_a_model_from_itself():
    for preset in PRESETS:
        with pytest.raises(AssertionError):
            assert_all_differ([resolve(preset, **TINY, dropout=0.3) for _ in range(2)])


@pytest.mark.parametrize("preset", [*map(crossed, PRESETS)])
@pytest.mark.parametrize("key", ARCHITECTURE_KEYS)
def test_every_architecture_key_changes_name_fingerprint_and_model_or_is_refused(key, preset):
    configs, refused = [], []
    for value in VALUES[key]:
        try:
            configs.append(resolve(preset, **{**TINY, **BESIDE.get(key, {}), key: value}))
        except ValueError as error:
            assert f"{key}={value!r}" in str(error)
            assert any(reason in str(error) for reason in ("no effect", "is ffn_type=", "reads it"))
            refused.append(value)
    accepted = REFUSED.get((key, preset), VALUES[key])
    assert refused == [value for value in VALUES[key] if value not in accepted]
    assert len(VALUES[key]) >= 2
    for one, other in itertools.combinations(configs, 2):
        assert one.name != other.name
        assert one.fingerprint != other.fingerprint
    if key == "zero_init":  # the one key that says how weights start, not what they do
        one, other = (witness_logits(build_model(config)) for config in configs)
        assert not torch.allclose(one, other, rtol=1e-5, atol=1e-6)
    else:
        assert_all_differ(configs)


@pytest.mark.parametrize("preset", [*map(crossed, PRESETS)])
@pytest.mark.parametrize("key", ARCHITECTURE_KEYS)
def test_an_override_lands_in_the_config_under_its_key(key, preset):
    for value in REFUSED.get((key, preset), VALUES[key]):
        config = resolve(preset, **{**TINY, **BESIDE.get(key, {}), key: value})
        if key == "ffn_expansion_ratio":
            assert config.d_ff == value * 32
        elif key == "ffn_multiple":
            assert config.d_ff % value == 0
        else:
            assert config.to_dict()[key] == value


@pytest.mark.parametrize("preset", PRESETS)
def test_block_size_is_architecture_only_where_positions_are_a_table(preset):
    short, long = (resolve(preset, **{**TINY, "block_size": length}) for length in (16, 32))
    if short.position_encoding == "learned_absolute":
        assert count_parameters(long) - count_parameters(short) == 16 * 32
        assert short.name != long.name and short.fingerprint != long.fingerprint
    else:
        assert (short.name, short.fingerprint, count_parameters(short)) == (long.name, long.fingerprint, count_parameters(long))
        assert torch.equal(witness_logits(perturbed(short)), witness_logits(perturbed(long)))
    with pytest.raises(ValueError, match="block_size=16"):
        build_model(short)(tokens(length=17))
    assert build_model(long)(tokens(length=17)).shape == (3, 17, 61)


# ------------------------------------------------------------------------------------------- execution keys

EXECUTION_VALUES = dict(
    attention_backend=list(components("attention_backend")),
    device=["cpu", "cuda"],
    dtype=["float32", "bfloat16", "float16", "auto"],
    compile=[True, False, "auto"],
    activation_checkpointing=["none", "full", "selective"],
    threads=[1, 2],
    micro_batch=[1, 4],
    parallelism=["auto", "none", "ddp", "zero1", "zero2", "fsdp", "hsdp"],
    hsdp_shard_size=[2, 4],
    async_checkpoint=[False, True],
    collective_timeout=[5, 600],
    peak_tflops=[1.5, 989.0],
)


@pytest.mark.parametrize("preset", [*map(crossed, PRESETS)])
@pytest.mark.parametrize("key", [key for key, field in KEYS.items() if field.metadata["group"] == "execution"])
def test_an_execution_key_changes_neither_name_nor_fingerprint_nor_n(key, preset):
    plain = dict(TINY, arch_preset=preset, dropout=0.0)  # which flex cannot do
    baseline = TrainConfig(**plain).model_config()
    for value in EXECUTION_VALUES[key]:
        model = TrainConfig(**plain, **{key: value}).model_config()
        assert (model.name, model.fingerprint) == (baseline.name, baseline.fingerprint)
        assert count_parameters(model) == count_parameters(baseline)


def test_keys_are_architecture_or_do_not_reach_the_model():
    """Whatever is not a key of the model leaves the ModelConfig as it is, whatever its group."""
    other = dict(
        out_dir="x",
        init_from="auto",
        eval_only=True,
        notice="n",
        seed=1,
        dataset="d",
        data_seed=3,
        batch_size=5,
        gradient_accumulation_steps=7,
        total_batch_tokens=160,
        optimizer="muon",
        learning_rate=1.0,
        max_iters=9,
        warmup_iters=4,
        dtype="float16",
        compile=True,
    )
    assert not set(other) & set(keys_of_the_model())
    assert TrainConfig(**TINY, **other).model_config() == TrainConfig(**TINY).model_config()


def loss_and_gradients(model, dropout_seed: int = 0):
    torch.manual_seed(dropout_seed)
    x = tokens()
    loss = F.cross_entropy(model.train()(x[:, :-1]).float().flatten(0, 1), x[:, 1:].flatten())
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return loss.detach(), gradients


@pytest.mark.parametrize("preset", [*map(crossed, PRESETS)])
@pytest.mark.parametrize("backend", [name for name in components("attention_backend") if name != "flex"])
def test_attention_backends_give_the_same_loss_and_gradients(backend, preset):
    results = []
    for name in ("manual", backend):
        results.append(loss_and_gradients(perturbed(resolve(preset, **TINY, n_kv_head=2, attention_backend=name))))
    (loss, gradients), (other_loss, other_gradients) = results
    assert torch.allclose(loss, other_loss, rtol=1e-6)
    for name in gradients:
        assert torch.allclose(gradients[name], other_gradients[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize(
    "preset, overrides",
    [
        pytest.param(*crossed(preset).values, overrides, id=f"{preset}-{name}", marks=crossed(preset).marks if usual else SLOW)
        for preset in PRESETS
        for name, overrides, usual in (
            ("plain", {}, True),
            ("alibi", dict(position_encoding="alibi"), preset in ("gpt2", "llama")),
            ("window and cap", dict(sliding_window=3, attention_softcap=0.7), preset in ("gpt2", "llama")),
        )
    ],
)
def test_flex_attention_gives_the_same_logits_and_refuses_to_train_on_a_cpu(preset, overrides):
    if "position_encoding" in overrides and resolve(preset).rope_scaling is not None:
        overrides = {**overrides, "rope_theta": None}
    plain, flex = (
        perturbed(resolve(preset, **{**TINY, "head_dim": 16, "dropout": 0.0, **overrides, "attention_backend": name}))
        for name in ("manual", "flex")
    )
    with torch.no_grad():
        assert torch.allclose(plain(tokens()), flex(tokens()), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="cannot train on a CPU"):
        flex(tokens())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("preset", [*map(crossed, PRESETS)])
def test_checkpointing_changes_no_bit_of_loss_or_gradients_with_dropout_on(preset, mode, dtype):
    results = []
    for how in ("none", mode):
        model = perturbed(resolve(preset, **TINY, dropout=0.2, layer_pattern="transformer,mlp"))
        names = [name for name, _ in model.named_parameters()]
        set_compute_dtype(model, COMPUTE_DTYPES[dtype])
        apply_activation_checkpointing(model, how)
        assert [name for name, _ in model.named_parameters()] == names
        results.append(loss_and_gradients(model))
    (loss, gradients), (other_loss, other_gradients) = results
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(gradients[name], other_gradients[name]) for name in gradients)


@pytest.mark.parametrize("preset", [*map(crossed, PRESETS)])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_recomputed_flops_are_counted(mode, preset):
    """PyTorch stops recomputing a block once it has what backward needs: a last product need not be repeated."""
    config = resolve(preset, **TINY)
    model = build_model(config)
    apply_activation_checkpointing(model, mode)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens()).sum().backward()
    claimed = 3 * 16 * flops_per_token(config, checkpointing=mode).hardware
    last_products = 3 * 16 * 2 * (2 * config.d_ff * config.n_embd) if mode == "full" else 0
    assert claimed - last_products <= counter.get_total_flops() <= claimed


def test_compiled_blocks_give_the_same_loss_and_gradients():
    config = resolve("llama", **TINY, n_kv_head=2)
    plain, compiled = perturbed(config), perturbed(config)
    for block in compiled.blocks:
        block.compile(backend="aot_eager", fullgraph=True)  # no graph breaks; the code generator is PyTorch's own
    (loss, gradients), (other_loss, other_gradients) = loss_and_gradients(plain), loss_and_gradients(compiled)
    assert torch.allclose(loss, other_loss, rtol=1e-6)
    assert all(torch.allclose(gradients[n], other_gradients[n], rtol=1e-4, atol=1e-6) for n in gradients)
    assert {n for n, _ in compiled.named_parameters()} == {n for n, _ in plain.named_parameters()}


def test_blocks_compiled_for_any_length_give_the_same_logits():
    """After a second length torch.compile takes lengths as symbols, which not every argument of PyTorch's may be."""
    config = resolve("llama", **TINY, n_kv_head=2)
    plain, compiled = perturbed(config), perturbed(config)
    for block in compiled.blocks:
        block.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (config.block_size, config.block_size // 2, 3):
        x = tokens()[:, :length]
        assert torch.allclose(plain(x), compiled(x), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------- every component

COMPONENT_CASES = [
    crossed(preset, kind, name) for kind in COMPONENT_KINDS for name in components(kind) for preset in PRESETS if name != "flex"
]  # no training on a CPU: below
ODD = dict(n_kv_head=2, head_dim=12, bias=True, qk_norm=True, weight_tying=False, pad_vocab_multiple=16, d_ff=50)


def usual_or_slow(case):
    """The case of a component with a preset; slow unless the preset is GPT-2 or LLaMA."""
    return case if case.values[-1] in ("gpt2", "llama") else pytest.param(*case.values, id=case.id, marks=pytest.mark.slow)


def with_component(kind: str, name: str, preset: str, **overrides):
    """The tiny preset with this component in it (a block: beside a transformer block)."""
    choice = {"layer_pattern": f"transformer,{name}"} if kind == "block" else {kind: name}
    if kind == "activation" and resolve(preset).ffn_type != "standard":
        choice["ffn_type"] = "standard"  # whose gated feed-forward has an activation of its own
    if kind == "rope_scaling":
        choice["position_encoding"] = "rope"
    if (kind, name) == ("ffn_type", "gated"):
        choice["activation"] = "relu2"
    if (kind, name) == ("block", "sliding"):
        choice["sliding_window"] = 4
    return resolve(preset, **{**TINY, **choice, **overrides})


@pytest.mark.parametrize("kind, name, preset", COMPONENT_CASES)
def test_every_component_is_built_trained_and_named(kind, name, preset):
    config = with_component(kind, name, preset)
    model = perturbed(config)
    loss, gradients = loss_and_gradients(model)
    assert torch.isfinite(loss)
    assert len(gradients) == len(list(model.parameters()))
    for parameter, gradient in gradients.items():
        assert torch.isfinite(gradient).all(), parameter
        if not parameter.endswith("k_proj.bias"):  # shifts every score of a query alike without RoPE: no gradient
            assert gradient.abs().max() > 1e-9, parameter
    part = components(kind)[name]
    if kind == "ffn_type":
        assert (part.short if part.fixes else components("activation")[config.activation].short) in config.name
    elif kind == "rope_scaling":
        assert (f"-{part.short}_" in config.name) == (name != "none")
    elif kind == "block":
        assert name == "transformer" or name in config.name
    elif kind != "attention_backend":
        assert f"-{part.short}-" in f"{config.name}-"


@pytest.mark.parametrize("kind, name, preset", COMPONENT_CASES)
@pytest.mark.parametrize("overrides", [{}, ODD], ids=["plain", "odd"])
def test_every_component_is_counted(kind, name, preset, overrides):
    config = with_component(kind, name, preset, **overrides)
    assert count_parameters(config) == sum(p.numel() for p in build_model(config, device="meta").parameters())


@pytest.mark.parametrize("kind, name, preset", [usual_or_slow(case) for case in COMPONENT_CASES])
@pytest.mark.parametrize("overrides", [{}, ODD], ids=["plain", "odd"])
def test_every_component_costs_what_is_counted(kind, name, preset, overrides):
    """test_flops.py holds every component of the other presets against PyTorch's count, too."""
    config = with_component(kind, name, preset, **overrides)
    windows = (
        12
        * config.n_head
        * config.head_dim
        * sum(16 - min(16, config.sliding_window) for block in config.layer_pattern if block == "sliding")
    )  # the counter takes a window for full attention
    assert sum(pytorchs_flops(config)) == 2 * 16 * (flops_per_token(config).full + windows)


@pytest.mark.parametrize("kind, name, preset", [case for case in COMPONENT_CASES if case.values[2] in ("gpt2", "llama")])
def test_every_component_learns_and_generates_with_the_cache_as_without(kind, name, preset):
    config = with_component(kind, name, preset)
    model = build_model(config)
    x = tokens(batch=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3
    prompt = x[:2, :5]  # and on past block_size
    assert torch.equal(model.generate(prompt, 14, temperature=0), model.generate(prompt, 14, temperature=0, use_cache=False))
