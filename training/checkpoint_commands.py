"""python -m training.checkpoint: look into a checkpoint, or take the model out of it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from command_line import Parser, guarded, labelled, printable, text_table
from data.files import staged
from training.checkpoint import CheckpointStore, find_checkpoint, stored_tensors
from training.manifest import (
    FORMAT_VERSION,
    CheckpointError,
    as_json,
    listed_files,
    read_state,
    tensor_entry,
    tokenizer_files,
    verify,
    write_bytes,
    write_manifest,
)
from training.shards import kind_of
from training.tensor_files import NAMES, write_tensors


def main(argv: list[str]) -> int:
    """inspect DIR | consolidate DIR OUT; returns the exit code."""

    def job() -> int:
        parser = Parser(prog="python -m training.checkpoint", description=__doc__)
        commands = parser.add_subparsers(dest="command", required=True)
        look = commands.add_parser("inspect", help="what is in a checkpoint, and whether it is intact")
        look.add_argument("path", help="a checkpoint folder, or an out_dir (its latest)")
        look.add_argument("--tensors", action="store_true", help="list every tensor too")
        take = commands.add_parser("consolidate", help="the model alone, in one safetensors file, as a checkpoint folder")
        take.add_argument("path", help="a checkpoint folder, or an out_dir (its latest)")
        take.add_argument("out", help="the folder to make")
        for command in (look, take):
            command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        given = parser.parse_args(argv)
        if given.command == "inspect":
            return inspect(given.path, given.tensors)
        print(consolidate(given.path, given.out))
        return 0

    return guarded("training.checkpoint", argv, job)


def inspect(path: str, list_tensors: bool = False) -> int:
    """Print what is in a checkpoint; 1 if it is damaged, else 0. Raises CheckpointError where there is none."""
    folder = Path(path).expanduser()
    if not (folder / "manifest.json").is_file():
        store = CheckpointStore(folder.parent if folder.name == "checkpoints" else folder)
        found = store.pointed("latest") or (store.all() or [None])[-1]
        if found is None:
            find_checkpoint(folder)  # says why there is none
        folder = found
    state, files = read_state(folder), listed_files(folder)
    try:
        verify(folder)
        damage = None
    except CheckpointError as error:
        damage = str(error)
    tensors = stored_tensors(folder) if damage is None else None
    kinds: dict[str, list[int]] = {}
    for name, parts in tensors.parts.items() if tensors else ():
        kinds.setdefault(kind_of(name), []).append(sum(part.bytes for part in parts))
    config, model, progress = state.get("config", {}), state["model"], state.get("progress") or {}
    rows = [
        ("checkpoint", folder),
        ("intact", damage or "yes, every file has its size and checksum"),
        ("model", f"{model.get('name')}   (fingerprint {model.get('fingerprint')})"),
        ("step", state["step"]),
        ("tokens", f"{progress['tokens']:,}" if "tokens" in progress else "unknown"),
        (
            "loss",
            f"validation {progress.get('val_loss')}, best {progress.get('best_val_loss')} at step {progress.get('best_step')}",
        ),
        (
            "saved by",
            f"{state.get('world_size', 1)} process(es), parallelism "
            f"{state.get('parallelism') or config.get('parallelism')}, {state.get('dtype')}, "
            f"{state.get('threads')} thread(s)",
        ),
        (
            "dataset",
            f"{(state.get('dataset') or {}).get('name')}   (fingerprint {(state.get('dataset') or {}).get('fingerprint')})",
        ),
        ("versions", ", ".join(f"{k} {v}" for k, v in (state.get("versions") or {}).items() if v is not None)),
        ("files", f"{len(files)}, {sum(f['bytes'] for f in files.values()) / 1e6:,.1f} MB"),
    ]
    rows += [(kind, f"{len(sizes)} tensors, {sum(sizes) / 1e6:,.1f} MB") for kind, sizes in kinds.items()]
    print(printable(labelled(rows)))
    if list_tensors and tensors:
        listed = [
            (name, NAMES[tensors.dtype(name)], "×".join(map(str, tensors.shape(name))) or "scalar", len(parts))
            for name, parts in sorted(tensors.parts.items())
        ]
        print("\n" + printable(text_table(("tensor", "dtype", "shape", "parts"), listed, "lllr")))
    if damage:
        print(printable(damage), file=sys.stderr)
    return 1 if damage else 0


def consolidate(path: str, out: str) -> Path:
    """A checkpoint's model in one `model.safetensors`, tensor after tensor; a folder for sample.py and convert.py.

    Memory for one tensor is enough. Raises CheckpointError, or UsageError if `out` exists and is not empty.
    """
    source, target = find_checkpoint(path, holding="model"), Path(out).expanduser()
    state = read_state(source)
    stored = stored_tensors(source, {"model"})
    shapes = {
        name: torch.empty(stored.shape(name), dtype=stored.dtype(name), device="meta")
        for name in stored.parts
        if kind_of(name) == "model"
    }

    def fetch(name: str) -> torch.Tensor:
        tensor = torch.empty_like(shapes[name], device="cpu")
        stored.load({name: tensor})
        return tensor

    about = ("step", "model", "config", "origins", "dataset", "versions", "run", "source", "dtype")
    document = {"format_version": FORMAT_VERSION, **{key: state[key] for key in about if key in state}}
    with staged(target, last="manifest.json") as folder:
        try:
            written = write_tensors(folder / "model.safetensors", shapes, metadata={"format": "pt"}, fetch=fetch)
        except ValueError as error:
            raise CheckpointError(f"Checkpoint {source} cannot be read: {error}.") from error
        files = {
            "model.safetensors": tensor_entry(written, shapes),
            "state.json": write_bytes(folder / "state.json", as_json(document)),
            **{file.name: write_bytes(folder / file.name, file.read_bytes()) for file in tokenizer_files(source)},
        }
        write_manifest(folder, files, number=1)
    return target
