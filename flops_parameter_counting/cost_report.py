"""The second half of detailed_cost_analysis.py: what it found, as tables for the terminal and as a plot."""

from __future__ import annotations

import argparse
import math

from command_line import Failure, duration, short, text_table
from flops_parameter_counting.scaling_laws import LAWS, ScalingLaw, best_allocation, isoflop

# ------------------------------------------------------------------------------------------- tables


def _titled(title: str, headers: list[str], rows: list[list], align: str = "lr") -> str:
    """A table for the terminal under a title; names to the left, figures to the right."""
    return f"{title}\n{text_table(headers, rows, align)}"


def gigabytes(size: float) -> str:
    """Bytes → GB (10^9), two digits."""
    return f"{size / 1e9:.2f}"


def show_cost(answer: dict, options: argparse.Namespace) -> str:
    """--model_config on the terminal."""
    model, flops, run = answer["model"], answer["flops_per_token"], answer["run"]
    padding = f", of which {model['padding']:,} pad the vocabulary" if model["padding"] else ""
    note = f"\n{model['note']}" if model["note"] else ""
    active = (
        f", of which a token uses {model['active_parameters']:,}" if model["active_parameters"] != model["parameters"] else ""
    )
    pieces = [
        f"{model['name']}: {model['architecture']}\nN = {model['parameters']:,}{active}{padding}{note}",
        _titled(
            f"Parameters, and MFLOP a token at context {run['context']} (checkpointing {run['checkpointing']})",
            ["component", "count", "parameters", "forward", "backward", "recompute", "share"],
            [
                [
                    row["name"],
                    row["count"],
                    f"{row['parameters']:,}",
                    *(f"{row[key] / 1e6:,.2f}" for key in ("forward", "backward", "recompute")),
                    f"{3 * row['forward'] / flops['full']:.1%}",
                ]
                for row in answer["components"]
            ],
        ),
        f"FLOPs a token, forward + backward: full attention (mfu) {flops['full'] / 1e9:.4f} GFLOP, half of it "
        f"(mfu_causal) {flops['causal'] / 1e9:.4f}, with recomputation (hfu) {flops['hardware'] / 1e9:.4f}",
        _titled(
            "Not counted in any of them: element-wise operations a token, forward (nor look-ups, loss, optimizer)",
            ["in the blocks", "M operations", "of forward"],
            [
                [_plain(name), f"{value / 1e6:.3f}", f"{3 * value / flops['full']:.3%}"]
                for name, value in answer["elementwise_forward"].items()
            ],
        ),
        _show_memory(answer),
        _show_times(answer, options),
    ]
    if "predicted" in answer:
        predicted = answer["predicted"]
        pieces.append(
            f"{short(run['tokens'])} tokens are {predicted['tokens_per_parameter']:.1f} a parameter and "
            f"{predicted['compute']:.3g} FLOPs; {predicted['law']} predicts a loss of "
            f"{predicted['loss']:.3f} nats a token (on that law's data, each token seen once)"
        )
    return "\n\n".join(pieces)


def _show_memory(answer: dict) -> str:
    """Peak memory by part, by number of GPUs and strategy, and what fits."""
    memory, run = answer["memory"], answer["run"]
    parts = sorted(memory["parts"].items(), key=lambda item: -item[1])
    strategies = [name for name in memory["by_gpus"][0] if name != "gpus"]
    pieces = [
        _titled(
            f"Peak memory on one GPU, GB (micro-batch {run['batch_size']} × {run['context']}, {run['dtype']}, "
            f"{run['optimizer']})",
            ["part", "GB"],
            [[name, gigabytes(size)] for name, size in [*parts, ("total", memory["total"])]],
        ),
        _titled(
            "Peak memory a GPU by number of GPUs and strategy, GB",
            ["GPUs", *strategies],
            [[row["gpus"], *(gigabytes(row[name]) for name in strategies)] for row in memory["by_gpus"]],
        ),
    ]
    if "fit" in answer:
        fit = answer["fit"]
        pieces.append(
            _titled(
                f"Largest micro-batch of {run['context']} tokens ({fit['parallelism']}, {_gpus(fit['gpus'])}; "
                "0: not even one sequence fits)",
                ["card", "micro-batch"],
                [
                    [card["card"] + (" (asked)" if card["card"] == fit["asked"] else ""), card["micro_batch"]]
                    for card in fit["cards"]
                ],
            )
        )
    return "\n\n".join(pieces)


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' if count > 1 else ''}"


