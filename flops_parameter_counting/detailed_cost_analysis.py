"""What a training run costs before it runs, what a budget buys, and whether the counting is right.

    cd flops_parameter_counting   # or from anywhere
    python detailed_cost_analysis.py --model_config=llama3_8b --gpu=H100 --gpus=8 --tokens=26.2B --hours=24
    python detailed_cost_analysis.py --model_config=config/full_llama_1.36b.py --fit=24
    python detailed_cost_analysis.py --backward_config=besiroglu/h20_4_slimpajama_6b --plot=plan.png
    python detailed_cost_analysis.py --grid_search=1.36e21 --law=besiroglu
    python detailed_cost_analysis.py --validate

Files are looked up as given, then in the project and below flops_parameter_counting/configs/ (models/, scaling_laws/),
with or without their ending. --json prints the same figures for a program.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script, this folder comes first on the path, and flops.py would hide the package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from command_line import PROJECT, Parser, UsageError, check_target, guarded, parse_json
from flops_parameter_counting.cost_report import plot, show_backward, show_cost, show_grid, show_validation
from flops_parameter_counting.flops import breakdown, elementwise, flops_per_token
from flops_parameter_counting.hardware import GPUS, find_gpu
from flops_parameter_counting.parameters import count_active_parameters, count_padding, count_parameters
from flops_parameter_counting.scaling_laws import (
    LAWS,
    Candidate,
    Question,
    ScalingLaw,
    best_allocation,
    candidates,
    positive,
    read_question,
    size_for,
)
from model_config import PRESETS, ModelConfig, did_you_mean, resolve
from training.optimizers import OPTIMIZERS
from training.parallelism import STRATEGIES

BUDGETS = (1e14, 1e30)  # FLOPs: from a minute of a laptop to a thousand times what anybody has spent
CONFIGS = Path(__file__).resolve().parent / "configs"
# What is compared where no --gpu is given.
COMPARED = ("B200", "H200 SXM", "H100 SXM", "A100 SXM 80GB", "H20", "L40S", "RTX 4090", "MI300X")


# ------------------------------------------------------------------------------------------- the command line


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="detailed_cost_analysis.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="architecture keys to change, e.g. n_layer=24")
    asked = parser.add_argument_group("what is asked (one of them)").add_mutually_exclusive_group(required=True)
    asked.add_argument("--model_config", metavar="MODEL", help="a preset, a config/*.py, or a Hugging Face config.json")
    asked.add_argument("--backward_config", metavar="FILE", help="gear, hours, MFU and data limits → the best N and D")
    asked.add_argument("--grid_search", metavar="FLOPS", help="a budget, e.g. 1.36e21 → the best N and D of every law")
    asked.add_argument("--validate", action="store_true", help="count published models; exit code 1 if one is not met")
    run = parser.add_argument_group("the run (default: what a config/*.py says, else as stated)")
    run.add_argument("--tokens", help="length of the run, e.g. 26.2B")
    run.add_argument("--hours", type=float, help="with --tokens: the MFU that finishing in so many hours would need")
    run.add_argument("--batch_size", type=int, help="sequences in a micro-batch on one GPU [8]")
    run.add_argument("--context", type=int, help="tokens in a sequence [block_size, at most 8192]")
    run.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="compute dtype [bfloat16]")
    run.add_argument("--checkpointing", choices=("none", "selective", "full"), help="activation checkpointing [none]")
    run.add_argument("--optimizer", choices=tuple(OPTIMIZERS), help="[adamw]")
    gear = parser.add_argument_group("the machines")
    gear.add_argument("--gpu", help="e.g. 'H100 SXM', A100, 4090 [a table of several]")
    gear.add_argument("--gpus", type=int, default=1, help="how many [1]")
    gear.add_argument("--mfu", type=float, default=0.4, help="share of the dense peak that is reached, assumed [0.4]")
    gear.add_argument("--price_per_gpu_hour", type=float, help="adds what the run costs, in that currency")
    gear.add_argument("--fit", metavar="GPU|GB", help="largest micro-batch on this card, and on every usual size")
    gear.add_argument("--parallelism", choices=("none", *STRATEGIES), help="how GPUs share the work, for --fit [none]")
    shown = parser.add_argument_group("what is shown")
    shown.add_argument("--law", choices=tuple(LAWS), default="besiroglu", help="scaling law of predictions [besiroglu]")
    shown.add_argument("--preset", choices=tuple(PRESETS), default="llama", help="kind of model of --grid_search [llama]")
    shown.add_argument("--plot", metavar="FILE.png", help="loss against compute, and isoFLOP curves")
    shown.add_argument("--json", action="store_true", help="the figures as JSON instead of tables")
    shown.add_argument("--debug", action="store_true", help="errors with their traceback")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """The options, checked. Raises UsageError with all that is wrong with them."""
    options = make_parser().parse_intermixed_args(argv)
    problems = [
        f"--{key}={getattr(options, key)} must be at least 1."
        for key in ("batch_size", "context", "gpus")
        if getattr(options, key) is not None and getattr(options, key) < 1
    ]
    for key, least, most in (("tokens", 1, 1e18), ("grid_search", *BUDGETS)):
        if getattr(options, key) is not None:
            given = getattr(options, key)
            try:
                number = positive(given)
                if not least <= number <= most:
                    raise ValueError(f"is not between {least:g} and {most:g}, beyond which there is nothing to plan.")
                setattr(options, key, number)
            except ValueError as error:
                problems.append(f"--{key}={given} {error}")
    problems += [
        f"--{key}={getattr(options, key)} must be at most {most:,}."
        for key, most in (("batch_size", 10**6), ("context", 10**8), ("gpus", 10**7))
        if (getattr(options, key) or 0) > most
    ]
    if not 0 < options.mfu <= 1:
        problems.append(f"--mfu={options.mfu} must be above 0 and at most 1; 0.4 is usual.")
    if options.hours is not None and not (0 < options.hours < math.inf):
        problems.append(f"--hours={options.hours} must be positive.")
    if options.price_per_gpu_hour is not None and not 0 <= options.price_per_gpu_hour < math.inf:
        problems.append(f"--price_per_gpu_hour={options.price_per_gpu_hour} must not be negative.")
    try:
        options.gpu, options.also = find_gpu(options.gpu) if options.gpu else (None, [])
    except ValueError as error:
        problems.append(f"--gpu: {error}")
    try:
        options.card = _card(options.fit) if options.fit else None
    except ValueError as error:
        problems.append(f"--fit: {error}")
    if options.overrides and (options.validate or options.backward_config):
        problems.append(f"{options.overrides[0]!r}: architecture keys are for --model_config and --grid_search.")
    problems += [f"{word!r} is not KEY=VALUE." for word in options.overrides if not word.partition("=")[2]]
    if options.plot and not options.plot.endswith((".png", ".pdf", ".svg")):
        problems.append(f"--plot={options.plot} must end in .png, .pdf or .svg.")
    elif options.plot:
        try:
            check_target("--plot", options.plot)
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise UsageError("\n".join(problems))
    return options


def _card(name: str) -> tuple[str, float]:
    """'24', '24GB' or a GPU → (what to call it, its GB)."""
    text = name.strip().lower().removesuffix("gb").strip()
    if text.replace(".", "", 1).isdigit() and not any(gpu.name.lower().endswith(f" {text}") for gpu in GPUS):
        from flops_parameter_counting.memory import card_gb

        return f"{text} GB", card_gb(positive(text))
    gpu, _ = find_gpu(name)
    return gpu.name, gpu.memory_gb


# ------------------------------------------------------------------------------------------- which model


def find_file(name: str, folder: Path, endings: tuple[str, ...]) -> Path | None:
    """A file as it is named, else below `folder`, with one of the endings added if need be."""
    for base in (Path(name), folder / name):
        for path in (base, *(base.with_name(base.name + ending) for ending in endings)):
            if path.is_file():
                return path
    return None


def read_model(options: argparse.Namespace) -> tuple[str, ModelConfig, dict]:
    """--model_config → its name, the model, and what a training recipe says of the run. Raises UsageError."""
    name, overrides = options.model_config, dict(word.split("=", 1) for word in options.overrides)
    if name in PRESETS:
        return name, _resolve(name, overrides), {}
    path = find_file(name, CONFIGS / "models", (".json",)) or find_file(name, PROJECT, (".py",))
    if path is None:
        known = [*PRESETS, *(file.stem for file in sorted((CONFIGS / "models").glob("*.json")))]
        raise UsageError(
            f"--model_config={name} is neither a preset nor a file{did_you_mean(name, known)}. There is: "
            f"{', '.join(known)}, and any config/*.py or Hugging Face config.json."
        )
    if path.suffix == ".py":
        return (name, *_read_recipe(path, options.overrides))
    from training.huggingface import config_from_hf
    from training.huggingface_parts import ConversionError

    try:
        hf = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}.") from error
    if not isinstance(hf, dict) or "model_type" not in hf:
        raise UsageError(f"{path} is no Hugging Face config.json: it has no model_type.")
    try:
        empty = [key for key in _SIZES if key in hf and hf[key] is None]  # which would pass for "not given"
        if empty:
            raise ConversionError(f"{', '.join(empty)} is null in it.")
        config = config_from_hf(hf)
    except ConversionError as error:
        raise UsageError(f"{path}: {error}") from error
    return path.stem, _resolve("custom", {**config.to_dict(), **overrides}) if overrides else config, {}


# Sizes without which a config.json says nothing of a model.
_SIZES = (
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "rms_norm_eps",
    "max_position_embeddings",
    "n_layer",
    "n_head",
    "n_embd",
    "n_positions",
    "layer_norm_epsilon",
)


def _resolve(preset: str, overrides: dict) -> ModelConfig:
    import model_components  # noqa: F401  registers what a model can be made of

    try:
        return resolve(preset, **overrides)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _read_recipe(path: Path, overrides: list[str]) -> tuple[ModelConfig, dict]:
    """A config/*.py → the model, and the run it describes, as far as that does not depend on a dataset."""
    from configurator import configure

    train = configure([str(path), *(f"--{word}" for word in overrides)]).train
    config = train.model_config()
    sequences = train.sequences_per_iteration(config.block_size)
    length = train.max_tokens or (train.max_iters * sequences * config.block_size if train.max_iters else None)
    note = (
        None
        if train.vocab_size
        else (
            "The recipe takes its vocabulary from the dataset; counted with the preset's, "
            f"{config.vocab_size}. Give vocab_size=… for another."
        )
    )
    return config, dict(
        batch_size=min(train.batch_size, sequences),
        sequences=sequences,
        optimizer=train.optimizer,
        tokens=length,
        checkpointing=train.activation_checkpointing,
        note=note,
        dtype="bfloat16" if train.dtype == "auto" else train.dtype,
    )


# ------------------------------------------------------------------------------------------- what it costs


def cost(options: argparse.Namespace) -> dict:
    """N, FLOPs, memory, time and price of a model: everything that --model_config shows, as JSON-ready figures."""
    name, config, recipe = read_model(options)
    run = dict(
        batch_size=8, context=min(config.block_size, 8192), dtype="bfloat16", checkpointing="none", optimizer="adamw", tokens=None
    )
    given = {key: getattr(options, key) for key in run if getattr(options, key) is not None}
    run = {**run, **recipe, **given}
    tokens, sequences, note = run.pop("tokens"), run.pop("sequences", None), run.pop("note", None)
    flops = flops_per_token(config, run["context"], run["checkpointing"])
    n, active, padding = count_parameters(config), count_active_parameters(config), count_padding(config)
    rows = breakdown(config, run["context"], run["checkpointing"])
    answer = dict(
        model=dict(
            name=name,
            architecture=config.name,
            fingerprint=config.fingerprint,
            parameters=n,
            active_parameters=active,
            padding=padding,
            note=note,
        ),
        run=dict(run, tokens=tokens),
        flops_per_token=dataclasses.asdict(flops),
        components=[
            dict(
                name=row.name,
                count=row.count,
                parameters=row.parameters,
                forward=row.forward,
                backward=row.backward,
                recompute=row.recompute,
            )
            for row in rows
        ],
        elementwise_forward={name: round(value) for name, value in elementwise(config, run["context"]).items()},
        time=times(options, flops.full, run["dtype"], tokens),
    )
    if tokens:
        law = LAWS[options.law]
        answer["predicted"] = dict(
            law=law.name,
            loss=law.loss(size_for(law, config), tokens),
            tokens_per_parameter=tokens / active,
            compute=tokens * flops.full,
        )
    return {**answer, **memory(config, run, sequences, options)}


def times(options: argparse.Namespace, flops: int, dtype: str, tokens: float | None) -> list[dict]:
    """Tokens a second, duration and price on --gpu, or on several usual ones, at --mfu."""
    rows = []
    for gpu in [options.gpu] if options.gpu else [find_gpu(name)[0] for name in COMPARED]:
        peak = gpu.peak(dtype)
        if peak is None:
            raise UsageError(
                f"No dense {dtype} peak of {gpu.name} is known, so no time can be given; choose another --dtype or --gpu."
            )
        rate = options.gpus * peak.flops * options.mfu / flops
        hours = tokens / rate / 3600 if tokens else None
        gpu_hours = hours * options.gpus if tokens else None
        priced = tokens and options.price_per_gpu_hour is not None
        rows.append(
            dict(
                gpu=gpu.name,
                gpus=options.gpus,
                peak_flops=peak.flops,
                source=peak.source,
                mfu=options.mfu,
                tokens_per_s=rate,
                hours=hours,
                gpu_hours=gpu_hours,
                mfu_needed=options.mfu * hours / options.hours if tokens and options.hours else None,
                price=gpu_hours * options.price_per_gpu_hour if priced else None,
            )
        )
    return rows


def memory(config: ModelConfig, run: dict, sequences: int | None, options: argparse.Namespace) -> dict:
    """Peak memory a GPU: by part on one GPU, by number of GPUs and strategy, and with --fit the largest micro-batches.

    `sequences`: of the global batch, where the recipe says so; more than fit in a micro-batch are accumulated.
    """
    from flops_parameter_counting.memory import CARD_SIZES_GB, card_gb, estimate_memory, largest_micro_batch

    run = dict(run, optimizer=OPTIMIZERS[run["optimizer"]].rule)
    automatic = [name for name, strategy in STRATEGIES.items() if strategy.automatic]

    def sharding(strategy: str):
        return None if strategy == "none" else STRATEGIES[strategy].rule

    def estimate(strategy: str, gpus: int):
        steps = -(-sequences // (run["batch_size"] * gpus)) if sequences else 1
        return estimate_memory(config, **run, sharding=sharding(strategy), world_size=gpus, gradient_accumulation_steps=steps)

    try:
        one = estimate("none", 1)
        by_gpus = [
            dict(gpus=gpus, **{strategy: (estimate(strategy, gpus) if gpus > 1 else one).total for strategy in automatic})
            for gpus in sorted({1, 2, 4, 8, 16, 32, 64, options.gpus})
        ]
        answer = dict(memory=dict(parts=one.parts, total=one.total, by_gpus=by_gpus))
        if options.card:
            sizes = {**{f"{size} GB": card_gb(size) for size in CARD_SIZES_GB}, options.card[0]: options.card[1]}
            alone = {key: value for key, value in run.items() if key != "batch_size"}
            strategy = options.parallelism or ("none" if options.gpus == 1 else automatic[-1])
            gpus = 1 if strategy == "none" else options.gpus
            answer["fit"] = dict(
                asked=options.card[0],
                parallelism=strategy,
                gpus=gpus,
                cards=[
                    dict(
                        card=card,
                        gb=size,
                        micro_batch=largest_micro_batch(config, size, **alone, sharding=sharding(strategy), world_size=gpus),
                    )
                    for card, size in sorted(sizes.items(), key=lambda item: (item[1], item[0]))
                ],
            )
    except ValueError as error:
        raise UsageError(str(error)) from error
    return answer


# ------------------------------------------------------------------------------------------- what a budget buys


def find_question(name: str) -> Question:
    """The file of --backward_config. Raises UsageError."""
    path = find_file(name, CONFIGS / "scaling_laws", (".jsonc", ".json", ".json5"))
    if path is None:
        known = [
            str(file.relative_to(CONFIGS / "scaling_laws").with_suffix(""))
            for file in sorted((CONFIGS / "scaling_laws").rglob("*.jsonc"))
        ]
        raise UsageError(f"--backward_config={name} is no file{did_you_mean(name, known)}. There is: {', '.join(known)}.")
    try:
        question = read_question(path)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if not BUDGETS[0] <= question.compute <= BUDGETS[1]:
        raise UsageError(
            f"{path}: the gear and its hours are {question.compute:.3g} FLOPs, which is not between {BUDGETS[0]:g} and "
            f"{BUDGETS[1]:g}; beyond that there is nothing to plan."
        )
    return question


def backward(question: Question) -> dict:
    """The best N and D for the gear and data that a file describes: closed form, with the limits, and buildable."""
    law, compute = question.law, question.compute
    limits = dict(unique=question.unique, max_epochs=question.max_epochs)
    found = candidates(law, compute, question.preset, **limits, **question.model)
    hours = question.hours * question.count
    limited = question.unique < math.inf
    return dict(
        law=dict(name=law.name, source=law.source),
        compute=compute,
        gear=dict(
            gpu=question.gpu.name,
            count=question.count,
            hours=question.hours,
            mfu=question.mfu,
            dtype=question.dtype,
            peak=str(question.gpu.peak(question.dtype)),
            gpu_hours=hours,
            price=hours * question.price_per_gpu_hour if question.price_per_gpu_hour else None,
        ),
        data=dict(unique_tokens=question.unique, max_epochs=question.max_epochs) if limited else None,
        closed_form=_plan(law, compute),
        limited=_plan(law, compute, **limits) if limited else None,
        shapes=_shapes(found, compute, question.unique, question.hours),
    )


def grid_search(options: argparse.Namespace) -> dict:
    """The best N and D for --grid_search FLOPs: every law's closed form, and shapes of --preset by --law."""
    compute, keys = options.grid_search, dict(word.split("=", 1) for word in options.overrides)
    try:
        found = candidates(LAWS[options.law], compute, options.preset, **{"vocab_size": 32000, "block_size": 2048, **keys})
    except ValueError as error:
        raise UsageError(str(error)) from error
    return dict(
        compute=compute,
        law=dict(name=options.law, source=LAWS[options.law].source),
        laws=[dict(_plan(law, compute), law=law.name) for law in LAWS.values()],
        shapes=_shapes(found, compute, math.inf, None),
    )


def _plan(law: ScalingLaw, compute: float, unique: float = math.inf, max_epochs: float = math.inf) -> dict:
    plan = best_allocation(law, compute, unique, max_epochs)
    return dict(
        parameters=plan.parameters,
        tokens=plan.tokens,
        loss=plan.loss,
        tokens_per_parameter=plan.tokens / plan.parameters,
        share_of_compute=plan.compute / compute,
        epochs=plan.tokens / unique if unique < math.inf else None,
    )


def _shapes(found: list[Candidate], compute: float, unique: float, hours: float | None, most: int = 10) -> list[dict]:
    """The best candidates; a run that the data end early takes less than the hours there are."""
    return [
        dict(
            architecture=one.config.name,
            n_layer=one.config.n_layer,
            n_head=one.config.n_head,
            n_embd=one.config.n_embd,
            d_ff=one.config.d_ff,
            parameters=one.parameters,
            active_parameters=one.active,
            tokens=one.tokens,
            flops_per_token=one.flops_per_token,
            epochs=one.tokens / unique if unique < math.inf else None,
            loss=one.loss,
            hours=hours and hours * one.tokens * one.flops_per_token / compute,
        )
        for one in found[:most]
    ]


# ------------------------------------------------------------------------------------------- is the counting right


def validate() -> dict:
    """N of the published models in configs/models, counted and built, against configs/published.json."""
    from model_builder import build_model
    from training.huggingface import config_from_hf

    published = parse_json((CONFIGS / "published.json").read_text(encoding="utf-8"))
    rows = []
    for name, known in published.items():
        config = config_from_hf(parse_json((CONFIGS / "models" / f"{name}.json").read_text(encoding="utf-8")))
        counted, built = count_parameters(config), build_model(config, device="meta").num_parameters()
        rows.append(
            dict(
                model=name,
                published=known["parameters"],
                counted=counted,
                built=built,
                met=counted == built == known["parameters"],
                source=known["source"],
            )
        )
    return dict(models=rows, missed=[row["model"] for row in rows if not row["met"]])


# ------------------------------------------------------------------------------------------- main


def run(options: argparse.Namespace) -> int:
    """Answer what is asked; returns the exit code."""
    code, drawn = 0, None
    if options.validate:
        answer = validate()
        shown, code = show_validation(answer), 1 if answer["missed"] else 0
    elif options.model_config:
        answer = cost(options)
        shown = show_cost(answer, options)
        if options.plot and "predicted" not in answer:
            raise UsageError("--plot of a model needs the length of its run: give --tokens.")
        if options.plot:
            law, said = LAWS[options.law], answer["predicted"]
            drawn = dict(law=law, compute=said["compute"], point=(answer["model"]["parameters"], said["loss"]))
    elif options.backward_config:
        question = find_question(options.backward_config)
        answer = backward(question)
        limits = dict(unique=question.unique, max_epochs=question.max_epochs)
        shown, drawn = show_backward(answer), dict(law=question.law, compute=question.compute, **limits)
    else:
        answer = grid_search(options)
        shown, drawn = show_grid(answer), dict(law=LAWS[options.law], compute=options.grid_search)
    if options.plot and drawn:
        plot(options.plot, **drawn)
        shown += f"\n\nplot: {options.plot}"
    print(json.dumps(_finite(answer), indent=1) if options.json else shown)
    law = question.law if options.backward_config else LAWS[options.law]
    if law.caution and not options.validate and (not options.model_config or "predicted" in answer):
        print(f"warning: {law.name}: {law.caution}", file=sys.stderr)
    return code


def _finite(value):
    """JSON has no infinity: null stands for 'no limit'."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(argv: list[str]) -> int:
    """Answer one question; returns the exit code."""
    return guarded("detailed_cost_analysis.py", argv, lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
