"""What comparisons claim: no more than promised where nothing differs, nothing that the table contradicts, nothing of survivors.

Studies are simulated on parsed logs: the runs are read from files, then each gets a drawn loss in the place of its own.
"""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import replace
from types import SimpleNamespace

import numpy
import pytest
import scipy.stats
from conftest import ROOT
from test_ablate import SHAPE, plan_of
from test_compare import TOKENIZED_OTHERWISE, compared, make_run, seeds_of

import ablate
import ablation.speed
import comparison.groups
import comparison.inference
from ablation.planning import make_plan
from ablation.repetitions import after_pilot, power, seeds_needed
from ablation.speed import busy_share, speed_in_words, take_turns
from ablation.tuning import at_its_best
from command_line import Failure
from comparison import Group, NotComparable, compare, load_runs, table
from comparison.inference import ALPHA, PAIRED_FROM, adjust, compare_means
from comparison.report import sentence, verdicts

SEEDS = (1, 2, 3, 4, 5)


@pytest.fixture(scope="module")
def parsed(tmp_path_factory) -> list:
    """One parsed run of each of six models."""
    folder = tmp_path_factory.mktemp("logs")
    for number in range(6):
        make_run(folder / str(number), f"--n_layer={number + 1}")
    return load_runs([folder])


def with_loss(run, seed: int, loss: float | None):
    """The parsed run as if it had had this seed and come to this loss."""
    return replace(run, name=f"{run.name}-{seed}", config={**run.config, "seed": seed, "data_seed": seed}, val_loss=loss)


def drawn(random, groups: int, seeds: int = 5) -> numpy.ndarray:
    """Losses of one distribution, (groups, seeds), half of the variance common to all groups of a seed."""
    return 3 + 0.1 * (random.normal(size=(groups, seeds)) + random.normal(size=seeds)) / math.sqrt(2)


def unequal_seeds(parsed, random):
    """Three groups of 5, 3 and 2 of the same seeds, each compared with each."""
    losses = drawn(random, 3)
    return compare(
        [
            Group(str(number), tuple(with_loss(run, seed, loss) for seed, loss in list(zip(SEEDS, row))[:count]))
            for number, (run, row, count) in enumerate(zip(parsed, losses, (5, 3, 2)))
        ]
    )


def failed_seed(parsed, random):
    """Three groups of three; of the first the run with the highest loss has diverged."""
    losses = drawn(random, 3, 3)
    groups = []
    for number, (run, row) in enumerate(zip(parsed, losses)):
        runs = [with_loss(run, seed, loss) for seed, loss in zip(SEEDS, row)]
        worst = max(runs, key=lambda run: run.val_loss)
        kept = [run for run in runs if number or run is not worst]
        groups.append(Group(str(number), tuple(kept), () if number else (f"seed {worst.seeds[0]} failed",)))
    return compare(groups)


def several_variants(parsed, random):
    """Five variants against a baseline, three seeds each."""
    losses = drawn(random, 6, 3)
    groups = [
        Group(str(number), tuple(with_loss(run, seed, loss) for seed, loss in zip(SEEDS, row)))
        for number, (run, row) in enumerate(zip(parsed, losses))
    ]
    return compare(groups, baseline="0")


@pytest.fixture(scope="module")
def grid_plan(tiny_dataset):
    """A 2 × 2 grid, three seeds."""
    return plan_of(tiny_dataset, *SHAPE, "--grid", "--vary=ffn_type=standard,swiglu", "--vary=bias=True,False", "--seeds=3")


def study_of(plan, parsed, losses, failed=()) -> SimpleNamespace:
    """What ablate.py compares: a study whose runs came to these losses (trained variants × seeds)."""
    jobs = []
    for run, setting, row in zip(parsed * 4, plan.trained, losses):
        for seeds, loss in zip(plan.seeds, row):
            lost = (setting.name, seeds[0]) in failed
            named = f"{setting.name}, seed {seeds[0]} failed: train.py exited with 1. The last lines of x:" if lost else ""
            jobs.append(SimpleNamespace(variant=setting, seeds=seeds, failure=named, summary=None))
            jobs[-1].summary = None if lost else with_loss(run, seeds[0], float(loss))
    finished, broken = [job for job in jobs if job.summary], [job for job in jobs if job.failure]
    return SimpleNamespace(plan=plan, jobs=jobs, finished=finished, failed=broken)


