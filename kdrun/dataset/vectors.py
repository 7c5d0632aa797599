"""Labelled vectors: csv, jsonl, parquet or npz with numeric columns and a label column, standardised by the training rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kdrun.dataset import labels
from kdrun.dataset.base import Data, Resident, Split
from kdrun.dataset.files import Files, Format, Table, extra_columns, find_column
from kdrun.dataset.images import check_splits
from kdrun.dataset.select import select
from kdrun.errors import Problem, Refused


@dataclass
class VectorData:
    """A data set of feature vectors with one label each. No augmentation."""

    name: str
    hub: str | None = None
    revision: str | None = None
    path: str | None = None
    format: Format = "auto"
    access: str | None = None
    splits: dict[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})
    features: list[str] | None = None
    columns: dict[str, str] = field(default_factory=dict)
    classes: int | None = None
    standardise: bool = True
    validation: float = 0.0
    subset: int | None = None
    subset_test: int | None = None

    def __post_init__(self) -> None:
        check_splits(self.splits, self.validation)
        if self.features is not None and (not self.features or len(set(self.features)) != len(self.features)):
            raise ValueError(f"features names each column once, not {self.features}")

    def load(self) -> Data:
        """Read the data.

        Raises:
            Refused: files missing or unreadable, columns or labels other than configured, a feature that is not a number.
        """
        wanted = [*(self.features or ["one per feature"]), self.columns.get("label", "label")]
        tables = Files(self.path, self.hub, self.revision, self.format, self.splits, wanted, self.access).open()
        label = find_column(tables, self.columns.get("label"), labels.LABEL_COLUMNS, labels.LABEL_KEY)
        targets, class_names = labels.encode(tables, label, self.classes)
        features = self._features(tables["train"], label)
        vectors = {split: _matrix(table, features) for split, table in tables.items()}
        chosen = select(targets, self.validation, self.subset, self.subset_test)
        train = vectors["train"][chosen["train"].rows]
        mean, std = moments(train) if self.standardise else (torch.zeros(train.shape[1]), torch.ones(train.shape[1]))
        extra = {split: extra_columns(table, self.columns, ("label",)) for split, table in tables.items()}
        splits = {}
        for name, part in chosen.items():
            storage = Resident(standardised(vectors[part.table][part.rows], mean, std))
            further = {k: v[part.rows] for k, v in extra[part.table].items()}
            splits[name] = Split(storage, targets[part.table][part.rows], part.ids, further)
        total = sum(len(t) for t in tables.values())
        return Data(self.name, class_names, tuple(train.shape[1:]), tuple(mean.tolist()), tuple(std.tolist()), splits, total)

    def _features(self, table: Table, label: str) -> list[str]:
        columns = self.features or [c for c in table.columns if c != label and c not in self.columns.values()]
        for column in columns:
            find_column({"train": table}, column, (), "dataset.features")
        return columns


def _matrix(table: Table, columns: Sequence[str]) -> Tensor:
    """The feature columns side by side, float64 [N, D]; a column of lists gives several features."""
    parts = []
    for column in columns:
        values = table.array(column) if column in table.columns else np.empty(0)
        if values.dtype.kind not in "iufb" or values.ndim not in (1, 2) or len(values) != len(table):
            what = f"column '{column}' does not hold numbers, the same count in each row"
            remedy = f"name the numeric columns with dataset.features=[...]; there are {', '.join(table.columns)}"
            raise Refused(Problem(what, "dataset.features", table.where, remedy))
        wrong = np.flatnonzero(~np.isfinite(values.astype(np.float64).reshape(len(table), -1)).all(1))
        if len(wrong):
            what = f"column '{column}' has no finite value in {len(wrong)} rows, first in row {wrong[0]}"
            raise Refused(Problem(what, "dataset.features", table.where, "fill or remove these rows"))
        parts.append(torch.from_numpy(values.astype(np.float64)).reshape(len(table), -1))
    return torch.cat(parts, dim=1)


def moments(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (of the rows given, not an estimate) of every feature, [D] each; a constant feature has 1."""
    std = vectors.std(0, correction=0)
    return vectors.mean(0), torch.where(std > 0, std, 1.0)


def standardised(vectors: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """float32 [N, D]."""
    return ((vectors - mean) / std).to(torch.float32)
