"""N, component by component: arithmetic on a ModelConfig that never builds the model."""

from __future__ import annotations

from dataclasses import replace

from model_config import ModelConfig, Part, component


def parts(config: ModelConfig) -> list[Part]:
    """What every part of the model costs, in the order of the data; names are paths ('blocks.3.q_proj').

    A tied head has no parameters of its own but is multiplied all the same; an embedding is looked up, not multiplied.
    """
    rows = config.padded_vocab_size
    table = rows * config.n_embd
    found = [Part("embedding", parameters=table)]
    found += component("position_encoding", config.position_encoding).build.parts(config)
    norm = component("normalization", config.normalization).build.parts(config, config.n_embd)
    if config.embedding_norm:
        found += [replace(part, name=f"embedding_{part.name}") for part in norm]
    for layer, block in enumerate(config.layer_pattern):
        found += [replace(part, name=f"blocks.{layer}.{part.name}") for part in component("block", block).build.parts(config)]
    found += [replace(part, name=f"final_{part.name}") for part in norm]
    return found + [Part("head", parameters=0 if config.weight_tying else table, matmul=table)]


def count_parameters(config: ModelConfig) -> int:
    """N: all trainable parameters, tied ones once, the rows that pad the vocabulary included."""
    return sum(part.parameters for part in parts(config))


def count_padding(config: ModelConfig) -> int:
    """The part of N that only pads the vocabulary (embedding, and the head where it is not tied)."""
    rows = config.padded_vocab_size - config.vocab_size
    return rows * config.n_embd * (1 if config.weight_tying else 2)
