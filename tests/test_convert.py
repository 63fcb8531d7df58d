"""Exports: what comes back from a round trip, what is said of a model trained on, and the check at the end. Issue 10.7."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_models import T, change_config, change_tensors, saved_folder, transformers
from safetensors.torch import load_file

import convert
import train
from data.preparation import prepare
from data.tokenization import HuggingFaceTokenizer
from model_builder import build_model
from model_config import resolve
from training import huggingface_check
from training.checkpoint import find_checkpoint
from training.huggingface import config_to_hf, tensor_rules
from training.huggingface_parts import ConversionError

pytestmark = pytest.mark.usefixtures("preloaded")  # the check at the end of an export


def there_and_back(folder: Path, *options: str) -> Path:
    """A folder imported and exported again, without the check."""
    assert convert.main([str(folder), str(folder.parent / "run")]) == 0
    back = folder.parent / "back"
    assert convert.main([str(folder.parent / "run"), str(back), "--no_check", *options]) == 0
    return back


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def dtypes_of(folder: Path) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    "model_type, says",
    [
        ("llama", dict(attention_dropout=0.3, initializer_range=0.5, pretraining_tp=2, made_by="me")),
        ("gpt2", dict(resid_pdrop=0.0, embd_pdrop=0.1, attn_pdrop=0.2, reorder_and_upcast_attn=True)),
        ("gpt2", dict(resid_pdrop=0.25, embd_pdrop=0.25, attn_pdrop=0.25, scale_attn_weights=False)),
        ("mistral", dict(sliding_window=None, attention_dropout=0.1)),
        ("qwen3", dict(use_sliding_window=False, sliding_window=3, rope_scaling=dict(type="linear", factor=2.0))),
        ("gemma2", dict(layer_types=["full_attention"] * 2, sliding_window=7, hidden_act="relu")),
    ],
)
def test_a_config_json_comes_back_as_it_was(tmp_path, model_type, says):
    """Issue 10.7: attention_dropout, GPT-2's three dropouts, reorder_and_upcast_attn, null windows and model_type survive."""
    saved_folder(tmp_path / "hf", model_type, **says)
    change_config(tmp_path / "hf", **says)
    assert config_of(there_and_back(tmp_path / "hf")) == config_of(tmp_path / "hf")


@pytest.mark.parametrize("said", ["float32", "bfloat16", None])
def test_each_tensor_comes_back_in_its_dtype(tmp_path, said):
    """Issue 10.7: fp32 norms beside bf16 matrices, whatever config.json calls the dtype."""
    saved_folder(tmp_path / "hf", "qwen3", dtype=torch.bfloat16)

    def change(tensors: dict) -> None:
        tensors.update({name: tensor.float() for name, tensor in tensors.items() if "norm" in name})
        tensors["lm_head.weight"] = tensors["lm_head.weight"].half()

    change_tensors(tmp_path / "hf", change)
    change_config(tmp_path / "hf", dtype=said)
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", there_and_back(tmp_path / "hf")))
    assert len({tensor.dtype for tensor in before.values()}) == 3 and before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
    assert config_of(tmp_path / "back") == config_of(tmp_path / "hf")
    assert convert.main([str(tmp_path / "run"), str(tmp_path / "half"), "--no_check", "--dtype=float16"]) == 0
    assert set(dtypes_of(tmp_path / "half").values()) == {torch.float16} and config_of(tmp_path / "half")["dtype"] == "float16"


def test_numbers_beyond_the_range_of_the_dtype_are_not_exported_as_infinities(tmp_path, capsys):
    saved_folder(tmp_path / "hf")
    change_tensors(tmp_path / "hf", lambda tensors: tensors["model.norm.weight"].fill_(1e5))
    there_and_back(tmp_path / "hf", "--dtype=bfloat16")
    assert convert.main([str(tmp_path / "run"), str(tmp_path / "x"), "--no_check", "--dtype=float16"]) == 1
    assert "beyond the range of torch.float16" in capsys.readouterr().err


def test_gemma2_without_sliding_layers_is_exported_as_what_transformers_runs():
    """Issue 10.7: its class wants a window even where no layer slides."""
    config = resolve(
        "gemma2",
        n_layer=2,
        n_head=2,
        n_embd=32,
        head_dim=16,
        vocab_size=61,
        block_size=T,
        layer_pattern="transformer",
        sliding_window=0,
    )
    hf = config_to_hf(config)
    assert hf["model_type"] == "gemma2"
    ours = build_model(config).eval()
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**hf)).float().eval()
    weights = dict(ours.named_parameters())
    theirs.load_state_dict(
        {rule.theirs: rule.to_theirs(weights).detach() for rule in tensor_rules(config, "gemma2")}, strict=False
    )
    tokens = torch.arange(T)[None]
    assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-5


