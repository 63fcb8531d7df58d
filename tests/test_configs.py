"""Every file in config/: it parses, resolves and builds, and the figures its comments give are true."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from configurator import configure, read_config_file
from flops_parameter_counting.parameters import count_parameters
from model_builder import build_model
from model_config import PRESETS, resolve
from training.train_config import KEYS

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path.name for path in (ROOT / "config").glob("*.py"))
LEVELS = {name for name in FILES if name.startswith("cpu_level")}
SMALL = {"shakespeare_char_cpu.py", "quickstart.py", "ablation_small.py"} | LEVELS  # whose vocabulary is their dataset's
LANGUAGE_MODELS = ("lm_tiny", "lm_small", "lm_medium")  # presets of their own shape, each with a recipe

KNOWN_N = {
    "full_gpt2_124m.py": 124_439_808,
    "full_llama_124m.py": 162_220_800,
    "full_llama_1.36b.py": 1_294_159_104,
    "full_gpt2_1.36b.py": 1_405_452_800,
    "full_llama3_8b.py": 8_030_261_248,
    "full_qwen3_1.7b.py": 1_720_574_976,
}
TOKENS_PER_ITERATION = {
    "full_gpt2_124m.py": 12 * 40 * 1024,
    "full_llama_124m.py": 12 * 40 * 1024,
    "full_llama_1.36b.py": 8 * 16 * 2048,
    "full_gpt2_1.36b.py": 8 * 16 * 2048,
    "full_llama3_8b.py": 512 * 8192,
    "full_qwen3_1.7b.py": 8 * 16 * 2048,
    "quickstart.py": 16 * 128,
    "shakespeare_char_cpu.py": 12 * 64,
    "ablation_small.py": 16 * 128,
    **dict.fromkeys(LEVELS, 4 * 32),
    "cpu_level6_tinystories.py": 32 * 256,
    "lm_tiny.py": 32 * 256,
    "lm_small.py": 32 * 512,
    "lm_medium.py": 32 * 1024,
}


def config(name: str):
    return configure([f"config/{name}"]).train


def sources(name: str) -> str:
    """The text of a config file and of those it builds on."""
    text = (ROOT / "config" / name).read_text(encoding="utf-8")
    base = re.search(r'^base = "(.*?)"', text, flags=re.M)
    return text + (sources(base.group(1)) if base else "")


def test_the_promised_files_are_there():
    assert {
        "quickstart.py",
        "arch_gpt2.py",
        "arch_gpt2_postnorm.py",
        "arch_llama.py",
        "arch_custom.py",
        "full_llama_1.36b.py",
        "full_gpt2_1.36b.py",
        "full_gpt2_124m.py",
        "full_llama_124m.py",
        "shakespeare_char_cpu.py",
        "full_llama3_8b.py",
        "full_qwen3_1.7b.py",
        *(f"arch_{preset}.py" for preset in PRESETS if preset not in LANGUAGE_MODELS),
        *(f"{preset}.py" for preset in LANGUAGE_MODELS),
    } <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_config_resolves_and_builds_with_the_n_that_is_counted(name):
    train = config(name)
    model_config = train.model_config(dataset_vocab_size=300 if name in SMALL else None)
    assert train.problems() == []
    assert build_model(model_config, device="meta").num_parameters() == count_parameters(model_config)
    assert all(origin.startswith("config/") for _, origin in read_config_file(f"config/{name}").values())


@pytest.mark.parametrize("name", FILES)
def test_a_config_begins_with_what_it_is_for(name):
    text = (ROOT / "config" / name).read_text(encoding="utf-8")
    assert text.startswith('"""') and len(text.split("\n")[0]) > 40
    assert text.isascii() or not re.search("[\U0001f000-\U0001ffff\u2600-\u27bf]", text)


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("full_")])
def test_a_full_config_has_its_known_n(name):
    n = KNOWN_N[name]
    model_config = config(name).model_config()
    assert count_parameters(model_config) == n == build_model(model_config, device="meta").num_parameters()
    assert f"N = {n:,}" in (ROOT / "config" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("arch_")])
