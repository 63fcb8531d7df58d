"""Other names of keys: each row of the table means what it says, wherever it is written, and the real key is what is kept."""

from __future__ import annotations

import json

import pytest

from configurator import ConfigError, configure, print_config, print_help_all, read_config_file
from training.aliases import ALIASES, SPELLINGS
from training.schedules import learning_rate, lowest_rate
from training.train_config import KEYS

MEANT = [
    ("model_preset", "small", "arch_preset", "lm_small"),
    ("preset", "tiny", "arch_preset", "lm_tiny"),
    ("d_model", "384", "n_embd", 384),
    ("num_heads", "8", "n_head", 8),
    ("num_layers", "6", "n_layer", 6),
    ("max_seq_len", "384", "block_size", 384),
    ("lr", "6e-4", "learning_rate", 6e-4),
    ("warmup_steps", "4000", "warmup_iters", 4000),
    ("warmup", "2000", "warmup_iters", 2000),
    ("num_epochs", "30", "epochs", 30.0),
    ("gradient_clip", "0.5", "grad_clip", 0.5),
    ("max_samples", "10000", "max_train_tokens", 10000 * 1024),
    ("fp16", "True", "dtype", "float16"),
    ("bf16", "True", "dtype", "bfloat16"),
    ("gradient_checkpointing", "True", "activation_checkpointing", "full"),
    ("gradient_checkpointing", "False", "activation_checkpointing", "none"),
    ("use_zero1", "True", "parallelism", "zero1"),
    ("use_fsdp", "True", "parallelism", "fsdp"),
    ("dataset", "wikitext", "dataset", "wikitext2"),
    ("dataset", "wikitext-103", "dataset", "wikitext103"),
    ("dataset", "wikitext-2", "dataset", "wikitext2"),
    ("batch_size", "auto", "micro_batch", "auto"),
    ("init_from", "resume", "resume", "yes"),
    ("init_from", "auto", "resume", "auto"),
    *(
        ("init_from", name, "init_from", f"hf:openai-community/{name}")
        for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
    ),
    ("always_save_checkpoint", "False", "keep_last", 1),
    ("decay_lr", "True", "lr_schedule", "cosine"),
    ("decay_lr", "False", "lr_schedule", "constant"),
]


def test_every_row_of_the_table_is_tried_here():
    said = {name for name, *_ in MEANT}
    assert {name for name, alias in ALIASES.items() if alias.key is not None} <= said
    assert {(name, value) for name, value, *_ in MEANT} >= set(SPELLINGS)
    assert {alias.key for alias in ALIASES.values()} - {None} <= set(KEYS)
    assert all(bool(alias.key) != bool(alias.sentence) for alias in ALIASES.values())


@pytest.mark.parametrize("name, text, key, value", MEANT)
def test_an_alias_means_the_key_on_a_command_line_and_in_a_file(tmp_path, name, text, key, value):
    for words in ([f"--{name}={text}"], [f"--{name}", text]):
        got = configure([*words, "--total_batch_tokens=4096"] if text == "auto" else words)
        assert getattr(got.train, key) == value and got.origins[key] == "command line"
    file = tmp_path / "x.py"
    file.write_text(f"seed = 3\n{name} = {text if text[0].isdigit() or text in ('True', 'False') else repr(text)}\n")
    got = configure([str(file), *(["--total_batch_tokens=4096"] if text == "auto" else [])])
    assert getattr(got.train, key) == value and got.origins[key] == f"{file}:2"


def test_the_real_key_is_what_is_printed_and_saved(tmp_path, capsys):
    words = ["--d_model=512", "--num_heads=8", "--fp16", "--dataset=wikitext", "--max_samples=100", "--max_seq_len=64"]
    print_config(configure(words))
    printed = capsys.readouterr().out
    assert not any(f"\n{name} =" in printed for name in ALIASES)
    file = tmp_path / "printed.py"
    file.write_text(printed)
    train = configure([str(file)]).train
    assert (train.n_embd, train.dtype, train.dataset, train.max_train_tokens) == (512, "float16", "wikitext2", 6400)
    values, origins = configure(words).resolved(configure(words).train.model_config())
    saved = tmp_path / "run_1.json"
    saved.write_text(json.dumps(dict(config=values, origins=origins)))
    assert {"n_embd", "dtype", "max_train_tokens"} <= set(read_config_file(saved)) <= set(KEYS)


def test_the_guides_command_is_the_guides_recipe(tmp_path):
    words = ["--model_preset", "small", "--dataset", "wikitext-103", "--epochs", "20", "--batch_size", "32"]
    words += ["--warmup_steps", "2000", "--lr", "6e-4"]
    train = configure(words).train
    assert train == configure(["config/lm_small.py", *words]).train
    assert (train.out_dir, train.weight_decay, train.warmup_iters, train.min_lr_ratio) == ("out/lm_small", 0.1, 2000, 0.1)
    file = tmp_path / "mine.py"
    file.write_text("weight_decay = 0.3\n")
    mine = configure([str(file), "--model_preset=small"]).train  # beside a config file it is the architecture alone
    assert (mine.arch_preset, mine.weight_decay, mine.warmup_iters) == ("lm_small", 0.3, 0)
    by_hand = ["--d_model", "512", "--num_heads", "8", "--num_layers", "6", "--d_ff", "2048", "--max_seq_len", "512"]
    model = configure([*by_hand, "--dropout=0.1"]).train.model_config()
    assert model == configure(["--arch_preset=lm_small"]).train.model_config()


