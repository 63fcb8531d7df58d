"""Any decoder as a stack of layers: its layers are found, the states between them read, some of them left out.

    decoder = open_decoder("out/quickstart")          # one of this project's, or a Hugging Face folder or name
    states = decoder.states(tokens, [2, 5])           # entering layer 2 and entering layer 5: 5 layers run
    with decoder.without(2, 3):                       # layers 2, 3 and 4 are not there
        logits = decoder.logits(tokens)

The layers are found by what they do, not by their names: they are the modules of the one `nn.ModuleList` that a forward pass
goes through in order, each once. State i is what enters layer i; the last one, state L, is what leaves the last layer, before
the model's final norm. State 0 is what the embedding gives.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from command_line import Failure
from data.tokenization import Tokenizer, load_tokenizer
from model_builder import COMPUTE_DTYPES
from training.checkpoint import find_checkpoint, load_model
from training.huggingface import quiet_transformers
from training.huggingface_files import find_folder, is_folder
from training.manifest import read_state
from training.precision import set_compute_dtype


class _Enough(Exception):
    """Ends a forward pass that has gone as far as was asked for."""


@dataclass
class _Place:
    """Where a list of layers hangs: `getattr(parent, name)` is `layers`."""

    parent: nn.Module
    name: str
    layers: nn.ModuleList


class Decoder:
    """A frozen decoder.

    run: token ids (B, T) → logits (B, T, V), without a KV cache. block_size: the longest sequence that it takes. folder: where
    its weights and tokenizer lie. about: architecture, and of a run its name, step and dataset. Raises Failure where no list
    of layers is found that a forward pass goes through in order.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Callable[[Tensor], Tensor],
        *,
        name: str,
        vocab_size: int,
        block_size: int,
        tokenizer: Tokenizer | None = None,
        folder: Path | None = None,
        about: dict[str, Any] | None = None,
    ):
        self.model, self.run, self.name = model.eval().requires_grad_(False), run, name
        self.vocab_size, self.block_size, self.tokenizer = vocab_size, block_size, tokenizer
        self.folder, self.about = folder, about or {}
        self.place = self._find_layers()

    @property
    def layers(self) -> nn.ModuleList:
        """The layers, first to last; fewer within `without`."""
        return getattr(self.place.parent, self.place.name)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T) → logits (B, T, V)."""
        return self.run(tokens.to(self.device))

    @torch.no_grad()
    def states(self, tokens: Tensor, which: Sequence[int]) -> list[Tensor]:
        """The states (B, T, D) of token ids (B, T): of each index in `which`, what enters that layer, or (L) leaves the last.

        No layer runs beyond those that are needed, nor the final norm and the head.
        """
        layers, found = list(self.layers), {}
        last = max(which)
        if not 0 <= min(which) <= last <= len(layers):
            raise ValueError(f"states {sorted(which)} of a model with {len(layers)} layers, which has 0 to {len(layers)}.")

        def entering(index: int) -> Callable:
            def hook(_, inputs, named):
                found[index] = _first_tensor(inputs, named)
                if index == last:
                    raise _Enough

            return hook

        def leaving(_, __, output):
            found[len(layers)] = _tensor_of(output)
            raise _Enough

        hooks = [layers[i].register_forward_pre_hook(entering(i), with_kwargs=True) for i in set(which) if i < len(layers)]
        if last == len(layers):
            hooks.append(layers[-1].register_forward_hook(leaving))
        try:
            self.run(tokens.to(self.device))
        except _Enough:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return [found[index] for index in which]

    @contextmanager
    def without(self, start: int, n: int) -> Iterator[None]:
        """Leave out layers start … start + n - 1 for as long as the context lasts."""
        kept = [layer for index, layer in enumerate(self.place.layers) if not start <= index < start + n]
        setattr(self.place.parent, self.place.name, nn.ModuleList(kept))
        try:
            yield
        finally:
            setattr(self.place.parent, self.place.name, self.place.layers)

    def _find_layers(self) -> _Place:
        """The list with most parameters among those whose modules run in order, each once, in a forward pass."""
        order: list[int] = []
        places = [
            _Place(parent, name, child)
            for parent in self.model.modules()
            for name, child in parent.named_children()
            if isinstance(child, nn.ModuleList) and len(child) > 0
        ]
        wanted = {id(layer) for place in places for layer in place.layers}
        hooks = [
            module.register_forward_pre_hook(lambda module, _: order.append(id(module)))
            for module in self.model.modules()
            if id(module) in wanted
        ]
        try:
            self.logits(torch.zeros(1, min(4, self.block_size), dtype=torch.long))
        finally:
            for hook in hooks:
                hook.remove()
        in_order = [
            place
            for place in places
            if [one for one in order if one in set(map(id, place.layers))] == list(map(id, place.layers))
        ]
        if not in_order:
            raise Failure(
                f"{self.name} has no list of layers that a forward pass goes through in order, each once, so it is not known "
                "what its layers are; such a model cannot be compressed here."
            )
        return max(in_order, key=lambda place: sum(p.numel() for p in place.layers.parameters()))


def _first_tensor(inputs: Sequence[Any], named: dict[str, Any]) -> Tensor:
    """The state that a layer is called with: its first argument that is a tensor of numbers with fractions."""
    for value in (*inputs, *named.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise Failure("A layer of the model is called without a state; such a model cannot be compressed here.")


def _tensor_of(output: Any) -> Tensor:
    """The state that a layer returns, alone or as the first of several things."""
    return output if isinstance(output, Tensor) else _tensor_of(output[0])


# ------------------------------------------------------------------------------------------- opening


def open_decoder(name: str, device: torch.device | str = "cpu", dtype: str = "float32", best: bool = False) -> Decoder:
    """An out_dir or checkpoint of this project, a Hugging Face folder, or a model's name on the Hub → a Decoder.

    A Hugging Face model runs by transformers' own class, whatever its family. Raises CheckpointError, ConversionError or
    Failure with a sentence.
    """
    path = Path(name).expanduser()
    if path.exists() and not is_folder(path):
        checkpoint = find_checkpoint(path, which="best" if best else "latest", holding="model")
        model, tokenizer = load_model(checkpoint, device)
        set_compute_dtype(model, COMPUTE_DTYPES[dtype])
        config, state = model.config, read_state(checkpoint)
        about = {"architecture": config.name, "step": state.get("step"), "run": state.get("run")}
        about["dataset"] = (state.get("config") or {}).get("dataset")
        return Decoder(
            model,
            model,
            name=name,
            vocab_size=config.vocab_size,
            block_size=config.block_size,
            tokenizer=tokenizer,
            folder=checkpoint,
            about=about,
        )
    if best:
        raise Failure(f"The best checkpoint can only be asked of an out_dir, and {name} is none.")
    return _open_huggingface(find_folder(name), name, device, COMPUTE_DTYPES[dtype])


def _open_huggingface(folder: Path, name: str, device: torch.device | str, dtype: torch.dtype) -> Decoder:
    try:
        import transformers
    except ImportError as error:
        raise Failure(f"{name} is a Hugging Face model, which needs transformers: pip install transformers.") from error
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    try:
        with quiet_transformers():
            model, said = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # of a hundred kinds, from a damaged file to an unknown family
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise Failure(f"{name} cannot be read as a causal language model by transformers: {reason}.") from error
    if missing := sorted(said.get("missing_keys", ())):
        raise Failure(
            f"{name} has no weights for {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}: they would be random "
            "numbers. Fetch the folder again, or export it again."
        )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return Decoder(
        model.to(device),
        lambda tokens: model(input_ids=tokens, use_cache=False).logits,
        name=name,
        vocab_size=model.get_input_embeddings().num_embeddings,
        block_size=longest or 2**30,
        tokenizer=load_tokenizer(folder),
        folder=folder,
        about={"architecture": type(model).__name__, "step": None, "run": None, "dataset": None},
    )
