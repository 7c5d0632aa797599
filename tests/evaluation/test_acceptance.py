"""What a language model writes, under an oracle: samples, the greedy text, and how many differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from kdrun.dataset.base import Data
from kdrun.dataset.events import EventData
from kdrun.errors import RunFailed
from kdrun.evaluation.acceptance import Acceptance
from kdrun.evaluation.generation import Generation
from kdrun.evaluation.metrics import KINDS
from kdrun.types import Batch

DATA = EventData(verbs=4, objects=4, relations=2, tails=10, groups=2, web_events=8, human_events=2, per_cell=2, seed=1)
HOW = Acceptance(max_new_tokens=1, samples=20)


class Knows(nn.Module):
    """Gives the valid tails of a prompt `right` of its mass, evenly, and one wrong tail the rest."""

    vocabulary = 20

    def __init__(self, data: Data, right: float) -> None:
        super().__init__()
        self.data, self.right = data, right

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.full((*x.shape, 20), -torch.inf)
        assert self.data.oracle is not None
        for i, row in enumerate(x.tolist()):
            valid = [t for t in range(10, 20) if self.data.oracle(row[:3], [t])]
            wrong = next(t for t in range(10, 20) if t not in valid)
            logits[i, :, valid] = torch.tensor(self.right / len(valid)).log()
            logits[i, :, wrong] = torch.tensor(1 - self.right).log()
        return logits


@pytest.fixture(scope="module")
def data() -> Data:
    return DATA.load()


def rows(data: Data, at_once: int = 100) -> Iterator[tuple[Batch, None]]:
    return ((batch, None) for batch in data.batches("test", at_once))


def measured(data: Data, right: float, how: Acceptance = HOW, at_once: int = 100) -> dict[str, float]:
    return how.measure(Knows(data, right), rows(data, at_once), data, torch.device("cpu"))


def test_the_share_of_right_samples_is_the_model_s_own(data: Data) -> None:
    found = measured(data, 0.7, Acceptance(max_new_tokens=1, samples=200, top_p=1.0))
    assert found["accept"] == pytest.approx(70, abs=100 * 4 * (0.7 * 0.3 / 3200) ** 0.5)
    assert found["greedy_accept"] == 0  # the wrong tail is likelier than any one valid tail
    assert found["unique_tails"] == pytest.approx(4, abs=1e-9)


def test_what_is_beyond_top_p_is_not_written(data: Data) -> None:
    found = measured(data, 0.93)  # three times .31 reaches .9, the wrong tail is beyond
    assert found == {"accept": 100, "greedy_accept": 100, "unique_tails": pytest.approx(3, abs=0.1)}


def test_batches_change_nothing(data: Data) -> None:
    assert measured(data, 0.6) == measured(data, 0.6, at_once=3)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")  # of torchmetrics, where there was no prompt
def test_a_few_prompts_are_the_first(data: Data) -> None:
    few = measured(data, 0.6, Acceptance(max_new_tokens=1, samples=20, prompts=5))
    first = HOW.measure(Knows(data, 0.6), [next(rows(data, 5))], data, torch.device("cpu"))
    assert few == first
    with pytest.raises(RunFailed, match="no prompt"):
        HOW.measure(Knows(data, 0.6), [], data, torch.device("cpu"))


def test_the_oracle_is_the_reward_of_other_evaluations_too(data: Data) -> None:
    how = Generation(max_new_tokens=1, samples=20, top_p=0.9)
    assert data.judges
    assert how.problems(data) == []
    found = how.measure(Knows(data, 0.6), rows(data), data, torch.device("cpu"))
    assert found["reward"] == pytest.approx(measured(data, 0.6)["accept"])


def test_an_oracle_reads_the_prompt_and_a_reward_the_reference(data: Data) -> None:
    prompts, references, texts = [torch.tensor([1, 2]), torch.tensor([3])], [[5], [6]], [[5], [7]]
    by_prompt = replace(data, oracle=lambda prompt, text: float(sum(prompt) == text[0] - 2))
    by_reference = replace(data, oracle=None, reward=lambda reference, text: float(reference == text))
    assert by_prompt.rewards(prompts, references, texts) == [1, 0]
    assert by_reference.rewards(prompts, references, texts) == [1, 0]
    assert by_prompt.rewards(prompts, [[], []], texts) == [1, 0]
    assert replace(by_reference, oracle=by_prompt.oracle).rewards(prompts, [[0], [0]], texts) == [1, 0]
    assert not replace(data, oracle=None).judges


def test_every_metric_has_a_direction() -> None:
    assert set(HOW.names()) <= KINDS.keys()
    assert HOW.primary == "accept"
