"""Makes what lies beside it: a dataset, two runs and what follows from them, in the formats of the code it is run with.

    python tests/frozen/make.py REPOSITORY FOLDER        # REPOSITORY: a checkout of the commit whose formats are frozen

The files here were made by commit 91493a6 (format version 1 of everything) and stay as they are: tests/test_frozen_formats.py
opens them with the code of today. Formats of a later version get a folder of their own.

`one` was trained by one process (LLaMA, AdamW, with dropout), `two` by two processes under fsdp (GPT-2, Muon). `expected.json`
holds what the code of then made of their last checkpoints: logits, the losses of the next steps in fp32 and bf16, the
hash of the tensors converted to Hugging Face; and the machine that it ran on, as losses differ in rounding between machines.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

STEPS, MORE = 6, 4
COMMON = (
    "--n_head=2 --n_embd=8 --d_ff=16 --block_size=16 --batch_size=2 --gradient_accumulation_steps=4 "
    f"--learning_rate=1e-2 --warmup_iters=2 --lr_decay_iters=20 --max_iters={STEPS} --log_interval=1 --eval_interval=3 "
    "--eval_iters=2 --save_interval=0 --keep_last=1 --device=cpu --dtype=float32 --threads=1 --seed=7 --data_seed=8"
).split()
RUNS = {
    "one": (1, ["--arch_preset=llama", "--n_layer=2", "--dropout=0.1"]),
    "two": (2, ["--arch_preset=gpt2", "--n_layer=1", "--dropout=0.0", "--optimizer=muon", "--parallelism=fsdp"]),
}
FACTS = """
import json, sys, torch
from training.checkpoint import load_model
expected = {"machine": json.loads(sys.argv[1]), "tokens": list(range(3, 9)), "logits": {}}
for name in ("one", "two"):
    model, tokenizer = load_model(name)
    with torch.no_grad():
        expected["logits"][name] = model(torch.tensor([expected["tokens"]]))[0].tolist()
json.dump(expected, open("expected.json", "w"))
"""


def machine() -> dict[str, Any]:
    """What decides how PyTorch rounds here: its version and its libraries, the processor and the instructions it has."""
    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    instructions = hashlib.sha256(told.get("flags", "").encode()).hexdigest()[:16]
    return {
        "torch": torch.__version__,
        "mkl": torch.backends.mkl.is_available(),
        "cpu": told.get("model name", platform.processor()),
        "instructions": instructions,
    }


def tensors_hash(folder: Path) -> str:
    """Names, types, shapes and bytes of every tensor in a folder's safetensors files, hashed."""
    from safetensors.numpy import load_file

    hashed = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        for name, array in sorted(load_file(file).items()):
            hashed.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return hashed.hexdigest()


def main(repository: Path, folder: Path) -> None:
    """Make everything in `folder`, which is emptied first."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)}

    def python(*arguments: object) -> None:
        subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, env=environment, check=True)

    def train(name: str, *arguments: object) -> None:
        processes = RUNS[name.split("_")[0]][0]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
        python(*launcher, repository / "train.py", f"--out_dir={name}", *arguments)

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    text = (repository / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8").lower()[-3000:]
    documents = [json.dumps({"text": part}) + "\n" for part in text.split("\n\n")]
    (folder / "text.txt").write_text(text, encoding="utf-8")
    (folder / "text.jsonl").write_text("".join(documents), encoding="utf-8")
    prepare = repository / "data" / "textfile" / "prepare.py"
    python(prepare, "text.txt", "--tokenizer=char", "--out=dataset")
    python(prepare, "text.jsonl", "--tokenizer=bpe", "--vocab_size=280", "--out=dataset_bpe")

    for name, (_, arguments) in RUNS.items():
        train(name, "--dataset=dataset", *COMMON, *arguments)
    python("-c", FACTS, json.dumps(machine()))
    expected = json.loads((folder / "expected.json").read_text())
    expected["losses"], expected["converted"] = {}, {}
    for name in RUNS:
        for dtype in ("float32", "bfloat16"):
            again = f"{name}_{dtype}"
            shutil.copytree(folder / name, folder / again)
            for log in (folder / again).glob("run_*"):
                log.unlink()
            train(again, "--init_from=resume", "--dataset=dataset", f"--dtype={dtype}", f"--max_iters={STEPS + MORE}")
            [log] = (folder / again).glob("run_*.jsonl")
            events = [json.loads(line) for line in log.read_text().splitlines()]
            steps = {event["step"]: event["loss"] for event in events if event["event"] == "step"}
            assert list(steps) == list(range(STEPS + 1, STEPS + MORE + 1))
            expected["losses"][again] = list(steps.values())
            shutil.rmtree(folder / again)
        python(repository / "convert.py", name, f"{name}_hf")
        expected["converted"][name] = tensors_hash(folder / f"{name}_hf")
        shutil.rmtree(folder / f"{name}_hf")
    for spare in ("text.jsonl", "one/.lock", "two/.lock"):
        (folder / spare).unlink()
    (folder / "expected.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
