"""Config files and command lines: what wins, what is converted, what is refused, and how it is said."""

from __future__ import annotations

import json
import math
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import configurator
import model_components  # noqa: F401  registers the components, which are listed here
from command_line import UsageError
from configurator import (
    ConfigError,
    Configuration,
    configure,
    convert,
    describe_type,
    parse_command_line,
    print_config,
    print_help_all,
    read_config_file,
)
from model_config import components
from training.continuing import go_on, take_model
from training.registry import OBJECTIVES
from training.train_config import GROUPS, KEYS, fixed_on_resume, keys_of_the_model

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--vocab_size=61", "--block_size=16"]


@pytest.fixture
def write(tmp_path):
    """write(name, text) → the path of a config file."""

    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def refusal(*argv) -> list[str]:
    """The lines of the ConfigError that this command line raises."""
    with pytest.raises(ConfigError) as error:
        configure([str(word) for word in argv])
    lines = str(error.value).split("\n")
    assert len(lines) == len(set(lines)) and all(lines)
    return lines


# ------------------------------------------------------------------------------------------- what wins


def test_command_line_over_file_over_base_over_preset_over_default(write):
    write("base.py", "n_layer = 3\nn_head = 4\nn_embd = 64\ndropout = 0.1\n")
    top = write("top.py", 'base = "base.py"\n\nn_layer = 4\nn_head, bias = 8, True\n')
    got = configure([top, "--n_layer=5", "--arch_preset=llama"])
    model = got.train.model_config()
    assert (model.n_layer, model.n_head, model.n_embd, model.dropout, model.bias) == (5, 8, 64, 0.1, True)
    assert model.normalization == "rmsnorm" and got.train.batch_size == KEYS["batch_size"].default
    folder = Path(top).parent
    assert got.origins["n_layer"] == got.origins["arch_preset"] == "command line"
    assert got.origins["n_head"] == got.origins["bias"] == f"{folder / 'top.py'}:4"
    assert got.origins["n_embd"] == f"{folder / 'base.py'}:3" and got.origins["dropout"] == f"{folder / 'base.py'}:4"
    assert got.origins["batch_size"] == "default" and set(got.origins) == set(KEYS)
    values, origins = got.resolved(model)
    assert origins["normalization"] == "preset llama" and values["normalization"] == "rmsnorm"
    assert origins["d_ff"] == "derived" and values["d_ff"] == model.d_ff
    assert got.given("n_layer") and got.given("dropout") and not got.given("d_ff") and not got.given("batch_size")


def test_a_vocabulary_of_the_dataset_is_said_to_come_from_it():
    got = configure(["--arch_preset=llama"])
    values, origins = got.resolved(got.train.model_config(dataset_vocab_size=777))
    assert (values["vocab_size"], origins["vocab_size"]) == (777, "dataset")
    got = configure(["--vocab_size=900"])
    assert got.train.model_config(dataset_vocab_size=777).vocab_size == 900


def test_without_arguments_the_configuration_is_the_defaults():
    got = configure([])
    assert set(got.origins.values()) == {"default"}
    assert all(getattr(got.train, key) == field.default for key, field in KEYS.items())


def test_the_last_of_two_bases_deep_wins_and_a_base_lies_beside_its_file(write):
    write("deep/a.py", "n_layer = 1\nn_embd = 96\nlearning_rate = 1e-3\n")
    write("deep/b.py", 'base = "a.py"\nn_layer = 2\nn_embd = 48\n')
    top = write("c.py", 'base = "deep/b.py"\nn_layer = 3\nn_head = 4\n')
    train = configure([top]).train
    assert (train.n_layer, train.n_embd, train.learning_rate) == (3, 48, 1e-3)


# ------------------------------------------------------------------------------------------- ways to write it


@pytest.mark.parametrize(
    "words, key, value",
    [
        (["--n_layer=3"], "n_layer", 3),
        (["--n_layer", "3"], "n_layer", 3),
        (["--n-layer=3"], "n_layer", 3),
        (["--eval_only"], "eval_only", True),
        (["--eval_only", "--n_layer=3"], "eval_only", True),
        (["--eval_only=False"], "eval_only", False),
        (["--eval_only", "false"], "eval_only", False),
        (["--eval_only", "1"], "eval_only", True),
        (["--bias"], "bias", True),
        (["--weight_tying"], "weight_tying", True),
        (["--qk_norm"], "qk_norm", True),
        (["--bias", "False"], "bias", False),
        (["--compile"], "compile", True),
        (["--compile=auto"], "compile", "auto"),
        (["--compile", "auto"], "compile", "auto"),
        (["--compile=False"], "compile", False),
        (["--out_dir=a=b=c"], "out_dir", "a=b=c"),
        (["--out_dir", "a=b"], "out_dir", "a=b"),
        (["--notice="], "notice", ""),
        (["--save_interval=-1"], "save_interval", -1),
        (["--save_interval", "-1"], "save_interval", -1),
        (["--max_tokens=3e8"], "max_tokens", 300_000_000),
        (["--max_iters=1_000"], "max_iters", 1000),
        (["--grad_clip=1"], "grad_clip", 1.0),
        (["--learning_rate", "6e-4"], "learning_rate", 6e-4),
        (["--min_lr=None"], "min_lr", None),
        (["--dataset=5"], "dataset", "5"),
        (["--seed=+7"], "seed", 7),
        (["--n_layer=2", "--n_layer=3"], "n_layer", 3),
        (["--layer_pattern=transformer,mlp*2"], "layer_pattern", "transformer,mlp*2"),
    ],
)
def test_a_value_may_be_written_in_any_usual_way(words, key, value):
    got = getattr(configure(words).train, key)
    assert got == value and type(got) is type(value)


