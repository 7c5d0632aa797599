"""kdrun plan: shapes, memory, steps and time before anything is spent; no data, no weights, nothing written."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.told import Problem, only
from tests.conftest import TINY, Outcome

Refusal = Callable[..., list[Problem]]
# timm has tiny networks for tests; without a claim, for they are not the recipe's teacher.
IMAGENET = [
    "recipe=pld_imagenet", "teacher.name=test_resnet.r160_in1k", "student.name=test_vit.r160_in1k", "teacher.claim=null",
    "+student.img_size=224", "hardware=cpu", "hardware.threads=1",
]  # fmt: skip


def test_a_run_is_planned_from_its_configuration(kdrun: Callable[..., Outcome], here: Path) -> None:
    teacher = ["teacher=mlp", "teacher.hidden=[12]", "teacher.taps={p1: fc1}"]
    fitnet = ["objective=fitnet", "objective.student_tap=f1", "objective.teacher_tap=p1"]
    outcome = kdrun("plan", *TINY, *teacher, *fitnet, "--json")
    assert outcome.code == 0, outcome.err
    plan = outcome.json
    assert plan["models"]["student"] == {"parameters": 32 * 8 + 8 + 8 * 6 + 6, "flops": 2 * (32 * 8 + 8 * 6), "output": "[B, 6]"}
    assert plan["models"]["teacher"]["parameters"] == 32 * 12 + 12 + 12 * 6 + 6
    assert plan["taps"] == {"student f1": [8], "teacher p1": [12]}
    assert (plan["steps_per_epoch"], plan["total_steps"], plan["batch"], plan["micro_batch"]) == (3, 6, 32, 32)
    assert plan["teacher_is_trained_first"] is True
    assert plan["memory_bytes"]["teacher"] == 4 * plan["models"]["teacher"]["parameters"]
    assert plan["seconds_per_sample"] > 0
    assert not list(here.iterdir())


def test_the_plan_is_told_in_words(kdrun: Callable[..., Outcome], here: Path) -> None:
    out = kdrun(
        "plan", *TINY, "objective=fitnet", "teacher=mlp", "teacher.hidden=[8,8]", "objective.student_tap=f1", "run.seeds=[1,2,3]"
    ).out
    assert out.splitlines()[0] == "run: fitnet, mlp -> mlp on gaussians"
    for line in (
        r"tap      student f1: \[8\]",
        r"schedule 2 epochs of 3 steps of 32 samples: 6 steps",
        r"teacher  has no checkpoint: it is trained first by the same loop \(once, then kept\)",
        r"memory   [\d.]+ MiB \(.*micro-batch of 32\), beside torch itself and the data",
        r"time     \d+ seconds for the student on .*CPU",
        r"runs     3 \(1 arms, 3 seeds\)",
        r"in all   \d+ seconds, \d+ seconds of it the teacher's own training",
    ):
        assert re.search(rf"^{line}", out, re.MULTILINE), line


def test_a_paper_s_run_is_planned_without_its_data_and_weights(kdrun: Callable[..., Outcome], here: Path) -> None:
    """ImageNet is not here, and nothing is fetched although the recipe asks for pretrained weights."""
    plan = kdrun("plan", *IMAGENET, "--no-probe", "--json").json
    assert (plan["batch"], plan["steps_per_epoch"], plan["total_steps"]) == (2048, 626, 62600)  # ceil(1,281,167 / 2048), 100 epochs
    assert plan["models"].keys() == {"student", "teacher"}
    assert all(row["output"] == "[B, 1000]" for row in plan["models"].values())
    assert plan["teacher_is_trained_first"] is False
    assert "memory_bytes" not in plan
    assert not list(here.iterdir())


@pytest.mark.slow
def test_a_probe_scales_to_the_paper_s_batch(kdrun: Callable[..., Outcome], here: Path) -> None:
    plan = kdrun("plan", *IMAGENET, "--json").json
    assert plan["probe_samples"] < plan["micro_batch"] == 2048
    half = kdrun("plan", *IMAGENET, "hardware.micro_batch=1024", "--json").json
    assert half["memory_bytes"]["activations"] == pytest.approx(plan["memory_bytes"]["activations"] / 2, rel=0.02)


def test_a_pairing_that_cannot_be_is_refused_as_the_run_would(refusal: Refusal) -> None:
    assert only(refusal("plan", *TINY, "objective=kd", "teacher=none")).head == "teacher: KD needs a teacher and there is none"
    problem = only(refusal("plan", *TINY, "objective=rkd", "teacher=mlp", "hardware.micro_batch=8"))
    assert problem.key == "hardware.micro_batch"
    assert problem.where == "command line"


def test_a_search_that_trains_nothing_plans_no_schedule(kdrun: Callable[..., Outcome], here: Path) -> None:
    facts = kdrun("plan", "recipe=diswot_s1_bench", "--no-probe", "--json").json["facts"]
    assert "nothing is trained" in facts["plan"]
    assert "schedule" not in facts


def test_large_language_models_are_planned_by_their_shapes_alone(kdrun: Callable[..., Outcome], here: Path) -> None:
    """4.9 billion weights, of which none is made, no network and no text; the steps are the paper's 16,000 or so."""
    pytest.importorskip("transformers")
    plan = kdrun("plan", "recipe=taid_ultrachat", "hardware=cpu", "--json").json
    assert {who: row["parameters"] for who, row in plan["models"].items()} == {"student": 1_100_048_384, "teacher": 3_821_079_552}
    assert plan["models"]["teacher"]["output"] == "[B, 2047, 32000]"  # cut to the tokenizer's own
    assert plan["total_steps"] == 16_240
    assert plan["memory_bytes"] == {
        "weights": 4 * 1_100_048_384,
        "gradients": 4 * 1_100_048_384,
        "optimiser state": 8 * 1_100_048_384,
        "teacher": 2 * 3_821_079_552,
    }
    assert "seconds_per_sample" not in plan
    assert not list(here.iterdir())