def claims(found) -> int:
    """How many differences a comparison claims; and none of them contradicts its table."""
    means = {group.name: group.mean(found.metric) for group in found.groups}
    for one in found.differences:
        assert one.test.difference == pytest.approx(means[one.b] - means[one.a], abs=1e-12)
    return sum(one.claimed for one in found.differences) + sum(bool(test.shown) for test in found.also)


def share_of_false_claims(draw, studies: int, monkeypatch) -> float:
    """Of so many studies without any difference, those in which one is claimed."""
    monkeypatch.setattr(comparison.inference, "detectable", lambda *_: 0.0)  # slow, and no part of a claim
    monkeypatch.setattr(comparison.groups, "_rows", lambda groups: ((), ()))
    return sum(claims(draw()) > 0 for _ in range(studies)) / studies


STUDIES = [pytest.param(2_000, 0.062, id="2000"), pytest.param(20_000, 0.055, id="20000", marks=pytest.mark.slow)]


@pytest.mark.parametrize("studies, most", STUDIES)
@pytest.mark.parametrize("design", [unequal_seeds, failed_seed, several_variants])
def test_where_nothing_differs_a_study_claims_something_in_5_percent_at_most(design, studies, most, parsed, monkeypatch):
    random = numpy.random.default_rng(4)
    found = share_of_false_claims(lambda: design(parsed, random), studies, monkeypatch)
    assert found <= most
    assert found > 0  # else nothing was tested


@pytest.mark.parametrize("studies, most", STUDIES)
def test_a_grid_without_effects_claims_something_in_5_percent_at_most(grid_plan, parsed, monkeypatch, studies, most):
    random = numpy.random.default_rng(5)

    def draw():
        return ablate.compare_runs(study_of(grid_plan, parsed, drawn(random, 4, 3)))

    assert len(draw().also) == 4 and len(draw().differences) == 3
    assert 0 < share_of_false_claims(draw, studies, monkeypatch) <= most


# ------------------------------------------------------------------------------------------- one set of runs (14.1)


def test_the_difference_is_that_of_the_means_in_the_table_whatever_seeds_a_side_has():
    """Over the seeds that both have, b is the lower one; over all runs, a. The verdict speaks of what the table shows."""
    a = {1: 3.00, 2: 3.02, 3: 3.01, 4: 2.00, 5: 2.02}
    b = {1: 2.90, 2: 2.93, 3: 2.90}
    found = compare_means(a, b)
    assert found.n == (5, 3) and found.method == "Welch t"
    assert found.difference == pytest.approx(sum(b.values()) / 3 - sum(a.values()) / 5) and found.difference > 0


# ------------------------------------------------------------------------------------------- tokenizers (14.2)


def test_nats_of_two_tokenizers_are_refused_and_forced_claim_and_star_nothing(tmp_path):
    seeds_of(tmp_path, "bpe", [6.40, 6.42, 6.44], bits_per_byte=2.8)
    seeds_of(tmp_path, "bytes", [1.51, 1.52, 1.53], bits_per_byte=2.9, dataset=TOKENIZED_OTHERWISE, val_tokens=2999)
    with pytest.raises(NotComparable, match="--metric=bits_per_byte does"):
        compared(tmp_path, metric="val_loss")
    forced = compared(tmp_path, metric="val_loss", force=True)
    [found] = forced.differences
    assert found.test.shown and not found.claimed and forced.best is None
    said = table(forced)
    assert "tokenizers differ" in said and "has a lower" not in said
    assert "1.5200 ± 0.0100*" not in said
    assert compared(tmp_path).metric == "bits_per_byte"


# ------------------------------------------------------------------------------------------- failed seeds (14.3)


