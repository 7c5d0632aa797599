"""A search scores networks without training any, goes on where it was killed, and hands its choice to an ordinary training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdrun.config.check import check
from kdrun.config.compose import compose
from kdrun.engine.build import load_data
from kdrun.engine.records import STUDENT_FILE, SUMMARY, read_json
from kdrun.errors import Refused, RunFailed
from kdrun.plan import scoring
from kdrun.plan.candidates import Candidates
from kdrun.plan.evolution import Evolution, Step, evolve
from kdrun.plan.scoring import Side, initialise, likeness, look
from kdrun.student.space import StageSpace
from kdrun.student.stage_resnet import stage_resnet
from kdrun.types import Batch
from tests.conftest import Outcome
from tests.engine.running import Killed, Notes, assert_bit_equal, assert_same_run, parameters, run, run_killed, training_lines, weights

TINY = [
    "dataset=glyphs", "dataset.size=8", "dataset.shift=1", "dataset.n_train=48", "dataset.n_test=16", "objective=kd", "plan=search",
    "student=stage_resnet", "teacher=stage_resnet", "teacher.depths=[2,1,1]", "teacher.widths=[4,4,4,8]", "evaluation=ranking",
    "plan.space={depths: [1, 2], widths: [[2, 2, 2, 4]]}", "plan.semantic=class", "plan.batch=16", "plan.inits=2",
    "source.batch_size=16", "optim.epochs=1", "hardware=cpu", "hardware.threads=1", "run.log_every=1",
]  # fmt: skip
ALONE = [*(o for o in TINY if not o.startswith("teacher")), "teacher=none", "objective=ce"]
RANKED = ["plan.train=false", "evaluation.primary=tau_mr"]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Accuracies of the tiny space's networks: distilled accuracy grows with depth."""
    lines = [f"{a}{b}{c},{50 + a},{60 + a + b + c}" for a in (1, 2) for b in (1, 2) for c in (1, 2)]
    file = tmp_path / "table.csv"
    file.write_text("# made up\narchitecture,vanilla,distilled\n" + "\n".join(lines) + "\n")
    return file


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdrun.plan.findings.plot_ranking", lambda folder, *rest: folder)