def test_a_bare_flag_does_not_swallow_the_config_file(write):
    path = write("x.py", "n_layer = 7\n")
    for words in (["--eval_only", path], [path, "--eval_only"], ["--eval_only=True", path]):
        train = configure(words).train
        assert train.n_layer == 7 and train.eval_only is True


@pytest.mark.parametrize(
    "key, value, converted",
    [
        ("n_layer", 2.0, 2),
        ("n_layer", "3e1", 30),
        ("seed", 2**53 + 1, 2**53 + 1),
        ("seed", str(2**53 + 1), 2**53 + 1),
        ("learning_rate", 1, 1.0),
        ("epochs", "0.5", 0.5),
        ("rope_theta", 10000, 10000.0),
        ("n_kv_head", None, None),
        ("out_dir", Path("a/b"), "a/b"),
        ("layer_pattern", ["transformer", "mlp"], "transformer,mlp"),
        ("compile", True, True),
        ("bias", False, False),
        ("dtype", "bfloat16", "bfloat16"),
    ],
)
def test_conversion_loses_nothing(key, value, converted):
    got = convert(key, value)
    assert got == converted and type(got) is type(converted)


@pytest.mark.parametrize(
    "key, value",
    [
        ("n_layer", 2.5),
        ("n_layer", "2.5"),
        ("n_layer", "two"),
        ("n_layer", True),
        ("n_layer", ""),
        ("n_layer", "inf"),
        ("n_layer", "nan"),
        ("n_layer", [2]),
        ("seed", None),
        ("seed", "None"),
        ("learning_rate", "fast"),
        ("learning_rate", True),
        ("learning_rate", None),
        ("bias", "yes"),
        ("bias", 2),
        ("eval_only", None),
        ("dataset", 5),
        ("out_dir", None),
        ("dtype", "bf16"),
        ("compile", "maybe"),
        ("optimizer", "sgd"),
        ("dropout", "0,1"),
        ("n_layer", b"3"),
        ("learning_rate", b"3"),
    ],
)
def test_a_wrong_type_is_refused_with_key_value_and_type(key, value):
    with pytest.raises(ConfigError) as error:
        convert(key, value)
    assert f"{key}={value!r}" in str(error.value)
    kind = describe_type(key)
    assert kind in str(error.value) and len(kind) > 5


@pytest.mark.parametrize("key", KEYS)
def test_every_default_is_of_its_own_declared_type(key):
    default = KEYS[key].default
    converted = convert(key, default)
    assert converted == default and type(converted) is type(default)


@pytest.mark.parametrize(
    "key, kind",
    [
        ("n_layer", "a whole number"),
        ("learning_rate", "a number"),
        ("optimizer", "'adamw' or 'muon'"),
        ("eval_only", "True or False"),
        ("out_dir", "a text"),
        ("compile", "'auto' or True or False"),
        ("qk_norm", "True or False or 'full'"),
        ("rope_scaling", "'none', 'linear' or 'llama3'"),
        (
            "normalization",
            (lambda names: ", ".join(names[:-1]) + " or " + names[-1])([repr(n) for n in components("normalization")]),
        ),
    ],
)
def test_a_type_is_described_in_words(key, kind):
    assert describe_type(key) == kind


@pytest.mark.parametrize(
    "key, line",
    [
        ("rope_theta", "rope_theta = 500.0"),
        ("n_kv_head", "n_kv_head = 2"),
        ("layer_pattern", "layer_pattern = 'transformer,mlp'"),
        ("d_ff", "d_ff = 100"),
        ("normalization", "normalization = 'layernorm'"),
    ],
)
def test_none_on_the_command_line_takes_back_what_a_file_set(write, key, line):
    path = write("x.py", f"arch_preset = 'llama'\n{line}\n")
    plain = configure(["--arch_preset=llama"]).train.model_config()
    assert configure([path]).train.model_config() != plain
    assert configure([path, f"--{key}=None"]).train.model_config() == plain


# ------------------------------------------------------------------------------------------- config files


def test_a_config_file_is_python_with_modules_and_names_of_its_own(write):
    path = write(
        "x.py",
        '''"""A story."""
import math
import os.path as path
_width = 64
_heads = [_h for _h in (1, 2, 4)]
n_head = _heads[-1]
n_embd = _width * n_head
learning_rate = math.pi / 1000
def _double(x): return 2 * x
n_layer: int = _double(3)
if n_layer > 5:
    d_ff = 4 * n_embd
''',
    )
    got = configure([path])
    assert (got.train.n_head, got.train.n_embd, got.train.n_layer, got.train.d_ff) == (4, 256, 6, 1024)
    assert got.train.learning_rate == math.pi / 1000
    assert got.origins["n_layer"].endswith(":10") and got.origins["d_ff"].endswith(":12")


def test_a_config_file_does_not_leak_into_this_process(write):
    path = write("x.py", "import sys\n_x = __name__\nassert __name__ != '__main__'\nn_layer = 2\n")
    before = set(vars(configurator))
    configure([path])
    assert set(vars(configurator)) == before and "n_layer" not in globals()


def test_an_unknown_name_is_refused_with_file_line_and_the_nearest_key(write):
    path = write("x.py", "n_layer = 2\n\nn_heads = 4\nlearning_rat = 1.0\nzzz = 1\nfrom math import sqrt\n")
    lines = refusal(path)
    assert len(lines) == 4
    assert f"{path}:3" in lines[0] and "'n_heads' is not a key (did you mean 'n_head'?)" in lines[0]
    assert f"{path}:4" in lines[1] and "did you mean 'learning_rate'" in lines[1]
    assert f"{path}:5" in lines[2] and "did you mean" not in lines[2]
    assert f"{path}:6" in lines[3] and "'sqrt'" in lines[3]


