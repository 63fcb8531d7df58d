"""Every command of the README works as it stands there (with a tiny model and few steps, so that it takes no time)."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import ROOT

from tests.distributed.launching import shared_launcher

TINY = ("--n_layer=1", "--n_head=2", "--n_embd=32", "--eval_iters=1", "--log_interval=1")


def commands(language: str) -> list[str]:
    """The lines of the README's code blocks in this language, with their comments."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture
def small_pydocs(tmp_path, monkeypatch) -> Path:
    """data/ is elsewhere, and `pydocs` a hundred of its documents: the whole is tests/test_corpora.py's. Returns data/."""
    from data import dataset_writer, mixture, preparation, prepare_command, token_dataset

    data = tmp_path / "data"
    for module in (token_dataset, preparation, dataset_writer, mixture, prepare_command):
        monkeypatch.setattr(module, "DATA_DIR", data)
    whole = preparation.EMBEDDED["pydocs"]
    few = functools.cache(lambda: list(itertools.islice(whole.documents(), 100)))
    monkeypatch.setitem(preparation.EMBEDDED, "pydocs", dataclasses.replace(whole, documents=lambda: iter(few())))
    return data


def test_every_command_of_the_readme_runs(tmp_path, small_pydocs, preloaded, monkeypatch, run_python, capsys):
    import ablate
    import compare_architectures
    import convert
    import sample
    import train
    from data.prepare_command import embedded, run_recipe, run_textfile
    from flops_parameter_counting import detailed_cost_analysis
    from training import checkpoint_commands

    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "README.md", tmp_path)
    iterations, launched, dataset = 1, 0, f"--dataset={small_pydocs / 'pydocs'}"
    for line in commands("bash"):
        words = shlex.split(line, comments=True)
        program, arguments = words[1] if len(words) > 1 else "", words[2:]
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)  # CI runs `make test`
            continue
        if words[0] == "echo":
            text, _, rest = line.partition(" | ")
            prompt, sampled = shlex.split(text)[1], shlex.split(rest, comments=True)
            capsys.readouterr()
            (tmp_path / "prompt").write_text(prompt + "\n")
            monkeypatch.setattr("sys.stdin", open(tmp_path / "prompt"))
            assert sampled[:2] == ["python", "sample.py"]
            assert sample.main([*sampled[2:], "--max_new_tokens=5"]) == 0
            assert capsys.readouterr().out.startswith(prompt)
            continue
        if words[0] == "torchrun":
            iterations, launched, at = iterations + 1, launched + 1, words.index("train.py")
            given = (*words[at + 1 :], *TINY, f"--max_iters={iterations}", dataset)
            if launched == 1:
                torchrun = ("-m", "torch.distributed.run", *words[1:at])
                result = run_python(*torchrun, ROOT / "train.py", *given, cwd=tmp_path)
                assert result.returncode == 0, (line, result.stderr)
            else:  # two processes as torchrun starts them, in a fraction of its time
                assert words[1:at] == ["--standalone", "--nproc_per_node=2"]
                group = shared_launcher().run(*given, inject=f"import os; os.chdir({str(tmp_path)!r})")
                assert group.codes == {0: 0, 1: 0}, (line, group.err)
            continue
        assert words[0] == "python"
        code = 0
        if words[1:3] == ["-m", "training.checkpoint"]:
            code = checkpoint_commands.main(words[3:])
        elif program == "train.py":
            iterations += 1
            if any(word.startswith("--init_from=hf:") for word in arguments):  # the model is given
                extra = ("--max_iters=2", "--eval_iters=1")
            else:
                extra = (
                    () if {"--help", "--help_all", "--print_config"} & set(arguments) else (*TINY, f"--max_iters={iterations}")
                )
            code = train.main([*arguments, *extra])
        elif program == "convert.py":
            code = convert.main(arguments)
        elif program == "sample.py":
            code = sample.main([*arguments, "--max_new_tokens=5"])
        elif program == "flops_parameter_counting/detailed_cost_analysis.py":
            code = detailed_cost_analysis.main(arguments)
        elif program == "ablate.py":
            code = ablate.main([*arguments, *TINY, "--max_iters=2", "--block_size=32", "--batch_size=2", dataset])
        elif program == "compare_architectures.py":
            code = compare_architectures.main([*arguments, "--force"])
        elif program == "data/pydocs/prepare.py":
            code = run_recipe(embedded("pydocs"), [*arguments, f"--out={tmp_path / 'pydocs'}"])
        elif program == "data/textfile/prepare.py":
            code = run_textfile(arguments)
        elif program == "-c":
            exec(arguments[0], {})
        else:
            raise AssertionError(f"no rule for {line!r}")
        assert code == 0, (line, capsys.readouterr().err)


def test_the_python_of_the_readme_runs():
    import torch

    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    namespace = {"tokens": torch.zeros(1, 4, dtype=torch.long)}
    exec(block, namespace)
    assert namespace["logits"].shape == (1, 4, 256)
    assert namespace["config"].name in block


def test_the_table_of_configs_is_complete_and_its_N_are_right():
    from configurator import configure
    from flops_parameter_counting.parameters import count_parameters

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for file in (ROOT / "config").glob("*.py"):
        assert file.name in readme, file.name
    assert all(
        (ROOT / "config" / name).is_file() for name in re.findall(r"\w+\.?\w*\.py", readme) if name.startswith(("arch_", "full_"))
    )
    for name, vocab, shown in (("quickstart", 4096, 4.3), ("shakespeare_char_cpu", 65, 0.8)):
        config = configure([str(ROOT / "config" / f"{name}.py")]).train.model_config(vocab)
        assert round(count_parameters(config) / 1e6, 1) == shown
