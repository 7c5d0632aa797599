"""What must fit between texts and what reads them: data, networks and objective either all speak of tokens or none does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from kdrun.dataset.base import Data
from kdrun.dataset.tokens import TEACHER, Ragged, TokenSplit
from kdrun.dataset.vocabulary import Tokenized, Vocabulary
from kdrun.errors import Problem
from kdrun.objective.base import Objective
from kdrun.objective.ce import CE
from kdrun.student.language import is_recurrent, position_limit
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
        vocabulary, key = data.vocabulary, "dataset.tokenizer"
        if who == "teacher" and data.translated is not None and data.translated.vocabulary is not None:
            vocabulary, key = data.translated.vocabulary, "dataset.teacher_tokenizer"
        if not reads_tokens(network):
            found.append(Problem(f"the {who} is no language model, and {data.name} is text", who, data.name, f"e.g. {who}=causal_lm"))
        elif getattr(network, "ids", vocabulary.size) < vocabulary.size:
            what = f"the {who} reads {network.ids} ids, {data.name} has {vocabulary.size}"
            remedy = f"{who}.config.vocab_size={vocabulary.size}, or as many {who}.contexts as the data set has"
            found.append(Problem(what, who, data.name, remedy))
        elif (strange := _other_tokens(vocabulary, network)) is not None:
            remedy = f"a {who} of the same tokenizer, or the data set's from it: {key}={network.name_or_path}"
            if who == "teacher" and key == "dataset.tokenizer":
                remedy += f"; or two tokenizers: objective=uld dataset.teacher_tokenizer={network.name_or_path}"
            found.append(Problem(f"the {who} was made with another tokenizer than {data.name}'s ({strange})", who, data.name, remedy))
    # Cross-entropy is the same of tokens: the training of a teacher from scratch.
    if not of_tokens and type(objective) is not CE:
        what = f"{name} learns one label of each sample, and {data.name} is text"
        found.append(Problem(what, "objective", data.name, "objective=sft, objective=lm_kd or objective=taid"))
    return found


def context_problems(data: Data, networks: Mapping[str, nn.Module]) -> list[Problem]:
    """Rows that are longer than a network has positions for: rotary ones would be read beyond what it was made for, without a word."""
    found = []
    for who, network in networks.items():
        limit, longest = position_limit(network), 0
        for split in data.splits.values():
            if not isinstance(split, TokenSplit):
                continue
            theirs = split.beside.get(TEACHER) if who == "teacher" else None
            others = [storage for key, storage in split.beside.items() if key != TEACHER] if who == "student" else []
            read = [storage for storage in (theirs or split.storage, *others) if isinstance(storage, Ragged) and len(storage.positions)]
            longest = max([longest, *(int(storage.positions.max()) for storage in read)])  # the last token of a row is not read
        if limit is not None and longest > limit:
            what = f"the longest row has {longest + 1} tokens, and the {who} has {limit} positions"
            remedy = f"dataset.max_length={limit} dataset.too_long=cut (or drop), or a model with more positions"
            found.append(Problem(what, "dataset.max_length", data.name, remedy))
    return found


def packing_problems(tree: Mapping[str, Any], data: Data, networks: Mapping[str, nn.Module]) -> list[Problem]:
    """Networks that do not keep the texts of a packed row apart."""
    if not tree["dataset"].get("pack"):
        return []
    mixing = [who for who, network in networks.items() if is_recurrent(network)]
    what = "the {} carries its state from one text of a packed row into the next"
    return [Problem(what.format(who), "dataset.pack", data.name, "dataset.pack=false") for who in mixing]


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
