"""Loss as a function of parameters N and training tokens D, and the best use of a compute budget C.

Every law here has one form, L(N, D) = E + (A·N^-α + B·D^-β)^γ: Hoffmann's and Besiroglu's with γ = 1, and Kaplan's
[(N_c/N)^(α_N/α_D) + D_c/D]^α_D with α = α_N/α_D, β = 1, γ = α_D and E = 0. All of them therefore share one closed form
for the best split of C = 6·N·D (Hoffmann et al. 2022, eq. 4), because the power γ does not move the minimum:

    G = (αA / βB)^(1/(α+β)),   N* = G·(C/6)^(β/(α+β)),   D* = (C/6)^(α/(α+β)) / G

Losses are in nats per token, for the data and the tokenizer that a law was fitted to. They are for ranking plans under one
law; they do not predict the loss on another corpus.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass

from flops_parameter_counting.flops import flops_per_token
from flops_parameter_counting.hardware import Gpu, find_gpu
from flops_parameter_counting.parameters import count_active_parameters, count_parameters, parts
from model_config import ModelConfig, did_you_mean, resolve


@dataclass(frozen=True)
class ScalingLaw:
    """L(N, D) = E + (A·N^-α + B·D^-β)^γ, and where its constants come from.

    `embeddings`: whether its N counts the embedding tables (Kaplan's does not). `caution`: what whoever uses it has to know.
    Raises ValueError for constants with
    which a larger model or more data would not help.
    """

    name: str
    E: float
    A: float
    B: float
    alpha: float
    beta: float
    gamma: float = 1.0
    embeddings: bool = True
    source: str = ""
    caution: str = ""

    def __post_init__(self):
        for key in ("A", "B", "alpha", "beta", "gamma"):
            if not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"{key}={getattr(self, key)} of the scaling law {self.name!r} must be positive and finite.")
        if not 0 <= self.E < math.inf:
            raise ValueError(f"E={self.E} of the scaling law {self.name!r} must not be negative.")

    def loss(self, n: float, d: float) -> float:
        """Predicted loss of n parameters after d tokens, each seen once."""
        return self.E + (self.A * n**-self.alpha + self.B * d**-self.beta) ** self.gamma

    def optimum(self, compute: float) -> tuple[float, float]:
        """(N*, D*): the lowest loss for `compute` FLOPs at 6·N·D, in closed form. Raises ValueError if not positive."""
        if not 0 < compute < math.inf:
            raise ValueError(f"A compute budget of {compute:g} FLOPs buys no training; give a positive number.")
        both = self.alpha + self.beta
        g = (self.alpha * self.A / (self.beta * self.B)) ** (1 / both)
        return g * (compute / 6) ** (self.beta / both), (compute / 6) ** (self.alpha / both) / g

    def matching_parameters(self, d: float) -> float:
        """The N for which d tokens are compute-optimal, which solves αA·N^-α = βB·d^-β."""
        return (self.alpha * self.A / (self.beta * self.B) * d**self.beta) ** (1 / self.alpha)

    def loss_with_repeats(self, n: float, d: float, unique: float) -> float:
        """Predicted loss of n parameters after d tokens of a dataset of `unique`: `loss` of their effective values.

        Muennighoff et al. 2023, eq. 5 and 6: what is repeated, and parameters beyond those that the dataset calls for,
        lose their worth exponentially. Where nothing is repeated it is `loss` itself. Their constants are for C4 and up to
        9B parameters.
        """
        if d <= unique:
            return self.loss(n, d)
        u_n = min(self.matching_parameters(unique), n)
        return self.loss(effective(n, u_n, PARAMETER_DECAY), effective(d, min(unique, d), DATA_DECAY))


# Decay of repeated tokens and of excess parameters, R*_D and R*_N (Muennighoff et al. 2023, App. A).
DATA_DECAY, PARAMETER_DECAY = 15.387756, 5.309743


def effective(amount: float, unique: float, decay: float) -> float:
    """What `amount` is worth if only `unique` of it is new: U + U·R*·(1 - exp(-R/R*)) with R = amount/U - 1 repeats."""
    return unique + unique * decay * -math.expm1(-(amount / unique - 1) / decay)


def kaplan(name: str, n_c: float, d_c: float, alpha_n: float, alpha_d: float, source: str = "") -> ScalingLaw:
    """Kaplan's form, L = [(N_c/N)^(α_N/α_D) + D_c/D]^α_D, N without embeddings (Kaplan et al. 2020, eq. 1.5).

    Raises ValueError for constants that are not positive.
    """
    for key, value in dict(N_c=n_c, D_c=d_c, alpha_N=alpha_n, alpha_D=alpha_d).items():
        if not 0 < value < math.inf:
            raise ValueError(f"{key}={value} of the scaling law {name!r} must be positive and finite.")
    return ScalingLaw(
        name,
        E=0.0,
        A=n_c ** (alpha_n / alpha_d),
        B=d_c,
        alpha=alpha_n / alpha_d,
        beta=1.0,
        gamma=alpha_d,
        embeddings=False,
        source=source,
    )


LAWS: dict[str, ScalingLaw] = {
    law.name: law
    for law in (
        ScalingLaw(
            "hoffmann",
            E=1.69,
            A=406.4,
            B=410.7,
            alpha=0.34,
            beta=0.28,
            source="Hoffmann et al. 2022, Training Compute-Optimal Large Language Models, approach 3",
            caution="its constants are published rounded, and so call for 93 tokens a parameter at Chinchilla's own budget of "
            "5.76e23 FLOPs, where the paper says 20; besiroglu is fitted to the same data.",
        ),
        ScalingLaw(
            "besiroglu",
            E=1.8172,
            A=482.01,
            B=2085.43,
            alpha=0.3478,
            beta=0.3658,
            source="Besiroglu et al. 2024, Chinchilla Scaling: A replication attempt",
        ),
        kaplan(  # their fit of N and D together; 8.8e13 and 5.4e13 are of the two laws with one limit each (eq. 1.1, 1.2)
            "kaplan",
            6.4e13,
            1.8e13,
            0.076,
            0.103,
            source="Kaplan et al. 2020, Scaling Laws for Neural Language Models, eq. 1.5, table 2 (not verified)",
        ),
    )
}


# ------------------------------------------------------------------------------------------- with limits


@dataclass(frozen=True)
class Allocation:
    """A model size and a number of tokens for a budget: parameters, tokens, FLOPs spent (6·N·D) and predicted loss."""

    parameters: float
    tokens: float
    compute: float
    loss: float


def best_allocation(law: ScalingLaw, compute: float, unique: float = math.inf, max_epochs: float = math.inf) -> Allocation:
    """The lowest loss for at most `compute` FLOPs (6·N·D) with `unique` tokens seen at most `max_epochs` times.

    The closed form where the data are enough; else searched, as repeated tokens count for less. A budget that the data
    cannot use up is not spent. Raises ValueError for budgets or limits that are not positive.
    """
    if not unique > 0 or not max_epochs > 0:
        raise ValueError(f"unique tokens ({unique:g}) and epochs ({max_epochs:g}) must be positive.")
    n, d = law.optimum(compute)
    most = unique * max_epochs
    if d <= min(unique, most):
        return Allocation(n, d, compute, law.loss(n, d))

    def tokens(n: float) -> float:
        return min(compute / (6 * n), most)  # all that budget and data allow: more tokens never raise the predicted loss

    def loss(log_n: float) -> float:
        return law.loss_with_repeats(math.exp(log_n), tokens(math.exp(log_n)), unique)

    low, high = math.log(n) - 12, math.log(n) + 12
    grid = [low + (high - low) * i / 400 for i in range(401)]
    nearest = min(range(401), key=lambda i: loss(grid[i]))
    n = math.exp(golden_section(loss, grid[max(0, nearest - 1)], grid[min(400, nearest + 1)]))
    return Allocation(n, tokens(n), 6 * n * tokens(n), loss(math.log(n)))


def golden_section(function: Callable[[float], float], low: float, high: float, tolerance: float = 1e-10) -> float:
    """The x in [low, high] at which a function with a single minimum there is smallest, to within `tolerance` (Kiefer 1953)."""
    ratio = (math.sqrt(5) - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    f_a, f_b = function(a), function(b)
    while high - low > tolerance:
        if f_a < f_b:
            high, b, f_b = b, a, f_a
            a = high - ratio * (high - low)
            f_a = function(a)
        else:
            low, a, f_a = a, b, f_b
            b = low + ratio * (high - low)
            f_b = function(b)
    return (low + high) / 2


def isoflop(
    law: ScalingLaw,
    compute: float,
    span: float = 30.0,
    points: int = 61,
    unique: float = math.inf,
    max_epochs: float = math.inf,
) -> list[tuple[float, float, float]]:
    """(N, D, loss) on the curve 6·N·D = compute; N goes from 1/span to span times the optimum in equal ratios.

    Where `unique` tokens seen `max_epochs` times are fewer than the budget pays for, D is those.
    """
    best, _ = law.optimum(compute)
    sizes = [best * span ** (2 * i / (points - 1) - 1) for i in range(points)]
    tokens = [min(compute / (6 * n), unique * max_epochs) for n in sizes]
    return [(n, d, law.loss_with_repeats(n, d, unique)) for n, d in zip(sizes, tokens)]


# ------------------------------------------------------------------------------------------- models one can build


@dataclass(frozen=True)
class Candidate:
    """A model that can be built: its exact N and FLOPs a token, the tokens the budget pays for, and the predicted loss.

    `active`: the parameters that a token uses, which are what scaling laws call N.
    """

    config: ModelConfig
    parameters: int
    active: int
    flops_per_token: int
    tokens: float
    loss: float


_WIDTHS = (*range(64, 1024, 64), *range(1024, 4096, 128), *range(4096, 8192, 256), *range(8192, 32769, 512))
_WIDTH_PER_LAYER = (64, 80, 96, 112, 128)  # GPT-2 124M to LLaMA 70B lie in this range


def candidates(
    law: ScalingLaw, compute: float, preset: str = "llama", *, unique: float = math.inf, max_epochs: float = math.inf, **keys
) -> list[Candidate]:
    """Shapes of a preset within a factor of 3 of the best N, best first, with their own FLOPs a token instead of 6·N.

    Usual proportions: widths in steps of 64 to 512, 64 to 128 of width for each layer, heads of 64 (from width 1536
    on of 128) unless `keys` give head_dim. `keys` are ModelConfig's (vocab_size, block_size …). Raises ValueError when
    none can be built.
    """
    import model_components  # noqa: F401  registers what a model can be made of

    wanted = best_allocation(law, compute, unique, max_epochs).parameters
    vocab_size, head_dim = resolve(preset, **keys).vocab_size, keys.get("head_dim") and int(keys["head_dim"])
    found, problem = {}, None
    for width in _WIDTHS:
        heads = max(1, width // (head_dim or (128 if width >= 1536 else 64)))
        for depth in sorted({max(1, round(width / ratio)) for ratio in _WIDTH_PER_LAYER}):
            if not wanted / 9 < 12 * depth * width**2 + 2 * width * vocab_size < wanted * 9:
                continue  # far off: not worth resolving
            try:
                config = resolve(preset, **{"n_layer": depth, "n_embd": width, "n_head": heads, **keys})
            except ValueError as error:
                problem = error
                continue
            law_n = size_for(law, config)
            flops = flops_per_token(config).full
            tokens = min(compute / flops, unique * max_epochs)
            if wanted / 3 < law_n < wanted * 3:
                sizes = count_parameters(config), count_active_parameters(config)
                found[config] = Candidate(config, *sizes, flops, tokens, law.loss_with_repeats(law_n, tokens, unique))
    if not found:
        raise ValueError(
            f"No shape of preset {preset!r} has about {wanted:.3g} parameters"
            + (f": {problem}" if problem else "; change the budget or the vocabulary.")
        )
    return sorted(found.values(), key=lambda candidate: candidate.loss)


def size_for(law: ScalingLaw, config: ModelConfig) -> int:
    """N as this law counts it: the parameters that a token uses, with or without embeddings."""
    return count_active_parameters(config) - (0 if law.embeddings else embedding_parameters(config))


def embedding_parameters(config: ModelConfig) -> int:
    """Parameters of the token and position embeddings and of the head, which Kaplan's N leaves out."""
    return sum(part.used for part in parts(config) if part.name in ("embedding", "position", "head"))


# ------------------------------------------------------------------------------------------- what a file asks


@dataclass(frozen=True)
class Question:
    """What a configs/scaling_laws/*.jsonc file asks: a law, the machines and hours at hand, limits of the data, and a
    kind of model (a preset, and keys of ModelConfig)."""

    law: ScalingLaw
    gpu: Gpu
    count: int
    hours: float
    mfu: float
    dtype: str
    price_per_gpu_hour: float | None
    unique: float
    max_epochs: float
    preset: str
    model: dict

    @property
    def compute(self) -> float:
        """FLOPs that these machines do in their hours at this MFU, which counts full attention."""
        return self.gpu.peak(self.dtype).flops * self.count * self.mfu * self.hours * 3600


_LAW_KEYS = {"chinchilla": ("E", "A", "B", "alpha", "beta"), "kaplan": ("N_c", "D_c", "alpha_N", "alpha_D")}
_NEEDED = {"gear": ("gpu", "count", "hours", "mfu"), "data": ()}
_OPTIONAL = {"gear": ("dtype", "price_per_gpu_hour"), "data": ("unique_tokens", "max_epochs")}


def read_question(path: str | os.PathLike) -> Question:
    """A JSONC (JSON5) file → what it asks.

    Raises ValueError with everything that is wrong with the file, one sentence a line; OSError if it cannot be read.
    """
    import json5

    with open(path, encoding="utf-8") as file:
        text = file.read()
    try:
        asked = json5.loads(text, allow_duplicate_keys=False)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON with comments: {str(error).removeprefix('<string>:')}") from error
    problems: list[str] = []
    if not isinstance(asked, dict):
        raise ValueError(f"{path} must hold an object with law, gear, and if need be data and model.")
    problems += [
        f"{key!r} is not a section{did_you_mean(key, ('law', 'gear', 'data', 'model'))}."
        for key in asked
        if key not in ("law", "gear", "data", "model")
    ]
    sections = {name: asked.get(name, {}) for name in ("gear", "data", "model")}
    for name, section in sections.items():
        if not isinstance(section, dict):
            problems.append(f"{name} must be an object.")
            sections[name] = {}
    for name, needed in _NEEDED.items():
        known = needed + _OPTIONAL[name]
        problems += [f"{name}.{key} is not known{did_you_mean(key, known)}." for key in sections[name] if key not in known]
        problems += [f"{name}.{key} is missing." for key in needed if key not in sections[name]]
    gear, data = sections["gear"], sections["data"]
    values = dict(count=1, hours=1, mfu=1, price_per_gpu_hour=None, unique_tokens=math.inf, max_epochs=math.inf)
    for name, section in (("gear", gear), ("data", data)):
        for key in (key for key in section if key in values):
            try:
                values[key] = positive(section[key])
            except ValueError as error:
                problems.append(f"{name}.{key}={section[key]!r} {error}")
    if values["count"] != int(values["count"]):
        problems.append(f"gear.count={gear['count']} must be a whole number of GPUs.")
    if values["mfu"] > 1:
        problems.append(f"gear.mfu={gear['mfu']} is more than all of the peak; give a share such as 0.4.")
    law = _law(asked.get("law"), problems)
    gpu, dtype = None, gear.get("dtype", "bfloat16")
    try:
        gpu = find_gpu(str(gear["gpu"]))[0] if "gpu" in gear else None
        if gpu and gpu.peak(str(dtype)) is None:
            problems.append(f"No dense peak of {gpu.name} in {dtype} is known; name another gear.gpu or gear.dtype.")
    except ValueError as error:
        problems.append(f"gear.gpu: {error}")
    import model_components  # noqa: F401  registers what a model can be made of

    model = dict(sections["model"])
    preset = model.pop("preset", "llama")
    try:
        resolve(preset, **model)
    except (ValueError, TypeError) as error:
        problems += [f"model: {line}" for line in str(error).split("\n")]
    if problems:
        raise ValueError("\n".join(f"{path}: {problem}" for problem in problems))
    return Question(
        law,
        gpu,
        int(values["count"]),
        values["hours"],
        values["mfu"],
        dtype,
        values["price_per_gpu_hour"],
        values["unique_tokens"],
        values["max_epochs"],
        preset,
        model,
    )


def _law(asked: object, problems: list[str]) -> ScalingLaw | None:
    """The law that a file names or spells out; what is wrong with it goes to `problems`."""
    if isinstance(asked, str) and asked in LAWS:
        return LAWS[asked]
    if not isinstance(asked, dict):
        problems.append(
            "law is missing."
            if asked is None
            else f"law={asked!r} is not one of {', '.join(LAWS)}, nor an object with its constants."
        )
        return None
    form = asked.get("form", "chinchilla")
    if form not in _LAW_KEYS:
        problems.append(f"law.form={form!r} is not one of {', '.join(_LAW_KEYS)}.")
        return None
    keys = _LAW_KEYS[form]
    problems += [
        f"law.{key} is not known{did_you_mean(key, keys)}." for key in asked if key not in (*keys, "name", "form", "source")
    ]
    missing = [key for key in keys if key not in asked]
    problems += [f"law.{key} is missing." for key in missing]
    wrong = [key for key in keys if key in asked and (type(asked[key]) not in (int, float) or not math.isfinite(asked[key]))]
    problems += [f"law.{key}={asked[key]!r} is not a number." for key in wrong]
    if missing or wrong:
        return None
    name, source = str(asked.get("name", "custom")), str(asked.get("source", ""))
    try:
        if form == "kaplan":
            return kaplan(name, *(asked[key] for key in keys), source=source)
        law = ScalingLaw(name, **{key: asked[key] for key in keys}, source=source)
        known = [one for one in LAWS.values() if all(getattr(one, key) == getattr(law, key) for key in (*keys, "gamma"))]
        return dataclasses.replace(law, caution=known[0].caution) if known else law
    except ValueError as error:
        problems.append(str(error))
        return None


def positive(value: object) -> float:
    """A positive finite number from a number or text with a suffix: 6e9, '26.2B', '1.5T'. Raises ValueError: 'is …'."""
    text = str(value).strip()
    scale = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}.get(text[-1:].upper(), 1.0)
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(text[:-1] if scale != 1.0 else text) * scale
    except ValueError:
        raise ValueError("is not a number such as 6e9 or 26.2B.") from None
    if not 0 < number < math.inf:
        raise ValueError("must be positive and finite.")
    return number
