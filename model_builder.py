"""ModelConfig → Transformer: the model itself, its initial weights, and generation.

from model_config import resolve
from model_builder import build_model
model = build_model(resolve("llama", n_layer=2, vocab_size=256))
logits = model(tokens)                                     # (B, T) → (B, T, vocab_size)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from model_components import Attention, Constant, Context, Embedding, FirstValue, KVCache, Linear, Normal, build
from model_config import ModelConfig, Part, component
from model_parts.registry import renamed

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Transformer(nn.Module):
    """A decoder-only language model assembled from the components that its config names.

    `compute_dtype` (None: the parameters' own) is the dtype of the residual stream; parameters stay as they are stored
    and are cast where they are used (training/precision.py sets it).
    """

    FRONT = ("embedding", "position", "embedding_norm", "dropout")  # the modules before the blocks,
    TAIL = ("norm", "head")  # and those after them

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

    def forward(
        self, tokens: Tensor, cache: KVCache | None = None, last_only: bool = False, documents: Tensor | None = None
    ) -> Tensor:
        """Token ids (B, T) → logits (B, T, vocab_size) in the compute dtype; padded rows are cut off.

        With a cache, the tokens continue those whose keys it holds. `last_only` gives the logits of the last position
        alone, (B, 1, vocab_size). `documents` (B, T), rising: tokens with the same number are a document, whose logits are
        those of the document alone. Raises ValueError beyond block_size, and for documents with a cache.
        """
        x, context = self.front(tokens, cache, documents)
        for block in self.blocks:
            x = block(x, context)
        if cache is not None:
            cache.length += tokens.size(1)
        return self.tail(x, last_only)

    def front(self, tokens: Tensor, cache: KVCache | None = None, documents: Tensor | None = None) -> tuple[Tensor, Context]:
        """What comes before the blocks: token ids (B, T) → the residual stream (B, T, D) and what the blocks share.

        Raises ValueError where tokens and cache together are longer than block_size.
        """
        start, T = cache.length if cache is not None else 0, tokens.size(1)
        if start + T > self.config.block_size:
            raise ValueError(f"a sequence of {start + T} tokens is longer than block_size={self.config.block_size}.")
        positions = torch.arange(start, start + T, device=tokens.device)
        if documents is not None:
            if cache is not None:
                raise ValueError("documents packed into a sequence cannot go on from a cache.")
            positions = positions_in(documents)
        x = self.embed(tokens, positions)
        return x, self.context(positions, x.dtype, cache, documents)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Token ids (B, T) at positions (T,) or (B, T) → the residual stream before the first block, (B, T, D) in the compute
        dtype."""
        x = self.embedding(tokens)
        x = x.to(self.compute_dtype or x.dtype)
        if self.config.embedding_scale:
            x = x * self.config.n_embd**0.5
        return self.dropout(self.embedding_norm(self.position.embed(x, positions)))

    def context(
        self, positions: Tensor, dtype: torch.dtype, cache: KVCache | None = None, documents: Tensor | None = None
    ) -> Context:
        """What the blocks share at these positions (T,) or (B, T), the masks of all their windows included."""
        context = Context(self.config, self.position, positions, dtype, cache, documents)
        for window in self.windows:  # here, so that a compiled block finds its mask made
            context.mask(window)
        return context

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

    def to_empty(self, *, device: torch.device | str, recurse: bool = True) -> Transformer:
        """Memory on a device for every parameter and buffer; buffers get their values, so that none is ever left without."""
        super().to_empty(device=device, recurse=recurse)
        with torch.no_grad():
            for _, buffer, how in _starts(self, nn.Module.named_buffers):
                if not isinstance(how, Normal):
                    _put_whole(buffer, how)
        return self

    def saved_buffers(self) -> dict[str, Tensor]:
        """The buffers that belong into a checkpoint (register_buffer's `persistent`), by name."""
        return {
            f"{path}.{name}": buffer
            for path, module in self.named_modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
        }

    @staticmethod
    def parts(config: ModelConfig) -> list[Part]:
        """What every part of the model costs, in the order of the data; names are paths ('blocks.3.q_proj').

        A tied head has no parameters of its own but is multiplied all the same; an embedding is looked up, not multiplied.
        """
        table = config.padded_vocab_size * config.n_embd
        norm = component("normalization", config.normalization).build.parts(config, config.n_embd)
        found = [Part("embedding", parameters=table)]
        found += component("position_encoding", config.position_encoding).build.parts(config)
        found += renamed(norm, "embedding_") if config.embedding_norm else []
        for layer, block in enumerate(config.layer_pattern):
            found += renamed(component("block", block).build.parts(config), f"blocks.{layer}.")
        found += renamed(norm, "final_")
        return found + [Part("head", parameters=0 if config.weight_tying else table, matmul=table)]

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


def positions_in(documents: Tensor) -> Tensor:
    """Numbers of documents (B, T), rising along T → how far each token stands from the start of its document, (B, T)."""
    places = torch.arange(documents.size(1), device=documents.device).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return places - torch.where(begins, places, 0).cummax(dim=1).values


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
    if problems := list(_without_a_start(model)):
        raise ValueError("\n".join(problems))
    if device.type != "meta":
        model.to_empty(device=device)
        initialize(model, seed)
    return model


def one_of_each_block(config: ModelConfig) -> ModelConfig:
    """The config of a model with the same front and tail and one layer of each block: enough to see what each of them does."""
    blocks = tuple(dict.fromkeys(config.layer_pattern))
    return replace(config, n_layer=len(blocks), layer_pattern=blocks)


@torch.no_grad()
def initialize(
    model: Transformer,
    seed: int,
    put: Callable[[Tensor, Tensor], object] = Tensor.copy_,
    but: Collection[str] = frozenset(),
) -> None:
    """Set every parameter as its module's `initial(name)` says, random ones from a stream of their own.

    The stream is seeded by (seed, name) and drawn on the CPU, so the numbers do not depend on sharding, device or the rest of
    the model. `put(parameter, values)` stores the whole parameter's values, or the part of them that this process keeps.
    Buffers that start at random are set too; the others have been since `to_empty`. `but`: names of parameters and buffers
    that somebody else fills.
    """

    def drawn(name: str, shape: torch.Size, std: float) -> Tensor:
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randn(shape, generator=generator, device="cpu") * std

    for name, parameter, how in _starts(model, nn.Module.named_parameters):
        if name in but:
            continue
        if isinstance(how, Normal):
            put(parameter, drawn(name, parameter.shape, how.std))
        elif isinstance(how, Constant):
            parameter.fill_(how.value)
        else:
            put(parameter, how)
    for name, buffer, how in _starts(model, nn.Module.named_buffers):
        if isinstance(how, Normal) and name not in but:
            buffer.copy_(drawn(name, buffer.shape, how.std))


def _put_whole(tensor: Tensor, how: Constant | Tensor) -> None:
    if isinstance(how, Constant):
        tensor.fill_(how.value)
    else:
        tensor.copy_(how)


def _starts(model: nn.Module, named: Callable[..., Iterator[tuple[str, Tensor]]]) -> Iterator[tuple[str, Tensor, FirstValue]]:
    """(name, tensor, how it starts) of every parameter or every buffer, tied ones once, under their first name."""
    seen = set()
    for path, module in model.named_modules():
        for name, tensor in named(module, recurse=False):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{path}.{name}".lstrip("."), tensor, module.initial(name)


def _without_a_start(model: nn.Module) -> Iterator[str]:
    """A sentence for each parameter and buffer that could not be given its first value, or could not be sharded."""
    for path, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        for name, tensor in (parameters | dict(module.named_buffers(recurse=False))).items():
            what = f"{'the parameter' if name in parameters else 'the buffer'} {path}.{name} of {type(module).__name__}"
            try:
                how = module.initial(name)
            except Exception as error:
                yield (
                    f"{what} has no first value ({type(error).__name__}: {error}). A model is made without numbers, so its "
                    f"module needs a method initial(name) that returns Normal(std), Constant(value) or a tensor for {name!r}; "
                    "model_components.Linear and Embedding bring theirs."
                )
                continue
            if not isinstance(how, (Normal, Constant, Tensor)):
                yield f"{what}: initial({name!r}) returned {how!r}; it has to be Normal(std), Constant(value) or a tensor."
            elif isinstance(how, Tensor) and how.shape != tensor.shape:
                yield f"{what} has the shape {tuple(tensor.shape)}, but initial({name!r}) returned {tuple(how.shape)}."
            elif name not in parameters and isinstance(how, Normal) and name in module._non_persistent_buffers_set:
                yield f"{what} would start at random and not be saved, so a checkpoint could not be loaded; make it persistent."
            if name in parameters and not tensor.ndim:
                yield f"{what} has no dimension, and such a one cannot be sharded; give it the shape (1,)."
