"""What a registered component may declare, and what is refused: keys, checks, first values, what it decides (issue 9.3)."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import ROOT, TINY
from torch import nn

from command_line import UsageError
from configurator import ConfigError, configure
from model_builder import build_model, initialize
from model_components import Constant, FeedForward, LayerNorm, Normal, TransformerBlock
from model_config import COMPONENT_KINDS, EXECUTION_KINDS, PRESETS, Key, components, declared_keys, register, resolve, unregister
from training.checkpoint import CheckpointStore, load_model, model_tensors
from training.continuing import go_on
from training.registry import OBJECTIVES, OPTIMIZERS

FROZEN = json.loads((ROOT / "tests/frozen/architectures.json").read_text(encoding="utf-8"))


@pytest.fixture
def registered():
    """registered(kind, name, build, **declared): enter a component until the end of the test."""
    entered = []

    def enter(kind, name, build, **declared):
        declared.setdefault("short", name.capitalize())
        register(kind, name, **declared)(build)
        entered.append((kind, name))
        return build

    yield enter
    for kind, name in entered:
        unregister(kind, name)


# ------------------------------------------------------------------------------------------- names and fingerprints


def test_names_and_fingerprints_are_those_of_commit_91493a6():
    """Written by that commit for a random sample of presets with components and keys; every value occurs."""
    assert len(FROZEN) > 50
    for preset, overrides, name, fingerprint in FROZEN:
        config = resolve(preset, **overrides)
        assert (config.name, config.fingerprint) == (name, fingerprint)
    values = {(key, str(value)) for _, overrides, _, _ in FROZEN for key, value in overrides.items()}
    for kind in COMPONENT_KINDS:
        for name in () if kind == "block" or kind in EXECUTION_KINDS else components(kind):
            assert (kind, name) in values
    later = {
        "qwen2",
        "olmo3",
        "gemma",
        "phi3",
        "arcee",
        "starcoder2",
        "opt",
        "lm_tiny",
        "lm_small",
        "lm_medium",
    }  # than that commit
    assert {preset for preset, *_ in FROZEN} == set(PRESETS) - later


def test_a_scaling_of_rope_without_rope_is_refused_with_a_sentence():
    with pytest.raises(ValueError, match="rope_scaling='llama3' has no effect on this model: only position_encoding='rope'"):
        resolve("gpt2", rope_scaling="llama3")


def test_no_component_is_named_in_the_logic_of_model_config():
    """Whole words in the source, but for its docstrings and help texts: every name of a component, every kind of it."""
    import ast

    source = (ROOT / "model_config.py").read_text(encoding="utf-8")
    words = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            words.add(node.value)
        elif isinstance(node, (ast.Name, ast.Attribute)):
            words.add(node.id if isinstance(node, ast.Name) else node.attr)
    named = {name for kind in COMPONENT_KINDS for name in components(kind)} - {"none"}  # a word of Python's, too
    assert len(words) > 100 and not words & named and not words & declared_keys().keys()


# ------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize(
    "key, says",
    [
        (lambda: Key("dropout", float, 0.0, "mine"), "declares the key 'dropout', which ModelConfig has already"),
        (lambda: Key("learning_rate", float, 0.0, "mine"), "'learning_rate', which TrainConfig has already"),
        (lambda: Key("rope_theta", float, 5.0, "mine"), "'rope_theta', which another one declares with other words"),
        (lambda: Key("mine", int, 5, "mine", tag="Win"), "tag 'Win', which the key 'sliding_window' has"),
        (lambda: Key("mine", int, 5, "mine", tag="FF"), "tag 'FF', which ModelConfig has already"),
        (lambda: Key("use_fsdp", bool, False, "mine"), "'use_fsdp', which the command line has already"),
        (lambda: Key("base", str, "x", "mine"), "'base', which the command line has already"),
        (lambda: Key("Mine", int, 5, "mine"), "lower-case Python name"),
        (lambda: Key("mine", list, [], "mine"), "has the type"),
        (lambda: Key("mine", int, "many", "mine"), "default 'many', which is not of its type"),
        (lambda: Key("mine", int, 5, "mine", tag="A2"), "a letter first and last"),
    ],
    ids=lambda value: "" if callable(value) else value,
)
def test_a_key_that_cannot_be_is_refused_when_it_is_declared(key, says):
    before = dict(components("ffn_type"))
    with pytest.raises(ValueError, match=says):
        register("ffn_type", "mine", short="Mine", keys=(key(),))(FeedForward)
    assert components("ffn_type") == before


def test_every_type_of_key_is_converted_named_and_told_apart(registered):
    from typing import Literal

    keys = (
        Key("mine_count", int, 3, "a count"),
        Key("mine_share", float, 0.5, "a share", tag="Share"),
        Key("mine_mode", Literal["plain", "fancy"], "plain", "a mode", tag="Mode"),
        Key("mine_flag", bool, False, "a flag", tag="Flagged"),
        Key("mine_limit", int | None, None, "a limit", tag="Limit"),
    )
    registered("ffn_type", "mine", FeedForward, keys=keys)
    plain = resolve("custom", **TINY, ffn_type="mine")
    assert [getattr(plain, key.name) for key in keys] == [3, 0.5, "plain", False, None]
    names, fingerprints = {plain.name}, {plain.fingerprint}
    for key, text, value, shown in (
        ("mine_count", "7", 7, "-MineCount7"),
        ("mine_share", "2", 2.0, "-Share2"),
        ("mine_mode", "fancy", "fancy", "-Mode_fancy"),
        ("mine_flag", "True", True, "-Flagged"),
        ("mine_limit", "9", 9, "-Limit9"),
    ):
        shape = [f"--{name}={number}" for name, number in TINY.items()]
        model = configure([*shape, "--arch_preset=custom", "--ffn_type=mine", f"--{key}={text}"]).train.model_config()
        assert getattr(model, key) == value and type(getattr(model, key)) is type(value) and shown in model.name
        names.add(model.name)
        fingerprints.add(model.fingerprint)
        assert type(model).from_json(model.to_json()) == model
    assert len(names) == len(fingerprints) == 6
    assert resolve("custom", **TINY, ffn_type="mine", mine_limit=0) == plain  # a number that may be None is off at 0
    bare = configure(["--arch_preset=custom", "--ffn_type=mine", "--mine_flag", "--n_layer=2"])
    assert bare.train.model_config().mine_flag is True


def test_a_key_may_be_shared_and_lives_as_long_as_one_component_declares_it(registered):
    shared = Key("mine_shared", int, 1, "shared")
    registered("ffn_type", "mine", FeedForward, keys=(shared,))
    register("ffn_type", "yours", short="Yours", keys=(shared,))(FeedForward)
    assert resolve("custom", ffn_type="yours", mine_shared=4).mine_shared == 4
    unregister("ffn_type", "yours")
    assert resolve("custom", ffn_type="mine", mine_shared=4).mine_shared == 4
    with pytest.raises(ValueError, match="only ffn_type='mine' reads it"):
        resolve("custom", mine_shared=4)


def test_the_key_of_a_block_given_alone_chooses_the_block(registered):
    registered("block", "mine", TransformerBlock, keys=(Key("mine_depth", int, 2, "depth"),), has_attention=True)
    assert set(resolve("custom", **TINY, mine_depth=3).layer_pattern) == {"mine"}
    assert set(resolve("custom", **TINY).layer_pattern) == {"transformer"}
    mixed = resolve("custom", **TINY, mine_depth=3, layer_pattern="mine,transformer")
    assert mixed.name.endswith("-MineDepth3-[mine,transformer]")


def test_the_key_of_an_execution_kind_changes_neither_name_nor_fingerprint(registered):
    attention = components("attention_backend")["manual"].build
    registered("attention_backend", "mine", attention, keys=(Key("mine_tile", int, 64, "rows at a time"),))
    plain = resolve("custom", **TINY)
    tiled = resolve("custom", **TINY, attention_backend="mine", mine_tile=32)
    assert tiled.mine_tile == 32 and (tiled.name, tiled.fingerprint) == (plain.name, plain.fingerprint)
    with pytest.raises(ValueError, match="mine_tile=32 has no effect"):
        resolve("custom", **TINY, mine_tile=32)


@pytest.mark.parametrize("registry", [OBJECTIVES, OPTIMIZERS], ids=lambda registry: registry.key)
def test_an_entry_of_the_run_declares_keys_too(registry, capsys):
    from configurator import print_help_all

    key = Key("mine_strength", float, 0.5, "how strong it is")
    entry = next(iter(registry.values()))
    registry.register("mine", entry, keys=(key,))
    try:
        got = configure([f"--{registry.key}=mine", "--mine_strength=2"])
        assert got.train.mine_strength == 2.0 and got.origins["mine_strength"] == "command line"
        assert configure([f"--{registry.key}=mine"]).train.mine_strength == 0.5
        assert configure([]).train.mine_strength is None
        assert got.train.model_config() == configure([]).train.model_config()
        with pytest.raises(ConfigError, match=f"mine_strength=2.0 has no effect on this run: only {registry.key}='mine'"):
            configure(["--mine_strength=2"])
        with pytest.raises(ConfigError, match="mine_strength='very' is not a number"):
            configure([f"--{registry.key}=mine", "--mine_strength=very"])
        print_help_all("usage")
        assert "--mine_strength: a number\n        how strong it is [0.5]" in capsys.readouterr().out
        values, origins = got.resolved(got.train.model_config())
        assert values["mine_strength"] == 2.0
        state = json.loads(json.dumps(dict(config=values, origins=origins)))
        assert go_on(configure(["--resume"]), state, "there").train.mine_strength == 2.0
        with pytest.raises(UsageError, match="mine_strength +3.0 .command line. +2.0 .command line."):
            go_on(configure(["--resume", "--mine_strength=3"]), state, "there")
        with pytest.raises(ValueError, match="'mine_strength', which an entry of"):
            register("ffn_type", "mine", short="Mine", keys=(key,))(FeedForward)
    finally:
        registry.unregister("mine")
    with pytest.raises(ConfigError, match="--mine_strength is not a key"):
        configure(["--mine_strength=2"])


# ------------------------------------------------------------------------------------------- checks


def test_a_check_is_reported_with_everything_else_that_is_wrong(registered):
    registered("ffn_type", "mine", FeedForward, check=lambda config: [f"d_ff={config.d_ff} is not to mine's liking."])
    with pytest.raises(ValueError) as error:
        resolve("custom", **TINY, ffn_type="mine", d_ff=33, dropout=2.0)
    assert str(error.value).split("\n") == ["dropout=2.0 is not a probability in [0, 1).", "d_ff=33 is not to mine's liking."]


def test_a_check_that_stumbles_over_a_mistake_hides_it_not(registered):
    registered("ffn_type", "mine", FeedForward, check=lambda config: [f"{1 // config.d_ff}"] if config.d_ff < 1 else [])
    with pytest.raises(ValueError, match="^d_ff=0 must be at least 1.$"):
        resolve("custom", **TINY, ffn_type="mine", d_ff=0)


def test_what_cannot_train_on_a_device_says_so():
    flex, plain = (resolve("custom", attention_backend=name) for name in ("flex", "sdpa"))
    assert flex.problems_on("cuda") == plain.problems_on("cpu") == []
    assert "cannot train on a CPU" in flex.problems_on("cpu")[0]


# ------------------------------------------------------------------------------------------- what a component decides


def test_what_one_block_of_two_decides_is_the_value_anyway_or_refused(registered):
    registered("block", "mine", TransformerBlock, fixes={"activation": "relu"}, has_attention=True)
    alone = resolve("custom", **TINY, layer_pattern="mine")
    assert alone.activation == "relu"
    with pytest.raises(
        ValueError,
        match="mixes 'mine', whose activation is 'relu', with 'transformer', whose activation would be 'gelu'; a model has one "
        "activation. Give --activation=relu",
    ):
        resolve("custom", **TINY, layer_pattern="mine,transformer")
    both = resolve("custom", **TINY, layer_pattern="mine,transformer", activation="relu")
    assert both.activation == "relu" and "-ReLU-" in both.name
    with pytest.raises(ValueError, match="activation='silu' has no effect with block='mine', whose activation is 'relu'"):
        resolve("custom", **TINY, layer_pattern="mine", activation="silu")


def test_two_components_that_decide_differently_are_refused(registered):
    registered("block", "mine", TransformerBlock, fixes={"activation": "relu"}, has_attention=True)
    with pytest.raises(ValueError, match="decide different values of activation"):
        resolve("llama", **TINY, layer_pattern="mine")


def test_a_block_may_decide_another_component(registered):
    registered("block", "mine", TransformerBlock, fixes={"ffn_type": "swiglu"}, has_attention=True)
    config = resolve("custom", **TINY, layer_pattern="mine")
    assert (config.ffn_type, config.activation) == ("swiglu", "silu")
    assert "SwiGLU" in config.name and type(build_model(config).blocks[0].feed_forward.sublayer).__name__ == "SwiGLU"


def test_a_component_that_decides_what_is_no_key_is_refused(registered):
    registered("ffn_type", "mine", FeedForward, fixes={"activaton": "relu"})
    with pytest.raises(ValueError, match="decides 'activaton', which is not a key of a model .did you mean 'activation'"):
        resolve("custom", **TINY, ffn_type="mine")


# ------------------------------------------------------------------------------------------- first values


class WithBuffers(FeedForward):
    """A feed-forward with a fixed mixing matrix, a scale that is saved, and one that is not."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("mixing", torch.empty(config.n_embd, config.n_embd))
        self.register_buffer("scale", torch.empty(1))
        self.register_buffer("ramp", torch.arange(config.n_embd).float(), persistent=False)
        self.gain = nn.Parameter(torch.empty(1))

    def initial(self, name):
        return {
            "mixing": Normal(0.5),
            "scale": Constant(2.0),
            "ramp": torch.arange(self.ramp.numel()).float(),
            "gain": torch.tensor([3.0]),
        }[name]

    def forward(self, x):
        return super().forward(self.gain * self.scale * (x @ self.mixing) + self.ramp)