def test_the_whole_command_is_planned_with_all_arms_seeds_and_the_teacher_s_training(
    kdrun: Callable[..., Outcome], own_recipes: Path
) -> None:
    """Three arms over three seeds of a world whose truth is the teacher; each arm by what it asks."""
    plan = kdrun("plan", "recipe=small", f"--config-dir={own_recipes}", "--json").json
    assert (plan["arms"], plan["seeds"], plan["runs"]) == (["pld", "ce", "kd"], 3, 9)
    forward, steps = plan["models"]["student"]["flops"], 96 * 2
    assert plan["flops"] == 3 * forward * steps
    assert plan["arm_flops"] == dict.fromkeys(["pld", "ce", "kd"], 3 * forward * steps + 2 * 60 * forward)  # evaluated after each epoch
    assert plan["teacher_flops"] == 0
    assert plan["seconds"]["all"] == pytest.approx(9 * plan["seconds"]["run"])


def test_a_teacher_s_training_is_planned_until_it_is_kept(kdrun: Callable[..., Outcome], here: Path) -> None:
    taught = [*TINY, "objective=kd", "teacher=mlp", "teacher.hidden=[12]", "run.seeds=[1,2]"]
    plan = kdrun("plan", *taught, "--json").json
    forward = plan["models"]["teacher"]["flops"]
    assert plan["teacher_flops"] == 96 * 2 * 3 * forward + 2 * 60 * forward
    assert plan["seconds"]["all"] == pytest.approx(2 * plan["seconds"]["run"] + plan["seconds"]["teacher"])
    assert kdrun("train", *taught[:-1], "-q").code == 0
    again = kdrun("plan", *taught, "--json").json
    assert again["teacher_flops"] == 0
    assert "is kept" in again["facts"]["teacher"]


