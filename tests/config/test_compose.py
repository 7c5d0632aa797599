from __future__ import annotations

from pathlib import Path

import pytest

from kdrun.config.check import check, fits
from kdrun.config.compose import COMMAND_LINE, compose
from kdrun.config.paths import SearchPath
from kdrun.errors import Refused

RECIPES = sorted(SearchPath.of().options("recipes"))


def refused(overrides: list[str], build: bool = True, config_dirs: list[Path] | None = None) -> list[str]:
    with pytest.raises(Refused) as caught:
        check(compose(overrides, config_dirs or []), build)
    return [str(p) for p in caught.value.problems]


def test_later_layers_win() -> None:
    plain = compose(["recipe=pld_cifar100"]).tree
    assert plain["optim"]["weight_decay"] == 0.5  # the recipe over the group
    assert plain["objective"]["temperature"] == 4.0
    rival = compose(["recipe=pld_cifar100", "objective=dist"]).tree
    assert rival["objective"]["gamma"] == 2.0
    assert "weighting" not in rival["objective"]
    own = compose(["recipe=pld_cifar100", "objective.temperature=7"]).tree
    assert own["objective"]["temperature"] == 7  # the command line over the recipe's condition


def test_a_condition_holds_only_for_its_choice() -> None:
    assert compose(["recipe=pld_cifar100", "objective=dkd"]).tree["objective"]["beta"] == 8.0
    pair = ["recipe=pld_cifar100", "objective=dkd", "teacher=resnet56", "student=resnet20"]
    assert compose(pair).tree["objective"]["beta"] == 2.0
    assert compose([*pair, "objective.beta=3"]).tree["objective"]["beta"] == 3


def test_every_leaf_has_an_origin_that_names_its_file() -> None:
    composed = compose(["recipe=pld_cifar100", "optim.lr=0.1"])
    origins = composed.origins
    assert origins["optim.lr"] == COMMAND_LINE
    assert origins["optim.weight_decay"].startswith("recipes/pld_cifar100.yaml:")
    assert origins["optim.momentum"].startswith("conf/optim/adamw.yaml:")
    assert "when objective=pld" in origins["objective.temperature"]
    assert origins["teacher.policy"].startswith("conf/teacher/_live.yaml:")
    assert all(origins.values())


def test_the_line_of_an_origin_is_the_line_of_the_key() -> None:
    origin = compose(["recipe=pld_cifar100"]).origins["optim.weight_decay"]
    file, line = origin.rsplit(":", 1)
    text = (Path(__file__).parents[2] / file).read_text().splitlines()
    assert "weight_decay" in text[int(line) - 1]


def test_the_issue_s_example_composes() -> None:
    composed = compose(["recipe=pld_cifar100", "objective=dkd", "student=wrn_16_2", "teacher=wrn_40_2", "optim.lr=0.1", "seed=3"])
    check(composed)
    assert composed.tree["optim"]["lr"] == 0.1
    assert composed.tree["seed"] == 3


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_composes_and_checks(name: str) -> None:
    check(compose([f"recipe={name}"]))


@pytest.mark.parametrize("group", ["teacher", "student", "dataset", "objective", "optim", "hardware", "evaluation", "source", "plan"])
def test_every_option_of_every_group_composes(group: str) -> None:
    for name in SearchPath.of().options(group):
        extra = ["student._target_=torch.nn.Identity"] if name == "custom" and group == "student" else []
        extra += ["teacher._target_=torch.nn.Identity"] if name == "custom" and group == "teacher" else []
        extra += ["hardware.procs=2"] if name in ("multi_gpu",) else []
        extra += ["dataset.path=x"] if name in ("csv", "folder") else []
        extra += ["dataset.validation=0.1"] if group == "evaluation" else []  # one chooses its epoch by it
        check(compose([f"{group}={name}", *extra]), build=False)


def test_all_problems_come_at_once_with_the_nearest_legal_value() -> None:
    problems = refused(["recipe=pld_cifar100", "objective.temprature=4", "optim.lrr=1", "student.tapps.f1=x", "seeed=3"])
    text = "\n".join(problems)
    assert len(problems) == 4
    assert "did you mean objective.temperature" in text
    assert "did you mean optim.lr" in text
    assert "did you mean seed" in text
    assert "command line" in text


