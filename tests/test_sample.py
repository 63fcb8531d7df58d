"""sample.py: what it prints is what the model says, however prompt, checkpoint and options are given."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import save_file

import sample
from data.tokenization import ByteTokenizer, CharTokenizer
from model_builder import build_model
from model_config import resolve
from tests.preloaded import preloaded_python
from training.checkpoint import CheckpointStore, model_tensors

CHARACTERS = "\n abcdefghijklmnopqrstuvwxyz.,'é"
CPU = ("--device=cpu", "--dtype=float32")
SHORT = "--max_new_tokens=20"


def save(out_dir, model, tokenizer, step=1, best=False):
    """A checkpoint as a run leaves it; returns its folder."""
    dataset = out_dir / "dataset"
    dataset.mkdir(exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(dataset)
    return CheckpointStore(out_dir).save(
        step,
        model_tensors(model),
        {"model": {"config": model.config.to_dict()}},
        keep_last=9,
        tokenizer_folder=dataset,
        best=best,
    )


def random_model(vocab_size, seed=1):
    """Random weights, large enough that the likeliest token depends on the context; 24 tokens of context."""
    model = build_model(
        resolve("llama", n_layer=2, n_head=2, n_embd=32, d_ff=32, block_size=24, vocab_size=vocab_size), seed=seed
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    return model.eval()


def chain_model(vocab_size, cycle):
    """A model whose likeliest token after cycle[i] is cycle[i + 1], whatever stands before."""
    model = build_model(
        resolve(
            "custom",
            n_layer=1,
            n_head=1,
            n_embd=vocab_size,
            d_ff=1,
            block_size=64,
            vocab_size=vocab_size,
            position_encoding="none",
            normalization="rmsnorm",
        )
    )
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.zero_()
        model.embedding.weight.copy_(torch.eye(vocab_size))
        model.head.weight.zero_()
        for now, then in zip(cycle, cycle[1:] + cycle[:1]):
            model.head.weight[then, now] = 1.0
    return model


def greedy(model, ids, count):
    """The likeliest continuation, computed one whole forward a token."""
    for _ in range(count):
        context = torch.tensor([ids[-model.config.block_size :]])
        ids = ids + [max(range(model.config.vocab_size), key=lambda i, row=model(context)[0, -1]: row[i].item())]
    return ids


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small are many times slower when two threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return CharTokenizer(sorted(CHARACTERS))


@pytest.fixture(scope="module")
def model(tokenizer):
    return random_model(tokenizer.vocab_size)


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory, model, tokenizer):
    """A run with two checkpoints: step 1 is the best, step 2 (`model`) the latest."""
    out_dir = tmp_path_factory.mktemp("run")
    save(out_dir, random_model(tokenizer.vocab_size, seed=2), tokenizer, step=1, best=True)
    save(out_dir, model, tokenizer, step=2)
    return out_dir


@pytest.fixture
def say(capsys):
    """say(arguments …) → (exit code, stdout, stderr) of sample.py on the CPU in fp32, in this process."""

    def run(*arguments):
        code = sample.main([*map(str, arguments), *CPU])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def text(say):
    """text(arguments …) → stdout of a run that succeeds and says nothing on stderr."""

    def run(*arguments):
        code, out, err = say(*arguments)
        assert (code, err) == (0, "")
        return out

    return run


# ------------------------------------------------------------------------------------------- what is said


def test_greedy_is_the_likeliest_token_each_time(text, out_dir, model, tokenizer):
    expected = tokenizer.decode(greedy(model, tokenizer.encode("to be"), 40))  # runs beyond the 24 of context
    assert text(out_dir, "--prompt=to be", "--temperature=0", "--max_new_tokens=40") == expected + "\n"
    assert text(out_dir, "--prompt=to be", "--top_k=1", "--max_new_tokens=40") == expected + "\n"
    assert text(out_dir, "--prompt=to be", "--top_p=1e-9", "--max_new_tokens=40") == expected + "\n"


def test_a_prompt_begins_with_bos_where_the_models_tokenizer_does(text, tmp_path):
    """Issue 10.17: as Llama's does; without it a model imported from Hugging Face continues a text it was not trained on."""
    from tokenizers import processors

    from data.tokenization import HuggingFaceTokenizer, load_tokenizer

    backend = HuggingFaceTokenizer.train(["to be or not to be, that is the question. " * 9], 300)._backend
    backend.add_special_tokens(["<s>"])
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    (tmp_path / "dataset").mkdir()
    backend.save(str(tmp_path / "dataset" / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "dataset")
    model = random_model(tokenizer.vocab_size)
    save(tmp_path, model, None)  # with the tokenizer as it lies there
    expected = tokenizer.decode(greedy(model, [bos, *tokenizer.encode("to be")], 20)).removeprefix("<s>")
    arguments = ("--temperature=0", "--max_new_tokens=20", "--ignore_eos")
    assert text(tmp_path, "--prompt=to be", *arguments) == expected + "\n"
    assert expected != tokenizer.decode(greedy(model, tokenizer.encode("to be"), 20))
    from_nothing = tokenizer.decode(greedy(model, [bos], 20)).removeprefix("<s>")
    assert text(tmp_path, "--prompt=", *arguments) == from_nothing + "\n"


@pytest.mark.parametrize(
    "options",
    [("--temperature=0",), ("--temperature=1.2", "--top_k=none"), ("--top_p=0.8", "--repetition_penalty=1.3", "--num_samples=2")],
)
def test_cache_and_streaming_change_nothing(text, out_dir, options):
    arguments = (out_dir, "--prompt=to be", "--max_new_tokens=40", *options)
    plain = text(*arguments)
    assert len(plain) > 40
    assert text(*arguments, "--no_cache") == text(*arguments, "--no_stream") == plain


def test_repetition_penalty_avoids_what_was_said(text, out_dir, model, tokenizer):
    said = text(out_dir, "--prompt=to be", "--temperature=0", "--repetition_penalty=1e9", "--max_new_tokens=15")
    assert len(set(said[5:-1])) == 15 and not set(said[5:-1]) & set("to be")


def test_sample_i_depends_on_seed_plus_i_only(text, out_dir):
    arguments = (out_dir, "--prompt=to be", "--max_new_tokens=30")
    samples = text(*arguments, "--num_samples=3", "--seed=7").split(sample.SEPARATOR + "\n")
    assert samples == [text(*arguments, f"--seed={seed}") for seed in (7, 8, 9)]
    assert len(set(samples)) == 3
    assert text(*arguments) == text(*arguments, "--seed=1337")


def test_text_comes_token_by_token(text, out_dir, monkeypatch):
    pieces = []
    monkeypatch.setattr(sample, "show", pieces.append)
    text(out_dir, "--prompt=to be", "--max_new_tokens=10")
    assert pieces[0] == "to be" and [len(piece) for piece in pieces[1:11]] == [1] * 10


def test_bytes_stream_as_whole_characters(text, tmp_path, monkeypatch):
    save(tmp_path, chain_model(256, list("é日🙂".encode())), ByteTokenizer())
    arguments = (tmp_path, "--prompt=é", "--temperature=0", "--max_new_tokens=18")
    assert text(*arguments) == "é日🙂é日🙂é\n"
    pieces = []
    monkeypatch.setattr(sample, "show", pieces.append)
    text(*arguments)
    assert [piece for piece in pieces if piece] == list("é日🙂é日🙂é")
    monkeypatch.undo()
    assert text(*arguments[:-1], "--max_new_tokens=2") == "é\N{REPLACEMENT CHARACTER}\n"  # ends inside a character


def test_eos_starts_and_ends_a_text(text, tmp_path):
    save(tmp_path, chain_model(257, [256, *b"abc"]), ByteTokenizer(eos=True))
    arguments = (tmp_path, "--temperature=0", "--max_new_tokens=6")
    assert text(*arguments) == text(*arguments, "--prompt=") == text(*arguments, "--stop_at_eos") == "abc\n"
    assert text(*arguments, "--prompt=b", "--ignore_eos") == "bc<|endoftext|>abc<|endoftext|>\n"


def test_ids_that_stand_for_no_text_never_win(text, tmp_path, tokenizer):
    save(tmp_path, random_model(4 * tokenizer.vocab_size), tokenizer)
    said = text(tmp_path, "--prompt=to be", "--temperature=2", "--top_k=none", "--max_new_tokens=60")
    assert len(said) == 66 and set(said) <= set(CHARACTERS)


def test_a_model_without_tokenizer_speaks_ids(say, text, tmp_path, model):
    save(tmp_path, model, None)
    expected = ",".join(map(str, greedy(model, [1, 2, 3], 12))) + "\n"
    for options in ((), ("--no_stream",)):
        assert text(tmp_path, "--prompt_ids=1,2,3", "--temperature=0", "--max_new_tokens=12", *options) == expected
    code, out, err = say(tmp_path, "--prompt=abc")
    assert (code, out) == (1, "") and "no tokenizer" in err and "--prompt_ids" in err


def test_ids_can_be_given_for_text_too(text, out_dir, tokenizer):
    ids = ",".join(map(str, tokenizer.encode("to be")))
    assert text(out_dir, f"--prompt_ids={ids}", SHORT) == text(out_dir, "--prompt=to be", SHORT)


# ------------------------------------------------------------------------------------------- how it is asked


def test_prompt_from_argument_and_file_is_the_same(text, out_dir, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("the café\n", encoding="utf-8")
    said = text(out_dir, "--prompt=the café", SHORT)
    assert said.startswith("the café")
    for arguments in (["--prompt", "the café"], ["--start=the café"], [f"--start=FILE:{file}"], ["--prompt_file", file]):
        assert text(out_dir, *arguments, SHORT) == said


def test_the_ways_to_name_a_model(text, out_dir, tmp_path, monkeypatch):
    latest = text(out_dir, "--prompt=a", SHORT)
    best = text(out_dir, "--prompt=a", SHORT, "--best")
    assert latest != best
    checkpoints = out_dir / "checkpoints"
    assert text(f"--out_dir={out_dir}", "--prompt=a", SHORT) == latest
    assert text(checkpoints / "step_000000002", "--prompt=a", SHORT) == latest
    assert text(checkpoints / "step_000000001", "--prompt=a", SHORT) == best
    assert text(checkpoints, "--prompt=a", "--best", SHORT) == best
    (tmp_path / "out").symlink_to(out_dir)
    monkeypatch.chdir(tmp_path)
    assert text("--prompt=a", "--max-new-tokens", "20") == latest


def test_as_a_command_from_another_folder(run_python, text, out_dir, tmp_path):
    arguments = (ROOT / "sample.py", os.path.relpath(out_dir, tmp_path), *CPU, SHORT)
    expected = text(out_dir, "--prompt=the café", SHORT)
    for prompt in ((), ("--prompt=-",)):
        result = run_python(*arguments, *prompt, cwd=tmp_path, input="the café\n")
        assert (result.returncode, result.stdout, result.stderr) == (0, expected, "")


def test_speed_is_told_to_a_terminal_only(say, out_dir, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, out, err = say(out_dir, "--prompt=a", "--max_new_tokens=7", "--num_samples=2")
    assert code == 0 and err.startswith("14 tokens in ") and err.count("\n") == 1 and "tokens/s" in err


def test_a_prompt_longer_than_the_context_is_noted(say, out_dir):
    code, out, err = say(out_dir, f"--prompt={'ab' * 20}", "--max_new_tokens=3")
    assert code == 0 and len(out) == 44 and "40 tokens" in err and "last 24" in err


def test_help_does_not_import_torch(run_python):
    result = run_python(
        "-c",
        "import sys, sample\ntry: sample.main(['--help'])\n"
        "except SystemExit as end: sys.exit(end.code or 3 * ('torch' in sys.modules))",
    )
    assert result.returncode == 0 and "--repetition_penalty" in result.stdout and result.stderr == ""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_and_a_reader_that_leaves_end_it_quietly(out_dir):
    command = [preloaded_python(), str(ROOT / "sample.py"), str(out_dir), "--prompt=a", "--max_new_tokens=1000000", *CPU]
    for stop, code in ((lambda process: process.send_signal(signal.SIGINT), 130), (lambda process: process.stdout.close(), 0)):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                assert process.stdout.read(5)  # it streams
                stop(process)
                assert (process.wait(timeout=20), process.stderr.read()) == (code, b"")
            finally:
                process.kill()


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--temperature=-0.1"], ["temperature='-0.1'", "from 0 on"]),
        (["--temperature=nan"], ["temperature"]),
        (["--temperature", "warm"], ["temperature='warm'"]),
        (["--top_k=0"], ["top_k='0'", "none"]),
        (["--top_p=0"], ["top_p='0'"]),
        (["--top_p=1.01"], ["top_p='1.01'"]),
        (["--repetition_penalty=0"], ["repetition_penalty='0'"]),
        (["--num_samples=0"], ["num_samples='0'"]),
        (["--max_new_tokens=1.5"], ["max_new_tokens='1.5'"]),
        (["--seed=-1"], ["seed='-1'"]),
        (["--dtype=float8"], ["dtype='float8'", "bfloat16"]),
        (["--device=abacus"], ["device='abacus'"]),
        (["--device=cuda:99"], ["device='cuda:99'", "--device=cpu"]),
        (["--prompt_ids=1,x"], ["prompt_ids='1,x'"]),
        (["--prompt=a", "--start=b"], ["--prompt and --start"]),
        (["--prompt_file=no/such.txt"], ["no/such.txt", "No such file"]),
        (["--prompt=\udcff"], ["not UTF-8"]),
        (["--out_dir=x"], ["--out_dir='x'"]),
        (["--prompt=a", "surplus"], ["'surplus'"]),
        (["--prompt"], ["--prompt", "--help"]),
        (["--stop_at_eos", "--ignore_eos"], ["not allowed with"]),
        (["--temprature=1"], ["--temprature", "did you mean 'temperature'"]),
        (["--temperature=-1", "--top_p=2", "--topk=3", "--seed=x"], ["temperature", "top_p", "--topk", "seed"]),
    ],
)
def test_a_wrong_command_line_is_told_in_full(capsys, out_dir, arguments, words):
    code = sample.main([str(out_dir), *arguments])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "") and "Traceback" not in err
    assert all(word in err for word in words)
    assert all(line.startswith("sample.py: ") for line in err.splitlines())


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--prompt=to Be #1"], ["'#', '1', 'B'"]),
        (["--prompt="], ["prompt is empty", "char"]),
        (["--prompt_ids=0,32"], ["id 32", "0 to 31"]),
        (["--prompt_ids=-1"], ["id -1"]),
    ],
)
def test_a_prompt_that_does_not_fit_the_model_fails(say, out_dir, arguments, words):
    code, out, err = say(out_dir, *arguments)
    assert (code, out) == (1, "") and err.count("\n") == 1 and all(word in err for word in words)