def test_a_rival_that_cannot_be_is_refused_as_the_command_would(refusal: Refusal, own_recipes: Path, tmp_path: Path) -> None:
    text = (own_recipes / "recipes" / "small.yaml").read_text().replace("kd: [objective=kd]", "kd: [objective=kdd]")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "small.yaml").write_text(text)
    assert only(refusal("plan", "recipe=small", f"--config-dir={tmp_path}")).head == "objective: there is no objective named 'kdd'"


def test_a_plan_says_how_much_of_its_cache_is_there(kdrun: Callable[..., Outcome], here: Path) -> None:
    taught = [*TINY, "objective=kd", "teacher=mlp", "teacher.hidden=[12]", "cache=dense"]
    assert "are there" not in kdrun("plan", *taught, "--json").json["facts"]["cache"]  # its teacher is not trained yet
    assert kdrun("train", *taught, "run.max_steps=2", "-q").code == 0
    part = kdrun("plan", *taught, "run.max_steps=2", "--json").json["facts"]["cache"]  # 64 of 96 rows
    assert part.endswith("; 67 % of its rows are there")
    assert kdrun("train", *taught, "-q").code == 0
    assert kdrun("plan", *taught, "--json").json["facts"]["cache"].endswith("; all of its rows are there: the teacher is not asked")


def test_seeds_are_planned_alone_and_with_what_they_cost(kdrun: Callable[..., Outcome], own_recipes: Path) -> None:
    alone = kdrun("plan", "--detect=0.5", "--sd=1", "--json").json
    assert alone == {"detect": {"difference": 0.5, "sd": 1.0, "power": 0.8, "seeds": {"paired": 34, "unpaired": 64}}}
    told = kdrun("plan", "--detect=0.5", "--sd=1", "recipe=small", f"--config-dir={own_recipes}").out
    assert re.search(r"^paired   34 seeds show a difference of 0.5 .*; 34 x 3 runs: [\d.]+ (seconds|minutes)$", told, re.MULTILINE)
    assert re.search(r"^unpaired 64 seeds .*; 64 x 3 runs: ", told, re.MULTILINE)


@pytest.mark.parametrize("line", [["--detect=0.3"], ["--sd=0.3"], ["--detect=-1", "--sd=1"], ["--detect=1e-9", "--sd=1"]])
def test_half_a_question_about_seeds_and_an_impossible_one_are_refused(refusal: Refusal, line: list[str]) -> None:
    assert only(refusal("plan", *line)).where == "command line"


SMALL_LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
SMALL_NEOX = {key: value for key, value in SMALL_LLAMA.items() if key != "num_key_value_heads"}


@pytest.mark.parametrize(
    ("recipe", "student", "teacher"),
    [("uld_squad", SMALL_NEOX, SMALL_LLAMA), ("dpo_ultrafeedback", SMALL_LLAMA, {}), ("simpo_ultrafeedback", SMALL_LLAMA, {})],
)
def test_two_tokenizers_and_pairs_are_planned_without_files(
    recipe: str, student: dict[str, int], teacher: dict[str, int], kdrun: Callable[..., Outcome], here: Path
) -> None:
    """What comes beside every text is made up too, so that a step can be timed; a second tokenizer by its stated size."""
    sizes = [f"{who}.config.{key}={value}" for who, shape in (("student", student), ("teacher", teacher)) for key, value in shape.items()]
    few = ["dataset.sizes={train: 40, test: 8}", "dataset.input_shape=[9]", "source.batch_size=4", "hardware.micro_batch=4"]
    outcome = kdrun("plan", f"recipe={recipe}", *sizes, *few, "hardware=cpu", "hardware.threads=1", "hardware.dtype=fp32", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["total_steps"] == 10 * {"uld_squad": 5}.get(recipe, 1)
    rows = {who: model["output"] for who, model in outcome.json["models"].items()}
    expected = {"uld_squad": {"student": "[B, 9, 50277]", "teacher": "[B, 9, 32000]"}}
    assert rows == expected.get(recipe, dict.fromkeys(rows, "[B, 9, 32000]"))
    assert outcome.json["seconds_per_sample"] > 0
