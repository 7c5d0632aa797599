"""What is wrong with the words of a command line is refused at once, with the key, the nearest legal value and a remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.told import Problem, only
from tests.conftest import Outcome

Refusal = Callable[..., list[Problem]]


def spoilt(recipes: Path, folder: Path, old: str, new: str) -> str:
    """The recipe `small` with one mistake and one seed, in a folder of its own; its text."""
    text = (recipes / "recipes" / "small.yaml").read_text().replace("[1, 2, 3]", "[1]")
    assert old in text
    (folder / "recipes").mkdir()
    (folder / "recipes" / "small.yaml").write_text(text.replace(old, new))
    return text.replace(old, new)


@pytest.mark.parametrize(
    ("override", "head", "near"),
    [
        ("recipe=pld_cifar10", "recipe: there is no recipe named 'pld_cifar10'", "pld_cifar100"),
        ("objective=dkdd", "objective: there is no objective named 'dkdd'", "dkd"),
        ("teacher=resnet32x", "teacher: there is no teacher named 'resnet32x'", "resnet32x4"),
        ("student=wrn_40", "student: there is no student named 'wrn_40'", "wrn_40_1"),
        ("dataset=cifar", "dataset: there is no dataset named 'cifar'", "cifar10"),
        ("optim=adamww", "optim: there is no optim named 'adamww'", "adamw"),
        ("hardware=gpus", "hardware: there is no hardware named 'gpus'", "gpu"),
        ("optim.lrr=0.1", "optim.lrr: unknown key", "optim.lr"),
        ("student.tapps.f1=fc", "student.tapps.f1: unknown key", "student.taps"),
        ("sed=3", "sed: unknown key", "seed"),
        ("run.dri=out", "run.dri: unknown key", "run.dir"),
        ("optim.schedule.name=cosin", "optim.schedule.name: 'cosin' is not one of constant, cosine, multistep, poly", "cosine"),
        ("optim.name=sdg", "optim.name: timm has no optimiser named 'sdg'", "sgd"),
        ("evaluation.primary=top_1", "evaluation.primary: 'top_1' is not measured", "top1"),
    ],
)
def test_an_unknown_name_is_refused_with_its_neighbours(refusal: Refusal, override: str, head: str, near: str) -> None:
    problem = only(refusal("train", override))
    assert (problem.head, problem.where) == (head, "command line")
    assert problem.remedy.startswith("did you mean ")
    assert near in problem.remedy.removeprefix("did you mean ").rstrip("?").split(" or ")


@pytest.mark.parametrize(
    ("override", "head", "remedy"),
    [
        ("optim.lr=fast", "optim.lr: 'fast' is not a number", "give a number"),
        ("seed=1.5", "seed: 1.5 is not a whole number", "give a whole number"),
        ("run.dry=maybe", "run.dry: 'maybe' is not true or false", "give true or false"),
        (
            "run.seeds=many",
            "run.seeds: 'many' is not a list of whole numbers or a whole number or null",
            "give a list of whole numbers or a whole number or null",
        ),
        (
            "run.seeds=0",
            "run.seeds: seeds must be different from each other, and at least one",
            "run.seeds=3 for the seeds 1 to 3, or run.seeds=[1,2,3]",
        ),
        (
            "run.seeds=-2",
            "run.seeds: seeds must be different from each other, and at least one",
            "run.seeds=3 for the seeds 1 to 3, or run.seeds=[1,2,3]",
        ),
        ("optim.epochs=0", "optim.epochs: must be above 0, not 0", "e.g. optim.epochs=1"),
        ("run.max_steps=0", "run.max_steps: must be above 0, not 0", "e.g. run.max_steps=1"),
        ("hardware.threads=-1", "hardware.threads: must be above 0, not -1", "e.g. hardware.threads=1"),
        ("objective.temperature=-1", "objective.temperature: cannot be -1", "legal range (0, inf)"),
        (
            "objective.weighting=[1]",
            "objective.weighting: [1] is not one of pld, ce, listmle, plistmle",
            "legal values: ce, listmle, pld, plistmle",
        ),
        ("student.taps.f1=0", "student.taps.f1: 0 is not a text", "a text that looks like something else is quoted twice: \"'0'\""),
        (
            "dataset.splits={train: 1}",
            "dataset.splits.train: 1 is not a text",
            "a text that looks like something else is quoted twice: \"'1'\"",
        ),
        ("source.batch_size=null", "source.batch_size: null is not a whole number", "give a whole number"),
    ],
)
def test_a_wrong_type_or_range_is_refused(refusal: Refusal, override: str, head: str, remedy: str) -> None:
    extra = ["dataset=cifar100"] if override.startswith("dataset.splits") else []
    assert only(refusal("train", *extra, override)) == Problem(head, "command line", remedy)


@pytest.mark.parametrize(
    ("override", "head", "remedy"),
    [
        ("student.hidden=3", "student.hidden: 3 is not a list of whole numbers", "give a list of whole numbers"),
        ("teacher.hidden=[8,wide]", "teacher.hidden: [8, 'wide'] is not a list of whole numbers", "give a list of whole numbers"),
        ("student.dropout=null", "student.dropout: null is not a number", "give a number"),
    ],
)
def test_a_network_s_own_argument_of_a_wrong_type_is_refused(
    refusal: Refusal, tiny: list[str], override: str, head: str, remedy: str
) -> None:
    assert only(refusal("train", *tiny, "objective=kd", "teacher=mlp", override)) == Problem(head, "command line", remedy)


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("pld_cifar100", "write recipe=pld_cifar100"),  # the first guess of a newcomer
        ("resnet20", "write teacher=resnet20 or student=resnet20"),
        ("objective", "objective=NAME, one of acam_kd, ce, "),
        ("nonsense", "write nonsense=VALUE"),
    ],
)
def test_a_bare_word_is_refused_with_what_was_meant(refusal: Refusal, word: str, remedy: str) -> None:
    problem = only(refusal("train", word))
    assert problem.head == f"{word}: this is not KEY=VALUE"
    assert problem.remedy.startswith(remedy)


def test_several_values_are_refused_where_one_is_needed(refusal: Refusal) -> None:
    problem = only(refusal("train", "seed=1,2"))
    assert problem.key == "seed"
    assert "one value per run" in problem.remedy


def test_a_value_that_must_be_given_is_asked_for(refusal: Refusal) -> None:
    problem = only(refusal("train", "student=custom"))
    assert problem.head == "student._target_: must be given"
    assert problem.where.startswith("conf/student/custom.yaml:")


@pytest.mark.parametrize("key", ["seed", "optim", "optim.name", "optim.schedule.gamma", "run", "hardware.slurm"])
def test_what_is_taken_away_and_needed_is_missed(refusal: Refusal, key: str) -> None:
    problem = only(refusal("train", f"~{key}"))
    assert problem.head == f"{key}: this key is missing"
    assert problem.remedy == f"set {key}=..., or leave out ~{key}"


def test_a_group_cannot_be_set_to_a_word(refusal: Refusal) -> None:
    problem = only(refusal("train", "optim.schedule=cosine"))
    assert problem.head == "optim.schedule: a group of keys is needed, not 'cosine'"
    assert "optim.schedule.name" in problem.remedy


@pytest.mark.parametrize("group", ["student", "objective", "dataset", "evaluation", "source"])
def test_a_class_outside_the_allowed_packages_is_refused(refusal: Refusal, group: str) -> None:
    problem = only(refusal("train", f"{group}._target_=os.system"))
    assert problem.key == f"{group}._target_"
    assert "os.system" in problem.head
    assert problem.where == "command line"
    assert problem.remedy == "if you trust it: run.allow=[os]"


@pytest.mark.parametrize("target", ["torch.os.system", "torch.load", "kdrun.cli.main"])
def test_what_an_allowed_package_merely_has_is_no_network(refusal: Refusal, target: str) -> None:
    assert only(refusal("train", "dataset=digits", f"student._target_={target}")).key == "student._target_"


def test_a_class_that_does_not_exist_is_refused_with_its_neighbours(refusal: Refusal) -> None:
    problem = only(refusal("train", "objective=kd", "objective._target_=kdrun.objective.kd.KDD"))
    assert problem.key == "objective._target_"
    assert problem.remedy == "did you mean KD?"


def test_all_mistakes_come_at_once(refusal: Refusal) -> None:
    """Unreadable, unknown, of a wrong type, out of range, and one that only the class itself knows."""
    problems = refusal(
        "train", "recipe=pld_cifar100", "nonsense", "student=resnet21", "optim.lrr=1", "seed=x", "optim.epochs=0",
        "objective.temperature=-1", "dataset._target_=os.system", "seed=1,2",
    )  # fmt: skip
    assert {p.key for p in problems} == {
        "nonsense", "student", "optim.lrr", "seed", "optim.epochs", "objective.temperature", "dataset._target_",
    }  # fmt: skip
    assert len(problems) == 8  # the seed is wrong twice
    assert all(p.where == "command line" and p.remedy for p in problems)


def test_keys_of_a_choice_that_is_wrong_itself_are_left_for_later(refusal: Refusal) -> None:
    """Nobody can say what keys an unknown objective has; the rest is judged all the same."""
    assert {p.key for p in refusal("train", "objective=dkdd", "objective.beta=3", "optim.lrr=1")} == {"objective", "optim.lrr"}
    assert {p.key for p in refusal("train", "recipe=pld", "objective.beta=3", "run.keeep=1")} == {"recipe", "run.keeep"}


def test_a_mistake_in_a_file_is_named_with_its_line(refusal: Refusal, own_recipes: Path, tmp_path: Path) -> None:
    text = spoilt(own_recipes, tmp_path, "epochs: 2", "epoch: 2")
    problem = only(refusal("train", "recipe=small", f"--config-dir={tmp_path}"))
    line = next(n for n, row in enumerate(text.splitlines(), 1) if "epoch:" in row)
    assert (problem.head, problem.where) == ("optim.epoch: unknown key", f"recipes/small.yaml:{line}")
    assert problem.remedy.startswith("did you mean epochs")


@pytest.mark.parametrize(
    ("rival", "head", "where"),
    [
        ("objective=kd, objective.temprature=2", "objective.temprature: unknown key", "recipe"),
        ("objective=kdd", "objective: there is no objective named 'kdd'", "recipe"),
        ("objective=kd, objective.temperature=-1", "objective.temperature: cannot be -1", "recipe"),
        ("objective kd", "objective kd: this is not KEY=VALUE", "recipe"),
        ("objective=fitnet", "objective.student_tap: unknown tap 'f2' of MLP", "conf/objective/fitnet.yaml:5"),  # seen when it is built
        ("objective=fitnet, objective.student_tap=f9", "objective.student_tap: unknown tap 'f9' of MLP", "recipe"),
    ],
)
def test_a_rival_that_cannot_be_is_refused_before_the_first_arm_and_named_with_its_line(
    refusal: Refusal, own_recipes: Path, tmp_path: Path, rival: str, head: str, where: str
) -> None:
    text = spoilt(own_recipes, tmp_path, "kd: [objective=kd]", f"kd: [{rival}]")
    line = next(n for n, row in enumerate(text.splitlines(), 1) if row.lstrip().startswith("kd: ["))
    found = {p.head: p.where for p in refusal("train", "recipe=small", f"--config-dir={tmp_path}")}
    assert found[head] == (f"recipes/small.yaml:{line} (rivals.kd)" if where == "recipe" else where)
    assert "command line" not in found.values()


def test_a_rival_of_the_command_line_is_named_as_such(refusal: Refusal, own_recipes: Path) -> None:
    problem = only(refusal("train", "recipe=small", f"--config-dir={own_recipes}", "run.seeds=[1]", "rivals={kd: ['objective=kdd']}"))
    assert (problem.key, problem.where) == ("objective", "command line")


def test_a_missing_config_dir_is_refused(refusal: Refusal) -> None:
    problem = only(refusal("train", "--config-dir=nowhere"))
    assert problem.head.endswith("nowhere: no such folder")
    assert problem.where == "--config-dir"


@pytest.mark.parametrize("a_run", [True, False])
def test_a_folder_that_is_not_empty_is_refused_with_the_ways_on(refusal: Refusal, here: Path, tiny: list[str], a_run: bool) -> None:
    (here / "mine").mkdir()
    (here / "mine" / ("run.json" if a_run else "precious.txt")).write_text("keep me")
    problem = only(refusal("train", *tiny, "run.dir=mine"))
    assert problem.head == "run.dir: the run folder exists already and is not empty"
    assert ("kdrun resume mine" in problem.remedy) == a_run
    assert "another run.dir" in problem.remedy


@pytest.mark.parametrize("key", ["run.root", "run.dir"])
@pytest.mark.parametrize("comparison", [False, True])
def test_a_folder_below_a_file_cannot_be_written(refusal: Refusal, here: Path, tiny: list[str], key: str, comparison: bool) -> None:
    (here / "file").write_text("")
    problem = only(refusal("train", *tiny, f"{key}=file/runs", *(["run.seeds=[1,2]"] if comparison else [])))
    assert "run folder cannot be written" in problem.head
    assert problem.where.startswith("file/runs")
    assert "run.root" in problem.remedy


def test_a_folder_without_permission_cannot_be_written(refusal: Refusal, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdrun.engine.records.os.access", lambda path, mode: False)
    assert "run folder cannot be written" in only(refusal("train", *tiny)).head


@pytest.mark.parametrize("arguments", [["trian"], ["train", "--nope"], ["ls", "recpies"], ["ledger", "--scale", "papr"], []])
def test_a_command_that_there_is_not_has_exit_code_2(kdrun: Callable[..., Outcome], arguments: list[str]) -> None:
    outcome = kdrun(*arguments)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("teacher", ["none", "mlp"])
def test_a_metric_beside_a_teacher_needs_one(refusal: Refusal, tiny: list[str], teacher: str) -> None:
    """The student alone has none, and neither has a teacher while it is trained."""
    problem = only(refusal("train", *tiny, f"teacher={teacher}", "objective=ce", "evaluation.primary=agreement"))
    assert problem.head == "evaluation.primary: 'agreement' is measured beside a teacher, and there is none"
    assert "teacher.fit.evaluation.primary=top1" in problem.remedy


@pytest.mark.parametrize(
    ("claim", "said", "remedy"),
    [
        ("pld better than ce", "'pld better than ce' is not a claim", "write 'pld > ce'"),
        ("pld > cee", "names an unknown arm: 'cee'", "ce"),
        ("pld.topp1 > ce.topp1", "names an unknown metric: 'topp1'", "top1"),
    ],
)
def test_a_claim_that_cannot_be_judged_is_refused_before_the_first_arm(
    refusal: Refusal, own_recipes: Path, tmp_path: Path, claim: str, said: str, remedy: str
) -> None:
    spoilt(own_recipes, tmp_path, '"pld > ce"', f'"{claim}"')
    problem = only(refusal("train", "recipe=small", f"--config-dir={tmp_path}"))
    assert said in problem.head
    assert problem.where.startswith("recipes/small.yaml:")
    assert remedy in problem.remedy
