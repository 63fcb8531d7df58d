"""docs/TRAINING_GUIDE.md: every command is one that the programs take, and every figure the one that its program prints."""

from __future__ import annotations

import contextlib
import io
import re
import shlex

import pytest
from conftest import ROOT

from configurator import configure

GUIDE = (ROOT / "docs" / "TRAINING_GUIDE.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, re.M | re.S)


LINES = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("line", [line for line in LINES if "train.py" in line])
def test_a_command_of_train_py_is_a_configuration_that_can_be(line):
    words = shlex.split(line, comments=True)
    given = words[words.index("train.py") + 1 :]
    train = configure([word for word in given if word != "--check"]).train
    model = train.model_config(50257)
    if words[0] == "torchrun":
        processes = int(re.search(r"--nproc_per_node=(\d+)", line).group(1))
        assert train.sequences_per_iteration(model.block_size) % processes == 0
    assert train.problems() == []


def test_the_other_commands_are_taken_by_their_programs():
    import compare_architectures
    import convert
    import score
    from data import show
    from flops_parameter_counting import detailed_cost_analysis

    parsers = {"score.py": score, "convert.py": convert, "compare_architectures.py": compare_architectures, "data/show.py": show}
    seen = set()
    for line in (line for line in LINES if "train.py" not in line):
        words = shlex.split(line, comments=True)
        if words[0] in ("tail", "tensorboard"):
            continue
        program, given = words[1], words[2:]
        seen.add(program)
        assert words[0] == "python" and (ROOT / program).is_file(), line
        if program.endswith("detailed_cost_analysis.py"):
            options = detailed_cost_analysis.parse(given)
            if options.backward_config:
                assert detailed_cost_analysis.find_question(options.backward_config).count == 4
        elif program in parsers:
            parsers[program].make_parser().parse_args(given)
        else:
            assert program.startswith("data/") and program.endswith("/prepare.py")
            assert set(given) <= {"--dry_run"}
    assert seen >= {"score.py", "convert.py", "compare_architectures.py", "data/show.py"}


@pytest.mark.slow
def test_the_predictions_are_what_the_block_prints():
    """python -m pytest -m slow tests/test_guide.py: 24 predictions of memory for two large models."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(blocks("python")[0], {})
    assert printed.getvalue() == blocks("text")[0]


def test_the_words_about_the_rules_are_those_of_the_code():
    from training import observing

    said = re.search(r"median \+ max\((\d+) spreads, ([\d.]+)\) of the last (\d+)", GUIDE).groups()
    assert tuple(map(float, said)) == (observing.SPREADS, observing.LEAST, observing.WINDOW)
    assert f"the first {observing.FEW} losses" in GUIDE
    for preset in ("lm_tiny", "lm_small", "lm_medium"):
        from flops_parameter_counting.parameters import count_parameters
        from model_config import resolve

        model = resolve(preset)
        shape = f"{model.n_layer}, {model.n_head}, {model.n_embd}, {model.block_size} | {count_parameters(model):,}"
        assert f"| `{preset}` | {shape} |" in GUIDE
