"""Small Hugging Face models for the tests: made by transformers' own classes, with random weights, and folders of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model_builder import build_model
from training.huggingface import config_from_hf, tensor_rules

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

T = 24
SMALL = dict(
    vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=T
)
SHAPE = {
    "gpt2": dict(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=T),
    "llama": SMALL,
    "mistral": dict(SMALL, num_key_value_heads=2),
    "qwen3": dict(SMALL, num_key_value_heads=2, head_dim=8),
    "qwen2": dict(SMALL, num_key_value_heads=2),
    "olmo2": SMALL,
    "olmo3": SMALL,
    "gemma": dict(SMALL, num_key_value_heads=2, head_dim=8),
    "phi3": SMALL,
    "arcee": SMALL,
    "starcoder2": dict(SMALL, num_key_value_heads=2),
    "opt": dict(vocab_size=61, hidden_size=32, ffn_dim=40, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=T),
    "gemma2": dict(SMALL, num_key_value_heads=2, head_dim=8),
}


def content(model_type: str, says: dict) -> dict:
    """The file: the shape, then what it says besides."""
    values = {**SHAPE[model_type], **says, "model_type": model_type, "pad_token_id": None}
    return {key: value for key, value in copy.deepcopy(values).items() if value is not ...}


def logits_there(hf: dict, tokens: torch.Tensor) -> tuple[torch.nn.Module, torch.Tensor]:
    """transformers' model of a file, no weight at its initial value, and its logits."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**copy.deepcopy(hf))
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        return model, model(tokens, use_cache=False).logits


def logits_here(hf: dict, theirs: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The logits of kitbash's model of a file with the same weights."""
    model, weights = build_model(config_from_hf(hf)).eval(), theirs.state_dict()
    rules = tensor_rules(model.config, hf["model_type"])
    parameters = dict(model.named_parameters())
    tied = {"lm_head.weight"} if model.config.weight_tying else set()
    assert {rule.theirs for rule in rules} == weights.keys() - tied
    with torch.no_grad():
        for rule in rules:
            for name, tensor in rule.to_ours(weights[rule.theirs]).items():
                parameters.pop(name).copy_(tensor)
        assert not parameters
        return model(tokens)


def saved_folder(folder: Path, model_type: str = "llama", dtype: torch.dtype = torch.float32, **says) -> torch.nn.Module:
    """A folder that transformers wrote, with its model."""
    model, _ = logits_there(content(model_type, says), torch.zeros(1, 2, dtype=torch.long))
    model.to(dtype).save_pretrained(folder, max_shard_size=says.pop("shards", "1GB"))
    return model


def change_config(folder: Path, **keys) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def change_tensors(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
