"""What must hold for every objective of conf/objective, by globbing."""

from __future__ import annotations

import re
import sys
from inspect import signature
from typing import Any

import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch import Tensor

from kdrun.types import Output
from tests.objective.toy import ALL, CLASSES, CONF, NAMES, PROGRESS, STEP, add_up, build, context, field_names, gradients, make

COUPLED = [name for name in NAMES if make(name).coupling == "batch"]
UNCOUPLED = [name for name in NAMES if name not in COUPLED]
TEMPERATURES = [
    (name, temperature) for name in NAMES for temperature in ((0.05, 1.0, 20.0) if "temperature" in field_names(make(name)) else (None,))
]

EXTREMES = ("huge", "both mask a class", "the teacher masks a class", "the teacher masks all but the label", "constant")

# The fields to set to 0 for plain cross-entropy (and to 1 for its weight).
PLAIN_CE: dict[str, dict[str, Any]] = {
    "kd": {"ce_weight": 1.0, "kd_weight": 0.0},
    "dkd": {"alpha": 0.0, "beta": 0.0},
    "dist": {"beta": 0.0, "gamma": 0.0},
    "fitnet": {"beta": 0.0},
    "rkd": {"distance_weight": 0.0, "angle_weight": 0.0},
    "crd": {"beta": 0.0},
    "pld": {"weighting": "ce"},
    "pixel_kd": {"kd_weight": 0.0},
    "map_mse": {"beta": 0.0},
    "acam_kd": {"alpha": 0.0, "diversity": 0.0},
    "ff_g2m": {"weight": 1.0},
    "glnn": {"weight": 1.0},
    "ps_kd": {"alpha_T": 0.0},
    "label_smoothing": {"epsilon": 0.0},
    "weighted_kd": {"alpha_constant": 0.0},
}

# Objectives with a weight that depends on the student and is a constant of the loss: its own slope is not the loss's (see their tests).
STOPPED = {"tgeo_kd"}


@pytest.mark.parametrize("name", ALL)
def test_yaml_states_every_field_with_its_default_and_origin(name: str) -> None:
    text = (CONF / f"{name}.yaml").read_text()
    node = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    assert isinstance(node, dict)
    cls: Any = get_class(node.pop("_target_"))
    assert cls.__module__ == f"kdrun.objective.{name}"
    assert set(node) == field_names(cls) == set(signature(cls).parameters)
    assert node == vars(cls())
    head, *lines = text.splitlines()
    assert head.startswith("#")
    assert "L = " in head, "the first line gives the equation"
    for line in lines[1:]:
        assert re.search(r"#\s*\S", line), f"no origin: {line}"


@pytest.mark.parametrize("name", ALL)
def test_module_begins_with_equation_unit_and_constants(name: str) -> None:
    doc = sys.modules[type(make(name)).__module__].__doc__ or ""
    assert "L = " in doc
    assert re.search(r"Units?: ", doc)
    assert "onstants" in doc
    assert name == "ce" or "arXiv " in doc


@pytest.mark.parametrize("name", NAMES)
def test_terms_have_weights_and_declared_units(name: str) -> None:
    toy = build(name)
    terms = toy.terms()
    assert set(terms) <= set(toy.objective.weights(PROGRESS))
    assert {term.unit for term in terms.values()} <= set(toy.objective.units())
    assert all(term.sum.dim() == 0 for term in terms.values())


@pytest.mark.parametrize("name", NAMES)
def test_terms_read_only_what_is_declared(name: str) -> None:
    toy = build(name)
    needs = toy.objective.needs()
    logits = toy.signal.logits if needs.teacher_logits else None
    signal = toy.signal._replace(logits=logits, taps={k: toy.signal.taps[k] for k in needs.teacher_taps})
    output = Output(toy.logits, {k: toy.taps[k] for k in needs.student_taps}, {})
    batch = toy.objective.prepare(toy.batch, PROGRESS)
    declared = toy.objective.terms(output, signal, batch, "student", toy.connectors)
    assert {k: t.sum.item() for k, t in declared.items()} == {k: t.sum.item() for k, t in toy.terms().items()}


