"""A mixture of experts, as a stranger writes it (a_strangers_parts.py): built, counted, named, configured, generated from."""

from __future__ import annotations

import json

import pytest
import torch
from a_strangers_parts import registered_mixture, without_mixture
from conftest import TINY
from torch.utils.flop_counter import FlopCounterMode

import model_config
from command_line import UsageError
from configurator import ConfigError, configure, print_config, print_help_all, read_config_file
from flops_parameter_counting.flops import breakdown, flops_per_token
from flops_parameter_counting.parameters import count_active_parameters, count_parameters
from flops_parameter_counting.scaling_laws import LAWS, candidates, size_for
from model_builder import build_model
from model_components import auxiliary_losses
from model_config import ModelConfig, resolve
from training.checkpoint import CheckpointStore, load_model, model_tensors
from training.continuing import go_on, take_model
from training.objectives import next_token_loss

SHAPE = dict(TINY, ffn_type="mixture", d_ff=24)


@pytest.fixture(autouse=True)
def mixture():
    with registered_mixture():
        yield


def tokens(batch: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(60, (batch, length), generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------- counted


@pytest.mark.parametrize("n_experts, k", [(4, 2), (8, 1), (3, 3)])
def test_n_in_all_and_active_are_the_formula_and_the_built_model(n_experts, k):
    config = resolve("llama", **SHAPE, n_experts=n_experts, experts_per_token=k)
    dense = count_parameters(resolve("llama", **dict(TINY, ffn_type="standard", d_ff=1, bias=False))) - 2 * 2 * 32
    expert, router = 2 * 32 * 24, 32 * n_experts
    assert count_parameters(config) == dense + 2 * (n_experts * expert + router) == build_model(config).num_parameters()
    assert count_active_parameters(config) == dense + 2 * (k * expert + router)


@pytest.mark.parametrize("preset", ["llama", "gemma2"])
def test_flops_are_of_the_active_part_and_pytorchs_count(preset):
    config = resolve(preset, **SHAPE, n_experts=8, sliding_window=16 if preset == "gemma2" else None)
    model = build_model(config, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 16, dtype=torch.long, device="meta")).sum().backward()
    assert counter.get_total_flops() == 32 * flops_per_token(config).full
    more = resolve(preset, **SHAPE, n_experts=9, sliding_window=16 if preset == "gemma2" else None)
    assert flops_per_token(more).full - flops_per_token(config).full == 6 * 2 * 32  # one more column of two routers
    rows = {row.name: row for row in breakdown(config)}
    assert rows["experts"].parameters == 2 * 8 * 2 * 32 * 24 and rows["experts"].forward == 2 * 2 * 2 * 2 * 32 * 24


def test_predictions_take_the_active_n():
    config = resolve("llama", **SHAPE, n_experts=64)
    assert count_parameters(config) > 10 * count_active_parameters(config) / 2
    assert size_for(LAWS["hoffmann"], config) == count_active_parameters(config)
    without = 2 * 61 * 32  # Kaplan's N has no embeddings, tied or not
    assert size_for(LAWS["kaplan"], config) == count_active_parameters(config) - without
    found = candidates(LAWS["hoffmann"], 1e18, ffn_type="mixture", n_experts=16, vocab_size=1000)
    law = LAWS["hoffmann"]
    for one in found[:3]:
        assert one.active < one.parameters
        assert one.loss == pytest.approx(law.loss(one.active, one.tokens))
        assert one.active == count_active_parameters(one.config) and one.parameters == count_parameters(one.config)


# ------------------------------------------------------------------------------------------- what it computes


def test_each_token_is_the_weighted_sum_of_its_experts():
    config = resolve("llama", **SHAPE, n_experts=5, experts_per_token=2)
    torch.manual_seed(0)
    layer = build_model(config).blocks[0].feed_forward.sublayer
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
        x = torch.randn(2, 3, 32)
        y = layer(x)
        for b in range(2):
            for t in range(3):
                scores = torch.softmax(layer.router.weight @ x[b, t], dim=0)
                best = sorted(range(5), key=lambda e: -float(scores[e]))[:2]
                total = sum(float(scores[e]) for e in best)
                by_hand = sum(float(scores[e]) / total * (layer.activation(x[b, t] @ layer.up[e]) @ layer.down[e]) for e in best)
                torch.testing.assert_close(y[b, t], by_hand, rtol=1e-4, atol=1e-5)


def test_the_balance_loss_reaches_the_router_and_is_reported():
    config = resolve("llama", **SHAPE, balance_weight=1.0)
    gradients = []
    for weight in (0.0, 1.0):
        model = build_model(config)
        with auxiliary_losses(torch.tensor(weight)) as found:
            loss = next_token_loss(model, tokens()[:, :-1], tokens()[:, 1:])
        loss.backward()
        gradients.append(model.blocks[1].feed_forward.sublayer.router.weight.grad)
        assert found.tokens == {"balance": 2 * 2 * 15}
        assert 1.0 <= float(found.totals["balance"]) / 60 < 1.5  # 1 where all experts are equally busy
    assert not torch.equal(*gradients)


@pytest.mark.parametrize("length", [1, 7, 16])
def test_generation_with_the_cache_is_generation_without(length):
    torch.manual_seed(0)
    model = build_model(resolve("gemma2", **SHAPE, sliding_window=5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    cached, plain = (model.generate(tokens(length=length), 9, temperature=0.0, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)


# ------------------------------------------------------------------------------------------- keys of its own


def test_its_keys_make_other_models_with_other_names():
    plain, wide, both = (
        resolve("llama", **SHAPE, **keys) for keys in ({}, dict(n_experts=8), dict(n_experts=8, experts_per_token=1))
    )
    assert (plain.n_experts, wide.n_experts, both.experts_per_token) == (4, 8, 1)
    assert "MoE(SiLU)" in plain.name and "Exp" not in plain.name
    assert "-Exp8" in wide.name and wide.name.replace("-Exp8", "") == plain.name
    assert both.name == wide.name.replace("-Exp8", "-Exp8-Top1")
    assert len({one.fingerprint for one in (plain, wide, both)}) == 3
    for one in (plain, wide, both):
        assert ModelConfig.from_json(one.to_json()) == one and hash(ModelConfig.from_json(one.to_json())) == hash(one)
    assert resolve("llama").n_experts is None


def test_models_without_it_keep_name_and_fingerprint_while_it_is_registered():
    here = [(resolve(name).name, resolve(name).fingerprint) for name in model_config.PRESETS]
    with without_mixture():
        assert here == [(resolve(name).name, resolve(name).fingerprint) for name in model_config.PRESETS]
        with pytest.raises(ValueError, match="'n_experts' is not a key of a model"):
            resolve("llama", n_experts=8)
        assert resolve("llama", n_experts=None) == resolve("llama")  # what another process saved of a key that it knew


def test_its_keys_are_flags_that_are_converted_checked_and_refused_elsewhere():
    assert configure(["--ffn_type=mixture", "--n_experts=8"]).train.model_config().n_experts == 8
    assert configure(["--ffn_type=mixture", "--n_experts", "1e1"]).train.model_config().n_experts == 10
    for words, says in (
        (["--n_experts=8"], "n_experts=8 has no effect on this model: only ffn_type='mixture' reads it"),
        (["--ffn_type=mixture", "--n_experts=many"], "n_experts='many' is not a whole number"),
        (["--ffn_type=mixture", "--n_expert=8"], "did you mean 'n_experts'"),
        (["--ffn_type=mixture", "--experts_per_token=5"], "experts_per_token=5 must be between 1 and n_experts=4"),
    ):
        with pytest.raises(ConfigError, match=says):
            configure(words)


def test_its_keys_stand_in_config_files_presets_and_help(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text('arch_preset = "mine"\nexperts_per_token = 1\n')
    values = dict(model_config.PRESETS["llama"][1], ffn_type="mixture", n_experts=6)
    monkeypatch.setitem(model_config.PRESETS, "mine", ("with experts", values))
    got = configure([str(tmp_path / "mine.py")])
    model = got.train.model_config()
    assert (model.n_experts, model.experts_per_token) == (6, 1)
    assert got.origins["experts_per_token"].endswith("mine.py:2")
    print_config(got)
    printed = {line.split(" = ")[0]: line.split("#") for line in capsys.readouterr().out.splitlines() if " = " in line}
    assert printed["n_experts"][0].strip() == "n_experts = 6" and printed["n_experts"][1].strip() == "preset mine"
    assert printed["balance_weight"][1].strip() == "derived"
    print_help_all("usage")
    text = capsys.readouterr().out
    assert "--n_experts: a whole number\n        feed-forwards that a token can be sent to (mixture only) [4]" in text


def test_its_keys_are_saved_and_restored_and_fixed_on_resume(tmp_path):
    first = configure(["--ffn_type=mixture", "--n_experts=8"])
    values, origins = first.resolved(first.train.model_config())
    assert (values["n_experts"], values["experts_per_token"]) == (8, 2)
    (tmp_path / "run.json").write_text(json.dumps(dict(config=values, origins=origins)))
    assert read_config_file(tmp_path / "run.json")["n_experts"][0] == 8
    state = json.loads(json.dumps(dict(config=values, origins=origins)))
    again = go_on(configure(["--resume"]), state, "there")
    assert again.train.model_config() == first.train.model_config()
    with pytest.raises(UsageError, match="n_experts +4 \\(command line\\) +8 \\(command line\\)"):
        go_on(configure(["--resume", "--n_experts=4"]), state, "there")
    weights, notes = take_model(configure(["--init_from=weights:there"]), state["config"], "there")
    assert weights.train.model_config() == first.train.model_config() and not notes
    plain = configure(["--arch_preset=llama"])
    values, origins = plain.resolved(plain.train.model_config())
    assert values["n_experts"] is None
    (tmp_path / "run.json").write_text(json.dumps(dict(config=values, origins=origins)))
    with without_mixture():  # a key that nobody knows there, and that was not used
        assert "n_experts" not in read_config_file(tmp_path / "run.json")


def test_a_checkpoint_of_it_loads_to_the_same_logits(tmp_path):
    config = resolve("llama", **SHAPE, n_experts=3)
    model = build_model(config, seed=5).eval()
    state = dict(model=dict(name=config.name, fingerprint=config.fingerprint, config=config.to_dict()), config={}, origins={})
    CheckpointStore(tmp_path).save(1, model_tensors(model), state, keep_last=1)
    loaded, _ = load_model(tmp_path)
    assert loaded.config == config
    with torch.no_grad():
        assert torch.equal(loaded(tokens()), model(tokens()))
