"""What a run says at its start of the tokenizers of its dataset and of the weights that it begins with. Issue 10.17."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import train
from data.preparation import prepare
from data.token_dataset import TokenDataset
from data.tokenization import HuggingFaceTokenizer
from training.starting import Origin, tokenizer_warnings

TEXT = "the cat sat on the mat, and the dog on the log. " * 40


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Three datasets of the same text, and a folder with the tokenizer of the first."""
    place = tmp_path_factory.mktemp("tokenizers")
    (place / "weights").mkdir()
    HuggingFaceTokenizer.train([TEXT], 270).save(place / "weights")
    for name, tokenizer in (("own", str(place / "weights")), ("bpe", "bpe"), ("char", "char")):
        prepare(lambda: iter([("one", TEXT), ("two", TEXT)]), place / name, tokenizer=tokenizer, bpe_vocab_size=290)
    return place


def warnings_of(folder: Path, weights: Path) -> list[str]:
    return tokenizer_warnings(Origin(weights, weights_only=True, huggingface=True), TokenDataset.open(folder))


def test_weights_that_know_another_tokenizer_than_the_dataset_are_warned_of(folders):
    assert warnings_of(folders / "own", folders / "weights") == []
    for other in ("bpe", "char"):
        (told,) = warnings_of(folders / other, folders / "weights")
        assert "another tokenizer" in told and f"--tokenizer={folders / 'weights'}" in told


def test_the_same_tokenizer_in_another_form_is_not_warned_of(folders, tmp_path):
    """The name and what is written beside the merges decide nothing; the end of a document does."""
    tokenizer = HuggingFaceTokenizer.from_pretrained(folders / "weights")
    tokenizer._backend.add_special_tokens(["<unused>"])
    tokenizer.save(tmp_path)
    again = HuggingFaceTokenizer.from_pretrained(tmp_path)
    assert again.fingerprint != TokenDataset.open(folders / "own").tokenizer().fingerprint
    assert warnings_of(folders / "own", tmp_path) == []
    again.eos_id = None
    again.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<unused>"}')
    assert len(warnings_of(folders / "own", tmp_path)) == 1


def test_a_run_warns_of_another_tokenizer_on_the_terminal_and_in_its_log(folders, tmp_path, capsys):
    """Both for a Hugging Face folder and for a checkpoint's weights; a broken tokenizer of the dataset ends the run there."""
    from huggingface_models import saved_folder

    saved_folder(tmp_path / "hf", vocab_size=300)
    for file in (folders / "weights").iterdir():
        shutil.copy(file, tmp_path / "hf" / file.name)
    common = [
        "--max_iters=1",
        "--eval_iters=1",
        "--block_size=8",
        "--batch_size=2",
        "--device=cpu",
        "--dtype=float32",
        "--threads=1",
    ]

    def run(name: str, init_from: str, dataset: str) -> tuple[int, str]:
        torch.manual_seed(0)
        words = [f"--out_dir={tmp_path / name}", f"--init_from={init_from}", f"--dataset={folders / dataset}", *common]
        code = train.main(words)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    code, said = run("own", f"hf:{tmp_path / 'hf'}", "own")
    assert code == 0 and "another tokenizer" not in said
    code, said = run("bpe", f"hf:{tmp_path / 'hf'}", "bpe")
    assert code == 0 and "warning: the weights of" in said
    assert "another tokenizer" in next((tmp_path / "bpe").glob("run_*.jsonl")).read_text()
    code, said = run("char", f"weights:{tmp_path / 'own'}", "char")
    assert code == 0 and "warning: the weights of" in said
    shutil.copytree(folders / "bpe", folders / "broken")
    (folders / "broken" / "tokenizer.json").write_text('{"model": 3}')
    code, said = run("broken", "scratch", "broken")
    assert code == 1 and "tokenizer" in said and "Traceback" not in said and "step" not in said