def test_unknown_choices_are_named_with_their_neighbours() -> None:
    text = "\n".join(refused(["recipe=pld_cifar10", "objective=dkdd", "student=resnet21"]))
    assert "pld_cifar100" in text
    assert "dkd" in text
    assert "resnet20" in text


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lr=fast", "a number"),
        ("seed=1.5", "a whole number"),
        ("run.dry=maybe", "true or false"),
        ("optim.epochs=0", "above 0"),
        ("objective.temperature=-1", "temperature"),
        ("objective.weighting=pdl", "pld"),
        ("hardware.compile=perhaps", "auto"),
        ("optim.ema=2", "between 0 and 1"),
        ("optim.schedule.name=cosin", "cosine"),
        ("evaluation.protocol=best_val", "dataset.validation=0.1"),
        ("evaluation.protocol=best_test", "refused"),
        ("hardware.micro_batch=[16,16]", "add up"),
        ("hardware.procs=2", "hardware=multi_gpu"),
        ("run.seeds=[1,1]", "different"),
    ],
)
def test_a_wrong_value_is_refused_with_its_remedy(override: str, words: str) -> None:
    assert words in "\n".join(refused(["recipe=pld_cifar100", override]))


def test_a_class_outside_the_allowed_packages_is_refused() -> None:
    problems = refused(["student=custom", "student._target_=os.system"], build=False)
    assert "os.system" in problems[0]
    assert "run.allow=[os]" in problems[0]


def test_a_sweep_is_refused_where_one_value_is_needed() -> None:
    assert "one value per run" in refused(["recipe=pld_digits", "seed=1,2"])[0]


def test_the_hash_knows_the_experiment_and_not_how_it_was_written() -> None:
    one = compose(["recipe=pld_cifar100", "seed=3", "optim.lr=0.002"]).hash()
    assert one == compose(["optim.lr=0.002", "recipe=pld_cifar100", "seed=3"]).hash()
    assert one == compose(["optim.lr=0.002", "recipe=pld_cifar100", "seed=3", "run.root=elsewhere", "hardware.threads=1"]).hash()
    assert one != compose(["recipe=pld_cifar100", "seed=4", "optim.lr=0.002"]).hash()


def test_a_folder_of_ones_own_joins(tmp_path: Path) -> None:
    (tmp_path / "conf" / "objective").mkdir(parents=True)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "conf" / "objective" / "warm.yaml").write_text("# Own.\n_target_: kdrun.objective.kd.KD\ntemperature: 9.0\n")
    (tmp_path / "recipes" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /objective: warm\n  - _self_\noptim: {lr: 0.3}\n"
    )
    composed = compose(["recipe=mine", "teacher=mlp"], [tmp_path])
    check(composed)
    assert composed.tree["objective"]["temperature"] == 9.0
    assert composed.tree["optim"]["lr"] == 0.3
    assert composed.origins["objective.temperature"] == "conf/objective/warm.yaml:3"


def test_a_typo_in_a_recipe_file_is_found_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - _self_\noptim:\n  lrate: 0.3\nobjective:\n  wieght: 1\n"
    )
    text = "\n".join(refused(["recipe=mine"], config_dirs=[tmp_path]))
    assert "optim.lrate" in text
    assert "recipes/mine.yaml:5" in text
    assert "did you mean lr" in text


def test_a_missing_config_dir_is_refused(tmp_path: Path) -> None:
    assert "no such folder" in refused([], config_dirs=[tmp_path / "nowhere"])[0]


@pytest.mark.parametrize(
    ("value", "hint", "answer"),
    [
        (1, float, True),
        (True, float, False),
        (True, int, False),
        (None, int | None, True),
        ([1, 2], list[int], True),
        ([1, "a"], list[int], False),
        ({"a": 1}, dict[str, int], True),
    ],
)
def test_types_of_plain_values(value: object, hint: object, answer: bool) -> None:
    assert fits(value, hint) is answer


def test_a_number_of_seeds_means_the_first_ones() -> None:
    composed = compose(["recipe=kd_digits", "run.seeds=5"])
    check(composed, build=False)
    assert composed.tree["run"]["seeds"] == [1, 2, 3, 4, 5]
    assert composed.origins["run.seeds"] == COMMAND_LINE
    assert composed.hash() == compose(["recipe=kd_digits", "run.seeds=[1,2,3,4,5]"]).hash()
    assert compose(["recipe=kd_digits", "run.seeds=[7]"]).tree["run"]["seeds"] == [7]
    assert compose(["recipe=kd_digits", "run.seeds=null"]).tree["run"]["seeds"] is None


@pytest.mark.parametrize("seeds", ["0", "-1", "[]", "[1,1]", "true", "1.5"])
def test_seeds_that_are_none_are_refused(seeds: str) -> None:
    assert any(p.startswith("run.seeds: ") for p in refused([f"run.seeds={seeds}"], build=False))
