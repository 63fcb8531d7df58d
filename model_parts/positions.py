"""Position encodings, and the scalings of RoPE's frequencies."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from model_config import ModelConfig, must_be_positive
from model_parts.bricks import Embedding, build, use
from model_parts.registry import Key, Part, register


@register("position_encoding", "none", short="NoPos")
class NoPosition(nn.Module):
    """No position information but the causal mask (Kazemnejad et al. 2023). The base of all position encodings.

    `embed` may add something to the embeddings (B, T, D), once; `tables` computes what attention needs, once a forward
    for all layers; `rotate` uses it on queries (B, H, T, d) and keys (B, K, T, d), `slopes` for a penalty on distance.
    Positions are (T,), or (B, T) where documents are packed into sequences.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config

    @staticmethod
    def parts(config: ModelConfig) -> list[Part]:
        return []

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x

    def tables(self, positions: Tensor) -> Any:
        return None

    @staticmethod
    def rotate(q: Tensor, k: Tensor, tables: Any) -> tuple[Tensor, Tensor]:
        return q, k

    @staticmethod
    def slopes(tables: Any) -> Tensor | None:
        """What attention scores lose per token of distance, (H,); None for nothing."""
        return None


@register("position_encoding", "learned_absolute", short="AbsPos", uses=("block_size",))
class LearnedPosition(NoPosition):
    """One learned vector for each position, added to the embedding (GPT-2)."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.table = Embedding(config.block_size, config.n_embd)

    @staticmethod
    def parts(config: ModelConfig) -> list[Part]:
        return [Part("position", parameters=config.block_size * config.n_embd)]

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + use(self.table(positions), x)


@register("position_encoding", "sinusoidal", short="SinPos")
class SinusoidalPosition(NoPosition):
    """Sines and cosines of falling frequency added to the embedding (Vaswani et al. 2017, §3.5)."""

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        D = x.size(-1)
        even = torch.arange(0, D, 2, dtype=torch.float32, device=x.device)
        angle = positions.float()[..., None] / 10000.0 ** (even / D)  # (…, T, ⌈D/2⌉)
        return x + torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)[..., :D].to(x.dtype)


@register("position_encoding", "alibi", short="ALiBi")
class ALiBi(NoPosition):
    """Attention scores fall linearly with distance, at a slope of its own for each head (Press et al. 2021)."""

    def tables(self, positions: Tensor) -> Tensor:
        """→ slopes (H,): 2^(-8/n), 2^(-16/n) …; between, for an H that is no power of two, those of the next one."""
        H = self.config.n_head
        n = 1 << (H.bit_length() - 1)
        whole = torch.arange(1, n + 1, device=positions.device) * (8 / n)
        between = (2 * torch.arange(H - n, device=positions.device) + 1) * (4 / n)
        return torch.exp2(-torch.cat((whole, between)))

    @staticmethod
    def slopes(tables: Tensor) -> Tensor:
        return tables


def _pairs_and_base(config: ModelConfig) -> list[str]:
    problems = []
    if not 1 < config.rope_theta < math.inf:
        problems.append(f"rope_theta={config.rope_theta} must be greater than 1 and finite.")
    if config.head_dim % 2:
        problems.append(
            f"head_dim={config.head_dim} is odd, but RoPE rotates pairs of dimensions. "
            f"Use another n_head, or --head_dim={config.head_dim + 1}."
        )
    return problems


@register(
    "position_encoding",
    "rope",
    short="RoPE",
    keys=(Key("rope_theta", float, 10000.0, "base of the RoPE frequencies (RoPE only)", tag="Theta"),),
    uses=("rope_scaling",),
    check=_pairs_and_base,
)
class RotaryPosition(NoPosition):
    """Rotary position embedding (Su et al. 2021), half-split pairs (i, i + d/2) as Hugging Face stores them."""

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions (T,) → cos, sin (T, d), fp32; of positions (B, T) (B, 1, T, d), the same for all heads."""
        d = self.config.head_dim
        exponent = torch.arange(0, d, 2, dtype=torch.float32, device=positions.device) / d
        frequencies = build("rope_scaling", self.config.rope_scaling, self.config, 1.0 / self.config.rope_theta**exponent)
        angle = positions.float()[..., None] * frequencies
        angle = torch.cat((angle, angle), dim=-1)
        angle = angle if positions.dim() == 1 else angle[:, None]
        return angle.cos(), angle.sin()

    @staticmethod
    def rotate(q: Tensor, k: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        cos, sin = (t.to(q.dtype) for t in tables)
        return tuple(x * cos + torch.cat((-x[..., x.size(-1) // 2 :], x[..., : x.size(-1) // 2]), dim=-1) * sin for x in (q, k))


@register("rope_scaling", "none", short="NoScaling")
def unscaled(config: ModelConfig, frequencies: Tensor) -> Tensor:
    """RoPE's frequencies (d/2,) as they are."""
    return frequencies


ROPE_FACTOR = Key("rope_factor", float, 8.0, "by how much rope_scaling stretches")


def _stretches(config: ModelConfig) -> list[str]:
    if config.rope_factor == 1:
        return ["rope_factor=1.0 stretches nothing; leave rope_scaling out, or use a larger factor."]
    return must_be_positive(config, "rope_factor")


@register("rope_scaling", "linear", short="Linear", keys=(ROPE_FACTOR,), check=_stretches)
def linear_scaling(config: ModelConfig, frequencies: Tensor) -> Tensor:
    """Positions divided by rope_factor (Chen et al. 2023, position interpolation)."""
    return frequencies / config.rope_factor


def _stretches_between(config: ModelConfig) -> list[str]:
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    problems = _stretches(config)
    problems += must_be_positive(config, "rope_low_freq_factor", "rope_high_freq_factor", "rope_original_context")
    return problems + ([] if low < high else [f"rope_low_freq_factor={low} must be below rope_high_freq_factor={high}."])


@register(
    "rope_scaling",
    "llama3",
    short="Llama3",
    keys=(
        ROPE_FACTOR,
        Key("rope_low_freq_factor", float, 1.0, "rope_scaling=llama3 stretches wavelengths above rope_original_context / this"),
        Key("rope_high_freq_factor", float, 4.0, "rope_scaling=llama3 keeps wavelengths below rope_original_context / this"),
        Key("rope_original_context", int, 8192, "context that rope_scaling=llama3 takes for the one trained with"),
    ),
    check=_stretches_between,
)
def llama3_scaling(config: ModelConfig, frequencies: Tensor) -> Tensor:
    """Long wavelengths stretched by rope_factor, short ones kept, a ramp between (LLaMA 3.1)."""
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    turns = config.rope_original_context * frequencies / (2 * math.pi)  # of each pair over the original context
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / config.rope_factor