def test_a_model_trained_on_keeps_its_family_and_what_its_file_says_besides(tmp_path):
    """Issue 10.7: another dropout and sequence length are written, the rest of the imported file stays."""
    saved_folder(tmp_path / "hf", "mistral", sliding_window=None, rope_theta=77.0, attention_dropout=0.1, made_by="me")
    text = tmp_path / "letters"
    prepare(lambda: iter([("x", "the cat sat on the mat. " * 60)]), text, tokenizer="char")
    train_on(tmp_path, text, "--dropout=0.2", "--block_size=12")
    assert convert.main([str(tmp_path / "trained"), str(tmp_path / "back"), "--no_check"]) == 0
    before, after = config_of(tmp_path / "hf"), config_of(tmp_path / "back")
    assert (after["model_type"], after["sliding_window"], after["made_by"]) == ("mistral", None, "me")
    assert (after["max_position_embeddings"], after["attention_dropout"]) == (12, before["attention_dropout"])
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "back").to_dict()
    assert {**theirs, **theirs.get("rope_parameters", {})}["rope_theta"] == 77.0


def train_on(folder: Path, dataset: Path, *options: str) -> None:
    """One step from folder/hf on a dataset, below folder/trained."""
    words = [f"--init_from=hf:{folder / 'hf'}", f"--dataset={dataset}", f"--out_dir={folder / 'trained'}", "--max_iters=1"]
    words += ["--eval_iters=1", "--device=cpu", "--dtype=float32", "--threads=1", "--batch_size=2", *options]
    assert train.main(words) == 0


# ------------------------------------------------------------------------------------------- special ids


def test_an_export_after_training_on_other_data_has_the_special_ids_of_that_data(tmp_path):
    """Issue 10.17: the ids that were imported mean other tokens in another tokenizer; with its own they stay."""
    saved_folder(tmp_path / "hf", "llama", vocab_size=300)
    HuggingFaceTokenizer.train(["the cat sat on the mat"], 260).save(tmp_path / "hf")
    generation = dict(bos_token_id=7, eos_token_id=[8, 9], temperature=0.6)
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(generation))
    change_config(tmp_path / "hf", bos_token_id=7, eos_token_id=[8, 9])
    documents = [("x", "the cat sat on the mat. " * 40)] * 3
    for name, tokenizer in (("own", str(tmp_path / "hf")), ("other", "bpe")):
        prepare(lambda: iter(documents), tmp_path / name, tokenizer=tokenizer, bpe_vocab_size=270)
        train_on(tmp_path, tmp_path / name, "--block_size=8")
        assert convert.main([str(tmp_path / "trained"), str(tmp_path / f"{name}_hf"), "--no_check"]) == 0
        (tmp_path / "trained").rename(tmp_path / f"{name}_trained")
    said = {name: config_of(tmp_path / f"{name}_hf") for name in ("own", "other")}
    assert (said["own"]["bos_token_id"], said["own"]["eos_token_id"]) == (7, [8, 9])
    assert json.loads((tmp_path / "own_hf" / "generation_config.json").read_text()) == generation
    eos = HuggingFaceTokenizer.from_pretrained(tmp_path / "other_hf").eos_id
    assert said["other"]["bos_token_id"] == said["other"]["eos_token_id"] == eos not in (7, 8, 9)
    other = json.loads((tmp_path / "other_hf" / "generation_config.json").read_text())
    assert other == dict(bos_token_id=eos, eos_token_id=eos)


def test_a_model_of_tiktokens_vocabulary_is_exported_with_a_tokenizer_that_transformers_reads(tmp_path):
    from test_tokenization import tiktoken_like

    from data.dataset_writer import DatasetWriter

    tokenizer = tiktoken_like("gpt2")
    with DatasetWriter(tmp_path / "text", tokenizer) as writer:
        for split in ("train", "val"):
            writer.add(split, tokenizer.encode("the cat sat on the mat. " * 60), 24 * 60)
        writer.publish()
    saved_folder(tmp_path / "hf", "llama", vocab_size=50257)
    train_on(tmp_path, tmp_path / "text", "--block_size=8")
    assert convert.main([str(tmp_path / "trained"), str(tmp_path / "back"), "--no_check"]) == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert theirs.encode("the dog sat") == tokenizer.encode("the dog sat") and theirs.eos_token_id == 50256