def test_a_variant_with_a_failed_seed_is_said_to_have_one_and_claims_nothing_better(grid_plan, parsed):
    losses = numpy.array([[3.00, 3.01, 3.02], [2.0, 2.01, 2.02], [3.01, 3.00, 3.02], [3.02, 3.00, 3.01]])
    name = grid_plan.trained[1].name
    seed = grid_plan.seeds[2][0]
    whole = ablate.compare_runs(study_of(grid_plan, parsed, losses))
    assert whole.best.name == name and any(one.claimed and one.b == name for one in whole.differences)
    found = ablate.compare_runs(study_of(grid_plan, parsed, losses, failed={(name, seed)}))
    [mine] = [one for one in found.differences if one.b == name]
    assert mine.test.shown and not mine.claimed and mine.test.difference < 0
    assert found.best.name != name
    said = table(found)
    assert f"nothing better is claimed of {name}, whose" in said and f"seed {seed} failed" in said
    assert "1 of 3 seeds failed" in said and f"left out: {name}" in said
    assert f"{name} has a lower" not in said and "does more for" not in said
    assert not any(word in said for word in ("2.0050 ± 0.0071*",))


def test_a_run_without_a_finite_loss_counts_as_lost_in_compare_architectures_too(tmp_path):
    seeds_of(tmp_path, "plain", [3.0, 3.01, 3.02])
    seeds_of(tmp_path, "changed", [2.0, 2.01, math.nan], "--normalization=rmsnorm")
    forced = compared(tmp_path, force=True)
    [found] = forced.differences
    assert not found.claimed and "seed 3: no finite validation loss" in sentence(found, "val_loss")


def test_runs_that_do_not_compare_are_refused_by_ablate_without_force(grid_plan, parsed):
    losses = drawn(numpy.random.default_rng(0), 4, 3)
    study = study_of(grid_plan, parsed, losses)
    study.jobs[0].summary = replace(study.jobs[0].summary, tokens=1)
    with pytest.raises(NotComparable, match="was trained on 1 tokens"):
        ablate.compare_runs(study)
    study.plan = replace(grid_plan, force=True)
    assert "other tokens" in table(ablate.compare_runs(study))


# ------------------------------------------------------------------------------------------- how many seeds (14.4)


def share_of_studies_that_add_seeds_until_a_difference_shows(studies: int) -> float:
    random, found = numpy.random.default_rng(6), 0
    for _ in range(studies):
        a, b = (dict(enumerate(row)) for row in drawn(random, 2, 10))
        for count in range(3, 11):
            test = compare_means({seed: a[seed] for seed in range(count)}, {seed: b[seed] for seed in range(count)})
            if test.p < ALPHA:
                found += 1
                break
    return found / studies


def test_adding_seeds_until_a_difference_shows_finds_one_as_often_as_the_help_says():
    said = next(action.help for action in ablate.make_parser()._actions if action.dest == "seeds")
    assert "in 14 %% of the studies" in said
    assert share_of_studies_that_add_seeds_until_a_difference_shows(2_000) == pytest.approx(0.14, abs=0.03)


def test_the_pilots_number_of_seeds_shows_the_difference_four_times_out_of_five():
    """The power that the chosen numbers really have, by scipy's distribution, averaged over pilots."""
    random, scatter, detect, found = numpy.random.default_rng(7), 0.01, 0.03, []
    for _ in range(25):
        pilot = [dict(enumerate(3 + scatter * random.normal(size=3))) for _ in range(3)]
        needed = seeds_needed(pilot, detect, tests=2)
        assert needed.low <= needed.n <= needed.high
        pairs = needed.n >= PAIRED_FROM
        freedom = (needed.n - 1) * (1 if pairs else 2)
        true = detect * math.sqrt(needed.n / 2) / scatter
        critical = scipy.stats.t.ppf(1 - ALPHA / 4, freedom)
        found.append(1 - scipy.stats.nct.cdf(critical, freedom, true))
        assert power(true, freedom, ALPHA / 2) == pytest.approx(found[-1], rel=1e-6)
    assert 0.72 < numpy.mean(found) < 0.95, numpy.mean(found)


