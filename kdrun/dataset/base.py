"""What a loaded data set is: splits with stable ids, and batches of them as the models see them.

Two kinds of storage answer the same requests: `Resident` (one tensor, augmented in batches on the device) and
`kdrun.dataset.streamed.Streamed` (rows read, decoded and cropped by workers). An answer is a function of the request
alone, so order, workers, ranks and resume cannot change it (law 3).
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from kdrun.dataset.vocabulary import Vocabulary
from kdrun.errors import Problem, Refused, did_you_mean
from kdrun.types import Batch

SPLITS = ("train", "validation", "test")


class Request(NamedTuple):
    """Which rows of a split are wanted, and as which random view of themselves."""

    positions: Tensor  # [B] int64, in the split
    ids: Tensor  # [B] int64 sample ids of these positions
    view: Tensor  # [B] int64
    seed: int
    augment: bool


class Transform(Protocol):
    """How a stored row becomes what the models see. Its repr names all its settings and enters the fingerprint. One that draws nothing
    says so by `random = False`."""

    def sample(self, image: Any, key: int | None) -> Any:
        """The part done image by image, in the workers; `key` None is the evaluation transform."""

    def batch(self, inputs: Tensor, request: Request) -> Tensor:
        """The part done on the device: stored rows [B, ...] to float32 [B, ...]."""


class Storage(Protocol):
    """Where the inputs of a split lie."""

    prefetches: bool  # whether `stream` works ahead, so that a source should say what comes next

    def __len__(self) -> int: ...
    def fetch(self, request: Request, device: torch.device) -> Tensor: ...
    def stream(self, requests: Iterator[Request], device: torch.device) -> Iterator[tuple[Request, Tensor]]: ...
    def digest(self, into: Any) -> None: ...


@dataclass(frozen=True)
class Identity:
    """Rows that are stored as the models see them: standardised vectors."""

    random: ClassVar[bool] = False

    def sample(self, image: Any, key: int | None) -> Any:
        return image

    def batch(self, inputs: Tensor, request: Request) -> Tensor:
        return inputs


@dataclass(eq=False)
class Resident:
    """A split as one tensor: uint8 [N, C, H, W] for images, float32 [N, D] for vectors. Copied to a device once."""

    inputs: Tensor
    transform: Transform = field(default_factory=Identity)
    prefetches: bool = field(default=False, init=False)
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.inputs)

    def on(self, device: torch.device) -> Tensor:
        if device == self.inputs.device:
            return self.inputs
        if device not in self._copies:
            self._copies[device] = self.inputs.to(device)
        return self._copies[device]

    def fetch(self, request: Request, device: torch.device) -> Tensor:
        rows = self.on(device).index_select(0, request.positions.to(device, non_blocking=True))
        return self.transform.batch(rows, request)

    def stream(self, requests: Iterator[Request], device: torch.device) -> Iterator[tuple[Request, Tensor]]:
        for request in requests:
            yield request, self.fetch(request, device)

    def digest(self, into: Any) -> None:
        into.update(f"{self.transform!r} {tuple(self.inputs.shape)} {self.inputs.dtype}".encode())
        into.update(self.inputs.contiguous().numpy().data)


@dataclass(eq=False)
class Taken:
    """Some rows of another storage."""

    storage: Storage
    positions: Tensor  # [N] int64 in that storage
    prefetches: bool = field(init=False)

    def __post_init__(self) -> None:
        self.prefetches = self.storage.prefetches

    def __len__(self) -> int:
        return len(self.positions)

    def _there(self, request: Request) -> Request:
        return request._replace(positions=self.positions[request.positions])

    def fetch(self, request: Request, device: torch.device) -> Tensor:
        return self.storage.fetch(self._there(request), device)

    def stream(self, requests: Iterator[Request], device: torch.device) -> Iterator[tuple[Request, Tensor]]:
        asked: deque[Request] = deque()  # the answers come in order, with the other storage's positions

        def translated() -> Iterator[Request]:
            for request in requests:
                asked.append(request)
                yield self._there(request)

        for _, inputs in self.storage.stream(translated(), device):
            yield asked.popleft(), inputs

    def digest(self, into: Any) -> None:
        into.update(self.positions.contiguous().numpy().data)
        self.storage.digest(into)


@dataclass(frozen=True, eq=False)
class Split:
    """The rows of one split, in the order of their ids. Everything but the inputs stays on the CPU."""

    storage: Storage
    targets: Tensor  # [N] int64
    ids: Tensor  # [N] int64
    extra: Mapping[str, Tensor] = field(default_factory=dict)  # [N, ...] by name
    constants: Mapping[str, Tensor] = field(default_factory=dict)  # what all rows share, as it is in every batch: a graph's edges [2, E]

    def __post_init__(self) -> None:
        parts: dict[str, Sized] = {"inputs": self.storage, "targets": self.targets, "ids": self.ids, **self.extra}
        lengths = {name: len(part) for name, part in parts.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"the parts of a split differ in length: {lengths}")

    def __len__(self) -> int:
        return len(self.ids)

    def request(self, index: Tensor, view: Tensor, seed: int, augment: bool) -> Request:
        return Request(index, self.ids[index], view, seed, augment)

    def batch(self, request: Request, inputs: Tensor, device: torch.device) -> Batch:
        move = lambda t: t.to(device, non_blocking=True)  # noqa: E731
        extra = {name: move(rows[request.positions]) for name, rows in self.extra.items()}
        extra |= {name: move(value) for name, value in self.constants.items()}
        return Batch(inputs, move(self.targets[request.positions]), move(request.ids), move(request.view), extra)


@dataclass(frozen=True, eq=False)
class Data:
    """A loaded data set.

    Ids are unique over all splits and below `total_ids`: the rows of the training file come first, in its order, also
    those carved out for validation; the rows of the test file follow. A subset keeps the ids of the whole.
    """

    name: str
    class_names: tuple[str, ...]
    input_shape: tuple[int, ...]  # what the models see, without the batch: (C, H, W) or (D,)
    mean: tuple[float, ...]  # per channel on the scale [0, 1], or per feature
    std: tuple[float, ...]
    splits: Mapping[str, Split]  # "train", "test" and perhaps "validation"
    total_ids: int
    whole: bool = False  # the rows of a split are one graph: they can only be asked for all together, in their order
    vocabulary: Vocabulary | None = None  # of text: its classes are tokens
    world: Callable[[Tensor], Tensor] | None = None  # of text whose truth is known: ids [B, T] -> logits [B, T, V] of the next token
    reward: Callable[[list[int], list[int]], float] | None = None  # how good a completion is: (reference tokens, written tokens)
    oracle: Callable[[list[int], list[int]], float] | None = None  # the same where no reference is needed: (prompt, written tokens)
    translated: Data | None = None  # of text: the same rows in the tokens of a teacher with a tokenizer of its own
    fingerprint: str = field(init=False)  # of the ordered ids, targets, content, transforms and vocabulary

    def __post_init__(self) -> None:
        found = fingerprint(self.splits)
        if self.vocabulary is not None:
            found = hashlib.sha256(f"{found} {self.vocabulary.digest}".encode()).hexdigest()
        if self.translated is not None:
            found = hashlib.sha256(f"{found} {self.translated.fingerprint}".encode()).hexdigest()
        object.__setattr__(self, "fingerprint", found)

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def judges(self) -> bool:
        """Whether it says how good a completion is."""
        return self.oracle is not None or self.reward is not None

    def rewards(self, prompts: Sequence[Tensor], references: Sequence[list[int]], texts: Sequence[list[int]]) -> list[float]:
        """How good completions `texts` are, by the oracle or else by their references; only where it `judges`."""
        if self.oracle is not None:
            return [self.oracle(prompt.tolist(), text) for prompt, text in zip(prompts, texts, strict=True)]
        assert self.reward is not None
        return [self.reward(reference, text) for reference, text in zip(references, texts, strict=True)]

    def split(self, name: str) -> Split:
        """Raises `Refused` for a split that this data set does not have."""
        if name not in self.splits:
            carve = "dataset.validation=0.1 carves one out of the training rows"
            remedy = carve if name == "validation" else did_you_mean(name, self.splits)
            raise Refused(Problem(f"{self.name} has no {name} split", "dataset", self.name, remedy))
        return self.splits[name]

    def rows(self, split: str, index: Tensor, view: Tensor, seed: int, augment: bool = True, device: torch.device | str = "cpu") -> Batch:
        """The rows at positions `index` [B] of a split, as the random views `view` [B] if `augment`, else as evaluated.

        Raises:
            Refused: a streamed image that cannot be read.
        """
        part, device = self.split(split), torch.device(device)
        request = part.request(index, view, seed, augment)
        return part.batch(request, part.storage.fetch(request, device), device)

    def stream(
        self, split: str, plan: Iterable[tuple[Tensor, Tensor]], seed: int, augment: bool = True, device: torch.device | str = "cpu"
    ) -> Iterator[Batch]:
        """`rows` for every (index, view) of a plan, in its order; a streamed split loads ahead in its workers."""
        part, device = self.split(split), torch.device(device)
        requests = (part.request(index, view, seed, augment) for index, view in plan)
        for request, inputs in part.storage.stream(requests, device):
            yield part.batch(request, inputs, device)

    def batches(self, split: str, batch_size: int, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """All rows of a split in order, not augmented."""
        pieces = torch.arange(len(self.split(split))).split(len(self.split(split)) if self.whole else batch_size)
        return self.stream(split, ((index, torch.zeros_like(index)) for index in pieces), seed=0, augment=False, device=device)

    def labels_by_id(self, split: str = "train") -> Tensor:
        """Targets by sample id, int64 [total_ids]; -1 for ids outside the split."""
        labels = torch.full((self.total_ids,), -1, dtype=torch.int64)
        part = self.split(split)
        labels[part.ids] = part.targets
        return labels


def taken(split: Split, positions: Tensor) -> Split:
    """The rows of a split at `positions` [M] int64, with their ids, as a split of the same kind."""
    extra = {name: rows[positions] for name, rows in split.extra.items()}
    theirs = getattr(split, "privileged", None)  # of text: the same rows once more
    more: dict[str, Any] = {} if theirs is None else {"privileged": Taken(theirs, positions)}
    if beside := getattr(split, "beside", None):
        more["beside"] = {name: Taken(storage, positions) for name, storage in beside.items()}
    only = getattr(split.storage, "restricted", None)  # of mixed rows, whose partners are then from among those that are taken
    storage = Taken(split.storage, positions) if only is None else only(positions)
    return replace(split, storage=storage, targets=split.targets[positions], ids=split.ids[positions], extra=extra, **more)


def fingerprint(splits: Mapping[str, Split]) -> str:
    """sha256 over the ordered ids, targets, extra rows, content (all of it if resident, a sample if streamed) and transforms."""
    total = hashlib.sha256()
    for name in SPLITS:
        if name not in splits:
            continue
        split = splits[name]
        total.update(f"{name} {len(split)}".encode())
        for label, rows in [("ids", split.ids), ("targets", split.targets), *sorted(split.extra.items()), *sorted(split.constants.items())]:
            total.update(f"{label} {rows.dtype}".encode())
            total.update(rows.contiguous().numpy().data)
        split.storage.digest(total)
        if getattr(split, "privileged", None) is not None:
            split.privileged.digest(total)  # type: ignore[attr-defined]
        for other, storage in sorted(getattr(split, "beside", {}).items()):
            total.update(f"beside {other}".encode())
            storage.digest(total)
    return total.hexdigest()