def batch_of(size: int, classes: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(size)
    return Batch(torch.randn(size, 3, 8, 8, generator=generator), ids % (classes - 1), ids, ids, {})  # the last class is absent


def network() -> nn.Module:
    torch.manual_seed(1)
    return stage_resnet(5, [1, 2, 1], [4, 4, 4, 8])


def seen(module: nn.Module, batch: Batch) -> Side:
    return look(module, {"f3": "layer3"}, "f3", batch, 5, "student")


def refused(*overrides: str) -> str:
    with pytest.raises(Refused) as found:
        run(overrides, Path("nowhere"))
    assert not Path("nowhere").exists()
    return str(found.value)


# -- scores -------------------------------------------------------------------------------------------------------------


def test_the_slope_of_a_class_is_the_mean_of_errors_times_features() -> None:
    module, batch = network(), batch_of(12)
    features = []
    module.fc.register_forward_hook(lambda layer, args, output: features.append((args[0], output)))  # type: ignore[union-attr, operator]
    slopes = seen(module, batch).slopes
    (f, logits), *_ = ((f.double(), z.double()) for f, z in features)
    errors = logits.softmax(1) - F.one_hot(batch.targets, 5)
    torch.testing.assert_close(slopes, (errors.T @ f / 12).detach(), rtol=1e-5, atol=1e-9)


def test_a_class_that_is_absent_pulls_every_feature_the_same_way() -> None:
    """Its row is an average of ReLU features with positive weights, so that the signs of any two networks agree there."""
    for seed in range(3):
        torch.manual_seed(seed)
        slopes = seen(stage_resnet(5, [1, 1, 1], [4, 4, 4, 8]), batch_of(12)).slopes
        assert (slopes[4] >= 0).all()
        assert (slopes[:4] < 0).any()


def test_looking_changes_no_parameter_and_leaves_no_gradient() -> None:
    module = network()
    before = parameters(module)
    seen(module, batch_of(8))
    after = module.state_dict()
    assert [n for n in before if not torch.equal(before[n], after[n]) and "running" not in n and "tracked" not in n] == []
    assert all(p.grad is None for p in module.parameters())


def test_batch_statistics_are_used_whatever_mode_the_network_was_in() -> None:
    module = network().eval()
    module.bn1.running_mean.fill_(7)  # type: ignore[union-attr, operator]
    for ours, theirs in zip(seen(module, batch_of(8)), seen(network(), batch_of(8)), strict=True):
        assert torch.equal(ours, theirs)


def test_a_network_is_as_itself() -> None:
    side = seen(network(), batch_of(8))
    assert likeness(side, side, "class") == (0, 0)
    m_r, m_s = likeness(side, side, "channel")
    assert m_r == 0
    assert abs(m_s) < 1e-15


def test_normal_initialisation_draws_every_weight_with_deviation_one() -> None:
    module = initialise(stage_resnet(50, [1, 1, 1], [16, 16, 32, 64]), "normal")
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.weight.numel() > 2000:
            assert abs(float(layer.weight.detach().std()) - 1) < 0.1
        if isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all()
            assert (layer.bias == 0).all()


def test_scores_that_are_no_numbers_end_the_run() -> None:
    side = seen(network(), batch_of(8))
    with pytest.raises(RunFailed, match="finite"):
        likeness(side, Side(side.relations * math.nan, side.slopes), "channel")


# -- evolution ----------------------------------------------------------------------------------------------------------

S1 = StageSpace((1, 3, 5, 7), ((16, 16, 32, 64),))
SIZES = Evolution(population=10, tournament=4, parents=2, cycles=60)


def evolved(sizes: Evolution = SIZES, key: int = 3) -> list[Step]:
    within = [a for a in S1.enumerate() if a.depth <= 13]
    return list(evolve(S1, within, lambda a: a.depth + a.depths[2] / 10, sizes, key))


def test_the_population_is_constant_after_warm_up_and_the_oldest_leaves() -> None:
    steps = evolved()
    assert [len(s.members) for s in steps] == [*range(1, 11), *[10] * 50]
    assert all(s.members[-1] == s.architecture for s in steps)
    assert all(now.members[:-1] == before.members[1:] for before, now in itertools.pairwise(steps[9:]))


def test_every_member_is_within_the_budget_and_children_are_neighbours() -> None:
    steps = evolved()
    assert max(a.depth for s in steps for a in s.members) <= 13
    for before, now in itertools.pairwise(steps[9:]):
        assert any(now.architecture in S1.neighbours(parent) for parent in before.members)


def test_the_best_so_far_never_falls_and_the_first_networks_differ() -> None:
    steps = evolved()
    assert all(a.best <= b.best for a, b in itertools.pairwise(steps))
    assert steps[-1].best == max(s.score for s in steps)
    assert len({s.architecture for s in steps[:10]}) == 10


def test_the_parent_is_of_the_best_of_its_tournament() -> None:
    """With a tournament of all and one parent it is the best member: the end that is wanted, not the other one."""
    steps = evolved(Evolution(population=10, tournament=10, parents=1, cycles=60))
    scores = {s.architecture: s.score for s in steps}
    for before, now in itertools.pairwise(steps[9:]):
        highest = max(scores[a] for a in before.members)
        assert any(now.architecture in S1.neighbours(a) for a in before.members if scores[a] == highest)


def test_it_ends_after_its_cycles_and_is_drawn_by_its_key() -> None:
    assert len(evolved(Evolution(10, 4, 2, 17))) == 17
    assert evolved() == evolved()
    assert evolved(key=4) != evolved()


# -- ranking without training ----------------------------------------------------------------------------------------------


def test_a_ranking_builds_no_optimiser_and_exports_no_student(tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("an optimiser was built")

    monkeypatch.setattr("kdrun.engine.stage.build_optimizer", never)
    monkeypatch.setattr("kdrun.engine.stage.StageRun.__init__", never)
    summary = run([*TINY, *RANKED, f"plan.benchmark={table}"], tmp_path / "run")
    assert not (tmp_path / "run" / STUDENT_FILE).exists()
    assert not (tmp_path / "root" / "teachers").exists()
    assert summary["steps"] == 0
    assert summary["value"] == summary["test"]["tau_mr"]
    assert summary["test"]["tau_depth"] == pytest.approx(1)
    assert summary["test"]["top1_largest"] == summary["test"]["top1_best"] == 66
    assert summary["test"]["top1_random"] == pytest.approx(64.5)
    rows = summary["search"]["candidates"]
    assert len(rows) == 8
    assert all(row["m_r"] < 0 and row["m_s"] < 0 and row["sum"] == row["m_r"] + row["m_s"] for row in rows.values())
    assert summary["search"]["picked"] == max(rows, key=lambda n: rows[n]["sum"])


def test_scores_are_a_function_of_seed_and_batch(tmp_path: Path, table: Path) -> None:
    ranked = [*TINY, *RANKED, f"plan.benchmark={table}"]
    first = run(ranked, tmp_path / "a")["search"]["candidates"]
    assert run([*ranked, "plan.against=vanilla", "plan.score=m_r"], tmp_path / "b")["search"]["candidates"] == {
        name: {**row, "accuracy": 50 + int(name[0])} for name, row in first.items()
    }
    assert run([*ranked, "seed=2"], tmp_path / "c")["search"]["candidates"] != first
    # Evolution sees the same scores, in another order.
    path = run([*ranked, "plan.method=evolution", "plan.population=4", "plan.cycles=6"], tmp_path / "d")["search"]
    assert path["candidates"].items() <= first.items()
    assert [step["score"] for step in path["steps"]] == [first[step["architecture"]]["sum"] for step in path["steps"]]


@pytest.mark.parametrize("dies_at", [1, 9])
def test_a_killed_search_goes_on_and_nothing_tells_that_it_was_broken(
    dies_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kdrun: Callable[..., Outcome]
) -> None:
    base = [*TINY, "plan.trials=3", "plan.method=evolution", "plan.population=4", "plan.cycles=7"]
    unbroken = run(base, tmp_path / "a" / "run")
    looks: list[str] = []
    original = scoring.look

    def counting(module: nn.Module, taps: Any, tap: str, batch: Batch, classes: int, key: str) -> Side:
        looks.append(key)
        if len(looks) == dies_at:
            raise Killed
        return original(module, taps, tap, batch, classes, key)

    monkeypatch.setattr(scoring, "look", counting)
    with pytest.raises(Killed):
        run(base, tmp_path / "b" / "run")
    looks.append("resumed")
    outcome = kdrun("resume", str(tmp_path / "b" / "run"), "--quiet")
    assert outcome.code == 0, outcome.err
    again = looks[looks.index("resumed") + 1 :]
    assert again.count("teacher") == (2 if dies_at == 1 else 0)  # its side is made once, one for each initialisation
    assert_same_run(tmp_path / "b" / "run", tmp_path / "a" / "run")
    resumed = read_json(tmp_path / "b" / "run" / SUMMARY)
    assert resumed["search"] == unbroken["search"]
    assert resumed["test"] == unbroken["test"]


def test_a_run_killed_while_a_trial_is_trained_goes_on_there(tmp_path: Path, kdrun: Callable[..., Outcome]) -> None:
    base = [*TINY, "plan.trials=2"]
    unbroken = run(base, tmp_path / "a" / "run")
    (trial,) = (tmp_path / "a" / "run" / "trials").iterdir()
    run_killed(base, tmp_path / "b" / "run", "step_done", 2, stage=f"trials {trial.name}")
    assert kdrun("resume", str(tmp_path / "b" / "run"), "--quiet").code == 0
    assert_same_run(tmp_path / "b" / "run", tmp_path / "a" / "run")
    assert read_json(tmp_path / "b" / "run" / SUMMARY)["test"] == unbroken["test"]


# -- the chosen network ----------------------------------------------------------------------------------------------------


def test_the_winner_is_trained_by_the_ordinary_loop(tmp_path: Path) -> None:
    """The same network under plan=single, told its depths and widths, becomes the same student."""
    summary = run([*TINY, "plan.trials=3"], tmp_path / "search")
    picked = summary["search"]["picked"]
    plain = [o for o in TINY if not o.startswith("plan")]
    told = ["plan=single", f"student.depths=[{','.join(picked)}]", "student.widths=[2,2,2,4]"]
    alone = run([*plain, *told], tmp_path / "alone")
    assert_bit_equal(weights(tmp_path / "search"), weights(tmp_path / "alone"))
    assert summary["test"]["top1"] == summary["test"]["top1_picked"] == alone["test"]["top1"]
    assert summary["teacher"] == alone["teacher"]
    trials = {p.name for p in (tmp_path / "search" / "trials").iterdir()}
    assert picked not in trials
    accuracies = {n: row["accuracy"] for n, row in summary["search"]["candidates"].items() if "accuracy" in row}
    assert set(accuracies) == {picked, *trials}
    assert len(accuracies) == 3
    assert summary["test"]["top1_best"] == max(accuracies.values())


def test_trials_are_taught_by_the_trained_teacher(tmp_path: Path) -> None:
    summary = run([*TINY, "plan.trials=2"], tmp_path / "run")
    (trial,) = (tmp_path / "run" / "trials").iterdir()
    alone = run([*TINY, f"plan.candidate={trial.name}"], tmp_path / "alone")
    assert summary["search"]["candidates"][trial.name]["accuracy"] == alone["test"]["top1"]
    assert training_lines(trial) == [{**line, "stage": f"trials {trial.name}"} for line in training_lines(tmp_path / "alone")]


@pytest.mark.parametrize(("candidate", "expected"), [("largest", "222"), ("121", "121"), ("random:2", None)])
def test_a_candidate_may_be_named_and_then_nothing_is_scored(
    candidate: str, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "look", lambda *_: pytest.fail("a network was looked at"))
    summary = run([*ALONE, f"plan.candidate={candidate}"], tmp_path / "run")
    assert summary["search"]["picked"] == expected or expected is None
    assert summary["search"]["candidates"] == {}


def field(*overrides: str) -> Candidates:
    tree = compose([*ALONE, *overrides]).tree
    plan = tree["plan"]
    return Candidates(StageSpace.of(plan["space"]), tree, load_data(tree), plan["budget"], plan["budget_of"])


def test_random_picks_are_different_networks_and_the_key_draws_them() -> None:
    candidates = field("plan.budget=median")
    picks = [candidates.named(f"random:{k}", 1) for k in (1, 2, 3, 4)]
    assert set(picks) == set(candidates.within)
    assert [candidates.named(f"random:{k}", 2) for k in (1, 2, 3, 4)] != picks


def test_a_budget_may_be_of_operations() -> None:
    candidates = field("plan.budget=median", "plan.budget_of=flops")
    assert len(candidates.within) == 4
    assert max(candidates.costs[a] for a in candidates.within) <= candidates.limit  # type: ignore[operator]
    assert candidates.costs != candidates.parameters
    deeper = candidates.space.find("211")
    # A block of 2 channels on 8x8: two 3x3 convolutions, a multiply-add is two operations.
    assert candidates.costs[deeper] - candidates.costs[candidates.space.find("111")] == 2 * 2 * 9 * 2 * 2 * 64


def test_the_largest_within_the_budget_and_nothing_above_it(tmp_path: Path) -> None:
    summary = run([*TINY, "plan.budget=median", "plan.trials=3"], tmp_path / "run")
    search = summary["search"]
    rows = search["candidates"]
    assert search["within_budget"] == len(rows) == 4
    assert max(row["parameters"] for row in rows.values()) <= search["budget"]
    largest = max(rows, key=lambda n: rows[n]["parameters"])
    assert summary["test"]["top1_largest"] == rows[largest]["accuracy"]
    assert run([*TINY, "plan.budget=median", "plan.score=parameters"], tmp_path / "plain")["search"]["picked"] == largest


# -- refusals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["plan.budget=10"], "no architecture has at most 10 parameters"),
        (["plan.trials=9"], "9 different networks are asked for; 8 are within the budget"),
        (["plan.method=evolution"], "36 different networks are asked for"),
        (["plan.candidate=131"], "'131' is no architecture of the space"),
        (["plan.candidate=random:9"], "runs from 1 to 8"),
        (["plan.candidate=222", "plan.budget=median"], "the budget is"),
        (["plan.batch=49"], "a batch of 49 from 48 training rows"),
        (["plan.semantic=channel"], "channels cannot be compared"),
        (["plan.tap=f9"], "f9"),
        (["plan.train=false"], "no table to rank against"),
        (["evaluation.primary=tau_mr"], "is a number of the whole search"),
        (["plan.benchmark=s1", "plan.trials=3"], "not from both"),
        (["plan.benchmark=s1"], "fewer than 3 of the architectures"),
        (["plan.benchmark=nothing.csv"], "no table of accuracies"),
        (["student=resnet8"], "no depths and widths to choose"),
        (["teacher=custom", "teacher._target_=torch.nn.Flatten", "objective=ce"], "teacher"),
        (["plan.start_from=elsewhere.safetensors", "teacher.checkpoint=null"], "plan.start_from"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_spent(
    overrides: list[str], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert what in refused(*TINY, *overrides)


def test_a_similarity_needs_a_teacher_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "a similarity is one to a teacher network" in refused(*ALONE)


@pytest.mark.parametrize(
    "override",
    ["inits=0", "batch=1", "trials=0", "budget=-1", "budget=all", "score=m_t", "space={depths: [1]}", "population=0", "method=grid"],
)
def test_illegal_values_are_said_with_what_is_legal(override: str) -> None:
    with pytest.raises(Refused) as found:
        check(compose([*TINY, f"plan.{override}"]))
    assert "plan." + override.partition("=")[0] in str(found.value)


def test_progress_is_told(tmp_path: Path) -> None:
    notes = Notes()
    picked = run(TINY, tmp_path / "run", notes)["search"]["picked"]
    assert f"8 of 8 architectures scored; best: {picked}" in notes.notes


def test_a_dry_run_looks_at_three_networks(tmp_path: Path) -> None:
    summary = run([*TINY, "run.dry=true", "plan.trials=5"], tmp_path / "run")
    assert len(list((tmp_path / "run" / "trials").iterdir())) == 2
    assert summary["steps"] == 2