def _plain(module: str) -> str:
    """A module's path in a block, for people."""
    names = {
        "position.rotate": "RoPE (within the attention's figure)",
        "attention.sublayer": "attention: softmax, mask, positions",
        "feed_forward.sublayer": "feed_forward: activation, gate",
    }
    return names.get(module) or (module.replace("sublayer.", "") if "." in module else f"{module}: residual addition")


def _show_times(answer: dict, options: argparse.Namespace) -> str:
    """Tokens a second, time and price."""
    tokens, first = answer["run"]["tokens"], answer["time"][0]
    columns = [
        ("GPU", lambda row: row["gpu"]),
        ("peak TFLOP/s", lambda row: f"{row['peak_flops'] / 1e12:g}"),
        ("tokens/s", lambda row: f"{row['tokens_per_s']:,.0f}"),
    ]
    if tokens:
        columns += [("time", lambda row: duration(row["hours"] * 3600)), ("GPU hours", lambda row: f"{row['gpu_hours']:,.1f}")]
    if first["price"] is not None:
        columns += [("price", lambda row: f"{row['price']:,.2f}")]
    if first["mfu_needed"] is not None:
        columns += [
            (
                f"MFU for {options.hours:g} h",
                lambda row: f"{row['mfu_needed']:.0%}" + (", impossible" if row["mfu_needed"] > 1 else ""),
            )
        ]
    headers, rows = [name for name, _ in columns], [[cell(row) for _, cell in columns] for row in answer["time"]]
    also = f"\n{options.gpu.name} was taken; the name also fits {', '.join(options.also)}" if options.also else ""
    flops = answer["flops_per_token"]
    if flops["hardware"] > flops["full"]:
        also += (
            f"\nMFU does not count recomputation: hardware that reaches {options.mfu:.0%} without it reaches "
            f"{options.mfu * flops['full'] / flops['hardware']:.0%} with it (give that as --mfu)"
        )
    length = f", for {short(tokens)} tokens" if tokens else " (--tokens adds the length of a run)"
    title = f"Time on {_gpus(options.gpus)} of a kind at an assumed MFU of {options.mfu:.0%}{length}"
    return _titled(title, headers, rows) + also


def show_backward(answer: dict) -> str:
    """--backward_config on the terminal."""
    gear, data = answer["gear"], answer["data"]
    price = f" = {gear['price']:,.2f} at your price" if gear["price"] else ""
    pieces = [
        f"Gear: {gear['count']} × {gear['gpu']} for {duration(gear['hours'] * 3600)} at an MFU of "
        f"{gear['mfu']:.0%} of {gear['peak']}\n"
        f"Budget: {answer['compute']:.4g} FLOPs, {gear['gpu_hours']:,.0f} GPU hours{price}\n"
        f"Law: {answer['law']['name']}" + (f" ({answer['law']['source']})" if answer["law"]["source"] else "")
    ]
    rows = [["closed form, data without limit", answer["closed_form"]]]
    if data:
        epochs = f", at most {data['max_epochs']:g} epochs" if data["max_epochs"] < math.inf else ""
        rows.append([f"with {short(data['unique_tokens'])} tokens{epochs}", answer["limited"]])
    pieces.append(_plans("Best N and D at 6·N·D FLOPs", [name for name, _ in rows], [plan for _, plan in rows]))
    return "\n\n".join([*pieces, _show_shapes(answer["shapes"])])


def show_grid(answer: dict) -> str:
    """--grid_search on the terminal."""
    return "\n\n".join(
        [
            _plans(
                f"Best N and D for {answer['compute']:.4g} FLOPs (closed forms, C = 6·N·D)",
                [plan["law"] for plan in answer["laws"]],
                answer["laws"],
            ),
            _show_shapes(answer["shapes"], f" by {answer['law']['name']}"),
            "Losses of different laws are of different data and tokenizers: compare their sizes, not their losses.",
        ]
    )


def _plans(title: str, names: list[str], plans: list[dict]) -> str:
    return _titled(
        title,
        ["", "N", "tokens", "tokens/N", "epochs", "loss", "budget used"],
        [
            [
                name,
                short(plan["parameters"]),
                short(plan["tokens"]),
                f"{plan['tokens_per_parameter']:.1f}",
                f"{plan['epochs']:.2f}" if plan["epochs"] else "-",
                f"{plan['loss']:.4f}",
                f"{plan['share_of_compute']:.0%}",
            ]
            for name, plan in zip(names, plans)
        ],
    )


