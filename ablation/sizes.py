"""--match: variants as large, or as costly, as the baseline, by another d_ff or, where that cannot be, other depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from ablation.variants import Variant, make_variant, measure
from training.train_config import TrainConfig

TOLERANCE = 0.01  # of N or of FLOPs per token
D_FF_RANGE = 4  # a feed-forward becomes at most so many times wider or narrower
DEPTH_RANGE = 2  # the same of the number of layers
D_FF_STEPS = (8, 1)  # multiples that are tried: what hardware likes, then any
MEASURES = {"params": "parameters", "flops": "flops"}
SAYS = {"params": "N", "flops": "FLOPs per token"}


def matched(variant: Variant, base: Variant, match: str, config_file: str | None) -> Variant:
    """The variant with d_ff, or else depth, such that its N or FLOPs per token is the baseline's within TOLERANCE.

    One that is near enough is left as it is; what is varied is not touched. Raises ValueError where nothing fits.
    """
    what, wanted = MEASURES[match], measure(MEASURES[match], base.model)
    best: tuple[float, str] | None = None
    for train in dimensions(variant, base, lambda train: size(train, variant, what), wanted):
        if math.isnan(found := size(train, variant, what)):
            continue
        model = train.model_config(variant.dataset.vocab_size)
        changed = {key: getattr(model, key) for key in ("n_layer", "d_ff") if getattr(model, key) != getattr(variant.model, key)}
        how = ", ".join(f"{key} {getattr(variant.model, key)} → {new}" for key, new in changed.items())
        if abs(found / wanted - 1) <= TOLERANCE:
            return resized(variant, changed, how, config_file) if changed else variant
        best = min(filter(None, (best, (abs(found / wanted - 1), f"{how or 'as it is'}: {deviation(found, wanted)}"))))
    raise ValueError(
        f"--match={match}: no d_ff (up to {D_FF_RANGE} times wider or narrower) and no number of layers (half to twice "
        f"as many) that may be changed brings {variant.name} within 1 % of the baseline's {SAYS[match]} {wanted:,}"
        + (f" (closest is {best[1]})" if best else "")
        + ". Use --match=none, or a larger model."
    )


def dimensions(variant: Variant, base: Variant, size_of: Callable[[TrainConfig], float], wanted: int) -> Iterator[TrainConfig]:
    """What may be tried, in order: as it is; another d_ff; other depths, nearest first, with this d_ff or another."""
    varied = {key for key in variant.choice if variant.choice[key] != base.choice[key]}
    depth = variant.model.n_layer
    depths = range(math.ceil(depth / DEPTH_RANGE), depth * DEPTH_RANGE + 1)
    for n_layer in sorted([depth] if varied & {"n_layer", "layer_pattern"} else depths, key=lambda n: abs(n - depth)):
        train = variant.train if n_layer == depth else replace(variant.train, n_layer=n_layer)
        yield train
        if not varied & {"d_ff", "ffn_expansion_ratio", "ffn_multiple"}:
            plain = replace(train, ffn_expansion_ratio=None, ffn_multiple=None)
            for step in D_FF_STEPS:
                width = nearest_width(lambda d_ff: size_of(replace(plain, d_ff=d_ff)), variant.model.d_ff, step, wanted)
                if width is not None:
                    yield replace(plain, d_ff=width)


def size(train: TrainConfig, variant: Variant, what: str) -> float:
    """N or FLOPs per token of the variant with these dimensions; NaN where they cannot be built."""
    try:
        return measure(what, train.model_config(variant.dataset.vocab_size))
    except ValueError:
        return math.nan


def nearest_width(size_of: Callable[[int], float], own: int, step: int, wanted: int) -> int | None:
    """The multiple of `step` for d_ff that comes nearest to the wanted size, by bisection; None if out of range."""
    first, last = math.ceil(own / D_FF_RANGE / step), own * D_FF_RANGE // step
    if first > last or not size_of(first * step) <= wanted <= size_of(last * step):  # or not a number
        return None
    while last - first > 1:
        middle = (first + last) // 2
        first, last = (middle, last) if size_of(middle * step) <= wanted else (first, middle)
    return min((first * step, last * step), key=lambda width: abs(size_of(width) - wanted))


def resized(variant: Variant, changed: dict[str, int], how: str, config_file: str | None) -> Variant:
    """The variant with other dimensions, which its command line says too."""
    words = {key: str(value) for key, value in changed.items()}
    if "d_ff" in words and variant.train.ffn_multiple is not None:
        words["ffn_multiple"] = "None"
    again = make_variant(config_file, variant.given, words)
    return replace(again, name=variant.name, folder=variant.folder, choice=variant.choice, resized=how)


def deviation(value: float, reference: float) -> str:
    """'+0.12 %' of the reference."""
    return "0.00 %" if abs(value / reference - 1) < 5e-5 else f"{100 * (value / reference - 1):+.2f} %"
