"""Generation: the cache changes nothing, and every knob does what its slow, obvious form does."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import TINY

from model_builder import build_model, sample_next
from model_config import components, resolve


def perturbed(config):
    """A model with confident, different logits at every position."""
    model, generator = build_model(config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def prompt(batch: int, length: int) -> torch.Tensor:
    return torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(length))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------- the cache


@torch.no_grad()
def greedy_by_hand(model, tokens, new):
    """The whole window again for each token; the oldest tokens fall out of it."""
    model.eval()
    for _ in range(new):
        logits = model(tokens[:, -model.config.block_size :])[:, -1]
        tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), dim=1)
    return tokens


@pytest.mark.parametrize("length", [1, 5, 14, 15, 16, 17, 30])
@pytest.mark.parametrize("position_encoding", components("position_encoding"))
def test_cached_generation_is_uncached_generation(position_encoding, length):
    for overrides in ({}, dict(n_kv_head=2, qk_norm=True, layer_pattern="mlp,transformer", attention_backend="manual")):
        model = perturbed(resolve("custom", **TINY, position_encoding=position_encoding, **overrides))
        x = prompt(3, length)
        greedy = [model.generate(x, 8, temperature=0.0, use_cache=cache) for cache in (True, False)]
        assert torch.equal(greedy[0], greedy_by_hand(model, x, 8))
        assert torch.equal(*greedy)
        sampled = [
            model.generate(
                x, 8, temperature=1.5, top_k=20, top_p=0.95, repetition_penalty=1.2, use_cache=cache, generator=seeded()
            )
            for cache in (True, False)
        ]
        assert torch.equal(*sampled)
        assert not torch.equal(sampled[0], greedy[0])
        assert torch.equal(greedy[0][:, :length], x) and greedy[0].shape == (3, length + 8)


@pytest.mark.parametrize("position_encoding", components("position_encoding"))
def test_the_cache_gives_the_logits_of_the_whole_sequence_in_any_division(position_encoding):
    from model_components import KVCache

    model = perturbed(resolve("custom", **TINY, position_encoding=position_encoding, n_kv_head=2)).eval()
    x = prompt(2, 16)
    with torch.no_grad():
        whole = model(x)
        for pieces in ([16], [1] * 16, [5, 1, 7, 3]):
            cache = KVCache(model.config, 2, 16, torch.float32, "cpu")
            logits = torch.cat([model(piece, cache) for piece in x.split(pieces, dim=1)], dim=1)
            torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-5)
            assert cache.length == 16
            with pytest.raises(ValueError, match="block_size=16"):
                model(x[:, :1], cache)


def test_the_cache_is_used_while_the_window_does_not_slide():
    model, widths = perturbed(resolve("llama", **TINY)), []
    model.embedding.register_forward_hook(lambda m, args, y: widths.append(args[0].size(1)))
    model.generate(prompt(1, 12), 8)
    assert widths == [12, 1, 1, 1, 1, 16, 16, 16]
    widths.clear()
    model.generate(prompt(1, 12), 8, use_cache=False)
    assert widths == [12, 13, 14, 15, 16, 16, 16, 16]


def test_in_bf16_the_cache_holds_bf16_and_changes_nothing():
    model = perturbed(resolve("llama", **TINY))
    model.compute_dtype = torch.bfloat16
    cached, uncached = (model.generate(prompt(2, 5), 8, temperature=0.0, use_cache=c) for c in (True, False))
    assert cached.shape == uncached.shape == (2, 13)
    assert (cached == uncached).float().mean() > 0.7  # bf16 sums of another order may break a tie


# ------------------------------------------------------------------------------------------- knobs, one row at a time


def distribution_by_hand(logits, seen, temperature=1.0, top_k=None, top_p=None, repetition_penalty=1.0) -> list[float]:
    """Probabilities of one row, with Python's own numbers and loops."""
    values = [float(v) for v in logits]
    for token in set(seen):
        values[token] = values[token] / repetition_penalty if values[token] > 0 else values[token] * repetition_penalty
    values = [v / temperature for v in values]
    order = sorted(range(len(values)), key=lambda i: -values[i])
    kept = order[:top_k] if top_k is not None else order
    top = values[order[0]]
    weights = {i: math.exp(values[i] - top) for i in kept}
    total = sum(weights.values())
    if top_p is not None:
        nucleus, mass = [], 0.0
        for i in kept:
            nucleus.append(i)
            mass += weights[i] / total
            if mass >= top_p:
                break
        weights = {i: weights[i] for i in nucleus}
        total = sum(weights.values())
    return [weights.get(i, 0.0) / total for i in range(len(values))]


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        dict(temperature=0.5),
        dict(temperature=3.0),
        dict(top_k=1),
        dict(top_k=4),
        dict(top_k=12),
        dict(top_k=99),
        dict(top_p=0.001),
        dict(top_p=0.5),
        dict(top_p=0.9),
        dict(top_p=1.0),
        dict(repetition_penalty=1.7),
        dict(repetition_penalty=0.6),
        dict(temperature=1.5, top_k=5, top_p=0.7, repetition_penalty=1.3),
    ],
    ids=lambda knobs: "-".join(f"{k}={v}" for k, v in knobs.items()) or "plain",
)
def test_every_knob_gives_the_distribution_of_its_slow_form(knobs):
    draws = 20000
    rows, seen = torch.randn(2, 12, generator=seeded(3)) * 2, torch.tensor([[0, 3, 3, 7], [11, 2, 5, 2]])
    for row in range(2):
        expected = distribution_by_hand(rows[row], seen[row].tolist(), **knobs)
        drawn = sample_next(
            rows[row : row + 1].expand(draws, -1), seen[row : row + 1].expand(draws, -1), **knobs, generator=seeded()
        )
        counts = torch.bincount(drawn, minlength=12)
        for token, probability in enumerate(expected):
            deviation = math.sqrt(draws * probability * (1 - probability))
            assert abs(int(counts[token]) - draws * probability) <= 4.5 * deviation + 1e-9, (row, token)


