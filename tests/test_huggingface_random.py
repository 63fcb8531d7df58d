"""Random models to Hugging Face: the class computes the same logits, or the model is refused. Issue 10."""

from __future__ import annotations

import random

import pytest
import torch
from huggingface_models import transformers

from model_builder import build_model
from model_config import ModelConfig, components, resolve
from training.huggingface import config_from_hf, config_to_hf, tensor_rules
from training.huggingface_families import FAMILIES
from training.huggingface_parts import ConversionError

PLAIN = ("gelu_tanh", "gelu", "relu", "relu2", "silu", "leaky_relu")
GATED = [("swiglu", "silu"), ("geglu", "gelu"), *(("gated", name) for name in ("gelu_tanh", "relu", "relu2", "leaky_relu"))]


def random_shape(draw: random.Random, uneven: bool) -> dict:
    """Sizes; `uneven`: the heads together may be wider or narrower than the residual stream, and not divide it."""
    heads, head_dim = draw.choice((1, 2, 3, 4, 6)), draw.choice((2, 4, 6, 8, 16))
    return dict(
        n_layer=draw.randint(1, 3),
        n_head=heads,
        n_kv_head=draw.choice([k for k in range(1, heads + 1) if heads % k == 0]),
        head_dim=head_dim,
        n_embd=draw.randint(8, 40) if uneven else heads * draw.randint(2, 9),
        d_ff=draw.randint(1, 50),
        vocab_size=draw.randint(5, 70),
        pad_vocab_multiple=draw.choice((1, 1, 16)),
        block_size=draw.randint(4, 24),
        norm_eps=draw.choice((1e-6, 1e-5, 1e-3)),
        weight_tying=draw.random() < 0.5,
        dropout=draw.choice((0.0, 0.1)),
    )


def random_rope(draw: random.Random) -> dict:
    scaling = draw.choice(
        (
            {},
            {},
            dict(rope_scaling="linear", rope_factor=draw.choice((0.5, 3.0))),
            dict(
                rope_scaling="llama3",
                rope_factor=8.0,
                rope_low_freq_factor=1.0,
                rope_high_freq_factor=draw.choice((2.0, 4.0)),
                rope_original_context=draw.choice((8, 16)),
            ),
        )
    )
    return dict(rope_theta=draw.choice((20.0, 1e4, 5e5)), **scaling)


def random_windows(draw: random.Random, n_layer: int) -> dict:
    blocks = [draw.choice(("sliding", "transformer")) for _ in range(n_layer)]
    return dict(layer_pattern=blocks, **(dict(sliding_window=draw.randint(1, 30)) if "sliding" in blocks else {}))


def random_member(draw: random.Random, family: str) -> ModelConfig:
    """A model that is of the family, with every value of it drawn."""
    uneven = family in ("mistral", "qwen2", "qwen3", "olmo2", "olmo3", "phi3", "starcoder2")
    keys = dict(random_shape(draw, uneven), **FAMILIES[family].parts)
    if family in ("gpt2", "opt"):
        keys.update(n_kv_head=keys["n_head"], n_embd=keys["n_head"] * keys["head_dim"], activation=draw.choice(PLAIN))
        if family == "opt":
            return resolve(**{**keys, "norm_eps": 1e-5, "bias": draw.random() < 0.7})
        return resolve(**keys, attention_scale=draw.choice((None, 1.0)))
    keys.update(random_rope(draw) if family != "phi3" else dict(rope_theta=draw.choice((20.0, 1e4))))
    if family in ("arcee", "starcoder2"):
        keys.update(ffn_type="standard", activation=draw.choice(PLAIN))
    else:
        keys.update(zip(("ffn_type", "activation"), draw.choice(GATED)))
    if family in ("llama", "arcee", "starcoder2"):
        keys.update(bias=draw.random() < 0.3)
    if family in ("mistral", "phi3", "starcoder2"):
        keys.update(draw.choice((dict(), dict(sliding_window=draw.randint(1, 30)))))
    if family in ("qwen2", "qwen3", "olmo3", "gemma2"):
        keys.update(random_windows(draw, keys["n_layer"]))
    if family == "gemma2":
        keys.update(attention_softcap=draw.choice((None, 2.0)), logit_softcap=draw.choice((None, 3.0)))
        keys.update(attention_scale=draw.choice((None, draw.randint(1, 300) ** -0.5)))
    return resolve(**keys)


