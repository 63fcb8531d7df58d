"""python -m training.checkpoint: what it says of a checkpoint is what is in it, and what it takes out is the model."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_RUN
from safetensors.torch import load_file

import convert
import sample
import train
from model_builder import build_model
from model_config import ModelConfig
from tests.distributed.launching import shared_launcher
from training.checkpoint import CheckpointStore, load_model
from training.checkpoint_commands import main

SMALL = (*TINY_RUN, "--n_head=3", "--n_embd=33", "--position_encoding=learned_absolute", "--max_iters=4")
KINDS = ("alone", "fsdp")  # saved by one process; sharded over two, unevenly: 33 rows are 17 and 16


@pytest.fixture(scope="module")
def out_dirs(tiny_dataset, tmp_path_factory) -> dict[str, Path]:
    """The out_dirs of a run by one process and of the same run by two. Not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    group = shared_launcher().start(*SMALL, f"--dataset={tiny_dataset}", f"--out_dir={folder / 'fsdp'}", "--parallelism=fsdp")
    assert train.main([*SMALL, f"--dataset={tiny_dataset}", f"--out_dir={folder / 'alone'}"]) == 0
    assert group.wait() == [0, 0], group.err
    return {kind: folder / kind for kind in KINDS}


@pytest.fixture(params=KINDS)
def out_dir(request, out_dirs, capsys) -> Path:
    capsys.readouterr()
    return out_dirs[request.param]


def latest(out_dir: Path) -> Path:
    return CheckpointStore(out_dir).pointed("latest")


def model_of(checkpoint: Path) -> torch.nn.Module:
    """The architecture of a checkpoint, without weights."""
    return build_model(
        ModelConfig.from_dict(json.loads((checkpoint / "state.json").read_text())["model"]["config"]), device="meta"
    )


