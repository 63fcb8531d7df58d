"""Config file + command line → TrainConfig, with the origin of every value.

    python train.py [config/x.py | run.json] [--key=value | --key value | --flag …]

Precedence: command line > config file > (its base files) > preset > default. A config file is Python, run in its own
namespace; each public name it sets is a key. All problems are collected and raised together as one `ConfigError`.
"""

from __future__ import annotations

import ast
import os
import re
import textwrap
import types
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import training.objectives  # these three fill the registries that keys choose from
import training.optimizers
import training.parallelism  # noqa: F401
from command_line import PROJECT, Mandatory, UsageError, check_shape, parse_json, printable
from model_config import (
    COMPONENT_KINDS,
    NO,
    PRESETS,
    alternatives,
    as_type,
    components,
    did_you_mean,
    type_in_words,
)
from model_parts.registry import reserve
from training.aliases import ALIASES, SPELLINGS, InUnits, TakenBack, help_lines, recipe_meant, typed, without_aliases
from training.train_config import (
    EXCLUSIVE,
    FROM_CHECKPOINT,
    GROUPS,
    KEYS,
    Configuration,
    TrainConfig,
    type_of,
)
from training_logger import SCHEMA_VERSION

SWITCHES = ("help", "help_all", "print_config", "check", "debug")  # what the command line has besides keys
reserve("the command line", (*SWITCHES, *ALIASES, "config", "base"))  # which is a name in config files


class ConfigError(UsageError):
    """The user's configuration cannot be used; the message has one sentence a line."""


# ------------------------------------------------------------------------------------------- reading


def parse_command_line(argv: list[str]) -> tuple[str | None, dict[str, str | bool], set[str]]:
    """argv → (config file or None, {key: text, or True for a bare flag}, switches). Raises ConfigError."""
    config_file, given, switches, problems = _split(argv)
    _raise(problems)
    return config_file, given, switches


def switches_in(argv: list[str]) -> set[str]:
    """Which of --help, --help_all, --print_config, --check and --debug are given, whatever else may be wrong."""
    return _split(argv)[2]


def _split(argv: list[str]) -> tuple[str | None, dict[str, str | bool], set[str], list[str]]:
    """What `parse_command_line` returns, and its problems."""
    config_file, given, switches, problems = None, {}, set(), []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "-h":
            word = "--help"
        if word == "--config" and words and not words[0].startswith("--"):  # as others' scripts take it
            word = words.pop(0)
        elif word.startswith("--config="):
            word = word.removeprefix("--config=")
        if not word.startswith("--"):
            if config_file is None:
                config_file = word
            else:
                problems.append(
                    f"{word!r}: only one config file can be given (there is {config_file!r} already); "
                    'build one on another with base = "…", and write keys as --key=value.'
                )
            continue
        key, equals, text = word[2:].partition("=")
        key = key.replace("-", "_")
        if key == "config":
            problems.append("--config needs a file: --config config/quickstart.py.")
        elif key in SWITCHES:
            switches.add(key)
            if equals:
                problems.append(f"--{key} takes no value.")
        elif key not in KEYS and key not in ALIASES:
            problems.append(f"--{key} is not a key{did_you_mean(key, [*KEYS, *ALIASES])}. --help_all lists them all.")
            if not equals and words and not words[0].startswith("--"):
                words.pop(0)
        elif equals:
            given[key] = text
        elif may_be_bare(key):  # a bare flag is True; a value may follow all the same
            kind = bool if key in ALIASES else type_of(key)
            follows = bool(words) and not words[0].startswith("--") and as_type(kind, words[0]) is not NO
            given[key] = words.pop(0) if follows else True
        elif words and not words[0].startswith("--"):
            given[key] = words.pop(0)
        else:
            kind = ALIASES[key].takes() if key in ALIASES else describe_type(key)
            problems.append(f"--{key} needs a value ({kind}): --{key}=…")
    return config_file, given, switches, problems


