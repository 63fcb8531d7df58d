"""What comes in is looked at once, at the door; what goes out is clean; a start that fails leaves nothing behind."""

from __future__ import annotations

import csv
import errno
import json
import shutil
from pathlib import Path

import pytest
from conftest import TINY_RUN
from test_compare import make_run

import compare_architectures
import convert
import sample
import score
import train
from command_line import Failure, check_target, error_text, printable
from data.files import staged
from flops_parameter_counting import detailed_cost_analysis
from model_config import resolve
from training import checkpoint_commands, report
from training.checkpoint import CheckpointStore, read_state

ESCAPES = "\x1b[31mred\x1b[0m\x9b2J\u202e"


@pytest.fixture(scope="module")
def trained(tiny_dataset, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    assert train.main([*TINY_RUN, f"--dataset={tiny_dataset}", "--max_iters=2", f"--out_dir={out}"]) == 0
    return out


def everything(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


# ------------------------------------------------------------------------------------------- 11: what comes in


@pytest.mark.parametrize(
    "number, said",
    [
        (errno.ENOSPC, "Free some space"),
        (errno.EACCES, "Choose a place that you may write to"),
        (errno.EROFS, "Choose a place that you may write to"),
        (errno.ENOTDIR, "Check the path"),
        (errno.EISDIR, "Name a file"),
        (errno.EMFILE, "ulimit"),
    ],
)
def test_what_the_system_refuses_is_said_with_path_and_remedy(number, said):
    """Issue 14.11: "[Errno 28] No space left on device: '/mnt/x'" stood alone."""
    text = error_text(OSError(number, "Reason", "/mnt/x"), "")
    assert text.startswith("/mnt/x: Reason. ") and said in text and "Errno" not in text


@pytest.mark.parametrize("option", ["html", "plot", "csv", "json", "markdown"])
@pytest.mark.parametrize("target", ["missing/report", "file/report", "."])
def test_a_report_that_cannot_be_written_is_said_before_the_work(option, target, tmp_path, capsys):
    """Issue 14.11."""
    (tmp_path / "file").write_text("")
    assert compare_architectures.main([f"--{option}={tmp_path / target}", str(tmp_path / "no runs here")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"compare_architectures.py: --{option}=") and "runs" not in said.split(":")[1]


def test_a_plot_that_cannot_be_written_is_said_before_the_work(tmp_path, capsys):
    """Issue 14.11."""
    assert detailed_cost_analysis.main(["--grid_search=1e20", f"--plot={tmp_path}/missing/x.png"]) == 2
    assert "--plot=" in capsys.readouterr().err


def test_a_target_in_a_folder_that_is_read_only(tmp_path, monkeypatch):
    """Issue 14.11."""
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match=r"--html=.*cannot be written: permission denied"):
        check_target("--html", tmp_path / "x.html")


def test_a_conversion_to_where_nothing_can_be_written(trained, tmp_path, capsys):
    """Issue 14.11."""
    (tmp_path / "file").write_text("")
    for command in (convert.main, lambda argv: checkpoint_commands.main(["consolidate", *argv])):
        for target, code in (("file/x", 1), ("file", 2)):
            assert command([str(trained), str(tmp_path / target)]) == code
            said = capsys.readouterr().err
            assert "Errno" not in said and "--debug" not in said and str(tmp_path / "file") in said
    assert everything(tmp_path) == [tmp_path / "file"]


def test_an_empty_file_of_prompts(tmp_path, capsys):
    """Issue 14.11: it said "prompt_ids must be token ids"."""
    assert sample.main([str(tmp_path), "--prompts_file=/dev/null"]) == 2
    assert capsys.readouterr().err == "sample.py: The file '/dev/null' has no prompts; write one a line.\n"


def test_a_negative_count_in_meta_json(tiny_dataset, tmp_path, capsys):
    """Issue 14.11: bytes of -10 gave bits per byte below nothing."""
    folder = shutil.copytree(tiny_dataset, tmp_path / "data")
    meta = json.loads((folder / "meta.json").read_text())
    meta["splits"]["val"]["bytes"] = -10
    (folder / "meta.json").write_text(json.dumps(meta))
    assert train.main([*TINY_RUN, f"--dataset={folder}", "--max_iters=1", f"--out_dir={tmp_path / 'out'}"]) == 1
    assert "splits.val.bytes is -10, not a whole number from 0" in capsys.readouterr().err


def test_one_broken_score_does_not_stop_a_comparison(tmp_path, capsys):
    """Issue 14.11: deeply nested JSON in any document."""
    run, other = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    (run.parent / "score_1.json").write_text("[" * 50_000 + "]" * 50_000)
    (run.parent / "score_2.json").write_text(json.dumps({"text": {"name": "x"}, "model": {"step": 1}, "score": {"loss": "1"}}))
    assert compare_architectures.main([str(run), str(other)]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("key", ["max_iters", "max_tokens", "batch_size", "eval_iters", "collective_timeout", "epochs"])
def test_a_number_that_no_run_has_is_a_usage_error(key, capsys):
    """Issue 14.11: numbers have upper limits."""
    assert train.main([f"--{key}=1e22", "--print_config"]) == 2
    assert f"{key}=1" in (said := capsys.readouterr().err) and "must be below" in said


def test_a_score_is_json_though_the_perplexity_is_infinite(tmp_path):
    """Issue 14.11: what is written is what can be read."""
    target = score.write_score({"score": {"loss": 800.0, "perplexity": float("inf"), "bytes": None}}, str(tmp_path / "s"), None)
    assert json.loads(target.read_text(), parse_constant=pytest.fail)["score"] == {
        "loss": 800.0,
        "perplexity": None,
        "bytes": None,
    }


# ------------------------------------------------------------------------------------------- 12: what goes out


@pytest.fixture
def named(tmp_path) -> list[str]:
    """Two runs of datasets whose names are not what one hopes for."""
    paths = []
    for number, name in enumerate(("=HYPERLINK(1)", "<script>alert(1)</script> [x](javascript:y) " + ESCAPES + " $\\frac$")):
        dataset = {"name": name, "fingerprint": "f" * 16, "tokenizer": None, "splits": {}}
        paths.append(str(make_run(tmp_path / str(number), f"--dataset={name}", dataset=dataset, hardware=name)))
    return paths


def test_reports_are_clean(named, tmp_path, capsys):
    """Issue 14.12: =HYPERLINK in a CSV, <script> in Markdown, escapes on the terminal, and a formula in matplotlib."""
    files = {name: tmp_path / f"report.{name}" for name in compare_architectures.WRITERS}
    words = [*named, "--force", "--group_by=dataset", *(f"--{name}={path}" for name, path in files.items())]
    words[-5:] = [word if "--plot" not in word else f"--plot={tmp_path / 'p.png'}" for word in words[-5:]]
    assert compare_architectures.main(words) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    assert not set("\x1b\x9b\u202e") & set(said.out + said.err)
    cells = [cell for row in csv.reader(files["csv"].open()) for cell in row]
    assert "'=HYPERLINK(1)" in cells and not any(cell.startswith("=") for cell in cells)
    markdown = files["markdown"].read_text()
    assert (
        "&lt;script&gt;" in markdown and "<script" not in markdown and "](javascript" not in markdown and "\x1b" not in markdown
    )
    assert "<script>alert" not in files["html"].read_text()


def test_names_in_a_checkpoint_reach_no_terminal(trained, tmp_path, capsys):
    """Issue 14.12."""
    out = shutil.copytree(trained, tmp_path / "run")
    state = next(out.glob("checkpoints/step_*/state.json"))
    content = json.loads(state.read_text())
    content["dataset"]["name"] = content["model"]["name"] = ESCAPES
    state.write_text(json.dumps(content))
    checkpoint_commands.main(["inspect", str(out)])  # damaged, which is said beside it
    said = capsys.readouterr()
    assert printable(ESCAPES) in said.out and "\x1b" not in said.out + said.err


def test_a_model_writes_no_controls_to_a_terminal(monkeypatch, capsys):
    """Issue 14.12."""
    sample.show("plain" + ESCAPES)
    assert capsys.readouterr().out == "plain" + ESCAPES  # a pipe gets what the model says
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    sample.show("plain" + ESCAPES)
    assert capsys.readouterr().out == "plain" + printable(ESCAPES)


# ------------------------------------------------------------------------------------------- 13: what is left behind


@pytest.mark.parametrize("flag", ["--dataset=/nowhere/at/all", "--device=cuda:99", "--init_from=weights:/nowhere"])
def test_a_start_that_fails_leaves_nothing_behind(flag, tiny_dataset, tmp_path, capsys):
    """Issue 14.13."""
    out = tmp_path / "deep" / "run"
    assert train.main([*TINY_RUN, f"--dataset={tiny_dataset}", f"--out_dir={out}", "--max_iters=1", flag]) in (1, 2)
    assert everything(tmp_path) == []


def test_a_start_that_fails_beside_other_files_leaves_them_alone(tmp_path, capsys):
    """Issue 14.13."""
    (tmp_path / "notes.txt").write_text("mine")
    assert train.main([*TINY_RUN, "--dataset=/nowhere/at/all", f"--out_dir={tmp_path}"]) == 1
    assert everything(tmp_path) == [tmp_path / "notes.txt"]


def test_a_log_whose_tracker_cannot_start_is_taken_away(tiny_dataset, tmp_path, monkeypatch, capsys):
    """Issue 14.13: an empty run_….jsonl stayed, which comparisons then met."""

    def fails(*_):
        raise Failure("no tracker")

    monkeypatch.setattr(report, "open_trackers", fails)
    assert train.main([*TINY_RUN, f"--dataset={tiny_dataset}", f"--out_dir={tmp_path / 'run'}", "--max_iters=1"]) == 1
    assert everything(tmp_path) == []


def test_a_second_run_in_a_locked_folder_leaves_the_lock(tmp_path):
    """Issue 14.13: the lock is of the run that has it."""
    with CheckpointStore(tmp_path).lock():
        with pytest.raises(Failure, match="Another run"), CheckpointStore(tmp_path).lock():
            pass
        assert (tmp_path / ".lock").exists()
    assert everything(tmp_path) == []


@pytest.mark.parametrize("command", ["convert", "consolidate"])
def test_a_conversion_that_fails_leaves_its_target_as_it_was(command, trained, tmp_path, monkeypatch, capsys):
    """Issue 14.13."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    monkeypatch.setattr(convert, "special_tokens", full)  # after the tensors are written
    monkeypatch.setattr(checkpoint_commands, "write_manifest", full)
    target = tmp_path / "deep" / "target"
    main = convert.main if command == "convert" else lambda words: checkpoint_commands.main(["consolidate", *words])
    assert main([str(trained), str(target)]) == 1
    assert "Free some space" in capsys.readouterr().err and everything(tmp_path) == []
    target.mkdir(parents=True)
    assert main([str(trained), str(target)]) == 1
    assert everything(tmp_path) == [tmp_path / "deep", target]


def test_a_folder_comes_into_being_with_its_last_file(tmp_path):
    """Issue 14.13: whoever looks meanwhile, or after a kill, sees no config.json without its tensors."""
    target = tmp_path / "target"
    (target / ".writing").mkdir(parents=True)
    (target / ".writing" / "of a killed process").write_text("")
    with staged(target, last="config.json") as folder:
        for name in ("config.json", "z.safetensors"):
            (folder / name).write_text(name)
        assert [path.name for path in target.iterdir()] == [".writing"]
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "z.safetensors"]


def test_an_import_that_fails_leaves_no_folder(trained, tmp_path, monkeypatch, capsys):
    """Issue 14.13."""
    assert convert.main([str(trained), str(tmp_path / "theirs"), "--no_check"]) == 0
    before = everything(tmp_path)
    monkeypatch.setattr(
        "training.checkpoint.write_manifest", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full"))
    )
    assert convert.main([str(tmp_path / "theirs"), str(tmp_path / "deep" / "ours")]) == 1
    assert everything(tmp_path) == before


# ------------------------------------------------------------------------------------------- 10: a peak that is given


def test_mfu_is_of_the_peak_that_is_given(tiny_dataset, tmp_path, capsys):
    """Issue 14.10: peak_tflops, for a device that no table lists."""
    words = [*TINY_RUN, f"--dataset={tiny_dataset}", "--max_iters=2", f"--out_dir={tmp_path / 'run'}", "--peak_tflops=0.5"]
    assert train.main(words) == 0
    (log,) = (tmp_path / "run").glob("run_*.json")
    document = json.loads(log.read_text())
    assert document["peak"] == {"flops": 0.5e12, "source": "as peak_tflops says", "measured": False}
    step, a_token = document["last_step"], document["model"]["flops_per_token"]["full"]
    assert step["mfu"] == pytest.approx(step["tokens_per_s"] * a_token / 0.5e12)


# ------------------------------------------------------------------------------------------- 16: what will run


def test_print_config_of_a_run_that_goes_on_shows_what_will_run(trained, tiny_dataset, capsys):
    """Issue 14.16: it showed what today's files and defaults say."""
    assert train.main([f"--out_dir={trained}", "--resume", "--max_iters=9", f"--dataset={tiny_dataset}", "--print_config"]) == 0
    said = capsys.readouterr().out
    namespace: dict = {}
    exec(said, namespace)
    model = resolve("custom", **read_state(next(trained.glob("checkpoints/step_*")))["model"]["config"])
    assert {key: namespace[key] for key in ("n_layer", "n_embd", "vocab_size", "block_size", "batch_size", "max_iters")} == dict(
        n_layer=model.n_layer, n_embd=model.n_embd, vocab_size=model.vocab_size, block_size=16, batch_size=4, max_iters=9
    )
    assert "# checkpoint: command line" in said and everything(trained)


def test_print_config_of_a_run_that_cannot_go_on(tmp_path, capsys):
    """Issue 14.16."""
    assert train.main([f"--out_dir={tmp_path / 'x'}", "--resume", "--print_config"]) == 1
    assert "Nothing to resume" in capsys.readouterr().err and everything(tmp_path) == []