def rows(text: str) -> dict[str, str]:
    """The labelled lines of `inspect`; the second one about the model, its tensors, as 'model 2'."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        if not line.startswith("  "):
            label = line[:11].strip()
            found[f"{label} 2" if label in found else label] = line[11:]
    return found


def spoil(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 0x10
    file.write_bytes(data)


# ------------------------------------------------------------------------------------------- inspect


def test_inspect_says_what_is_in_a_checkpoint(out_dir, capsys):
    checkpoint = latest(out_dir)
    assert main(["inspect", str(checkpoint)]) == 0
    found, model = rows(capsys.readouterr().out), model_of(checkpoint)
    state = json.loads((checkpoint / "state.json").read_text())
    assert found["checkpoint"] == str(checkpoint) and found["intact"].startswith("yes")
    assert found["step"] == "4" and found["tokens"] == f"{4 * 4 * 16:,}"
    assert model.config.name in found["model"] and model.config.fingerprint in found["model"]
    numbers = len(list(model.parameters())), sum(p.numel() for p in model.parameters())
    assert found["model 2"] == f"{numbers[0]} tensors, {4 * numbers[1] / 1e6:,.1f} MB"
    assert found["optimizer"] == f"{3 * numbers[0]} tensors, {(8 * numbers[1] + 4 * numbers[0]) / 1e6:,.1f} MB"
    saved_by = "2 process(es), parallelism fsdp" if out_dir.name == "fsdp" else "1 process(es), parallelism none"
    assert found["saved by"].startswith(saved_by) and "float32, 1 thread(s)" in found["saved by"]
    assert str(state["progress"]["val_loss"]) in found["loss"] and state["dataset"]["fingerprint"] in found["dataset"]
    size = sum(file.stat().st_size for file in checkpoint.iterdir() if file.name != "manifest.json")
    assert found["files"] == f"{len(list(checkpoint.iterdir())) - 1}, {size / 1e6:,.1f} MB"
    assert f"torch {torch.__version__}" in found["versions"]


def text_about(checkpoint: Path, capsys) -> str:
    assert main(["inspect", str(checkpoint)]) == 0
    return capsys.readouterr().out


def test_inspect_lists_every_tensor_with_its_whole_shape(out_dir, capsys):
    assert main(["inspect", str(out_dir), "--tensors"]) == 0
    _, table = capsys.readouterr().out.split("\n\n")
    listed = {name: (dtype, shape, int(parts)) for name, dtype, shape, parts in map(str.split, table.splitlines()[2:])}
    for name, parameter in model_of(latest(out_dir)).named_parameters():
        shape = "×".join(map(str, parameter.shape))
        for stored in (f"model.{name}", f"optimizer.{name}.exp_avg", f"optimizer.{name}.exp_avg_sq"):
            assert listed.pop(stored) == ("F32", shape, 2 if out_dir.name == "fsdp" else 1)
        listed.pop(f"optimizer.{name}.step")
    assert {name.split(".")[0] for name in listed} == {"rng", "loss_scale"}


def test_inspect_takes_an_out_dir_a_folder_of_checkpoints_or_one(out_dir, capsys):
    texts = {text_about(path, capsys) for path in (out_dir, out_dir / "checkpoints", latest(out_dir))}
    assert len(texts) == 1


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda folder: spoil(sorted(folder.glob("shard-*"))[-1]), ("checksum",)),
        (lambda folder: (folder / "tokenizer.json").unlink(), ("tokenizer.json is missing",)),
        (lambda folder: sorted(folder.glob("shard-*"))[0].write_bytes(b"\x01"), ("shard-00001",)),
        (lambda folder: sorted(folder.glob("shard-*"))[0].write_bytes(b"\xff" * 100), ("shard-00001",)),
        (lambda folder: (folder / "state.json").write_text("{}"), ("state.json", "format version")),
        (lambda folder: (folder / "state.json").unlink(), ("state.json",)),
        (lambda folder: (folder / "manifest.json").write_text("nonsense"), ("manifest.json",)),
        (lambda folder: (folder / "manifest.json").write_text("{}"), ("manifest",)),
    ],
)
def test_inspect_of_a_damaged_checkpoint_says_what_and_fails(out_dirs, tmp_path, capsys, damage, words):
    folder = Path(shutil.copytree(latest(out_dirs["fsdp"]), tmp_path / "step_000000004"))
    damage(folder)
    assert main(["inspect", str(folder)]) == 1
    captured = capsys.readouterr()
    said = captured.err if captured.err else rows(captured.out)["intact"]
    assert "damaged" in said or "format" in said
    assert all(word in said for word in words) and "Traceback" not in captured.err, said


def test_inspect_of_nothing_and_a_bad_command_line_are_sentences(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nowhere")]) == 1 and "does not exist" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path)]) == 1 and "no checkpoint" in capsys.readouterr().err
    assert main([]) == 2 and main(["inspect"]) == 2 and main(["consolidate", "x"]) == 2
    assert "Traceback" not in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- consolidate


def test_the_consolidated_model_is_one_plain_safetensors_file_with_the_shards_put_together(out_dir, tmp_path, capsys):
    """Put together here by hand: fsdp shards the first dimension, in the order of the ranks."""
    assert main(["consolidate", str(out_dir), str(tmp_path / "one")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'one'}\n"
    found = load_file(tmp_path / "one" / "model.safetensors")
    parts: dict[str, list[torch.Tensor]] = {}
    for file in sorted(latest(out_dir).glob("shard-*.safetensors")):
        for name, tensor in load_file(file).items():
            if name.startswith("model."):
                parts.setdefault(name, []).append(tensor)
    expected = {name: torch.cat(tensors) for name, tensors in parts.items()}
    assert found.keys() == expected.keys() == {f"model.{name}" for name, _ in model_of(latest(out_dir)).named_parameters()}
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert sorted(file.name for file in (tmp_path / "one").iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "state.json",
        "tokenizer.json",
    ]


def test_both_runs_have_the_same_model_within_rounding(out_dirs, tmp_path):
    models = [load_model(out_dirs[kind])[0] for kind in KINDS]
    for one, other in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)  # 4 steps of at most 6e-4 each


def test_everything_takes_the_consolidated_folder_and_says_the_same(out_dir, tmp_path, capsys):
    one = tmp_path / "one"
    assert main(["consolidate", str(out_dir), str(one)]) == 0
    tokens = torch.arange(10, 26)[None]
    (model, tokenizer), (again, _) = load_model(out_dir), load_model(one)
    with torch.no_grad():
        assert torch.equal(model(tokens), again(tokens))
    assert tokenizer.decode(tokenizer.encode("def")) == "def"
    texts = []
    for path in (out_dir, one):
        capsys.readouterr()
        assert (
            sample.main([str(path), "--prompt=def ", "--max_new_tokens=12", "--seed=3", "--device=cpu", "--dtype=float32"]) == 0
        )
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("def ")
    assert main(["inspect", str(one), "--tensors"]) == 0
    text = capsys.readouterr().out
    assert "yes, every file" in text and "optimizer" not in text


def test_the_command_runs_from_anywhere_and_prints_the_folder(out_dirs, tmp_path, run_python):
    result = run_python(
        "-m", "training.checkpoint", "consolidate", out_dirs["fsdp"], "one", cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "one\n", "")


def test_convert_exports_the_same_from_the_consolidated_folder(tiny_dataset, tmp_path, preloaded):
    arguments = [a for a in SMALL if "position" not in a]  # Hugging Face's Llama has rotary positions
    group = shared_launcher().run(
        *arguments,
        "--n_head=2",
        "--n_embd=32",
        "--parallelism=zero1",
        f"--dataset={tiny_dataset}",
        f"--out_dir={tmp_path / 'out'}",
    )
    assert set(group.codes.values()) == {0}, group.err
    assert main(["consolidate", str(tmp_path / "out"), str(tmp_path / "one")]) == 0
    for source in ("out", "one"):
        assert convert.main([str(tmp_path / source), str(tmp_path / f"exported_{source}"), "--no_check"]) == 0
    one, other = (load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("exported_out", "exported_one"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one) and one


def test_a_consolidated_model_cannot_be_resumed_but_started_from(out_dirs, tiny_dataset, tmp_path, capsys):
    one = tmp_path / "one"
    assert main(["consolidate", str(out_dirs["fsdp"]), str(one)]) == 0
    capsys.readouterr()
    run = [
        f"--dataset={tiny_dataset}",
        f"--out_dir={tmp_path / 'new'}",
        "--batch_size=4",
        "--device=cpu",
        "--dtype=float32",
        "--threads=1",
        "--eval_iters=1",
    ]
    assert train.main([*run, f"--init_from={one}"]) == 2
    error = capsys.readouterr().err
    assert f"--init_from=weights:{one}" in error and len(error.splitlines()) == 1
    assert train.main([*run, f"--init_from=weights:{one}", "--eval_only"]) == 0
    log = next((tmp_path / "new").glob("run_*.jsonl")).read_text().splitlines()
    evaluation = next(event for event in map(json.loads, log) if event["event"] == "eval")
    saved = json.loads((latest(out_dirs["fsdp"]) / "state.json").read_text())["progress"]["val_loss"]
    assert evaluation["val_loss"] == pytest.approx(saved, rel=1e-6)  # summed here by one process, there by two


def test_consolidate_needs_an_intact_model_and_a_new_folder(out_dirs, tmp_path, capsys):
    source = Path(shutil.copytree(latest(out_dirs["fsdp"]), tmp_path / "step_000000004"))
    files = json.loads((source / "manifest.json").read_text())["files"]
    spoil(next(source / name for name, entry in files.items() if entry.get("holds") == ["optimizer"]))
    assert main(["consolidate", str(source), str(tmp_path / "one")]) == 0  # does not need the optimizer
    assert main(["consolidate", str(source), str(tmp_path / "one")]) == 2
    assert "is not empty" in capsys.readouterr().err
    spoil(next(source / name for name, entry in files.items() if entry.get("holds") == ["model"]))
    assert main(["consolidate", str(source), str(tmp_path / "two")]) == 1
    assert "checksum" in capsys.readouterr().err and not (tmp_path / "two").exists()


def test_a_consolidation_that_is_cut_short_leaves_no_checkpoint(out_dirs, tmp_path, run_python):
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY)); "
        "from training.checkpoint_commands import main; sys.exit(main(sys.argv[1:]))"
    )
    result = run_python("-c", limited, "consolidate", out_dirs["fsdp"], tmp_path / "one")
    assert result.returncode == 1 and "File too large" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "one" / "manifest.json").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_consolidating_takes_the_memory_of_a_tensor_and_not_of_the_model(tmp_path, run_python):
    """Anonymous memory (file pages that are mapped do not count), watched while 135 MB are put together."""
    script = f"""
import json, sys, threading, time
from model_builder import build_model
from model_config import resolve
from training.checkpoint import CheckpointStore, model_tensors
from training.checkpoint_commands import main
model = build_model(resolve("llama", n_layer=10, n_head=8, n_embd=512, vocab_size=256, block_size=8))
size = 4 * sum(p.numel() for p in model.parameters())
state = dict(model=dict(name="x", fingerprint="y", config=model.config.to_dict()))
CheckpointStore("{tmp_path}").save(1, model_tensors(model), state, keep_last=1)
del model
import torch.distributed.checkpoint.hf_storage, torch.distributed.checkpoint.state_dict_loader
def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
before, most, over = anonymous(), [0], []
def watch():
    while not over:
        most[0] = max(most[0], anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
assert main(["consolidate", "{tmp_path}", "{tmp_path / "one"}"]) == 0
over.append(1); thread.join()
print(json.dumps(dict(size=size, extra=most[0] - before)))"""
    result = run_python("-c", script, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["size"] > 125e6 and found["extra"] < found["size"] / 2, found
