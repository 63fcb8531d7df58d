"""Every family equals Hugging Face's own implementation: logits, gradients, training, generation, and files both ways."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors.torch import load_file, save_file

import convert
import sample
import train
from model_builder import build_model
from model_config import resolve
from training.checkpoint import CheckpointStore, load_model
from training.huggingface import config_from_hf, config_to_hf, family_of, tensor_rules
from training.huggingface_parts import ConversionError

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

IDS = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
pytestmark = pytest.mark.usefixtures("preloaded")  # the check at the end of an export

BASE = dict(
    vocab_size=61,
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=6,
    max_position_embeddings=24,
    **IDS,
)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
OPT = dict(
    vocab_size=61, hidden_size=48, ffn_dim=40, num_hidden_layers=2, num_attention_heads=6, max_position_embeddings=24, **IDS
)

# model_type, and the configuration; at least three shapes a family: odd head counts, GQA, MQA, tied and untied, biases,
# RoPE scaling, windows shorter than the sequence
SHAPES = {
    "gpt2-plain": ("gpt2", dict(vocab_size=61, n_embd=48, n_layer=2, n_head=6, n_positions=24)),
    "gpt2-odd": ("gpt2", dict(vocab_size=61, n_embd=30, n_layer=3, n_head=5, n_positions=25, n_inner=77)),
    "gpt2-untied-relu": (
        "gpt2",
        dict(
            vocab_size=61, n_embd=48, n_layer=1, n_head=3, n_positions=24, tie_word_embeddings=False, activation_function="relu"
        ),
    ),
    "llama-mha": ("llama", BASE),
    "llama-gqa-tied": ("llama", dict(BASE, num_key_value_heads=2, tie_word_embeddings=True)),
    "llama-odd": ("llama", dict(BASE, hidden_size=30, num_attention_heads=5, num_key_value_heads=1, num_hidden_layers=3)),
    "llama-biases": ("llama", dict(BASE, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3)),
    "llama-wide-heads": ("llama", dict(BASE, head_dim=16, num_key_value_heads=3)),
    "llama3-scaled": ("llama", dict(BASE, num_key_value_heads=2, rope_parameters=LLAMA3)),
    "llama-linear": ("llama", dict(BASE, rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=3.0))),
    "mistral-window": ("mistral", dict(BASE, num_key_value_heads=2, head_dim=8, sliding_window=5)),
    "mistral-plain": ("mistral", dict(BASE, num_key_value_heads=3, head_dim=8, sliding_window=None)),
    "mistral-odd": (
        "mistral",
        dict(BASE, num_attention_heads=3, num_key_value_heads=1, head_dim=16, sliding_window=1, tie_word_embeddings=True),
    ),
    "qwen3-gqa": ("qwen3", dict(BASE, num_key_value_heads=2, head_dim=16)),
    "qwen3-tied": ("qwen3", dict(BASE, num_key_value_heads=3, head_dim=8, tie_word_embeddings=True)),
    "qwen3-odd": (
        "qwen3",
        dict(
            BASE,
            num_attention_heads=5,
            num_key_value_heads=5,
            head_dim=12,
            num_hidden_layers=3,
            rope_parameters=dict(rope_type="default", rope_theta=1e6),
        ),
    ),
    "olmo2-mha": ("olmo2", dict(BASE, num_key_value_heads=6)),
    "olmo2-gqa": ("olmo2", dict(BASE, num_key_value_heads=2)),
    "olmo2-odd": ("olmo2", dict(BASE, hidden_size=30, num_attention_heads=5, num_key_value_heads=1, tie_word_embeddings=True)),
    "qwen2-gqa": ("qwen2", dict(BASE, num_key_value_heads=2)),
    "qwen2-windows": (
        "qwen2",
        dict(BASE, num_key_value_heads=3, use_sliding_window=True, sliding_window=5, max_window_layers=1, num_hidden_layers=3),
    ),
    "qwen2-odd": ("qwen2", dict(BASE, num_attention_heads=5, num_key_value_heads=1, head_dim=6, tie_word_embeddings=True)),
    "olmo3-windows": ("olmo3", dict(BASE, num_key_value_heads=2, sliding_window=5, num_hidden_layers=5)),
    "olmo3-odd": (
        "olmo3",
        dict(BASE, hidden_size=30, num_attention_heads=5, sliding_window=3, layer_types=["full_attention", "sliding_attention"]),
    ),
    "olmo3-scaled": (
        "olmo3",
        dict(
            BASE,
            sliding_window=1,
            rope_parameters={kind: dict(LLAMA3) for kind in ("full_attention", "sliding_attention")},
            layer_types=["sliding_attention", "full_attention"],
            tie_word_embeddings=True,
        ),
    ),
    "gemma-mqa": ("gemma", dict(BASE, num_key_value_heads=1, head_dim=16)),
    "gemma-legacy": ("gemma", dict(BASE, num_key_value_heads=6, head_dim=8, hidden_act="gelu", rms_norm_eps=1e-3)),
    "gemma-untied": ("gemma", dict(BASE, num_key_value_heads=3, head_dim=12, tie_word_embeddings=False, num_hidden_layers=3)),
    "phi3-plain": ("phi3", dict(BASE)),
    "phi3-window": ("phi3", dict(BASE, num_key_value_heads=2, sliding_window=5, tie_word_embeddings=True)),
    "phi3-odd": ("phi3", dict(BASE, hidden_size=30, num_attention_heads=5, num_key_value_heads=1, hidden_act="gelu")),
    "arcee-plain": ("arcee", dict(BASE, num_key_value_heads=2)),
    "arcee-biases": ("arcee", dict(BASE, attention_bias=True, mlp_bias=True, head_dim=16, rope_parameters=LLAMA3)),
    "arcee-odd": ("arcee", dict(BASE, hidden_size=30, num_attention_heads=5, hidden_act="silu", tie_word_embeddings=True)),
    "starcoder2-window": ("starcoder2", dict(BASE, num_key_value_heads=2, sliding_window=5)),
    "starcoder2-no-biases": ("starcoder2", dict(BASE, num_key_value_heads=1, use_bias=False, norm_epsilon=1e-3)),
    "starcoder2-odd": (
        "starcoder2",
        dict(BASE, hidden_size=30, num_attention_heads=5, num_key_value_heads=5, tie_word_embeddings=False, hidden_act="relu"),
    ),
    "opt-plain": ("opt", dict(OPT)),
    "opt-odd": ("opt", dict(OPT, hidden_size=30, num_attention_heads=5, num_hidden_layers=3, ffn_dim=77)),
    "opt-untied": ("opt", dict(OPT, enable_bias=False, tie_word_embeddings=False, activation_function="gelu_new")),
    "gemma2-window": ("gemma2", dict(BASE, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=5)),
    "gemma2-scaled": (
        "gemma2",
        dict(BASE, num_key_value_heads=6, head_dim=16, query_pre_attn_scalar=24, sliding_window=3, num_hidden_layers=3),
    ),
    "gemma2-no-caps": (
        "gemma2",
        dict(
            BASE,
            num_key_value_heads=1,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=50,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
        ),
    ),
}


def hf_model(shape: str, seed: int = 0):
    """A Hugging Face model of this shape with random weights, none at its initial value, without dropout."""
    model_type, keys = SHAPES[shape]
    quiet = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **IDS) if model_type == "gpt2" else {}
    config = transformers.AutoConfig.for_model(model_type, **{**keys, **quiet})
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def to_ours(tensors: dict, config, model_type: str) -> dict[str, torch.Tensor]:
    return {
        name: tensor for rule in tensor_rules(config, model_type) for name, tensor in rule.to_ours(tensors[rule.theirs]).items()
    }


def twin(theirs):
    """The kitbash model with the same weights."""
    config = config_from_hf(theirs.config.to_dict())
    ours = build_model(config).eval()
    weights, parameters = to_ours(theirs.state_dict(), config, theirs.config.model_type), dict(ours.named_parameters())
    assert weights.keys() == parameters.keys()
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)
    return ours


def tokens(rows: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_equal_hugging_faces(shape):
    theirs = hf_model(shape)
    ours, x = twin(theirs), tokens()
    mine, reference = ours(x), theirs(x).logits
    assert (mine - reference).abs().max() < 1e-5
    assert reference.std() > 0.05  # it says something
    for logits in (mine, reference):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
    expected = to_ours({name: p.grad for name, p in theirs.named_parameters()}, ours.config, theirs.config.model_type)
    for name, parameter in ours.named_parameters():
        scale = expected[name].norm()
        if scale > 1e-6:  # a key's bias without RoPE has no gradient at all
            assert (parameter.grad - expected[name]).norm() / scale < 1e-5, name


@pytest.mark.parametrize(
    "shape",
    [
        *("gpt2-plain", "llama-gqa-tied", "mistral-window", "qwen3-gqa", "olmo2-gqa", "gemma2-window", "qwen2-windows"),
        *("olmo3-windows", "gemma-mqa", "phi3-window", "arcee-plain", "starcoder2-window", "opt-plain"),
    ],
)
def test_twenty_adamw_steps_stay_together(shape):
    theirs = hf_model(shape)
    ours = twin(theirs)
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, eps=1e-6)
        for step in range(20):
            x = torch.randint(0, 61, (4, 24), generator=torch.Generator().manual_seed(step))
            out = model(x)
            logits = out if isinstance(out, torch.Tensor) else out.logits
            optimizer.zero_grad()
            F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
            optimizer.step()
    weights = to_ours(theirs.state_dict(), ours.config, theirs.config.model_type)
    for name, parameter in ours.named_parameters():
        assert (parameter - weights[name]).abs().max() < 1e-4, name


@pytest.mark.parametrize(
    "shape",
    [
        *("gpt2-odd", "llama3-scaled", "mistral-window", "qwen3-tied", "olmo2-mha", "gemma2-window", "qwen2-windows"),
        *("olmo3-odd", "gemma-legacy", "phi3-window", "arcee-biases", "starcoder2-window", "opt-odd"),
    ],
)
def test_greedy_generation_is_token_equal(shape):
    theirs = hf_model(shape)
    prompt = tokens(length=6)
    expected = theirs.generate(prompt, max_new_tokens=14, do_sample=False, attention_mask=torch.ones_like(prompt))
    assert torch.equal(twin(theirs).generate(prompt, 14, temperature=0), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_config_json_round_trips(shape):
    theirs = hf_model(shape).config
    config = config_from_hf(json.loads(theirs.to_json_string(use_diff=False)))
    again = transformers.AutoConfig.for_model(**config_to_hf(config))
    assert config_from_hf(again.to_dict()) == config


@pytest.mark.parametrize(
    "keys",
    [
        dict(attention_bias=True),
        dict(mlp_bias=True),
        dict(hidden_act="tanh"),
        dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=2.0)),
    ],
)
def test_what_has_no_counterpart_here_is_refused(keys):
    with pytest.raises(ConversionError, match="no counterpart"):
        config_from_hf({**BASE, "model_type": "llama", "rms_norm_eps": 1e-5, "hidden_act": "silu", **keys})


@pytest.mark.parametrize("key", ["sliding_window", "attention_softcap", "logit_softcap"])
def test_zero_switches_off_what_a_preset_has_on_and_a_saved_run_keeps_it_off(key, tmp_path):
    from configurator import configure

    words = ["--arch_preset=gemma2", f"--{key}=0"] + (["--layer_pattern=transformer"] if key == "sliding_window" else [])
    got = configure(words)
    config = got.train.model_config()
    assert getattr(config, key) is None and getattr(resolve("gemma2"), key)
    values, origins = got.resolved(config)
    (tmp_path / "run.json").write_text(json.dumps({"config": values, "origins": origins}))
    assert configure([str(tmp_path / "run.json")]).train.model_config() == config


@pytest.mark.parametrize(
    "old, new",
    [
        (dict(rope_theta=5e5, rope_scaling=dict(LLAMA3, rope_theta=None)), dict(rope_parameters=LLAMA3)),
        (dict(rope_theta=77.0, rope_scaling=None), dict(rope_parameters=dict(rope_type="default", rope_theta=77.0))),
        (
            dict(rope_theta=1e4, rope_scaling=dict(type="linear", factor=2.0)),
            dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0)),
        ),
    ],
)
def test_rope_is_read_in_the_form_of_transformers_4_and_5(old, new):
    keys = dict(BASE, model_type="llama", num_key_value_heads=2, rms_norm_eps=1e-5, hidden_act="silu")
    old = {
        key: {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value for key, value in old.items()
    }
    assert config_from_hf({**keys, **old}) == config_from_hf({**keys, **new})


# ------------------------------------------------------------------------------------------- files


def saved(shape: str, folder, dtype=torch.bfloat16, **options):
    model = hf_model(shape).to(dtype)
    model.save_pretrained(folder, **options)
    return model


def all_tensors(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    "shape",
    [
        *("gpt2-untied-relu", "llama-biases", "llama3-scaled", "mistral-window", "qwen3-tied", "olmo2-gqa", "gemma2-window"),
        *("qwen2-odd", "olmo3-scaled", "gemma-legacy", "phi3-odd", "arcee-biases", "starcoder2-odd"),
    ],
)
def test_converted_and_converted_back_is_byte_equal(tmp_path, shape, capsys):
    saved(shape, tmp_path / "hf", max_shard_size="20KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
    assert convert.main([str(tmp_path / "hf"), str(tmp_path / "run")]) == 0
    assert convert.main([str(tmp_path / "run"), str(tmp_path / "back"), "--no_check"]) == 0
    one, other = all_tensors(tmp_path / "hf"), all_tensors(tmp_path / "back")
    assert one.keys() == other.keys()
    assert all(
        a.dtype == other[name].dtype and torch.equal(a.view(torch.int16), other[name].view(torch.int16))
        for name, a in one.items()
    )
    assert config_from_hf(json.loads((tmp_path / "back" / "config.json").read_text())) == load_model(tmp_path / "run")[0].config


def test_an_export_is_read_by_from_pretrained_in_a_fresh_process(tmp_path, tiny_dataset, capsys):
    """A model trained here, padded vocabulary and all, gives the same logits there."""
    assert (
        train.main(
            [
                "--arch_preset=qwen3",
                "--n_layer=2",
                "--n_head=4",
                "--n_embd=32",
                "--block_size=16",
                "--max_iters=3",
                f"--dataset={tiny_dataset}",
                f"--out_dir={tmp_path / 'run'}",
                "--pad_vocab_multiple=100",
                "--device=cpu",
                "--eval_iters=1",
                "--threads=1",
            ]
        )
        == 0
    )
    capsys.readouterr()
    assert convert.main([str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    said = capsys.readouterr().out
    assert float(re.search(r"largest logit difference ([\d.e-]+) ", said)[1]) < 1e-5  # Issue 10.7
    x = torch.arange(12)[None]
    program = (
        f"import torch; from transformers import AutoModelForCausalLM; "
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'hf')!r}); "
        f"torch.save(m(torch.arange(12)[None]).logits.detach(), {str(tmp_path / 'logits.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, capture_output=True, timeout=120)
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert logits.shape == (1, 12, 256)
    torch.testing.assert_close(load_model(tmp_path / "run")[0](x).detach(), logits, rtol=1e-4, atol=1e-5)


def test_training_starts_from_a_hugging_face_folder(tmp_path, tiny_dataset):
    model = saved("llama-gqa-tied", tmp_path / "hf", torch.float32)
    common = [
        f"--init_from=hf:{tmp_path / 'hf'}",
        "--dtype=float32",
        "--device=cpu",
        "--threads=1",
        "--log_interval=1",
        "--batch_size=2",
        f"--out_dir={tmp_path / 'run'}",
        "--eval_iters=1",
    ]
    text = tmp_path / "letters"
    from data.preparation import prepare

    prepare(lambda: iter([("x", "the cat sat on the mat. " * 60)]), text, tokenizer="char")
    assert train.main([*common, f"--dataset={text}", "--block_size=12", "--max_iters=2", "--learning_rate=1e-9"]) == 0
    ours, _ = load_model(tmp_path / "run")
    assert ours.config.block_size == 12 and ours.config.n_kv_head == 2
    x = tokens(length=12)
    torch.testing.assert_close(ours(x), model(x).logits, rtol=1e-4, atol=1e-4)
    assert train.main([*common, f"--dataset={text}", "--n_layer=3"]) == 2


def test_sample_reads_a_hugging_face_folder_directly(tmp_path, capsys):
    model = saved("llama-mha", tmp_path / "hf", torch.float32)
    assert (
        sample.main(
            [
                str(tmp_path / "hf"),
                "--prompt_ids=1,2,3",
                "--temperature=0",
                "--max_new_tokens=8",
                "--device=cpu",
                "--dtype=float32",
            ]
        )
        == 0
    )
    expected = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=8, do_sample=False)
    assert capsys.readouterr().out.strip() == ",".join(map(str, expected[0].tolist()))


@pytest.mark.slow
def test_converting_two_gigabytes_peaks_below_1_3_times_their_size(tmp_path):
    """Both ways, measured from outside as the peak resident memory of the process."""
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=18,
        num_attention_heads=16,
        max_position_embeddings=64,
        **IDS,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    size = sum(p.numel() * 2 for p in model.parameters())
    assert 1.9e9 < size < 2.2e9
    model.save_pretrained(tmp_path / "hf")
    del model
    for source, target in (("hf", "run"), ("run", "back")):
        program = (
            "import resource, sys; sys.path.insert(0, '.'); import convert; assert convert.main(sys.argv[1:]) == 0; "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, tmp_path / source, tmp_path / target, *["--no_check"][: source == "run"]],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
        assert int(done.stdout.split()[-1]) < 1.3 * size


# ------------------------------------------------------------------------------------------- refusals


def test_a_combination_without_a_class_is_refused_with_its_parts():
    for keys, parts in (
        (dict(position_encoding="alibi"), ["alibi"]),
        (dict(norm_position="post"), ["norm_position='post'"]),
        (dict(activation="relu2", ffn_type="gated", qk_norm=True), []),
        (dict(embedding_norm=True), ["embedding_norm=True"]),
    ):
        config = resolve("llama", **keys)
        if parts:
            with pytest.raises(ConversionError) as refusal:
                family_of(config)
            assert all(part in str(refusal.value) for part in parts)


@pytest.mark.parametrize(
    "preset, model_type",
    [
        ("gpt2", "gpt2"),
        ("llama", "llama"),
        ("llama3", "llama"),
        ("team", "llama"),
        ("mistral", "mistral"),
        ("qwen3", "qwen3"),
        ("olmo2", "olmo2"),
        ("gemma2", "gemma2"),
        ("qwen2", "qwen2"),
        ("olmo3", "olmo3"),
        ("gemma", "gemma"),
        ("phi3", "mistral"),  # whose tensors are the same ones, unfused
        ("arcee", "arcee"),
        ("starcoder2", "starcoder2"),
        ("opt", "gpt2"),  # whose class takes ReLU too
    ],
)
def test_every_preset_with_a_family_finds_it(preset, model_type):
    assert family_of(resolve(preset)).model_type == model_type


@pytest.mark.parametrize("preset", ["gpt2_postnorm", "hybrid", "modern"])
def test_presets_without_a_family_say_so(preset):
    with pytest.raises(ConversionError, match="No Hugging Face class builds"):
        family_of(resolve(preset))


def test_bad_folders_and_names_are_refused_with_a_sentence(tmp_path, capsys):
    saved("llama-mha", tmp_path / "hf", max_shard_size="20KB")
    capsys.readouterr()

    def told(*argv) -> str:
        code = convert.main([str(word) for word in argv])
        err = capsys.readouterr().err
        assert code in (1, 2) and "Traceback" not in err and err.startswith("convert.py: ")
        return err

    assert "no config.json" in told(tmp_path, tmp_path / "x")
    assert "cannot be a name" in told("/no/such/folder", tmp_path / "x")
    shard = sorted((tmp_path / "hf").glob("*.safetensors"))[0]
    content = shard.read_bytes()
    shard.unlink()
    assert shard.name in told(tmp_path / "hf", tmp_path / "x")
    shard.write_bytes(content[:100])
    assert "cannot be read" in told(tmp_path / "hf", tmp_path / "x")
    assert not CheckpointStore(tmp_path / "x").all()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    assert "bert" in told(tmp_path / "hf", tmp_path / "x")
    assert "needs" in told() or "required" in told()


def test_an_unreachable_name_on_the_hub_gives_the_reason(tmp_path, capsys, monkeypatch):
    import huggingface_hub

    class GatedRepoError(Exception):
        pass

    for error, word in (
        (GatedRepoError("401 Client Error: access is restricted"), "gated"),
        (OSError("no route to host"), "network"),
    ):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        assert convert.main(["meta-llama/Llama-2-7b-hf", str(tmp_path / "x")]) == 1
        assert word in capsys.readouterr().err


def test_a_truncated_tensor_shape_is_refused(tmp_path, capsys):
    saved("qwen3-gqa", tmp_path / "hf", torch.float32)
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    assert convert.main([str(tmp_path / "hf"), str(tmp_path / "x")]) == 1
    assert "model.norm.weight" in capsys.readouterr().err


def test_a_file_of_prompts_is_continued_in_one_batch_and_two_models_side_by_side(tmp_path, capsys):
    from data.preparation import prepare

    tiny_dataset = tmp_path / "letters"
    prepare(lambda: iter([("x", "the cat sat on the mat. " * 60)]), tiny_dataset, tokenizer="char")
    for seed in (1, 2):
        assert (
            train.main(
                [
                    "--arch_preset=llama",
                    "--n_layer=1",
                    "--n_head=2",
                    "--n_embd=32",
                    "--block_size=32",
                    "--max_iters=2",
                    f"--dataset={tiny_dataset}",
                    f"--out_dir={tmp_path / str(seed)}",
                    "--eval_iters=1",
                    "--device=cpu",
                    "--threads=1",
                    f"--seed={seed}",
                ]
            )
            == 0
        )
    prompts = ["the", "the cat sat on", "a"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    common = ["--max_new_tokens=12", "--temperature=0", "--device=cpu", "--dtype=float32"]
    capsys.readouterr()
    alone = {}
    for place in ("1", "2"):
        alone[place] = []
        for prompt in prompts:
            assert sample.main([str(tmp_path / place), f"--prompt={prompt}", *common]) == 0
            alone[place].append(capsys.readouterr().out.removesuffix("\n"))
    assert sample.main([str(tmp_path / "1"), f"--prompts_file={tmp_path / 'prompts.txt'}", "--speed", *common]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"\n{sample.SEPARATOR}\n".join(alone["1"]) + "\n"
    assert "tokens/s" in captured.err and "36 tokens" in captured.err
    assert sample.main(["--compare", str(tmp_path / "1"), str(tmp_path / "2"), "--prompt=the", *common]) == 0
    out = capsys.readouterr().out
    head = out.splitlines()[0]
    assert str(tmp_path / "1")[-20:] in head and str(tmp_path / "2")[-20:] in head and " | " in head
    for place in ("1", "2"):
        assert alone[place][0].split("\n")[0].strip()[:8] in out
    assert sample.main(["somewhere", "--compare", "a", "b"]) == 2


@pytest.mark.parametrize(
    "shape, keys", [("gemma2-scaled", {}), ("qwen3-odd", dict(use_sliding_window=True, sliding_window=4, max_window_layers=1))]
)
def test_config_json_as_transformers_4_wrote_it_gives_the_same_model(tmp_path, shape, keys):
    """No layer_types, no tie_word_embeddings where it has its default, RoPE's keys at the top."""
    model_type, base = SHAPES[shape]
    config = transformers.AutoConfig.for_model(model_type, **{**base, **keys})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    theirs.save_pretrained(tmp_path)
    new = json.loads((tmp_path / "config.json").read_text())
    old = {key: value for key, value in new.items() if key not in ("layer_types", "rope_parameters", "tie_word_embeddings")}
    old["rope_theta"] = new["rope_parameters"]["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    ours, _ = load_model(tmp_path)
    assert set(ours.config.layer_pattern) == {"sliding", "transformer"}
    assert (ours(tokens()) - theirs(tokens()).logits).abs().max() < 1e-5


@pytest.mark.parametrize(
    "name, shape",
    [
        ("model.layers.0.mlp.up_proj.weight", (40, 1)),
        ("model.norm.weight", (20,)),
        ("model.layers.1.self_attn.q_proj.weight", (1, 48)),
        ("model.embed_tokens.weight", (80, 48)),
        ("model.layers.0.mlp.down_proj.weight", (40, 48)),
    ],
)
def test_a_tensor_of_another_shape_is_refused_with_both_shapes(tmp_path, capsys, name, shape):
    saved("llama-mha", tmp_path / "hf", torch.float32)
    file = tmp_path / "hf" / "model.safetensors"
    save_file({**load_file(file), name: torch.ones(shape)}, file, metadata={"format": "pt"})
    with pytest.raises(ConversionError, match="has shape"):
        load_model(tmp_path / "hf")
    assert convert.main([str(tmp_path / "hf"), str(tmp_path / "x")]) == 1
    assert name in capsys.readouterr().err and not CheckpointStore(tmp_path / "x").all()


def test_special_ids_generation_config_and_tokenizer_files_survive_there_and_back(tmp_path):
    saved("llama-mha", tmp_path / "hf", torch.float32)
    (tmp_path / "hf" / "generation_config.json").write_text(
        json.dumps(dict(bos_token_id=1, eos_token_id=[2, 3], temperature=0.6))
    )
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "bos_token_id": 1, "eos_token_id": [2, 3]}))
    from data.tokenization import HuggingFaceTokenizer

    HuggingFaceTokenizer.train(["the cat sat on the mat"], 260).save(tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    assert convert.main([str(tmp_path / "hf"), str(tmp_path / "run")]) == 0
    assert convert.main([str(tmp_path / "run"), str(tmp_path / "back"), "--no_check"]) == 0
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "back" / name).read_text().split() == (tmp_path / "hf" / name).read_text().split() or json.loads(
            (tmp_path / "back" / name).read_text()
        ) == json.loads((tmp_path / "hf" / name).read_text()), name
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (back["bos_token_id"], back["eos_token_id"]) == (1, [2, 3])