def test_knobs_act_on_each_row_by_itself():
    logits, seen = torch.randn(4, 12, generator=seeded(3)) * 2, torch.tensor([[0], [3], [7], [11]])
    for row in range(4):
        expected = max(range(12), key=distribution_by_hand(logits[row], seen[row].tolist(), repetition_penalty=5.0).__getitem__)
        for knobs in (dict(temperature=0.0), dict(top_k=1), dict(top_p=1e-6)):
            assert int(sample_next(logits, seen, repetition_penalty=5.0, **knobs)[row]) == expected


def test_temperature_zero_is_greedy_and_reads_no_randomness():
    model = perturbed(resolve("llama", **TINY))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert torch.equal(model.generate(prompt(2, 4), 6, temperature=0.0), greedy_by_hand(model, prompt(2, 4), 6))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_repetition_penalty_counts_the_prompt_and_what_was_generated():
    model = perturbed(resolve("llama", **TINY))
    y = model.generate(prompt(1, 8), 12, temperature=0.0, repetition_penalty=1e9)
    new = y[0, 8:].tolist()
    assert len(set(new)) == 12 and not set(new) & set(y[0, :8].tolist())


@pytest.mark.parametrize(
    "knobs, says",
    [
        (dict(top_k=0), "top_k"),
        (dict(top_k=-1), "top_k"),
        (dict(top_p=0.0), "top_p"),
        (dict(temperature=-1.0), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(repetition_penalty=0.0), "repetition_penalty"),
        (dict(repetition_penalty=-1.0), "repetition_penalty"),
    ],
)
def test_an_impossible_knob_is_refused_by_name(knobs, says):
    model = build_model(resolve("llama", **TINY))
    with pytest.raises(ValueError, match=says):
        model.generate(prompt(1, 4), 2, **knobs)


# ------------------------------------------------------------------------------------------- ends


def test_after_eos_a_sequence_yields_eos_and_the_others_go_on():
    model = perturbed(resolve("llama", **TINY))
    x = prompt(4, 5)
    free = model.generate(x, 10, temperature=0.0)
    for eos in sorted(set(free[:, 5:].flatten().tolist())):
        y = model.generate(x, 10, temperature=0.0, eos_id=eos)
        length = 0
        for row in range(4):
            expected = free[row, 5:].tolist()
            if eos in expected:
                stop = expected.index(eos)
                length = max(length, stop + 1)
                expected = expected[:stop] + [eos] * (10 - stop)
            else:
                length = 10
            assert y[row, 5:].tolist() == expected[: y.size(1) - 5]
        assert y.size(1) - 5 == length  # the stream ends as soon as all have ended


