from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdrun.dataset.decode import Decoder
from kdrun.dataset.images import ImageData
from kdrun.errors import Refused
from tests.dataset.builders import pictures, splits, write_parquet


def test_statistics_are_those_of_the_training_rows(tmp_path: Path) -> None:
    data = ImageData("x", path=str(write_parquet(tmp_path))).load()
    pixels = splits()["train"][0].astype(np.float64) / 255
    np.testing.assert_allclose(data.mean, pixels.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(data.std, pixels.std((0, 1, 2)), rtol=1e-9)


def test_batches_are_all_rows_in_order_and_not_augmented(tmp_path: Path) -> None:
    data = ImageData("x", path=str(write_parquet(tmp_path)), mean=[0.5] * 3, std=[0.5] * 3, padding=3, flip=0.5).load()
    batches = list(data.batches("train", 5))
    assert [len(b.ids) for b in batches] == [5, 5, 2]
    assert torch.equal(torch.cat([b.ids for b in batches]), torch.arange(12))
    expected = torch.from_numpy(np.moveaxis(splits()["train"][0], 3, 1).copy()).float().div(255).sub(0.5).div(0.5)
    assert torch.equal(torch.cat([b.inputs for b in batches]), expected)


def test_rows_belong_to_their_ids(tmp_path: Path) -> None:
    data = ImageData("x", path=str(write_parquet(tmp_path)), padding=2, flip=0.5, validation=0.4).load()
    index, view = torch.tensor([2, 0, 2]), torch.tensor([1, 1, 4])
    batch = data.rows("validation", index, view, seed=3)
    held = data.split("validation")
    assert torch.equal(batch.ids, held.ids[index])
    assert torch.equal(batch.view, view)
    whole = ImageData("x", path=str(tmp_path), padding=2, flip=0.5, mean=list(data.mean), std=list(data.std)).load()
    assert torch.equal(batch.inputs, whole.rows("train", batch.ids, view, seed=3).inputs)  # the view of an id is the same in any split
    assert torch.equal(batch.targets, whole.split("train").targets[batch.ids])


def test_labels_by_id_mark_what_is_not_trained_on(tmp_path: Path) -> None:
    data = ImageData("x", path=str(write_parquet(tmp_path)), validation=0.4).load()
    labels = data.labels_by_id()
    assert labels.shape == (18,)
    assert torch.equal(labels[data.split("train").ids], data.split("train").targets)
    assert labels[data.split("validation").ids].eq(-1).all()
    assert labels[12:].eq(-1).all()


def test_a_split_that_is_not_there_is_refused_with_the_way_to_it(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"dataset\.validation=0\.1"):
        ImageData("x", path=str(write_parquet(tmp_path))).load().split("validation")


def test_decoded_pixels_are_kept_and_renewed_when_the_files_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ImageData("x", path=str(write_parquet(tmp_path)), mean=[0.5] * 3, std=[0.5] * 3)
    first = spec.load()

    def fail(*args: object) -> None:
        raise AssertionError("decoded again")

    with monkeypatch.context() as patched:
        patched.setattr(Decoder, "__call__", fail)
        assert spec.load().fingerprint == first.fingerprint
        with pytest.raises(AssertionError, match="decoded again"):
            ImageData("x", path=str(tmp_path), resize=4).load()  # another decoding has another file
    changed = splits()
    changed["train"] = pictures(12, 77), changed["train"][1]
    write_parquet(tmp_path, changed)
    os.utime(tmp_path / "train.parquet", ns=(1, 1))
    pixels = spec.load().split("train").storage.inputs  # type: ignore[attr-defined]
    assert torch.equal(pixels, torch.from_numpy(np.moveaxis(changed["train"][0], 3, 1).copy()))


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("KDRUN_CACHE", str(blocked))
    assert len(ImageData("x", path=str(write_parquet(tmp_path / "data"))).load().split("train")) == 12


def test_the_fingerprint_sees_all_that_a_result_depends_on(tmp_path: Path) -> None:
    def of(name: str, data: dict[str, Any] | None = None, **kwargs: Any) -> str:
        write_parquet(tmp_path / name, data or splits())
        return ImageData("x", path=str(tmp_path / name), **{"mean": [0.5] * 3, "std": [0.5] * 3, **kwargs}).load().fingerprint

    base, (x, y), test = of("a"), splits()["train"], splits()["test"]
    assert base == of("copy")
    order = [1, 0, *range(2, 12)]
    pixel = x.copy()
    pixel[11, 7, 7, 2] ^= 1
    changed = [
        of("b", {"train": (x[order], [y[i] for i in order]), "test": test}),
        of("c", {"train": (x, [2, *y[1:-1], 0]), "test": test}),
        of("d", {"train": (pixel, y), "test": test}),
        of("e", padding=1),
        of("f", flip=0.5),
        of("m", rotation=20.0),
        of("n", color_jitter=[0.4, 0.4, 0.4, 0.0]),
        of("o", color_jitter=[0.4, 0.4, 0.4, 0.1]),
        of("p", auto_augment="cifar10"),
        of("q", rand_augment=[2, 9]),
        of("r", lighting=0.1),
        of("s", erasing=0.25),
        of("t", erasing=0.25, erasing_value="random"),
        of("u", mixup=1.0),
        of("v", cutmix=1.0),
        of("w", mixup=1.0, mix_probability=0.5),
        of("g", mean=[0.4] * 3),
        of("h", subset=6),
        of("i", validation=0.3),
        of("j", columns={"again": "label"}),
        of("k", input_shape=[3, 8, 8], resident=False, workers=0),
        of("l", {"train": (pixel, y), "test": test}, input_shape=[3, 8, 8], resident=False, workers=0),
    ]
    assert len({base, *changed}) == 23


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"splits": {"train": "train"}}, "splits names train and test"),
        ({"splits": {"train": "a", "test": "b", "dev": "c"}}, "splits names train and test"),
        ({"validation": 1.0}, "share of the training rows"),
        ({"validation": 0.1, "splits": {"train": "a", "test": "b", "validation": "c"}}, "the files have a validation split"),
        ({"input_shape": [32, 32, 3]}, "channels, height, width"),
        ({"mean": [0.5]}, "together"),
        ({"mean": [0.5], "std": [0.5], "input_shape": [3, 8, 8]}, "3 channels"),
        ({"mean": [0.5], "std": [0.0]}, "above 0"),
        ({"crop": "resized"}, "dataset.resident=false"),
        ({"resident": False}, "need input_shape, mean and std"),
        ({"flip": 1.5}, "flip=1.5"),
        ({"padding": -1}, "padding=-1"),
        ({"rotation": 200.0}, "rotation=200"),
        ({"rotation": 20.0, "crop": "resized", "resident": False}, "dataset.crop=pad"),
        ({"scale": [0.5]}, "two numbers"),
        ({"ratio": [2.0, 0.5]}, "the smaller first"),
        ({"color_jitter": [0.4, 0.4]}, "color_jitter=.*hue up to 0.5"),
        ({"color_jitter": [0.4, 0.4, 0.4, 0.6]}, "hue up to 0.5"),
        ({"rand_augment": [2, 31]}, "magnitude from 0 to 30"),
        ({"rand_augment": [0, 9]}, "operations from 1"),
        ({"rand_augment": [2, 9], "auto_augment": "cifar10"}, "null beside auto_augment=cifar10"),
        ({"lighting": -0.1}, "lighting=-0.1: legal range"),
        ({"lighting": 0.1, "input_shape": [1, 28, 28]}, "0 for images of one channel"),
        ({"erasing": 1.5}, "erasing=1.5: a probability"),
        ({"mixup": -1.0}, "mixup=-1.0: legal range"),
        ({"cutmix": float("inf")}, "cutmix=inf: legal range"),
        ({"mix_probability": 2.0}, "mix_probability=2.0: a probability"),
        ({"switch_probability": -0.5}, "switch_probability=-0.5: a probability"),
        (
            {"crop": "resized", "resident": False, "input_shape": [3, 300, 300], "mean": [0.5] * 3, "std": [0.5] * 3},
            "smaller than the centre crop",
        ),
    ],
)
def test_settings_that_no_run_can_use_are_refused_at_once(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageData("x", **kwargs)


def test_what_is_switched_off_leaves_the_transform_as_it_was(tmp_path: Path) -> None:
    write_parquet(tmp_path)
    plain = {"path": str(tmp_path), "mean": [0.5] * 3, "std": [0.5] * 3, "padding": 1}
    off = {"color_jitter": [0.0] * 4, "lighting": 0.0, "erasing": 0.0, "mixup": 0.0, "mix_probability": 0.5, "erasing_value": "random"}
    assert ImageData("x", **plain).load().fingerprint == ImageData("x", **plain, **off).load().fingerprint


@pytest.mark.realdata
@pytest.mark.skipif(not os.environ.get("KDRUN_DATA"), reason="KDRUN_DATA names no folder with real data")
def test_cifar100_is_the_published_set() -> None:
    data = ImageData(
        "cifar100", path=str(Path(os.environ["KDRUN_DATA"]) / "cifar100"), columns={"image": "img", "label": "fine_label"}
    ).load()
    assert (len(data.split("train")), len(data.split("test")), data.classes, data.total_ids) == (50_000, 10_000, 100, 60_000)
    assert torch.bincount(data.split("train").targets).tolist() == [500] * 100
    # The statistics that Yuan et al. (CVPR 2020) print in full in their loader.
    np.testing.assert_allclose(data.mean, (0.5070751592371323, 0.48654887331495095, 0.4409178433670343), rtol=1e-12)
    np.testing.assert_allclose(data.std, (0.2673342858792401, 0.2564384629170883, 0.27615047132568404), rtol=1e-12)
