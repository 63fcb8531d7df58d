"""compress.py analyze: the layers that do least, of any decoder, against what is written out by hand."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_RUN

import compress
import train
from command_line import Failure, UsageError
from layer_pruning.analysis import analyze, block_starts
from layer_pruning.criteria import CRITERIA, Criterion, criterion
from layer_pruning.decoder import Decoder, open_decoder
from model_builder import build_model
from model_config import resolve
from training.batch import next_token_batch

LAYERS, T, V = 8, 16, 256
MEASURED = ("cosine", "block_influence", "angular_last", "linear_fit", "block_ppl")
SHAPE = dict(n_layer=LAYERS, n_head=2, n_embd=24, vocab_size=V, block_size=T)
HF = dict(
    vocab_size=V, hidden_size=24, intermediate_size=40, num_hidden_layers=5, num_attention_heads=2, max_position_embeddings=T
)
FAMILIES = {
    "llama": HF,
    "qwen2": dict(HF, num_key_value_heads=1),
    "qwen3": dict(HF, num_key_value_heads=1, head_dim=8),
    "mistral": dict(HF, num_key_value_heads=1, sliding_window=5),
    "gpt_neox": HF,
    "gpt2": dict(vocab_size=V, n_embd=24, n_layer=5, n_head=2, n_positions=T),
    "opt": dict(vocab_size=V, hidden_size=24, word_embed_proj_dim=24, ffn_dim=40, num_hidden_layers=5, num_attention_heads=2)
    | dict(max_position_embeddings=T),
}


def tokens(rows: int = 3, length: int = T) -> torch.Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(3))


def batches(rows: int = 6, size: int = 2):
    windows = tokens(rows, T + 1)
    return [next_token_batch(windows[first : first + size]) for first in range(0, rows, size)]


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """No weight at its first value, and layers that differ from one another."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model.eval()


def ours(preset: str = "llama", idle: tuple[int, ...] = ()) -> Decoder:
    """A model of this project; the layers in `idle` add nothing to the residual stream."""
    model = shaken(build_model(resolve(preset, **SHAPE)))
    with torch.no_grad():
        for index in idle:
            for name, parameter in model.blocks[index].named_parameters():
                if "o_proj" in name or "down_proj" in name:
                    parameter.zero_()
    return Decoder(model, model, name=preset, vocab_size=V, block_size=T)


