"""Runs with a cache: the same losses as live, the same bytes whether a row was there, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kdrun.cache.manifest import caches, read_manifest
from kdrun.cache.wanted import _described
from kdrun.errors import CheckFailed, Refused
from kdrun.losses.divergence import cross_entropy, kl_divergence
from kdrun.losses.sparse import rest_bucket
from kdrun.objective.kd import KD
from kdrun.teacher.live import LiveTeacher
from kdrun.types import Batch, Kept, Output, Signal
from tests.conftest import Outcome, run_cli
from tests.engine.processes import kdrun_to_end
from tests.engine.running import (
    Notes,
    assert_bit_equal,
    assert_same_run,
    assert_same_training,
    resume,
    run,
    run_killed,
    training_lines,
    weights,
)

# 48 images in batches of 20: three steps an epoch, the last of 8; every epoch another view.
IMAGES = [
    "dataset=digits", "dataset.subset=48", "dataset.subset_test=20", "dataset.padding=1", "teacher=mlp", "teacher.hidden=[16]",
    "teacher.fit={optim.epochs: 1}", "student=mlp", "student.hidden=[8]", "objective=kd", "optim=adamw", "optim.lr=0.01",
    "source.batch_size=20", "optim.epochs=3", "hardware=cpu", "hardware.threads=1", "run.log_every=1", "run.checkpoint_every=0.6",
]  # fmt: skip
EXACT = ["cache=dense", "cache.dtype=fp32"]


def folders(tmp_path: Path) -> list[Path]:
    return list(caches(tmp_path / "root" / "cache"))


def test_exact_rows_train_what_the_live_teacher_trains(tmp_path: Path) -> None:
    run(IMAGES, tmp_path / "live")
    first = run([*IMAGES, *EXACT], tmp_path / "cold")
    again = run([*IMAGES, *EXACT], tmp_path / "warm")
    live, cold = training_lines(tmp_path / "live"), training_lines(tmp_path / "cold")
    assert cold[0]["loss"] == pytest.approx(live[0]["loss"], rel=1e-6)
    assert_bit_equal(weights(tmp_path / "cold"), weights(tmp_path / "live"))
    assert_bit_equal(weights(tmp_path / "warm"), weights(tmp_path / "live"))
    assert (first["cache"]["asked"], first["cache"]["read"]) == (3 * 48, 0)
    # The first batch that is read is held against the live teacher, once.
    assert (again["cache"]["asked"], again["cache"]["read"]) == (20, 3 * 48 - 20)
    assert first["cache"]["folder"] == again["cache"]["folder"]


@pytest.mark.parametrize(
    ("cache", "near"), [(["cache=dense"], 1e-3), (["cache=int8"], 0.02), (["cache=topk", "cache.k=6", "cache.dtype=fp32"], 0.5)]
)
def test_coarser_rows_start_near_the_live_loss_and_are_the_same_cold_and_warm(cache: list[str], near: float, tmp_path: Path) -> None:
    run(IMAGES, tmp_path / "live")
    for name in ("cold", "warm"):
        run([*IMAGES, *cache], tmp_path / name)
    live, cold = (training_lines(tmp_path / name)[0] for name in ("live", "cold"))
    assert cold["terms"]["kd"] == pytest.approx(live["terms"]["kd"], rel=near)
    assert cold["terms"]["kd"] != live["terms"]["kd"]
    if cache[0] == "cache=topk":
        assert cold["terms"]["kd"] < live["terms"]["kd"]  # a lower bound
    assert_same_run(tmp_path / "warm", tmp_path / "cold")


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_that_is_killed_while_it_fills_its_cache_is_the_unbroken_one(step: int, tmp_path: Path) -> None:
    whole = tmp_path / "a" / "run"
    run([*IMAGES, "cache=dense"], whole)
    broken = tmp_path / "b" / "run"
    run_killed([*IMAGES, "cache=dense"], broken, "step_done", step)
    summary = resume([*IMAGES, "cache=dense"], broken)
    assert_same_run(broken, whole)
    assert summary["cache"]["read"] > 0  # what the killed run had written after its last checkpoint is used


def test_a_cache_is_shared_by_objectives_and_not_by_seeds_views_or_teachers(tmp_path: Path) -> None:
    run([*IMAGES, "cache=dense"], tmp_path / "kd")
    assert run([*IMAGES, "objective=dkd", "cache=dense"], tmp_path / "dkd")["cache"]["read"] == 3 * 48 - 20
    assert len(folders(tmp_path)) == 1
    run([*IMAGES, "cache=dense", "seed=2"], tmp_path / "seed")
    assert len(folders(tmp_path)) == 2
    run([*IMAGES, "cache=dense", "teacher.seed=1"], tmp_path / "teacher")
    assert len(folders(tmp_path)) == 3
    run([*IMAGES, "cache=dense", "dataset.padding=2"], tmp_path / "transform")
    assert len(folders(tmp_path)) == 4


def test_without_augmentation_one_view_serves_every_epoch_and_seed(tmp_path: Path) -> None:
    plain = [*IMAGES, "dataset.padding=0", "cache=dense"]
    first = run(plain, tmp_path / "one")
    assert (first["cache"]["asked"], first["cache"]["read"]) == (48 + 20, 2 * 48 - 20)
    assert run([*plain, "seed=2"], tmp_path / "two")["cache"]["asked"] <= 20
    (folder,) = folders(tmp_path)
    assert read_manifest(folder)["made_of"]["seed"] is None
    few = [*IMAGES, "source.views=2", "optim.epochs=4", "cache=dense"]
    assert run(few, tmp_path / "views")["cache"]["read"] == 2 * 48 - 20  # two views, each asked once


def test_rows_before_step_0_and_evaluation_are_not_taken_from_it(tmp_path: Path) -> None:
    """The walk over the training rows is not augmented: its rows are no view of the cache, though they have the same ids."""
    crd = [*IMAGES, "objective=dist", "evaluation.every_epochs=1", "cache=dense", "cache.dtype=fp32"]
    run(crd, tmp_path / "cold")
    run(crd, tmp_path / "warm")
    run([word for word in crd if not word.startswith("cache")], tmp_path / "live")
    assert_bit_equal(weights(tmp_path / "warm"), weights(tmp_path / "live"))
    assert_same_run(tmp_path / "warm", tmp_path / "cold")


def test_features_are_kept_too(tmp_path: Path) -> None:
    words = [*IMAGES, "objective=rkd"]
    run(words, tmp_path / "live")
    run([*words, *EXACT], tmp_path / "cold")
    summary = run([*words, *EXACT], tmp_path / "warm")
    assert_bit_equal(weights(tmp_path / "warm"), weights(tmp_path / "live"))
    assert summary["cache"]["read"] == 3 * 48 - 20
    (folder,) = folders(tmp_path)
    form = read_manifest(folder)["made_of"]["format"]
    assert form["taps"] == {"pooled": [16]}
    assert form["logits"] is None  # RKD looks at features alone


def test_a_row_of_another_teacher_is_found_out_at_the_first_batch(tmp_path: Path) -> None:
    run([*IMAGES, "cache=dense"], tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        original = LiveTeacher.signal

        def wrong(self: LiveTeacher, batch: Batch, needs: Any) -> Signal:
            said = original(self, batch, needs)
            return said if said.logits is None else said._replace(logits=said.logits.roll(1, 0))

        patch.setattr(LiveTeacher, "signal", wrong)
        with pytest.raises(CheckFailed, match="does not hold what this teacher says"):
            run([*IMAGES, "cache=dense"], tmp_path / "misaligned")


def test_uneven_micro_batches_train_the_same(tmp_path: Path) -> None:
    run([*IMAGES, *EXACT], tmp_path / "whole")
    run([*IMAGES, *EXACT, "hardware.micro_batch=7"], tmp_path / "cut")
    assert_same_training(tmp_path / "cut", tmp_path / "whole", rtol=1e-4)


@pytest.mark.slow
def test_two_ranks_fill_one_cache(tmp_path: Path) -> None:
    run([*IMAGES, *EXACT], tmp_path / "one")
    ranks = ["hardware=multi_gpu", "hardware.device=cpu", "hardware.procs=2", "hardware.threads=1"]
    words = [word for word in IMAGES if not word.startswith("hardware")]
    done = kdrun_to_end("train", *words, *EXACT, *ranks, f"run.dir={tmp_path / 'two'}", f"run.root={tmp_path / 'other'}", "--json")
    assert done.returncode == 0, done.stderr
    assert_same_training(tmp_path / "two", tmp_path / "one", rtol=1e-4)
    assert len(list(caches(tmp_path / "other" / "cache"))) == 1
    assert run_cli("cache", "ls", "--root", str(tmp_path / "other"), "--json").json[0]["filled"] == 1.0


def test_kd_of_kept_rows_is_written_out() -> None:
    torch.manual_seed(0)
    student, teacher, targets = torch.randn(5, 7), torch.randn(5, 7), torch.arange(5)
    kept = Kept(*(part[..., :6] if part.dim() == 2 else part for part in _kept(teacher / 4.0, 6)))
    batch = Batch(torch.zeros(5, 1), targets, targets, torch.zeros(5), {})
    terms = KD().terms(Output(student, {}, {}), Signal(None, {}, kept), batch, "student", torch.nn.ModuleDict())
    assert float(terms["kd"].sum) == pytest.approx(16 * float(kl_divergence(student, teacher, 4.0).sum()), rel=1e-5)  # K = C - 1
    assert float(terms["kd"].sum) == pytest.approx(16 * float(rest_bucket(student, *kept, temperature=4.0).sum()), rel=1e-6)
    assert float(terms["ce"].sum) == pytest.approx(float(cross_entropy(student, targets).sum()), rel=1e-6)


def _kept(scaled: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    log_probs = scaled.log_softmax(-1)
    largest, ids = log_probs.topk(k, -1)
    return ids, largest, log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1)


@pytest.mark.parametrize("words", [["objective=ce"], ["objective=ce", "teacher=none"]])
def test_an_arm_that_hears_no_teacher_keeps_nothing(words: list[str], tmp_path: Path) -> None:
    """Labels alone, beside arms that are taught."""
    base = [w for w in IMAGES if not (w.startswith("teacher") and "teacher=none" in words)]
    assert "cache" not in run([*base, *words, "cache=dense"], tmp_path / "run")
    assert folders(tmp_path) == []


def test_what_a_network_does_with_its_weights_is_a_part_of_who_it_is() -> None:
    def network(slope: float = 0.0, eps: float = 1e-5) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3, eps=eps), torch.nn.LeakyReLU(slope))

    node = {"_target_": "mine.net", "width": 3, "checkpoint": "a", "seed": 1, "name": "here"}
    one = _described(node, network())
    assert one == _described({**node, "checkpoint": "b", "seed": 2, "name": "there"}, network())
    others = [_described(node, network(slope=0.5)), _described(node, network(eps=1e-2)), _described({**node, "scale": 2.0}, network())]
    assert len({one, *others}) == 4


@pytest.mark.parametrize(
    ("words", "key", "remedy"),
    [
        (["objective=dkd", "cache=topk", "cache.k=3"], "cache.format", "cache=dense"),
        (["cache=topk"], "cache.k", "1 to 9"),
        (["teacher=ema", "teacher.fit={}", "cache=dense"], "cache.format", "cache=off"),
        (["cache=dense", "cache.limit_gb=0.000001"], "cache.limit_gb", "cache=int8"),
        (["cache=dense", "cache.path=nowhere"], "cache.path", "kdrun cache ls"),
        (["+teacher.corrupt=0.5", "cache=dense"], "cache.format", "cache=off"),
        (["cache.format=sparse"], "cache.format", "dense"),
        (["cache=dens"], "cache", "dense"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_a_remedy(words: list[str], key: str, remedy: str, tmp_path: Path) -> None:
    base = [w for w in IMAGES if not (w.startswith("teacher.") and "teacher=ema" in words)]
    words = [w for w in words if w != "teacher.fit={}"]
    with pytest.raises(Refused) as refused:
        run([*base, *words], tmp_path / "run")
    found = {problem.key: problem.remedy for problem in refused.value.problems}
    assert remedy in found[key]
    assert not (tmp_path / "run").exists()


def test_a_named_cache_must_fit(tmp_path: Path) -> None:
    run([*IMAGES, "cache=dense"], tmp_path / "run")
    (folder,) = folders(tmp_path)
    assert run([*IMAGES, "cache=dense", f"cache.path={folder}"], tmp_path / "fits")["cache"]["read"] > 0
    for words, what in (
        (["seed=2"], "another seed"),
        (["cache=int8"], "another format"),
        (["dataset.padding=2"], "another data set or transform"),
    ):
        with pytest.raises(Refused, match=what):
            run([*IMAGES, "cache=dense", f"cache.path={folder}", *words], tmp_path / "other")
        assert not (tmp_path / "other").exists()


def test_the_plan_is_told_before(tmp_path: Path) -> None:
    notes = Notes()
    run([*IMAGES, "cache=dense"], tmp_path / "run", notes)
    (line,) = (note for note in notes.notes if note.startswith("teacher cache"))
    assert "3 views of 48 samples" in line
    assert "0 % of it is there" in line
    told: Outcome = run_cli("plan", *IMAGES, "cache=dense", "--no-probe")
    assert "3 views of 48 samples" in " ".join(told.out.split())
    assert len(folders(tmp_path)) == 1  # planning makes none
