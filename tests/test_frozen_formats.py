"""What an older version wrote is read by this one: the files in tests/frozen, made by commit 91493a6, are opened (issue 9.0).

tests/frozen/make.py says what they are. They are never made again: if one of these tests fails, the code is to be changed.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import compare_architectures
import convert
import train
from configurator import configure
from data import token_dataset
from data.token_dataset import TokenDataset
from model_config import ModelConfig
from tests.distributed.group import train_in_processes
from tests.frozen.make import MORE, STEPS, machine, tensors_hash
from training import checkpoint_commands
from training.checkpoint import CheckpointStore, find_checkpoint, load_model, read_state
from training_logger import read_run, rebuild

FROZEN = Path(__file__).resolve().parent / "frozen"
EXPECTED = json.loads((FROZEN / "expected.json").read_text())
RUNS = ("one", "two")  # trained by one process; by two under fsdp
SAME_MACHINE = machine() == EXPECTED["machine"]
# On the machine that made the files every bit is the same. Elsewhere sums are added up in another order: a rounding is
# 6e-8 of the value in fp32 and 4e-3 in bf16, and a few steps carry it on.
TOLERANCE = {"float32": 1e-5, "bfloat16": 4e-3}


@pytest.fixture
def copy_of(tmp_path):
    """copy_of(name) → a writable copy of a frozen run's out_dir or of a dataset."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(FROZEN / name, tmp_path / name))

    return copy


def log_of(folder: Path, suffix: str = ".jsonl") -> Path:
    [log] = folder.glob(f"run_*{suffix}")
    return log


def losses(log: Path) -> dict[int, float]:
    """step → loss, read from the log's lines as they are."""
    events = [json.loads(line) for line in log.read_text().splitlines()]
    return {event["step"]: event["loss"] for event in events if event["event"] == "step"}


def with_version(file: Path, key: str, version: int) -> None:
    """Set the version in a JSON file, or in the first line of a .jsonl."""
    text = file.read_text(encoding="utf-8")
    first, newline, rest = text.partition("\n") if file.suffix == ".jsonl" else (text, "", "")
    document = json.loads(first)
    assert document.pop(key) == 1, f"{file.name} has to name its version"
    file.write_text(json.dumps({**document, key: version}) + newline + rest)


# ------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("name", RUNS)
def test_a_frozen_checkpoint_gives_the_logits_that_it_gave(name):
    model, tokenizer = load_model(FROZEN / name)
    with torch.no_grad():
        logits = model(torch.tensor([EXPECTED["tokens"]]))[0]
    exact = dict(rtol=0, atol=0) if SAME_MACHINE else dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits, torch.tensor(EXPECTED["logits"][name]), **exact)
    assert tokenizer.encode((FROZEN / "text.txt").read_text(encoding="utf-8")[:50])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", RUNS)
def test_a_frozen_run_goes_on_with_the_losses_that_it_would_have_had(name, dtype, copy_of):
    if name == "one" and torch.backends.mkl.is_available() != EXPECTED["machine"]["mkl"]:
        pytest.skip("without MKL PyTorch draws other numbers for dropout")
    folder = copy_of(name)
    for log in folder.glob("run_*"):
        log.unlink()
    command = ("--init_from=resume", f"--out_dir={folder}", f"--dataset={FROZEN / 'dataset'}", f"--dtype={dtype}")
    command = (*command, f"--max_iters={STEPS + MORE}")
    if name == "one":
        assert train.main(list(command)) == 0
    else:
        train_in_processes(2, *command)
    found = losses(log_of(folder))
    assert list(found) == list(range(STEPS + 1, STEPS + MORE + 1))
    tolerance = 0 if SAME_MACHINE else TOLERANCE[dtype]
    assert list(found.values()) == pytest.approx(EXPECTED["losses"][f"{name}_{dtype}"], rel=tolerance, abs=0)


