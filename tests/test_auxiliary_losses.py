"""A component that adds to the loss without returning it: the same gradients as an explicit sum (issue 9.2)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model_builder import build_model
from model_components import FeedForward, attach_auxiliary_loss, auxiliary_losses, register_ffn
from model_config import resolve, unregister
from training.activation_checkpointing import apply_activation_checkpointing
from training.objectives import next_token_loss

TINY = dict(n_layer=2, n_head=4, n_embd=32, vocab_size=61, block_size=16)


@pytest.fixture
def penalised():
    """A feed-forward that penalises large outputs; `seen` collects the penalties that its forward passes computed."""

    @register_ffn("penalised", short="Pen")
    class Penalised(FeedForward):
        """A feed-forward whose outputs shall be small."""

        seen: list[torch.Tensor] = []

        def forward(self, x):
            y = super().forward(x)
            penalty = 0.3 * y.float().square().mean()
            Penalised.seen.append(penalty)
            return attach_auxiliary_loss(y, "size", penalty)

    yield Penalised
    unregister("ffn_type", "penalised")


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(60, (3, 17), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


def model_with(checkpointing: str = "none", **overrides) -> nn.Module:
    model = build_model(resolve("custom", **{**TINY, **overrides}, ffn_type="penalised"))
    apply_activation_checkpointing(model, checkpointing)
    return model


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_gradients_are_those_of_adding_the_loss_explicitly(penalised, checkpointing, backward_inside):
    inputs, targets = batch()
    weight = torch.tensor(0.25)
    plain = model_with()
    loss = next_token_loss(plain, inputs, targets)
    explicit = 0.25 * loss + 0.25 * 48 * sum(penalised.seen)
    explicit.backward()
    penalties = [float(penalty.detach()) for penalty in penalised.seen]

    model = model_with(checkpointing)
    with auxiliary_losses(weight) as found:
        loss = weight * next_token_loss(model, inputs, targets)
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    for mine, theirs in zip(gradients(model), gradients(plain)):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-8)
    assert found.tokens == {"size": 2 * 48}  # once for each layer, recomputed or not
    assert float(found.totals["size"]) == pytest.approx(48 * sum(penalties))
    assert not found.totals["size"].requires_grad


def test_outside_of_the_context_nothing_is_added(penalised):
    inputs, targets = batch()
    model, plain = model_with(), build_model(resolve("custom", **TINY))
    with auxiliary_losses(torch.tensor(1.0)) as found, torch.no_grad():
        next_token_loss(model, inputs, targets)
    assert found.totals == found.tokens == {}
    for one in (model, plain):
        next_token_loss(one, inputs, targets).backward()
    for mine, theirs in zip(gradients(model), gradients(plain)):
        assert torch.equal(mine, theirs)


def test_micro_batches_and_a_loss_scale_add_up(penalised):
    """Two halves, each weighted by scale / tokens of the whole, give scale × the gradients of the whole batch."""
    inputs, targets = batch()
    inputs, targets = inputs.repeat(2, 1), targets.repeat(2, 1)
    whole, halves, scale = model_with(), model_with(), 1024.0
    for model, pieces, weight in ((whole, 1, 1.0 / 96), (halves, 2, scale / 96)):
        with auxiliary_losses(torch.tensor(weight)) as found:
            for some, wanted in zip(inputs.chunk(pieces), targets.chunk(pieces)):
                (next_token_loss(model, some, wanted) * weight).backward()
        assert found.tokens == {"size": 2 * 96}
    for mine, theirs in zip(gradients(halves), gradients(whole)):
        torch.testing.assert_close(mine, scale * theirs, rtol=1e-5, atol=1e-6)


def test_compiled_blocks_attach_the_same_loss(penalised):
    inputs, targets = batch()
    found = []
    for compiled in (False, True):
        model = model_with(n_layer=1)
        for block in model.blocks if compiled else ():
            block.forward = torch.compile(block.forward, backend="aot_eager")
        with auxiliary_losses(torch.tensor(0.5)) as added:
            (0.5 * next_token_loss(model, inputs, targets)).backward()
        found.append((gradients(model), float(added.totals["size"].detach())))
    torch._dynamo.reset()
    assert found[1][1] == pytest.approx(found[0][1])
    for mine, theirs in zip(found[1][0], found[0][0]):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


def test_a_loss_that_is_no_scalar_is_refused():
    x = torch.zeros(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"'balance' has the shape \(2,\); attach a scalar"):
        attach_auxiliary_loss(x, "balance", torch.zeros(2))


def test_two_places_with_one_name_are_averaged_over_their_tokens():
    x, loss = torch.zeros(2, 5, 3, requires_grad=True), torch.ones((), requires_grad=True)
    with auxiliary_losses(torch.tensor(2.0)) as found:
        y = attach_auxiliary_loss(x, "one", loss)
        z = attach_auxiliary_loss(x[:, :2], "one", 3 * loss)
        (y.sum() + z.sum()).backward()
    assert found.tokens == {"one": 14} and float(found.totals["one"]) == 10 * 1 + 4 * 3
    assert float(loss.grad) == 2.0 * (10 * 1 + 4 * 3)
    assert torch.equal(x.grad, torch.ones(2, 5, 3) + torch.tensor([1.0, 1, 0, 0, 0])[None, :, None])


def test_half_precision_streams_carry_a_loss_in_full_precision():
    x = torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=True)
    loss = torch.ones((), requires_grad=True)
    with auxiliary_losses(torch.tensor(1 / 3)) as found:
        attach_auxiliary_loss(x, "one", loss).sum().backward()
    assert loss.grad.dtype == torch.float32 and float(loss.grad) == pytest.approx(2 / 3, rel=1e-6)
    assert found.totals["one"].dtype == torch.float32
