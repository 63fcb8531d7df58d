"""Scaling laws: the published constants, the closed form against a search that knows nothing of it, data that run out,
and what a question in a file may look like."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy
import pytest

from flops_parameter_counting.flops import flops_per_token
from flops_parameter_counting.parameters import count_parameters
from flops_parameter_counting.scaling_laws import (
    LAWS,
    ScalingLaw,
    best_allocation,
    candidates,
    effective,
    embedding_parameters,
    golden_section,
    isoflop,
    kaplan,
    positive,
    read_question,
)
from model_builder import build_model
from model_config import resolve

CONFIGS = Path(__file__).resolve().parent.parent / "flops_parameter_counting" / "configs" / "scaling_laws"
BUDGETS = [1e17, 1.36e21, 1e25]
OWN = ScalingLaw("own", E=0.5, A=3.0, B=900.0, alpha=0.1, beta=0.6, gamma=1.4)
EVERY_LAW = [*LAWS.values(), OWN]


# ------------------------------------------------------------------------------------------- the laws


def test_the_constants_are_the_published_ones():
    hoffmann, besiroglu, k = LAWS["hoffmann"], LAWS["besiroglu"], LAWS["kaplan"]
    assert (hoffmann.E, hoffmann.A, hoffmann.B, hoffmann.alpha, hoffmann.beta) == (1.69, 406.4, 410.7, 0.34, 0.28)
    assert (besiroglu.E, besiroglu.A, besiroglu.B, besiroglu.alpha, besiroglu.beta) == (1.8172, 482.01, 2085.43, 0.3478, 0.3658)
    assert all(law.source for law in LAWS.values())
    assert not k.embeddings and hoffmann.embeddings and besiroglu.embeddings
    for n, d in ((1e8, 1e9), (3e9, 3e11), (1e12, 1e10)):  # Kaplan et al. 2020, eq. 1.5, as it is printed
        assert k.loss(n, d) == pytest.approx(((6.4e13 / n) ** (0.076 / 0.103) + 1.8e13 / d) ** 0.103, rel=1e-12)


@pytest.mark.parametrize("law", EVERY_LAW, ids=lambda law: law.name)
def test_a_run_that_repeats_nothing_has_the_loss_of_the_law(law):
    """Issue 14.9: parameters beyond those that the dataset calls for were charged though no token came twice."""
    for n in (1e7, 1e9, 1e11):
        for d in (1e8, 1e9, 9.999e9, 1e10):
            assert law.loss_with_repeats(n, d, 1e10) == law.loss(n, d)
        assert law.loss_with_repeats(n, 4e10, 1e10) >= law.loss(n, 4e10)


@pytest.mark.parametrize("law, n, d, digits", [("hoffmann", 2.1e9, 108e9, 2), ("besiroglu", 3.25e9, 70e9, 2)])
def test_the_optimum_of_a_known_budget_is_the_known_one(law, n, d, digits):
    found_n, found_d = LAWS[law].optimum(1.36e21)
    assert found_n == pytest.approx(n, rel=0.01) and found_d == pytest.approx(d, rel=0.01)


@pytest.mark.parametrize("compute", BUDGETS)
@pytest.mark.parametrize("law", EVERY_LAW, ids=lambda law: law.name)
def test_the_closed_form_is_what_a_scan_of_all_sizes_finds(law, compute):
    n, d = law.optimum(compute)
    assert 6 * n * d == pytest.approx(compute, rel=1e-12)
    sizes = numpy.exp(numpy.linspace(math.log(n) - 5, math.log(n) + 5, 400_001))
    losses = law.loss(sizes, compute / (6 * sizes))
    assert sizes[losses.argmin()] == pytest.approx(n, rel=1e-4)  # the scan's own step is 2.5e-5
    assert law.loss(n, d) <= losses.min() * (1 + 1e-12)
    assert law.matching_parameters(d) == pytest.approx(n, rel=1e-9)


@pytest.mark.parametrize("law", EVERY_LAW, ids=lambda law: law.name)
def test_an_isoflop_curve_spends_its_budget_and_has_its_valley_at_the_optimum(law):
    curve = isoflop(law, 1e21)
    assert all(6 * n * d == pytest.approx(1e21) for n, d, _ in curve)
    losses = [loss for _, _, loss in curve]
    middle = len(curve) // 2
    assert losses.index(min(losses)) == middle and curve[middle][0] == pytest.approx(law.optimum(1e21)[0])
    assert all(a > b for a, b in zip(losses[:middle], losses[1:]))
    assert all(a < b for a, b in zip(losses[middle:], losses[middle + 1 :]))


@pytest.mark.parametrize("wrong", [dict(A=-1), dict(alpha=0), dict(beta=math.inf), dict(E=-0.1), dict(gamma=math.nan)], ids=str)
def test_a_law_under_which_more_would_not_help_is_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.* of the scaling law 'x' must"):
        ScalingLaw("x", **{**dict(E=1, A=2, B=3, alpha=0.3, beta=0.3), **wrong})
    with pytest.raises(ValueError, match="alpha_D=0.* must be positive"):
        kaplan("x", 1e13, 1e13, 0.07, 0.0)


@pytest.mark.parametrize("compute", [0, -1e20, math.inf, math.nan])
def test_a_budget_that_buys_nothing_is_refused(compute):
    with pytest.raises(ValueError, match="buys no training"):
        LAWS["hoffmann"].optimum(compute)


def test_golden_section_finds_the_bottom_of_a_valley():
    assert golden_section(lambda x: (x - 1.234) ** 2, -5, 9) == pytest.approx(1.234, abs=1e-6)


# ------------------------------------------------------------------------------------------- data that run out


def test_repeated_tokens_are_worth_what_the_paper_says():
    """Muennighoff et al. 2023: up to four epochs are almost as good as new data, beyond some forty nothing is gained."""
    unique = 1e9
    assert effective(unique, unique, 15.387756) == unique
    assert 0.9 < effective(4 * unique, unique, 15.387756) / (4 * unique) < 0.95
    gained = [effective((k + 1) * unique, unique, 15.387756) - effective(k * unique, unique, 15.387756) for k in range(1, 80)]
    assert all(a > b > 0 for a, b in zip(gained, gained[1:])) and gained[58] < 0.03 * unique
    # the sum of the decaying worth of each repeat, in small steps, is the formula
    steps = numpy.arange(0, 9, 1e-4) + 5e-5
    worth = unique * (1 + 1e-4 * numpy.exp(-steps / 15.387756).sum())
    assert effective(10 * unique, unique, 15.387756) == pytest.approx(worth)


def test_a_limited_dataset_is_charged_for_repeats_and_for_excess_parameters():
    """Muennighoff et al. 2023, eq. 5 and 6 written out, with their law (App. A): A 521, B 1488, both exponents 0.3527."""
    law, unique = ScalingLaw("c4", E=1.87, A=521, B=1488, alpha=0.3527, beta=0.3527), 2e9
    fitting = (521 / 1488) ** (1 / 0.3527) * unique  # exponents alike: N in proportion to the data
    assert law.matching_parameters(unique) == pytest.approx(fitting) and 0.04 < fitting / unique < 0.06  # 0.051 there
    n, d = 3 * fitting, 5 * unique
    n_worth = fitting + fitting * 5.309743 * (1 - math.exp(-2 / 5.309743))
    d_worth = unique + unique * 15.387756 * (1 - math.exp(-4 / 15.387756))
    assert law.loss_with_repeats(n, d, unique) == pytest.approx(1.87 + 521 / n_worth**0.3527 + 1488 / d_worth**0.3527)


@pytest.mark.parametrize("law", EVERY_LAW, ids=lambda law: law.name)
def test_enough_data_change_nothing_and_fewer_cost_loss(law):
    free = best_allocation(law, 1e21)
    assert (free.parameters, free.tokens) == law.optimum(1e21)
    assert best_allocation(law, 1e21, unique=free.tokens * 1.01) == free
    losses = [best_allocation(law, 1e21, unique=free.tokens * share).loss for share in (1.0, 0.5, 0.1, 0.02)]
    assert losses[0] == pytest.approx(free.loss, rel=1e-9) and all(a < b for a, b in zip(losses, losses[1:]))
    for n, d in ((free.parameters, free.tokens), (free.parameters / 3, free.tokens)):
        assert law.loss_with_repeats(n, d, free.tokens) == pytest.approx(law.loss(n, d), rel=1e-9)
        assert law.loss_with_repeats(n, d, math.inf) == pytest.approx(law.loss(n, d), rel=1e-12)


@pytest.mark.parametrize("max_epochs", [math.inf, 4, 1])
@pytest.mark.parametrize("law", EVERY_LAW, ids=lambda law: law.name)
def test_no_plan_within_the_limits_is_better_than_the_best_plan(law, max_epochs):
    compute, unique = 1e21, law.optimum(1e21)[1] / 20
    plan = best_allocation(law, compute, unique, max_epochs)
    assert plan.compute == pytest.approx(6 * plan.parameters * plan.tokens) and plan.compute <= compute * (1 + 1e-9)
    assert plan.tokens <= unique * max_epochs * (1 + 1e-9)
    rng = numpy.random.default_rng(0)
    for _ in range(2000):
        n = plan.parameters * math.exp(rng.uniform(-4, 4))
        d = min(compute / (6 * n), unique * max_epochs) * rng.uniform(0.2, 1.0) ** 2
        assert law.loss_with_repeats(n, d, unique) >= plan.loss * (1 - 1e-9)


@pytest.mark.parametrize("limits", [dict(unique=0), dict(unique=-1e9), dict(unique=1e9, max_epochs=0)], ids=str)
def test_limits_that_leave_no_data_are_refused(limits):
    with pytest.raises(ValueError, match="must be positive"):
        best_allocation(LAWS["hoffmann"], 1e20, **limits)


# ------------------------------------------------------------------------------------------- models one can build


@pytest.mark.parametrize("preset", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("law", LAWS.values(), ids=lambda law: law.name)
def test_candidates_can_be_built_cost_what_they_say_and_lie_near_the_best(law, preset):
    compute = 1e20
    found = candidates(law, compute, preset, vocab_size=4096, block_size=512)
    assert [one.loss for one in found] == sorted(one.loss for one in found) and len(found) > 5
    for one in (found[0], found[-1]):
        model = build_model(one.config, device="meta")
        assert sum(p.numel() for p in model.parameters()) == one.parameters == count_parameters(one.config)
        assert one.flops_per_token == flops_per_token(one.config).full
        assert one.tokens * one.flops_per_token == pytest.approx(compute)
        tables = [
            model.embedding.weight,
            *([] if one.config.weight_tying else [model.head.weight]),
            *([model.position.table.weight] if preset == "gpt2" else []),
        ]
        assert embedding_parameters(one.config) == sum(table.numel() for table in tables)
        n = one.parameters - (0 if law.embeddings else embedding_parameters(one.config))
        assert one.loss == pytest.approx(law.loss(n, one.tokens))
    assert found[0].loss == pytest.approx(best_allocation(law, compute).loss, rel=0.03)  # FLOPs a token are not quite 6·N


def test_candidates_stay_within_the_data():
    found = candidates(LAWS["besiroglu"], 1e20, unique=1e9, max_epochs=4, vocab_size=4096, block_size=512)
    assert all(one.tokens <= 4e9 and one.tokens * one.flops_per_token <= 1e20 * (1 + 1e-9) for one in found)


# ------------------------------------------------------------------------------------------- questions in files

SHIPPED = sorted(CONFIGS.rglob("*.jsonc"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_question_is_read_and_has_the_constants_of_its_folder(path):
    question = read_question(path)
    if path.parent.name in LAWS:
        law = LAWS[path.parent.name]
        assert {key: getattr(question.law, key) for key in ("E", "A", "B", "alpha", "beta", "gamma", "embeddings")} == {
            key: getattr(law, key) for key in ("E", "A", "B", "alpha", "beta", "gamma", "embeddings")
        }
    peak = question.gpu.peak(question.dtype).flops
    assert question.compute == pytest.approx(question.count * question.hours * 3600 * question.mfu * peak)
    resolve(question.preset, **question.model)


def test_all_four_kinds_of_law_are_shipped():
    assert {path.parent.name for path in SHIPPED} == {"hoffmann", "besiroglu", "kaplan", "custom"}


GOOD = {"law": "hoffmann", "gear": {"gpu": "H100 SXM", "count": 8, "hours": 24, "mfu": 0.4}}


def write(tmp_path, content) -> Path:
    path = tmp_path / "question.jsonc"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_slashes_in_a_text_are_no_comment(tmp_path):
    question = read_question(
        write(
            tmp_path,
            """
        // a comment with a "quote
        {"law": {"name": "a // b", "E": 1.7, "A": 400, "B": 400, "alpha": 0.3, /* "alpha": 9, */ "beta": 0.3,
                 "source": "https://example.org//laws?x=/*1*/"},   // https://example.org
         "gear": {"gpu": "H20", "count": 4, "hours": 1e1, "mfu": 0.4,},
        }""",
        )
    )
    assert question.law.name == "a // b" and question.law.source == "https://example.org//laws?x=/*1*/"
    assert question.law.alpha == 0.3 and question.hours == 10.0 and question.gpu.name == "H20"


def changed(section: str, **values) -> dict:
    return {**GOOD, section: {**GOOD.get(section, {}), **values}}


@pytest.mark.parametrize(
    "content, said",
    [
        ("", "is not JSON with comments"),
        ("{", "is not JSON with comments"),
        ("[1]", "must hold an object"),
        ('{"law": "kaplan", "law": "hoffmann"}', 'Duplicate key "law"'),
        ({}, "law is missing"),
        ({**GOOD, "law": "chinchila"}, "law='chinchila' is not one of hoffmann, besiroglu, kaplan"),
        ({**GOOD, "law": {"form": "power"}}, "law.form='power' is not one of chinchilla, kaplan"),
        ({**GOOD, "law": {"E": 1, "A": 2, "B": 3, "alpha": 0.3}}, "law.beta is missing"),
        ({**GOOD, "law": {"E": 1, "A": 2, "B": 3, "alpha": 0.3, "bta": 1}}, "law.bta is not known (did you mean 'beta'?)"),
        ({**GOOD, "law": {"E": 1, "A": "2", "B": 3, "alpha": 0.3, "beta": 0.3}}, "law.A='2' is not a number"),
        (
            {**GOOD, "law": {"E": 1, "A": -2, "B": 3, "alpha": 0.3, "beta": 0.3}},
            "A=-2 of the scaling law 'custom' must be positive",
        ),
        ('{"law": {"E": NaN, "A": 2, "B": 3, "alpha": 0.3, "beta": 0.3}, "gear": {}}', "law.E=nan is not a number"),
        (changed("gear", gpu="H1000"), "'H1000' is no GPU whose figures are known here (nearest: H100 SXM"),
        (changed("gear", hours=-1), "gear.hours=-1 must be positive"),
        (changed("gear", hours=True), "gear.hours=True is not a number"),
        (changed("gear", mfu=40), "gear.mfu=40 is more than all of the peak"),
        (changed("gear", count=2.5), "a whole number of GPUs"),
        (changed("gear", gpu="T4"), "No dense peak of T4 in bfloat16 is known"),
        (changed("gear", hrs=3), "gear.hrs is not known"),
        ({**GOOD, "gear": {"gpu": "H20"}}, "gear.count is missing"),
        ({**GOOD, "gear": 8}, "gear must be an object"),
        (changed("data", unique_tokens="many"), "data.unique_tokens='many' is not a number such as 6e9"),
        (changed("data", unique_tokens=0), "data.unique_tokens=0 must be positive"),
        (changed("model", preset="lama"), "arch_preset='lama' is not a preset (did you mean 'llama'?)"),
        (changed("model", n_hed=3), "model: 'n_hed' is not a key of a model (did you mean 'n_head'?)"),
        ({**GOOD, "budget": 3}, "'budget' is not a section"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_file_is_said_in_a_sentence(tmp_path, content, said):
    path = write(tmp_path, content)
    with pytest.raises(ValueError) as caught:
        read_question(path)
    assert said in str(caught.value)
    assert all(line.startswith(str(path)) for line in str(caught.value).split("\n"))


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    with pytest.raises(ValueError) as caught:
        read_question(write(tmp_path, {"law": "x", "gear": {"gpu": "y", "hours": 0}, "model": {"preset": "z"}}))
    for word in ("law='x'", "'y' is no GPU", "gear.hours=0", "gear.count is missing", "gear.mfu is missing", "arch_preset='z'"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "text, number", [("26.2B", 26.2e9), ("6e9", 6e9), (" 300M ", 3e8), ("1.5t", 1.5e12), (7, 7.0), ("12k", 12e3)]
)
def test_amounts_are_read_with_their_suffix(text, number):
    assert positive(text) == pytest.approx(number)


@pytest.mark.parametrize("text", ["", "B", "-1B", "0", "nan", "1e999", "six", None, True, [1]])
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(ValueError):
        positive(text)