def test_a_smaller_difference_needs_more_seeds_and_too_many_are_refused():
    pilot = [{1: 3.00, 2: 3.01, 3: 3.02}, {1: 3.01, 2: 3.00, 3: 3.03}]
    assert seeds_needed(pilot, 0.1, 1).n < seeds_needed(pilot, 0.03, 1).n
    assert seeds_needed(pilot, 0.05, 1).n <= seeds_needed(pilot, 0.05, 10).n
    with pytest.raises(Failure, match="More than 50 seeds are needed to see a difference of 0.0001"):
        seeds_needed(pilot, 0.0001, 1)
    with pytest.raises(Failure, match="do not vary"):
        seeds_needed([{1: 3.0, 2: 3.0, 3: 3.0}, {1: 3.1, 2: 3.1, 3: 3.1}], 0.1, 1)


def test_the_range_that_is_said_of_a_spread_holds_the_true_one_in_90_percent():
    random, inside, pilots = numpy.random.default_rng(10), 0, 200
    for _ in range(pilots):
        pilot = [dict(enumerate(random.normal(size=3))) for _ in range(2)]
        low, high = seeds_needed(pilot, 1e4, 1).scatter_range
        inside += low <= math.sqrt(2) <= high
    assert inside / pilots == pytest.approx(0.9, abs=4 * math.sqrt(0.09 / pilots))


def test_after_a_pilot_other_seeds_are_trained_and_the_note_says_why(tiny_dataset, parsed):
    plan = plan_of(tiny_dataset, *SHAPE, "--vary=ffn_type=standard,swiglu", "--seeds=auto", "--detect=0.05")
    assert len(plan.seeds) == 3
    pilot = study_of(plan, parsed, [[3.00, 3.01, 3.03], [3.00, 3.02, 3.01]])
    after = after_pilot(pilot)
    assert after.detect is None and len(after.seeds) >= 2 and not set(after.seeds) & set(plan.seeds)
    assert f"so {len(after.seeds)} seeds show a difference of 0.05 4 times out of 5" in after.notes[0]
    with pytest.raises(Failure, match="failed"):
        after_pilot(study_of(plan, parsed, [[3.0, 3.1, 3.2]] * 2, failed={(plan.trained[0].name, plan.seeds[0][0])}))


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--seeds=auto"], "--seeds=auto needs the difference that is to be seen: --detect=0.02"),
        (["--seeds=auto", "--detect=0"], "must be a positive"),
        (["--seeds=auto", "--detect=nan"], "must be a positive"),
        (["--detect=0.1"], "give both or neither"),
        (["--seeds=few"], "neither a whole number nor 'auto'"),
        (["--cross=learning_rate=1e-3,2e-3", "--vary=learning_rate=1e-3,1e-4"], "both varied and crossed"),
        (["--cross=n_layer=1,2"], "only keys of the optimizer and its schedule can be crossed"),
        (["--cross=seed=1,2"], "seed cannot be crossed"),
        (["--cross=learning_rate"], "names no values"),
    ],
)
def test_wrong_words_about_seeds_and_rates_are_said(tiny_dataset, tmp_path, capsys, arguments, said):
    assert ablate.main([*SHAPE, f"--dataset={tiny_dataset}", f"--out_dir={tmp_path / 'out'}", *arguments]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------- one learning rate (14.6)


def test_one_learning_rate_for_all_is_said_and_crossing_it_shows_each_at_its_best(tiny_dataset, parsed):
    words = (*SHAPE, "--vary=ffn_type=standard,swiglu", "--learning_rate=1e-3")
    plain = plan_of(tiny_dataset, *words)
    assert any("All variants have learning_rate=0.001" in note for note in plain.notes)
    plan = plan_of(tiny_dataset, *words, "--cross=learning_rate=1e-3,2e-3,4e-3")
    assert not any("All variants have" in note for note in plan.notes)
    assert len(plan.trained) == 6 and len({plan.folder(v, s) for v in plan.trained for s in plan.seeds}) == 18
    rates = [setting.values["learning_rate"] for setting in plan.trained]
    assert rates == [0.001, 0.002, 0.004] * 2
    best_at_2, best_at_4 = [[3.2, 3.21, 3.19], [3.0, 3.01, 3.02], [3.4, 3.3, 3.5]], [[3.3, 3.31, 3.29], [3.2, 3.21, 3.2]]
    found = ablate.compare_runs(study_of(plan, parsed, [*best_at_2, *best_at_4, [2.7, 2.72, 2.71]]))
    assert [group.name for group in found.groups] == ["ffn_type=swiglu", "defaults"]
    assert [group.mean("val_loss") for group in found.groups] == pytest.approx([2.71, 3.01])
    [difference] = found.differences
    assert difference.claimed and difference.test.difference == pytest.approx(-0.30)
    said = table(found)
    assert "defaults is compared at learning_rate=0.002" in said and "learning_rate=0.001: 3.2000" in said
    swiglu = next(note for note in found.notes if note.startswith("ffn_type=swiglu is compared at"))
    assert "its best may lie beyond" in swiglu
    assert "may lie beyond" not in next(note for note in found.notes if note.startswith("defaults is compared at"))


def test_the_run_of_a_seed_has_no_part_in_choosing_its_setting(parsed):
    """A setting that is best by one lucky run alone does not bring that run with it."""
    lucky = Group("a", tuple(with_loss(parsed[0], seed, loss) for seed, loss in zip(SEEDS, (2.0, 3.2, 3.2))))
    steady = Group("b", tuple(with_loss(parsed[1], seed, 3.0) for seed in SEEDS[:3]))
    chosen = at_its_best("x", [lucky, steady], "val_loss")
    assert chosen.values("val_loss") == {(1, 1): 3.0, (2, 2): 3.2, (3, 3): 3.2}


def test_crossing_a_factor_without_effect_makes_no_claims(tiny_dataset, parsed, monkeypatch):
    """Choosing the best of three rates by other seeds leaves the false claims where they were."""
    plan = plan_of(tiny_dataset, *SHAPE, "--vary=ffn_type=standard,swiglu", "--cross=learning_rate=1e-3,2e-3,4e-3", "--seeds=3")
    random = numpy.random.default_rng(8)
    found = share_of_false_claims(lambda: ablate.compare_runs(study_of(plan, parsed, drawn(random, 6, 3))), 500, monkeypatch)
    assert found <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / 500)


