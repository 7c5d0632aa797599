"""A teacher that is wrong on a known share of the training samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kdrun.dataset.base import Data
from kdrun.dataset.gaussians import GaussianData
from kdrun.errors import Refused
from kdrun.student.taps import Tapped
from kdrun.teacher.corrupted import CorruptedLive, CorruptedTruth, Corruption
from kdrun.teacher.live import LiveTeacher
from kdrun.teacher.truth import TruthTeacher
from kdrun.types import Batch, ModelSpec, Needs
from tests.engine.running import run, staged

NEEDS = Needs(teacher_logits=True)
SPEC = ModelSpec(4, (32,))


@pytest.fixture(scope="module")
def data() -> Data:
    return GaussianData(classes=4, superclasses=2, n_train=400, n_test=50, validation=0.1).load()


def rows(data: Data, split: str = "train", index: Tensor | None = None) -> Batch:
    index = torch.arange(len(data.split(split))) if index is None else index
    return data.rows(split, index, torch.zeros_like(index), 0, augment=False)


def truth(data: Data, share: float, seed: int = 0) -> CorruptedTruth:
    return CorruptedTruth(Corruption(data, share, seed), 4, (32,))


def test_the_stated_share_of_samples_says_what_another_sample_would_hear(data: Data) -> None:
    batch = rows(data)
    said = truth(data, 0.25).signal(batch, NEEDS)
    assert said.logits is not None
    hit, own = said.taps["corrupted"], batch.extra["truth_logits"]
    assert 0.18 < hit.double().mean().item() < 0.32  # 400 draws: 0.25 and about three standard errors
    assert torch.equal(said.logits[~hit], own[~hit])
    for i in torch.nonzero(hit).flatten().tolist():
        same = (own == said.logits[i]).all(1).nonzero().flatten().tolist()
        assert same
        assert i not in same


def test_which_and_whose_is_a_matter_of_the_id_alone(data: Data) -> None:
    teacher = truth(data, 0.5)
    whole = teacher.signal(rows(data), NEEDS)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))[:37]
    part = teacher.signal(rows(data, index=order)._replace(view=torch.full((37,), 9)), NEEDS)
    assert whole.logits is not None
    assert part.logits is not None
    assert torch.equal(part.logits, whole.logits[order])
    assert torch.equal(part.taps["corrupted"], whole.taps["corrupted"][order])
    again = truth(data, 0.5).signal(rows(data), NEEDS)
    assert torch.equal(again.taps["corrupted"], whole.taps["corrupted"])
    assert not torch.equal(truth(data, 0.5, seed=1).signal(rows(data), NEEDS).taps["corrupted"], whole.taps["corrupted"])


@pytest.mark.parametrize("split", ["validation", "test"])
def test_other_splits_hear_the_truth(split: str, data: Data) -> None:
    batch = rows(data, split)
    said = truth(data, 1.0).signal(batch, NEEDS)
    assert said.logits is not None
    assert torch.equal(said.logits, batch.extra["truth_logits"])
    assert not said.taps["corrupted"].any()


def test_share_one_hits_everybody_and_share_zero_nobody(data: Data) -> None:
    assert truth(data, 1.0).signal(rows(data), NEEDS).taps["corrupted"].all()
    assert not truth(data, 0.0).signal(rows(data), NEEDS).taps["corrupted"].any()


def test_a_live_teacher_is_asked_about_the_other_sample_and_stays_as_it_is(data: Data) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(32, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    plain = LiveTeacher(Tapped(network, {"f": "0"}, ("f",)), SPEC)
    wrong = CorruptedLive(Corruption(data, 0.5), Tapped(network, {"f": "0"}, ("f",)), SPEC)
    assert isinstance(wrong, LiveTeacher)
    batch, needs = rows(data), Needs(teacher_logits=True, teacher_taps=("f",))
    # What the step itself adds to the batch is left where it is.
    batch = batch._replace(extra={**batch.extra, "held_out_inputs": torch.zeros(3, 32)})
    right, said = plain.signal(batch, needs), wrong.signal(batch, needs)
    assert right.logits is not None
    assert said.logits is not None
    hit = said.taps["corrupted"]
    torch.testing.assert_close(said.logits[~hit], right.logits[~hit])
    torch.testing.assert_close(said.taps["f"][~hit], right.taps["f"][~hit])
    gaps = torch.cdist(said.logits[hit].double(), right.logits.double()).min(1).values
    assert gaps.max().item() < 1e-4  # each is what the teacher says of some sample
    assert bool((said.logits[hit] != right.logits[hit]).any(1).all())


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_that_is_none_is_refused(share: float, data: Data) -> None:
    with pytest.raises(Refused, match=r"teacher\.corrupt"):
        Corruption(data, share)


def test_one_sample_alone_has_no_other() -> None:
    with pytest.raises(Refused, match=r"1 training samples"):
        Corruption(GaussianData(classes=2, superclasses=1, n_train=1, n_test=2).load(), 0.5)


@pytest.mark.parametrize(("teacher", "cls"), [("truth", TruthTeacher), ("mlp", LiveTeacher)])
def test_the_configuration_puts_it_around_the_teacher(teacher: str, cls: type, tiny: list[str], tmp_path: Path) -> None:
    base = [o for o in tiny if not o.startswith("teacher")]
    found = staged([*base, f"teacher={teacher}", "+teacher.corrupt=0.25", "objective=kd"], tmp_path).stage.teacher
    assert isinstance(found, cls)
    assert type(found) is not cls


def test_a_trained_teacher_is_corrupted_only_while_it_speaks(tiny: list[str], tmp_path: Path) -> None:
    """The same trained teacher as without corruption, and the same score on test."""
    base = [*(o for o in tiny if not o.startswith("teacher")), "teacher=mlp", "teacher.hidden=[8]", "objective=kd"]
    summaries = [run([*base, *more], tmp_path / name) for name, more in (("plain", []), ("wrong", ["+teacher.corrupt=0.5"]))]
    assert summaries[0]["teacher"]["sha256"] == summaries[1]["teacher"]["sha256"]
    assert summaries[0]["teacher"]["top1"] == summaries[1]["teacher"]["top1"]
    losses = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["terms"]["kd"] for name in ("plain", "wrong")]
    assert losses[0] != losses[1]


def test_the_report_tells_the_groups_apart(tiny: list[str], tmp_path: Path) -> None:
    base = [*tiny, "+teacher.corrupt=0.3", "dataset.noise=0.3", "objective=weighted_kd", "objective.rule=oracle"]
    found = run(base, tmp_path / "run")["test"]
    assert (found["alpha_corrupted"], found["alpha_noisy"], found["alpha_clean"], found["alpha_gap"]) == (0.0, 1.0, 0.5, 1.0)