def test_a_line_of_yaml_is_not_passed_over(write):
    """To Python `n_layer: 1` is a type without a value: the default model would train."""
    path = write("x.yaml", "n_head = 2\nn_layer: 1\n")
    (line,) = refusal(path)
    assert f"{path}:2: 'n_layer: 1' sets nothing" in line and "n_layer = 1." in line
    typed = write("y.py", "n_layer: int = 1\n")  # which does set it
    assert configurator.read_config_file(typed)["n_layer"][0] == 1


def test_a_wrong_type_in_a_file_names_its_line(write):
    path = write("x.py", "n_layer = 2\nn_head = 'four'\n")
    assert refusal(path) == [f"{path}:2: n_head='four' is not a whole number."]


@pytest.mark.parametrize(
    "text, line, error",
    [
        ("n_layer = 2\n\nn_head = 1 / 0\n", 3, "ZeroDivisionError"),
        ("def _f():\n    return {}['x']\n\nn_layer = _f()\n", 2, "KeyError"),
        ("n_layer = 2\nimport json\njson.loads('{')\n", 3, "JSONDecodeError"),
        ("n_layer = 2\nn_head = = 4\n", 2, "SyntaxError"),
        ("n_layer = 2\n  n_head = 4\n", 2, "IndentationError"),
        ("import no_such_module\n", 1, "ModuleNotFoundError"),
        ("raise SystemExit(3)\n", 1, "SystemExit"),
        ("\nn_layer = n_heads\n", 2, "NameError"),
        ("n_layer = 2\nn_head = 'a\x00'\n", None, "null bytes"),  # a ValueError before Python 3.12
    ],
)
def test_a_config_file_that_raises_is_named_with_its_line(write, text, line, error):
    path = write("x.py", text)
    told = "\n".join(refusal(path))
    assert error in told and (f"{path}:{line}:" if line else path) in told and "None" not in told


def test_a_config_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "x.py"
    path.write_bytes(b"\xff\xfe\x00n")
    assert "x.py" in refusal(path)[0] and "cannot be read" in refusal(path)[0]


def test_a_missing_config_file_is_refused_with_what_there_is():
    (line,) = refusal("config/arch_lama.py")
    assert "config/arch_lama.py" in line and "did you mean 'config/arch_llama.py'" in line
    assert "config/quickstart.py" in line
    assert "does not exist" in refusal("/no/such/dir")[0]


def test_a_circle_of_bases_is_refused_with_its_members(write):
    write("a.py", 'base = "b.py"\n')
    write("b.py", 'base = "c.py"\n')
    path = write("c.py", 'base = "a.py"\n')
    (line,) = refusal(path)
    assert "circle" in line and all(name in line for name in ("a.py", "b.py", "c.py"))
    assert "circle" in refusal(write("self.py", 'base = "self.py"\n'))[0]


def test_a_base_that_cannot_be_used_is_said_where_it_is_named(write):
    path = write("x.py", "n_layer = 2\nbase = 3\n")
    assert refusal(path) == [f"{path}:2: base=3 must be the path of a config file."]
    path = write("y.py", "n_layer = 2\nbase = 'gone.py'\n")
    (line,) = refusal(path)
    assert "gone.py" in line and "y.py:2" in line


def test_a_config_file_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configure(["config/quickstart.py"]).train.out_dir == "out/quickstart"
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "quickstart.py").write_text("n_layer = 9\n")  # the nearer one wins
    assert configure(["config/quickstart.py"]).train.n_layer == 9


# ------------------------------------------------------------------------------------------- all problems together


def test_problems_of_the_command_line_the_file_and_the_values_are_reported_together(write):
    path = write("x.py", "n_layers = 3\nbatch_size = 'many'\n")
    told = "\n".join(refusal(path, "--bogus=1", "--n_head=abc", "--dropout=2", "--beta1=1.5", "--n_kv_head"))
    missing = [
        word
        for word in ("n_layers", "batch_size='many'", "--bogus", "n_head='abc'", "dropout=2.0", "beta1=1.5", "--n_kv_head")
        if word not in told
    ]
    assert missing == []


def test_problems_of_a_base_and_of_the_file_built_on_it_are_reported_together(write):
    write("base.py", "n_layers = 3\n")
    path = write("x.py", 'base = "base.py"\nn_heads = 4\n')
    told = "\n".join(refusal(path))
    assert "n_layers" in told and "n_heads" in told


def test_one_mistake_does_not_make_others_up(write):
    """What a file with a typo sets rightly still counts when the rest is checked."""
    path = write("x.py", "arch_preset = 'llama'\nn_head = 18\nn_embd = 2304\nzzz = 1\n")
    assert len(refusal(path, "--rope_theta=5e5", "--n_kv_head=9")) == 1
    assert len(refusal("--n_head=abc", "--n_embd=100")) == 1


@pytest.mark.parametrize(
    "key, value",
    [
        ("batch_size", 0),
        ("learning_rate", 0),
        ("learning_rate", -1),
        ("learning_rate", "nan"),
        ("learning_rate", "inf"),
        ("beta1", 1),
        ("beta2", -0.1),
        ("beta2", "nan"),
        ("weight_decay", -1),
        ("weight_decay", "nan"),
        ("grad_clip", "nan"),
        ("grad_clip", -1),
        ("min_lr", 1),
        ("min_lr", "nan"),
        ("epochs", "nan"),
        ("epochs", "inf"),
        ("max_iters", -1),
        ("warmup_iters", -1),
        ("device", "gpu"),
        ("lr_decay_fraction", 0),
        ("lr_decay_fraction", "nan"),
        ("save_interval", -2),
        ("keep_last", 0),
        ("log_interval", 0),
        ("threads", 0),
        ("total_batch_tokens", 1000),
        ("dtype", "fp16"),
        ("seed", -1),
        ("muon_momentum", 1),
        ("adam_eps", 0),
        ("parallelism", "tp"),
        ("arch_preset", "gpt3"),
    ],
)
def test_a_value_no_run_can_use_is_refused_by_name(key, value):
    (line,) = refusal(f"--{key}={value}")
    assert key in line


