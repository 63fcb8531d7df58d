"""A model between kitbash and Hugging Face, in whichever direction the source says.

    python convert.py FOLDER_or_HUB_NAME out/qwen          # save_pretrained's folder → a checkpoint below out/qwen
    python convert.py out/qwen exported                    # an out_dir or checkpoint → a folder for from_pretrained
    python convert.py out/qwen exported --dtype=bfloat16 --push=owner/name

Tensor by tensor: never more than a fraction of the model is in memory. An export ends with a check in a fresh process:
transformers reads the folder, and a random batch through both models gives the largest difference of a logit. Nothing is
uploaded unless --push is given, and then into a private repository unless --public is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import Parser, UsageError, guarded

if TYPE_CHECKING:
    from data.tokenization import Tokenizer

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SHARD_BYTES = 512 << 20  # of the files written; transformers takes any size


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="convert.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", help="a Hugging Face folder or Hub name, or a kitbash out_dir or checkpoint")
    parser.add_argument("target", help="an out_dir for the checkpoint, or a new folder for Hugging Face's files")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of all exported weights (default: each in the dtype it was imported in, else float32)",
    )
    parser.add_argument("--no_check", dest="check", action="store_false", help="do not check the exported folder")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the exported folder to the Hub, privately")
    parser.add_argument("--public", action="store_true", help="with --push: into a repository that everyone can see")
    parser.add_argument("--debug", action="store_true", help="errors with their traceback")
    return parser


# ------------------------------------------------------------------------------------------- from Hugging Face


def import_model(source: str, out_dir: Path) -> Path:
    """A Hugging Face folder or Hub name → a checkpoint of step 0 below out_dir; returns its folder."""
    from configurator import Configuration
    from data.files import remove_empty
    from training.checkpoint import CheckpointStore
    from training.huggingface_files import find_folder, read_config, read_tensors, source_of
    from training.train_config import KEYS, TrainConfig
    from training_logger import versions

    folder = find_folder(source)
    config = read_config(folder)
    store = CheckpointStore(out_dir)
    if store.all():
        raise UsageError(f"{out_dir} holds the checkpoints of another run; choose a new folder.")
    made = [path for path in (store.folder, *store.folder.absolute().parents) if not path.exists()]
    tensors = ((f"model.{name}", tensor.float()) for name, tensor in _with_progress(read_tensors(folder, config), "reading"))
    values, _ = Configuration(TrainConfig(), dict.fromkeys(KEYS, "default")).resolved(config)
    values.update(config.to_dict(), arch_preset="custom")
    state = dict(
        config=values,
        origins=dict.fromkeys(values, "imported"),
        run=None,
        versions=versions(),
        dataset=None,
        model=dict(name=config.name, fingerprint=config.fingerprint, config=config.to_dict()),
        source=source_of(folder, source),
    )
    try:
        return store.save(0, tensors, state, keep_last=1, tokenizer_folder=folder)
    except BaseException:
        remove_empty(made)
        raise


# ------------------------------------------------------------------------------------------- to Hugging Face


def export_model(source: str, target: Path, dtype: str | None) -> Path:
    """A checkpoint → a folder as save_pretrained writes it; returns the checkpoint.

    The folder has sharded safetensors, config.json, generation_config.json and the tokenizer. `dtype`: of all tensors;
    None keeps the dtype in which each was imported, float32 where it was not.
    """
    from data.files import staged

    with staged(target, last="config.json") as folder:
        return _export(source, folder, dtype)


def _export(source: str, target: Path, dtype: str | None) -> Path:
    """Write what `export_model` exports into an empty folder."""
    import torch

    from data.tokenization import load_tokenizer
    from model_builder import build_model
    from training.checkpoint import find_checkpoint, load_tensors, model_of, read_state, tokenizer_files
    from training.huggingface import config_to_hf, tensor_rules
    from training.huggingface_parts import ConversionError

    checkpoint = find_checkpoint(source)
    state = read_state(checkpoint)
    config = model_of(checkpoint, state)
    origin = state.get("source") or {}
    hf = config_to_hf(config, origin.get("config"))
    usual, others = (dtype, {}) if dtype else (origin.get("dtype", "float32"), origin.get("dtypes", {}))
    shapes = {name: tuple(p.shape) for name, p in build_model(config, device="meta").named_parameters()}

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for rule in _with_progress(tensor_rules(config, hf["model_type"]), "writing"):
            ours = {f"model.{name}": torch.empty(shapes[name]) for name in rule.ours}
            load_tensors(checkpoint, ours)
            table = rule.ours[0] in ("embedding.weight", "head.weight")  # rows that only pad stay here
            whole = rule.to_theirs(
                {name.removeprefix("model."): t[: config.vocab_size] if table else t for name, t in ours.items()}
            )
            rounded = whole.to(getattr(torch, others.get(rule.theirs, usual)))
            if whole.isfinite().all() and not rounded.isfinite().all():
                raise ConversionError(f"{rule.theirs} has numbers beyond the range of {rounded.dtype}; use --dtype=bfloat16.")
            yield rule.theirs, rounded

    write_sharded(target, tensors())
    tokenizer = load_tokenizer(checkpoint)
    ids, generation = special_tokens(state, tokenizer)
    if hf["model_type"] != (origin.get("config") or {}).get("model_type"):  # else what it leaves out stays the class's
        hf = {**dict.fromkeys(SPECIAL_IDS), **hf, "dtype": usual, "torch_dtype": usual}
    if dtype:
        hf = {**hf, "dtype": dtype, "torch_dtype": dtype}
    for name, content in (("config.json", {**hf, **ids}), ("generation_config.json", generation)):
        (target / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None and tokenizer.kind in ("bpe", "hf"):
        for file in tokenizer_files(checkpoint):
            shutil.copyfile(file, target / file.name)
    elif tokenizer is not None and tokenizer.kind in ("gpt2", "tiktoken"):
        tokenizer.save(target)
    elif tokenizer is not None:
        print(
            f"convert.py: the {tokenizer.kind} tokenizer has no form that Hugging Face reads; the folder has none.",
            file=sys.stderr,
        )
    return checkpoint


def special_tokens(state: dict[str, Any], tokenizer: Tokenizer | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """A checkpoint's state → what config.json says of special ids, and generation_config.json.

    Those of the folder that the model came from, as long as it still has that folder's tokenizer; else its own tokenizer's.
    """
    source = state.get("source") or {}
    ids = source.get("ids")
    if ids is not None and tokenizer is not None:
        if "tokenizer" in source:
            same = source["tokenizer"] == tokenizer.fingerprint
        else:  # written before the fingerprint was remembered
            ends = ids.get("eos_token_id")
            same = state.get("dataset") is None or tokenizer.eos_id in (ends if isinstance(ends, list) else [ends])
        ids = ids if same else None
    generation = source.get("generation") if ids is not None else None
    if ids is None:
        eos, bos = (tokenizer.eos_id, tokenizer.bos_id) if tokenizer is not None else (None, None)
        ids = dict(bos_token_id=eos if bos is None else bos, eos_token_id=eos, pad_token_id=None)
    return ids, generation or {key: ids.get(key) for key in SPECIAL_IDS[:2]}


def write_sharded(folder: Path, tensors: Iterator) -> None:
    """(name, tensor) pairs → model.safetensors, or model-0000i-of-0000n.safetensors and their index."""
    from training.checkpoint import write_streamed

    files, total = write_streamed(folder, tensors, SHARD_BYTES, metadata={"format": "pt"})
    count, weight_map = len(files), {}
    for number, (path, names) in enumerate(files, start=1):
        name = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        path.rename(folder / name)
        weight_map.update(dict.fromkeys(names, name))
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def push(folder: Path, name: str, public: bool) -> None:
    """Upload an exported folder to the Hub, into a private repository unless `public`.

    Raises ConversionError with the reason if that fails, and where the repository is there and public without being asked.
    """
    from training.huggingface_parts import ConversionError

    try:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(name, private=not public, exist_ok=True)
        visible = not api.model_info(name).private
        if public or not visible:
            api.upload_folder(repo_id=name, folder_path=str(folder))
    except Exception as error:  # the hub has a dozen kinds of them, none with a common base
        reason = str(error).strip().split("\n")[0]
        raise ConversionError(
            f"{folder} is written, but could not be uploaded to {name!r} ({type(error).__name__}: "
            f"{reason}). Log in with `hf auth login` and upload the folder."
        ) from error
    if visible and not public:
        raise ConversionError(
            f"{folder} is written, but not uploaded: {name!r} is a public repository. Give --public if everyone may see it, or "
            "another name."
        )


def _with_progress(items, label: str):
    """The items, with a bar on a terminal."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        return tqdm(items, desc=label, unit="tensor", leave=False)
    return items


def main(argv: list[str]) -> int:
    """Convert in the direction that the source says; returns the exit code."""

    def job() -> int:
        options = make_parser().parse_args(argv)
        from training.checkpoint import is_checkpoint

        target = Path(options.target).expanduser()
        if options.public and not options.push:
            raise UsageError("--public says how --push uploads, which is not given.")
        if is_checkpoint(options.source):
            checkpoint = export_model(options.source, target, options.dtype)
            if options.check:
                from training.huggingface_check import check_export

                print(f"checked with {check_export(checkpoint, target)}")
            if options.push:
                push(target, options.push, options.public)
            print(
                f"{target}: read it with AutoModelForCausalLM.from_pretrained({str(target)!r})"
                + (f"; uploaded to {options.push}" if options.push else "")
            )
            return 0
        if options.dtype or options.push or not options.check:
            raise UsageError("--dtype, --no_check and --push are for an export, but the source is not a kitbash checkpoint.")
        checkpoint = import_model(options.source, target)
        print(f"{checkpoint}: sample it with python sample.py {target}, train on from it with --init_from=weights:{target}")
        return 0

    return guarded("convert.py", argv, job)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