def read_config_file(path: str | Path) -> dict[str, tuple[Any, str]]:
    """A .py config, or a run's saved .json/.jsonl → {key: (value, origin)}; bases first. Raises ConfigError."""
    values, problems = _read_config_file(path)
    _raise(problems)
    return values


def _read_config_file(path: str | Path, above: tuple[Path, ...] = ()) -> tuple[dict[str, tuple[Any, str]], list[str]]:
    """The usable values of a config file and its bases, and the problems of the others."""
    try:
        file = find_config_file(path)
        if file in above:
            raise ConfigError(f"base = … goes in a circle: {' → '.join(p.name for p in above + (file,))}.")
        if file.suffix in (".json", ".jsonl"):
            return _read_saved_config(file)
        tree, namespace = _execute(file)
    except ConfigError as error:
        return {}, str(error).split("\n")
    lines = _assignment_lines(tree)
    names = {
        name: value for name, value in namespace.items() if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    for name, key in [
        *((name, alias.key) for name, alias in ALIASES.items()),
        *((key, meant) for (key, _), (meant, _) in SPELLINGS.items()),
    ]:
        if name in lines and key is not None:
            lines.setdefault(key, lines[name])
    values, problems, own = {}, [], {}
    if "base" in names:
        base, where = names.pop("base"), f"{shown(file)}:{lines.get('base', 1)}"
        if isinstance(base, str):
            values, problems = _read_config_file(file.parent / base, above + (file,))
            problems = [p if re.match(r"\S+:\d+: ", p) else f"{where}: {p}" for p in problems]
        else:
            problems = [f"{where}: base={base!r} must be the path of a config file."]
    for name, value in without_aliases(names, lambda name: f"{shown(file)}:{lines.get(name, 1)}: ", problems).items():
        where = f"{shown(file)}:{lines.get(name, 1)}"
        if name not in KEYS:
            problems.append(f"{where}: {name!r} is not a key{did_you_mean(name, KEYS)}. Names of the file's own begin with '_'.")
            continue
        try:
            own[name] = (convert(name, value), where)
        except ConfigError as error:
            problems.append(f"{where}: {error}")
    return _overlay(values, own, shown(file), problems), problems


def _execute(file: Path) -> tuple[ast.Module, dict[str, Any]]:
    """A config file as a tree and the namespace it leaves. Raises ConfigError with the line where it fails."""
    try:
        source = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{shown(file)} cannot be read: {error}.") from error
    namespace: dict[str, Any] = {"__name__": "kitbash_config", "__file__": str(file)}
    try:
        tree = ast.parse(source, str(file))
    except Exception as error:
        raise _raised(error, file) from error
    _refuse_annotations(tree, file)
    try:
        exec(compile(tree, str(file), "exec"), namespace)
    except (Exception, SystemExit) as error:
        raise _raised(error, file) from error
    return tree, namespace


def _raised(error: BaseException, file: Path) -> ConfigError:
    """What is said of an error that a config file raises."""
    line = (error.lineno or 1) if isinstance(error, SyntaxError) else _line_in(error, str(file))
    return ConfigError(f"{shown(file)}:{line}: the config file raises {type(error).__name__}: {error}")


def _refuse_annotations(tree: ast.Module, file: Path) -> None:
    """`key: value` is YAML's way to set a key; to Python it is a type without a value. Raises ConfigError."""
    for line in tree.body:
        if isinstance(line, ast.AnnAssign) and line.value is None:
            raise ConfigError(
                f"{shown(file)}:{line.lineno}: '{ast.unparse(line)}' sets nothing. A config file is Python: "
                f"{ast.unparse(line.target)} = {ast.unparse(line.annotation)}."
            )


def may_be_bare(key: str) -> bool:
    """Whether --key alone, without a value, means something: True, or the 'yes' of resume."""
    if key in ALIASES:
        return ALIASES[key].is_flag
    return bool in alternatives(type_of(key)) or key == "resume"


def find_config_file(path: str | Path) -> Path:
    """The file a user means: relative to the working directory, else to the repository. Raises ConfigError."""
    for candidate in (Path(path).expanduser(), PROJECT / path):
        if candidate.is_file():
            return candidate.resolve()
    known = {p.name: f"config/{p.name}" for p in sorted((PROJECT / "config").glob("*.py"))}
    near = did_you_mean(Path(path).name, known).replace("(did you mean '", "(did you mean 'config/")
    raise ConfigError(f"config file {str(path)!r} does not exist{near}. There is: {', '.join(known.values())}.")


def shown(path: Path) -> str:
    """A path as a message shows it: relative to the repository or the working directory where it lies inside."""
    for root in (PROJECT, Path.cwd()):
        if path.is_relative_to(root):
            return str(path.relative_to(root))
    return str(path)


_SAVED = {
    "schema_version": int,
    "format_version": int,
    "config": Mandatory({"*": object}),
    "origins": Mandatory({"*": object}),
}


def _read_saved_config(file: Path) -> tuple[dict[str, tuple[Any, str]], list[str]]:
    """What a run saved of its configuration, without what its preset, other keys or the dataset decided for it.

    Nor where it started from or that it only evaluated: that was that run's business.
    """
    try:
        text = file.read_text(encoding="utf-8")
        document = parse_json(text.split("\n", 1)[0] if file.suffix == ".jsonl" else text)
        check_shape(document, Mandatory(_SAVED))
        saved, origins = document["config"], document["origins"]
        items = {key: (value, str(origins.get(key) or "saved").removeprefix(FROM_CHECKPOINT)) for key, value in saved.items()}
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{shown(file)} is not a saved run: it has no readable 'config' and 'origins' ({error}). "
            "Give a run_*.json, run_*.jsonl or a checkpoint's state.json."
        ) from error
    if "format_version" in document:  # a checkpoint's
        from training.checkpoint import FORMAT_VERSION as known

        version = document["format_version"]
    else:
        version, known = document.get("schema_version", SCHEMA_VERSION), SCHEMA_VERSION
    if (version or 0) > known:
        raise ConfigError(
            f"{shown(file)} has format version {version}, and this version of kitbash reads up to {known}. "
            "Use the version of kitbash that wrote it, or a later one."
        )
    values, problems = {}, []
    for key, (value, origin) in items.items():
        if key not in KEYS and value is None:
            continue  # a component that was registered there declares it; it was not chosen
        if key not in KEYS:
            problems.append(f"{shown(file)}: {key!r} is not a key{did_you_mean(key, KEYS)}.")
        elif (
            value is not None
            and key not in ("init_from", "resume", "eval_only", "notice")
            and origin.split()[0] not in ("preset", "derived", "dataset", "default")
        ):
            try:
                values[key] = (convert(key, value), shown(file))
            except ConfigError as error:
                problems.append(f"{shown(file)}: {error}")
    return values, problems


