"""pack=document: what the model says of a document is what it says of the document alone."""

import time

import pytest
import torch

from model_builder import build_model, positions_in
from model_config import resolve
from training.batch import IGNORE, Batch, next_token_batch
from training.objectives import next_token_loss

SHAPE = dict(n_layer=2, n_head=4, n_embd=32, vocab_size=61, block_size=32)
LENGTHS = [[7, 1, 12, 12], [32], [1, 1, 30], [20, 12]]
KINDS = {
    "rope": dict(position_encoding="rope", n_kv_head=2),
    "alibi": dict(position_encoding="alibi"),
    "learned": dict(position_encoding="learned_absolute"),
    "sinusoidal": dict(position_encoding="sinusoidal"),
    "none": dict(position_encoding="none"),
    "window": dict(position_encoding="rope", sliding_window=5),
    "softcap": dict(position_encoding="rope", attention_softcap=20.0),
    "manual": dict(position_encoding="rope", attention_backend="manual"),
    "flex": dict(position_encoding="rope", attention_backend="flex"),
}


def packed() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and numbers of documents (4, 32)."""
    documents = torch.tensor([[number for number, length in enumerate(row) for _ in range(length)] for row in LENGTHS])
    return torch.randint(61, documents.shape, generator=torch.Generator().manual_seed(1)), documents


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_of_each_packed_document_are_those_of_the_document_alone(kind):
    model = build_model(resolve("llama", **{**SHAPE, **KINDS[kind]}), seed=3).eval()
    tokens, documents = packed()
    with torch.no_grad():
        logits = model(tokens, documents=documents)
        for row, lengths in enumerate(LENGTHS):
            first = 0
            for length in lengths:
                alone = model(tokens[row : row + 1, first : first + length])[0]
                torch.testing.assert_close(logits[row, first : first + length], alone, rtol=1e-5, atol=1e-5)
                first += length
        assert (logits - model(tokens)).abs().max() > 1e-2 or kind == "none"


def test_positions_begin_anew_with_each_document():
    _, documents = packed()
    assert positions_in(documents).tolist() == [[i for length in row for i in range(length)] for row in LENGTHS]


def test_a_batch_knows_its_documents_and_gives_their_last_token_no_target():
    windows = torch.tensor([[5, 9, 1, 2, 9, 9, 3], [1, 2, 3, 4, 5, 6, 9]])
    batch = next_token_batch(windows, eos_id=9)
    assert batch.documents.tolist() == [[0, 0, 1, 1, 1, 2], [0] * 6]
    assert batch.targets.tolist() == [[9, IGNORE, 2, 9, IGNORE, IGNORE], [2, 3, 4, 5, 6, 9]]
    assert "documents" not in next_token_batch(windows)
    assert [part.documents.tolist() for part in batch.split(1)] == [[[0, 0, 1, 1, 1, 2]], [[0] * 6]]


def test_gradients_are_those_of_the_documents_alone():
    model = build_model(resolve("gpt2", **SHAPE), seed=3)
    tokens, documents = packed()
    targets = tokens.roll(-1, 1).masked_fill(documents != documents.roll(-1, 1), IGNORE)
    targets[:, -1] = IGNORE
    next_token_loss(model, tokens, targets, documents).backward()
    together = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for row, lengths in enumerate(LENGTHS):
        first = 0
        for length in lengths:
            part = slice(first, first + length)
            next_token_loss(model, tokens[row : row + 1, part], targets[row : row + 1, part]).backward()
            first += length
    for one, other in zip(together, model.parameters()):
        torch.testing.assert_close(one, other.grad, rtol=1e-4, atol=1e-5)


def test_documents_with_a_cache_are_refused():
    from model_components import KVCache

    config = resolve("llama", **SHAPE)
    model, (tokens, documents) = build_model(config), packed()
    with pytest.raises(ValueError, match="cannot go on from a cache"):
        model(tokens, KVCache(config, 4, 32, torch.float32, "cpu"), documents=documents)


@pytest.mark.slow
def test_packing_takes_a_tenth_of_a_step_at_most():
    """6 layers of width 384, T 256, batch 12, fp32, one thread: a step with masks against one without, turn by turn."""
    model = build_model(resolve("gpt2", n_layer=6, n_head=6, n_embd=384, vocab_size=1024, block_size=256))
    windows = torch.randint(1024, (12, 257), generator=torch.Generator().manual_seed(1))
    windows[torch.rand(windows.shape, generator=torch.Generator().manual_seed(2)) < 0.01] = 0
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(6):
        for packing in seconds:
            started = time.perf_counter()
            batch: Batch = next_token_batch(windows, eos_id=0 if packing else None)
            next_token_loss(model, batch.inputs, batch.targets, batch.documents if packing else None).backward()
            seconds[packing].append(time.perf_counter() - started)
    assert min(seconds[True]) <= 1.1 * min(seconds[False]), seconds
