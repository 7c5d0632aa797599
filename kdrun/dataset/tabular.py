"""Tables of numbers and categories: scaled to [0, 1] and one-hot, with few classes or very uneven ones.

The preparation is that of the tabular experiments of TGeo-KD (Hu et al., ICLR 2024, arXiv 2312.15112; Chengming0501/TGeo-KD): min-max
scaling, and random oversampling of the smaller classes of the training rows. Here the scaling is fitted on the training rows alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdrun import rng
from kdrun.dataset.base import Data, Resident, Split
from kdrun.dataset.select import WORLD_SEED, Selection, select
from kdrun.errors import Problem, Refused, did_you_mean

Columns = Mapping[str, np.ndarray]  # by name, [N]: float64 with NaN for a missing number, or texts with "" for a missing one


@dataclass
class TabularData:
    """A data set of csv files (or csv.gz), one row per sample.

    `files` names the training file and perhaps a test file in the folder; without one, `test` is the share of the training file's rows
    that is held out first, by hash. `header` names the columns of files that do not. Every column that is not `label`, `categorical` or
    `ignored` is a number; a missing number becomes the smallest of the training rows, and "is missing" a feature of its own. A category
    that fewer than `min_count` training rows have counts as rare; one that none has is no category. `groups` puts labels together:
    {class: [label, ...]}.

    `oversample`: training rows of the smaller classes are repeated, drawn with replacement, until all classes have as many. A copy is a
    sample of its own, with an id behind those of the files.

    Scaling and categories are fitted on the training rows before `subset`, so that a teacher who saw more rows sees the same features.
    """

    name: str
    path: str | None = None
    folder: str | None = None
    files: dict[str, str] = field(default_factory=lambda: {"train": "train.csv", "test": "test.csv"})
    header: list[str] | None = None
    label: str = "label"
    groups: dict[str, list[str]] | None = None
    categorical: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    min_count: int = 1
    oversample: bool = False
    test: float = 0.0
    validation: float = 0.0
    subset: int | None = None
    subset_test: int | None = None

    def __post_init__(self) -> None:
        if set(self.files) not in ({"train"}, {"train", "test"}):
            raise ValueError(f"files={self.files}: names train, and perhaps test")
        for key, low in (("test", "test" not in self.files), ("validation", False)):
            share = getattr(self, key)
            if not (0 < share < 1 if low else 0 <= share < 1):
                raise ValueError(f"{key}={share} is a share of the training file's rows" + (", and there is no test file" if low else ""))
        if "test" in self.files and self.test:
            raise ValueError(f"test={self.test}: there is a test file, {self.files['test']}")
        if self.min_count < 1:
            raise ValueError(f"min_count={self.min_count} must be at least 1")

    def load(self) -> Data:
        """Read the data.

        Raises:
            Refused: files missing or unreadable, columns or labels other than configured.
        """
        tables = self._tables()
        names, targets = self._targets(tables)
        fitted = select(targets, self.validation)["train"]
        features, mean, std = self._features(tables, fitted)
        splits, total = {}, sum(len(t) for t in targets.values())
        for split, part in select(targets, self.validation, self.subset, self.subset_test).items():
            y, x, ids = targets[part.table][part.rows], features[part.table][part.rows], part.ids
            if split == "train" and self.oversample:
                again = copies(y, ids)
                y, x, ids = torch.cat([y, y[again]]), torch.cat([x, x[again]]), torch.cat([ids, total + torch.arange(len(again))])
                total += len(again)
            splits[split] = Split(Resident(x), y, ids)
        return Data(self.name, names, (features["train"].shape[1],), tuple(mean.tolist()), tuple(std.tolist()), splits, total)

    def _tables(self) -> dict[str, Columns]:
        """The columns of train and test."""
        folder = self._folder()
        tables = {split: self._read(folder / file) for split, file in self.files.items()}
        if "test" not in tables:
            rows = torch.arange(len(tables["train"][self.label]))
            held = (rng.uniform(rng.key(WORLD_SEED, "test"), rows) < self.test).numpy()
            whole = tables["train"]
            tables = {"train": {k: v[~held] for k, v in whole.items()}, "test": {k: v[held] for k, v in whole.items()}}
        return tables

    def _folder(self) -> Path:
        root = os.environ.get("KDRUN_DATA")
        if self.path is not None:
            return Path(self.path).expanduser()
        if root is None:
            remedy = f"dataset.path=FOLDER with {' and '.join(self.files.values())}, or that folder, called {self.folder or self.name}, "
            raise Refused(Problem("no place to read from", "dataset.path", self.name, remedy + "in the one that KDRUN_DATA names"))
        return Path(root) / (self.folder or self.name)

    def _read(self, file: Path) -> Columns:
        import pyarrow as pa
        from pyarrow import csv

        if not file.is_file():
            raise Refused(Problem("no such file", "dataset.path", str(file), "put it there, or name another folder: dataset.path=FOLDER"))
        try:
            with csv.open_csv(file, csv.ReadOptions(column_names=self.header)) as stream:
                names = stream.schema.names
            texts = {self.label, *self.categorical, *self.ignored}
            types = {name: pa.string() if name in texts else pa.float64() for name in names}
            convert = csv.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=True)
            table = csv.read_csv(file, csv.ReadOptions(column_names=self.header), convert_options=convert)
        except pa.ArrowInvalid as error:
            remedy = "columns of texts stand in dataset.categorical or dataset.ignored, all names in dataset.header if not in the file"
            raise Refused(Problem(f"cannot be read ({str(error).splitlines()[0]})", "dataset.files", str(file), remedy)) from error
        for column in (self.label, *self.categorical, *self.ignored):
            if column not in names:
                raise Refused(Problem(f"no column '{column}'", "dataset.label", str(file), did_you_mean(column, names)))
        filled = {name: table[name].fill_null("") if name in texts else table[name] for name in names if name not in self.ignored}
        return {name: column.to_numpy() for name, column in filled.items()}

    def _targets(self, tables: Mapping[str, Columns]) -> tuple[tuple[str, ...], dict[str, Tensor]]:
        """The classes, and the class index of every row, int64 [N], by split."""
        groups = self.groups or {name: [name] for name in sorted(set(tables["train"][self.label]))}
        index = {label: i for i, labels in enumerate(groups.values()) for label in labels}
        found = {}
        for split, columns in tables.items():
            unknown = sorted(set(columns[self.label]) - index.keys())
            if unknown:
                what = f"the {split} rows have labels that no class holds: {', '.join(unknown[:5])}"
                raise Refused(Problem(what, "dataset.groups", self.name, "add them to a class of dataset.groups"))
            found[split] = torch.tensor([index[label] for label in columns[self.label]], dtype=torch.int64)
        return tuple(groups), found

    def _features(self, tables: Mapping[str, Columns], fitted: Selection) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """float32 [N, D] by split, numbers first, and what was taken off and divided by, float64 [D] each."""
        from sklearn.preprocessing import MinMaxScaler, OneHotEncoder

        numeric = [name for name in tables["train"] if name != self.label and name not in self.categorical]
        numbers = {split: _stack(columns, numeric) for split, columns in tables.items()}
        train = numbers["train"][fitted.rows.numpy()]
        scaler = MinMaxScaler().fit(train)  # leaves missing numbers out, and leaves constants alone
        gaps = np.flatnonzero(np.isnan(train).any(0))
        encoder: Any = None
        if self.categorical:
            rare = {"handle_unknown": "infrequent_if_exist", "min_frequency": self.min_count}
            encoder = OneHotEncoder(sparse_output=False, **(rare if self.min_count > 1 else {"handle_unknown": "ignore"}))
            encoder.fit(_stack(tables["train"], self.categorical)[fitted.rows.numpy()])
        found = {}
        for split, columns in tables.items():
            parts = [np.nan_to_num(scaler.transform(numbers[split])), np.isnan(numbers[split])[:, gaps]]
            if encoder is not None:
                parts.append(encoder.transform(_stack(columns, self.categorical)))
            found[split] = torch.from_numpy(np.concatenate(parts, axis=1).astype(np.float32))
        others = found["train"].shape[1] - len(numeric)
        mean, std = np.append(np.nan_to_num(scaler.data_min_), np.zeros(others)), np.append(1 / scaler.scale_, np.ones(others))
        return found, torch.from_numpy(mean), torch.from_numpy(std)


def _stack(columns: Columns, names: Sequence[str]) -> np.ndarray:
    """The columns side by side, [N, len(names)]."""
    return np.stack([columns[name] for name in names], axis=1)


def copies(targets: Tensor, ids: Tensor) -> Tensor:
    """Positions [M] of the rows to repeat so that every class that occurs has as many as the largest: drawn with replacement, by hash."""
    counts = torch.bincount(targets)
    chosen = []
    for c in torch.nonzero(counts).flatten().tolist():
        members = torch.nonzero(targets == c).flatten()
        missing = torch.arange(int(counts.max() - counts[c]))
        chosen.append(members[rng.integers(rng.key(WORLD_SEED, "oversample", c), len(members), missing)])
    return torch.cat(chosen)