def random_mixture(draw: random.Random) -> ModelConfig | None:
    """A family's model with one to three parts drawn from the registries; None where that makes no model."""
    config = random_member(draw, draw.choice(list(FAMILIES)))
    changes = {
        "normalization": draw.choice(list(components("normalization"))),
        "ffn_type": draw.choice(list(components("ffn_type"))),
        "position_encoding": draw.choice(list(components("position_encoding"))),
        "norm_position": draw.choice(list(components("norm_position"))),
        "activation": draw.choice(list(components("activation"))),
        "qk_norm": draw.choice((True, False, "full")),
        "bias": draw.random() < 0.5,
        "qkv_bias": draw.random() < 0.5,
        "embedding_scale": draw.random() < 0.5,
        "embedding_norm": draw.random() < 0.5,
        "attention_scale": draw.choice((0.3, 1.0)),
        "logit_softcap": 2.0,
        "layer_pattern": draw.choice(("mlp,transformer", "transformer")),
        "zero_init": True,
    }
    values = {key: value for key, value in config.to_dict().items() if value is not None}
    try:
        return resolve("custom", **{**values, **dict(draw.sample(list(changes.items()), draw.randint(1, 3)))})
    except ValueError:
        return None


def difference(config: ModelConfig, hf: dict, seed: int) -> float:
    """The largest difference of a logit between the model here and the class there, with the same random weights."""
    torch.manual_seed(seed)
    ours = build_model(config).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    weights = {
        name: tensor[: config.vocab_size] if name in ("embedding.weight", "head.weight") else tensor
        for name, tensor in ours.named_parameters()
    }
    there = transformers.AutoConfig.for_model(**{**dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")), **hf})
    there._attn_implementation = "eager"
    theirs = transformers.AutoModelForCausalLM.from_config(there).float().eval()
    renamed = {rule.theirs: rule.to_theirs(weights).detach() for rule in tensor_rules(config, hf["model_type"])}
    told = theirs.load_state_dict(renamed, strict=False)
    assert not told.unexpected_keys and set(told.missing_keys) <= ({"lm_head.weight"} if config.weight_tying else set())
    tokens = torch.randint(config.vocab_size, (2, config.block_size))
    with torch.no_grad():
        return float((ours(tokens) - theirs(tokens, use_cache=False).logits).abs().max())


def check(seed: int) -> None:
    """Even seeds: a member of a family, which has to be expressed. Odd ones: a mixture, expressed rightly or refused."""
    draw = random.Random(seed)
    family = list(FAMILIES)[seed // 2 % len(FAMILIES)]
    config = random_member(draw, family) if seed % 2 == 0 else random_mixture(draw)
    if config is None:
        return
    try:
        hf = config_to_hf(config, {"model_type": family})  # which of several families that fit
    except ConversionError as error:
        assert seed % 2 == 1, f"{config.name} is refused: {error}"
        return
    assert seed % 2 or hf["model_type"] == family
    assert difference(config, hf, seed) < 1e-5, config.name
    again = config_from_hf(hf)
    assert build_model(again, device="meta").num_parameters() <= build_model(config, device="meta").num_parameters()


@pytest.mark.parametrize("seed", range(40))
def test_a_random_model_has_the_same_logits_there_or_is_refused(seed):
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("hundred", range(9))
def test_nine_hundred_random_models_have_the_same_logits_there_or_are_refused(hundred):
    for seed in range(1000 + 100 * hundred, 1100 + 100 * hundred):
        check(seed)
