"""What a sweep's words mean: Hydra's grammar, pairs, tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdrun.config.paths import SearchPath
from kdrun.errors import Refused
from kdrun.sweep.axes import Words, check_sweepable, expand, read_table


def choices(*overrides: str, zipped: tuple[str, ...] = (), table: tuple[dict[str, str], ...] = ()) -> list[dict[str, str]]:
    return expand(Words(overrides, zipped, table), SearchPath.of()).choices


def test_every_kind_of_hydras_sweeps() -> None:
    assert choices("objective=kd,dkd") == [{"objective": "kd"}, {"objective": "dkd"}]
    assert choices("seed=range(1,4)") == [{"seed": "1"}, {"seed": "2"}, {"seed": "3"}]
    assert choices("optim.lr=choice(0.05,0.1)") == [{"optim.lr": "0.05"}, {"optim.lr": "0.1"}]
    assert [c["objective"] for c in choices("objective=glob([k*,p*],exclude=[pi*,ps*])")] == ["kd", "pld"]
    assert [c["student.hidden"] for c in choices("student.hidden=[8],[8,8]")] == ["[8]", "[8,8]"]


def test_fixed_words_stay_and_all_combine_with_all_a_seed_at_a_time() -> None:
    found = expand(Words(("recipe=kd_digits", "seed=1,2", "objective=kd,dkd")), SearchPath.of())
    assert found.fixed == ["recipe=kd_digits"]
    assert [(c["seed"], c["objective"]) for c in found.choices] == [("1", "kd"), ("1", "dkd"), ("2", "kd"), ("2", "dkd")]


def test_zipped_keys_move_together() -> None:
    found = choices("teacher=mlp,resnet20", "student=mlp,resnet8", "seed=1,2", zipped=("teacher,student",))
    assert [(c["teacher"], c["student"]) for c in found if c["seed"] == "1"] == [("mlp", "mlp"), ("resnet20", "resnet8")]
    assert len(found) == 4


def test_a_table_gives_rows_that_belong_together(tmp_path: Path) -> None:
    file = tmp_path / "jobs.csv"
    file.write_text("objective,optim.lr\nkd,0.1\npld,0.02\n", encoding="utf-8")
    found = choices("seed=1,2", table=read_table(file))
    assert {(c["objective"], c["optim.lr"]) for c in found} == {("kd", "0.1"), ("pld", "0.02")}
    assert len(found) == 4


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (Words(("optim.lr=interval(0,1)",)), "values without a step"),
        (Words(("optim.lr=glob(*)",)), "glob\\(\\) chooses among the options of a group"),
        (Words(("objective=glob(zz*)",)), "no option of objective fits"),
        (Words(("seed=1,2", "seed=3,4")), "varies twice"),
        (Words(("seed=1,2", "student=mlp,resnet8,resnet20"), ("seed,student",)), "seed has 2, student has 3"),
        (Words(("seed=1,2",), ("seed,studnet",)), "does not vary"),
        (Words(("seed=1,2",), (), ({"seed": "1"},)), "varies twice"),
        (Words(("seed=1,,2",)), "cannot be read"),
    ],
)
def test_what_cannot_be_meant_is_refused(words: Words, what: str) -> None:
    with pytest.raises(Refused, match=what):
        expand(words, SearchPath.of())


def test_a_table_with_holes_is_refused(tmp_path: Path) -> None:
    for text, what in (("a,b\n1\n", "line 2"), ("a,b\n", "no row")):
        (tmp_path / "t.csv").write_text(text, encoding="utf-8")
        with pytest.raises(Refused, match=what):
            read_table(tmp_path / "t.csv")
    with pytest.raises(Refused, match="cannot be read"):
        read_table(tmp_path / "none.csv")


@pytest.mark.parametrize("word", ["run.seeds=[1,2]", "run.rivals=true", "run.dir=here"])
def test_settings_that_mean_several_runs_are_refused(word: str) -> None:
    with pytest.raises(Refused, match="a sweep has its own way"):
        check_sweepable([word])
    check_sweepable(["run.rivals=false"])