def test_an_impossible_shape_is_a_problem_of_the_configuration():
    assert refusal("--n_layer=18", "--n_head=18", "--n_embd=2432") == [
        "n_head=18 does not divide n_embd=2432 (head_dim would be 135.11). Use n_head=19 for head_dim 128."
    ]
    for key in ("n_head", "n_embd", "n_layer", "d_ff"):
        assert any(f"{key}=0" in line for line in refusal(f"--{key}=0"))


@pytest.mark.parametrize(
    "words, says",
    [
        (["--n_layr=2"], "--n_layr is not a key (did you mean 'n_layer'?)"),
        (["--n_layer"], "--n_layer needs a value"),
        (["--n_layer", "--n_head=2"], "--n_layer needs a value"),
        (["a.py", "b.py"], "only one config file"),
        (["--"], "is not a key"),
        (["--n_layer=2.5"], "--n_layer='2.5' is not a whole number"),
    ],
)
def test_a_bad_word_on_the_command_line_is_refused(words, says):
    assert says in "\n".join(refusal(*words))


# ------------------------------------------------------------------------------------------- exclusive keys


@pytest.mark.parametrize(
    "one, other",
    [
        ("max_iters", "max_tokens"),
        ("max_tokens", "epochs"),
        ("max_iters", "epochs"),
        ("gradient_accumulation_steps", "total_batch_tokens"),
    ],
)
def test_two_keys_that_say_the_same_thing_are_refused_together_and_the_stronger_source_wins(write, one, other):
    value = {"total_batch_tokens": 2048}
    a, b = value.get(one, 2), value.get(other, 2)
    (line,) = refusal(f"--{one}={a}", f"--{other}={b}")
    assert one in line and other in line
    both = write("both.py", f"{one} = {a}\n{other} = {b}\n")
    (line,) = refusal(both)
    assert one in line and other in line and "both.py" in line
    for first, second, x, y in ((one, other, a, b), (other, one, b, a)):
        base = write("base.py", f"{first} = {x}\n")
        train = configure([base, f"--{second}={y}"]).train
        assert getattr(train, second) == y and getattr(train, first) == KEYS[first].default
        over = write("over.py", f'base = "base.py"\n{second} = {y}\n')
        got = configure([over])
        assert getattr(got.train, second) == y and getattr(got.train, first) == KEYS[first].default
        assert got.origins[first] == "default"


def test_the_global_batch_follows_from_either_way_to_give_it():
    assert configure(["--batch_size=3", "--gradient_accumulation_steps=5"]).train.sequences_per_iteration(1024) == 15
    assert configure(["--total_batch_tokens=32768"]).train.sequences_per_iteration(1024) == 32


# ------------------------------------------------------------------------------------------- saved runs


def saved_run(tmp_path, argv, vocab=None, lines=False) -> tuple[str, Configuration, dict]:
    """A run_….json(l) as a run writes it."""
    got = configure(argv)
    values, origins = got.resolved(got.train.model_config(vocab))
    document = {"event": "run_start", "time": 0.0, "config": values, "origins": origins, "model": {"name": "x"}}
    path = tmp_path / ("run_1.jsonl" if lines else "run_1.json")
    text = json.dumps(document) + "\n" + json.dumps({"event": "step"}) + "\n" if lines else json.dumps(document, indent=1)
    path.write_text(text)
    return str(path), got, values


@pytest.mark.parametrize("lines", [False, True], ids=["json", "jsonl"])
@pytest.mark.parametrize(
    "argv",
    [
        ["--arch_preset=llama", *TINY, "--n_kv_head=1", "--max_tokens=1e6", "--min_lr=1e-5"],
        ["config/arch_custom.py", "--layer_pattern=transformer,mlp", "--total_batch_tokens=16384", "--dropout=0.1"],
        ["--arch_preset=gpt2_postnorm", "--out_dir=a b", "--eval_only", "--compile=False", "--epochs=0.5"],
    ],
)
def test_a_saved_run_is_a_config_file_that_resolves_to_the_same(tmp_path, argv, lines):
    path, first, values = saved_run(tmp_path, argv, lines=lines)
    again = configure([path])
    assert again.resolved(again.train.model_config())[0] == {**values, "eval_only": False}  # that was that run's business
    assert again.train.model_config() == first.train.model_config()
    assert again.train.sequences_per_iteration(16) == first.train.sequences_per_iteration(16)
    assert "run_1.json" in again.origins["arch_preset"]


def test_what_a_saved_run_had_derived_is_derived_anew(tmp_path):
    path, _, values = saved_run(tmp_path, ["--arch_preset=llama", "--n_layer=2"], vocab=777)
    assert values["vocab_size"] == 777
    model = configure([path, "--n_embd=384"]).train.model_config(dataset_vocab_size=500)
    assert (model.head_dim, model.d_ff, model.vocab_size) == (32, 1024, 500)
    assert configure([path, "--position_encoding=none"]).train.model_config().rope_theta is None


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"config": 3, "origins": {}}', '{"config": {}}', "", "null"])
def test_a_file_that_is_no_saved_run_is_refused(write, text):
    (line,) = refusal(write("run_1.json", text))
    assert "run_1.json is not a saved run" in line


