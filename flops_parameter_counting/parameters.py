"""N, component by component: arithmetic on a ModelConfig that never builds the model."""

from __future__ import annotations

from model_config import ModelConfig, Part


def parts(config: ModelConfig) -> list[Part]:
    """What every part of the model costs, in the order of the data; names are paths ('blocks.3.q_proj')."""
    from model_builder import Transformer  # which needs PyTorch

    return Transformer.parts(config)


def count_parameters(config: ModelConfig) -> int:
    """N: all trainable parameters, tied ones once, the rows that pad the vocabulary included."""
    return sum(part.parameters for part in parts(config))


def count_active_parameters(config: ModelConfig) -> int:
    """The parameters that a token uses: N, but of a mixture of experts only the experts that a token is sent to.

    What a token costs, and what scaling laws call N for such a model, follows from this one; memory follows from N.
    """
    return sum(part.used for part in parts(config))


def count_padding(config: ModelConfig) -> int:
    """The part of N that only pads the vocabulary (embedding, and the head where it is not tied)."""
    rows = config.padded_vocab_size - config.vocab_size
    return rows * config.n_embd * (1 if config.weight_tying else 2)