def test_a_broken_tokenizer_is_told_at_the_import(tmp_path, capsys):
    """Issue 10.17."""
    saved_folder(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text('{"model": 3}')
    capsys.readouterr()
    assert convert.main([str(tmp_path / "hf"), str(tmp_path / "run")]) == 1
    told = capsys.readouterr().err
    assert "tokenizer.json" in told and "Traceback" not in told


# ------------------------------------------------------------------------------------------- the check


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> SimpleNamespace:
    """A checkpoint and the folder that it was exported to."""
    place = tmp_path_factory.mktemp("exported")
    saved_folder(place / "hf", "mistral", dtype=torch.bfloat16, sliding_window=5)
    back = there_and_back(place / "hf")
    return SimpleNamespace(checkpoint=find_checkpoint(place / "run"), folder=back, run=place / "run")


def tampered(exported: SimpleNamespace, folder: Path) -> Path:
    """A copy of the exported folder."""
    folder.mkdir()
    for file in exported.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_the_check_says_the_largest_logit_difference(exported):
    found = huggingface_check.compare_logits(exported.checkpoint, exported.folder)
    assert found["problem"] is None and "fresh process: largest logit difference" in found["said"]


def test_the_check_finds_one_wrong_tensor_and_a_wrong_config(exported, tmp_path):
    """It fails for swapped weights, for another window, and for a tensor that transformers would draw anew."""
    folder = tampered(exported, tmp_path / "swapped")

    def swap(tensors: dict) -> None:
        one, other = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
        tensors[one], tensors[other] = tensors[other], tensors[one]

    change_tensors(folder, swap)
    assert "logits differ" in huggingface_check.compare_logits(exported.checkpoint, folder)["problem"]
    folder = tampered(exported, tmp_path / "window")
    change_config(folder, sliding_window=6)
    assert "config.json" in huggingface_check.compare_logits(exported.checkpoint, folder)["problem"]
    folder = tampered(exported, tmp_path / "missing")
    change_tensors(folder, lambda tensors: tensors.pop("model.norm.weight"))
    assert "model.norm.weight" in huggingface_check.compare_logits(exported.checkpoint, folder)["problem"]


def test_where_the_model_does_not_fit_shapes_and_config_are_compared(exported, monkeypatch):
    monkeypatch.setattr(huggingface_check, "_free_bytes", lambda: 1000)
    found = huggingface_check.compare_logits(exported.checkpoint, exported.folder)
    assert found["problem"] is None and "were not compared" in found["said"]


def test_without_transformers_the_folder_is_read_again_here(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "transformers.models.auto.configuration_auto", None)
    found = huggingface_check.compare_logits(exported.checkpoint, exported.folder)
    assert found["problem"] is None and "not installed; largest logit difference 0" in found["said"]


def test_a_failed_check_ends_the_command_with_a_sentence(exported, tmp_path, capsys, monkeypatch):
    """In the fresh process itself: the folder is spoilt between writing and checking. Nothing is uploaded then."""
    write, uploaded = convert.write_sharded, []

    def spoil(folder: Path, tensors) -> None:
        write(folder, tensors)
        change_tensors(folder, lambda tensors: tensors["model.norm.weight"].mul_(3))

    monkeypatch.setattr(convert, "write_sharded", spoil)
    monkeypatch.setattr(convert, "push", lambda *_: uploaded.append(1))
    assert convert.main([str(exported.run), str(tmp_path / "hf"), "--push=me/model"]) == 1
    told = capsys.readouterr().err
    assert "do not use it: its logits differ" in told and "Traceback" not in told and not uploaded
    monkeypatch.setattr(huggingface_check.sys, "executable", "false")  # as a crash, or a process killed for its memory
    with pytest.raises(ConversionError, match="could not be checked.*--no_check"):
        huggingface_check.check_export(exported.checkpoint, tmp_path / "hf")


# ------------------------------------------------------------------------------------------- the Hub


@pytest.mark.parametrize(
    "options, there, created", [((), None, "private"), (("--public",), None, "public"), ((), "private", None)]
)
def test_an_upload_is_private_unless_public_is_said(exported, tmp_path, monkeypatch, options, there, created, capsys):
    """Issue 10.7: --push made a public repository."""
    hub = fake_hub(monkeypatch, {"me/model": there} if there else {})
    assert convert.main([str(exported.run), str(tmp_path / "hf"), "--no_check", "--push=me/model", *options]) == 0
    assert hub.uploaded == ["me/model"] and hub.repositories == {"me/model": created or there}


def test_nothing_goes_into_a_public_repository_unasked(exported, tmp_path, monkeypatch, capsys):
    """Issue 10.7: also where the repository was there before."""
    hub = fake_hub(monkeypatch, {"me/model": "public"})
    assert convert.main([str(exported.run), str(tmp_path / "hf"), "--no_check", "--push=me/model"]) == 1
    assert "--public" in capsys.readouterr().err and not hub.uploaded
    assert convert.main([str(exported.run), str(tmp_path / "x"), "--no_check", "--public"]) == 2


def fake_hub(monkeypatch, repositories: dict[str, str]) -> SimpleNamespace:
    """huggingface_hub's interface on a dictionary: name → 'private' or 'public'."""
    import huggingface_hub

    hub = SimpleNamespace(repositories=repositories, uploaded=[])

    class HfApi:
        def create_repo(self, name, *, private=None, exist_ok=False):
            assert exist_ok or name not in repositories
            repositories.setdefault(name, "private" if private else "public")

        def model_info(self, name):
            return SimpleNamespace(private=repositories[name] == "private")

        def upload_folder(self, *, repo_id, folder_path):
            assert (Path(folder_path) / "config.json").is_file()
            hub.uploaded.append(repo_id)

    monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
    return hub