def test_a_factor_of_the_grid_and_a_variant_are_one_family_of_tests(grid_plan, parsed):
    losses = drawn(numpy.random.default_rng(9), 4, 3)
    found = ablate.compare_runs(study_of(grid_plan, parsed, losses))
    alone = [replace(test, p_holm=None) for test in (*(one.test for one in found.differences), *found.also)]
    assert [test.p_holm for test in adjust(alone)] == [
        test.p_holm for test in (*(one.test for one in found.differences), *found.also)
    ]
    assert "7 comparisons (4 of them of factors)" in table(found)


# ------------------------------------------------------------------------------------------- docs/ABLATIONS.md


def verdicts_of_the_page(page: str, parsed) -> list[str]:
    """What this version says of the losses in the page's last table, study by study, as the page's commands ask for them."""
    rows = re.findall(r"^\| `(\S+?)/(\S+?)` .*\| (run_.*) \|$", page, re.M)
    losses = {(place, folder): re.findall(r"\((\d+): ([\d.]+)\)", runs) for place, folder, runs in rows}
    said = []
    for command in re.findall(r"^python ablate.py (.*)$", page, re.M):
        plan = make_plan(*ablate.make_parser().parse_known_args(shlex.split(command)))
        if not {"--dry_run", "--speed"} & set(command.split()):
            figures = [[float(loss) for _, loss in losses[plan.out_dir.name, variant.folder]] for variant in plan.variants]
            found = ablate.compare_runs(study_of(plan, parsed, figures))
            said += [*verdicts(found), *(f"note: {note}" for note in found.notes[: len(found.also)])]
    return list(dict.fromkeys(said))


def test_the_verdicts_of_the_page_are_what_its_losses_give(parsed):
    page = (ROOT / "docs" / "ABLATIONS.md").read_text(encoding="utf-8")
    said = verdicts_of_the_page(page, parsed)
    assert len(said) > 10
    assert [line for line in said if line not in page] == []


