"""FLOPs of training a token: the three figures that utilisation is made of, and where they come from, part by part.

Counted (2 per multiply-add): every matrix product, the head's included, and the two products of attention. Not counted,
as in every published MFU: look-ups, and element-wise work (norms, RoPE, softmax, activations, residual additions, the
loss, the optimizer). `elementwise` lists that part on its own, so that one can see how little it is.

    python -c "from flops_parameter_counting.flops import *; print(flops_per_token(ModelConfig.from_dict({})))"
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

from flops_parameter_counting.parameters import parts
from model_config import ModelConfig, Part, component


@dataclass(frozen=True)
class FlopsPerToken:
    """Floating-point operations of one token in training, forward and backward (2 per multiply-add).

    `full`: every token attends to the whole context, the PaLM convention (Chowdhery et al. 2022, App. B): 6 × matmul
    weights, head included and look-ups not, + 12 × attention width × context (a sliding window's width where that is
    smaller). `causal`: what a causal mask leaves of it, half without a window.
    `hardware`: `full` plus what activation checkpointing computes a second time.
    """

    full: int
    causal: int
    hardware: int


def flops_per_token(config: ModelConfig, context: int | None = None, checkpointing: str = "none") -> FlopsPerToken:
    """Training FLOPs a token at this context length (default block_size), under this activation checkpointing.

    'full' checkpointing repeats the forward pass of the blocks, counted whole (PyTorch leaves out a block's last
    projection where nothing needs its result); 'selective' repeats no matrix product.
    """
    context = context or config.block_size
    all_parts = parts(config)
    matmul = sum(part.matmul for part in all_parts)
    seen = {part: min(context, part.window or context) for part in all_parts if part.attention}
    full = sum(12 * part.attention * seen[part] for part in all_parts if part.attention)
    # a causal token sees half of a full context on average, and of a window w all but the first w tokens see all
    causal = sum(
        12 * part.attention * (seen[part] - Fraction(seen[part] ** 2, 2 * context)) for part in all_parts if part.attention
    )
    again = 0
    if checkpointing == "full":
        again = 2 * sum(part.matmul for part in all_parts if part.name.startswith("blocks.")) + full // 3
    return FlopsPerToken(6 * matmul + full, 6 * matmul + round(causal), 6 * matmul + full + again)


# ------------------------------------------------------------------------------------------- part by part


@dataclass(frozen=True)
class ComponentFlops:
    """What one kind of component, all `count` of them together, costs a token. FLOPs at full attention.

    `forward` + `backward` of all components is `FlopsPerToken.full`; with `recompute` it is `hardware`. `causal` is
    what a causal mask leaves of forward + backward. A component whose `forward` is 0 has parameters but no product: a
    norm, or an embedding that is looked up.
    """

    name: str
    count: int
    parameters: int
    forward: int
    backward: int
    recompute: int
    causal: Fraction


def breakdown(config: ModelConfig, context: int | None = None, checkpointing: str = "none") -> list[ComponentFlops]:
    """Parameters and FLOPs of every kind of component, in the order of the data; a block's, over all layers.

    It is made of the `Part`s that the components list, so a component that is registered elsewhere is in it by itself.
    """
    context = context or config.block_size
    found: dict[str, ComponentFlops] = {}
    for part in parts(config):
        in_block = part.name.startswith("blocks.")
        name = part.name.split(".", 2)[2] if in_block else part.name
        if part.attention:  # the projections have names of their own: this is softmax(q·kᵀ)·v
            name = f"{name} (window {part.window})" if part.window else f"{name} (q·k, ·v)"
        forward, causal = _forward(part, context)
        one = ComponentFlops(
            name, 1, part.parameters, forward, 2 * forward, forward if in_block and checkpointing == "full" else 0, 3 * causal
        )
        found[name] = _sum(found[name], one) if name in found else one
    return list(found.values())


def _forward(part: Part, context: int) -> tuple[int, Fraction]:
    """One part's forward FLOPs a token: at full attention, and under a causal mask."""
    seen = min(context, part.window or context)
    products = 2 * part.matmul
    return (products + 4 * part.attention * seen, products + 4 * part.attention * (seen - Fraction(seen**2, 2 * context)))


def _sum(one: ComponentFlops, other: ComponentFlops) -> ComponentFlops:
    return ComponentFlops(
        one.name,
        *(
            getattr(one, key) + getattr(other, key)
            for key in ("count", "parameters", "forward", "backward", "recompute", "causal")
        ),
    )


# ------------------------------------------------------------------------------------------- what is not counted

# Elementary steps for each element of what these operations read: softmax takes the maximum, subtracts, takes the
# exponential, sums and divides; a layer norm centres, squares, sums, scales and shifts.
_STEPS = {"_softmax": 5, "native_layer_norm": 8, "_fused_rms_norm": 5}
_MOVES = {"clone", "_to_copy", "copy_", "where", "masked_fill"}  # element by element, but no arithmetic


def elementwise(config: ModelConfig, context: int | None = None) -> dict[str, float]:
    """Element-wise operations a token in the forward pass of all blocks, by the module that does them.

    One for each element that an operation writes (a reduction: reads), whatever the hardware needs for it; backward is
    about twice as much. Found by running each kind of block, attention written out, on the meta device, so it needs no
    declaration by the component. 'position.rotate' (RoPE) is part of the attention's figure and given once more.
    """
    import torch

    from model_builder import build_model, one_of_each_block

    context = context or config.block_size
    config = replace(config, attention_backend="manual")
    found: dict[str, float] = {}
    model = build_model(one_of_each_block(config), device="meta").eval()
    with torch.device("meta"), torch.no_grad():
        x = torch.empty(1, context, config.n_embd)
        shared = model.context(torch.arange(context), x.dtype)
        q = torch.empty(1, config.n_head, context, config.head_dim)
        k = torch.empty(1, config.n_kv_head, context, config.head_dim)
        rotation = sum(_trace(lambda: shared.rotate(q, k)).values())
        for name, block in zip(model.config.layer_pattern, model.blocks):
            layers = config.layer_pattern.count(name)
            for module, operations in _trace(lambda: block(x, shared)).items():
                found[module] = found.get(module, 0) + layers * operations / context
            if rotation and component("block", name).has_attention:
                found["position.rotate"] = found.get("position.rotate", 0) + layers * rotation / context
    return found


def _trace(run) -> dict[str, int]:
    """Element-wise operations of run() by the innermost module that did them ('' outside of any)."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.module_tracker import ModuleTracker

    found: dict[str, int] = {}

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            name = func.overloadpacket.__name__
            steps = _STEPS.get(name, 0) or (torch.Tag.pointwise in func.tags and name not in _MOVES)
            reads = name in _STEPS or name in ("mean", "sum")
            if steps or reads:
                elements = (args[0] if reads or not torch.is_tensor(out) else out).numel()
                module = max(tracker.parents - {"Global"}, key=len, default="").partition(".")[2]
                found[module] = found.get(module, 0) + max(steps, 1) * elements
            return out

    tracker = ModuleTracker()
    with tracker, Counter():
        run()
    return found