def test_an_eos_in_the_prompt_does_not_end_the_continuation():
    model = perturbed(resolve("llama", **TINY))
    x = prompt(1, 5)
    free = model.generate(x, 6, temperature=0.0)
    unused = next(i for i in range(61) if i not in free[0, 5:].tolist())
    x[0, 2] = unused
    free = model.generate(x, 6, temperature=0.0)
    if unused not in free[0, 5:].tolist():
        assert torch.equal(model.generate(x, 6, temperature=0.0, eos_id=unused), free)


def test_an_empty_prompt_is_refused():
    model = build_model(resolve("llama", **TINY))
    with pytest.raises(ValueError, match="prompt has no tokens"):
        model.generate(torch.zeros(2, 0, dtype=torch.long), 3)


def test_no_new_tokens_gives_the_prompt_back():
    model = build_model(resolve("llama", **TINY))
    assert torch.equal(model.generate(prompt(2, 4), 0), prompt(2, 4))


# ------------------------------------------------------------------------------------------- state


def test_a_generator_makes_sampling_repeatable_and_leaves_the_global_state_alone():
    model = perturbed(resolve("gpt2", **TINY, dropout=0.5))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one, same, other = (model.generate(prompt(2, 4), 8, temperature=2.0, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    without = model.generate(prompt(2, 4), 8, temperature=2.0)
    torch.manual_seed(5)
    assert torch.equal(without, model.generate(prompt(2, 4), 8, temperature=2.0))


@pytest.mark.parametrize("training", [True, False])
def test_generation_restores_the_mode_and_leaves_no_gradients(training):
    model = perturbed(resolve("gpt2", **TINY, dropout=0.5)).train(training)
    model.generate(prompt(2, 4), 3)
    assert model.training == training and all(block.training == training for block in model.blocks)
    stream = model.stream(prompt(2, 4), 10)
    next(stream)
    stream.close()  # left in the middle
    assert model.training == training
    assert torch.is_grad_enabled() and all(p.grad is None for p in model.parameters())
    with pytest.raises(IndexError):
        model.generate(torch.tensor([[99]]), 3)  # an id beyond the vocabulary
    assert model.training == training


def test_a_stream_yields_what_generate_returns_token_by_token():
    model = perturbed(resolve("llama", **TINY))
    pieces = list(model.stream(prompt(2, 4), 6, generator=seeded()))
    assert all(piece.shape == (2,) for piece in pieces)
    assert torch.equal(torch.stack(pieces, dim=1), model.generate(prompt(2, 4), 6, generator=seeded())[:, 4:])


@pytest.mark.parametrize("preset", ["gpt2", "llama", "mistral", "gemma2"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_prompts_of_unequal_length_in_a_batch_are_each_continued_as_if_alone(preset, use_cache):
    """Greedy and sampled, also past block_size, and with an eos that is in one of the prompts."""
    window = dict(sliding_window=4) if preset in ("mistral", "gemma2") else {}
    model = build_model(
        resolve(preset, n_layer=2, n_head=4, n_embd=32, head_dim=8, vocab_size=23, block_size=16, **window), seed=3
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) * 0.3)
    prompts = [[1], [5, 6, 7, 8, 9, 10, 11], [2, 3, 4], [4, 3, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4]]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    padded = torch.tensor([prompt + [0] * (12 - len(prompt)) for prompt in prompts])
    for knobs in (dict(temperature=0), dict(temperature=1.0, top_k=9, repetition_penalty=1.3), dict(temperature=1.0, eos_id=4)):

        def generator(i):
            return torch.Generator().manual_seed(100 + i)

        together = torch.stack(
            list(
                model.stream(
                    padded, 10, lengths=lengths, use_cache=use_cache, generator=[generator(i) for i in range(4)], **knobs
                )
            ),
            dim=1,
        )
        for i, prompt in enumerate(prompts):
            alone = torch.stack(
                list(model.stream(torch.tensor([prompt]), 10, use_cache=use_cache, generator=generator(i), **knobs))
            )
            own = together[i, len(prompt) - 1 :][: len(alone)]
            assert torch.equal(own, alone[:, 0]), (knobs, i)
            assert torch.equal(together[i, : len(prompt) - 1], torch.tensor(prompt[1:], dtype=torch.long))
