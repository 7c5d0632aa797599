from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdrun.dataset.vectors import VectorData
from kdrun.errors import Refused

ROWS = [(1.5, 2, "yes", 7), (0.5, 4, "no", 7), (2.5, 9, "yes", 7), (4.0, 1, "no", 7)]


def write_csv(folder: Path, train: Any = ROWS, test: Any = ROWS[:2]) -> Path:
    for split, rows in (("train", train), ("test", test)):
        lines = ["height,width,label,constant", *(",".join(map(str, row)) for row in rows)]
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_columns_are_standardised_by_the_training_rows(tmp_path: Path) -> None:
    data = VectorData("x", path=str(write_csv(tmp_path))).load()
    features = np.array([[r[0], r[1], r[3]] for r in ROWS], dtype=np.float64)
    std = np.array([*features[:, :2].std(0), 1.0])
    expected = ((features - features.mean(0)) / std).astype(np.float32)
    assert data.input_shape == (3,)
    assert torch.equal(next(data.batches("train", 9)).inputs, torch.from_numpy(expected))
    assert torch.equal(next(data.batches("test", 9)).inputs, torch.from_numpy(expected[:2]))
    np.testing.assert_allclose(data.mean, features.mean(0), rtol=1e-12)


def test_text_labels_are_numbered_in_alphabetical_order(tmp_path: Path) -> None:
    data = VectorData("x", path=str(write_csv(tmp_path))).load()
    assert data.class_names == ("no", "yes")
    assert data.split("train").targets.tolist() == [1, 0, 1, 0]


def test_features_and_further_columns_are_chosen_by_name(tmp_path: Path) -> None:
    data = VectorData("x", path=str(write_csv(tmp_path)), features=["width"], columns={"note": "constant"}, standardise=False).load()
    batch = next(data.batches("train", 9))
    assert batch.inputs.tolist() == [[2.0], [4.0], [9.0], [1.0]]
    assert batch.extra["note"].tolist() == [7, 7, 7, 7]


def test_jsonl_with_a_list_of_features(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"x": [i, 2 * i], "y": i % 2}) + "\n" for i in range(4)))
    data = VectorData("x", path=str(tmp_path), standardise=False).load()
    assert next(data.batches("train", 9)).inputs.tolist() == [[0, 0], [1, 2], [2, 4], [3, 6]]


def test_npz_with_arrays_by_split(tmp_path: Path) -> None:
    x, y = np.arange(12.0).reshape(6, 2), np.array([0, 1, 2] * 2)
    np.savez(tmp_path / "data.npz", x_train=x, y_train=y, x_test=x[:3], y_test=y[:3])
    data = VectorData("x", path=str(tmp_path / "data.npz"), standardise=False).load()
    assert torch.equal(data.split("train").storage.inputs, torch.from_numpy(x).float())  # type: ignore[attr-defined]
    assert data.classes == 3


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([*ROWS, ("", 2, "yes", 7)], ROWS, "column 'height' has no finite value in 1 rows, first in row 4"),
        ([*ROWS, ("tall", 2, "yes", 7)], ROWS, "column 'height' does not hold numbers"),
        (ROWS, [(1, 2, "maybe", 7)], "row 0: label 'maybe' does not occur in the training split"),
        ([(1, 2, 0.5, 7), (1, 2, 1, 7)], [(1, 2, 1.0, 7)], "row 0: label 0.5 is not a whole number"),
        ([(1, 2, 1, 7), (1, 2, 2, 7)], [(1, 2, 1, 7)], "1 of 3 classes have no training rows: 0"),
    ],
)
def test_values_that_cannot_be_used_are_refused_by_name(tmp_path: Path, train: Any, test: Any, message: str) -> None:
    with pytest.raises(Refused) as refused:
        VectorData("x", path=str(write_csv(tmp_path, train, test))).load()
    assert message in refused.value.problems[0].what
    assert refused.value.problems[0].remedy


def test_an_unknown_feature_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="did you mean width"):
        VectorData("x", path=str(write_csv(tmp_path)), features=["widht"]).load()
