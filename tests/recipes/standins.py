"""Small data in the schema of the real sets, so that every recipe can take two real steps anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_parquet
from tests.dataset import pairs
from tests.dataset.annotated import write_coco
from tests.dataset.graphs import PITFALLS_FILES, PLANETOID_CLASSES, write_archive, write_pitfalls

# Networks of timm's own tests: the real stems and heads of a timm model in half a million parameters.
TINY_MODEL = "test_resnet.r160_in1k"
CPU = ["hardware=cpu", "hardware.threads=1"]


def write_imagenet(folder: Path) -> Path:
    """One training picture of each of the 1000 classes, in the schema of ILSVRC/imagenet-1k."""
    return write_parquet(folder, "image", {"label": 1000}, 8, {"train": 1000, "validation": 8})


def write_labelled(folder: Path) -> dict[str, Path]:
    """Pictures of ten classes in the sizes of CIFAR-10 and STL-10."""
    rows = {"train": 20, "test": 10}
    schemas = {
        "cifar10": ("img", 32, "RGB"),
        "stl10": ("image", 96, "RGB"),
        "mnist": ("image", 28, "L"),
        "fashion_mnist": ("image", 28, "L"),
    }
    return {name: write_parquet(folder / name, column, {"label": 10}, size, rows, mode) for name, (column, size, mode) in schemas.items()}


def write_graphs(folder: Path) -> dict[str, Path]:
    """The real graphs in small, by data set."""
    found = {name: write_archive(folder, name) for name in PLANETOID_CLASSES}
    return found | {name: write_pitfalls(folder, name) for name in PITFALLS_FILES}


def write_pairs(folder: Path) -> dict[str, Path]:
    """Images with masks or boxes, by data set."""
    found = {"camvid": pairs.write_packed(folder / "camvid"), "cityscapes": pairs.write_cities(folder / "cityscapes")}
    return found | {"coco": write_coco(folder / "coco", classes=80)}


def fewer_queries(tree: Mapping[str, Any]) -> list[str]:
    """Rounds of queries and validation rows beside the batches that a stand-in can give."""
    held_out = ["source.held_out=4"] if tree["source"].get("held_out") else []
    return held_out + (["plan.labelled=20", "plan.budget=4"] if tree["plan"].get("labelled") else [])


def stand_in(dataset: str, folders: dict[str, Path], plan: str = "single") -> list[str]:
    """The overrides that put the stand-in of a data set under a recipe; `folders` by data set."""
    if plan == "federated" and dataset in folders:
        return [*CPU, f"dataset.path={folders[dataset]}", "dataset.subset=null", "dataset.subset_test=10", "plan.extractor=null"]
    if dataset in ("digits", "gaussians", "regions", "stripes", "glyphs", "noise", "bimodal", "topics"):
        return CPU
    if dataset == "camvid":
        return [*CPU, f"dataset.path={folders[dataset]}", "dataset.subset=6"]
    if dataset == "cityscapes":
        small = [f"{who}.{key}" for who in ("teacher", "student") for key in (f"name={TINY_MODEL}", "width=8", "pretrained_backbone=false")]
        shape = [f"dataset.path={folders[dataset]}", "dataset.input_shape=[3,32,64]", "dataset.workers=0", "source.batch_size=2"]
        return [*CPU, *small, *shape, "teacher.claim=null"]
    if dataset == "coco":
        small = [f"{who}.{key}" for who in ("teacher", "student") for key in ("name=plain", "width=8", "pretrained_backbone=false")]
        shape = [f"dataset.path={folders[dataset]}", "dataset.input_shape=[3,64,96]", "dataset.workers=0", "source.batch_size=2"]
        return [*CPU, *small, *shape]
    if dataset == "cifar100":
        return [*CPU, f"dataset.path={folders[dataset]}", "source.batch_size=8", "dataset.subset_test=10"]
    if dataset == "imagenet":
        # ++: some recipes have no teacher, and so not these keys.
        models = [f"++teacher.name={TINY_MODEL}", f"student.name={TINY_MODEL}", "++teacher.pretrained=false", "++teacher.claim=null"]
        return [*CPU, *models, f"dataset.path={folders[dataset]}", "source.batch_size=4", "dataset.subset_test=8", "dataset.workers=0"]
    if dataset == "nsl_kdd":
        return [*CPU, f"dataset.path={folders[dataset]}", "dataset.subset=40"]
    if dataset == "csbm":
        return CPU
    if dataset in (*PLANETOID_CLASSES, *PITFALLS_FILES):
        return [*CPU, "teacher.hidden=[8]", "student.hidden=[8]", f"dataset.path={folders[dataset]}"]
    if dataset == "modes":
        return [*CPU, "dataset.n_train=512", "dataset.n_test=64", "evaluation.calls=2"]
    if dataset in ("cifar10", "stl10"):
        pytest.importorskip("diffusers")
        sizes = ("size=16", "attention_at=8", "channels=32", "multipliers=[1,1]", "blocks=1")
        nets = [f"{who}.{key}" for who in ("teacher", "student") for key in sizes]
        shape = ["dataset.input_shape=[3,16,16]", "++dataset.resize=16", f"dataset.path={folders[dataset]}"]
        few = ["source.batch_size=4", "teacher.fit.source.batch_size=4", "evaluation.samples=1", "evaluation.calls=1"]
        return [*CPU, *nets, *few, *shape, "evaluation.fid=false", "evaluation.primary=calls"]
    raise NotImplementedError(f"write a stand-in for the data set '{dataset}', so that its recipes are tested")
