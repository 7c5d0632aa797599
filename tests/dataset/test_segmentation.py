from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from kdrun.dataset.augment import Normalise
from kdrun.dataset.base import Request
from kdrun.dataset.pixels import VOID, ScaleCropFlip
from kdrun.dataset.segmentation import SegmentationData
from kdrun.errors import Refused
from tests.dataset.pairs import SIZE, blocks, mask, write_cities, write_folders, write_packed

CONF = Path(__file__).parents[2] / "conf" / "dataset"


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KDRUN_CACHE", str(tmp_path / "cache"))


def dataset(name: str, **values: Any) -> SegmentationData:
    node = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    node.pop("_target_")
    return SegmentationData(**{**node, "workers": 0, **values})


def everything(data: Any, split: str = "train", augment: bool = False, view: int = 0) -> Any:
    index = torch.arange(len(data.split(split)))
    return data.rows(split, index, torch.full_like(index, view), seed=3, augment=augment)


def red(batch: Any, data: Any) -> torch.Tensor:
    """The red channel as it was in the files, [B, H, W] int64."""
    return ((batch.inputs[:, 0] * data.std[0] + data.mean[0]) * 255).round().long()


def test_a_folder_of_pairs_is_read_as_it_lies(tmp_path: Path) -> None:
    data = dataset("camvid", path=str(write_folders(tmp_path / "camvid"))).load()
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 6, "validation": 3, "test": 4}
    assert (data.classes, data.input_shape, data.total_ids) == (11, (3, *SIZE), 13)
    for seed, split in enumerate(("train", "validation", "test")):
        batch = everything(data, split)
        images = torch.from_numpy(blocks(len(batch.ids), seed)).permute(0, 3, 1, 2)
        assert torch.equal(red(batch, data), images[:, 0].long())
        ids = images[:, 0].long() * 12 // 256
        assert torch.equal(batch.targets, torch.where(ids == 11, -1, ids))  # Unlabelled is no class
        assert (batch.targets == -1).any()


def test_packed_and_unpacked_files_give_the_same_data(tmp_path: Path) -> None:
    folder, packed = (dataset("camvid", path=str(p)).load() for p in (write_folders(tmp_path / "a"), write_packed(tmp_path / "b")))
    assert folder.fingerprint == packed.fingerprint
    assert (folder.mean, folder.std) == (packed.mean, packed.std)


def test_the_folder_is_found_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_packed(tmp_path / "camvid")
    monkeypatch.setenv("KDRUN_DATA", str(tmp_path))
    assert len(dataset("camvid").load().split("train")) == 6


def test_ids_of_cityscapes_become_its_nineteen_classes(tmp_path: Path) -> None:
    data = dataset("cityscapes", path=str(write_cities(tmp_path / "c"))).load()
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 4, "test": 2}
    assert (data.classes, data.input_shape) == (19, (3, 512, 1024))
    batch = everything(data, "test")
    ids = red(batch, data) * 6 // 256
    assert torch.equal(batch.targets, torch.tensor([-1, 0, 1, 2, 18, -1])[ids])  # void, road, sidewalk, building, bicycle, void


def test_streamed_and_resident_rows_are_the_same(tmp_path: Path) -> None:
    path = str(write_cities(tmp_path / "c"))
    for augment in (False, True):
        values: dict[str, Any] = {"path": path, "input_shape": [3, 8, 8]}
        resident, streamed = (dataset("cityscapes", resident=r, **values).load() for r in (True, False))
        one, other = (everything(d, augment=augment, view=2) for d in (resident, streamed))
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.targets, other.targets)


def test_workers_give_the_same_rows(tmp_path: Path) -> None:
    path = str(write_cities(tmp_path / "c"))
    plan = [(torch.tensor([2, 0]), torch.tensor([1, 1])), (torch.tensor([1, 3]), torch.tensor([5, 0]))]
    here, there = (list(dataset("cityscapes", path=path, workers=w).load().stream("train", plan, seed=3)) for w in (0, 2))
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.targets, other.targets)