def _line_in(error: BaseException, filename: str) -> int:
    """The line of `filename` in which an exception arose (the innermost frame there)."""
    line, trace = 1, error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == filename:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _assignment_lines(tree: ast.Module) -> dict[str, int]:
    """name → the line that last binds it in a module."""
    lines = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            lines[node.id] = max(node.lineno, lines.get(node.id, 0))
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            lines[node.name] = node.lineno
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            lines.update({(alias.asname or alias.name): node.lineno for alias in node.names})
    return lines


# ------------------------------------------------------------------------------------------- converting


def convert(key: str, value: Any) -> Any:
    """A value from a file, or text from the command line, as the key's declared type, where nothing is lost.

    '1' → 1.0 and '3e8' → 300000000 are fine, 1.5 for an int is not. Raises ConfigError naming key, value and type.
    """
    if isinstance(value, (TakenBack, InUnits)):  # an alias has said it; settled when all sources have been read
        return value
    text = ",".join(map(str, value)) if key == "layer_pattern" and isinstance(value, (list, tuple)) else value
    converted = typed(key, text)
    if converted is NO:
        raise ConfigError(f"{key}={value!r} is not {describe_type(key)}.")
    return converted


def describe_type(key: str) -> str:
    """A key's type in words: 'a whole number', "'cosine' or 'linear'"; for a component, what there is."""
    import model_components  # noqa: F401  registers what a model can be made of

    return type_in_words(Literal[tuple(components(key))] if key in COMPONENT_KINDS else type_of(key))


