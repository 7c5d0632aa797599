"""The world of regions: shares, who is labelled, and how often the simulated teacher is right."""

from __future__ import annotations

import pytest
import torch

from kdrun.dataset.regions import AMBIGUOUS, EASY, INFORMATIVE, RIGHT, RegionData

DATA = RegionData(n_pool=20_000).load()
POOL = ~DATA.split("train").extra["labelled"]


def test_regions_have_their_shares() -> None:
    region = DATA.split("train").extra["region"][POOL]
    shares = [float((region == kind).float().mean()) for kind in (EASY, INFORMATIVE, AMBIGUOUS)]
    assert shares == pytest.approx([0.6, 0.2, 0.2], abs=0.01)


def test_labelled_rows_are_easy() -> None:
    train = DATA.split("train")
    assert int((~POOL).sum()) == 80
    assert (train.extra["region"][~POOL] == EASY).all()


def test_the_teacher_is_right_as_often_as_its_region_says() -> None:
    train = DATA.split("train")
    hits = train.extra["teacher_logits"].argmax(1) == train.targets
    for kind, share in enumerate(RIGHT):
        inside = POOL & (train.extra["region"] == kind)
        assert float(hits[inside].float().mean()) == pytest.approx(share, abs=0.015)
    assert float(hits[POOL].float().mean()) == pytest.approx(0.824, abs=0.01)


def test_the_teacher_s_answer_is_a_distribution_with_nine_tenths_on_one_class() -> None:
    p = DATA.split("test").extra["teacher_logits"].exp()
    torch.testing.assert_close(p.sum(1), torch.ones(len(p)))
    assert p.max(1).values.tolist() == pytest.approx([0.9] * len(p))


def test_points_lie_around_what_their_region_says() -> None:
    """Unit noise: the squared distance to the nearest centre is about D for easy points and larger for the others."""
    train = DATA.split("train")
    rows = DATA.rows("train", torch.arange(4000), torch.zeros(4000, dtype=torch.int64), 0, augment=False)
    easy = train.extra["region"][:4000] == EASY
    centres = torch.stack([rows.inputs[easy & (rows.targets == c)].mean(0) for c in range(8)])
    away = (rows.inputs - centres[rows.targets]).square().sum(1)
    assert float(away[easy].mean()) == pytest.approx(16, rel=0.05)
    assert float(away[~easy].mean()) > 32


def test_the_same_seed_is_the_same_world_and_another_is_not() -> None:
    one, same, other = (RegionData(n_pool=50, n_test=20, seed=s).load().fingerprint for s in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize("wrong", [{"ambiguous": 0.9}, {"classes": 1}, {"n_labelled": 0}, {"informative": -0.1}])
def test_impossible_worlds_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)) if "informative" not in wrong else "ambiguous"):
        RegionData(**wrong)  # type: ignore[arg-type]