def tokens() -> torch.Tensor:
    return torch.randint(60, (2, 16), generator=torch.Generator().manual_seed(0))


def test_buffers_and_parameters_start_as_the_component_says(registered):
    registered("ffn_type", "mine", WithBuffers)
    config = resolve("custom", **TINY, ffn_type="mine")
    one, same, other = (build_model(config, seed=seed) for seed in (1, 1, 2))
    layer = one.blocks[1].feed_forward.sublayer
    assert torch.equal(layer.ramp, torch.arange(32.0)) and float(layer.scale) == 2.0 and float(layer.gain.detach()) == 3.0
    assert 0.4 < float(layer.mixing.std()) < 0.6
    assert not torch.equal(layer.mixing, one.blocks[0].feed_forward.sublayer.mixing)
    assert torch.equal(layer.mixing, same.blocks[1].feed_forward.sublayer.mixing)
    assert not torch.equal(layer.mixing, other.blocks[1].feed_forward.sublayer.mixing)
    plain = build_model(resolve("custom", **TINY), seed=1)
    assert torch.equal(layer.up_proj.weight, plain.blocks[1].feed_forward.sublayer.up_proj.weight)


def test_a_model_built_without_memory_gets_its_buffers_when_it_gets_memory(registered):
    """As training and loading do: built on the meta device, then to_empty."""
    registered("ffn_type", "mine", WithBuffers)
    config = resolve("custom", **TINY, ffn_type="mine")
    torch.full((1 << 20,), 7.0)  # memory that is handed out again is not zero
    model = build_model(config, device="meta").to_empty(device="cpu")
    layer = model.blocks[0].feed_forward.sublayer
    assert torch.equal(layer.ramp, torch.arange(32.0)) and float(layer.scale) == 2.0
    initialize(model, 1337)
    for mine, theirs in zip(model.state_dict().values(), build_model(config).state_dict().values()):
        assert torch.equal(mine, theirs)


