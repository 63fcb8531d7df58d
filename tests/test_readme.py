"""Every command of the README works as it stands there (with a tiny model and few steps, so that it takes no time)."""

from __future__ import annotations

import re
import shlex
import shutil

import pytest
from conftest import ROOT

TINY = ("--n_layer=1", "--n_head=2", "--n_embd=32", "--eval_iters=1", "--log_interval=1")


def commands(language: str) -> list[str]:
    """The lines of the README's code blocks in this language, with their comments."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def test_every_command_of_the_readme_runs(tmp_path, monkeypatch, run_python, capsys):
    import ablate
    import compare_architectures
    import convert
    import sample
    import train
    from data.preparation import ensure_prepared, prepare_embedded, prepare_textfile
    from flops_parameter_counting import detailed_cost_analysis
    from training import checkpoint_commands

    ensure_prepared("pydocs")
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "README.md", tmp_path)
    made, iterations = ROOT / "data" / "my_text", 1
    if made.exists():
        pytest.skip("data/my_text is somebody's")
    try:
        for line in commands("bash"):
            words = shlex.split(line, comments=True)
            program, arguments = words[1] if len(words) > 1 else "", words[2:]
            if words[0] == "make":
                target = words[1]
                assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)  # CI runs `make test`
                continue
            if words[0] == "echo":
                text, _, rest = line.partition(" | ")
                sampled = shlex.split(rest, comments=True)
                result = run_python(
                    ROOT / sampled[1], *sampled[2:], "--max_new_tokens=5", cwd=tmp_path, input=shlex.split(text)[1]
                )
                assert result.returncode == 0 and result.stdout.startswith(shlex.split(text)[1]), result.stderr
                continue
            if words[0] == "torchrun":
                iterations += 1
                at = words.index("train.py")
                result = run_python(
                    "-m",
                    "torch.distributed.run",
                    *words[1:at],
                    ROOT / "train.py",
                    *words[at + 1 :],
                    *TINY,
                    f"--max_iters={iterations}",
                    cwd=tmp_path,
                    env={"OMP_NUM_THREADS": "1"},
                )
                assert result.returncode == 0, (line, result.stderr)
                continue
            assert words[0] == "python"
            if words[1:3] == ["-m", "training.checkpoint"]:
                code = checkpoint_commands.main(words[3:])
            elif program == "train.py":
                iterations += 1
                if any(word.startswith("--init_from=hf:") for word in arguments):  # the model is given
                    code = train.main([*arguments, "--max_iters=2", "--eval_iters=1"])
                    assert code == 0, capsys.readouterr().err
                    continue
                extra = () if {"--help", "--print_config"} & set(arguments) else (*TINY, f"--max_iters={iterations}")
                code = train.main([*arguments, *extra])
            elif program == "convert.py":
                code = convert.main(arguments)
            elif program == "sample.py":
                code = sample.main([*arguments, "--max_new_tokens=5"])
            elif program == "flops_parameter_counting/detailed_cost_analysis.py":
                code = detailed_cost_analysis.main(arguments)
            elif program == "ablate.py":
                code = ablate.main([*arguments, *TINY, "--max_iters=2", "--block_size=32", "--batch_size=2"])
            elif program == "compare_architectures.py":
                code = compare_architectures.main([*arguments, "--force"])
            elif program == "data/pydocs/prepare.py":
                code = prepare_embedded("pydocs", [*arguments, f"--out={tmp_path / 'pydocs'}"])
            elif program == "data/textfile/prepare.py":
                code = prepare_textfile(arguments)
            elif program == "-c":
                code = run_python("-c", arguments[0]).returncode
            else:
                raise AssertionError(f"no rule for {line!r}")
            assert code == 0, (line, capsys.readouterr().err)
    finally:
        shutil.rmtree(made, ignore_errors=True)


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
