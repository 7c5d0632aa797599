"""A data set's outside from its stated sizes: what is planned without the data, which may not be here."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdrun.config.targets import ALLOWED, component
from kdrun.dataset.base import Data, Request, Split, Storage
from kdrun.dataset.tokens import MATCHED, REJECTED, TEACHER, RandomTokens, TokenSplit
from kdrun.dataset.vocabulary import Symbols


class _StandIn:
    """Rows of the right shape and number without their content."""

    prefetches = False

    def __init__(self, rows: int, shape: tuple[int, ...]) -> None:
        self.rows, self.shape = rows, shape

    def __len__(self) -> int:
        return self.rows

    def fetch(self, request: Request, device: torch.device) -> Tensor:
        return torch.randn(len(request.positions), *self.shape, device=device)

    def stream(self, requests: Iterator[Request], device: torch.device) -> Iterator[tuple[Request, Tensor]]:
        for request in requests:
            yield request, self.fetch(request, device)

    def digest(self, into: Any) -> None:
        into.update(repr(self.shape).encode())


def stand_in(node: Mapping[str, Any], packages: Collection[str] = ALLOWED) -> Data | None:
    """The data set's outside, from its stated sizes; None where they are not stated and it must be loaded. One whose targets are not a
    class for each row makes its own splits: `stand_in(storage, ids, input_shape, classes)` of its class."""
    sizes, shape, classes = node.get("sizes"), node.get("input_shape"), node.get("classes")
    if not sizes or not shape or not classes or (node.get("teacher_tokenizer") and not node.get("teacher_classes")):
        return None
    held = round(float(node.get("validation") or 0) * sizes["train"])
    train = int(node.get("subset") or sizes["train"] - held)
    make = getattr(component(node.get("_target_"), packages, "dataset"), "stand_in", _classes_in_turn)
    splits, first = {}, 0
    for name, rows in (("train", train), ("validation", held), ("test", int(node.get("subset_test") or sizes["test"]))):
        if not rows:
            continue
        splits[name] = make(_StandIn(rows, tuple(shape)), torch.arange(first, first + rows), tuple(shape), classes)
        first += rows
    names = tuple(map(str, range(classes)))
    mean, std = (tuple(node.get(key) or ()) for key in ("mean", "std"))
    data = Data(str(node["name"]), names, tuple(shape), mean, std, splits, first)
    return _as_text(data, node) if isinstance(data.split("train"), TokenSplit) else data


def _as_text(data: Data, node: Mapping[str, Any]) -> Data:
    """With what a text brings beside its rows: a privileged prompt, a rejected completion, the tokens of a teacher's own tokenizer."""
    tokens = int(node.get("teacher_classes") or 0) if node.get("teacher_tokenizer") else 0
    theirs = {name: RandomTokens(len(s), data.input_shape[0], tokens) for name, s in data.splits.items()} if tokens else {}
    compares, splits = "rejected" in (node.get("columns") or {}), {}
    for name, s in data.splits.items():
        assert isinstance(s, TokenSplit)
        beside = ({REJECTED: s.storage} if compares else {}) | ({TEACHER: theirs[name]} if tokens else {})
        constants = {MATCHED: torch.empty(0, 2, dtype=torch.int64)} if tokens else {}
        splits[name] = replace(s, privileged=s.storage if node.get("privileged") else None, beside=beside, constants=constants)
    reward = (lambda right, written: 0.0) if node.get("reward") else None
    own = replace(data, splits=splits, vocabulary=Symbols(data.class_names), reward=reward)
    if not tokens:
        return own
    names = tuple(map(str, range(tokens)))
    read = {name: TokenSplit.of(theirs[name], s.ids) for name, s in splits.items()}
    return replace(own, translated=replace(own, class_names=names, splits=read, vocabulary=Symbols(names)))


def _classes_in_turn(storage: Storage, ids: Tensor, shape: Sequence[int], classes: int) -> Split:
    return Split(storage, torch.arange(len(ids)) % classes, ids)