def test_an_arch_config_is_the_real_shape_for_a_short_comparison(name):
    train = config(name)
    model_config = train.model_config(dataset_vocab_size=4096)
    assert (model_config.n_layer, model_config.n_head, model_config.n_embd, model_config.block_size) == (12, 12, 768, 1024)
    assert train.sequences_per_iteration(model_config.block_size) * model_config.block_size == 16 * 1024
    assert train.max_iters == 100 and train.dataset in ("pydocs", "pystdlib")
    assert train.arch_preset == name.removeprefix("arch_").removesuffix(".py")
    assert model_config.vocab_size == train.vocab_size  # fixed, not the dataset's


def test_the_arch_configs_differ_in_nothing_but_the_architecture():
    configs = [config(name) for name in FILES if name.startswith("arch_")]
    assert {train.arch_preset for train in configs} == set(PRESETS) - set(LANGUAGE_MODELS)
    for key, field in KEYS.items():
        if field.metadata["group"] != "architecture" and key not in ("out_dir", "notice"):
            assert len({getattr(train, key) for train in configs}) == 1, key
    assert len({train.out_dir for train in configs}) == len(configs)
    names = {train.arch_preset: train.model_config().name for train in configs}
    assert names["team"] == names["llama"]  # one model under two names
    assert len(set(names.values())) == len(configs) - 1


def test_arch_gpt2_says_in_one_line_what_the_other_variant_is():
    assert "arch_gpt2_postnorm.py" in config("arch_gpt2.py").notice and "\n" not in config("arch_gpt2.py").notice
    assert all(config(name).notice == "" for name in FILES if name != "arch_gpt2.py")
    assert config("arch_gpt2_postnorm.py").model_config().name.startswith("12L-12H-768D-AbsPos-LN-NB-GELU-PostNorm")


def test_runs_write_to_folders_of_their_own():
    assert len({config(name).out_dir for name in FILES}) == len(FILES)


@pytest.mark.parametrize("name", FILES)
def test_the_tokens_of_an_iteration_are_those_in_the_comment(name):
    train = config(name)
    block_size = train.model_config().block_size
    tokens = train.sequences_per_iteration(block_size) * block_size
    assert tokens == TOKENS_PER_ITERATION.get(name, 16 * 1024)
    said = re.search(r"([\d ×]*) = ([\d,]+) tokens an iteration", sources(name))
    assert said and int(said.group(2).replace(",", "")) == tokens
    assert math.prod(int(factor) for factor in said.group(1).split("×")) == tokens


def test_the_figures_in_the_comments_are_true():
    quick = config("quickstart.py").model_config(dataset_vocab_size=4096)
    assert f"N = {count_parameters(quick) / 1e6:.1f} M" in sources("quickstart.py") and quick.head_dim == 64
    tokens = config("quickstart.py").max_iters * TOKENS_PER_ITERATION["quickstart.py"]
    assert f"{tokens / 1e6:.1f} M tokens" in sources("quickstart.py")
    padded = count_parameters(resolve("gpt2", pad_vocab_multiple=64))
    assert f"{padded:,}" in sources("full_gpt2_124m.py")
    assert config("full_llama_1.36b.py").model_config().head_dim == config("full_gpt2_1.36b.py").model_config().head_dim == 128
    logits = config("arch_gpt2.py").batch_size * 1024 * 50304 * 4
    assert f"{logits / 1e9:.1f} GB" in sources("arch_gpt2.py")
    assert f"{25000 * TOKENS_PER_ITERATION['full_llama_1.36b.py'] / 1e9:.2f} B tokens" in sources("full_llama_1.36b.py")


