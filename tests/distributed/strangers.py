"""An objective, an optimizer and a strategy as somebody else would add them: each is one registered entry and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from flops_parameter_counting.memory_rules import OptimizerRule, ShardingRule
from model_builder import build_model
from model_components import Linear
from training.objectives import Objective
from training.optimizers import Update, register_optimizer
from training.parallelism import register_sharding
from training.registry import OBJECTIVES, OPTIMIZERS, STRATEGIES


@contextmanager
def registered() -> Iterator[None]:
    """The three entries, 'odd_bytes', 'signed' and 'lazy', are there inside of this context."""

    @OBJECTIVES.registered("odd_bytes")
    class OddBytes(Objective):
        """Cross-entropy of targets with odd ids alone, a teacher's opinion, and a head that learns to guess parity."""

        def __init__(self, config, model_config):
            super().__init__(config, model_config)
            self.frozen = build_model(model_config, seed=99)
            with torch.device("meta"):
                self.heads = Linear(model_config.vocab_size, 2, bias=True)

        def __call__(self, model, batch):
            logits = model(batch.inputs)
            counts = batch.targets % 2 == 1
            loss = F.cross_entropy(logits.float().transpose(1, 2), batch.targets.clamp(min=0), reduction="none")
            with torch.no_grad():
                opinion = self.frozen(batch.inputs).float().log_softmax(-1)
            distance = F.kl_div(logits.float().log_softmax(-1), opinion, log_target=True, reduction="none").sum(-1)
            guess = model.objective(logits.detach().float()).transpose(1, 2)
            parity = F.cross_entropy(guess.float(), batch.targets.clamp(min=0) % 2, reduction="none")
            total = ((loss + 0.1 * distance + 0.5 * parity) * counts).sum()
            return total, counts.sum(), {"distance": (distance * counts).sum(), "parity": (parity * counts).sum()}

        def flops_per_token(self):
            return 1000

        def fingerprint(self):
            return "odd"

    @register_optimizer("signed", OptimizerRule(bytes_per_number=4))
    def signed(parameters, config):
        """SGD with momentum."""
        optimizer = torch.optim.SGD(list(parameters.values()), lr=config.learning_rate, momentum=config.beta1)
        return [Update(optimizer, kinds=("momentum_buffer",))]

    register_sharding("lazy", "gathered a unit at a time, reduced once", ShardingRule(keeps_gathered=False, reduces_once=True))
    try:
        yield
    finally:
        OBJECTIVES.unregister("odd_bytes")
        OPTIMIZERS.unregister("signed")
        STRATEGIES.unregister("lazy")


def train_with_strangers(arguments: tuple[str, ...]) -> None:
    """train.py in this process, which knows the three entries. RuntimeError unless it exits with 0."""
    import train

    with registered():
        code = train.main(list(arguments))
    if code != 0:
        raise RuntimeError(f"train.py exits with {code}")
