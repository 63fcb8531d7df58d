"""What all tests share: one thread a process, the tiny shapes, a tiny dataset, running a command as a user would."""

from __future__ import annotations

import functools
import os

# Before PyTorch is imported, and for every process that a test starts. Tests run side by side, so each has one thread; a
# test that needs two says so. Threads that spin while they wait would take the processor from their neighbours.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.preloaded import preloaded_python

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started in the background of a script: commands would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The many processes that tests start compile the project's modules once, not each of them again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

ROOT = Path(__file__).resolve().parent.parent

# The tiny shapes. A file that needs another one adds to them: a flag that is given twice has its last value.
TINY = dict(n_layer=2, n_head=4, n_embd=32, vocab_size=61, block_size=16)  # a model, of any preset
TINY_RUN = (  # a run of train.py that takes a second
    "--arch_preset=llama",
    "--n_layer=2",
    "--n_head=2",
    "--n_embd=32",
    "--block_size=16",
    "--batch_size=4",
    "--learning_rate=1e-2",
    "--log_interval=1",
    "--eval_iters=1",
    "--device=cpu",
    "--dtype=float32",
    "--threads=1",
)


@functools.cache
def pytorchs_flops(config) -> tuple[int, int]:
    """FLOPs of a forward and of a backward pass over 2 × block_size tokens, by PyTorch's own counter.

    Attention is made to run as its two written-out products: fused kernels are counted otherwise. On the meta device the
    counts are the same, but each operation takes five times as long there, in Python.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from model_builder import build_model

    model, tokens = build_model(config), torch.zeros(2, config.block_size, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            logits = model(tokens)
        with FlopCounterMode(display=False) as backward:
            logits.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@functools.cache
def chosen_presets() -> tuple[str, ...]:
    """The presets that `make test` crosses with every key and component; `make test-slow` crosses the others too.

    GPT-2 and LLaMA; then, one at a time, the preset with most of the parts that none of those chosen has, until every part of
    every preset occurs. A part is a component, or another key that is on, or off.
    """
    from model_config import COMPONENT_KINDS, PRESETS

    def parts(preset: str) -> set:
        return {(key, value if key in COMPONENT_KINDS else bool(value)) for key, value in PRESETS[preset][1].items()}

    chosen = ["gpt2", "llama"]
    while missing := set().union(*map(parts, PRESETS)) - set().union(*map(parts, chosen)):
        chosen.append(max(PRESETS, key=lambda preset: len(parts(preset) & missing)))
    return tuple(chosen)


def crossed(preset: str, *part: str):
    """A case (*part, preset) of a test that takes every preset with other things too: slow if the preset is not a chosen one."""
    slow = () if preset in chosen_presets() else (pytest.mark.slow,)
    return pytest.param(*part, preset, id="-".join(filter(None, ("=".join(part), preset))), marks=slow)


# What `make check` leaves out, by the start of the name: what trains, compiles, starts processes, or comes in hundreds.
LONG = (
    "distributed/",
    "gpu/",
    "test_ablate.py",
    "test_checking.py",
    "test_checkpoint",
    "test_claims.py",
    "test_compare.py::test_real_runs",
    "test_compare_report.py",
    "test_component_contract.py",
    "test_configurator.py::test_help_and_print_config",
    "test_convert.py",
    "test_corpora.py",
    "test_cost_analysis.py",
    "test_cpu_levels.py",
    "test_dataset_writer.py",
    "test_door.py",
    "test_ends.py",
    "test_every_key.py",
    "test_fitting.py::test_auto",
    "test_fitting.py::test_not_even",
    "test_fitting.py::test_the_largest",
    "test_flops.py",
    "test_from_the_documents.py",
    "test_frozen_formats.py",
    "test_fuzz.py",
    "test_huggingface",
    "test_layer_pruning.py",
    "test_memory.py",
    "test_language_models.py",
    "test_mixtures_of_datasets.py::test_a_run",
    "test_mixtures_of_datasets.py::test_max_train",
    "test_mixtures_of_datasets.py::test_repeated",
    "test_model_components.py::test_a_token_changes_no_logits",
    "test_new_parts.py",
    "test_preparation.py",
    "test_observing.py::test_a_planted",
    "test_observing.py::test_w",
    "test_prepare_command.py",
    "test_readme.py",
    "test_registered_entries.py",
    "test_restarts.py",
    "test_restoring.py",
    "test_resume.py",
    "test_sample.py",
    "test_saving.py",
    "test_score.py",
    "test_show.py",
    "test_speaking.py",
    "test_starting.py",
    "test_story_grammar.py::test_the_recipe",
    "test_tokenization.py",
    "test_trackers.py",
    "test_train.py",
    "test_troubleshooting.py",
    "test_wheel.py",
)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items) -> None:
    """Mark what is long."""
    for item in items:
        if item.nodeid.removeprefix("tests/").startswith(LONG):
            item.add_marker(pytest.mark.long)


@pytest.fixture(autouse=True)
def one_thread():
    """Undo a test's torch.set_num_threads (train.py's --threads is one): sums depend on the number of threads."""
    yield
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)


@pytest.fixture
def preloaded(monkeypatch) -> None:
    """What the project starts with sys.executable (runs of ablate.py, the check of an export) starts fast; see preloaded.py."""
    monkeypatch.setattr(sys, "executable", preloaded_python())


@pytest.fixture(scope="session")
def run_python():
    """run_python(*arguments, cwd=ROOT, timeout=120, env=None, input=None) → CompletedProcess with text stdout and stderr.

    Runs Python on `arguments` ("train.py", "--help"). `env` adds to the environment. A script run from another folder
    is named by its full path: ROOT / "train.py". Does not check the exit code. A script or module runs where PyTorch is
    imported already; the text after a "-c" in a Python of its own, which has imported nothing.
    """

    def run(
        *arguments, cwd=ROOT, timeout: float = 120, env: dict[str, str] | None = None, input: str | None = None
    ) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable if arguments[0] == "-c" else preloaded_python(), *map(str, arguments)],
            cwd=cwd,
            timeout=timeout,
            input=input,
            capture_output=True,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONIOENCODING": "utf-8", **(env or {})},
        )

    return run


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory) -> Path:
    """A prepared dataset of real text, by bytes: about 60,000 training and 7,000 validation tokens, 256 ids."""
    import argparse

    from data.preparation import prepare

    folder = tmp_path_factory.mktemp("data") / "tiny"
    text = Path(argparse.__file__).read_text(encoding="utf-8")[:67_000]
    prepare(lambda: iter([("argparse.py", text)]), folder, tokenizer="byte")
    return folder