@pytest.mark.parametrize("name", ["full_llama_1.36b.py", "full_gpt2_1.36b.py"])
def test_the_production_recipe_is_the_documented_one(name):
    train = config(name)
    assert (train.learning_rate, train.min_lr, train.lr_schedule, train.warmup_iters, train.max_iters) == (
        3e-4,
        3e-5,
        "cosine",
        2000,
        25000,
    )
    assert (train.weight_decay, train.beta1, train.beta2, train.grad_clip, train.optimizer) == (0.1, 0.9, 0.95, 1.0, "adamw")
    assert (train.batch_size, train.gradient_accumulation_steps, train.dtype, train.compile) == (8, 16, "bfloat16", True)
    assert train.eval_interval == 1000 and train.dataset == f"slimpajama_6b_{name.split('_')[1]}"


@pytest.mark.parametrize("name", ["full_llama_124m.py", "full_gpt2_124m.py"])
def test_the_124m_recipe_is_nanogpts(name):
    train = config(name)
    assert (train.learning_rate, train.min_lr, train.warmup_iters, train.max_iters) == (6e-4, 6e-5, 2000, 600000)
    assert (train.batch_size, train.gradient_accumulation_steps) == (12, 40)


def test_the_shakespeare_recipe_is_nanogpts_cpu_example():
    train = config("shakespeare_char_cpu.py")
    model = train.model_config(dataset_vocab_size=65)
    assert (model.n_layer, model.n_head, model.n_embd, model.block_size, model.dropout) == (4, 4, 128, 64, 0.0)
    assert (train.arch_preset, train.batch_size, train.gradient_accumulation_steps, train.max_iters) == ("gpt2", 12, 1, 2000)
    assert (train.learning_rate, train.min_lr, train.beta2, train.warmup_iters) == (1e-3, 1e-4, 0.99, 100)
    assert train.eval_iters == 0  # the whole validation set


@pytest.mark.parametrize(
    "preset, shape, n", [("lm_tiny", (4, 4, 256, 1024, 256), 16_090_880), ("lm_small", (6, 8, 512, 2048, 512), 44_909_056),
                         ("lm_medium", (12, 12, 768, 3072, 1024), 124_439_808)]
)  # fmt: skip
def test_a_language_model_recipe_is_the_guides(preset, shape, n):
    train = config(f"{preset}.py")
    model = train.model_config(dataset_vocab_size=50257)
    assert (model.n_layer, model.n_head, model.n_embd, model.d_ff, model.block_size) == shape
    assert count_parameters(model) == n and f"N = {n:,}" in sources(f"{preset}.py")
    assert (train.epochs, train.batch_size, train.learning_rate, train.warmup_iters) == (20, 32, 3e-4, 1000)
    assert (train.min_lr_ratio, train.weight_decay, train.grad_clip, model.dropout) == (0.1, 0.1, 1.0, 0.1)
    assert train.dataset == ("wikitext2" if preset == "lm_tiny" else "wikitext103") and train.arch_preset == preset


@pytest.mark.parametrize("page", ["PARAMETER_FORMULAS.md", "ARCH_GPT2.md", "ARCH_LLAMA.md"])
def test_the_figures_of_the_pages_are_those_of_the_configs(page):
    """Every N in a table row that names a config file, and the FLOPs beside it where there are any."""
    from flops_parameter_counting.flops import flops_per_token

    rows = [
        line
        for line in (ROOT / "config" / page).read_text(encoding="utf-8").splitlines()
        if line.startswith("| `") and ".py" in line
    ]
    assert len(rows) >= 3
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        config = configure([f"config/{cells[0].strip('`')}"]).train.model_config()
        assert f"{count_parameters(config):,}" in cells, row
        if page == "PARAMETER_FORMULAS.md":
            flops = flops_per_token(config)
            assert cells[-2:] == [f"{flops.full / 1e9:.4f}", f"{flops.causal / 1e9:.4f}"], row