def test_persistent_buffers_are_in_a_checkpoint_and_come_back(registered, tmp_path):
    registered("ffn_type", "mine", WithBuffers)
    config = resolve("custom", **TINY, ffn_type="mine")
    model = build_model(config, seed=3).eval()
    for block in model.blocks:
        block.feed_forward.sublayer.scale.fill_(5.0)
    saved = model_tensors(model)
    assert {name.rpartition(".")[2] for name in saved if "sublayer" in name} >= {"mixing", "scale", "gain"}
    assert not any(name.endswith("ramp") for name in saved)
    state = dict(model=dict(name=config.name, fingerprint=config.fingerprint, config=config.to_dict()), config={}, origins={})
    CheckpointStore(tmp_path).save(1, saved, state, keep_last=1)
    loaded, _ = load_model(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(tokens()), model(tokens()))


def made(**members):
    """A feed-forward whose __init__ adds these parameters and buffers, and whose initial answers with `initial`."""
    initial = members.pop("initial", None)

    class Made(FeedForward):
        """A feed-forward with something more."""

        def __init__(self, config):
            super().__init__(config)
            for name, (tensor, options) in members.items():
                if isinstance(tensor, nn.Parameter):
                    self.register_parameter(name, tensor)
                else:
                    self.register_buffer(name, tensor, **options)

    if initial is not None:
        Made.initial = lambda self, name: initial[name]
    return Made