@pytest.mark.parametrize(
    "words, reasons",
    [
        (["--d_model=512", "--n_embd=256"], ["d_model='512' means n_embd='512', but n_embd='256' is given too"]),
        (["--lr=1e-3", "--learning_rate=1e-4"], ["lr='1e-3' means learning_rate='1e-3', but learning_rate='1e-4' is given"]),
        (["--fp16", "--bf16"], ["bf16=True means dtype='bfloat16', but dtype='float16' is given too"]),
        (["--fp16", "--dtype=float32"], ["fp16=True means dtype='float16', but dtype='float32' is given too"]),
        (["--model_preset=huge"], ["model_preset='huge' is not one of 'tiny', 'small', 'medium'."]),
        (["--model_preset=tiny", "--arch_preset=llama"], ["means arch_preset='lm_tiny', but arch_preset='llama' is given too"]),
        (["--d_model=wide"], ["d_model='wide', another name of n_embd=…, is not a whole number."]),
        (["--max_samples=many"], ["max_samples='many', another name of max_train_tokens=…, is not a whole number."]),
        (["--max_samples=10", "--max_train_tokens=9"], ["means max_train_tokens=10 × block_size, but max_train_tokens='9'"]),
        (["--fp16=perhaps"], ["fp16='perhaps' is not True or False."]),
        (["--num_epochs=2", "--max_iters=5"], ["sets max_iters and epochs, which say the same thing"]),
        (["--min_lr=1e-5", "--min_lr_ratio=0.1"], ["sets min_lr and min_lr_ratio, which say the same thing"]),
        (["--min_lr_ratio=1.5"], ["min_lr_ratio=1.5 must be in [0, 1]"]),
        (["--d_model"], ["--d_model needs a value (a whole number): --d_model=…"]),
        (["--num_hedas=8"], ["did you mean 'num_heads'?"]),
        (["--init_from=weights:x", "--max_samples=5"], ["block_size, which comes with the weights; give --max_train_tokens"]),
    ],
)
def test_what_contradicts_or_cannot_be_is_said_in_one_sentence(words, reasons):
    with pytest.raises(ConfigError) as error:
        configure(words)
    lines = str(error.value).split("\n")
    assert len(lines) == len(reasons) and all(reason in line for reason, line in zip(reasons, lines)), lines


def test_the_same_said_twice_is_no_contradiction():
    train = configure(["--d_model=384", "--n_embd=3.84e2", "--fp16", "--dtype=float16", "--warmup=7", "--warmup_steps=7"]).train
    assert (train.n_embd, train.dtype, train.warmup_iters) == (384, "float16", 7)


def test_a_stronger_source_wins_whichever_name_it_uses(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("d_model = 192\nfp16 = True\ngradient_checkpointing = True\nmax_samples = 10\nmin_lr = 1e-5\n")
    got = configure([str(file)]).train
    assert (got.n_embd, got.dtype, got.activation_checkpointing, got.max_train_tokens) == (192, "float16", "full", 10240)
    got = configure([str(file), "--n_embd=384", "--fp16=False", "--gradient_checkpointing=False", "--block_size=64"]).train
    assert (got.n_embd, got.dtype, got.activation_checkpointing, got.max_train_tokens) == (384, "auto", "none", 640)
    got = configure([str(file), "--bf16=False", "--max_train_tokens=77", "--min_lr_ratio=0.2"]).train
    assert (got.dtype, got.max_train_tokens, got.min_lr, got.min_lr_ratio) == ("float16", 77, None, 0.2)


def test_a_folder_with_the_spelled_name_is_what_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wikitext").mkdir()
    assert configure(["--dataset=wikitext"]).train.dataset == "wikitext"


def test_min_lr_ratio_is_a_share_of_whatever_peak_there_is():
    train = configure(["config/lm_tiny.py", "--learning_rate=1e-2", "--min_lr_ratio=0.25"]).train
    assert lowest_rate(train) == pytest.approx(2.5e-3)
    assert learning_rate(10**6, train, 5000) == pytest.approx(2.5e-3)
    assert lowest_rate(configure(["--learning_rate=1e-2", "--min_lr=1e-4"]).train) == 1e-4
    assert lowest_rate(configure(["--learning_rate=1e-2"]).train) == pytest.approx(1e-3)


def test_the_help_lists_the_table(capsys):
    print_help_all("usage")
    printed = capsys.readouterr().out
    assert all(f"--{name}: " in printed for name in ALIASES) and "--dataset=wikitext-103: dataset=wikitext103" in printed