def test_a_saved_run_with_an_unknown_or_impossible_key_is_refused_by_name(write):
    line = refusal(write("run_1.json", json.dumps({"config": {"n_heads": 3}, "origins": {}})))[0]
    assert "run_1.json" in line and "'n_heads' is not a key (did you mean 'n_head'?)" in line
    line = refusal(write("run_1.json", json.dumps({"config": {"n_head": "x"}, "origins": {}})))[0]
    assert "run_1.json" in line and "n_head='x'" in line


# ------------------------------------------------------------------------------------------- continuing


# For each fixed key a value other than the one of a llama of the TINY shape.
OTHER = dict(
    arch_preset="gpt2",
    n_layer=3,
    n_head=4,
    n_kv_head=1,
    head_dim=8,
    n_embd=96,
    d_ff=100,
    vocab_size=62,
    pad_vocab_multiple=8,
    block_size=32,
    normalization="layernorm",
    norm_eps=1e-3,
    activation="gelu",
    ffn_type="standard",
    position_encoding="none",
    rope_theta=5.0,
    norm_position="post",
    layer_pattern="transformer,mlp",
    bias=True,
    qkv_bias=True,
    qk_norm=True,
    weight_tying=True,
    dropout=0.5,
    seed=5,
    dataset="pystdlib",
    data_seed=5,
    mixture_schedule="5 a:1",
    max_train_tokens=9,
    pack="document",
    optimizer="muon",
    objective="odd",
    learning_rate=1.0,
    weight_decay=0.5,
    beta1=0.5,
    beta2=0.5,
    adam_eps=1.0,
    muon_momentum=0.5,
    grad_clip=3.0,
    lr_schedule="linear",
    warmup_iters=5,
    min_lr=1e-7,
    min_lr_ratio=0.3,
    lr_decay_fraction=0.9,
    rope_scaling="linear",
    rope_factor=2.0,
    rope_low_freq_factor=2.0,
    rope_high_freq_factor=8.0,
    rope_original_context=64,
    sliding_window=7,
    attention_scale=0.5,
    attention_softcap=20.0,
    logit_softcap=30.0,
    embedding_norm=True,
    embedding_scale=True,
    zero_init=True,
    ffn_expansion_ratio=2.0,
    ffn_multiple=48,
)
# What else a key needs to have an effect on the llama preset.
BESIDE = dict(
    activation="--ffn_type=standard",
    rope_factor="--rope_scaling=linear",
    rope_low_freq_factor="--rope_scaling=llama3",
    rope_high_freq_factor="--rope_scaling=llama3",
    rope_original_context="--rope_scaling=llama3",
    position_encoding="--rope_theta=None",
)


def state_of(*words) -> dict:
    """state.json, as far as it matters here, of a run started with this command line: a file's keys say the file."""
    got = configure([*TINY, *words])
    values, origins = got.resolved(got.train.model_config())
    return json.loads(json.dumps({"config": values, "origins": origins, "dtype": "bfloat16"}))


def refused_table(now, state) -> dict[str, list[str]]:
    """key → [today's value, the checkpoint's] of the table with which going on is refused."""
    with pytest.raises(UsageError) as error:
        go_on(now, state, "out/step_1")
    lines = str(error.value).split("\n")
    assert "out/step_1" in lines[0] and lines[-1].startswith("Give what the checkpoint has")
    return {cells[0]: cells[1:] for cells in (re.split(r"  +", line.strip()) for line in lines[3:-1])}


@pytest.fixture
def another_objective():
    """There is only one objective, so that a run cannot have another: here there is one more, by name."""
    OBJECTIVES.register("odd", object)
    yield
    OBJECTIVES.unregister("odd")


@pytest.mark.parametrize("key", dict.fromkeys(fixed_on_resume()))
def test_a_fixed_key_on_the_command_line_of_a_resumed_run_is_refused_by_name(key, another_objective):
    state = state_of("--arch_preset=llama")
    now = configure(["--arch_preset=llama", "--resume", *([BESIDE[key]] if key in BESIDE else []), f"--{key}={OTHER[key]}"])
    with pytest.raises(UsageError) as error:
        go_on(now, state, "out/step_1")
    named = "d_ff" if key in ("ffn_expansion_ratio", "ffn_multiple") else key  # in which a ratio is kept
    assert re.search(rf"\b{named}\b", str(error.value)) and "out/step_1" in str(error.value)
    given = [f"--{key}={state['config'][key]}"] if state["config"][key] is not None else []
    same = configure(["--arch_preset=llama", "--resume", *TINY, *given])
    assert getattr(go_on(same, state, "out/step_1").train, key) == getattr(same.train, key)


@pytest.mark.parametrize("key", dict.fromkeys(keys_of_the_model()))
def test_what_was_given_on_the_command_line_comes_back_silently(key):
    """Issue 10.2: the model of the run, though the command that goes on says nothing of it."""
    flags = ["--arch_preset=llama", *([BESIDE[key]] if key in BESIDE else []), f"--{key}={OTHER[key]}"]
    if key == "arch_preset":
        flags = flags[1:]
    again = go_on(configure(["--resume=auto"]), state_of(*flags), "out/step_1").train
    assert again.model_config() == configure([*TINY, *flags]).train.model_config()
    assert (
        go_on(configure([*TINY, *flags, "--init_from=auto"]), state_of(*flags), "x").train.model_config() == again.model_config()
    )


