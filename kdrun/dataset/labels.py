"""Labels: from what the files hold to class indices, with every fault named."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from kdrun.dataset.files import Table
from kdrun.errors import Problem, Refused

LABEL_COLUMNS = ("label", "fine_label", "labels", "target", "y")
LABEL_KEY = "dataset.columns.label"
SHOWN = 5  # names shown in a message before "..."


def encode(tables: Mapping[str, Table], column: str, classes: int | None) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Class indices int64 [N] of every split, and the names of the classes.

    Whole numbers are taken as they are, texts are numbered in alphabetical order of the training split.

    Raises:
        Refused: a label that is neither, out of range or unknown to the training split; splits that disagree on the class
            names; a class without training rows.
    """
    names = _class_names(tables, column)
    raw = {split: table.array(column) for split, table in tables.items()}
    if raw["train"].dtype.kind in "UOS":
        names = names or sorted({str(v) for v in raw["train"]})
        coded = {split: _number(values, names, tables[split], column) for split, values in raw.items()}
    else:
        coded = {split: _whole(values, tables[split], column) for split, values in raw.items()}
    count = classes or (len(names) if names else int(coded["train"].max()) + 1)
    if names and len(names) != count:
        what, remedy = f"the files name {len(names)} classes, not {count}", f"dataset.classes={len(names)}, or another label column"
        raise Refused(Problem(what, "dataset.classes", tables["train"].where, remedy))
    names = names or [str(i) for i in range(count)]
    for split, values in coded.items():
        _check_range(values, count, split, tables[split], column)
    _check_all_there(coded["train"], names, tables["train"])
    return coded, tuple(names)


def _class_names(tables: Mapping[str, Table], column: str) -> list[str] | None:
    names = tables["train"].class_names(column)
    for split, table in tables.items():
        other = table.class_names(column)
        if other is not None and names is not None and other != names:
            first = next((i for i, (a, b) in enumerate(zip(names, other, strict=False)) if a != b), min(len(names), len(other)))
            what = f"the {split} split names its classes otherwise than the training split (from class {first} on)"
            raise Refused(Problem(what, LABEL_KEY, table.where, "give both splits the same class names in the same order"))
    return names


def _number(values: np.ndarray, names: list[str], table: Table, column: str) -> Tensor:
    index = {name: i for i, name in enumerate(names)}
    unknown = next((row for row, v in enumerate(values) if str(v) not in index), None)
    if unknown is not None:
        what = f"row {unknown}: label '{values[unknown]}' does not occur in the training split"
        raise Refused(Problem(what, LABEL_KEY, table.where, f"correct column {column}, or drop the row"))
    return torch.tensor([index[str(v)] for v in values], dtype=torch.int64)


def _whole(values: np.ndarray, table: Table, column: str) -> Tensor:
    if values.ndim != 1 or values.dtype.kind not in "iufb":
        what = f"column '{column}' holds no class labels (shape {list(values.shape)}, {values.dtype})"
        raise Refused(Problem(what, LABEL_KEY, table.where, f"name another column; there are {', '.join(table.columns)}"))
    with np.errstate(invalid="ignore"):
        whole = values.astype(np.int64)
    wrong = np.flatnonzero(whole != values)
    if len(wrong):
        what = f"row {wrong[0]}: label {values[wrong[0]]} is not a whole number"
        raise Refused(Problem(what, LABEL_KEY, table.where, "classification needs class indices or class names"))
    return torch.from_numpy(whole)


def _check_range(values: Tensor, classes: int, split: str, table: Table, column: str) -> None:
    wrong = torch.nonzero((values < 0) | (values >= classes)).flatten()
    if len(wrong):
        value = int(values[wrong[0]])
        what = f"{split} row {int(wrong[0])}: label {value} is outside 0..{classes - 1} ({len(wrong)} such rows in column {column})"
        remedy = f"classes count from 0: dataset.classes={int(values.max()) + 1} would hold them"
        if value < 0:
            remedy = "hidden labels are often -1: choose a labelled split, e.g. dataset.splits.test=validation"
        raise Refused(Problem(what, "dataset.classes", table.where, remedy))


def _check_all_there(train: Tensor, names: list[str], table: Table) -> None:
    empty = [names[c] for c in torch.nonzero(torch.bincount(train, minlength=len(names)) == 0).flatten().tolist()]
    if empty:
        shown = ", ".join(empty[:SHOWN]) + (", ..." if len(empty) > SHOWN else "")
        what = f"{len(empty)} of {len(names)} classes have no training rows: {shown}"
        remedy = "add rows of these classes, or remove them from the class names and dataset.classes"
        raise Refused(Problem(what, "dataset.classes", table.where, remedy))
