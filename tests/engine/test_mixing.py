"""Runs on images that are mixed of two: the laws hold for them as for others, and what cannot be is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kdrun.engine.mixing import TAKERS
from tests.conftest import Outcome, write_parquet
from tests.engine.processes import kdrun_to_end
from tests.engine.running import (
    assert_bit_equal,
    assert_same_run,
    assert_same_training,
    resume,
    run,
    run_killed,
    training_lines,
    weights,
)

MIXED = ["dataset.mixup=0.8", "dataset.cutmix=1.0", "dataset.mix_probability=0.8"]
AUGMENTED = ["dataset.color_jitter=[0.4,0.4,0.4,0.1]", "dataset.rand_augment=[1,9]", "dataset.erasing=0.3", "dataset.lighting=0.1"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """48 pictures in batches of 20: three steps an epoch, the last of 8."""
    folder = write_parquet(tmp_path_factory.mktemp("pictures"), "image", {"label": 4}, 8, {"train": 48, "test": 20})
    return [
        "dataset=folder", f"dataset.path={folder}", "dataset.crop=pad", "dataset.resident=true", "dataset.padding=1",
        "dataset.input_shape=[3,8,8]", "teacher=mlp", "teacher.hidden=[16]", "teacher.fit={optim.epochs: 1}", "student=mlp",
        "student.hidden=[8]", "objective=kd", "optim=adamw", "optim.lr=0.01", "source.batch_size=20", "optim.epochs=3", "hardware=cpu",
        "hardware.threads=1", "run.log_every=1", "run.checkpoint_every=0.6", *MIXED,
    ]  # fmt: skip


@pytest.mark.parametrize("more", [[], AUGMENTED], ids=["mixed", "augmented"])
def test_accumulation_does_not_change_gradients(more: list[str], images: list[str], tmp_path: Path) -> None:
    for folder, split in {"whole": "null", "uneven": "[13,4,3]"}.items():
        run([*images, *more, "optim=momentum", "optim.lr=0.01", f"hardware.micro_batch={split}"], tmp_path / folder)
    assert_same_training(tmp_path / "uneven", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["kd", "dist"])  # dist sees the rows of both ranks at once
def test_two_ranks_train_what_one_process_trains(objective: str, images: list[str], tmp_path: Path) -> None:
    words = [*images, f"objective={objective}", "optim=momentum", "optim.lr=0.01"]
    run(words, tmp_path / "one")
    ranks = ["hardware=multi_gpu", "hardware.device=cpu", "hardware.procs=2"]
    done = kdrun_to_end("train", *words, *ranks, f"run.dir={tmp_path / 'two'}", f"run.root={tmp_path / 'root'}", "--json")
    assert done.returncode == 0, done.stderr
    assert_same_training(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("step", [2, 4])
def test_a_killed_run_is_resumed_to_the_same_bytes(step: int, images: list[str], tmp_path: Path) -> None:
    words, whole, broken = [*images, *AUGMENTED], tmp_path / "a" / "run", tmp_path / "b" / "run"
    run(words, whole)
    run_killed(words, broken, "step_done", step)
    resume(words, broken)
    assert_same_run(broken, whole)


def test_what_the_teacher_said_of_mixed_images_is_kept_and_replayed(images: list[str], tmp_path: Path) -> None:
    exact = [*images, "cache=dense", "cache.dtype=fp32"]
    run(images, tmp_path / "live")
    cold, warm = run(exact, tmp_path / "cold"), run(exact, tmp_path / "warm")
    assert_bit_equal(weights(tmp_path / "cold"), weights(tmp_path / "live"))
    assert_same_run(tmp_path / "warm", tmp_path / "cold")
    assert (cold["cache"]["asked"], warm["cache"]["read"]) == (3 * 48, 3 * 48 - 20)
    other = run([*exact, "dataset.mixup=0.4"], tmp_path / "other")
    assert other["cache"]["folder"] != cold["cache"]["folder"]


def test_images_that_are_only_mixed_have_a_view_for_every_epoch(images: list[str], tmp_path: Path) -> None:
    plain = [*images, "dataset.padding=0", "dataset.flip=0", "cache=dense"]
    assert run(plain, tmp_path / "mixed")["cache"]["asked"] == 3 * 48
    assert run([*plain, "dataset.mixup=0", "dataset.cutmix=0"], tmp_path / "alone")["cache"]["asked"] == 48 + 20


def test_mixing_changes_the_labels_term(images: list[str], tmp_path: Path) -> None:
    words = [*images, "objective=ce", "teacher=none"]
    words = [w for w in words if not w.startswith("teacher.")]
    for name, more in {"mixed": [], "alone": ["dataset.mixup=0", "dataset.cutmix=0"]}.items():
        run([*words, *more], tmp_path / name)
    assert training_lines(tmp_path / "mixed")[0]["loss"] != training_lines(tmp_path / "alone")[0]["loss"]


@pytest.mark.parametrize(
    ("more", "key", "remedy"),
    [
        (["objective=dkd"], "dataset.mixup", f"dataset.mixup=0 dataset.cutmix=0, or objective={TAKERS}"),
        (["objective=pld", "dataset.mixup=0"], "dataset.cutmix", "dataset.cutmix=0, or objective="),
        (["objective=ps_kd", "teacher=none"], "dataset.mixup", "or objective="),
        (["source.augment=false"], "dataset.mixup", "or source.augment=true"),
        (["+teacher.corrupt=0.2"], "dataset.mixup", "or teacher.corrupt=0"),
        (["dataset.mixup=-1"], "dataset.mixup", "legal range [0, inf)"),
        (["dataset.mix_up=1"], "dataset.mix_up", "mixup"),
        (["dataset.auto_augment=cifar"], "dataset.auto_augment", "cifar10"),
    ],
)
def test_what_mixed_images_do_not_go_with_is_refused(
    more: list[str], key: str, remedy: str, images: list[str], tmp_path: Path, kdrun: Callable[..., Outcome]
) -> None:
    words = [w for w in images if "teacher=none" not in more or not w.startswith("teacher.")]
    refused = kdrun("train", *words, *more, f"run.dir={tmp_path / 'run'}")
    assert refused.code == 2
    assert f"{key}: " in refused.err
    assert remedy in refused.err
    assert list(tmp_path.iterdir()) == []