@pytest.mark.parametrize("name", UNCOUPLED)
@pytest.mark.parametrize("splits", [(8,), (5, 2, 1), (1, 1, 6), (4, 4)])
def test_accumulation_does_not_change_loss_or_gradients(name: str, splits: tuple[int, ...]) -> None:
    toy = build(name, torch.float64)
    leaves = [*toy.leaves(), *toy.connectors.parameters()]
    whole = add_up(toy.objective, toy.terms(), STEP)
    starts = [sum(splits[:i]) for i in range(len(splits))]
    parts = torch.stack([add_up(toy.objective, toy.terms(slice(a, a + n)), STEP) for a, n in zip(starts, splits, strict=True)]).sum()
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    for one, other in zip(gradients(parts, leaves), gradients(whole, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert any(g.norm() > 0 for g in gradients(whole, leaves))


def test_which_objectives_couple_the_batch() -> None:
    assert {"dist", "rkd", "crd"} <= set(COUPLED)
    assert {"ce", "kd", "dkd", "fitnet", "pld"} <= set(UNCOUPLED)


@pytest.mark.parametrize("name", sorted({"dist", "rkd", "crd"} & set(COUPLED)))
def test_a_coupled_objective_would_change_under_a_split(name: str) -> None:
    toy = build(name, torch.float64)
    whole = add_up(toy.objective, toy.terms(), STEP)
    parts = add_up(toy.objective, toy.terms(slice(0, 5)), STEP) + add_up(toy.objective, toy.terms(slice(5, STEP)), STEP)
    assert (parts - whole).abs().item() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_order_of_samples_does_not_matter(name: str) -> None:
    toy = build(name, torch.float64)
    expected = add_up(toy.objective, toy.terms(), STEP)
    assert toy.signal.logits is not None
    toy.logits, toy.taps = toy.logits.flip(0), {k: v.flip(0) for k, v in toy.taps.items()}
    toy.signal = toy.signal._replace(logits=toy.signal.logits.flip(0), taps={k: v.flip(0) for k, v in toy.signal.taps.items()})
    extra = {name: STEP - 1 - value if name == "edge_index" else value.flip(0) for name, value in toy.batch.extra.items()}
    toy.batch = toy.batch._replace(targets=toy.batch.targets.flip(0), ids=toy.batch.ids.flip(0), extra=extra)
    torch.testing.assert_close(add_up(toy.objective, toy.terms(), STEP), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted({*NAMES} - STOPPED))
def test_gradients_match_finite_differences(name: str) -> None:
    toy = build(name, torch.float64)
    toy.step()  # constants that are fixed from the first batch on would look like part of the derivative

    def loss(logits: Tensor, *taps: Tensor) -> Tensor:
        toy.logits, toy.taps = logits, dict(zip(toy.taps, taps, strict=True))
        return add_up(toy.objective, toy.terms(), STEP)

    assert torch.autograd.gradcheck(loss, [x.detach().clone().requires_grad_() for x in toy.leaves()])


@pytest.mark.parametrize("name", NAMES)
def test_teacher_gets_no_gradient(name: str) -> None:
    toy = build(name)
    assert toy.signal.logits is not None
    teacher = [toy.signal.logits.requires_grad_(), *(v.requires_grad_() for v in toy.signal.taps.values())]
    add_up(toy.objective, toy.terms(), STEP).backward()
    assert [t.grad for t in teacher] == [None] * len(teacher)
    assert toy.logits.grad is not None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_terms_are_float32_under_autocast(name: str, dtype: torch.dtype) -> None:
    half, full = build(name, dtype), build(name)
    for mine, other in zip(full.tensors(), half.tensors(), strict=True):
        mine.data = other.data.float()  # the same numbers, so that only the arithmetic differs
    with torch.autocast("cpu", dtype):
        terms = half.terms()
    assert {t.sum.dtype for t in terms.values()} == {torch.float32}
    # Only what runs in the connectors may be rounded: a loss that was computed in half precision would be off everywhere.
    tolerance = 2e-2 if any(True for _ in half.connectors.parameters()) else 1e-6
    for key, term in full.terms().items():
        torch.testing.assert_close(terms[key].sum, term.sum, rtol=tolerance, atol=tolerance)
    assert all(g.isfinite().all() for g in gradients(add_up(half.objective, terms, STEP), half.leaves()))


@pytest.mark.parametrize("name", NAMES)
def test_float64_stays_float64(name: str) -> None:
    assert {t.sum.dtype for t in build(name, torch.float64).terms().values()} == {torch.float64}


@pytest.mark.parametrize(("name", "temperature"), TEMPERATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", EXTREMES)
def test_loss_and_gradient_are_finite_at_extremes(name: str, temperature: float | None, dtype: torch.dtype, case: str) -> None:
    values: dict[str, Any] = {} if temperature is None else {"temperature": temperature}
    toy = build(name, dtype, scale=100.0, **values)
    teacher = toy.signal.logits
    assert teacher is not None
    if case == "huge":
        toy.logits.data, teacher.data = 1e4 * toy.logits.data.sign(), 1e4 * teacher.data.sign()
    elif case == "both mask a class":
        toy.logits.data[:, CLASSES - 1] = teacher.data[:, CLASSES - 1] = -torch.inf  # a class that no sample has
    elif case == "the teacher masks a class":
        teacher.data[:, CLASSES - 1] = -torch.inf
    elif case == "the teacher masks all but the label":
        teacher.data[torch.arange(CLASSES)[None, :] != toy.batch.targets[:, None]] = -torch.inf
    else:
        for x in toy.tensors():
            x.data.zero_()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        terms = toy.terms()
    assert {key: bool(t.sum.isfinite()) for key, t in terms.items()} == dict.fromkeys(terms, True)
    leaves = [*toy.leaves(), *toy.connectors.parameters()]
    for key, term in terms.items():
        if term.sum.requires_grad:
            assert all(g.isfinite().all() for g in gradients(term.sum, leaves)), key


@pytest.mark.parametrize("name", sorted(set(PLAIN_CE) & set(NAMES)))
def test_beta_zero_gives_plain_cross_entropy(name: str) -> None:
    toy, plain = build(name, **PLAIN_CE[name]), build("ce")
    loss, expected = add_up(toy.objective, toy.terms(), STEP), add_up(plain.objective, plain.terms(), STEP)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients(loss, toy.leaves()), gradients(expected, plain.leaves()), rtol=1e-5, atol=1e-7)
    if name != "pld":
        assert toy.objective.needs() == plain.objective.needs(), "a term without weight costs nothing: no teacher runs"
        assert set(toy.terms()) == {"ce"}
        assert len(toy.connectors) == 0


def test_every_objective_has_its_plain_case() -> None:
    assert {"ce", *PLAIN_CE} >= {"ce", "kd", "dkd", "dist", "fitnet", "rkd", "crd", "pld"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_terms_compile_without_graph_breaks(name: str) -> None:
    torch.compiler.reset()
    toy = build(name)
    batch = toy.objective.prepare(toy.batch, PROGRESS)

    def terms(logits: Tensor, taps: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        output = Output(logits, taps, {})
        found = toy.objective.terms(output, toy.signal, batch, "student", toy.connectors)
        return {key: term.sum for key, term in found.items()}, output.keep

    compiled = torch.compile(terms, backend="aot_eager", fullgraph=True)
    for _ in range(2):  # before and after the state has moved
        got, kept = compiled(toy.logits, toy.taps)
        expected, _ = terms(toy.logits, toy.taps)
        torch.testing.assert_close(got, expected)
        leaves = toy.leaves()
        mine, plain = (gradients(torch.stack([*values.values()]).sum(), leaves) for values in (got, expected))
        torch.testing.assert_close(mine, plain)
        toy.objective.after_step(toy.batch.ids, kept, PROGRESS)


@pytest.mark.parametrize("name", NAMES)
def test_state_round_trip_gives_the_same_next_step(name: str) -> None:
    unbroken, resumed = build(name), build(name)
    unbroken.step()
    resumed.objective = make(name)
    resumed.objective.setup(context())
    resumed.objective.load_state_dict({k: v.clone() for k, v in unbroken.objective.state_dict().items()})
    for _ in range(2):
        first, second = unbroken.step(), resumed.step()
        assert torch.equal(first, second)
    one, other = unbroken.objective.state_dict(), resumed.objective.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("name", NAMES)
def test_state_moves_only_in_after_step(name: str) -> None:
    toy = build(name)
    before = {k: v.clone() for k, v in toy.objective.state_dict().items()}
    for _ in range(2):
        toy.terms()
    after = toy.objective.state_dict()
    assert all(torch.equal(before[k].nan_to_num(-1), after[k].nan_to_num(-1)) for k in before)


@pytest.mark.parametrize("name", ALL)
def test_illegal_values_are_refused_with_field_and_range(name: str) -> None:
    objective = make(name)
    numbers = [key for key in field_names(objective) if type(getattr(objective, key)) in (int, float)]
    for key in numbers:
        for value in (-1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=rf"{key}=.*legal range") as raised:
                make(name, **{key: value})
            assert any(end in str(raised.value) for end in ("inf)", "1)", "1]"))


def test_unknown_weighting_names_the_legal_ones() -> None:
    with pytest.raises(ValueError, match="legal values pld, ce, listmle, plistmle"):
        make("pld", weighting="listnet")
