from __future__ import annotations

import pytest
import torch
from torch import nn

from kdrun.errors import Refused
from kdrun.losses.score import linear_schedule
from kdrun.objective.denoise import Denoise
from kdrun.student.denoiser import MLPDenoiser
from kdrun.types import Batch, Context, ModelSpec, Output, Progress, Signal, Start
from tests.objective.toy import pick_batch

ROWS, CLASSES = 4000, 4
STEP = Progress(step=3, total_steps=10, steps_per_epoch=10)


def made(**values: float) -> Denoise:
    objective = Denoise(**values)
    objective.setup(Context(ModelSpec(2, (2,)), None, CLASSES, torch.zeros(ROWS), 7, 10, 10))
    network = MLPDenoiser(CLASSES, 2, null_label=True)
    objective.start(Start(network, None, lambda: iter(())), nn.ModuleDict())
    return objective


def batch(rows: int = ROWS) -> Batch:
    ids = torch.arange(rows)
    x = torch.randn(rows, 2, generator=torch.Generator().manual_seed(0))
    return Batch(x, ids % CLASSES, ids, torch.zeros_like(ids), {})


def test_rows_are_noised_by_the_forward_process() -> None:
    plain, prepared = batch(), made().prepare(batch(), STEP)
    t, noise = prepared.extra["t"], prepared.extra["noise"]
    torch.testing.assert_close(prepared.inputs, linear_schedule().diffuse(plain.inputs, t, noise))
    assert (int(t.min()), int(t.max())) == (0, 999)
    assert abs(float(t.double().mean()) - 499.5) < 4 * 288.7 / ROWS**0.5
    assert abs(float(noise.mean())) < 4 / (2 * ROWS) ** 0.5
    assert abs(float(noise.std()) - 1) < 4 / (4 * ROWS) ** 0.5
    assert torch.equal(prepared.extra["labels"], plain.targets)


def test_draws_do_not_depend_on_the_split_and_are_new_in_every_step() -> None:
    objective = made(label_dropout=0.5)
    whole = objective.prepare(batch(), STEP)
    parts = [objective.prepare(pick_batch(batch(), rows), STEP) for rows in (slice(0, 7), slice(7, ROWS))]
    other = objective.prepare(batch(), Progress(4, 10, 10))
    for name in ("t", "noise", "labels"):
        assert torch.equal(torch.cat([p.extra[name] for p in parts]), whole.extra[name])
        assert not torch.equal(other.extra[name], whole.extra[name])
    assert torch.equal(torch.cat([p.inputs for p in parts]), whole.inputs)


def test_so_many_labels_are_hidden() -> None:
    labels = made(label_dropout=0.1).prepare(batch(), STEP).extra["labels"]
    hidden = labels == CLASSES
    assert abs(float(hidden.float().mean()) - 0.1) < 4 * (0.09 / ROWS) ** 0.5
    assert torch.equal(labels[~hidden], batch().targets[~hidden])


def test_the_loss_is_the_squared_error_of_the_noise_summed_over_a_sample() -> None:
    objective = made()
    prepared = objective.prepare(batch(5), STEP)
    guess = torch.full_like(prepared.inputs, 0.5)
    term = objective.terms(Output(guess, {}, {}), Signal(None, {}), prepared, "student", nn.ModuleDict())["denoise"]
    assert term.unit == "sample"
    torch.testing.assert_close(term.sum, ((guess - prepared.extra["noise"]) ** 2).sum())
    assert objective.weights(STEP) == {"denoise": 1.0}


def test_hidden_labels_need_a_label_for_none() -> None:
    with pytest.raises(Refused, match=r"student\.null_label=true"):
        made(label_dropout=0.1).start(Start(MLPDenoiser(CLASSES, 2), None, lambda: iter(())), nn.ModuleDict())
    made(label_dropout=0.1).start(Start(MLPDenoiser(CLASSES, 2, null_label=True), None, lambda: iter(())), nn.ModuleDict())
    made().start(Start(MLPDenoiser(CLASSES, 2), None, lambda: iter(())), nn.ModuleDict())


@pytest.mark.parametrize("value", [1.0, 2.0])
def test_not_every_label_can_be_hidden(value: float) -> None:
    with pytest.raises(ValueError, match=r"label_dropout=.*\[0, 1\)"):
        Denoise(label_dropout=value)