# ------------------------------------------------------------------------------------------- speed (14.7)


class Clockwork:
    """A stepper whose steps take what a list says; each step of a round shares the round's slowness."""

    tokens = 64

    def __init__(self, factor: float, slowness, noise):
        self.factor, self.slowness, self.noise, self.taken = factor, slowness, noise, 0

    def step(self) -> float:
        self.taken += 1
        return 0.02 * self.factor * self.slowness[self.taken] * self.noise[self.taken]


def turns(factor: float, random) -> list:
    slowness = random.uniform(1, 3, 100)  # other clocks, other rounds
    noise = numpy.exp(0.02 * random.normal(size=(2, 100)))
    return take_turns([("a", Clockwork(1.0, slowness, noise[0])), ("b", Clockwork(factor, slowness, noise[1]))])


def test_a_faster_variant_is_found_though_the_machines_speed_varies_threefold():
    timings = turns(1 / 1.05, numpy.random.default_rng(1))
    assert [len(timing.seconds) for timing in timings] == [30, 30]
    said = speed_in_words(timings, 0.0)
    assert re.search(r"b is faster: a takes (4|5)\.\d% more time", said) and "middle half" in said


def test_where_nothing_is_faster_something_is_claimed_in_5_percent_at_most():
    random = numpy.random.default_rng(2)
    found = sum("is faster" in speed_in_words(turns(1.0, random), 0.0) for _ in range(400)) / 400
    assert found <= ALPHA + 4 * math.sqrt(ALPHA * (1 - ALPHA) / 400)


def test_on_a_busy_machine_nothing_is_claimed_and_without_force_nothing_is_measured(tiny_dataset, monkeypatch, capsys):
    said = speed_in_words(turns(0.5, numpy.random.default_rng(3)), 0.4)
    assert "Other work used 40%" in said and "is faster" not in said
    monkeypatch.setattr(ablation.speed, "busy_share", lambda: 0.4)
    words = [*SHAPE, "--batch_size=4", f"--dataset={tiny_dataset}", "--vary=normalization=layernorm,rmsnorm", "--speed"]
    assert ablate.main(words) == 2
    assert "Other work uses 40% of this machine's processor time" in capsys.readouterr().err


def test_the_share_in_use_is_the_systems_own(tmp_path):
    file = tmp_path / "stat"
    file.write_text("cpu  10 0 10 70 10 0 0 0 0 0\ncpu0 1 2 3\n")
    later = lambda seconds: file.write_text("cpu  30 0 20 110 40 0 0 0 5 0\n")
    assert busy_share(file, later) == pytest.approx(0.3)
    assert busy_share(tmp_path / "none") is None


def test_speed_takes_real_steps_of_each_variant_and_writes_nothing(tiny_dataset, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(ablation.speed, "busy_share", lambda: 0.0)
    monkeypatch.setattr(ablation.speed, "ROUNDS", 6)
    monkeypatch.setattr(take_turns, "__defaults__", (6,))
    out = tmp_path / "out"
    words = ["--vary=n_layer=2,8", "--batch_size=4", "--gradient_accumulation_steps=2", f"--out_dir={out}", "--speed"]
    assert ablate.main([*SHAPE, f"--dataset={tiny_dataset}", *words]) == 0
    said = capsys.readouterr().out
    assert "6 steps of each" in said and "defaults is faster: n_layer=8 takes" in said and not out.exists()


def test_tokens_a_second_of_runs_that_shared_a_machine_are_not_starred(tmp_path):
    for number, norm in enumerate(("layernorm", "rmsnorm")):
        make_run(tmp_path / norm, f"--normalization={norm}", step_ms=20.0 + 10 * number, started="2026-01-01T00:00:00+00:00")
    found = compared(tmp_path)
    assert found.machine_was_shared and "3,200 " in table(found) and "3,200*" not in table(found)
    apart = replace(
        found, groups=tuple(replace(g, runs=(replace(g.runs[0], started=t, ended=t + "Z"),)) for g, t in zip(found.groups, "19"))
    )
    assert not apart.machine_was_shared and "3,200*" in table(apart)