def test_the_fixed_keys_are_those_of_the_model_the_data_order_and_the_optimizer():
    assert set(keys_of_the_model()) < set(fixed_on_resume()) <= set(KEYS)
    assert {
        "data_seed",
        "seed",
        "optimizer",
        "learning_rate",
        "weight_decay",
        "beta1",
        "beta2",
        "lr_schedule",
        "warmup_iters",
    } <= set(fixed_on_resume())
    free = {
        "max_iters",
        "max_tokens",
        "epochs",
        "lr_decay_iters",
        "log_interval",
        "eval_interval",
        "eval_iters",
        "save_interval",
        "keep_last",
        "device",
        "parallelism",
        "compile",
        "out_dir",
        "init_from",
        "activation_checkpointing",
        "attention_backend",
        "dtype",
        "patience",
    }
    assert not free & set(fixed_on_resume())


@pytest.mark.parametrize("kind", ["weights:", "hf:"])
def test_init_from_without_a_path_is_not_the_current_folder(kind):
    with pytest.raises(ConfigError, match="names nothing after the colon"):
        configure([f"--init_from={kind}"])


def test_what_belongs_to_the_machine_is_never_inherited_and_dtype_comes_back_as_it_was_used():
    """Issue 10.2: a run saved on cuda:3 moves; one in bf16 goes on so where auto would choose something else."""
    state = state_of("--parallelism=hsdp", "--hsdp_shard_size=2", "--device=cuda:3", "--threads=1000")
    train = go_on(configure(["--resume"]), state, "here").train
    assert (train.parallelism, train.hsdp_shard_size, train.device) == ("auto", None, "auto")
    assert train.dtype == "bfloat16" and train.threads is None  # no machine has a thousand
    train = go_on(configure(["--resume", "--dtype=float32", "--threads=2"]), state, "here").train
    assert train.dtype == "float32" and train.threads == 2


@pytest.mark.parametrize(
    "words, meant",
    [
        (["--use_zero1=True"], "zero1"),
        (["--use_zero1"], "zero1"),
        (["--use_fsdp", "True"], "fsdp"),
        (["--use_fsdp=True", "--parallelism=fsdp"], "fsdp"),
        (["--use_zero1=False"], "auto"),
        (["--use_zero1=False", "--parallelism=ddp"], "ddp"),
    ],
)
def test_aliases_of_parallelism_on_the_command_line(words, meant):
    assert configure(words).train.parallelism == meant


def test_aliases_of_parallelism_in_a_file_and_over_it(tmp_path):
    file = tmp_path / "sharded.py"
    file.write_text("n_layer = 2\nuse_fsdp = True\n")
    found = configure([str(file)])
    assert found.train.parallelism == "fsdp" and found.origins["parallelism"].endswith("sharded.py:2")
    assert configure([str(file), "--parallelism=none"]).train.parallelism == "none"
    assert configure([str(file), "--use_zero1"]).train.parallelism == "zero1"


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--use_zero1=True", "--use_fsdp=True"], "use_fsdp=True means parallelism='fsdp'"),
        (["--use_zero1=True", "--parallelism=ddp"], "use_zero1=True means parallelism='zero1'"),
        (["--use_zero1=perhaps"], "not True or False"),
    ],
)
def test_aliases_that_contradict_are_refused(words, reason):
    with pytest.raises(ConfigError, match=reason):
        configure(words)


def test_all_fixed_keys_that_differ_are_refused_in_one_table():
    now = configure(["--n_layer=3", "--seed=9", "--beta1=0.5", "--resume"])
    table = refused_table(now, state_of())
    assert table == {
        "n_layer": ["3 (command line)", "2 (command line)"],
        "seed": ["9 (command line)", "1337 (default)"],
        "beta1": ["0.5 (command line)", "0.9 (default)"],
    }


def test_a_difference_is_refused_wherever_it_is_written(write):
    """Issue 10.2: in a config file edited since, in another file, in a preset or a default."""
    path = write("x.py", "learning_rate = 0.01\nn_layer = 2\n")
    state = state_of(path)
    assert go_on(configure([path, "--resume"]), state, "here").train.learning_rate == 0.01
    edited = write("y.py", "learning_rate = 0.02\nn_layer = 2\n")
    assert refused_table(configure([edited, "--resume"]), state)["learning_rate"] == [f"0.02 ({edited}:1)", f"0.01 ({path}:1)"]
    assert refused_table(configure(["--resume"]), state)["learning_rate"] == ["0.0006 (default)", f"0.01 ({path}:1)"]
    preset = write("z.py", 'arch_preset = "llama"\nlearning_rate = 0.01\nn_layer = 2\n')
    assert {"arch_preset", "ffn_type", "normalization"} < refused_table(configure([preset, "--resume"]), state).keys()


def test_free_keys_change_and_the_rest_comes_from_the_checkpoint():
    state = state_of("--batch_size=7", "--max_iters=40", "--learning_rate=0.01", "--eval_interval=9")
    now = configure(["--max_iters=80", "--eval_interval=5", "--device=cpu", "--out_dir=elsewhere", "--compile=False", "--resume"])
    got = go_on(now, state, "here")
    train = got.train
    assert (train.max_iters, train.eval_interval, train.device) == (80, 5, "cpu")
    assert (train.out_dir, train.compile, train.resume) == ("elsewhere", False, "yes")
    assert (train.batch_size, train.learning_rate, train.n_layer) == (7, 0.01, 2)
    assert got.origins["max_iters"] == "command line"
    assert got.origins["batch_size"] == got.origins["n_layer"] == "checkpoint: command line"


@pytest.mark.parametrize(
    "words, expected",
    [(["--max_tokens=100000"], (None, 100000, None)), (["--epochs=2"], (None, None, 2.0)), ([], (40, None, None))],
)
def test_another_measure_of_the_length_takes_the_place_of_the_saved_one(words, expected):
    train = go_on(configure([*words, "--resume"]), state_of("--max_iters=40"), "here").train
    assert (train.max_iters, train.max_tokens, train.epochs) == expected