# ------------------------------------------------------------------------------------------- resolving


def _overlay(weaker: dict, stronger: dict, where: str, problems: list[str]) -> dict[str, tuple[Any, str]]:
    """`stronger` over `weaker`; of exclusive keys the stronger source's wins, and two in one source are a problem."""
    back = {key: value.value for key, (value, _) in stronger.items() if isinstance(value, TakenBack)}
    merged = {key: found for key, found in weaker.items() if key not in back or found[0] != back[key]}
    stronger = {key: found for key, found in stronger.items() if key not in back}
    for group in EXCLUSIVE:
        chosen = [key for key in group if key in stronger and stronger[key][0] is not None]
        if len(chosen) > 1:
            problems.append(f"{where} sets {' and '.join(chosen)}, which say the same thing; give one of them.")
        for key in group if chosen else ():
            merged.pop(key, None)
    return {**merged, **stronger}


def configure(argv: list[str]) -> Configuration:
    """The command line, without switches, → a checked Configuration. Raises ConfigError with all problems.

    A run that starts from given weights gets its model from there, so that is checked later (training/continuing.py).
    """
    config_file, given, _, problems = _split(argv)
    config_file = config_file or recipe_meant(given)
    values: dict[str, tuple[Any, str]] = {}
    if config_file is not None:
        values, of_file = _read_config_file(config_file)
        problems += of_file
    line = {}
    for key, text in without_aliases(given, lambda key: "the command line: ", problems).items():
        try:
            line[key] = (convert(key, text), "command line")
        except ConfigError as error:
            problems.append(f"--{error}")
    values = _in_tokens(_overlay(values, line, "the command line", problems), problems)
    sized = values.keys() & {"batch_size", "total_batch_tokens"} or values.get("resume", ("no",))[0] != "no"
    if values.get("micro_batch", (None,))[0] == "auto" and not sized:
        problems.append(
            "micro_batch=auto (batch_size=auto) needs the size of the global batch: give --total_batch_tokens=…, or a "
            "batch_size=… in the config file, whose global batch is kept."
        )
    train = TrainConfig.of({key: value for key, (value, _) in values.items()})
    train = replace(train, out_dir=os.path.expanduser(train.out_dir))
    unusable = [key for key in KEYS if any(re.search(rf"\b{key}=", problem) for problem in problems)]
    problems += [
        problem
        for problem in train.problems(with_model=train.init_from == "scratch" and train.resume == "no")
        if not any(re.search(rf"\b{key}=", problem) for key in unusable)
    ]  # nothing that follows from a mistake
    _raise(problems)
    return Configuration(train, {key: values[key][1] if key in values else "default" for key in KEYS})


def _in_tokens(values: dict[str, tuple[Any, str]], problems: list[str]) -> dict[str, tuple[Any, str]]:
    """The values, with those that count in another key's multiplied by it: that key's, or its preset's."""
    settled = dict(values)
    for key, (value, where) in values.items():
        if not isinstance(value, InUnits):
            continue
        preset = PRESETS.get(values["arch_preset"][0] if "arch_preset" in values else KEYS["arch_preset"].default)
        unit = values[value.unit][0] if value.unit in values else preset[1].get(value.unit) if preset else None
        if value.unit not in values and "init_from" in values and values["init_from"][0] != "scratch":
            problems.append(f"{where}: {key} is given in units of {value.unit}, which comes with the weights; give --{key}=….")
        settled[key] = (value.number * (unit or 1), where)
    return settled


