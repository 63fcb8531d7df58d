"""python -m training.checkpoint: look into a checkpoint, or take the model out of it."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch

from command_line import Parser, UsageError, guarded, labelled, text_table
from training.checkpoint import (
    FORMAT_VERSION,
    CheckpointError,
    CheckpointStore,
    _entry,
    _write_json,
    find_checkpoint,
    kind_of,
    listed_files,
    load_tensors,
    read_state,
    tokenizer_files,
    verify,
)

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # as safetensors says


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
    tensors = read_headers(folder) if damage is None else {}
    kinds: dict[str, list[int]] = {}
    for name, (_, _, parts) in tensors.items():
        kinds.setdefault(kind_of(name), []).append(sum(parts))
    config, model, progress = state.get("config", {}), state["model"], state.get("progress") or {}
    rows = [
        ("checkpoint", folder),
        ("intact", damage or "yes, every file has its size and checksum"),
        ("model", f"{model['name']}   (fingerprint {model['fingerprint']})"),
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
    print(labelled(rows))
    if list_tensors:
        listed = [
            (name, dtype, "×".join(map(str, shape)) or "scalar", len(parts))
            for name, (dtype, shape, parts) in sorted(tensors.items())
        ]
        print("\n" + text_table(("tensor", "dtype", "shape", "parts"), listed, "lllr"))
    return 1 if damage else 0


def read_headers(folder: Path) -> dict[str, tuple[str, list[int], list[int]]]:
    """name → (dtype, whole shape, bytes of each part) of every tensor, from the headers of the safetensors files."""
    found: dict[str, tuple[str, list[int], list[int]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        header = _header(path)
        sharding = json.loads(header.pop("__metadata__", {}).get("DCP_SHARDING_INFO", "{}"))
        for name, entry in header.items():
            offsets = sharding.get(name, {}).get("saved_offsets", [0] * len(entry["shape"]))
            reach = [start + length for start, length in zip(offsets, entry["shape"])]
            dtype, shape, parts = found.get(name, (entry["dtype"], reach, []))
            begin, end = entry["data_offsets"]
            found[name] = (dtype, [max(pair) for pair in zip(shape, reach)], parts + [end - begin])
    return found


def _header(path: Path) -> dict:
    """The JSON header of a safetensors file. Raises CheckpointError."""
    try:
        with open(path, "rb") as file:
            return json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"Checkpoint {path.parent} is damaged: {path.name} cannot be read ({error}).") from error


def consolidate(path: str, out: str) -> Path:
    """A checkpoint's model in one `model.safetensors`, tensor after tensor; a folder for sample.py and convert.py.

    Memory for one tensor is enough. Raises CheckpointError, or UsageError if `out` exists and is not empty.
    """
    source, target = find_checkpoint(path, holding="model"), Path(out).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} exists already; name a new folder.")
    state = read_state(source)
    shapes = {
        name: (dtype, shape) for name, (dtype, shape, _) in sorted(read_headers(source).items()) if kind_of(name) == "model"
    }
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in shapes.items():
        size = _DTYPES[dtype].itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    target.mkdir(parents=True, exist_ok=True)
    with open(target / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, (dtype, shape) in shapes.items():
            tensor = torch.empty(shape, dtype=_DTYPES[dtype])
            load_tensors(source, {name: tensor})
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
    _write_json(
        target / "state.json",
        {
            "format_version": FORMAT_VERSION,
            **{
                key: state[key]
                for key in ("step", "model", "config", "origins", "dataset", "versions", "run", "source", "dtype")
                if key in state
            },
        },
    )
    for file in tokenizer_files(source):
        (target / file.name).write_bytes(file.read_bytes())
    files = {path.name: _entry(path) for path in sorted(target.iterdir())}
    _write_json(target / "manifest.json", {"format_version": FORMAT_VERSION, "files": files})
    return target