@pytest.mark.parametrize(
    "then, now, runs",
    [
        (["--batch_size=2", "--gradient_accumulation_steps=3"], [], True),
        (["--batch_size=2", "--gradient_accumulation_steps=3"], ["--batch_size=6", "--gradient_accumulation_steps=1"], True),
        (["--batch_size=2", "--gradient_accumulation_steps=3"], ["--total_batch_tokens=96"], True),
        (["--batch_size=2", "--gradient_accumulation_steps=3"], ["--batch_size=3"], False),  # × 1, the default
        (["--batch_size=2", "--gradient_accumulation_steps=3"], ["--total_batch_tokens=112"], False),
        (["--total_batch_tokens=160"], [], True),
        (["--total_batch_tokens=160"], ["--batch_size=10"], True),
        (["--total_batch_tokens=160"], ["--batch_size=5", "--gradient_accumulation_steps=3"], False),
        ([], [], True),
        ([], ["--batch_size=4"], False),
        ([], ["--batch_size=4", "--gradient_accumulation_steps=3"], True),  # 12, the default
    ],
)
def test_the_same_global_batch_split_otherwise_is_the_same_run(then, now, runs):
    """Issue 10.2: a global batch of 1 became 4, as the batch came from the file and not from the checkpoint."""
    state, today = state_of(*then), configure([*now, "--resume"])
    if runs:
        expected = configure([*TINY, *then]).train.sequences_per_iteration(16)
        assert go_on(today, state, "here").train.sequences_per_iteration(16) == expected
    else:
        assert list(refused_table(today, state)) == ["global batch"]


def test_a_batch_from_a_file_that_was_edited_since_is_refused(write):
    """Issue 10.2."""
    state = state_of(write("x.py", "batch_size = 1\n"))
    table = refused_table(configure([write("y.py", "batch_size = 4\n"), "--resume"]), state)
    assert (
        list(table) == ["global batch"]
        and "4 sequences" in table["global batch"][0]
        and "1 sequences" in table["global batch"][1]
    )


def test_a_run_from_weights_alone_takes_the_model_and_nothing_else(write):
    saved = state_of("--arch_preset=llama", "--learning_rate=0.01", "--batch_size=7", "--max_iters=40", "--seed=3")["config"]
    got, _ = take_model(configure(["--learning_rate=0.5", "--seed=8", "--dataset=mine", "--init_from=weights:x"]), saved, "here")
    train = got.train
    assert (train.learning_rate, train.seed, train.dataset) == (0.5, 8, "mine")
    assert (train.batch_size, train.max_iters) == (KEYS["batch_size"].default, None)
    assert train.model_config() == configure([*TINY, "--arch_preset=llama"]).train.model_config()
    with pytest.raises(UsageError, match="--n_layer=3"):
        take_model(configure(["--n_layer=3"]), saved, "here")
    path = write("x.py", "n_layer = 3\nmax_iters = 99\n")
    got, notes = take_model(configure([path]), saved, "here")
    assert (got.train.n_layer, got.train.max_iters) == (2, 99)
    assert len(notes) == 1 and "n_layer=2" in notes[0] and f"{path}:1" in notes[0] and "3" in notes[0]


def test_a_resumed_run_is_checked_with_the_checkpoints_keys_and_not_the_presets():
    """Flags that suit the checkpoint need not suit the preset: 32 / 2 heads and 16 tokens a sequence come from there."""
    now = configure(["--init_from=resume", "--n_embd=32", "--total_batch_tokens=192"])
    assert go_on(now, state_of(), "here").train.sequences_per_iteration(16) == 12
    with pytest.raises(UsageError, match="total_batch_tokens=1000"):
        go_on(configure(["--init_from=resume", "--total_batch_tokens=1000"]), state_of(), "here")


def test_one_pattern_written_in_two_ways_is_no_difference():
    state = state_of("--layer_pattern=transformer,mlp")
    assert go_on(configure(["--layer_pattern=transformer*1,mlp*1", "--resume"]), state, "here")
    assert "layer_pattern" in refused_table(configure(["--layer_pattern=mlp,transformer", "--resume"]), state)
    saved = state["config"]
    assert take_model(configure(["--layer_pattern=transformer*1,mlp*1"]), saved, "here")[1] == []
    with pytest.raises(UsageError, match="--layer_pattern"):
        take_model(configure(["--layer_pattern=mlp,transformer"]), saved, "here")


def test_continuing_a_continued_run_is_the_same_again():
    state = state_of("--arch_preset=llama", "--max_iters=40")
    first = go_on(configure(["--resume"]), state, "here")
    values, origins = first.resolved(first.train.model_config())
    again = json.loads(json.dumps({"config": values, "origins": origins, "dtype": "bfloat16"}))
    assert {k: v for k, v in again["config"].items() if k not in ("resume", "dtype")} == {
        k: v for k, v in state["config"].items() if k not in ("resume", "dtype")
    }
    assert go_on(configure(["--resume"]), again, "here") == first


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], ("scratch", "no")),
        (["--resume"], ("scratch", "yes")),
        (["--resume", "--seed=3"], ("scratch", "yes")),
        (["--resume=auto"], ("scratch", "auto")),
        (["--resume", "auto"], ("scratch", "auto")),
        (["--resume=True"], ("scratch", "yes")),
        (["--resume=False"], ("scratch", "no")),
        (["--init_from=resume"], ("scratch", "yes")),
        (["--init_from=auto"], ("scratch", "auto")),
        (["--init_from=auto", "--resume=auto"], ("scratch", "auto")),
        (["--init_from=weights:x", "--resume=auto"], ("weights:x", "auto")),
    ],
)
def test_where_to_begin_and_whether_to_go_on_are_two_keys(words, expected):
    """Issue 10.2, with nanoGPT's spelling and the one that --init_from had."""
    train = configure(words).train
    assert (train.init_from, train.resume) == expected


