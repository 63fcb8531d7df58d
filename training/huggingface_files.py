"""Hugging Face's folders: finding them, and reading their tensor files one tensor at a time.

What is read is what `from_pretrained` would read: model.safetensors, else the files that model.safetensors.index.json
names. Every tensor in them has to have a place in the model. Pickles are never opened.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from command_line import Mandatory, check_shape, parse_json
from model_config import ModelConfig
from training.huggingface import config_from_hf, tensor_rules
from training.huggingface_families import FAMILIES
from training.huggingface_parts import ConversionError, Rule

_SINGLE, _INDEX, _HEAD = "model.safetensors", "model.safetensors.index.json", "lm_head.weight"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_PIECE_BYTES = 64 << 20  # of what is compared at a time


class TensorOnDisk(NamedTuple):
    """Where a tensor lies, its dtype as safetensors names it, and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


# ------------------------------------------------------------------------------------------- folders


def is_folder(path: str | Path) -> bool:
    """Whether this is a folder as save_pretrained writes it (config.json with a model_type)."""
    try:
        return "model_type" in parse_json((Path(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def find_folder(name: str) -> Path:
    """A local folder, or a name on the Hub (downloaded, or taken from Hugging Face's cache) → the folder.

    Raises ConversionError with the reason and the alternatives where the name is gated, unknown or out of reach.
    """
    path = Path(name).expanduser()
    if is_folder(path):
        return path
    if path.exists():
        raise ConversionError(f"{path} is no Hugging Face model folder: it has no config.json with a model_type.")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ConversionError(f"There is no folder {name!r}, and it cannot be a name on the Hugging Face Hub (owner/model).")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=["*.json", "model*.safetensors", "tokenizer*", "*.txt", "*.jinja"]))
    except ImportError as error:
        raise ConversionError(
            f"{name!r} is not a local folder, and fetching it from the Hub needs huggingface_hub: pip install huggingface_hub."
        ) from error
    except Exception as error:  # the hub has a dozen kinds of them, none with a common base
        reason = str(error).strip().split("\n")[0].rstrip(".")
        gated = "gated" in type(error).__name__.lower() or "gated" in reason.lower() or "401" in reason or "403" in reason
        advice = (
            "It is gated: accept its licence on the Hub and log in (`hf auth login`), or use an open model such as "
            "openai-community/gpt2 or Qwen/Qwen3-0.6B"
            if gated
            else "Check the name and the network, or download it elsewhere and give the folder"
        )
        raise ConversionError(
            f"{name!r} could not be fetched from the Hugging Face Hub ({type(error).__name__}: {reason}). {advice}."
        ) from error


def read_config(folder: Path) -> ModelConfig:
    """The model in a folder: what its config.json describes, with a head of its own where one is stored.

    config.json may say that the head shares the embedding's weights where the files hold another head; transformers then
    uses that one. Raises ConversionError.
    """
    config = config_from_hf(_read_json(folder / "config.json"))
    if config.weight_tying and _has_another_head(folder, config):
        return dataclasses.replace(config, weight_tying=False)
    return config


def source_of(folder: Path, name: str) -> dict[str, Any]:
    """What a checkpoint remembers of the folder that its model came from, for an export to say it again.

    `config` and `generation`: its two json files. `dtype`: what most of its tensors are stored in; `dtypes`: the others, by
    Hugging Face's names. `tokenizer`: the fingerprint of its tokenizer, or None.
    """
    hf = _read_json(folder / "config.json")
    stored = {rule.theirs: _DTYPES[tensor.dtype] for rule, _, tensor in _places(folder, read_config(folder))}
    usual = Counter(stored.values()).most_common(1)[0][0]
    said = folder / "generation_config.json"
    generation = _read_json(said) if said.is_file() else None
    return dict(
        huggingface=name,
        config=hf,
        generation=generation,
        dtype=usual,
        dtypes={theirs: dtype for theirs, dtype in stored.items() if dtype != usual},
        ids={key: hf[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in hf},
        tokenizer=_tokenizer_fingerprint(folder),
    )


def _tokenizer_fingerprint(folder: Path) -> str | None:
    from data.tokenization import load_tokenizer

    try:
        tokenizer = load_tokenizer(folder)
    except ValueError as error:
        raise ConversionError(f"{error} Take the file away to use the model without its tokenizer.") from error
    return None if tokenizer is None else tokenizer.fingerprint


def stored_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """kitbash's name of each parameter → the dtype in which a folder has it. Raises ConversionError."""
    return {
        name: getattr(torch, _DTYPES[tensor.dtype])
        for rule, _, tensor in _places(folder, read_config(folder))
        for name in rule.ours
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        check_shape(content, Mandatory(dict))
        return content
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read ({error}); fetch it again.") from error


# ------------------------------------------------------------------------------------------- tensors


def read_tensors(folder: Path, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The folder's weights, one kitbash tensor at a time, in the dtype they are stored in.

    Each file is opened anew for each tensor, so that no more than one is ever in memory. Raises ConversionError, before
    anything is read, for a missing file, a missing or unread tensor, a shape or a dtype that the model does not have.
    """
    for rule, name, stored in _places(folder, config):
        yield from rule.to_ours(_tensor(stored.file, name)).items()


@torch.no_grad()
def load_weights(
    model: torch.nn.Module, folder: Path, put: Callable[[torch.Tensor, torch.Tensor], object] = torch.Tensor.copy_
) -> None:
    """Fill a model with a folder's weights, tensor by tensor. Raises ConversionError.

    `put(parameter, values)` stores the whole parameter's values, or the part of them that this process keeps.
    """
    parameters = dict(model.named_parameters())
    for name, tensor in read_tensors(folder, model.config):
        parameter = parameters[name]
        if tensor.size(0) < parameter.size(0):  # a padded vocabulary has more rows here, which stay as they are
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.clone()
            tensor = torch.cat((tensor.to(whole), whole[tensor.size(0) :]))
        put(parameter, tensor.to(parameter.dtype))


def tensors_on_disk(folder: Path) -> dict[str, TensorOnDisk]:
    """Every tensor that from_pretrained would find in a folder, from the files' headers. Raises ConversionError."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, TensorOnDisk] = {}
    for path in _tensor_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    if name in found:
                        raise ConversionError(f"{name} is in {found[name].file} and in {path}; which of the two counts?")
                    piece = file.get_slice(name)
                    found[name] = TensorOnDisk(path, piece.get_dtype(), tuple(piece.get_shape()))
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{path} cannot be read: it is damaged or not whole ({error}); fetch it again.") from error
    return found


def _tensor_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: the single one, else those of the index, else a complete set of shards."""
    if (folder / "adapter_config.json").is_file():
        raise ConversionError(f"{folder} holds an adapter (LoRA); merge it into its model first, with peft's merge_and_unload.")
    if (folder / _SINGLE).is_file():  # an index beside it is left over: transformers does not look at it either
        return [folder / _SINGLE]
    if (folder / _INDEX).is_file():
        names = _read_json(folder / _INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ConversionError(f"{folder / _INDEX} has no weight_map of tensor names and files; fetch it again.")
        names = sorted(set(names.values()))
        outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
        if outside:
            raise ConversionError(f"{folder / _INDEX} names {outside[0]!r}, which is not inside of the folder.")
    else:
        shards = [re.fullmatch(r"model-\d+-of-(\d+)\.safetensors", path.name) for path in sorted(folder.glob("model-*"))]
        counts = {int(shard[1]) for shard in shards if shard}
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for count in counts for i in range(count)]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ConversionError(f"{folder} lacks {', '.join(missing[:3])}{' …' * (len(missing) > 3)}; fetch the model again.")
    if not names:
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        raise ConversionError(
            f"{folder} has its weights in {pickles[0]} only, a pickle, which runs what is written in it when it is read; have "
            "transformers read and save it in a place you trust (save_pretrained writes safetensors)."
            if pickles
            else f"{folder} has no {_SINGLE} and no {_INDEX}; fetch the model again, in the safetensors format."
        )
    return [folder / name for name in names]


def _places(folder: Path, config: ModelConfig) -> list[tuple[Rule, str, TensorOnDisk]]:
    """For each tensor of the model: its rule, the name under which it is stored, and where.

    Raises ConversionError where they do not fit: all that is missing or left over is named.
    """
    model_type = _read_json(folder / "config.json")["model_type"]
    family, stored, shapes = FAMILIES[model_type], tensors_on_disk(folder), _shapes(config)
    places, missing = [], []
    for rule in tensor_rules(config, model_type):
        # A base model, without its head, is stored without the prefix; of tied tables either one may be there.
        names = [rule.theirs, rule.theirs.removeprefix(family.prefix)]
        names += [_HEAD] if config.weight_tying and rule.ours == ("embedding.weight",) else []
        name = next((name for name in names if name in stored), None)
        if name is None:
            missing.append(rule.theirs)
        else:
            places.append((rule, name, stored[name]))
    read = {name for _, name, _ in places} | ({_HEAD} if config.weight_tying else set())
    unread = [name for name in stored if name not in read and not re.search(family.dropped, name)]
    problems = []
    if missing:
        problems.append(f"has no tensor {_some(missing)}, which {model_type} needs")
    if unread:
        problems.append(f"has {_some(unread)}, which {model_type} with this config.json has no place for")
    if problems:
        raise ConversionError(f"{folder} {', and '.join(problems)}: the weights are of another model, or quantised.")
    for rule, name, tensor in places:
        rows = rule.skipped + sum(shapes[ours][0] for ours in rule.ours)
        expected = (rows, *shapes[rule.ours[0]][1:])
        if tensor.shape != (expected[::-1] if rule.transposed else expected):
            raise ConversionError(
                f"{tensor.file}: {name} has shape {tensor.shape}, but config.json asks "
                f"for {expected[::-1] if rule.transposed else expected}."
            )
        if tensor.dtype not in _DTYPES:
            raise ConversionError(
                f"{tensor.file}: {name} is stored as {tensor.dtype}, i.e. quantised, which cannot be read here; use the model "
                "as it was before quantisation."
            )
    return places


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape, without the rows that only pad the vocabulary."""
    from model_builder import build_model

    shapes = {name: tuple(p.shape) for name, p in build_model(config, device="meta").named_parameters()}
    return {
        name: (config.vocab_size, *shape[1:]) if name in ("embedding.weight", "head.weight") else shape
        for name, shape in shapes.items()
    }


def _tensor(path: Path, name: str, rows: slice = slice(None)) -> Tensor:
    """A stored tensor, or some of its rows."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.get_slice(name)[rows]
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path} cannot be read ({error}); fetch it again.") from error


def _has_another_head(folder: Path, config: ModelConfig) -> bool:
    """Whether the files hold a head besides the embedding's table, with other values."""
    stored, model_type = tensors_on_disk(folder), _read_json(folder / "config.json")["model_type"]
    table = next(rule.theirs for rule in tensor_rules(config, model_type) if rule.ours == ("embedding.weight",))
    table = table if table in stored else table.removeprefix(FAMILIES[model_type].prefix)
    if table not in stored or _HEAD not in stored:
        return False
    one, other = stored[table], stored[_HEAD]
    if one.shape != other.shape or len(one.shape) != 2:
        return True
    rows = max(1, _PIECE_BYTES // (4 * one.shape[1]))
    return not all(
        torch.equal(*(_tensor(place.file, name, piece).float() for name, place in ((table, one), (_HEAD, other))))
        for piece in (slice(start, start + rows) for start in range(0, one.shape[0], rows))
    )