def _raise(problems: list[str]) -> None:
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))


# ------------------------------------------------------------------------------------------- printing


def print_config(configuration: Configuration, vocabulary: int | None = None) -> None:
    """Print every key with its value and origin, in the form of a config file.

    vocabulary: the size that the run's dataset has, where a checkpoint says it.
    """
    try:
        values, origins = configuration.resolved(configuration.train.model_config(vocabulary))
    except ValueError as error:  # a run that starts from a checkpoint is not checked without it
        raise ConfigError(str(error)) from error
    for group in GROUPS:
        print(f"# {group}")
        for key in (k for k, f in KEYS.items() if f.metadata["group"] == group):
            value, origin = values[key], origins[key]
            if key == "vocab_size" and vocabulary is None and not configuration.given(key):
                value, origin = None, f"the dataset's, else {values[key]} ({origin})"
            unused = "# " if value is None and type_of(key) is int else ""  # in the place of a key that excludes it
            print(printable(f"{f'{unused}{key} = {value!r}':<48} # {origin}"))
        print()


# The keys that most runs set, for --help; --help_all has the others.
MOST_USED = (
    *("out_dir", "dataset", "init_from", "resume"),
    *("arch_preset", "n_layer", "n_head", "n_embd", "block_size", "dropout"),
    *("batch_size", "gradient_accumulation_steps", "max_iters", "learning_rate", "warmup_iters", "optimizer"),
    *("eval_interval", "device", "dtype", "compile"),
)
HELP_WIDTH = 80


def print_help(usage: str) -> None:
    """Print usage and the keys that are used most, in HELP_WIDTH columns."""
    print(usage.strip())
    print("\nthe keys used most (--help_all: all of them, and other programs' names of them):")
    for key in MOST_USED:
        default = KEYS[key].default
        said = "" if default is None else f"  [{default}]"
        about = textwrap.shorten(KEYS[key].metadata["help"], 2 * (HELP_WIDTH - 12), placeholder=" …")
        print(f"  --{key}{said}\n" + textwrap.fill(about, HELP_WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8))
    print("\n" + textwrap.fill(f"presets (--arch_preset): {', '.join(PRESETS)}", HELP_WIDTH))


def print_help_all(usage: str) -> None:
    """Print usage and every key: group, name, type, default, meaning."""
    print(usage.strip())
    for group in GROUPS:
        print(f"\n{group}:")
        for key, field in KEYS.items():
            if field.metadata["group"] != group:
                continue
            default = "" if field.default is None else f"  default {field.default!r}"
            print(f"  --{key}: {describe_type(key)}{default}\n        {field.metadata['help']}")
    print("\nother names (aliases):")
    for line in help_lines():
        print(f"  {line}")
    print(f"\npresets (--arch_preset): {', '.join(PRESETS)}")
    print(
        "A default in [brackets] is worked out from other keys. --print_config shows the outcome with its origins,"
        "\n--check whether the run can start here and what it will cost; --debug shows the traceback of an error."
    )


def print_introduction() -> None:
    """Print what train.py does and how to begin, for who gives it nothing to do."""
    print("train.py trains a language model that a config file describes; any key can be\ngiven as --key=value.\n")
    print("begin with  python train.py config/quickstart.py   (minutes on a CPU)")
    print("also        python train.py --help                 (the keys used most)\n\nconfigs:")
    files = sorted(path for path in (PROJECT / "config").glob("*.py"))
    for path in files:
        if not path.name.startswith("arch_"):
            about = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
            print(f"  config/{path.name}")
            print(textwrap.fill(" ".join(about.split()), HELP_WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6))
    shapes = ", ".join(path.stem.removeprefix("arch_") for path in files if path.name.startswith("arch_"))
    print(
        textwrap.fill(
            f"config/arch_*.py: one shape with the parts of {shapes}", HELP_WIDTH, initial_indent="  ", subsequent_indent="    "
        )
    )
