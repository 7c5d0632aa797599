from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from kdrun.evaluation.cost import flops, latency, parameters, table


class Restless(nn.Module):
    """Does in a forward whatever a measurement must not leave behind."""

    calls: Tensor
    replaced: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("replaced", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.replaced = self.replaced + 1
        return self.body(x) + torch.rand(6)


def test_a_linear_layer_costs_two_flops_per_weight() -> None:
    assert flops(nn.Linear(30, 7), (30,)) == 2 * 30 * 7


def test_a_convolution_costs_two_flops_per_weight_and_position() -> None:
    assert flops(nn.Conv2d(3, 8, 5, stride=2, padding=2), (3, 32, 32)) == 2 * (3 * 8 * 25) * (16 * 16)
    assert flops(nn.Conv2d(8, 8, 3, padding=1, groups=4), (8, 10, 10)) == 2 * (8 * 2 * 9) * (10 * 10)


@pytest.mark.parametrize("trained", [True, False])
def test_attention_is_counted_although_its_fast_path_is_one_operator(trained: bool) -> None:
    tokens, width, hidden = 10, 64, 128
    layer = nn.TransformerEncoderLayer(width, 4, hidden, batch_first=True).requires_grad_(trained)
    projections, attention, mlp = 4 * tokens * width * width, 2 * tokens * tokens * width, 2 * tokens * width * hidden
    assert flops(layer, (tokens, width)) == 2 * (projections + attention + mlp)
    assert torch.backends.mha.get_fastpath_enabled()


def test_flops_are_those_of_one_sample_in_eval_mode() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.auxiliary = nn.Linear(4, 4), nn.Linear(4, 100)

        def forward(self, x: Tensor) -> Tensor:
            return self.auxiliary(x) if self.training else self.main(x)

    assert flops(Twice().train(), (4,)) == 2 * 4 * 4


def test_a_shared_parameter_counts_once_and_a_frozen_one_counts() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    assert parameters(nn.Sequential(first.requires_grad_(False), second)) == 12


@pytest.mark.parametrize("measure", [lambda m: flops(m, (6,)), lambda m: latency(m, (6,), batch_size=2, repeats=3)])
def test_a_measurement_leaves_modes_buffers_and_random_state_alone(measure) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    module = Restless().train()
    module.body[1].eval()  # a frozen norm inside a model in train mode
    flags = [m.training for m in module.modules()]
    buffers = dict(module.named_buffers())
    before = {name: b.clone() for name, b in buffers.items()}
    random = torch.get_rng_state()
    measure(module)
    assert [m.training for m in module.modules()] == flags
    assert flags.count(False) == 1
    assert torch.equal(torch.get_rng_state(), random)
    after = dict(module.named_buffers())
    assert all(after[name] is buffers[name] and torch.equal(after[name], before[name]) for name in before)
    assert all(p.grad is None for p in module.parameters())
    module(torch.zeros(2, 6)).sum().backward()  # and it still trains


def test_a_measurement_that_fails_restores_as_well() -> None:
    module = Restless().train()
    with pytest.raises(RuntimeError):
        flops(module, (5,))
    assert module.training
    assert module.calls == 0
    assert torch.backends.mha.get_fastpath_enabled()


def test_latency_is_at_least_the_time_that_a_forward_takes() -> None:
    seen = []

    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((tuple(x.shape), self.training, torch.is_inference_mode_enabled()))
            time.sleep(0.005)
            return x

    found = latency(Slow(), (3, 2), batch_size=4, repeats=3)
    assert 5 <= found["min_ms"] <= found["median_ms"] <= found["max_ms"]
    assert found["samples_per_s"] == pytest.approx(4 / found["median_ms"] * 1e3)
    assert set(seen) == {((4, 3, 2), False, True)}
    assert len(seen) > 3  # warm-up passes come before


def test_the_input_has_the_dtype_of_the_module() -> None:
    assert flops(nn.Linear(4, 2).double(), (4,)) == flops(nn.Linear(4, 2).bfloat16(), (4,)) == 16


def test_the_table_has_a_row_for_each_model() -> None:
    student, teacher = nn.Linear(4, 2), nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    assert table(student, teacher, (4,)) == [
        {"model": "student", "parameters": 10, "flops": 16},
        {"model": "teacher", "parameters": 58, "flops": 96},
    ]
    (row,) = table(student, None, (4,), with_latency=True, repeats=2)
    assert list(row) == ["model", "parameters", "flops", "latency_ms"]
