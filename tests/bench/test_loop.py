"""The cases are the same training: what differs is only what is said to differ. No time is asserted."""

from __future__ import annotations

import pytest
import torch

from kdrun.bench.loop import by_hand, engine, hand, parts, random_images, usual
from kdrun.dataset.base import Data
from kdrun.engine import loop
from kdrun.engine.choices import choose
from kdrun.engine.distributed import Ranks
from kdrun.engine.report import Reporter
from kdrun.engine.stage import make_stage
from kdrun.errors import Refused

SMALL = [
    "recipe=kd_cifar100", "teacher=mlp", "teacher.hidden=[8]", "student=mlp", "student.hidden=[4]", "source.batch_size=16",
    "hardware=cpu", "hardware.threads=1", "hardware.compile=off", "hardware.channels_last=true",
]  # fmt: skip


def test_random_images_have_the_data_sets_size_and_transform() -> None:
    node = {"input_shape": [3, 8, 8], "classes": 5, "crop": "pad", "padding": 2, "flip": 0.5, "mean": [0.5] * 3, "std": [0.2] * 3}
    data = random_images(node)
    assert data is not None
    assert data.input_shape == (3, 8, 8)
    one, other = (data.rows("train", torch.arange(4), torch.full((4,), view), 0).inputs for view in (0, 1))
    assert one.shape == (4, 3, 8, 8)
    assert not torch.equal(one, other)
    assert random_images({**node, "crop": "resize"}) is None
    assert random_images({"classes": 5}) is None


def test_the_step_by_hand_is_the_engines() -> None:
    tree, built, device = parts([*SMALL, "optim.lr=0.05", "seed=3"])
    stage = make_stage(tree, built, device, Ranks(), "student", Reporter())
    (batch,) = stage.source.group(0)
    before = {name: p.detach().clone() for name, p in built.network.named_parameters()}

    class Nothing:
        def logged(self, step: int, record: object) -> None: ...
        def step_done(self, step: int) -> None: ...
        def stop_requested(self) -> bool:
            return False

    loop.train_step(stage, Nothing())
    ours = {name: p.detach().clone() for name, p in built.network.named_parameters()}
    built.network.load_state_dict(before)
    step = by_hand(tree, built, device, choose(stage, built, tree, Reporter(), None))
    step(batch)
    for name, parameter in built.network.named_parameters():
        assert not torch.equal(ours[name], before[name])
        # The engine's schedule has set the rate of its own optimiser; step 0 has the recipe's.
        torch.testing.assert_close(parameter.detach(), ours[name], rtol=1e-5, atol=1e-7)


def test_every_case_tells_a_rate() -> None:
    told = engine(SMALL, 2, False)
    assert told["rate"] > 0
    assert sum(told["split"].values()) == pytest.approx(100)
    assert told["peak_share"] > 0
    assert engine(SMALL, 2, True)["rate"] > 0
    assert hand(SMALL, 2)["rate"] > 0


def test_by_hand_every_step_has_a_whole_batch_of_small_data_too(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = Data.rows

    def rows(self: Data, split: str, index: torch.Tensor, *rest: object) -> object:
        sizes.append(len(index))
        return original(self, split, index, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Data, "rows", rows)
    small = ["dataset=digits", "dataset.subset=40", "dataset.subset_test=10", "student=mlp", "source.batch_size=16", *SMALL[-2:]]
    assert hand([*small, "objective=ce", "hardware=cpu", "hardware.threads=1"], 4)["rate"] > 0
    assert set(sizes) == {16}


def test_what_has_no_such_case_is_refused() -> None:
    with pytest.raises(Refused, match="an objective on logits"):
        hand([*SMALL, "objective=rkd"], 1)
    with pytest.raises(Refused, match="small images"):
        usual(["recipe=kd_bench"], 1)
