"""Small data in the schema of the real sets, so that every recipe can take two real steps anywhere."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import write_parquet

# Networks of timm's own tests: the real stems and heads of a timm model in half a million parameters.
TINY_MODEL = "test_resnet.r160_in1k"
CPU = ["hardware=cpu", "hardware.threads=1"]


def write_imagenet(folder: Path) -> Path:
    """One training picture of each of the 1000 classes, in the schema of ILSVRC/imagenet-1k."""
    return write_parquet(folder, "image", {"label": 1000}, 8, {"train": 1000, "validation": 8})


def stand_in(dataset: str, folders: dict[str, Path]) -> list[str]:
    """The overrides that put the stand-in of a data set under a recipe; `folders` by data set."""
    if dataset in ("digits", "gaussians"):
        return CPU
    if dataset == "cifar100":
        return [*CPU, f"dataset.path={folders[dataset]}", "source.batch_size=8", "dataset.subset_test=10"]
    if dataset == "imagenet":
        models = [f"teacher.name={TINY_MODEL}", f"student.name={TINY_MODEL}", "teacher.pretrained=false", "teacher.claim=null"]
        return [*CPU, *models, f"dataset.path={folders[dataset]}", "source.batch_size=4", "dataset.subset_test=8", "dataset.workers=0"]
    raise NotImplementedError(f"write a stand-in for the data set '{dataset}', so that its recipes are tested")
