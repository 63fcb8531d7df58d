"""score.py: the figures are those of independent recipes, of exactly the tokens that were predicted."""

import json
import math
import re

import pytest
import torch
from conftest import ROOT, TINY_RUN

import compare_architectures
import score
import train
from command_line import Failure
from data.preparation import prepare
from data.token_dataset import TokenDataset
from data.tokenization import ByteTokenizer, CharTokenizer, HuggingFaceTokenizer
from model_builder import build_model
from model_config import resolve
from training.checkpoint import load_model
from training.scoring import TokenList, count_text, score_stream, scored_windows

TEXT = "The cat sat on the mat, and the dog — élan! — saw it.\nAnd so on 12 times.  " * 20
SHAPE = dict(n_layer=2, n_head=2, n_embd=16, block_size=16)


def one_by_one(model, ids, context, stride=None):
    """Σ −log p, each token predicted by itself from the tokens that its window holds before it."""
    total = 0.0
    for place in range(1, len(ids)):
        if stride is None:
            start = (place - 1) // context * context
        else:
            moved = 0 if place < context else (place - context) // stride + 1
            start = min(moved * stride, context + (moved - 1) * stride - 1) if moved else 0
        logits = model(torch.tensor([ids[start:place]]))[0, -1].float()
        total -= float(logits.log_softmax(-1)[ids[place]])
    return total


