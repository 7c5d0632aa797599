from __future__ import annotations

import pytest
import torch

from kdrun.dataset.base import Data
from kdrun.dataset.csbm import CSBMData
from kdrun.dataset.gaussians import GaussianData
from kdrun.errors import Refused
from kdrun.source.loader import Loader
from kdrun.source.whole import Whole
from kdrun.types import Source


@pytest.fixture(scope="module")
def data() -> Data:
    return CSBMData(nodes=60, edges=90, classes=3, features=5, labelled=4, validation=12).load()


def test_every_step_has_the_whole_graph_and_an_epoch_is_one_step(data: Data) -> None:
    source: Source = Whole().open(data, seed=1)
    assert source.steps_per_epoch == 1
    (batch,) = source.group(0)
    assert batch.inputs.shape == (60, 5)
    assert torch.equal(batch.ids, torch.arange(60))
    assert torch.equal(batch.extra["edge_index"], data.split("train").constants["edge_index"])
    assert int((batch.targets >= 0).sum()) == 12


def test_the_very_same_tensors_come_again(data: Data) -> None:
    source = Whole().open(data, seed=1)
    assert source.group(0)[0].inputs is source.group(7)[0].inputs
    assert torch.equal(Whole().open(data, seed=2).group(3)[0].inputs, source.group(0)[0].inputs)


def test_every_rank_has_the_whole_graph(data: Data) -> None:
    one, other = (Whole().open(data, seed=1, rank=rank, world=2).group(0)[0] for rank in range(2))
    assert torch.equal(one.ids, other.ids)
    assert torch.equal(one.extra["edge_index"], other.extra["edge_index"])


@pytest.mark.parametrize("sizes", [30, [40, 20]])
def test_a_graph_is_not_cut_into_micro_batches(data: Data, sizes: int | list[int]) -> None:
    with pytest.raises(Refused, match=r"hardware\.micro_batch=null"):
        Whole().open(data, seed=1, micro_batch=sizes)


def test_samples_of_their_own_are_no_graph() -> None:
    with pytest.raises(Refused, match=r"source=loader source\.batch_size=30"):
        Whole().open(GaussianData(n_train=30, n_test=6, classes=3, superclasses=3).load(), seed=1)


def test_a_loader_does_not_cut_a_graph(data: Data) -> None:
    with pytest.raises(Refused, match="source=whole"):
        Loader(batch_size=20).open(data, seed=1)


def test_it_has_no_state(data: Data) -> None:
    source = Whole().open(data, seed=1)
    assert source.state_dict() == {}
    source.load_state_dict({})
    with pytest.raises(ValueError, match="no state"):
        source.load_state_dict({"position": 3})
