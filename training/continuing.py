"""The configuration of a run that goes on with a checkpoint, or that starts from somebody's weights."""

from __future__ import annotations

import os
from typing import Any

from command_line import UsageError, text_table
from model_config import (
    NO,
    as_type,
    component,
    expand_pattern,
    model_keys,
    resolve,
    shortest_pattern,
    type_in_words,
    usual_d_ff,
)
from training.manifest import CheckpointError
from training.train_config import (
    EXCLUSIVE,
    FROM_CHECKPOINT,
    KEYS,
    OF_THE_MACHINE,
    OF_THE_START,
    Configuration,
    TrainConfig,
    fixed_on_resume,
    keys_of_the_model,
    type_of,
)

BATCH_KEYS = ("batch_size", "gradient_accumulation_steps", "total_batch_tokens")
COMMAND_LINE = "command line"


def go_on(now: Configuration, state: dict[str, Any], where: str) -> Configuration:
    """The configuration of a run that goes on with the checkpoint whose state.json is `state`.

    The keys of the model, the data order and the optimizer, and the size of the global batch, have to be those of the
    checkpoint. What was given on the command line then need not be given again; what came from a file, a preset or a
    default has to be the same today. Raises UsageError with one table of all that differs.

    Of the other keys, those that the user does not set now come from the checkpoint, but for what belongs to the machine
    (device, parallelism); the compute dtype is the one that was used.
    """
    saved, saved_origins = state["config"], {key: _own(origin) for key, origin in state["origins"].items()}
    check_saved(saved, where, needed=("batch_size",))

    def comes_back(key: str) -> bool:
        """Whether the key was given on the command line then, and is not given there now."""
        return saved_origins.get(key) == COMMAND_LINE and now.origins[key] != COMMAND_LINE and key in saved

    fixed = fixed_on_resume()
    values = {key: saved[key] for key in fixed if comes_back(key)}
    ends = ("min_lr", "min_lr_ratio")  # one of the two, as on the command line then
    if any(now.origins[key] == COMMAND_LINE for key in ends):
        values = {key: value for key, value in values.items() if key not in ends}
    elif any(key in values for key in ends):
        values |= {key: saved.get(key) for key in ends}
    if any(comes_back(key) and saved[key] is None for key in ("ffn_expansion_ratio", "ffn_multiple")):
        values["d_ff"] = saved["d_ff"]  # in which a ratio that was given is kept
    if not any(now.origins[key] == COMMAND_LINE for key in BATCH_KEYS):
        values |= {key: saved[key] for key in BATCH_KEYS if comes_back(key) and saved[key] is not None}
        if "total_batch_tokens" in values:
            values["gradient_accumulation_steps"] = None  # one of the two, as on the command line then
        elif "gradient_accumulation_steps" in values:
            values["total_batch_tokens"] = None
    exclusive = {key: group for group in EXCLUSIVE for key in group}
    free = [key for key in KEYS if key not in (*fixed, *BATCH_KEYS, *OF_THE_MACHINE, *OF_THE_START) and key in saved]
    kept = {key: saved[key] for key in free if not any(now.given(other) for other in exclusive.get(key, (key,)))}
    if not now.given("dtype"):
        kept["dtype"] = state.get("dtype", saved.get("dtype"))
    if not now.given("threads") and (kept.get("threads") or 0) > (os.cpu_count() or 1):
        kept["threads"] = None  # this machine has not so many
    values |= kept
    origins = {**now.origins, **{key: FROM_CHECKPOINT + saved_origins.get(key, "given") for key in values}}
    merged = Configuration(_replaced(now, values), origins)
    _check_same_run(merged, saved, saved_origins, where)
    return merged


