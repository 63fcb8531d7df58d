"""A component is added in one place: the registering snippet below is all that these tests write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from torch.utils.flop_counter import FlopCounterMode

from configurator import ConfigError, configure, convert, describe_type, print_help_all
from flops_parameter_counting.flops import flops_per_token
from flops_parameter_counting.parameters import count_parameters
from model_builder import build_model
from model_components import Constant, register_activation, register_norm
from model_config import ModelConfig, Part, components, list_components, resolve, unregister


@pytest.fixture
def softsquare():
    @register_activation("softsquare", short="SoftSq")
    def softsquare(x):
        """Square of softplus: smooth, never zero."""
        return F.softplus(x).square()

    yield softsquare
    unregister("activation", "softsquare")


@pytest.fixture
def scale_norm():
    @register_norm("scalenorm", short="Scale")
    class ScaleNorm(torch.nn.Module):
        """One learned length for the whole vector (Nguyen & Salazar 2019)."""

        def __init__(self, config, width):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(1))

        def initial(self, name):
            return Constant(5.0)

        @staticmethod
        def parts(config, width):
            return [Part("norm", parameters=1)]

        def forward(self, x):
            return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-6) * self.weight.to(x.dtype)

    yield ScaleNorm
    unregister("normalization", "scalenorm")


def losses(model, steps: int = 12) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = torch.randint(60, (8, 16), generator=torch.Generator().manual_seed(0))
    found = []
    for _ in range(steps):
        loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def test_a_new_activation_is_listed_and_described(softsquare, capsys):
    list_components()
    row = next(line for line in capsys.readouterr().out.splitlines() if "softsquare" in line)
    assert row.split()[:3] == ["activation", "softsquare", "SoftSq"] and row.endswith("Square of softplus: smooth, never zero.")
    assert "'softsquare'" in describe_type("activation")
    print_help_all("usage")
    assert "'softsquare'" in next(line for line in capsys.readouterr().out.splitlines() if "--activation:" in line)


def test_a_new_activation_is_chosen_by_its_key_and_checked(softsquare):
    train = configure(["--activation=softsquare"]).train
    assert train.model_config().activation == "softsquare"
    with pytest.raises(ConfigError, match="did you mean 'softsquare'.*softsquare"):
        configure(["--activation=softsqare"])
    with pytest.raises(ValueError, match="activation='softsquare' has no effect with ffn_type='swiglu'"):
        resolve("llama", activation="softsquare")
    assert convert("activation", "softsquare") == "softsquare"


@pytest.mark.parametrize("preset", ["gpt2", "gpt2_postnorm", "custom"])
def test_a_new_activation_is_named_counted_and_trained(softsquare, preset):
    config, plain = resolve(preset, **TINY, activation="softsquare"), resolve(preset, **TINY)
    assert "-SoftSq-" in config.name and config.fingerprint != plain.fingerprint and config.name != plain.name
    assert ModelConfig.from_json(config.to_json()) == config
    assert count_parameters(config) == build_model(config).num_parameters()
    with FlopCounterMode(display=False) as counter:
        build_model(config, device="meta")(torch.zeros(2, 16, dtype=torch.long, device="meta")).sum().backward()
    assert counter.get_total_flops() == 32 * flops_per_token(config).full
    model = build_model(config)
    block = model.blocks[0].feed_forward.sublayer
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(block(x), block.down_proj(torch.log1p(block.up_proj(x).exp()) ** 2))
    found = losses(model)
    assert found[-1] < 0.9 * found[0]


def test_a_new_norm_with_parameters_of_its_own_is_counted_started_and_trained(scale_norm):
    config = resolve("llama", **TINY, normalization="scalenorm")
    assert "-Scale-" in config.name
    model = build_model(config)
    assert float(model.norm.weight.detach()) == 5.0
    assert count_parameters(config) == model.num_parameters() == count_parameters(resolve("llama", **TINY)) - 5 * 31
    found = losses(model)
    assert found[-1] < 0.9 * found[0]


def test_what_was_added_for_a_test_is_gone_after_it():
    assert "softsquare" not in components("activation") and "scalenorm" not in components("normalization")


def test_one_snippet_is_all_that_a_run_needs(run_python, tmp_path):
    """The way docs/ARCHITECTURE.md shows: the decorator once, then --help and --print_config know the part."""
    (tmp_path / "mine.py").write_text('''
import sys
import torch.nn.functional as F
from model_components import register_activation

@register_activation("cubed", short="Cubed")
def cubed(x):
    """The cube of x."""
    return x ** 3

import train
sys.exit(train.main(sys.argv[1:]))
''')
    root = str(Path(__file__).resolve().parent.parent)
    environment = {"PYTHONPATH": root}
    helped = run_python(tmp_path / "mine.py", "--help_all", cwd=tmp_path, env=environment)
    assert helped.returncode == 0 and "'cubed'" in helped.stdout
    printed = run_python(tmp_path / "mine.py", "--activation=cubed", "--print_config", cwd=tmp_path, env=environment)
    assert printed.returncode == 0 and "activation = 'cubed'" in printed.stdout, printed.stderr
    plain = run_python(Path(root) / "train.py", "--activation=cubed", "--print_config", cwd=tmp_path)
    assert plain.returncode == 2 and "activation='cubed' is not registered" in plain.stderr
