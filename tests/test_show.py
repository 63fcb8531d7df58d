"""data/show.py says what is in a dataset, whether it is whole, and what a step of a run was trained on."""

import json
import re

import numpy as np
import pytest
from conftest import TINY_RUN

import train
from data import looking, show
from data.dataset_writer import DatasetWriter
from data.preparation import prepare
from data.token_dataset import DATA_DIR, TokenDataset
from data.tokenization import ByteTokenizer

DOCUMENTS = [f"Document {i}: " + "the cat sat on the mat. " * (1 + i % 7) for i in range(60)]


@pytest.fixture
def folder(tmp_path):
    prepare(lambda: iter(enumerate(DOCUMENTS)), tmp_path / "set", tokenizer="byte", val_fraction=0.2)
    return tmp_path / "set"


def test_statistics_are_those_of_the_tokens(folder, capsys):
    assert show.main([str(folder), "--samples=2", "--length=120"]) == 0
    said = capsys.readouterr().out
    ids = TokenDataset.open(folder).split("train").read(0, len(TokenDataset.open(folder).split("train")))
    lengths = np.diff(np.concatenate([[-1], np.flatnonzero(ids == 256)]))
    assert f"ids        {len(set(ids.tolist()))} different ones of 257" in said
    assert f"{len(lengths)}, of {lengths.min()} · " in said and f" · {lengths.max()} tokens (quartiles)" in said
    shown = dict(re.findall(r"≤ (\d+) +(\d+)", said))
    for edge, count in shown.items():
        assert int(count) == ((lengths <= int(edge)) & (lengths > (int(edge) // 2 if int(edge) > 16 else 0))).sum()
    assert sum(map(int, shown.values())) == len(lengths)
    assert "--- train, tokens 0 to 120" in said and "····· end of a document ·····\nDocument" in said


def test_verify_finds_a_file_that_was_copied_badly(folder, capsys):
    assert show.main([str(folder), "--verify"]) == 0
    assert "every file is as meta.json says" in capsys.readouterr().out
    content = bytearray((folder / "train.bin").read_bytes())
    content[100] ^= 1
    (folder / "train.bin").write_bytes(content)
    assert show.main([str(folder), "--verify"]) == 1
    assert re.search("data/show.py: .*train.bin is damaged: its sha256", capsys.readouterr().err)
    (folder / "train.bin").write_bytes(content[:-2])
    assert show.main([str(folder), "--verify"]) == 1
    assert "is truncated or was replaced" in capsys.readouterr().err


def test_a_folder_without_a_tokenizer_is_shown_in_numbers(tmp_path, capsys):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "val.bin")
    assert show.main([str(tmp_path), "--samples=1", "--length=5"]) == 0
    said = capsys.readouterr().out
    assert "0 1 2 3 4" in said and "nothing marks where they end" in said


def test_the_documents_of_a_step_are_those_that_the_loop_was_given(folder, tmp_path, monkeypatch, capsys):
    """Of a mixture, after a resume with another batch size; the batches are written down as the loop gets them."""
    other = tmp_path / "other"
    with DatasetWriter(other, ByteTokenizer(eos=True), append_eos=True) as writer:
        for split in ("train", "val"):
            writer.add(split, list(b"Something else. " * 40), 640)
        writer.publish()
    seen, read = [], train.DataLoader.batch

    def batch(self, first, count):
        found = read(self, first, count)
        seen.append(found.inputs.numpy().copy())
        return found

    monkeypatch.setattr(train.DataLoader, "batch", batch)
    common = [*TINY_RUN, f"--dataset={folder}:0.5,{other}:0.5", f"--out_dir={tmp_path / 'out'}", "--log_interval=2"]
    assert train.main([*common, "--max_iters=4", "--lr_decay_iters=6"]) == 0
    assert train.main([*common, "--max_iters=6", "--lr_decay_iters=6", "--resume"]) == 0
    monkeypatch.setattr(train.DataLoader, "batch", read)
    capsys.readouterr()
    for step in (1, 3, 4, 5, 6):
        assert show.main([f"--run={tmp_path / 'out'}", f"--step={step}", "--rows=0"]) == 0
        shown = re.split(r"\n--- sequence .*\n", capsys.readouterr().out)[1:]
        expected = [looking.decoded(TokenDataset.open(folder), row) for row in seen[step - 1]]
        assert [text.strip("\n") for text in shown] == [text.strip("\n") for text in expected]
    assert show.main([f"--run={tmp_path / 'out'}", "--step=7"]) == 1
    assert "has come to step 7" in capsys.readouterr().err
    meta = json.loads((folder / "meta.json").read_text())
    meta["tokenizer"]["name"] = "changed"
    (folder / "meta.json").write_text(json.dumps(meta))
    assert show.main([f"--run={tmp_path / 'out'}", "--step=1"]) == 0  # a name is not content
    prepare(lambda: iter(enumerate(DOCUMENTS[:50])), folder, tokenizer="byte", val_fraction=0.2, overwrite=True)
    capsys.readouterr()
    assert show.main([f"--run={tmp_path / 'out'}", "--step=1"]) == 1
    assert "is not the one this run was trained on" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        ([], 2, "Name a dataset"),
        (["--run=x"], 2, "belong together"),
        (["a", "--run=x", "--step=1"], 2, "give either a dataset or --run"),
        (["--run=nowhere", "--step=1"], 1, "nowhere has no run log"),
        (["nowhere_at_all"], 1, "No dataset"),
        (["a:0.5,b:0.4"], 2, "sum to 0.9"),
        (["a", "--samples=-1"], 2, "not a whole number"),
    ],
)
def test_what_cannot_be_shown_is_a_sentence(arguments, code, said, capsys):
    try:
        assert show.main(arguments) == code
    except SystemExit as error:
        assert error.code == code
    captured = capsys.readouterr()
    assert said in captured.err and "Traceback" not in captured.err


def test_it_runs_as_a_command_from_any_folder(folder, tmp_path, run_python):
    done = run_python(DATA_DIR / "show.py", "set", "--samples=1", cwd=tmp_path)
    assert done.returncode == 0 and "documents" in done.stdout, done.stderr
