"""What must fit between texts and what reads them: data, networks and objective either all speak of tokens or none does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from kdrun.dataset.base import Data
from kdrun.dataset.vocabulary import Tokenized, Vocabulary
from kdrun.errors import Problem
from kdrun.objective.base import Objective
from kdrun.objective.ce import CE
from kdrun.student.taps import reads_tokens

SAME_FAMILY = 0.01  # share of ids at which tokenizers may differ and be taken for one


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
        elif (strange := _other_tokens(data.vocabulary, network)) is not None:
            remedy = f"a {who} of the same tokenizer, or the data set's from it: dataset.tokenizer={network.name_or_path}"
            found.append(Problem(f"the {who} was made with another tokenizer than {data.name}'s ({strange})", who, data.name, remedy))
    # Cross-entropy is the same of tokens: the training of a teacher from scratch.
    if not of_tokens and type(objective) is not CE:
        what = f"{name} learns one label of each sample, and {data.name} is text"
        found.append(Problem(what, "objective", data.name, "objective=sft, objective=lm_kd or objective=taid"))
    return found


def _other_tokens(vocabulary: Vocabulary, network: Any) -> str | None:
    """An example of an id that means another token to the network, by the tokenizer beside its weights; None where it is the same one.

    Models of one family name a few special tokens differently, so some differences are let pass.
    """
    name = getattr(network, "name_or_path", None)
    if not name or not isinstance(vocabulary, Tokenized):
        return None
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(name).convert_ids_to_tokens
    except (OSError, ValueError):
        return None  # weights alone, or code of their own
    every = list(range(vocabulary.size))
    pairs = list(zip(vocabulary.tokenizer.convert_ids_to_tokens(every), theirs(every), strict=True))
    other = [i for i, (a, b) in enumerate(pairs) if b is not None and a != b]
    if len(other) <= SAME_FAMILY * len(every):
        return None
    ours, its = pairs[other[0]]
    return f"id {other[0]} is {ours!r} here and {its!r} there"


def writing_problems(tree: Mapping[str, Any], data: Data, objective: Objective) -> list[Problem]:
    """What texts that the student writes itself, a teacher with a prompt of its own and rewards ask of the data and of each other."""
    share, found = tree["source"].get("share"), []  # None: no texts are written
    if tree["teacher"].get("prompt") == "privileged" and objective.needs().teacher_logits:
        if getattr(data.split("train"), "privileged", None) is None:
            what, remedy = (
                f"{data.name} has no prompts for a privileged teacher",
                "teacher.prompt=own, or data that have them: dataset=sums",
            )
            found.append(Problem(what, "teacher.prompt", data.name, remedy))
        elif share != 1:
            what = "a teacher with a prompt of its own speaks of texts that are written anew, and not all of them are"
            found.append(Problem(what, "teacher.prompt", "", "source=rollout source.share=1, or teacher.prompt=own"))
    if getattr(objective, "rewarded", False) and data.reward is None:
        what = f"{data.name} does not say what a right completion is"
        found.append(Problem(what, "objective", data.name, "a data set with a reward, e.g. dataset=sums, or objective=opsd"))
    if share is not None and tree["dataset"].get("pack"):
        found.append(Problem("a row of several texts has several prompts", "dataset.pack", data.name, "dataset.pack=false"))
    if share is not None and tree["hardware"].get("wrap") == "fsdp2":
        what = "ranks that write texts of different lengths would wait for each other for ever in a student that is sharded over them"
        found.append(Problem(what, "hardware.wrap", "", "hardware.wrap=ddp, with adapters if memory is short: student.lora"))
    return found
