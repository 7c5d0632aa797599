"""Rows of several texts, and networks that do not keep them apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kdrun.engine.texts import packing_problems
from kdrun.student.language import causal_lm
from tests.dataset.texts import LLAMA, V, alone, data_of, samples

pytest.importorskip("transformers")
MAMBA = {"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 1, "state_size": 4, "vocab_size": V}
RWKV = {"model_type": "rwkv", "hidden_size": 8, "attention_hidden_size": 8, "num_hidden_layers": 2, "vocab_size": V}


@pytest.mark.parametrize(("config", "refused"), [(MAMBA, True), (RWKV, True), (LLAMA, False)])
def test_a_packed_row_is_refused_where_a_state_runs_on_into_the_next_text(config: dict[str, Any], refused: bool) -> None:
    data, network = data_of(alone(samples([5, 9]))), causal_lm(V, config=config)
    told = packing_problems({"dataset": {"pack": True}}, data, {"student": network})
    assert [(problem.key, problem.remedy) for problem in told] == [("dataset.pack", "dataset.pack=false")] * refused
    assert packing_problems({"dataset": {"pack": False}}, data, {"student": network}) == []
    assert packing_problems({"dataset": {}}, data, {"student": network}) == []


def test_what_is_refused_would_be_wrong() -> None:
    """What such a model says of a text changes with the text before it in the row, whatever the positions tell it."""
    torch.manual_seed(0)
    network = causal_lm(V, config=MAMBA).eval()
    first, other, text = (torch.tensor(ids) for ids in ([1, 2, 3], [7, 8, 9], [4, 5, 6]))
    with torch.no_grad():
        said = [network(torch.cat([before, text])[None]).logits[0, 3:] for before in (first, other)]
    assert not torch.allclose(said[0], said[1], atol=1e-6)
