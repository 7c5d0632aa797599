from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kdrun.engine.records import METRICS, STUDENT_FILE, SUMMARY, read_json, read_lines
from kdrun.errors import Refused
from kdrun.objective.acam_kd import ACAMKD, WATCHED, AttentionMasks, CrossAttention
from kdrun.student.segmenter import segmenter
from kdrun.types import Batch, ModelSpec, Output, Progress, Signal, Start, Term
from tests.conftest import Outcome
from tests.engine.running import assert_same_run, assert_same_training, run, run_killed
from tests.objective.dense import FROZEN, dense_run
from tests.objective.toy import PROGRESS, context, make

# The hand-computed example: two channels, two positions, two masks; W_q and W_k of one channel, W_v the identity.
TEACHER = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64).view(1, 2, 1, 2)
STUDENT = torch.tensor([[0.0, 1.0], [1.0, 1.0]], dtype=torch.float64).view(1, 2, 1, 2)
FUSED = torch.tensor([[0.5, 0.5], [1.0, 1.0]], dtype=torch.float64)  # channels by positions
CHANNEL = torch.tensor([[0.622459, 0.731059], [0.377541, 0.268941]], dtype=torch.float64)
SPATIAL = torch.tensor([[0.622459, 0.622459], [0.731059, 0.731059]], dtype=torch.float64)


def hand_masks(query: Any = "teacher") -> AttentionMasks:
    module = AttentionMasks(2, 2, query).double()
    with torch.no_grad():
        for weight, value in (
            (module.fusion.query.weight, [[1.0, 0.0]]),
            (module.fusion.key.weight, [[0.0, 1.0]]),
            (module.fusion.value.weight, [[1.0, 0.0], [0.0, 1.0]]),
            (module.channel_units, [[1.0], [-1.0]]),
            (module.spatial_units, [[1.0, 0.0], [0.0, 1.0]]),
        ):
            weight.copy_(torch.tensor(value).view_as(weight))
    return module


def prepared(shape: tuple[int, ...] = (2, 1, 2), student: tuple[int, ...] | None = None, **values: Any) -> tuple[ACAMKD, nn.ModuleDict]:
    """An objective on maps of this shape, and its connectors in float64."""
    objective = make("acam_kd", **{"student_taps": ["map"], "teacher_taps": ["map"], **values})
    assert isinstance(objective, ACAMKD)
    specs = [ModelSpec(5, (3, 8, 8), {"map": s}) for s in (student or shape, shape)]
    torch.manual_seed(0)
    connectors = objective.setup(dataclasses.replace(context(), student=specs[0], teacher=specs[1]))
    return objective, connectors.double()


def hand_fused_by_student() -> Tensor:
    """Q = first channel of the student, K = second channel of the teacher, V = the teacher."""
    scores = STUDENT[0, 0, 0, :, None] * TEACHER[0, 1, 0, None, :]  # C_q = 1, so the root of it is 1
    return (scores.softmax(1) @ TEACHER[0, :, 0].mT).mT


def hand_terms(**values: Any) -> dict[str, Term]:
    objective, connectors = prepared(masks=2, **values)
    connectors["masks"] = nn.ModuleList([hand_masks(values.get("query", "teacher"))])
    return terms(objective, connectors, TEACHER, STUDENT)


def terms(
    objective: ACAMKD, connectors: nn.ModuleDict, teacher: Tensor, student: Tensor, keep: dict[str, Tensor] | None = None
) -> dict[str, Term]:
    ids = torch.arange(len(teacher))
    batch = Batch(teacher, torch.zeros(len(teacher), 4, 4, dtype=torch.int64), ids, ids, {})
    output = Output(student.new_zeros(len(student), 5, 4, 4), {"map": student}, {} if keep is None else keep)
    return objective.terms(output, Signal(None, {"map": teacher}), batch, "student", connectors)