def check_saved(saved: dict[str, Any], where: str, needed: tuple[str, ...] = ()) -> None:
    """Hold a checkpoint's configuration against the types of its keys. Raises CheckpointError with all that is wrong with it.

    needed: keys that it must have besides those of a model.
    """
    needed = (*needed, *(name for name, key in model_keys().items() if key.required), "n_layer", "n_embd", "n_head")
    problems = [f"it has no {key}" for key in dict.fromkeys(needed) if saved.get(key) is None]
    problems += [
        f"{key}={value!r} is not {type_in_words(type_of(key))}"
        for key, value in saved.items()
        if key in KEYS and value is not None and as_type(type_of(key), value) is NO
    ]
    if not problems:
        values = {key: as_type(type_of(key), value) for key, value in saved.items() if key in KEYS and value is not None}
        problems = TrainConfig.of(values).problems(with_model=False)
        try:
            resolve("custom", **{key: value for key, value in values.items() if key in model_keys()})
        except ValueError as error:
            problems += str(error).split("\n")
    if problems:
        raise CheckpointError(f"The configuration in {where} is damaged, or of another version: {'; '.join(problems)}.")


def _replaced(now: Configuration, values: dict[str, Any]) -> TrainConfig:
    """Today's values with those of the checkpoint. Raises UsageError where they cannot be."""
    train = now.train.with_values({key: KEYS[key].default if value is None else value for key, value in values.items()})
    problems = train.problems()
    if problems:
        raise UsageError("\n".join(problems))
    return train


def _check_same_run(merged: Configuration, saved: dict[str, Any], saved_origins: dict[str, str], where: str) -> None:
    """Raise UsageError with a table of what differs between a checkpoint's fixed keys and today's."""
    train = merged.train
    vocabulary = saved["vocab_size"] if train.vocab_size is None else None  # the dataset is compared by its fingerprint
    model = train.model_config(vocabulary)
    today, origins = merged.resolved(model)
    saved = {**saved, "layer_pattern": shortest_pattern(expand_pattern(saved["layer_pattern"], saved["n_layer"]))}
    today["layer_pattern"] = shortest_pattern(model.layer_pattern)  # a pattern can be written in several ways
    rows = [
        (key, _with_origin(today[key], origins[key]), _with_origin(saved.get(key, default), saved_origins.get(key, "default")))
        for key, default in ((key, KEYS[key].default) for key in dict.fromkeys(fixed_on_resume()))
        if today[key] != saved.get(key, default) and (key != "vocab_size" or vocabulary is None)
    ]
    if not any(row[0] in keys_of_the_model() and row[0] != "arch_preset" for row in rows):
        rows = [row for row in rows if row[0] != "arch_preset"]  # only a name, if it stands for the same model
    block_size = saved["block_size"]
    if today["block_size"] == block_size:
        sequences, before = train.sequences_per_iteration(block_size), _sequences(saved)
        if sequences != before:
            rows.append(("global batch", _batch_in_words(sequences, today), _batch_in_words(before, saved)))
    if not rows:
        return
    files = {origin.partition(":")[0] for origin in saved_origins.values() if ".py:" in origin or ".json" in origin}
    hint = f" It was started with {' and '.join(sorted(files))}." if files and len(rows) > 1 else ""
    raise UsageError(
        f"This is not the run of {where}, which keeps its model, data order, optimizer and global batch:\n"
        + text_table(("key", "now", "the checkpoint"), rows, align="l")
        + f"\nGive what the checkpoint has, or start a new run: in another --out_dir, or with these weights "
        f"(--init_from=weights:{where}).{hint}"
    )


def check_same_objective(state: dict[str, Any], fingerprint: str, where: str) -> None:
    """Raise UsageError unless the checkpoint whose state.json is `state` was trained for the objective of this fingerprint.

    Checkpoints of the first versions do not say.
    """
    objective = state.get("objective") or {}
    if objective.get("fingerprint", fingerprint) != fingerprint:
        raise UsageError(
            f"objective={objective.get('name')} means something else now than in {where} (its fingerprint is {fingerprint}, the "
            f"checkpoint has {objective['fingerprint']}): another teacher, or other code. Go on with what it was then, or start "
            f"a new run from the weights with --init_from=weights:{where}."
        )