def transform(**values: Any) -> ScaleCropFlip:
    return ScaleCropFlip(Normalise((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), **values)


def request(count: int = 4, seed: int = 0, view: int = 0) -> Request:
    ids = torch.arange(count)
    return Request(ids, ids, torch.full_like(ids, view), seed, True)


def stored(count: int = 4) -> torch.Tensor:
    """Rows with a mask that numbers nothing but itself: the red channel."""
    images = torch.from_numpy(blocks(count, 9)).permute(0, 3, 1, 2)
    return torch.cat([images, images[:, :1] // 2], 1)


@pytest.mark.parametrize(
    "values",
    [
        {"flip": 1.0},
        {"crop": (8, 10)},
        {"scale": (2.0, 2.0)},
        {"scale": (0.5, 3.0), "flip": 0.5, "crop": (8, 8)},
    ],
)
def test_image_and_mask_are_moved_together(values: dict[str, Any]) -> None:
    """Images whose red says the column and whose green says the row: each label is that of the place that its pixel tells."""
    height, width = SIZE
    labels = torch.randint(11, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    rows, columns = torch.meshgrid(15 * torch.arange(height), 15 * torch.arange(width), indexing="ij")
    one = torch.stack([columns.to(torch.uint8), rows.to(torch.uint8), torch.zeros(SIZE, dtype=torch.uint8), labels])
    out = transform(**values).batch(one.expand(50, -1, -1, -1), request(50, view=1))
    x, y, found = out[:, 0] * 255 / 15, out[:, 1] * 255 / 15, out[:, 3].long()
    told = (found != VOID) & ((x % 1 - 0.5).abs() > 0.01) & ((y % 1 - 0.5).abs() > 0.01)  # halfway, either neighbour is nearest
    assert told.float().mean() > 0.3
    assert torch.equal(found[told], labels[y[told].round().long(), x[told].round().long()].long())
    corners = torch.unique(torch.stack([x[:, 0, 0], y[:, 0, 0]], 1), dim=0)
    assert len(corners) > (0 if values == {"flip": 1.0} else 10)  # drawn apart for every image


def test_a_flip_alone_is_exact_in_the_mask_and_to_rounding_in_the_image() -> None:
    rows = stored()
    out = transform(flip=1.0).batch(rows, request())
    assert torch.equal(out[:, 3].long(), rows[:, 3].flip(2).long())
    torch.testing.assert_close(out[:, :3], rows[:, :3].float().flip(3) / 255, rtol=0, atol=1e-5)


def test_a_crop_alone_is_a_window_of_the_image() -> None:
    rows = stored(40)
    out = transform(crop=(5, 7)).batch(rows, request(40))
    windows = rows[:, 3].long().unfold(1, 5, 1).unfold(2, 7, 1).flatten(1, 2)  # [B, places, 5, 7]
    hits = (windows == out[:, None, 3].long()).flatten(2).all(2)
    assert hits.any(1).all()
    assert len({tuple(h.nonzero().flatten().tolist()) for h in hits}) > 10  # not one place for all


def test_what_lies_beyond_the_image_is_void_and_of_the_mean_colour() -> None:
    out = transform(scale=(0.5, 0.5)).batch(stored(), request())
    assert (out[:, 3, :6, :8] != VOID).all()
    assert (out[:, 3, 6:] == VOID).all()
    assert (out[:, 3, :, 8:] == VOID).all()
    assert not out[:, :3, 6:].any()  # 0 after normalisation
    assert not out[:, :3, :, 8:].any()


def test_scales_cover_their_range() -> None:
    grid = transform(scale=(0.5, 2.0)).grid(request(2000), *SIZE)
    step = (grid[:, 0, 1, 0] - grid[:, 0, 0, 0]) * SIZE[1] / 2  # pixels of the image in one of the crop: 1 / scale
    assert 0.49 < float(step.min()) < 0.53
    assert 1.85 < float(step.max()) < 2.05
    assert abs(float((1 / step).mean()) - 1.25) < 0.05


def test_a_view_is_a_function_of_seed_view_and_id(tmp_path: Path) -> None:
    data = dataset("camvid", path=str(write_packed(tmp_path / "p")), scale=[0.5, 2.0], input_shape=[3, 8, 8]).load()
    view = torch.full((6,), 4)
    whole = data.rows("train", torch.arange(6), view, seed=1)
    alone = data.rows("train", torch.tensor([5, 2]), view[:2], seed=1)
    assert torch.equal(alone.targets, whole.targets[[5, 2]])
    torch.testing.assert_close(alone.inputs, whole.inputs[[5, 2]], rtol=0, atol=1e-6)
    for other in (data.rows("train", torch.arange(6), view + 1, seed=1), data.rows("train", torch.arange(6), view, seed=2)):
        assert not torch.equal(other.targets, whole.targets)


def test_resize_brings_all_to_one_size(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "camvid")
    data = dataset("camvid", path=str(root), resize=[6, 8]).load()
    assert data.input_shape == (3, 6, 8)
    batch = everything(data)
    assert torch.equal(batch.targets, everything(dataset("camvid", path=str(root)).load()).targets[:, 1::2, 1::2])


def test_decoded_pixels_are_kept_by_what_they_depend_on(tmp_path: Path) -> None:
    root = str(write_folders(tmp_path / "camvid"))
    first = dataset("camvid", path=root).load()
    again = dataset("camvid", path=root).load()
    other = dataset("camvid", path=root, ids=[*range(1, 12)]).load()
    assert first.fingerprint == again.fingerprint
    shifted = everything(other).targets
    assert torch.equal(shifted, torch.where(everything(first).targets == -1, 11, everything(first).targets) - 1)


def damage(root: Path) -> None:
    (root / "train" / "002.png").write_bytes(b"nothing")


def orphan(root: Path) -> None:
    (root / "trainannot" / "003.png").unlink()


def coloured(root: Path) -> None:
    Image.fromarray(blocks(1, 0)[0]).save(root / "trainannot" / "001.png")


def of_another_size(root: Path) -> None:
    image = blocks(1, 0, (8, 8))[0]
    Image.fromarray(image).save(root / "test" / "001.png")
    Image.fromarray(mask(image, [0])).save(root / "testannot" / "001.png")


def larger_than_its_mask(root: Path) -> None:
    Image.fromarray(blocks(1, 0, (20, 20))[0]).save(root / "val" / "001.png")


def nothing_there(root: Path) -> None:
    for file in (root / "valannot").iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("fault", "key", "said"),
    [
        (damage, "dataset.path", "002.png"),
        (orphan, "dataset.masks", "003"),
        (coloured, "dataset.masks", "mode RGB"),
        (of_another_size, "dataset.resize", "8x8"),
        (larger_than_its_mask, "dataset.masks", "20x20"),
        (nothing_there, "dataset.masks", "valannot"),
    ],
)
def test_faults_of_the_files_are_named(fault: Callable[[Path], None], key: str, said: str, tmp_path: Path) -> None:
    fault(write_folders(tmp_path / "camvid"))
    with pytest.raises(Refused) as refused:
        dataset("camvid", path=str(tmp_path / "camvid")).load()
    (problem,) = refused.value.problems
    assert problem.key == key
    assert said in str(problem)
    assert problem.remedy


@pytest.mark.parametrize("name", ["camvid", "cityscapes"])
def test_data_that_are_not_there_are_refused_with_what_to_put_where(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KDRUN_DATA", raising=False)
    for values in ({}, {"path": str(tmp_path / "nowhere")}):
        with pytest.raises(Refused) as refused:
            dataset(name, **values).load()
        (problem,) = refused.value.problems
        assert problem.key == "dataset.path"
        assert "KDRUN_DATA" in problem.remedy
        assert "npz" in problem.remedy
        assert ("gtFine/train" if name == "cityscapes" else "trainannot") in problem.remedy


def test_a_packed_split_that_lacks_an_array_is_refused(tmp_path: Path) -> None:
    root = write_packed(tmp_path / "p")
    np.savez(root / "val.npz", images=np.zeros(3, np.uint8))
    with pytest.raises(Refused, match="offsets"):
        dataset("camvid", path=str(root)).load()


@pytest.mark.parametrize(
    "values",
    [
        {"class_names": []},
        {"classes": 12},
        {"ids": [1, 2]},
        {"ids": [0] * 11},
        {"ids": [*range(250, 261)]},
        {"resize": [3]},
        {"input_shape": [1, 8, 8]},
        {"scale": [2.0, 1.0]},
        {"flip": 1.5},
        {"mean": [0.5, 0.5, 0.5]},
        {"resident": False},
        {"workers": -1},
        {"validation": 0.1},
    ],
)
def test_settings_that_cannot_be_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"=|mean and std|validation"):
        dataset("camvid", **values)


@pytest.mark.realdata
def test_camvid_is_the_segnet_split() -> None:
    folder = Path(os.environ.get("KDRUN_DATA", "/nonexistent")) / "camvid"
    if not folder.is_dir():
        pytest.skip("KDRUN_DATA names no folder with camvid")
    data = dataset("camvid", path=str(folder)).load()
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 367, "validation": 101, "test": 233}
    counts = torch.zeros(12)
    for batch in data.batches("train", 100):
        counts += torch.bincount(batch.targets.flatten() + 1, minlength=12)
    assert (counts > 0).all()
    assert float(counts[0] / counts.sum()) == pytest.approx(0.0394, abs=1e-4)  # Unlabelled