def test_two_processes_checkpoint_goes_on_under_one(copy_of):
    folder = copy_of("two")
    log_of(folder).unlink()
    log_of(folder, ".json").unlink()
    more = ("--init_from=resume", f"--out_dir={folder}", f"--dataset={FROZEN / 'dataset'}", f"--max_iters={STEPS + MORE}")
    assert train.main([*more, "--parallelism=auto"]) == 0
    assert list(losses(log_of(folder)).values()) == pytest.approx(EXPECTED["losses"]["two_float32"], rel=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_a_frozen_checkpoint_is_inspected(name, capsys):
    assert checkpoint_commands.main(["inspect", str(FROZEN / name), "--tensors"]) == 0
    said = capsys.readouterr().out
    state = json.loads(next((FROZEN / name / "checkpoints").glob("step_*/state.json")).read_text())
    assert "yes, every file" in said and state["model"]["name"] in said and state["model"]["fingerprint"] in said
    stored = set()
    for file in (FROZEN / name / "checkpoints").glob("step_*/*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            stored |= set(tensors.keys())
    assert stored == {line.split()[0] for line in said.splitlines() if "." in line.split(" ")[0]}


@pytest.mark.parametrize("name", RUNS)
def test_a_frozen_checkpoint_is_converted_to_the_same_tensors(name, tmp_path, preloaded):
    assert convert.main([str(FROZEN / name), str(tmp_path / "hf")]) == 0
    assert tensors_hash(tmp_path / "hf") == EXPECTED["converted"][name]


@pytest.mark.parametrize("name", RUNS)
def test_a_frozen_models_name_and_fingerprint_are_the_same(name):
    state = read_state(find_checkpoint(FROZEN / name))
    model = ModelConfig.from_dict(state["model"]["config"])
    assert (model.name, model.fingerprint) == (state["model"]["name"], state["model"]["fingerprint"])


# ------------------------------------------------------------------------------------------- logs and configs


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_frozen_logs_are_compared(suffix, tmp_path, capsys):
    logs = [log_of(FROZEN / name, suffix) for name in RUNS]
    assert compare_architectures.main([*map(str, logs), "--force", f"--json={tmp_path / 'table.json'}"]) == 0
    said = capsys.readouterr().out
    for log in logs:
        last = [json.loads(line) for line in log.with_suffix(".jsonl").read_text().splitlines() if '"event": "eval"' in line][-1]
        assert f"{last['val_loss']:.4f}" in said
        assert read_run(log)["model"]["name"] in said


@pytest.mark.parametrize("name", RUNS)
def test_a_frozen_logs_two_files_are_the_same_document(name):
    assert rebuild(log_of(FROZEN / name)) == read_run(log_of(FROZEN / name, ".json"))


@pytest.mark.parametrize("source", ["run_*.json", "run_*.jsonl", "checkpoints/step_*/state.json"])
@pytest.mark.parametrize("name", RUNS)
def test_a_frozen_runs_saved_config_configures_a_run(name, source, tmp_path):
    [file] = (FROZEN / name).glob(source)
    options = [f"--dataset={FROZEN / 'dataset'}", f"--out_dir={tmp_path}"]
    configuration = configure([str(file), *options])
    saved = json.loads((log_of(FROZEN / name, ".json")).read_text())
    for key, origin in saved["origins"].items():
        if origin == "command line" and key not in ("dataset", "out_dir"):
            assert getattr(configuration.train, key) == saved["config"][key], key
    if name == "one" and source == "run_*.json":
        assert train.main([str(file), *options, "--max_iters=1"]) == 0
        assert read_run(log_of(tmp_path))["model"]["fingerprint"] == saved["model"]["fingerprint"]


# ------------------------------------------------------------------------------------------- datasets


def token_ids(dataset: TokenDataset, name: str) -> list[int]:
    split = dataset.split(name)
    return split.read(0, len(split)).tolist()


def test_a_frozen_dataset_by_characters_opens_verifies_and_decodes(capsys):
    assert token_dataset.main(["verify", str(FROZEN / "dataset")]) == 0
    dataset = TokenDataset.open(FROZEN / "dataset")
    ids = [*token_ids(dataset, "train"), *token_ids(dataset, "val")]
    assert dataset.tokenizer().decode(ids) == (FROZEN / "text.txt").read_text(encoding="utf-8")
    nanogpt = pickle.loads((FROZEN / "dataset" / "meta.pkl").read_bytes())
    assert "".join(nanogpt["itos"][i] for i in ids) == (FROZEN / "text.txt").read_text(encoding="utf-8")


def test_a_frozen_dataset_by_bpe_opens_verifies_and_decodes(capsys):
    """Its documents are the text's paragraphs, each ended by the eos id; whole ones went to validation."""
    assert token_dataset.main(["verify", str(FROZEN / "dataset_bpe")]) == 0
    dataset = TokenDataset.open(FROZEN / "dataset_bpe")
    documents = []
    for split in ("train", "val"):
        documents += dataset.tokenizer().decode(token_ids(dataset, split)).split("<|endoftext|>")[:-1]
    assert sorted(documents) == sorted((FROZEN / "text.txt").read_text(encoding="utf-8").split("\n\n"))


# ------------------------------------------------------------------------------------------- later versions


@pytest.mark.parametrize("file", ["state.json", "manifest.json"])
def test_a_checkpoint_of_a_later_version_is_refused_and_stays(file, copy_of, capsys):
    folder = copy_of("one")
    checkpoint = CheckpointStore(folder).pointed("latest")
    with_version(checkpoint / file, "format_version", 2)
    if file == "state.json":  # its checksum is right
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        content = (checkpoint / file).read_bytes()
        manifest["files"][file] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    resume = ["--init_from=resume", f"--out_dir={folder}", f"--dataset={FROZEN / 'dataset'}", "--max_iters=9"]
    for main, arguments in ((train.main, resume), (checkpoint_commands.main, ["inspect", str(folder)])):
        assert main(arguments) == 1
        said = capsys.readouterr().err
        assert "has checkpoint format 2, and this version of kitbash reads 1" in said and "wrote it" in said
    assert CheckpointStore(folder).pointed("latest") == checkpoint and checkpoint.is_dir()


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_log_of_a_later_version_is_refused(suffix, copy_of, capsys):
    folder = copy_of("one")
    for either in (".json", ".jsonl"):  # as one that cannot be read is looked for in the other file
        with_version(log_of(folder, either), "schema_version", 2)
    assert compare_architectures.main([str(log_of(folder, suffix))]) == 1
    assert "has schema version 2, this code reads up to 1" in capsys.readouterr().err


@pytest.mark.parametrize("source, key", [("run_*.json", "schema_version"), ("checkpoints/step_*/state.json", "format_version")])
def test_a_saved_config_of_a_later_version_is_refused(source, key, copy_of, capsys):
    [file] = copy_of("one").glob(source)
    with_version(file, key, 2)
    assert train.main([str(file), "--print_config"]) == 2
    said = capsys.readouterr().err
    assert file.name in said and "has format version 2, and this version of kitbash reads up to 1" in said


def test_a_dataset_of_a_later_version_is_refused(copy_of, capsys):
    folder = copy_of("dataset")
    with_version(folder / "meta.json", "format_version", 2)
    assert token_dataset.main(["verify", str(folder)]) == 1
    assert "has format_version 2, and this program reads 1 only" in capsys.readouterr().err
