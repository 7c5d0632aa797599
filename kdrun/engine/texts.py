"""What must fit between texts and what reads them: data, networks and objective either all speak of tokens or none does."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from kdrun.dataset.base import Data
from kdrun.errors import Problem
from kdrun.objective.base import Objective
from kdrun.objective.ce import CE
from kdrun.student.taps import reads_tokens


def text_problems(data: Data, networks: Mapping[str, nn.Module], objective: Objective) -> list[Problem]:
    """All that does not fit. `networks` by what the configuration calls them: student, teacher."""
    name, of_tokens = type(objective).__name__, "token" in objective.units()
    if data.vocabulary is None:
        found = [
            Problem(f"the {who} is a language model, and {data.name} is no text", who, data.name, "texts, e.g. dataset=topics")
            for who, network in networks.items()
            if reads_tokens(network)
        ]
        if of_tokens:
            found.append(
                Problem(
                    f"{name} learns the next token, and {data.name} is no text", "objective", data.name, "objective=kd, or objective=ce"
                )
            )
        return found
    found = []
    for who, network in networks.items():
        if not reads_tokens(network):
            found.append(Problem(f"the {who} is no language model, and {data.name} is text", who, data.name, f"e.g. {who}=causal_lm"))
        elif getattr(network, "ids", data.vocabulary.size) < data.vocabulary.size:
            what = f"the {who} reads {network.ids} ids, {data.name} has {data.vocabulary.size}"
            remedy = f"{who}.config.vocab_size={data.vocabulary.size}, or as many {who}.contexts as the data set has"
            found.append(Problem(what, who, data.name, remedy))
    # Cross-entropy is the same of tokens: the training of a teacher from scratch.
    if not of_tokens and type(objective) is not CE:
        what = f"{name} learns one label of each sample, and {data.name} is text"
        found.append(Problem(what, "objective", data.name, "objective=sft, objective=lm_kd or objective=taid"))
    return found
