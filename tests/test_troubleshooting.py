"""docs/TROUBLESHOOTING.md: each message that it quotes is one that the program prints."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import ROOT

import train
from command_line import error_text
from configurator import ConfigError, configure
from data.hub import hub_reason
from tests.conftest import TINY_RUN
from training import fitting
from training.objectives import NextToken

PAGE = (ROOT / "docs" / "TROUBLESHOOTING.md").read_text(encoding="utf-8")
QUOTES = re.findall(r"^\| `([^`]+)` \|", PAGE, re.M)


def pattern(quote: str) -> str:
    return ".*".join(map(re.escape, quote.split("…")))


@pytest.fixture
def said(tmp_path, tiny_dataset, monkeypatch, capsys):
    """Everything that a handful of mistakes make the program say, on one line."""
    texts = []

    def refused(*words):
        with pytest.raises((ConfigError, ValueError)) as error:
            configure(list(words))
        texts.append(str(error.value))

    def ran(*words):
        train.main([*TINY_RUN, f"--out_dir={tmp_path / 'out'}", "--eval_interval=0", f"--dataset={tiny_dataset}", *words])
        captured = capsys.readouterr()
        texts.extend((captured.out, captured.err))

    refused("--learning_rat=1")
    refused("--normalization=rmsnrom")
    refused("--n_head=18", "--n_embd=2432")
    refused("--max_iters=3", "--epochs=1")
    refused("--batch_size=auto")
    ran(f"--dataset={tmp_path / 'none'}")
    ran("--vocab_size=61")
    ran("--resume")
    ran("--max_iters=1", "--save_interval=1")
    ran("--max_iters=1", "--resume")
    ran("--max_iters=2", "--resume", "--n_layer=3")
    for error in (type("GatedRepoError", (Exception,), {})(), type("ConnectError", (Exception,), {})()):
        texts.append(hub_reason(error, "meta-llama/Llama-2-7b-hf"))
    texts.append("train.py: " + error_text(torch.OutOfMemoryError("CUDA out of memory"), "Out of memory. …"))
    monkeypatch.setattr("train.device_peak", lambda device, dtype: None)
    monkeypatch.setattr(fitting, "free_memory", lambda device, processes: 1e6)
    ran("--max_iters=1", f"--out_dir={tmp_path / 'b'}")
    monkeypatch.undo()
    forward, count = NextToken.__call__, iter(range(1000))

    def worse(self, model, batch):
        losses, number, figures = forward(self, model, batch)
        return losses * (1.0, float("nan"))[next(count) >= 30], number, figures

    monkeypatch.setattr(NextToken, "__call__", worse)
    ran("--max_iters=60", f"--out_dir={tmp_path / 'c'}", "--save_interval=-1")

    def out_of_memory(self, model, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(NextToken, "__call__", out_of_memory)
    ran("--max_iters=1", f"--out_dir={tmp_path / 'd'}")
    ran("--max_iters=1", f"--out_dir={tmp_path / 'e'}", "--micro_batch=auto")
    return "\n".join(texts)


# What several processes say: the file whose sentence it is. tests/distributed/ has them say it.
ELSEWHERE = {"One of them hangs": "training/watch.py", "shared equally by": "train.py"}


def test_every_message_on_the_page_is_printed(said):
    assert len(QUOTES) >= 18
    missing = []
    for quote in QUOTES:
        where = [file for words, file in ELSEWHERE.items() if words in quote]
        if where:
            words = next(words for words in ELSEWHERE if words in quote)
            assert words in (ROOT / where[0]).read_text(encoding="utf-8"), quote
        elif not re.search(pattern(quote), said):
            missing.append(quote)
    assert not missing, f"not printed: {missing}\n{said}"