def maps(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    one, other = (torch.randn(3, *shape, generator=g, dtype=torch.float64) for _ in range(2))
    return one, other


def test_fused_features_and_masks_of_the_example() -> None:
    module = hand_masks()
    torch.testing.assert_close(module.fusion(TEACHER, STUDENT)[0].mT, FUSED, rtol=0, atol=1e-12)
    channel, spatial = module(TEACHER, STUDENT)
    torch.testing.assert_close(channel[0], CHANNEL, rtol=0, atol=5e-7)
    torch.testing.assert_close(spatial[0], SPATIAL, rtol=0, atol=5e-7)


@pytest.mark.parametrize(("norm", "channel", "spatial"), [("mask_sum", 0.506739119, 0.676758955), ("literal", 0.693359267, 1.263774341)])
@pytest.mark.parametrize("dice", ["pairwise", "pooled"])
def test_terms_of_the_example(norm: str, channel: float, spatial: float, dice: str) -> None:
    found = hand_terms(norm=norm, dice=dice)
    assert found["channel"].sum.item() == pytest.approx(channel, abs=1e-9)
    assert found["spatial"].sum.item() == pytest.approx(spatial, abs=1e-9)
    assert found["diversity"].sum.item() == pytest.approx(0.759372847 + 0.987207108, abs=1e-9)


@pytest.mark.parametrize(("part", "overlap"), [("channel", 0.759372847), ("spatial", 0.987207108)])
def test_one_kind_of_mask_alone(part: str, overlap: float) -> None:
    found = hand_terms(**{"spatial": part == "spatial", "channel": part == "channel"})
    assert set(found) == {"ce", part, "diversity"}
    assert found["diversity"].sum.item() == pytest.approx(overlap, abs=1e-9)
    connectors = prepared(**{"spatial": part == "spatial", "channel": part == "channel"})[1]
    units = {name.rpartition(".")[2]: p.requires_grad for name, p in connectors.named_parameters() if "units" in name}
    assert units == {"channel_units": part == "channel", "spatial_units": part == "spatial"}


def test_attention_rows_add_up_to_one() -> None:
    teacher, student = maps(0, 4, 3, 5)
    module = CrossAttention(4).double()
    with torch.no_grad():
        module.value.weight.copy_(torch.eye(4).view(4, 4, 1, 1))
        fused = module(teacher, torch.cat([student[:, :3], torch.ones_like(student[:, 3:])], 1))
    torch.testing.assert_close(fused[..., 3], torch.ones(3, 15, dtype=torch.float64), rtol=0, atol=1e-12)  # the mean of ones


def test_order_of_the_positions_that_answer_does_not_matter_and_those_that_ask_carry_theirs() -> None:
    teacher, student = maps(1, 4, 1, 12)
    module, order = CrossAttention(4).double(), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    fused = module(teacher, student)
    torch.testing.assert_close(module(teacher, student[..., order]), fused, rtol=0, atol=1e-12)
    torch.testing.assert_close(module(teacher[..., order], student), fused[:, order], rtol=0, atol=1e-12)
    assert (fused[:, order] - fused).abs().max() > 1e-3


@pytest.mark.parametrize(("channels", "narrow"), [(1, 1), (2, 1), (5, 2), (19, 9)])
def test_queries_have_half_the_channels(channels: int, narrow: int) -> None:
    module = CrossAttention(channels)
    assert module.query.weight.shape == module.key.weight.shape == (narrow, channels, 1, 1)
    assert module.value.weight.shape == (channels, channels, 1, 1)
    assert module.query.bias is module.key.bias is module.value.bias is None


def test_units_of_zero_make_masks_of_one_half() -> None:
    teacher, student = maps(2, 5, 4, 4)
    objective, connectors = prepared((5, 4, 4))
    for name, parameter in connectors.named_parameters():
        if "units" in name:
            parameter.data.zero_()
    keep: dict[str, Tensor] = {}
    found = terms(objective, connectors, teacher, student, keep)
    half = 0.5 * (teacher - student).square().mean((1, 2, 3)).sum()
    torch.testing.assert_close(found["channel"].sum, half, rtol=1e-12, atol=0)
    torch.testing.assert_close(found["spatial"].sum, half, rtol=1e-12, atol=0)
    assert found["diversity"].sum.item() / 3 == pytest.approx(2.0, abs=1e-11)
    expected = torch.tensor([[1.0, 0.5, 0.5, 1.0]] * 3, dtype=torch.float64)
    torch.testing.assert_close(keep["levels"], expected, rtol=1e-11, atol=0)


def test_units_begin_near_zero_so_the_masks_begin_near_one_half() -> None:
    units = torch.cat([AttentionMasks(16, 200, "teacher").spatial_units.flatten() for _ in range(2)])
    assert units.std().item() == pytest.approx(0.01, rel=0.05)
    objective, connectors = prepared((5, 4, 4))
    assert terms(objective, connectors, *maps(3, 5, 4, 4))["diversity"].sum.item() / 3 == pytest.approx(2.0, abs=1e-2)


def test_without_a_difference_there_is_no_error() -> None:
    teacher, _ = maps(4, 5, 4, 4)
    objective, connectors = prepared((5, 4, 4))
    found = terms(objective, connectors, teacher, teacher.clone())
    assert (found["channel"].sum.item(), found["spatial"].sum.item()) == (0.0, 0.0)


def test_the_student_learns_through_difference_and_answers_and_the_teacher_does_not() -> None:
    teacher, student = (m.requires_grad_() for m in maps(5, 5, 4, 4))
    objective, connectors = prepared((5, 4, 4))
    found = terms(objective, connectors, teacher, student)
    for part in ("channel", "spatial", "diversity"):
        (gradient,) = torch.autograd.grad(found[part].sum, [student], retain_graph=True)
        assert gradient.norm() > 0, part
        weights = torch.autograd.grad(found[part].sum, list(connectors["masks"].parameters()), retain_graph=True, allow_unused=True)
        assert any(w is not None and w.norm() > 0 for w in weights), part
    torch.stack([t.sum for t in found.values()]).sum().backward()
    assert teacher.grad is None


def test_masks_learn_from_their_overlap_alone_where_that_is_asked_for() -> None:
    objective, connectors = prepared((5, 4, 4), mask_grad="div_only")
    found = terms(objective, connectors, *maps(6, 5, 4, 4))
    assert not found["channel"].sum.requires_grad  # the student's map is no leaf here: only the masks could need it
    assert found["diversity"].sum.requires_grad


def test_the_student_may_ask_instead() -> None:
    torch.testing.assert_close(hand_masks("student").fusion(STUDENT, TEACHER)[0].mT, hand_fused_by_student(), rtol=0, atol=1e-12)
    both = [hand_terms(query=side)["spatial"].sum.item() for side in ("teacher", "student")]
    assert abs(both[0] - both[1]) > 1e-3


def test_masks_of_the_teacher_alone_do_not_see_the_student() -> None:
    teacher, student = maps(7, 5, 4, 4)
    objective, connectors = prepared((5, 4, 4), mask_source="teacher", watch=[1, 2])
    first, second = ({}, {})  # type: dict[str, Tensor], dict[str, Tensor]
    terms(objective, connectors, teacher, student, first)
    terms(objective, connectors, teacher, -student, second)
    assert torch.equal(first["spatial_masks"], second["spatial_masks"])
    assert torch.equal(first["channel_masks"], second["channel_masks"])
    other, connectors = prepared((5, 4, 4), watch=[1, 2])
    terms(other, connectors, teacher, student, first)
    terms(other, connectors, teacher, -student, second)
    assert not torch.equal(first["spatial_masks"], second["spatial_masks"])


def test_frozen_masks_are_not_trained() -> None:
    _, connectors = prepared((5, 4, 4), student=(3, 4, 4), mask_source="teacher", frozen=True)
    trained = {name for name, p in connectors.named_parameters() if p.requires_grad}
    assert trained == {"align.0.project.weight", "align.0.project.bias"}
    _, connectors = prepared((5, 4, 4), student=(3, 4, 4), mask_source="teacher")
    assert all(p.requires_grad for p in connectors.parameters())


@pytest.mark.parametrize(
    ("student", "teacher", "added"),
    [((5, 4, 4), (5, 4, 4), 0), ((5, 8, 8), (5, 4, 4), 0), ((3, 4, 4), (5, 4, 4), 3 * 5 + 5), ((3, 2, 2), (5, 4, 4), 3 * 5 + 5)],
)
def test_the_students_map_is_brought_to_the_teachers_shape(student: tuple[int, ...], teacher: tuple[int, ...], added: int) -> None:
    objective, connectors = prepared(teacher, student=student)
    assert sum(p.numel() for p in connectors["align"].parameters()) == added
    found = terms(objective, connectors, torch.randn(2, *teacher, dtype=torch.float64), torch.randn(2, *student, dtype=torch.float64))
    assert found["spatial"].sum.isfinite()


def test_maps_are_pooled_and_divided_by_one_number_measured_on_the_training_rows() -> None:
    objective, connectors = prepared((5, 4, 4), pool=2, standardise=True)
    rows = [
        (Batch(m, m, torch.arange(3), torch.arange(3), {}), Signal(None, {"map": m}))
        for m in (3 * maps(8, 5, 4, 4)[0] + 1, maps(9, 5, 4, 4)[1])
    ]
    objective.start(Start(nn.Identity(), None, lambda: iter(rows)), connectors)
    every = torch.cat([signal.taps["map"] for _, signal in rows])
    assert objective.state_dict()["scale"].item() == pytest.approx(every.std(correction=0).item(), rel=1e-6)
    teacher, student = maps(10, 5, 4, 4)
    ((ft, fs),) = objective.maps(Output(teacher, {"map": student}, {}), Signal(None, {"map": teacher}), connectors)
    scale = objective.state_dict()["scale"].item()
    torch.testing.assert_close(ft, nn.functional.avg_pool2d(teacher, 2) / scale, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(fs, nn.functional.avg_pool2d(student, 2) / scale, rtol=1e-6, atol=1e-9)


def test_several_maps_add_up() -> None:
    shapes = {"a": (4, 4, 4), "b": (2, 6, 6)}
    taps = {"student_taps": ["a", "b"], "teacher_taps": ["a", "b"]}
    spec = ModelSpec(5, (3, 8, 8), shapes)
    data = {name: maps(11, *shape) for name, shape in shapes.items()}

    def spoken(names: list[str]) -> dict[str, float]:
        objective = make("acam_kd", masks=6, student_taps=names, teacher_taps=names)
        torch.manual_seed(0)
        connectors = objective.setup(dataclasses.replace(context(), student=spec, teacher=spec)).double()
        if names != taps["student_taps"]:
            connectors["masks"] = nn.ModuleList([whole["masks"][taps["student_taps"].index(names[0])]])  # type: ignore[index]
        ids = torch.arange(3)
        output = Output(torch.zeros(3, 5), {n: data[n][1] for n in names}, {})
        batch = Batch(ids, ids, ids, ids, {})
        found = objective.terms(output, Signal(None, {n: data[n][0] for n in names}), batch, "student", connectors)
        return {name: term.sum.item() for name, term in found.items()}

    objective = make("acam_kd", masks=6, **taps)
    torch.manual_seed(0)
    whole = objective.setup(dataclasses.replace(context(), student=spec, teacher=spec)).double()
    together, apart = spoken(["a", "b"]), [spoken([name]) for name in shapes]
    for name in ("channel", "spatial", "diversity"):
        assert together[name] == pytest.approx(sum(one[name] for one in apart), rel=1e-10)


def test_one_mask_for_every_class_unless_it_is_said() -> None:
    for masks, count in ((None, 5), (6, 6), (1, 1)):
        objective, connectors = prepared((5, 4, 4), masks=masks)
        assert connectors["masks"][0].channel_units.shape == (count, 1)  # type: ignore[index]
        found = terms(objective, connectors, *maps(12, 5, 4, 4))
        assert (found["diversity"].sum.item() == 0) == (count == 1)


def test_units_and_weights() -> None:
    objective, connectors = prepared((5, 4, 4), alpha=4.0, diversity=0.5, ce_weight=2.0)
    found = terms(objective, connectors, *maps(13, 5, 4, 4))
    assert {name: term.unit for name, term in found.items()} == {
        "ce": "label",
        "channel": "sample",
        "spatial": "sample",
        "diversity": "sample",
    }
    assert objective.weights(PROGRESS) == {"ce": 2.0, "channel": 4.0, "spatial": 4.0, "diversity": 0.5}


def test_it_reports_the_level_of_the_masks_and_how_far_they_moved() -> None:
    objective, connectors = prepared((5, 4, 4), watch=[1, 3])
    assert objective.report() == {}
    teacher, student = maps(14, 5, 4, 4)
    ids = torch.arange(3)
    rows = (Batch(teacher, ids, ids, ids, {}), Signal(None, {"map": teacher}))
    objective.start(Start(nn.Identity(), None, lambda: iter([rows])), connectors)
    masks = []
    for epoch in (1, 2, 3):
        keep: dict[str, Tensor] = {}
        terms(objective, connectors, teacher, epoch * student, keep)
        objective.after_step(ids, keep, Progress(step=epoch - 1, total_steps=3, steps_per_epoch=1))
        masks.append(keep)
        report = objective.report()
        assert ("moved_spatial" in report) == (epoch == 3)
        assert report["mask_spatial"] == pytest.approx(keep["spatial_masks"].mean().item(), rel=1e-6)
        assert report["mask_channel"] == pytest.approx(keep["channel_masks"].mean().item(), rel=1e-6)
    for part in ("channel", "spatial"):
        expected = (masks[2][f"{part}_masks"] - masks[0][f"{part}_masks"]).abs().mean().item()
        assert 0 < expected == pytest.approx(report[f"moved_{part}"], rel=1e-4)
    assert report["diversity_start"] == pytest.approx(masks[0]["levels"][:, 3].mean().item(), rel=1e-9)


def test_watched_masks_are_found_by_id_in_any_order_and_batch() -> None:
    objective, _ = prepared((5, 4, 4), watch=[1, 2])
    ids = torch.arange(40).flip(0)
    rows = (Batch(ids, ids, ids, ids, {}), Signal(None, {}))
    objective.start(Start(nn.Identity(), None, lambda: iter([rows])), nn.ModuleDict())
    for epoch in (1, 2):
        for part in torch.randperm(40, generator=torch.Generator().manual_seed(epoch)).split(10):
            row = part[:, None].double() * epoch
            kept = {"levels": torch.zeros(10, 4), "channel_masks": row.expand(-1, 25), "spatial_masks": row.expand(-1, 80)}
            objective.after_step(part, kept | {"levels": torch.ones(10, 4)}, Progress((epoch - 1) * 4, 8, 4))
    assert objective.report()["moved_channel"] == pytest.approx(ids[:WATCHED].double().mean().item())


@pytest.mark.parametrize(
    "values",
    [
        {"query": "both"},
        {"norm": "sum"},
        {"dice": "iou"},
        {"mask_grad": "none"},
        {"mask_source": "student"},
        {"masks": 0},
        {"watch": [3]},
        {"watch": [5, 3]},
        {"spatial": False, "channel": False},
        {"student_taps": []},
        {"student_taps": ["a", "b"]},
        {"pool": 0},
    ],
)
def test_settings_that_cannot_be_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="="):
        make("acam_kd", **values)


@pytest.mark.parametrize(("shape", "values"), [((7,), {}), ((5, 3, 9), {"pool": 4})])
def test_taps_that_are_no_maps_are_refused_with_a_remedy(shape: tuple[int, ...], values: dict[str, Any]) -> None:
    with pytest.raises(Refused) as refused:
        prepared(shape, **values)
    assert {p.key for p in refused.value.problems} <= {"objective.student_taps", "objective.teacher_taps"}
    assert all("objective.pool" in p.remedy for p in refused.value.problems)


ACAM = ["objective=acam_kd", "objective.pool=2", "objective.standardise=true", "objective.watch=[1,2]"]


def test_accumulation_does_not_change_the_training_of_a_segmenter(tmp_path: Path) -> None:
    base = [*dense_run(tmp_path / "teacher.safetensors"), *ACAM, *FROZEN]
    run(base, tmp_path / "whole")
    run([*base, "hardware.micro_batch=[5,2,1]"], tmp_path / "cut")
    assert_same_training(tmp_path / "cut", tmp_path / "whole")
    whole, cut = (read_json(tmp_path / name / SUMMARY)["test"] for name in ("whole", "cut"))
    assert whole["moved_spatial"] > 0
    assert cut["moved_spatial"] == pytest.approx(whole["moved_spatial"], rel=1e-4)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """A run over nine steps with everything that can be forgotten, and what it leaves when nobody kills it."""
    root = tmp_path_factory.mktemp("acam")
    overrides = [*dense_run(root / "teacher.safetensors"), *ACAM, "run.checkpoint_every=0.6"]
    run(overrides, root / "run")
    return overrides, root / "run"


@pytest.mark.parametrize("step", [1, 5, 7])
def test_a_killed_run_is_resumed_to_the_same_bytes(
    step: int, unbroken: tuple[list[str], Path], tmp_path: Path, kdrun: Callable[..., Outcome]
) -> None:
    overrides, folder = unbroken
    run_killed(overrides, tmp_path / "run", "step_done", step)
    assert kdrun("resume", str(tmp_path / "run"), "--quiet").code == 0
    assert_same_run(tmp_path / "run", folder)
    assert "moved_channel" in [line for line in read_lines(tmp_path / "run" / METRICS) if "split" in line][-1]


def test_the_exported_student_holds_none_of_what_was_added(unbroken: tuple[list[str], Path]) -> None:
    state, network = load_file(unbroken[1] / STUDENT_FILE), segmenter(5)
    assert state.keys() == network.state_dict().keys()
    network.load_state_dict(state)
    assert read_json(unbroken[1] / SUMMARY)["student"]["parameters"] == sum(p.numel() for p in network.parameters())


def test_masks_that_depend_on_frozen_quantities_alone_do_not_move_at_all(tmp_path: Path) -> None:
    base = [*dense_run(tmp_path / "teacher.safetensors"), *ACAM, "objective.mask_source=teacher"]
    frozen = run([*base, "objective.frozen=true"], tmp_path / "frozen")["test"]
    learned = run(base, tmp_path / "learned")["test"]
    assert (frozen["moved_channel"], frozen["moved_spatial"]) == (0.0, 0.0)
    assert min(learned["moved_channel"], learned["moved_spatial"]) > 0