def _show_shapes(shapes: list[dict], by: str = "") -> str:
    timed = shapes[0]["hours"] is not None
    return _titled(
        f"Models one can build, best first{by} (their own FLOPs a token)",
        ["layers × heads × width", "d_ff", "N", "tokens", "epochs", "GFLOP/token", "loss", *(["time"] if timed else [])],
        [
            [
                f"{one['n_layer']} × {one['n_head']} × {one['n_embd']}",
                one["d_ff"],
                short(one["parameters"])
                + (f" ({short(one['active_parameters'])} active)" if one["active_parameters"] != one["parameters"] else ""),
                short(one["tokens"]),
                f"{one['epochs']:.2f}" if one["epochs"] else "-",
                f"{one['flops_per_token'] / 1e9:.4g}",
                f"{one['loss']:.4f}",
                *([duration(one["hours"] * 3600)] if timed else []),
            ]
            for one in shapes
        ],
    )


def show_validation(answer: dict) -> str:
    """--validate on the terminal."""
    rows = [
        [
            row["model"],
            *(f"{row[key]:,}" for key in ("published", "counted", "built")),
            "met" if row["met"] else "MISSED",
            row["source"],
        ]
        for row in answer["models"]
    ]
    met = len(rows) - len(answer["missed"])
    headers = ["model", "published", "counted", "built", "", "source"]
    return (
        _titled("N: published, counted from the config, and built", headers, rows, "lrrrl")
        + f"\n\n{met} of {len(rows)} published models met exactly"
    )


# ------------------------------------------------------------------------------------------- plotting


def plot(
    path: str,
    law: ScalingLaw,
    compute: float,
    unique: float = math.inf,
    max_epochs: float = math.inf,
    point: tuple[float, float] | None = None,
) -> None:
    """Loss against compute for every law, and isoFLOP curves of one law around `compute`.

    `unique`, `max_epochs`: the tokens there are, and how often they may be seen; both hold for every curve of the law.
    `point`: N and predicted loss of a model that is asked about. Raises Failure where there is no matplotlib.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise Failure("--plot needs matplotlib: pip install matplotlib.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8), constrained_layout=True)
    limits = f"{short(unique)} unique tokens" + (f" at most {max_epochs:g} times" if max_epochs < math.inf else "")
    budgets = [compute * 10 ** (step / 10) for step in range(-30, 31)]
    for one in {**LAWS, law.name: law}.values():
        left.plot(
            budgets,
            [best_allocation(one, budget).loss for budget in budgets],
            label=one.name,
            linewidth=2.2 if one.name == law.name else 1.2,
        )
    if unique < math.inf:
        left.plot(
            budgets,
            [best_allocation(law, budget, unique, max_epochs).loss for budget in budgets],
            "--",
            color="black",
            linewidth=1.2,
            label=f"{law.name}, {limits}",
        )
    left.axvline(compute, color="grey", linewidth=0.8, linestyle=":")
    left.set(
        xscale="log",
        xlabel="compute, FLOPs",
        ylabel="predicted loss, nats a token",
        title="Loss of the best model against compute",
    )
    left.legend(frameon=False)
    optima = []
    for i, factor in enumerate((0.01, 0.1, 1.0, 10.0)):
        curve = isoflop(law, compute * factor, unique=unique, max_epochs=max_epochs)
        colour = pyplot.get_cmap("viridis")(0.85 - 0.25 * i)
        right.plot([n for n, _, _ in curve], [loss for _, _, loss in curve], color=colour, label=f"{compute * factor:.2g} FLOPs")
        plan = best_allocation(law, compute * factor, unique, max_epochs)
        optima.append((plan.parameters, plan.loss))
    right.plot(*zip(*optima), "o--", color="black", markersize=5, linewidth=0.8, label="best N")
    if point:
        right.plot(*point, "*", color="crimson", markersize=13, label="the model asked about")
    right.set(
        xscale="log",
        xlabel="parameters N",
        ylabel="predicted loss, nats a token",
        title=f"isoFLOP curves, {law.name}" + (f", {limits}" if unique < math.inf else ""),
    )
    low, high = right.get_ylim()
    right.set_ylim(low, high + 0.2 * (high - low))  # room for the legend
    right.legend(frameon=False, fontsize=9, ncols=2)
    for axis in (left, right):
        axis.grid(True, which="major", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