def _sequences(saved: dict[str, Any]) -> int:
    """Sequences in the global batch of a saved configuration."""
    if saved.get("total_batch_tokens") is not None:
        return saved["total_batch_tokens"] // saved["block_size"]
    return saved["batch_size"] * (saved.get("gradient_accumulation_steps") or 1)


def _batch_in_words(sequences: int, values: dict[str, Any]) -> str:
    if values.get("total_batch_tokens") is not None:
        return f"{sequences} sequences (total_batch_tokens={values['total_batch_tokens']})"
    steps = values.get("gradient_accumulation_steps") or 1
    return f"{sequences} sequences (batch_size={values['batch_size']}, gradient_accumulation_steps={steps})"


def _with_origin(value: Any, origin: str) -> str:
    return f"{value} ({origin})"


def _own(origin: str) -> str:
    """Where a value came from first, of a run that went on as well."""
    return str(origin).removeprefix(FROM_CHECKPOINT)


# ------------------------------------------------------------------------------------------- weights alone


def take_model(now: Configuration, saved: dict[str, Any], where: str) -> tuple[Configuration, list[str]]:
    """The configuration of a new run that starts with the weights of the model whose resolved keys are `saved`.

    The keys of the model come with the weights. Returns the configuration and a note for each value of a config file that
    they overrule. Raises UsageError naming every such key for which the command line says otherwise.
    """
    check_saved(saved, where)
    values, origins, notes, problems = {}, dict(now.origins), [], []
    decided = _decided_by_weights(saved)
    for key in (key for key in keys_of_the_model() if key in saved):
        mine, theirs = getattr(now.train, key), saved[key]
        differs = now.given(key) and mine is not None and mine != theirs
        if differs and key == "layer_pattern":
            differs = not _same_pattern(mine, theirs, saved["n_layer"])
        if differs and key in ("ffn_expansion_ratio", "ffn_multiple"):
            mine_as_width = usual_d_ff(saved["ffn_type"], saved["n_embd"], now.train.ffn_expansion_ratio, now.train.ffn_multiple)
            differs = saved["d_ff"] != mine_as_width
        if differs and key == "arch_preset":  # only a name, if the model that it stands for is the weights' own
            differs = not _same_model(now, saved, decided)
        if key in decided and differs and now.origins[key] == COMMAND_LINE:
            problems.append(
                f"--{key}={mine} differs from the {key}={theirs} of the weights ({where}). Leave the flag out, or start afresh "
                "with --init_from=scratch."
            )
        elif key in decided and differs:
            notes.append(f"{key}={theirs} from the weights ({now.origins[key]} says {mine})")
        if key in decided or not now.given(key):
            values[key], origins[key] = theirs, FROM_CHECKPOINT + "given"
    if problems:
        raise UsageError("\n".join(problems))
    train = now.train.with_values(values)
    if problems := train.problems():
        raise UsageError("\n".join(problems))
    return Configuration(train, origins), notes


def _same_model(now: Configuration, saved: dict[str, Any], decided: tuple[str, ...]) -> bool:
    """Whether today's configuration by itself makes the model of the weights."""
    try:
        today = now.train.model_config(saved["vocab_size"]).to_dict()
    except ValueError:
        return False
    return all(today[key] == saved[key] for key in decided if key in today)


def _decided_by_weights(saved: dict[str, Any]) -> tuple[str, ...]:
    """The model keys that given weights decide: not dropout, nor the length of a sequence without a position table."""
    import model_components  # noqa: F401  registers what a model can be made of

    length_matters = component("position_encoding", saved["position_encoding"]).reads("block_size")
    free = {"dropout"} | (set() if length_matters else {"block_size"})
    return tuple(key for key in keys_of_the_model() if key not in free)


def _same_pattern(one: str, other: str, n_layer: int) -> bool:
    """Whether two ways to write a layer pattern mean the same blocks."""
    try:
        return expand_pattern(one, n_layer) == expand_pattern(other, n_layer)
    except ValueError:
        return False
