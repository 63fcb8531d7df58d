"""experiments/cpu_levels.py at a tiny size: the files it promises, its figures in a second way, and what may go wrong."""

import builtins
import collections
import itertools
import json
import re
import runpy
import shutil
import signal
import sys

import pytest
import torch
from conftest import ROOT
from torch.nn import functional as F

from configurator import configure
from data import story_grammar, tokenization
from data.prepare_command import embedded, run_recipe
from data.token_dataset import TokenDataset
from experiments import cpu_levels, level_plots, level_runs, level_tests
from training_logger import read_run

DOCUMENTED = {  # tokens, n_layer / n_head / n_embd, iterations: the table of the document that this began with
    1: (100, (2, 2, 32), 200),
    2: (200, (2, 2, 64), 500),
    3: (1_000, (3, 3, 96), 800),
    4: (3_000, (3, 3, 96), 1500),
    5: (10_000, (4, 4, 128), 2000),
}


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """A dataset like data/stories, of fewer stories, in a folder of that name."""
    folder = tmp_path_factory.mktemp("data") / "stories"
    assert run_recipe(embedded("stories"), [f"--out={folder}", "--max_samples=100", "--num_proc=1"]) == 0
    return folder


@pytest.fixture(scope="module", autouse=True)
def small_tests():
    """Few prompts, short texts, a small picture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(level_tests, "NEW_STORIES", 6)
        patch.setattr(level_tests, "NEW_TOKENS", 25)
        patch.setattr(level_plots, "DPI", 20)
        yield


def command(out_dir, stories, what, *more):
    """The command with this out_dir, at a tiny size where it trains; returns the exit code."""
    tiny = (f"--dataset={stories}", "--max_iters=4") if what in ("train", "all") else ()
    return cpu_levels.main([what, f"--out_dir={out_dir}", *tiny, *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, stories):
    """A study with everything, of levels 1 and 2; level 1 has a second seed, level 2 has not. Not to be changed."""
    out_dir = tmp_path_factory.mktemp("study") / "levels"
    assert command(out_dir, stories, "train", "--levels=1", "--seeds=2") == 0
    assert command(out_dir, stories, "all", "--levels=1,2", "--seeds=1") == 0
    return out_dir


@pytest.fixture
def study(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "levels")


# ------------------------------------------------------------------------------------------- what it makes


@pytest.mark.parametrize("level", DOCUMENTED)
def test_the_levels_are_the_documented_ones(level):
    train = configure([level_runs.config_of(level)]).train
    assert (train.max_train_tokens, (train.n_layer, train.n_head, train.n_embd), train.max_iters) == DOCUMENTED[level]
    assert (train.learning_rate, train.batch_size, train.block_size, train.dataset) == (1e-3, 4, 32, "stories")
    text = (ROOT / "config" / f"cpu_level{level}_{level_runs.LEVELS[level]}.py").read_text(encoding="utf-8")
    epochs = train.max_iters * 4 * 32 / train.max_train_tokens
    assert f"tokens {epochs:g} times" in text
    from flops_parameter_counting.parameters import count_parameters

    assert f"N = {count_parameters(train.model_config(1024)):,}" in text


def test_the_files_that_the_document_promises_are_there(finished):
    names = {"model_ultra_tiny_100_tokens", "model_ultra_tiny_100_tokens_seed1", "model_tiny_200_tokens", "model_index.json"}
    assert {path.name for path in (finished / "models").iterdir()} == names
    for name in names - {"model_index.json"}:
        model, tokenizer = cpu_levels.load_model(finished / "models" / name)
        assert not model.training and tokenizer.decode(tokenizer.encode("The cat found a toy.")) == "The cat found a toy."
        assert not [path for path in (finished / "models" / name).iterdir() if path.suffix in (".pt", ".bin", ".pkl")]
    assert (finished / "outputs" / "training_curves.png").read_bytes().startswith(b"\x89PNG")
    assert (finished / "outputs" / "test_results_new_data.json").is_file()


def test_the_losses_of_the_index_are_those_of_the_run_log_and_of_a_plain_cross_entropy(finished, stories):
    index = json.loads((finished / "models" / "model_index.json").read_text())["models"]
    assert [(one["level"], one["seed"]) for one in index] == [(1, 0), (1, 1), (2, 0)]
    data = TokenDataset.open(stories)
    for one in index:
        model, _ = cpu_levels.load_model(finished / "models" / one["name"])
        ids = torch.from_numpy(data.split("train").read(0, one["tokens"]))
        losses = []
        model.requires_grad_(False)
        for start in range(0, len(ids) - 1, 32):
            window = ids[start : start + 33]
            losses.append(F.cross_entropy(model(window[None, :-1])[0].float(), window[1:], reduction="none"))
        assert one["train_loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
        assert one["gap"] == one["val_loss"] - one["train_loss"]
        [log] = level_runs.run_folder(finished, one["level"], one["seed"]).glob("run_*.json")
        last = read_run(log)["evals"][-1]
        assert one["val_loss"] == pytest.approx(last["val_loss"], rel=1e-4)
        assert last["val_tokens"] == len(data.split("val")) - 1
        assert one["epochs"] == pytest.approx(4 * 128 / one["tokens"]) and one["parameters"] == model.num_parameters()


def test_seeds_give_different_models_from_the_same_text(finished):
    index = json.loads((finished / "models" / "model_index.json").read_text())["models"]
    first, second = (one for one in index if one["level"] == 1)
    assert first["val_loss"] != second["val_loss"] and first["dataset"] == second["dataset"]


def test_the_results_of_the_tests(finished, capsys):
    document = json.loads((finished / "outputs" / "test_results_new_data.json").read_text())
    new = [json.loads(line)["text"] for line in (finished / "outputs" / "new_text.jsonl").read_text().splitlines()]
    assert new == story_grammar.new_stories(6)
    by_level = {level["level"]: level for level in document["levels"]}
    assert by_level[1]["seeds"] == [0, 1] and by_level[2]["seeds"] == [0]
    for one in document["models"]:
        model, tokenizer = cpu_levels.load_model(finished / "models" / one["name"])
        model.requires_grad_(False)
        ids = torch.tensor(list(itertools.chain.from_iterable([*tokenizer.encode(text), tokenizer.eos_id] for text in new)))
        nll = 0.0
        for start in range(0, len(ids) - 1, 32):
            window = ids[start : start + 33]
            nll += float(F.cross_entropy(model(window[None, :-1])[0].float(), window[1:], reduction="sum"))
        assert one["new_loss"] == pytest.approx(nll / (len(ids) - 1), rel=1e-5)
        assert one["new_perplexity"] == pytest.approx(2.718281828 ** one["new_loss"], rel=1e-6)
        assert one["tokens_per_parameter"] == one["tokens"] / one["parameters"]
        assert [sample["prompt"] for sample in one["samples"]] == list(level_tests.PROMPTS)
        assert all(sample["text"].startswith(sample["prompt"]) for sample in one["samples"])
    gaps = sorted(one["gap"] for one in document["models"] if one["level"] == 1)
    assert by_level[1]["gap"] == pytest.approx([sum(gaps) / 2, *gaps])
    table = level_tests.levels_markdown(document["levels"]).splitlines()
    assert table[0].count("|") == 4 and table[0].startswith("| level | 1 ultra tiny | 2 tiny |")


def test_a_sample_is_what_sample_py_writes(finished, capsys):
    import sample

    document = json.loads((finished / "outputs" / "test_results_new_data.json").read_text())
    one = document["models"][0]
    words = ["--device=cpu", "--dtype=float32", "--seed=0", "--max_new_tokens=25", "--no_stream"]
    capsys.readouterr()
    prompts = f"--prompts_file={finished / 'outputs' / 'new_prompts.txt'}"
    assert sample.main([str(finished / "models" / one["name"]), prompts, *words]) == 0
    assert capsys.readouterr().out.rstrip("\n").split("\n---------------\n") == [shown["text"] for shown in one["samples"]]


def test_quality_counts_sentences_that_are_whole():
    prompts = ["Tom was a big boy. Tom had", "Lily was a big girl. She"]
    texts = [
        "Tom was a big boy. Tom had a red ball. Tom had red. It was a sunny day. The",
        "Lily was a big girl. She" + " ran" * 30,
    ]
    found = level_tests.judge_texts(prompts, texts, learnt="It was a sunny day. Tom was a big boy.")
    assert found == {"sentences": 4, "quality": 2 / 4, "quality_new": 1 / 4}
    assert level_tests.judge_texts(["A"], ["A b"], "") == {"sentences": 0, "quality": None, "quality_new": None}


def test_variety_by_counting():
    texts = ["a b a b a b", "a b c d"]
    found = level_tests.variety(texts)
    pairs = collections.Counter(itertools.chain.from_iterable(itertools.pairwise(text.split()) for text in texts))
    assert found["distinct_1"] == 4 / 10 and found["distinct_2"] == len(pairs) / sum(pairs.values()) == 4 / 8
    assert found["repetition"] == 1 - 3 / 4  # abab, baba, abab again; abcd
    assert level_tests.variety([""]) == {"distinct_1": None, "distinct_2": None, "repetition": None}


# ------------------------------------------------------------------------------------------- going on


def logs(out_dir):
    return {path: path.stat().st_mtime_ns for path in out_dir.rglob("run_*.jsonl")}


def test_what_is_finished_is_not_done_again_and_a_lost_model_is_made_again(study, stories, capsys):
    before = logs(study)
    shutil.rmtree(study / "models" / "model_tiny_200_tokens")
    (study / "models" / "model_ultra_tiny_100_tokens" / "model.safetensors").write_bytes(b"spoilt")
    (study / "models" / ".writing_model_tiny_200_tokens").mkdir()
    assert command(study, stories, "train", "--levels=1,2", "--seeds=1") == 0
    assert capsys.readouterr().out.count("(was there)") == 2 and logs(study) == before
    for name in ("model_tiny_200_tokens", "model_ultra_tiny_100_tokens"):
        assert cpu_levels.load_model(study / "models" / name)
    assert not list((study / "models").glob(".writing*"))


def test_stopped_in_the_middle_it_goes_on_to_the_same_model(tmp_path, stories, finished, monkeypatch, capsys):
    from training.report import Report

    step_done, steps = Report.step_done, []

    def interrupt(report):
        step_done(report)
        steps.append(1)
        if len(steps) == 6:  # the second step of the second run
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Report, "step_done", interrupt)
    assert command(tmp_path, stories, "train", "--levels=1,2", "--seeds=1") == 0
    out = capsys.readouterr().out
    assert "Stopped" in out and "[1/2]" in out and "[2/2]" not in out and len(steps) == 6
    assert not (tmp_path / "models" / "model_tiny_200_tokens").exists()
    assert f"To go on: python experiments/cpu_levels.py train --out_dir={tmp_path} --seeds=1 --levels=1,2" in out
    assert command(tmp_path, stories, "train", "--levels=1,2", "--seeds=1") == 0
    assert len(steps) == 8  # two steps were left
    model, _ = cpu_levels.load_model(tmp_path / "models" / "model_tiny_200_tokens")
    whole, _ = cpu_levels.load_model(finished / "models" / "model_tiny_200_tokens")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), whole.parameters()))


def test_asked_to_stop_while_a_run_finishes_no_other_one_is_begun(tmp_path, stories, monkeypatch, capsys):
    from training.report import Report

    evaluation = Report.evaluation

    def interrupt(report, progress, found):
        evaluation(report, progress, found)
        if progress.step == 4:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Report, "evaluation", interrupt)
    assert command(tmp_path, stories, "train", "--levels=1,2", "--seeds=1") == 0
    assert "Stopped" in capsys.readouterr().out and not level_runs.run_folder(tmp_path, 2, 0).exists()


def test_another_study_in_the_same_folder_is_refused(study, stories, capsys):
    before = logs(study)
    assert command(study, stories, "train", "--levels=1,2", "--seeds=1", "--dropout=0.5") == 2
    error = capsys.readouterr().err
    assert "dropout=0.0" in error and "choose another --out_dir" in error and "Traceback" not in error
    assert logs(study) == before


def test_a_run_that_fails_says_so(tmp_path, stories, capsys):
    assert command(tmp_path, stories, "train", "--levels=1", "--seeds=1", "--learning_rate=1e30", "--nonfinite_limit=1") == 1
    error = capsys.readouterr().err
    assert "level 1 (ultra tiny), seed 0 failed" in error and "output.txt" in error and "Traceback" not in error


# ------------------------------------------------------------------------------------------- what may go wrong


@pytest.mark.parametrize("what", ["test", "plot", "generate"])
def test_before_anything_is_trained(what, tmp_path, capsys):
    assert cpu_levels.main([what, f"--out_dir={tmp_path}"]) == 1
    assert capsys.readouterr().err == (
        f"cpu_levels.py: There are no models in {tmp_path / 'models'} yet; train them first: python experiments/cpu_levels.py "
        f"train --out_dir={tmp_path}\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda index: "no JSON", "Expecting value"),
        (lambda index: [], "not an object"),
        (lambda index: {**index, "models": None}, "it lacks models"),
        (lambda index: {**index, "format_version": 99}, "format_version is 99"),
        (lambda index: {**index, "models": []}, "names no models"),
        (lambda index: edited(index, train_loss="low"), "train_loss is 'low'"),
        (lambda index: edited(index, name="../../elsewhere"), "are not those of '../../elsewhere'"),
        (lambda index: edited(index, level=9), "level 9"),
        (lambda index: edited(index, parameters=0), "parameters of model_ultra_tiny_100_tokens is 0"),
        (lambda index: edited(index, dataset={}), "it lacks models[0].dataset.name"),
        (lambda index: edited(index, seed=5, name="model_ultra_tiny_100_tokens_seed5"), "is not there"),
        (lambda index: edited(index, tokens=777, name="model_ultra_tiny_777_tokens"), "is not there"),
    ],
)
def test_an_index_edited_by_hand_is_one_sentence_and_training_writes_it_anew(spoil, said, study, stories, capsys):
    path = study / "models" / "model_index.json"
    good = path.read_text()
    spoilt = spoil(json.loads(good))
    path.write_text(spoilt if isinstance(spoilt, str) else json.dumps(spoilt))
    for what in ("test", "plot", "generate"):
        assert cpu_levels.main([what, f"--out_dir={study}"]) == 1
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1 and str(path) in error
    if "777" in path.read_text():  # once is enough
        assert command(study, stories, "train", "--levels=1", "--seeds=1") == 0
        assert path.read_text() == good


def edited(index, **changes):
    return {**index, "models": [{**index["models"][0], **changes}, *index["models"][1:]]}


def test_a_model_that_was_put_in_the_place_of_another_is_found(study, capsys):
    models = study / "models"
    shutil.rmtree(models / "model_ultra_tiny_100_tokens")
    shutil.copytree(models / "model_ultra_tiny_100_tokens_seed1", models / "model_ultra_tiny_100_tokens")
    assert cpu_levels.main(["test", f"--out_dir={study}"]) == 1
    assert "was trained on 100 tokens with seed 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "Say what is to be done: train, test, plot, generate, all; the menu is for a terminal."),
        (["--levels=1"], "Say first what is to be done"),
        (["learn"], "invalid choice: 'learn'"),
        (["train", "--levels=0"], "'0' is not a level from 1 to 5"),
        (["train", "--levels=3-1"], "'3-1' ends before it begins"),
        (["train", "--seeds=0"], "'0' is not a whole number from 1 on"),
        (["train", "--out_dir="], "--out_dir is empty"),
        (["train", "--seed=3"], "--seed cannot be given"),
        (["train", "--resume"], "--resume cannot be given"),
        (["train", "--max_itres=3"], "max_itres"),
        (["train", "config/quickstart.py"], "each level has its own config file"),
        (["train", "--print_config"], "--print_config is train.py's own"),
        (["train", "--prompt=Tom"], "--prompt is for test and generate"),
        (["train", "--tokenizer=gpt2", "--dataset=pydocs"], "give one of them"),
        (["train", "--tokenizer=char"], "invalid choice: 'char'"),
        (["test", "--max_iters=3"], "--max_iters=3 is not an option of test"),
        (["test", "--text=nowhere.txt"], "there is no such file"),
        (["test", "--prompt=Tom", "--prompt= "], "one line that is not empty"),
        (["test", "--prompt=Tom\nand"], "one line that is not empty"),
        (["generate", "--levels=1"], "give --level=N"),
        (["plot", "--level=1"], "--level is for generate"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_sentence(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cpu_levels.main(words) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and not list(tmp_path.iterdir())


def test_gpt2s_tokenizer_where_its_files_are_and_where_they_are_not(tmp_path, monkeypatch, capsys):
    import tiktoken

    def missing(name):
        raise tokenization.TokenizerUnavailable("tiktoken cannot get the files of the GPT-2 tokenizer; use --tokenizer=bpe.")

    words = ["train", f"--out_dir={tmp_path}", "--tokenizer=gpt2", "--levels=1", "--seeds=1", "--max_iters=2"]
    monkeypatch.setattr(cpu_levels, "GPT2_STORIES", 200)
    monkeypatch.setattr(tokenization, "_fetch_encoding", missing)
    assert cpu_levels.main(words) == 1
    assert "tiktoken cannot get the files of the GPT-2 tokenizer" in capsys.readouterr().err
    small = tiktoken.Encoding(  # bytes in place of its 50,257
        "gpt2",
        pat_str=tokenization.TIKTOKEN_PATTERNS["gpt2"],
        mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={"<|endoftext|>": 256},
    )
    monkeypatch.setattr(tokenization, "_fetch_encoding", lambda name: small)
    assert cpu_levels.main(words) == 0
    model, tokenizer = cpu_levels.load_model(tmp_path / "models" / "model_ultra_tiny_100_tokens")
    assert tokenizer.kind == "gpt2" and model.config.vocab_size == 257


# ------------------------------------------------------------------------------------------- generate, menu, notebook


def test_generate_continues_with_the_highest_level_or_the_one_asked_for(finished, capsys):
    assert cpu_levels.main(["generate", f"--out_dir={finished}", "--prompt=Mia saw a", "--max_new_tokens=3"]) == 0
    highest = capsys.readouterr().out
    assert highest.startswith("Mia saw a")
    words = ["--prompt=Mia saw a", "--max_new_tokens=3", "--no_stream"]
    assert cpu_levels.main(["generate", f"--out_dir={finished}", "--level=2", *words]) == 0
    assert capsys.readouterr().out == highest
    assert cpu_levels.main(["generate", f"--out_dir={finished}", "--level=1", *words]) == 0
    assert capsys.readouterr().out != highest
    assert cpu_levels.main(["generate", f"--out_dir={finished}", "--level=5"]) == 1
    assert "has no model of level 5; train it first" in capsys.readouterr().err


def test_the_menu(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    shutil.copytree(finished, tmp_path / "out" / "cpu_levels")
    answers = iter(["", "9", "2", "7", "4", "Tom saw a", "q"])
    monkeypatch.setattr(cpu_levels, "at_a_terminal", lambda: True)
    monkeypatch.setattr(builtins, "input", lambda question: next(answers))
    monkeypatch.setattr(cpu_levels.menu, "__defaults__", (builtins.input,))
    assert cpu_levels.main([]) == 0 and next(answers, None) is None
    out, err = capsys.readouterr()
    assert "'9' is none of 1, 2, 3, 4, 5, 6 and q." in out and "Tom saw a" in out
    assert "'7' is not a level from 1 to 5" in err

    def closed(question):
        raise EOFError

    assert cpu_levels.menu(closed) == 0


def test_run_as_a_script_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cpu_levels.py"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "experiments" / "cpu_levels.py"), run_name="__main__")
    assert end.value.code == 2 and "the menu is for a terminal" in capsys.readouterr().err


def test_the_picture_leaves_out_what_is_gone_and_a_spoilt_file_of_results(study, capsys):
    shutil.rmtree(level_runs.run_folder(study, 1, 1))
    (study / "outputs" / "test_results_new_data.json").write_text('{"models": [1, {"tokens": "x"}]}')
    assert level_plots.results_of(study) == []
    assert cpu_levels.main(["plot", f"--out_dir={study}", "--levels=1"]) == 0


def test_tinystories_take_the_same_recipe(stories, tmp_path):
    import train

    config = configure(["config/cpu_level6_tinystories.py"]).train
    assert config.dataset == "tinystories" and config.learning_rate == 1e-3 and config.max_train_tokens is None
    text = (ROOT / "config" / "cpu_level6_tinystories.py").read_text(encoding="utf-8")
    assert f"{config.max_iters * 8192 / 1e6:.0f} M tokens" in text and re.search(r"163,840 tokens", text) and 20 * 8192 == 163_840
    tiny = ["--n_embd=32", "--batch_size=2", "--max_iters=2", "--eval_iters=1", f"--dataset={stories}", "--device=cpu"]
    assert train.main(["config/cpu_level6_tinystories.py", *tiny, f"--out_dir={tmp_path}"]) == 0


def run_notebook(path, parameters):
    """Execute the code cells of a notebook by plain Python in a namespace of their own, as Jupyter would one after the other.

    parameters: Python that takes the place of the cell tagged "parameters".
    """
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) >= (4, 5) and len({cell["id"] for cell in notebook["cells"]}) > 10
    namespace, run = {"__name__": "__main__"}, 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            chosen = "parameters" in cell["metadata"].get("tags", ())
            text = parameters if chosen else "".join(cell["source"])
            exec(compile(text, f"{path.name} {cell['id']}", "exec"), namespace)
            run += 1
    assert "parameters" in str(notebook) and run >= 8
    return namespace


def test_the_notebook_runs(stories, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT / "docs")
    monkeypatch.setattr(sys, "path", [*sys.path])
    more = [f"--dataset={stories}", "--max_iters=4"]
    found = run_notebook(
        ROOT / "docs" / "overfitting.ipynb", f"OUT_DIR, LEVELS, SEEDS, MORE = {str(tmp_path / 'book')!r}, '2', 1, {more!r}"
    )
    out = capsys.readouterr().out
    assert [one["level"] for one in found["index"]] == [2] and "tokens a parameter: train" in out
    assert "Lily lost his doll in the park.     None" in out and "{h} lost {h.their} {thing} in the {place}." in out
    assert (tmp_path / "book" / "outputs" / "training_curves.png").is_file() and "Tom and Lily" in out


# ------------------------------------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def recorded():
    """The results that docs/OVERFITTING.md is written from, as `cpu_levels.py all` wrote them."""
    return json.loads((ROOT / "docs" / "overfitting_results.json").read_text(encoding="utf-8"))


def test_the_page_shows_what_was_recorded_and_nothing_selected(recorded):
    page = (ROOT / "docs" / "OVERFITTING.md").read_text(encoding="utf-8")
    assert level_tests.levels_markdown(recorded["levels"]) in page
    assert f"{len(story_grammar.PARTS)} sentence patterns and {len(story_grammar.known_words())} words and marks" in page
    for one in recorded["models"]:
        if one["seed"] == 0 and one["level"] in (4, 5):
            assert len(one["samples"]) == len(level_tests.PROMPTS)
            assert all(f"> {sample['text']}\n" in page for sample in one["samples"])
    assert (ROOT / "docs" / "overfitting_curves.png").read_bytes().startswith(b"\x89PNG")
    assert recorded["models"][0]["dataset"]["name"] == "stories" and len(recorded["models"]) == 15


def test_what_the_page_claims_is_in_the_record(recorded):
    levels = {one["level"]: one for one in recorded["levels"]}
    gap, quality = ({level: one[key] for level, one in levels.items()} for key in ("gap", "quality"))
    assert all(gap[level][1] > gap[level + 1][2] for level in (2, 3, 4))  # falls, and no two of these ranges meet
    assert gap[1][1] >= 3 * gap[5][2]
    assert gap[1][0] < gap[2][0] and levels[1]["train_loss"][1] > 2  # the exception, and why
    medians = [quality[level][0] for level in sorted(quality)]
    assert medians == sorted(medians) and len(set(medians)) == 5
    for one in recorded["models"]:  # the sums and shares of the table, again
        assert one["gap"] == one["val_loss"] - one["train_loss"]
        assert one["epochs"] == DOCUMENTED[one["level"]][2] * 128 / one["tokens"]
        assert one["new_loss"] == pytest.approx(one["val_loss"], rel=0.1)  # two texts of the same grammar


def test_every_command_of_the_page_can_be_given(finished, stories, tmp_path, monkeypatch, capsys):
    """Those that train are given to the parser and to the planner; the others run on a study that is finished."""
    import shlex

    page = (ROOT / "docs" / "OVERFITTING.md").read_text(encoding="utf-8")
    lines = re.findall(r"^python .*", page, re.M) + re.findall(r"`(python experiments/.*?)`", page)
    done = set()
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        if words[0] == "train.py":
            configure(words[1:])
        elif words[0] == "experiments/cpu_levels.py" and words[1:]:
            options, rest = cpu_levels.make_parser().parse_known_args(words[1:])
            cpu_levels.check_options(options, rest)
            given = dict(word.removeprefix("--").split("=") for word in rest)
            if options.what in ("train", "all"):
                given |= {"dataset": str(stories)}
                level_runs.plan_runs(tmp_path / "none", (options.levels or (1,))[:1], 1, {**given, "max_train_tokens": "100"})
            elif options.what == "generate":
                level = f"--level={min(2, options.level or 2)}"
                words = [word for word in words[1:] if not word.startswith("--level=")]
                assert cpu_levels.main([*words, level, f"--out_dir={finished}", "--max_new_tokens=2"]) == 0
            done.add(options.what)
    assert done == {"all", "train", "test", "plot", "generate"}
    for code in re.findall(r'python -c "(.*?)"', page):
        exec(code, {})
    assert "{h} lost {h.their} {thing} in the {place}." in capsys.readouterr().out


@pytest.mark.slow
def test_the_study_itself_shows_what_the_page_says(tmp_path):
    """One seed of all five levels, some minutes."""
    assert cpu_levels.main(["all", "--seeds=1", f"--out_dir={tmp_path}"]) == 0
    results = json.loads((tmp_path / "outputs" / "test_results_new_data.json").read_text())["models"]
    gaps, quality = [one["gap"] for one in results], [one["quality"] for one in results]
    assert gaps[1] > gaps[2] > gaps[3] > gaps[4] and gaps[0] > 3 * gaps[4] and quality == sorted(quality)
