from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kdrun.config.check import check
from kdrun.config.compose import compose
from kdrun.engine.records import STUDENT_FILE, SUMMARY, read_json
from kdrun.errors import Refused
from kdrun.objective.acam_kd import ACAMKD
from kdrun.objective.detection import Detection
from kdrun.student.detector import retinanet
from kdrun.student.weights import copy_parts
from kdrun.types import Batch, Context, ModelSpec, Output, Progress, Signal, Start
from tests.conftest import Outcome
from tests.engine.running import assert_same_run, assert_same_training, run, run_killed, staged, training_lines, weights
from tests.objective.boxes import ANCHORS, detection_run, distilled_run
from tests.objective.toy import PROGRESS, make

IDS = torch.arange(3)


def prepared() -> Detection:
    objective = Detection()
    spec = ModelSpec(20, (3, 64, 64))
    objective.setup(Context(spec, None, 4, IDS, seed=5, steps_per_epoch=2, total_steps=4))
    return objective


def test_terms_are_sums_over_images_of_what_the_detector_says() -> None:
    losses = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 7.0]])
    batch = Batch(IDS, IDS, IDS, IDS, {})
    found = prepared().terms(Output(losses, {}, {}), Signal(None, {}), batch, "student", nn.ModuleDict())
    sums = {name: (term.sum.item(), term.unit) for name, term in found.items()}
    assert sums == {"classification": (9.0, "sample"), "boxes": (13.0, "sample")}
    assert prepared().weights(PROGRESS) == {"classification": 1.0, "boxes": 1.0}


def test_crowds_are_not_learned_and_draws_belong_to_image_and_step() -> None:
    crowd = torch.tensor([[False, True], [False, False], [True, False]])
    batch = Batch(IDS, torch.tensor([[1, 2], [3, -1], [0, 1]]), IDS, IDS, {"crowd": crowd})
    first = prepared().prepare(batch, Progress(0, 4, 2)).extra
    assert first["labels"].tolist() == [[1, -1], [3, -1], [-1, 1]]
    part = Batch(*(value[1:] for value in batch[:4]), {"crowd": crowd[1:]})
    assert torch.equal(prepared().prepare(part, Progress(0, 4, 2)).extra["draw"], first["draw"][1:])
    assert not (prepared().prepare(batch, Progress(1, 4, 2)).extra["draw"] == first["draw"]).any()


def test_accumulation_does_not_change_the_training_of_a_retinanet(tmp_path: Path) -> None:
    base = [*detection_run(), "optim.epochs=1", "evaluation.every_epochs=1"]
    run(base, tmp_path / "whole")
    run([*base, "hardware.micro_batch=[5,2,1]"], tmp_path / "cut")
    assert_same_training(tmp_path / "cut", tmp_path / "whole")
    assert all(set(line["terms"]) == {"classification", "boxes"} for line in training_lines(tmp_path / "cut"))


def test_accumulation_does_not_change_the_training_of_a_faster_rcnn(tmp_path: Path) -> None:
    """Its boxes are drawn by image and step. Weights are compared as one vector: in the biases of the pyramid, which begin at 0, large
    gradients cancel, and what is left of them is rounding."""
    base = [*detection_run("faster_rcnn"), "optim=momentum", "optim.lr=0.01", "optim.epochs=1", "evaluation.every_epochs=1"]
    run(base, tmp_path / "whole")
    run([*base, "hardware.micro_batch=[5,2,1]"], tmp_path / "cut")
    cut, whole = (training_lines(tmp_path / name) for name in ("cut", "whole"))
    assert len(cut) == len(whole) == 3
    for ours, theirs in zip(cut, whole, strict=True):
        assert (ours["grad_norm"], *ours["terms"].values()) == pytest.approx((theirs["grad_norm"], *theirs["terms"].values()), rel=1e-5)
    ours, theirs = (torch.cat([w.double().flatten() for w in weights(tmp_path / name).values()]) for name in ("cut", "whole"))
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_accumulation_does_not_change_a_distilled_detector(tmp_path: Path) -> None:
    base = [*distilled_run(tmp_path / "teacher.safetensors"), "optim.epochs=1", "evaluation.every_epochs=1"]
    run(base, tmp_path / "whole")
    run([*base, "hardware.micro_batch=[3,5]"], tmp_path / "cut")
    assert_same_training(tmp_path / "cut", tmp_path / "whole")
    terms = training_lines(tmp_path / "whole")[-1]["terms"]
    assert set(terms) == {"classification", "boxes", "channel", "spatial", "diversity"}
    assert all(value > 0 for value in terms.values())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """A detector under ACAM-KD, which inherits, and what it leaves when nobody kills it."""
    root = tmp_path_factory.mktemp("detection")
    overrides = [*distilled_run(root / "teacher.safetensors"), "run.checkpoint_every=0.6"]
    run(overrides, root / "run")
    return overrides, root / "run"


@pytest.mark.parametrize("step", [1, 4])
def test_a_killed_run_is_resumed_to_the_same_bytes(
    step: int, unbroken: tuple[list[str], Path], tmp_path: Path, kdrun: Callable[..., Outcome]
) -> None:
    overrides, folder = unbroken
    run_killed(overrides, tmp_path / "run", "step_done", step)
    assert kdrun("resume", str(tmp_path / "run"), "--quiet").code == 0
    assert_same_run(tmp_path / "run", folder)