def theirs(family: str):
    """transformers' model of a family with random weights."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family], pad_token_id=None, bos_token_id=0, eos_token_id=0)
    return shaken(transformers.AutoModelForCausalLM.from_config(config).float())


@pytest.fixture
def folder(tmp_path, request):
    """A Hugging Face folder of a family, as save_pretrained writes it."""
    theirs(request.param).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def ran_in(modules, call) -> list[int]:
    """How often each module runs to its end during a call."""
    counts = [0] * len(modules)

    def count(index):
        return lambda *_: counts.__setitem__(index, counts[index] + 1)

    hooks = [module.register_forward_hook(count(index)) for index, module in enumerate(modules)]
    call()
    for hook in hooks:
        hook.remove()
    return counts


# ------------------------------------------------------------------------------------------- states


@pytest.mark.parametrize("preset", ["gpt2", "llama", "gemma2", "hybrid"])
def test_states_of_our_own_models_are_those_between_the_blocks(preset):
    decoder, x = ours(preset), tokens()
    with torch.no_grad():
        state, context = decoder.model.front(x)
        expected = [state]
        for block in decoder.model.blocks:
            expected.append(block(expected[-1], context))
        assert torch.equal(decoder.model.tail(expected[-1]), decoder.logits(x))
    for found, state in zip(decoder.states(x, range(LAYERS + 1)), expected, strict=True):
        torch.testing.assert_close(found, state, rtol=0, atol=1e-6)


@pytest.mark.parametrize("folder", FAMILIES, indirect=True)
def test_states_of_any_hugging_face_decoder_are_those_that_it_gives_itself(folder):
    """transformers normalises the last of its states; ours is the one before the norm, at the top too."""
    decoder, x = open_decoder(str(folder)), tokens()
    with torch.no_grad():
        expected = decoder.model(input_ids=x, output_hidden_states=True, use_cache=False).hidden_states
    found = decoder.states(x, range(6))
    assert len(decoder.layers) == 5 == len(expected) - 1
    for index in range(5):
        torch.testing.assert_close(found[index], expected[index], rtol=0, atol=1e-6)
    norms = [m for m in decoder.model.modules() if "norm" in type(m).__name__.lower() and m.weight.shape == (24,)]
    assert any(torch.allclose(norm(found[5]), expected[5], atol=1e-6) for norm in norms)
    assert not torch.allclose(found[5], expected[5], atol=1e-2)


@pytest.mark.parametrize("folder", ["llama", "gpt2"], indirect=True)
def test_no_layer_runs_beyond_those_that_are_needed_and_no_weight_changes(folder):
    decoder, x = open_decoder(str(folder)), tokens()
    before = {name: tensor.clone() for name, tensor in decoder.model.state_dict().items()}
    for start, n in ((0, 1), (1, 2), (2, 3)):
        layers = [*decoder.layers, decoder.model.get_output_embeddings()]
        counts = ran_in(layers, lambda start=start, n=n: decoder.states(x, [start, start + n]))
        assert counts == [1] * (start + n) + [0] * (len(layers) - start - n)
    analyze(decoder, batches(), 2, "block_ppl")
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in decoder.model.parameters())
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in decoder.model.modules()] == [0] * len(
        list(decoder.model.modules())
    )


def test_a_model_without_a_list_of_layers_that_runs_in_order_is_refused():
    class Backwards(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.layers = torch.nn.Embedding(V, 4), torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            x = self.embedding(x)
            for layer in reversed(self.layers):
                x = layer(x)
            return x

    with pytest.raises(Failure, match="no list of layers that a forward pass goes through in order"):
        Decoder(Backwards(), Backwards(), name="backwards", vocab_size=V, block_size=T)


# ------------------------------------------------------------------------------------------- what is chosen


@pytest.mark.parametrize("name", MEASURED)
def test_three_layers_that_do_nothing_are_found_and_removing_them_changes_nothing(name):
    decoder, x = ours(idle=(3, 4, 5)), tokens()
    found = analyze(decoder, batches(), 3, name)
    if name != "block_ppl":  # removing what does nothing need not give the least perplexity of an untrained model
        assert found.best == 3
    assert found.cosine(3) == pytest.approx(1, abs=1e-6)
    assert all(found.cosine(start) < 1 - 1e-4 for start in found.scores if start != 3)
    whole = decoder.logits(x)
    with decoder.without(3, 3):
        torch.testing.assert_close(decoder.logits(x), whole, rtol=0, atol=1e-6)
        assert len(decoder.layers) == LAYERS - 3
    with decoder.without(2, 3):
        assert not torch.allclose(decoder.logits(x), whole, atol=1e-2)
    assert len(decoder.layers) == LAYERS and torch.equal(decoder.logits(x), whole)


def by_hand(decoder: Decoder, name: str, start: int, n: int) -> float:
    """The criterion in NumPy and fp64, or by a model that was built without the block."""
    everything = [batch.inputs for batch in batches()]
    one, other = (np.concatenate([decoder.states(x, [i])[0].double().numpy() for x in everything]) for i in (start, start + n))
    cosine = (one * other).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)
    if name == "cosine":
        return cosine.mean()
    if name == "angular_last":
        return (np.arccos(cosine[:, -1]) / math.pi).mean()
    if name == "block_influence":
        return sum(1 - by_hand(decoder, "cosine", layer, 1) for layer in range(start, start + n))
    if name == "linear_fit":
        x, y = one.reshape(-1, one.shape[-1]), other.reshape(-1, one.shape[-1])
        x, y = x - x.mean(0), y - y.mean(0)
        return ((y - x @ np.linalg.lstsq(x, y, rcond=None)[0]) ** 2).sum() / (y**2).sum()
    short = build_model(resolve(decoder.name, **{**SHAPE, "n_layer": LAYERS - n}))
    kept = [layer for layer in range(LAYERS) if not start <= layer < start + n]
    weights = decoder.model.state_dict()
    short.load_state_dict(
        {
            key: weights[re.sub(r"^blocks\.(\d+)", lambda found: f"blocks.{kept[int(found[1])]}", key)]
            for key in short.state_dict()
        }
    )
    losses = [F.cross_entropy(short.eval()(b.inputs).flatten(0, 1), b.targets.flatten(), reduction="none") for b in batches()]
    return math.exp(float(torch.cat(losses).detach().mean()))


@pytest.mark.parametrize("name", MEASURED)
def test_every_criterion_is_what_it_says_however_the_sample_is_divided(name):
    decoder = ours("gpt2")
    found = analyze(decoder, batches(size=2), 2, name)
    assert list(found.scores) == list(range(1, 7))
    for start in (1, 4, 6):
        assert found.scores[start] == pytest.approx(by_hand(decoder, name, start, 2), rel=1e-4, abs=1e-6), start
    choose = max if CRITERIA[name].high_is_better else min
    assert found.best == choose(found.scores, key=found.scores.get)
    divided = analyze(decoder, batches(size=5), 2, name)
    assert divided.scores == pytest.approx(found.scores, rel=1e-5) and divided.tokens == found.tokens == 6 * T


def test_the_control_chooses_by_its_seed_alone():
    decoder, chosen = ours(), []
    for seed in range(20):
        chosen.append(analyze(decoder, batches(2), 2, "random", seed=seed).best)
        assert analyze(decoder, batches(4), 2, "random", seed=seed).best == chosen[-1]
    assert len(set(chosen)) > 3


def test_cosines_of_every_block_are_there_for_the_picture():
    decoder = ours()
    found = analyze(decoder, batches(), 3)
    for start, n in ((0, 1), (2, 5), (7, 1), (0, 8)):
        assert float(found.cosines[start, start + n]) == pytest.approx(by_hand(decoder, "cosine", start, n), abs=1e-6)


def test_a_criterion_of_a_strangers_own_is_entered_in_one_place():
    @criterion("latest")
    class Latest(Criterion):
        high_is_better = True

        def add(self, batch, states):
            assert len(states) == LAYERS + 1

        def scores(self):
            return {start: float(start) for start in self.starts}

    try:
        assert analyze(ours(), batches(), 2, "latest").best == 6
        with pytest.raises(ValueError, match="already"):
            criterion("latest")(Latest)
    finally:
        del CRITERIA["latest"]


def test_the_embeddings_end_is_left_alone_unless_it_is_asked_for():
    assert block_starts(8, 3) == [1, 2, 3, 4, 5] and block_starts(8, 3, first=0)[0] == 0 and block_starts(2, 1) == [1]
    for layers, n, first, message in (
        (8, 8, 1, "would leave no layer"),
        (8, 7, 2, "take at most 6, or let the block begin at the embedding's end: --first=0"),
        (8, 1, 8, "--first=8 is outside"),
        (8, 1, -1, "--first=-1 is outside"),
    ):
        with pytest.raises(UsageError, match=message):
            block_starts(layers, n, first)


# ------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def trained(tiny_dataset, tmp_path_factory):
    """A run of two steps on the tiny dataset. Not to be changed."""
    out_dir = tmp_path_factory.mktemp("compress") / "out"
    run = (*TINY_RUN, "--n_layer=4", f"--dataset={tiny_dataset}", f"--out_dir={out_dir}", "--max_iters=2", "--eval_interval=0")
    assert train.main(list(run)) == 0
    return out_dir


def test_the_command_says_draws_and_writes_what_it_found(trained, tmp_path, capsys):
    target, picture = tmp_path / "a.json", tmp_path / "a.png"
    given = ["--n=2", "--samples=10", "--criterion=block_influence", f"--json={target}", f"--plot={picture}"]
    assert compress.main(["analyze", str(trained), *given]) == 0
    shown, found = capsys.readouterr().out, json.loads(target.read_text())
    best = found["best"]
    assert f"least is done by layers {best['start']} to {best['start'] + 1}" in shown and "block_influence" in shown
    assert best["n"] == 2 and found["layers"] == 4 and [one["start"] for one in found["candidates"]] == [1, 2]
    assert best["start"] == min(found["candidates"], key=lambda one: one["block_influence"])["start"]
    assert found["tokens"] == 10 * 16 and found["text"]["block_size"] == 16  # the model's, less than 512
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert compress.main(["analyze", str(trained), *given[:3], f"--json={tmp_path / 'b.json'}"]) == 0
    again = json.loads((tmp_path / "b.json").read_text())
    assert again == found


@pytest.mark.parametrize("folder", ["gpt_neox"], indirect=True)
def test_a_folder_without_a_tokenizer_works_on_a_dataset_whose_ids_fit(folder, tiny_dataset, tmp_path, capsys):
    assert compress.main(["analyze", str(folder), f"--dataset={tiny_dataset}", "--samples=3", f"--json={tmp_path / 'a'}"]) == 0
    assert json.loads((tmp_path / "a").read_text())["best"]["n"] == 1  # a quarter of 5 layers
    assert "GPTNeoXForCausalLM, 5 layers" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--n=4"], 2, "--n=4 would leave no layer of 4; take at most 3"),
        (["--first=4"], 2, "--first=4 is outside of the model, which has layers 0 to 3"),
        (["--criterion=cosin"], 2, "--criterion=cosin is not known.*cosine"),
        (["--block_size=17"], 2, "more than the 16 tokens that the model takes"),
        (["--plot=a.txt"], 2, "not a .png, .svg or .pdf"),
        (["--json=nowhere/a.json"], 2, "there is no folder"),
        (["--dataset=a:0.5,b:0.5"], 2, "one of its parts"),
        (["--dataset=nowhere"], 1, "nowhere"),
        (["--samples=0"], 2, "'0' is not a whole number from 1 on"),
    ],
)
def test_bad_input_is_one_sentence(trained, tmp_path, monkeypatch, capsys, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    assert compress.main(["analyze", str(trained), *arguments]) == code
    said = capsys.readouterr().err
    assert re.search(message, said) and "Traceback" not in said and not list(tmp_path.iterdir())


def test_a_dataset_of_another_tokenizer_is_refused(trained, tmp_path, capsys):
    from data.preparation import prepare

    prepare(lambda: iter([("a", "some text of characters " * 50)]), tmp_path / "other", tokenizer="char")
    assert compress.main(["analyze", str(trained), f"--dataset={tmp_path / 'other'}"]) == 1
    said = capsys.readouterr().err
    assert "made with another tokenizer" in said
    again = re.search("--tokenizer=(.*)[.]\n", said)[1]  # the advice works
    prepare(lambda: iter([("a", "some text of bytes " * 50)]), tmp_path / "again", tokenizer=again)
    assert compress.main(["analyze", str(trained), f"--dataset={tmp_path / 'again'}", "--samples=2"]) == 0


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_foreign_folders_that_are_not_whole_and_weights_that_are_no_numbers_are_said(folder, tiny_dataset, capsys):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    given = ["analyze", str(folder), f"--dataset={tiny_dataset}", "--samples=2"]
    save_file({n: w for n, w in weights.items() if "layers.2." not in n}, folder / "model.safetensors", {"format": "pt"})
    assert compress.main(given) == 1
    assert "has no weights for model.layers.2" in capsys.readouterr().err
    spoiled = {**weights, "model.layers.1.mlp.down_proj.weight": torch.full((24, 40), math.nan)}
    save_file(spoiled, folder / "model.safetensors", {"format": "pt"})
    assert compress.main(given) == 1
    assert "hold NaN or infinite numbers" in capsys.readouterr().err
    assert compress.main(["analyze", str(folder)]) == 2
    assert "--dataset=NAME" in capsys.readouterr().err


def test_every_criterion_is_named_in_the_help(capsys):
    with pytest.raises(SystemExit):
        compress.main(["analyze", "--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in CRITERIA)