def test_what_is_no_intact_checkpoint_fails(say, out_dir, tmp_path):
    def refused(*arguments):
        code, out, err = say(*arguments, "--prompt=a", SHORT)
        assert (code, out) == (1, "") and "Traceback" not in err
        return err

    assert "does not exist" in refused(tmp_path / "nowhere")
    assert "has no checkpoint" in refused(tmp_path)
    assert "has no checkpoint" in refused(tmp_path, "--best")
    assert "is one checkpoint" in refused(out_dir / "checkpoints" / "step_000000001", "--best")
    run = tmp_path / "run"
    shutil.copytree(out_dir, run)
    (run / "checkpoints" / "best").unlink()
    assert "has no best checkpoint" in refused(run, "--best")
    for folder in sorted(run.glob("checkpoints/step_*")):
        file = next(folder.glob("*.safetensors"))
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        assert "damaged" in refused(folder)
    assert "intact" in refused(run)


def test_weights_that_are_not_finite_fail(say, tmp_path, model, tokenizer):
    save(tmp_path, random_model(tokenizer.vocab_size), tokenizer)
    folder = CheckpointStore(tmp_path).pointed("latest")  # such weights are never saved here, so somebody else does it
    manifest = json.loads((folder / "manifest.json").read_text())
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata()
        save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, path, metadata=metadata)
        manifest["files"][path.name] |= dict(bytes=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    (folder / "manifest.json").write_text(json.dumps(manifest))
    code, out, err = say(tmp_path, "--prompt=a", SHORT)
    assert code == 1 and "not finite" in err and err.count("\n") == 1


def test_debug_shows_where(tmp_path):
    with pytest.raises(Exception, match="has no checkpoint"):
        sample.main([str(tmp_path), "--prompt=a", "--debug"])