def test_a_killed_faster_rcnn_draws_the_same_boxes_again(tmp_path: Path, kdrun: Callable[..., Outcome]) -> None:
    few = ["dataset.n_train=8", "source.batch_size=4", "evaluation.every_epochs=1", "optim.epochs=1", "run.checkpoint_every=0.5"]
    overrides = [*detection_run("faster_rcnn"), *few]
    run(overrides, tmp_path / "whole")
    run_killed(overrides, tmp_path / "run", "step_done", 2)
    assert kdrun("resume", str(tmp_path / "run"), "--quiet").code == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_the_exported_detector_holds_none_of_what_was_added(unbroken: tuple[list[str], Path]) -> None:
    state = load_file(unbroken[1] / STUDENT_FILE)
    assert not [name for name in state if not name.startswith(("backbone.body.", "backbone.fpn.", "head."))]
    summary = read_json(unbroken[1] / SUMMARY)
    assert "map" in summary["test"]
    assert "map" in summary["teacher"]


def test_a_student_begins_with_the_parts_of_its_teacher_that_fit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher, student = (retinanet(4, name="plain", width=width, anchor_sizes=ANCHORS) for width in (8, 8))
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    copy_parts(student, teacher, ["backbone.fpn", "head"], "objective.inherit")
    for name, tensor in student.state_dict().items():
        inherited = name.startswith(("backbone.fpn.", "head."))
        assert torch.equal(tensor, teacher.state_dict()[name] if inherited else before[name]), name
    narrow = retinanet(4, name="plain", width=4, anchor_sizes=ANCHORS)
    copied = copy_parts(narrow, teacher, ["head"], "objective.inherit")
    assert 0 < copied < len([name for name in before if name.startswith("head.")])  # the biases of the last layers
    with pytest.raises(Refused, match="nothing of the teacher's 'roi_heads' fits"):
        copy_parts(student, teacher, ["head", "roi_heads"], "objective.inherit")


def test_inheritance_comes_before_step_0(tmp_path: Path) -> None:
    objective = make("acam_kd", task="detection", inherit=["head"])
    torch.manual_seed(0)
    teacher, student = (retinanet(4, name="plain", width=8, anchor_sizes=ANCHORS) for _ in range(2))
    spec = ModelSpec(20, (3, 64, 64), {"f2": (3, 4, 4)})
    connectors = objective.setup(Context(spec, spec, 4, IDS, seed=5, steps_per_epoch=2, total_steps=4))
    assert objective.needs().teacher_network
    objective.start(Start(student, teacher, lambda: iter([])), connectors)
    assert torch.equal(student.head.regression_head.bbox_reg.weight, teacher.head.regression_head.bbox_reg.weight)  # type: ignore[union-attr]


def test_a_student_that_finds_nothing_is_refused(tmp_path: Path) -> None:
    overrides = [*(o for o in detection_run() if not o.startswith("student")), "student=segmenter", "+student.speaks=tensor"]
    with pytest.raises(Refused, match="student=retinanet or student=faster_rcnn"):
        staged(overrides, tmp_path / "run")


@pytest.mark.parametrize("objective", [["objective=detection"], ["objective=acam_kd", "objective.task=detection", "teacher=segmenter"]])
def test_data_without_boxes_are_refused(objective: list[str], tmp_path: Path) -> None:
    overrides = ["dataset=stripes", "student=segmenter", "evaluation=segmentation", "hardware=cpu", *objective]
    with pytest.raises(Refused, match="stripes has no 'boxes' rows"):
        staged(overrides, tmp_path / "run")


@pytest.mark.parametrize("values", [{"task": "boxes"}, {"pool": [2, 2]}, {"pool": []}, {"pool": [0]}])
def test_settings_that_cannot_be_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="="):
        make("acam_kd", **values)


def test_maps_are_pooled_each_by_its_own_number() -> None:
    names, shapes = ["a", "b"], {"a": (2, 8, 8), "b": (2, 4, 4)}
    objective = make("acam_kd", student_taps=names, teacher_taps=names, pool=[4, 1])
    assert isinstance(objective, ACAMKD)
    spec = ModelSpec(4, (3, 64, 64), shapes)
    context = Context(spec, spec, 4, IDS, seed=5, steps_per_epoch=2, total_steps=4)
    connectors = objective.setup(context)
    assert objective.pooled_shapes(context) == [(2, 2, 2), (2, 4, 4)]
    maps = {name: torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)) for name, shape in shapes.items()}
    (first, _), (second, _) = objective.maps(Output(IDS, maps, {}), Signal(None, maps), connectors)
    torch.testing.assert_close(first, nn.functional.avg_pool2d(maps["a"], 4))
    assert torch.equal(second, maps["b"])


def test_what_has_to_look_at_boxes_is_not_compiled() -> None:
    assert not Detection().compilable
    assert not make("acam_kd", task="detection").compilable
    assert make("acam_kd").compilable


def test_the_configuration_is_checked_as_a_whole(tmp_path: Path) -> None:
    check(compose(distilled_run(tmp_path / "teacher.safetensors")))
