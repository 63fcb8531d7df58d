"""ModelConfig → Transformer: the model itself, its initial weights, and generation.

from model_config import resolve
from model_builder import build_model
model = build_model(resolve("llama", n_layer=2, vocab_size=256))
logits = model(tokens)                                     # (B, T) → (B, T, vocab_size)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from model_components import Attention, Context, Embedding, KVCache, Linear, Normal, build
from model_config import ModelConfig


class Transformer(nn.Module):
    """A decoder-only language model assembled from the components that its config names.

    `compute_dtype` (None: the parameters' own) is the dtype of the residual stream; parameters stay as they are stored
    and are cast where they are used (training/precision.py sets it).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.embedding = Embedding(config.padded_vocab_size, config.n_embd)
        self.position = build("position_encoding", config.position_encoding, config)
        self.embedding_norm = (
            build("normalization", config.normalization, config, config.n_embd) if config.embedding_norm else nn.Identity()
        )
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(build("block", name, config, layer) for layer, name in enumerate(config.layer_pattern))
        self.norm = build("normalization", config.normalization, config, config.n_embd)
        self.head = Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.weight_tying:
            self.head.weight = self.embedding.weight
        attentions = [module for module in self.blocks.modules() if isinstance(module, Attention)]
        self.windows = tuple(dict.fromkeys(attention.window for attention in attentions))  # each needs a mask

    def forward(self, tokens: Tensor, cache: KVCache | None = None, last_only: bool = False) -> Tensor:
        """Token ids (B, T) → logits (B, T, vocab_size) in the compute dtype; padded rows are cut off.

        With a cache, the tokens continue those whose keys it holds. `last_only` gives the logits of the last position
        alone, (B, 1, vocab_size). Raises ValueError beyond block_size.
        """
        x, context = self.front(tokens, cache)
        for block in self.blocks:
            x = block(x, context)
        if cache is not None:
            cache.length += tokens.size(1)
        return self.tail(x, last_only)

    def front(self, tokens: Tensor, cache: KVCache | None = None) -> tuple[Tensor, Context]:
        """What comes before the blocks: token ids (B, T) → the residual stream (B, T, D) and what the blocks share.

        Raises ValueError where tokens and cache together are longer than block_size.
        """
        start, T = cache.length if cache is not None else 0, tokens.size(1)
        if start + T > self.config.block_size:
            raise ValueError(f"a sequence of {start + T} tokens is longer than block_size={self.config.block_size}.")
        positions = torch.arange(start, start + T, device=tokens.device)
        x = self.embedding(tokens)
        x = x.to(self.compute_dtype or x.dtype)
        if self.config.embedding_scale:
            x = x * self.config.n_embd**0.5
        x = self.dropout(self.embedding_norm(self.position.embed(x, positions)))
        context = Context(self.config, self.position, positions, x.dtype, cache)
        for window in self.windows:  # here, so that a compiled block finds its mask made
            context.mask(window)
        return x, context

    def tail(self, x: Tensor, last_only: bool = False) -> Tensor:
        """What comes after the blocks: the residual stream (B, T, D) → logits (B, T or, with last_only, 1, vocab_size)."""
        x = x[:, -1:] if last_only else x
        logits = self.head(self.norm(x))
        if self.config.logit_softcap is not None:
            logits = self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)
        return logits if logits.size(-1) == self.config.vocab_size else logits[..., : self.config.vocab_size]

    def units(self) -> Iterator[nn.Module | list[nn.Module]]:
        """What a sharding strategy gathers and reduces together, innermost first.

        Each block; the embedding, and final norm and head, by themselves unless the head is tied to the embedding; then the
        model, which stands for whatever is left.
        """
        if not self.config.weight_tying:
            yield self.embedding
        yield from self.blocks
        if not self.config.weight_tying:
            yield [self.norm, self.head]
        yield self

    def _apply(self, fn, recurse=True):
        """Whatever moves or converts the parameters (`to`, `to_empty`), a tied head stays the embedding itself."""
        super()._apply(fn, recurse)
        if self.config.weight_tying:
            self.head.weight = self.embedding.weight
        return self

    def num_parameters(self) -> int:
        """N: every trainable number, tied ones once, padding rows included."""
        return sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def stream(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        lengths: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        eos_id: int | None = None,
        use_cache: bool = True,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Iterator[Tensor]:
        """Yield the next token of every sequence, (B,) at a time, until each has max_new_tokens after its prompt.

        tokens: prompts (B, T), T ≥ 1, of which `lengths` (B,) count where they are not equally long; the stream then
        begins behind the shortest and gives the longer ones' own tokens first. A context longer than block_size loses
        its oldest tokens. After `eos_id` a sequence only yields eos_id; all of them done ends the stream. temperature 0 is
        greedy. `generator`: one for the batch, or one a sequence, which then draws as if it were alone. In fp32 the
        result does not depend on use_cache (in bf16 rounding differs). For the other knobs see `sample_next`. Raises
        ValueError for an empty prompt and for knobs out of range. The model is in eval mode until the stream ends.
        """
        shortest = tokens.size(1) if lengths is None else int(lengths.min())
        if shortest == 0:
            raise ValueError("the prompt has no tokens; give at least one (a model continues, it cannot start).")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={max_new_tokens} is negative.")
        was_training = self.training
        self.eval()
        try:
            prompts, tokens = tokens, tokens[:, :shortest]
            longest = min(self.config.block_size, prompts.size(1) + max_new_tokens)
            dtype = self.compute_dtype or self.embedding.weight.dtype
            cache = (
                KVCache(self.config, tokens.size(0), longest, dtype, tokens.device) if use_cache and shortest <= longest else None
            )
            finished = torch.zeros(tokens.size(0), dtype=torch.bool, device=tokens.device)
            for place in range(shortest, prompts.size(1) + max_new_tokens):
                if place > self.config.block_size:
                    cache = None  # the window slides, so every position changes: nothing cached stays true
                context = tokens[:, -self.config.block_size :] if cache is None else tokens[:, cache.length :]
                logits = self(context, cache, last_only=True)[:, -1].float()
                given = finished & False if lengths is None else place < lengths
                knobs = (temperature, top_k, top_p, repetition_penalty)
                if isinstance(generator, Sequence):
                    chosen = torch.cat(
                        [
                            prompts[i : i + 1, place]
                            if given[i]
                            else sample_next(logits[i : i + 1], tokens[i : i + 1], *knobs, own)
                            for i, own in enumerate(generator)
                        ]
                    )
                else:
                    chosen = sample_next(logits, tokens, *knobs, generator)
                    if lengths is not None:
                        chosen = torch.where(given, prompts[:, min(place, prompts.size(1) - 1)], chosen)
                if eos_id is not None:
                    chosen = torch.where(finished, eos_id, chosen)
                    finished |= (chosen == eos_id) & ~given
                yield chosen
                if eos_id is not None and bool(finished.all()):
                    return
                tokens = torch.cat((tokens, chosen[:, None]), dim=1)
        finally:
            self.train(was_training)

    def generate(self, tokens: Tensor, max_new_tokens: int, **options) -> Tensor:
        """Prompt (B, T) → prompt and continuation (B, T + new). Options as for `stream`."""
        new = list(self.stream(tokens, max_new_tokens, **options))
        return torch.cat((tokens, torch.stack(new, dim=1)), dim=1) if new else tokens


def sample_next(
    logits: Tensor,
    seen: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose one token a row: logits (B, V) fp32, the tokens so far (B, T) → (B,).

    repetition_penalty r divides the positive and multiplies the negative logits of the tokens seen (Keskar et al.
    2019); temperature 0 takes the largest; top_k keeps the k largest (and what ties with them); top_p keeps the
    smallest set whose probability reaches p (nucleus sampling, Holtzman et al. 2019). Raises ValueError for a knob out of range.
    """
    problems = [
        sentence
        for wrong, sentence in (
            (not temperature >= 0, f"temperature={temperature} is negative; 0 is greedy."),
            (top_k is not None and top_k < 1, f"top_k={top_k} keeps no token; use at least 1, or None."),
            (top_p is not None and not 0 < top_p <= 1, f"top_p={top_p} is not in (0, 1]."),
            (not repetition_penalty > 0, f"repetition_penalty={repetition_penalty} is not positive; 1 is none."),
        )
        if wrong
    ]
    if problems:
        raise ValueError("\n".join(problems))
    if repetition_penalty != 1.0:
        old = logits.gather(1, seen)
        logits = logits.scatter(1, seen, torch.where(old > 0, old / repetition_penalty, old * repetition_penalty))
    if temperature < 1e-30:  # 0, or too small to divide by
        return logits.argmax(dim=-1)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # largest 0: no overflow however cold
    if top_k is not None and top_k < logits.size(-1):
        smallest_kept = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
    if top_p is not None and top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probability = ordered.softmax(dim=-1)
        beyond = probability.cumsum(dim=-1) - probability >= top_p  # the mass before a token already suffices
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


def build_model(config: ModelConfig, *, seed: int = 1337, device: torch.device | str | None = None) -> Transformer:
    """Assemble the model and give it its initial weights on `device` (default: PyTorch's default device).

    On the meta device it has shapes and no numbers. The global random state is neither read nor changed.
    """
    device = torch.device(device) if device is not None else torch.get_default_device()
    with torch.device("meta"):
        model = Transformer(config)
    if device.type != "meta":
        model.to_empty(device=device)
        initialize(model, seed)
    return model


@torch.no_grad()
def initialize(model: Transformer, seed: int, put: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
    """Set every parameter from its own random stream, seeded by (seed, its name): the same under any sharding.

    The numbers are drawn on the CPU, so they do not depend on the device either. `put(parameter, values)` stores the
    whole parameter's values, or the part of them that this process keeps.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        for local, parameter in module.named_parameters(recurse=False):
            name = names.pop(id(parameter), None)
            if name is None:
                continue  # tied: already set under its first name
            how = module.initial(local)
            if isinstance(how, Normal):
                digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
                generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
                put(parameter, torch.randn(parameter.shape, generator=generator, device="cpu") * how.std)
            else:
                parameter.fill_(how.value)
