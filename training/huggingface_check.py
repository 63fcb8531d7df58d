"""Does an exported folder give the logits of the checkpoint it came from? Asked in a fresh process, as its reader would.

    python -m training.huggingface_check CHECKPOINT FOLDER      # one line of JSON

transformers builds the model from the folder alone; a random batch goes through it and through the checkpoint's model,
whose weights are rounded as the folder's are. One of the two is in memory at a time. Where even that does not fit, the
names and shapes of the tensors and the configuration are compared.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from training.huggingface_parts import ConversionError

ROWS, TOKENS = 2, 64  # of the random batch
TOLERANCE = 1e-3  # of the largest logit: far above rounding in fp32, far below what a wrong weight does
_FREE_SHARE = 0.8  # of the memory that is free, which the check may use


def check_export(checkpoint: Path, folder: Path) -> str:
    """Compare in a fresh process → a sentence with what was compared and the largest difference of a logit.

    Raises ConversionError if the models differ or the comparison could not be made.
    """
    command = [sys.executable, "-m", "training.huggingface_check", str(checkpoint.resolve()), str(folder.resolve())]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parent.parent, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        killed = "it was killed, probably for want of memory" if done.returncode < 0 else None
        reason = killed or (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ConversionError(
            f"{folder} is written, but could not be checked: {reason}. Look into it, or leave the check out with --no_check."
        )
    found = json.loads(lines[-1])
    if found["problem"]:
        raise ConversionError(f"{folder} is written, but do not use it: {found['problem']}")
    return found["said"]


def compare_logits(checkpoint: Path, folder: Path) -> dict[str, Any]:
    """`problem`: a sentence, or None where the folder is the checkpoint's model; `said`: what was compared."""
    try:
        import transformers
    except ImportError:
        difference, largest = _difference(_logits_here(checkpoint, folder), _logits_here(folder, folder))
        said = "kitbash's own reader in a fresh process, as transformers is not installed"
        return _judged(difference, largest, f"{said}; largest logit difference {difference:.2g}")
    transformers.logging.set_verbosity_error()
    fresh = f"transformers {transformers.__version__} in a fresh process"
    problem = _shape_problem(folder, checkpoint)
    needed, free = _bytes_of(folder), _free_bytes()
    if problem is not None or needed > _FREE_SHARE * free:
        return dict(
            problem=problem,
            said=f"{fresh}: names, shapes and config.json agree; logits, which take {needed / 1e9:.1f} GB where "
            f"{free / 1e9:.1f} GB are free, were not compared",
        )
    difference, largest = _difference(_logits_here(checkpoint, folder), _logits_there(folder))
    said = f"{fresh}: largest logit difference {difference:.2g}"
    return _judged(difference, largest, f"{said} (logits up to {largest:.3g}, {ROWS} rows of random tokens, float32)")


def _judged(difference: float, largest: float, said: str) -> dict[str, Any]:
    wrong = not difference <= TOLERANCE * max(1.0, largest)  # NaN included
    problem = f"its logits differ from the checkpoint's by up to {difference:.3g} (logits up to {largest:.3g})."
    if not math.isfinite(largest):
        problem = "the checkpoint's logits are not finite: its training has diverged."
    return dict(problem=problem if wrong else None, said=said)


def _difference(ours, theirs) -> tuple[float, float]:
    return float((ours - theirs).abs().max()), float(ours.abs().max())


def _tokens(config):
    import torch

    length = min(config.block_size, TOKENS)
    return torch.randint(config.vocab_size, (ROWS, length), generator=torch.Generator().manual_seed(0))


def _logits_here(place: Path, folder: Path):
    """kitbash's logits of a checkpoint or folder, its weights rounded to the dtypes that the folder has them in."""
    import torch

    from training.checkpoint import load_model
    from training.huggingface_files import stored_dtypes

    model, _ = load_model(place)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, dtype in stored_dtypes(folder).items():
            parameters[name].copy_(parameters[name].to(dtype))
        return model(_tokens(model.config))


def _logits_there(folder: Path):
    """The logits of the model that transformers makes of the folder. Raises ConversionError for weights it lacks."""
    import torch
    import transformers

    from training.huggingface_files import read_config

    dtype = "dtype" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 56) else "torch_dtype"
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True, local_files_only=True, **{dtype: torch.float32}
    )
    astray = {kind: sorted(map(str, names)) for kind, names in told.items() if kind.endswith("_keys") and names}
    if astray:
        raise ConversionError(f"transformers reports {astray}.")
    with torch.no_grad():
        return model.eval()(_tokens(read_config(folder)), use_cache=False).logits


def _shape_problem(folder: Path, checkpoint: Path) -> str | None:
    """A sentence if the class that transformers builds has other tensors than the files, or config.json says another model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from training.checkpoint import model_of
    from training.huggingface_files import read_config, tensors_on_disk

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}  # tied ones once
    found = {name: tensor.shape for name, tensor in tensors_on_disk(folder).items()}
    astray = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if astray:
        name = astray[0]
        return (
            f"{len(astray)} tensors are not as transformers builds them, e.g. {name} with the shape {found.get(name)} "
            f"instead of {expected.get(name)}."
        )
    wanted = model_of(checkpoint)
    plain = dict(pad_vocab_multiple=1, attention_backend="sdpa", dropout=0.0, zero_init=False)
    one, other = (dataclasses.replace(config, **plain) for config in (wanted, read_config(folder)))
    return None if one == other else f"its config.json is of the model {other.name}, the checkpoint's is {one.name}."


def _bytes_of(folder: Path) -> int:
    """Memory that one fp32 model and its logits take."""
    from training.huggingface_files import read_config, tensors_on_disk

    config = read_config(folder)
    numbers = sum(math.prod(tensor.shape) for tensor in tensors_on_disk(folder).values())
    largest = max(math.prod(tensor.shape) for tensor in tensors_on_disk(folder).values())
    return 4 * (numbers + 2 * largest + 4 * ROWS * TOKENS * config.vocab_size)


def _free_bytes() -> float:
    import torch

    from training.meter import free_memory

    return free_memory(torch.device("cpu"))


def main(argv: list[str]) -> int:
    """Print what `compare_logits` finds as JSON."""
    print(json.dumps(compare_logits(Path(argv[0]), Path(argv[1]))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
