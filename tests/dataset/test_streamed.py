from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdrun.dataset.base import Data
from kdrun.dataset.images import ImageData
from kdrun.errors import Refused
from tests.dataset.builders import hub_table, labels, pictures, png, splits, write_folder, write_parquet

STATISTICS: dict[str, Any] = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


def photographs(folder: Path, workers: int) -> Data:
    """Images of different sizes, cropped to 16x16."""
    for split, count, seed in (("train", 12, 1), ("test", 6, 2)):
        sizes = [(20 + 3 * (i % 4), 30 - 2 * (i % 3)) for i in range(count)]
        images = [png(pictures(1, seed + i, size)[0]) for i, size in enumerate(sizes)]
        hub_table(images, labels(count)).to_parquet(str(folder / f"{split}.parquet"))
    shape, resize = [3, 16, 16], 18
    return ImageData(
        "photos",
        path=str(folder),
        input_shape=shape,
        resident=False,
        crop="resized",
        eval_resize=resize,
        workers=workers,
        flip=0.5,
        **STATISTICS,
    ).load()


PLAN = [
    (torch.tensor([3, 1, 4]), torch.tensor([0, 0, 7])),
    (torch.tensor([5]), torch.tensor([2])),
    (torch.tensor([9, 2, 6]), torch.tensor([5, 5, 5])),
]


def test_results_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    here, two = photographs(tmp_path, 0), photographs(tmp_path, 2)
    for a, b in zip(here.stream("train", PLAN, seed=3), two.stream("train", PLAN, seed=3), strict=True):
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.view, b.view)
        assert torch.equal(a.targets, b.targets)
    for a, b in zip(here.batches("test", 4), two.batches("test", 4), strict=True):
        assert torch.equal(a.inputs, b.inputs)


def test_a_stream_gives_what_single_requests_give(tmp_path: Path) -> None:
    data = photographs(tmp_path, 2)
    for (index, view), batch in zip(PLAN, data.stream("train", PLAN, seed=3), strict=True):
        alone = data.rows("train", index, view, seed=3)
        assert torch.equal(alone.inputs, batch.inputs)
        one_by_one = torch.cat([data.rows("train", index[i : i + 1], view[i : i + 1], seed=3).inputs for i in range(len(index))])
        assert torch.equal(one_by_one, batch.inputs)


def test_views_differ_and_evaluation_has_none(tmp_path: Path) -> None:
    data = photographs(tmp_path, 0)
    index = torch.arange(12)
    seen = [data.rows("train", index, torch.full_like(index, v), seed=1).inputs for v in (0, 1)]
    assert (seen[0] - seen[1]).flatten(1).abs().amax(1).gt(0).all()
    plain = [data.rows("train", index, torch.full_like(index, v), seed=s, augment=False).inputs for v, s in ((0, 1), (1, 2))]
    assert torch.equal(*plain)


def test_streamed_and_resident_images_are_equal_to_the_last_bit(tmp_path: Path) -> None:
    write_parquet(tmp_path)
    both = [
        ImageData("x", path=str(tmp_path), input_shape=[3, 8, 8], padding=2, flip=0.5, resident=r, workers=0, **STATISTICS).load()
        for r in (True, False)
    ]
    index, view = torch.tensor([11, 0, 5]), torch.tensor([0, 3, 1])
    batches = [d.rows("train", index, view, seed=2) for d in both]
    assert torch.equal(batches[0].inputs, batches[1].inputs)
    assert torch.equal(batches[0].targets, batches[1].targets)
    for a, b in zip(both[0].batches("test", 4), both[1].batches("test", 4), strict=True):
        assert torch.equal(a.inputs, b.inputs)


def test_folders_of_images_are_streamed_too(tmp_path: Path) -> None:
    data = splits()
    write_folder(tmp_path, data)
    loaded = ImageData("x", path=str(tmp_path), input_shape=[3, 8, 8], resident=False, workers=2, **STATISTICS).load()
    seen = torch.cat([b.inputs for b in loaded.batches("train", 5)])
    expected = torch.from_numpy(np.moveaxis(data["train"][0], 3, 1).copy()).float().div(255).sub(0.5).div(0.25)
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_leaves_the_global_generators_alone(tmp_path: Path, workers: int) -> None:
    data = photographs(tmp_path, workers)
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    list(data.stream("train", PLAN, seed=3))
    data.rows("train", *PLAN[0], seed=3)
    assert torch.equal(torch.rand(3), expected)


def test_a_plan_may_be_endless(tmp_path: Path) -> None:
    stream = photographs(tmp_path, 2).stream("train", itertools.cycle(PLAN), seed=3)
    ids = [next(stream).ids.tolist() for _ in range(5)]
    assert ids == [[3, 1, 4], [5], [9, 2, 6], [3, 1, 4], [5]]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named_with_its_row(tmp_path: Path, workers: int) -> None:
    for split, broken in (("train", 7), ("test", None)):
        images = [png(p)[: 40 if i == broken else None] for i, p in enumerate(pictures(12))]
        hub_table(images, labels(12)).to_parquet(str(tmp_path / f"{split}.parquet"))
    data = ImageData("x", path=str(tmp_path), input_shape=[3, 8, 8], resident=False, workers=workers, **STATISTICS).load()
    with pytest.raises(Refused) as refused:
        list(data.batches("train", 4))
    assert "row 7" in refused.value.problems[0].what
    assert refused.value.problems[0].remedy


def test_an_image_of_another_size_is_named_with_its_row(tmp_path: Path) -> None:
    write_parquet(tmp_path)
    data = ImageData("x", path=str(tmp_path), input_shape=[3, 9, 8], resident=False, workers=0, **STATISTICS).load()
    with pytest.raises(Refused, match="row 2: 8x8 pixels, not 9x8"):
        data.rows("train", torch.tensor([2]), torch.tensor([0]), seed=1)