def test_auto_at_the_end_of_a_command_keeps_the_weights_that_a_file_names(write):
    """Issue 10.2: docs/slurm.sh appended --init_from=auto, which overrode weights:X and began with random weights."""
    train = configure([write("x.py", 'init_from = "weights:x"\n'), "--init_from=auto"]).train
    assert (train.init_from, train.resume) == ("weights:x", "auto")
    assert configure([write("y.py", 'init_from = "auto"\n')]).origins["resume"].endswith("y.py:1")


@pytest.mark.parametrize(
    "words", [["--init_from=out/x"], ["--init_from=out/x/checkpoints/step_000000003"], ["--init_from=Resume"]]
)
def test_a_bare_path_is_refused_with_the_two_spellings_that_it_could_mean(words):
    """Issue 10.2."""
    with pytest.raises(ConfigError, match=r"--init_from=weights:.*--resume"):
        configure(words)


@pytest.mark.parametrize(
    "words", [["--init_from=auto", "--resume=yes"], ["--init_from=resume", "--resume=no"], ["--resume=perhaps"]]
)
def test_contradicting_words_about_going_on_are_refused(words):
    with pytest.raises(ConfigError, match="resume="):
        configure(words)


# ------------------------------------------------------------------------------------------- printing


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["config/arch_custom.py"],
        ["config/full_llama_1.36b.py"],
        ["--arch_preset=llama", *TINY, "--rope_theta=5e5"],
        ["--total_batch_tokens=16384"],
        ["--epochs=0.5", "--min_lr=0.0"],
        ["--layer_pattern=transformer,mlp", "--notice=a 'b' \"c\" # d"],
        ["--compile=False", "--eval_only", "--out_dir=a=b"],
    ],
    ids=lambda argv: " ".join(argv) or "nothing",
)
def test_what_print_config_prints_is_a_config_file_that_resolves_to_the_same(capsys, write, argv):
    got = configure(argv)
    print_config(got)
    text = capsys.readouterr().out
    again = configure([write("printed.py", text)])
    assert again.train.model_config() == got.train.model_config()
    assert again.resolved(again.train.model_config())[0] == got.resolved(got.train.model_config())[0]
    lines = {line.removeprefix("# ").split(" = ")[0]: line for line in text.splitlines() if " = " in line}
    assert set(lines) == set(KEYS)
    for key, line in lines.items():
        origin = got.resolved(got.train.model_config())[1][key]
        assert line.endswith(f"# {origin}") or key == "vocab_size", line


def test_help_lists_every_key_with_group_type_default_and_meaning(capsys):
    print_help_all("usage")
    text = capsys.readouterr().out
    sections = dict(zip(GROUPS, re.split("|".join(rf"\n{group}:\n" for group in GROUPS), text)[1:]))
    assert len(sections) == len(GROUPS)
    for key, field in KEYS.items():
        ((kind, meaning),) = re.findall(rf"^  --{key}: (.*)\n        (.*)$", sections[field.metadata["group"]], flags=re.M)
        assert describe_type(key) in kind and meaning == field.metadata["help"]
        assert len(meaning) > 8
        if field.default is not None:
            assert f"default {field.default!r}" in kind


def test_parsing_returns_file_keys_and_switches():
    assert parse_command_line(["x.py", "--n_layer", "2", "--eval_only", "--debug", "-h"]) == (
        "x.py",
        {"n_layer": "2", "eval_only": True},
        {"debug", "help"},
    )


def test_reading_a_file_gives_values_and_origins(write):
    path = write("x.py", "n_layer = 2\n")
    assert read_config_file(path) == {"n_layer": (2, f"{path}:1")}


# ------------------------------------------------------------------------------------------- as a command


@pytest.mark.parametrize(
    "arguments, code, says",
    [
        (["--help"], 0, ["--n_layer", "--help_all"]),
        (["--help_all"], 0, ["--n_layer", "execution:"]),
        (["config/quickstart.py", "--print_config"], 0, ["arch_preset = 'llama'", "# config/quickstart.py:"]),
        (["--n_heads=4", "--n_layr=2"], 2, ["--n_heads", "--n_layr"]),
        (["--n_head=18", "--n_embd=2432", "--dropout=2"], 2, ["n_head=18", "dropout=2.0"]),
        (["config/none.py"], 2, ["config/none.py"]),
        (["--n_head=0"], 2, ["n_head=0"]),
    ],
)
def test_the_command_answers_in_lines_and_exit_codes_from_any_folder(run_python, tmp_path, arguments, code, says):
    done = run_python(ROOT / "train.py", *arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    if code == 0:
        assert done.stderr == "" and all(word in done.stdout for word in says)
    else:
        lines = done.stderr.splitlines()
        assert done.stdout == "" and all(line.startswith("train.py: ") for line in lines)
        assert len(lines) == len(says)
        assert all(sum(word in line for line in lines) == 1 for word in says)
    assert list(tmp_path.iterdir()) == []  # nothing was started


def test_help_and_print_config_answer_within_one_and_a_half_imports_of_torch():
    commands = {
        "torch": ["-c", "import torch"],
        "help": ["train.py", "--help"],
        "print_config": ["train.py", "config/quickstart.py", "--print_config"],
    }
    for _ in range(3):
        seconds = {}
        for name, command in commands.items():  # of processor time, which other work on the machine disturbs least
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds[name] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        if max(seconds["help"], seconds["print_config"]) <= 1.5 * seconds["torch"]:
            return
    pytest.fail(f"the last attempt took, in seconds of processor time: {seconds}")
