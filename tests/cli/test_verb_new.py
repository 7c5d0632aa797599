"""What `kdrun new` writes runs at once, passes its own tests at once, and overwrites nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from kdrun.config.check import check
from kdrun.config.compose import compose
from kdrun.config.paths import SearchPath
from kdrun.new.scaffold import KINDS, derived
from tests.cli.told import Problem, only
from tests.conftest import Outcome
from tests.recipes.test_every_recipe_says import unexplained

ROOT = Path(__file__).parents[2]
Refusal = Callable[..., list[Problem]]
PARTS = {"objective": "my_loss", "student": "my_net", "dataset": "my_arcs"}
DRY = ["run.dry=true", "run.rivals=false", "run.seeds=null", "hardware=cpu", "hardware.threads=1", "-q"]


@pytest.fixture
def mine(kdrun: Callable[..., Outcome], here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one of each."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for kind, name in PARTS.items():
        outcome = kdrun("new", kind, name, "--dir", "mine")
        assert outcome.code == 0, outcome.err
        for line in outcome.out.splitlines():
            assert line.startswith("try ") or (here / line.split()[1]).is_file()
    return here / "mine"


def test_scaffolds_pass_their_own_tests_and_the_house_s_linter(mine: Path) -> None:
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(mine)]
    done = subprocess.run(tests, capture_output=True, text=True, cwd=mine.parent, timeout=120, env={"PYTHONPATH": str(ROOT), "PATH": ""})
    assert done.returncode == 0, done.stdout
    assert "14 passed" in done.stdout
    pytest.importorskip("ruff")
    # What is whose package depends on where the linter stands: the order of imports is left out.
    for command in (["check", "--ignore=I"], ["format", "--check"]):
        words = [sys.executable, "-m", "ruff", *command, "--no-cache", "--config", str(ROOT / "pyproject.toml"), str(mine)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("kind", PARTS)
def test_a_scaffold_trains_by_the_command_that_is_printed(kind: str, mine: Path, kdrun: Callable[..., Outcome]) -> None:
    """A name of its own each time: Python keeps the modules that it has found."""
    name = f"{PARTS[kind]}_again"
    command = kdrun("new", kind, name, "--dir", "mine").out.splitlines()[-1].split()
    assert command[:3] == ["try", "kdrun", "train"]
    small = ["teacher=resnet8"] if kind == "student" else []
    outcome = kdrun(*command[2:], *small, *DRY)
    assert outcome.code == 0, outcome.err
    assert not [path for path in sys.path if path == ""]
    if kind == "objective":
        assert '"match"' in next(Path("outputs").glob("*/*/metrics.jsonl")).read_text()


def test_a_run_with_a_scaffold_is_measured_again_without_naming_the_folder(mine: Path, kdrun: Callable[..., Outcome]) -> None:
    words = ["student=mlp", "dataset=my_arcs_twice", "run.allow=[my_arcs_twice]", "--config-dir", "mine", "run.dir=run"]
    assert kdrun("new", "dataset", "my_arcs_twice", "--dir", "mine").code == 0
    assert kdrun("train", *words, *DRY).code == 0
    assert kdrun("eval", "run", "--no-latency").code == 0


def test_a_recipe_begun_as_another_validates_and_says_where_its_values_are_from(kdrun: Callable[..., Outcome], here: Path) -> None:
    assert kdrun("new", "recipe", "mine", "--from", "pld_cifar100").code == 0
    check(compose(["recipe=mine"], [here]))
    ours, theirs = compose(["recipe=mine"], [here]), compose(["recipe=pld_cifar100"])
    assert ours.tree["published"] == []
    assert ours.tree["scale"] == "bench"
    assert ours.hash() == theirs.hash()  # the same experiment, until it is changed
    assert unexplained(here / "recipes" / "mine.yaml") == []
    assert kdrun("show", "recipe=mine", "--config-dir", ".").code == 0


@pytest.mark.parametrize("origin", list(SearchPath.of().options("recipes")))
def test_every_recipe_can_be_begun_as(origin: str, tmp_path: Path) -> None:
    file = SearchPath.of().options("recipes")[origin]
    text, before = derived(file, "mine", origin), yaml.safe_load(file.read_text())
    after = yaml.safe_load(text)
    changed = {"published", "notes", "about", "scale"}
    assert {k: v for k, v in after.items() if k not in changed} == {k: v for k, v in before.items() if k not in changed}
    assert not {"published", "notes"} & after.keys()
    assert text.startswith("# @package _global_\n")


def test_a_recipe_of_nothing_validates(kdrun: Callable[..., Outcome], here: Path) -> None:
    assert kdrun("new", "recipe", "plain").code == 0
    check(compose(["recipe=plain"], [here]))
    assert unexplained(here / "recipes" / "plain.yaml") == []


def test_in_a_checkout_the_files_go_where_the_house_has_its_own(kdrun: Callable[..., Outcome], here: Path) -> None:
    (here / "conf").mkdir()
    (here / "conf" / "config.yaml").touch()
    (here / "kdrun" / "objective").mkdir(parents=True)
    made = kdrun("new", "objective", "zeta_loss", "--json").json
    assert made["files"] == ["conf/objective/zeta_loss.yaml", "kdrun/objective/zeta_loss.py", "tests/objective/test_zeta_loss.py"]
    assert made["commands"][-1] == "kdrun train recipe=kd_digits objective=zeta_loss"
    assert "_target_: kdrun.objective.zeta_loss.ZetaLoss" in (here / made["files"][0]).read_text()
    assert "from kdrun.objective.zeta_loss import ZetaLoss" in (here / made["files"][2]).read_text()


@pytest.mark.parametrize(
    ("words", "head", "remedy"),
    [
        (["objective", "my-loss"], "NAME: 'my-loss' is no name for a file and for Python", "did you mean my_loss?"),
        (["objective", "MyLoss"], "NAME: 'MyLoss' is no name for a file and for Python", "did you mean my_loss?"),
        (["student", "class"], "NAME: 'class' is no name for a file and for Python", "did you mean my_class?"),
        (["recipe", "2nd"], "NAME: '2nd' is no name for a file and for Python", "did you mean my_2nd?"),
        (["objective", "kd"], "NAME: there is an objective named 'kd' (conf/objective/kd.yaml)", "did you mean my_kd?"),
        (["recipe", "kd_digits"], "NAME: there is a recipe named 'kd_digits' (recipes/kd_digits.yaml)", "did you mean my_kd_digits?"),
        (["dataset", "json"], "NAME: 'json' is the name of a Python module that is there already, which would be found in its place",
         "did you mean my_json?"),
        (["recipe", "x", "--from", "kd_digit"], "--from: there is no recipe named 'kd_digit'",
         "did you mean kd_digits or dkd_digits or pld_digits?"),
        (["dataset", "x", "--from", "kd_digits"], "--from: only a recipe begins as another one", "kdrun new recipe x --from kd_digits"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_a_name_that_can(words: list[str], head: str, remedy: str, refusal: Refusal) -> None:
    problem = only(refusal("new", *words))
    assert (problem.head, problem.remedy) == (head, remedy)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_overwritten(kind: str, kdrun: Callable[..., Outcome], refusal: Refusal, here: Path) -> None:
    assert kdrun("new", kind, "my_own_thing").code == 0
    assert "named 'my_own_thing'" in only(refusal("new", kind, "my_own_thing")).head
    for file in (*here.glob("conf/*/*.yaml"), *here.glob("recipes/*.yaml")):
        file.unlink()
    if kind != "recipe":
        assert {p.head for p in refusal("new", kind, "my_own_thing")} == {
            "NAME: 'my_own_thing' is the name of a Python module that is there already, which would be found in its place"
        }
        (here / "my_own_thing.py").unlink()
        assert only(refusal("new", kind, "my_own_thing")).head == "my_own_thing: is there already, and nothing is overwritten"