@pytest.mark.parametrize("length", [2, 15, 16, 17, 33, 50])
@pytest.mark.parametrize("stride", [None, 16, 5, 1])
def test_every_token_but_the_first_is_predicted_once_from_its_window(length, stride):
    model = build_model(resolve("llama", vocab_size=61, **SHAPE), seed=2).eval()
    ids = torch.randint(61, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    found = score_stream(model, TokenList(ids), None, context=16, stride=stride, batch_size=3)
    assert found.tokens == length - 1 and found.bytes is found.words is None
    with torch.no_grad():
        assert found.nll == pytest.approx(one_by_one(model, ids, 16, stride), rel=1e-5)


@pytest.mark.parametrize("stride", [None, 16, 7])
@pytest.mark.parametrize("tokens", [2, 16, 17, 100, 1001])
def test_windows_cover_a_stream(tokens, stride):
    found = list(scored_windows(tokens, 16, stride))
    assert [place for window in found for place in range(window.first, window.stop)] == list(range(1, tokens))
    assert all(0 <= window.start < window.first < window.stop <= tokens for window in found)
    assert all(window.stop - window.start <= 16 + (stride in (None, 16)) for window in found)


def tokenizers_of(text):
    return {
        "char": CharTokenizer.from_texts([text], eos=True),
        "byte": ByteTokenizer(eos=True),
        "bpe": HuggingFaceTokenizer.train([text], 300),
    }


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_bits_per_byte_and_words_are_those_of_the_predicted_text(kind):
    """By hand: the text after its first token, its UTF-8 bytes, its words; with a document's end in between."""
    tokenizer = tokenizers_of(TEXT)[kind]
    model = build_model(resolve("llama", vocab_size=tokenizer.vocab_size, **SHAPE), seed=2).eval()
    ids = [*tokenizer.encode(TEXT), tokenizer.eos_id, *tokenizer.encode("so on"), tokenizer.eos_id]
    found = score_stream(model, TokenList(ids), tokenizer, context=16)
    text = tokenizer.decode_bytes(tokenizer.encode(TEXT)[1:]).decode()
    assert TEXT.endswith(text) and found.bytes == len(text.encode()) + len(b"so on")
    assert found.words == len(text.split()) + 2
    with torch.no_grad():
        nll = one_by_one(model, ids, 16)
    assert found.bits_per_byte == pytest.approx(nll / math.log(2) / found.bytes, rel=1e-5)
    assert found.word_perplexity == pytest.approx(math.exp(nll / found.words), rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(nll / (len(ids) - 1)), rel=1e-5)


def test_words_are_counted_across_pieces_and_characters(monkeypatch, tmp_path):
    from test_tokenization import sentencepiece_like

    monkeypatch.setattr("training.scoring.READ_AT_ONCE", 3)
    for tokenizer in [*tokenizers_of(TEXT).values(), sentencepiece_like(tmp_path / "sp")]:
        ids = [
            tokenizer.eos_id,
            *tokenizer.encode("a cat sat on"),
            tokenizer.eos_id,
            *tokenizer.encode("a dog"),
            tokenizer.eos_id,
        ]
        size, words = count_text(TokenList(ids), tokenizer, 0)
        decoded = [tokenizer.decode(tokenizer.encode(text)) for text in ("a cat sat on", "a dog")]
        assert words == sum(len(text.split()) for text in decoded) and size == sum(len(text.encode()) for text in decoded)


def test_it_equals_hugging_faces_strided_recipe_on_the_same_weights(tmp_path, capsys):
    """Their guide's loop, over their own model: perplexity per token, and from it per word."""
    transformers = pytest.importorskip("transformers")
    tokenizer = HuggingFaceTokenizer.train([TEXT], 300)
    folder = tmp_path / "hf"
    config = transformers.GPT2Config(vocab_size=tokenizer.vocab_size, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    torch.manual_seed(3)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(folder)
    tokenizer.save(folder)
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    ids = torch.tensor([tokenizer.encode(TEXT)])
    stride, total, count, before = 12, 0.0, 0, 0
    for begin in range(0, ids.size(1), stride):
        end = min(begin + 32, ids.size(1))
        part = ids[:, begin:end]
        target = part.clone()
        target[:, : -(end - before)] = -100
        valid = int((target[:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(theirs(part, labels=target).loss) * valid
        count, before = count + valid, end
        if end == ids.size(1):
            break
    given = [str(folder), f"--text={tmp_path / 'a.txt'}", f"--stride={stride}", f"--json={tmp_path / 's.json'}"]
    assert score.main(given) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "s.json").read_text())["score"]
    assert found["tokens"] == count == ids.size(1) - 1
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    words = len(tokenizer.decode(ids[0, 1:].tolist()).split())
    assert found["words"] == words and found["word_perplexity"] == pytest.approx(math.exp(total / words), rel=1e-4)


@pytest.fixture(scope="module")
def scored_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    text = (ROOT / "README.md").read_text(encoding="utf-8")[:6000]
    prepare(lambda: iter([("readme", text)]), folder / "set", tokenizer="byte")
    given = [*TINY_RUN, f"--dataset={folder / 'set'}", f"--out_dir={folder / 'out'}", "--max_iters=4", "--eval_iters=0"]
    assert train.main(given) == 0
    return folder


def test_a_run_is_scored_on_its_own_validation_set_as_training_does(scored_run, capsys):
    out = scored_run / "out"
    assert score.main([str(out)]) == 0, capsys.readouterr().err
    (path,) = out.glob("score_*.json")
    document = json.loads(path.read_text())
    (log,) = out.glob("run_*.jsonl")
    evaluated = [json.loads(line) for line in log.read_text().splitlines() if '"eval"' in line][-1]
    split = TokenDataset.open(scored_run / "set").split("val")
    assert document["score"]["loss"] == pytest.approx(evaluated["val_loss"], rel=1e-6)
    assert document["score"]["tokens"] == evaluated["val_tokens"] == len(split) - 1 == document["score"]["bytes"]
    assert document["score"]["bits_per_byte"] == pytest.approx(evaluated["val_loss"] / math.log(2), rel=1e-6)
    assert document["model"]["step"] == 4 and re.fullmatch("[0-9a-f]{16}", document["model"]["weights"])
    assert score.main([str(out), "--stride=8"]) == 0 and len(list(out.glob("score_*.json"))) == 2
    assert score.main([str(out)]) == 0 and len(list(out.glob("score_*.json"))) == 2  # the same question
    capsys.readouterr()
    assert compare_architectures.main([str(out)]) == 0
    said = capsys.readouterr().out
    assert "scored on" in said and f"{document['score']['loss']:.4f}" in said and "16/8" in said
    (out / "score_broken.json").write_text("{")
    assert compare_architectures.main([str(out)]) == 0
    model, _ = load_model(out)
    model.head.weight.data[0, 0] += 1e-3
    from training.scoring import weights_fingerprint

    assert weights_fingerprint(model) != document["model"]["weights"]


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["--text=a", "--dataset=b"], 2, "either --text or --dataset"),
        (["--stride=17"], 2, "more than the context of 16"),
        (["--context=17"], 2, "not from 2 to the model's block_size=16"),
        (["--text=missing.txt"], 1, "score.py: There is no file missing.txt"),
        (["--json=."], 2, "--json=. is a folder"),
        (["--json=no/such/folder/x.json"], 2, "there is no folder"),
        (["--dataset=nowhere_at_all"], 1, "No dataset"),
        (["--max_tokens=1"], 1, "There are 1 tokens to score"),
    ],
)
def test_what_cannot_be_scored_is_a_sentence(scored_run, arguments, code, said, capsys):
    assert score.main([str(scored_run / "out"), *arguments]) == code
    captured = capsys.readouterr()
    assert said in captured.err and "Traceback" not in captured.err


def test_a_dataset_of_another_tokenizer_is_refused(scored_run, tmp_path, capsys):
    prepare(lambda: iter([("a", TEXT)]), tmp_path / "chars", tokenizer="char")
    assert score.main([str(scored_run / "out"), f"--dataset={tmp_path / 'chars'}"]) == 1
    assert "was made with another tokenizer" in capsys.readouterr().err


def test_losses_that_are_not_finite_are_no_score():
    model = build_model(resolve("llama", vocab_size=61, **SHAPE)).eval()
    model.norm.weight.data.fill_(math.nan)
    with pytest.raises(Failure, match="not finite"):
        score_stream(model, TokenList(range(40)), None, context=16)
    with pytest.raises(Failure, match="token id 61, .* vocabulary of 61"):
        score_stream(model, TokenList([1, 61, 2]), None, context=16)