@pytest.mark.parametrize(
    "build, says",
    [
        (made(mask=(torch.ones(3), {})), "the buffer blocks.0.feed_forward.sublayer.mask of Made has no first value"),
        (made(weight=(nn.Parameter(torch.ones(3)), {})), "the parameter .*.weight of Made has no first value"),
        (
            made(mask=(torch.ones(3), {}), initial={"mask": torch.ones(4)}),
            r"has the shape \(3,\), but initial",
        ),
        (made(mask=(torch.ones(3), {}), initial={"mask": 1.0}), "it has to be Normal"),
        (made(mask=(torch.ones(3), {"persistent": False}), initial={"mask": Normal(1.0)}), "random and not be saved"),
        (made(gain=(nn.Parameter(torch.ones(())), {}), initial={"gain": Constant(1.0)}), r"no dimension.*the shape \(1,\)"),
    ],
    ids=["no value", "parameter", "shape", "no start", "random, not saved", "0-d"],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_has_no_first_value_or_cannot_be_sharded_is_refused_when_the_model_is_built(registered, build, says, device):
    registered("ffn_type", "mine", build)
    with pytest.raises(ValueError, match=says):
        build_model(resolve("custom", **TINY, ffn_type="mine"), device=device)


def test_a_norm_that_inherits_its_first_values_has_none_for_what_it_adds(registered):
    """Zeros from the base class would be wrong without a word."""

    class Counting(LayerNorm):
        """A layer norm with a counter."""

        def __init__(self, config, width):
            super().__init__(config, width)
            self.register_buffer("count", torch.ones(1))

    registered("normalization", "mine", Counting)
    with pytest.raises(ValueError, match="the buffer .*norm.count of Counting has no first value"):
        build_model(resolve("custom", **TINY, normalization="mine"))


def test_a_module_of_pytorch_is_refused_with_the_remedy(registered):
    class Plain(FeedForward):
        """A feed-forward with a layer that does not know how to start."""

        def __init__(self, config):
            super().__init__(config)
            self.more = nn.Linear(3, 3)

    registered("ffn_type", "mine", Plain)
    with pytest.raises(ValueError, match="more.weight of Linear has no first value.*model_components.Linear and Embedding bring"):
        build_model(resolve("custom", **TINY, ffn_type="mine"))
