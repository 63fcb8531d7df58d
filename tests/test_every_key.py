"""Every key does what it says on every preset: architecture keys change the model, execution keys change nothing.

Parametrised over the keys, presets and registries: a new key without values here, or a new component that is not counted,
named or trained, fails.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from flops_parameter_counting.flops import flops_per_token
from flops_parameter_counting.parameters import count_parameters
from model_builder import build_model
from model_config import ARCHITECTURE_KEYS, COMPONENT_KINDS, PRESETS, components, resolve
from training.activation_checkpointing import apply_activation_checkpointing
from training.precision import DTYPES, set_compute_dtype
from training.train_config import KEYS, MODEL_KEYS, TrainConfig

TINY = dict(n_layer=2, n_head=4, n_embd=32, vocab_size=61, block_size=16)

# Values of which every two are different models. Component keys: everything registered.
VALUES = dict(
    n_layer=[1, 2, 3], n_head=[2, 4, 8], n_kv_head=[1, 2, 4], head_dim=[4, 8, 16], n_embd=[32, 64], d_ff=[32, 100],
    vocab_size=[60, 61], pad_vocab_multiple=[1, 7, 64], norm_eps=[1e-6, 1e-5, 1e-2], rope_theta=[100.0, 10000.0],
    layer_pattern=["transformer", "transformer,mlp", "mlp,transformer"], bias=[False, True], qkv_bias=[False, True],
    qk_norm=[False, True], weight_tying=[False, True], dropout=[0.0, 0.1, 0.5],
    **{kind: list(components(kind)) for kind in COMPONENT_KINDS if kind in ARCHITECTURE_KEYS})

# What must be refused, because the preset's parts do not read it: (key, preset) → the values that are still accepted.
REFUSED = {("rope_theta", "gpt2"): [], ("rope_theta", "gpt2_postnorm"): [], ("activation", "llama"): ["silu"]}


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


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("key", ARCHITECTURE_KEYS)
def test_every_architecture_key_changes_name_fingerprint_and_model_or_is_refused(key, preset):
    configs, refused = [], []
    for value in VALUES[key]:
        try:
            configs.append(resolve(preset, **{**TINY, key: value}))
        except ValueError as error:
            assert f"{key}={value!r}" in str(error) and "no effect" in str(error)
            refused.append(value)
    accepted = REFUSED.get((key, preset), VALUES[key])
    assert refused == [value for value in VALUES[key] if value not in accepted]
    assert len(VALUES[key]) >= 2
    for one, other in itertools.combinations(configs, 2):
        assert one.name != other.name
        assert one.fingerprint != other.fingerprint
    assert_all_differ(configs)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("key", ARCHITECTURE_KEYS)
def test_an_override_lands_in_the_config_under_its_key(key, preset):
    for value in REFUSED.get((key, preset), VALUES[key]):
        config = resolve(preset, **{**TINY, key: value})
        assert config.to_dict()[key] == value


@pytest.mark.parametrize("preset", PRESETS)
def test_block_size_is_architecture_only_where_positions_are_a_table(preset):
    short, long = (resolve(preset, **{**TINY, "block_size": length}) for length in (16, 32))
    if short.position_encoding == "learned_absolute":
        assert count_parameters(long) - count_parameters(short) == 16 * 32
        assert short.name != long.name and short.fingerprint != long.fingerprint
    else:
        assert (short.name, short.fingerprint, count_parameters(short)) == (long.name, long.fingerprint,
                                                                            count_parameters(long))
        assert torch.equal(witness_logits(perturbed(short)), witness_logits(perturbed(long)))
    with pytest.raises(ValueError, match="block_size=16"):
        build_model(short)(tokens(length=17))
    assert build_model(long)(tokens(length=17)).shape == (3, 17, 61)


# ------------------------------------------------------------------------------------------- execution keys

EXECUTION_VALUES = dict(
    attention_backend=list(components("attention_backend")), device=["cpu", "cuda"],
    dtype=["float32", "bfloat16", "float16", "auto"], compile=[True, False, "auto"],
    activation_checkpointing=["none", "full", "selective"], parallelism=["none"], threads=[1, 2])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("key", [key for key, field in KEYS.items() if field.metadata["group"] == "execution"])
def test_an_execution_key_changes_neither_name_nor_fingerprint_nor_n(key, preset):
    baseline = TrainConfig(arch_preset=preset, **TINY).model_config()
    for value in EXECUTION_VALUES[key]:
        model = TrainConfig(arch_preset=preset, **TINY, **{key: value}).model_config()
        assert (model.name, model.fingerprint) == (baseline.name, baseline.fingerprint)
        assert count_parameters(model) == count_parameters(baseline)


def test_keys_are_architecture_or_do_not_reach_the_model():
    """Whatever is not a key of the model leaves the ModelConfig as it is, whatever its group."""
    other = dict(out_dir="x", init_from="auto", eval_only=True, notice="n", seed=1, dataset="d", data_seed=3, batch_size=5,
                 gradient_accumulation_steps=7, total_batch_tokens=160, optimizer="muon", learning_rate=1.0,
                 max_iters=9, warmup_iters=4, dtype="float16", compile=True)
    assert not set(other) & set(MODEL_KEYS)
    assert TrainConfig(**TINY, **other).model_config() == TrainConfig(**TINY).model_config()


def loss_and_gradients(model, dropout_seed: int = 0):
    torch.manual_seed(dropout_seed)
    x = tokens()
    loss = F.cross_entropy(model.train()(x[:, :-1]).float().flatten(0, 1), x[:, 1:].flatten())
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return loss.detach(), gradients


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("backend", components("attention_backend"))
def test_attention_backends_give_the_same_loss_and_gradients(backend, preset):
    results = []
    for name in ("manual", backend):
        results.append(loss_and_gradients(perturbed(resolve(preset, **TINY, n_kv_head=2, attention_backend=name))))
    (loss, gradients), (other_loss, other_gradients) = results
    assert torch.allclose(loss, other_loss, rtol=1e-6)
    for name in gradients:
        assert torch.allclose(gradients[name], other_gradients[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("preset", PRESETS)
def test_checkpointing_changes_no_bit_of_loss_or_gradients_with_dropout_on(preset, mode, dtype):
    results = []
    for how in ("none", mode):
        model = perturbed(resolve(preset, **TINY, dropout=0.2, layer_pattern="transformer,mlp"))
        names = [name for name, _ in model.named_parameters()]
        set_compute_dtype(model, DTYPES[dtype])
        apply_activation_checkpointing(model, how)
        assert [name for name, _ in model.named_parameters()] == names
        results.append(loss_and_gradients(model))
    (loss, gradients), (other_loss, other_gradients) = results
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(gradients[name], other_gradients[name]) for name in gradients)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_recomputed_flops_are_counted(mode, preset):
    """PyTorch stops recomputing a block once it has what backward needs: a last product need not be repeated."""
    config = resolve(preset, **TINY)
    model = build_model(config, device="meta")
    apply_activation_checkpointing(model, mode)
    with FlopCounterMode(display=False) as counter:
        model(tokens().to("meta")).sum().backward()
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


# ------------------------------------------------------------------------------------------- every component

COMPONENT_CASES = [pytest.param(kind, name, preset, id=f"{kind}={name}-{preset}")
                   for kind in COMPONENT_KINDS for name in components(kind) for preset in PRESETS]


def with_component(kind: str, name: str, preset: str, **overrides):
    """The tiny preset with this component in it (a block: beside a transformer block)."""
    choice = {"layer_pattern": f"transformer,{name}"} if kind == "block" else {kind: name}
    if kind == "activation" and preset == "llama":
        choice["ffn_type"] = "standard"  # whose swiglu has an activation of its own
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
    elif kind == "block":
        assert name == "transformer" or name in config.name
    elif kind != "attention_backend":
        assert f"-{part.short}-" in f"{config.name}-"


@pytest.mark.parametrize("kind, name, preset", COMPONENT_CASES)
@pytest.mark.parametrize("overrides", [{}, dict(n_kv_head=2, head_dim=12, bias=True, qk_norm=True, weight_tying=False,
                                                pad_vocab_multiple=16, d_ff=50)], ids=["plain", "odd"])
def test_every_component_is_counted(kind, name, preset, overrides):
    config = with_component(kind, name, preset, **overrides)
    model = build_model(config, device="meta")
    assert count_parameters(config) == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter:
        model(tokens(batch=2).to("meta")).sum().backward()
    assert counter.get_total_flops() == 2 * 16 * flops_per_token(config).full
