"""Texts with a cache: an item is a scored token, so what is kept lies at its exact position however a row is cut, padded or packed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kdrun.cache.manifest import caches, read_manifest
from kdrun.errors import Refused
from kdrun.losses.sparse import rest_bucket
from kdrun.objective.lm_kd import LanguageKD
from kdrun.types import Kept
from tests.conftest import run_cli
from tests.dataset.texts import uneven_run
from tests.engine.running import assert_bit_equal, assert_same_run, assert_same_training, resume, run, run_killed, training_lines, weights

EXACT = ["cache=dense", "cache.dtype=fp32"]
TOP = ["cache=topk", "cache.k=7", "cache.dtype=fp32"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdrun.engine.session.plot_curves", lambda folder: None)


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """A small Llama learns from another one, on sequences of uneven length."""
    return [*uneven_run(tmp_path / "teacher.safetensors"), "objective=lm_kd", "objective.ce_weight=0.5"]


def cached(folder: Path) -> Path:
    (found,) = caches(folder / "root" / "cache")
    return found


def test_exact_rows_train_what_the_live_teacher_trains(texts: list[str], tmp_path: Path) -> None:
    run(texts, tmp_path / "live")
    run([*texts, *EXACT], tmp_path / "cold")
    summary = run([*texts, *EXACT], tmp_path / "warm")
    assert training_lines(tmp_path / "cold")[0]["loss"] == pytest.approx(training_lines(tmp_path / "live")[0]["loss"], rel=1e-6)
    assert_same_training(tmp_path / "cold", tmp_path / "live")
    assert_bit_equal(weights(tmp_path / "warm"), weights(tmp_path / "cold"))
    assert summary["cache"]["read"] > 0
    manifest = read_manifest(cached(tmp_path))
    assert manifest["made_of"]["seed"] is None  # a text is the same in every epoch and for every seed
    assert sum(manifest["counts"]) > manifest["samples"]


def test_rows_do_not_depend_on_how_a_batch_was_cut(texts: list[str], tmp_path: Path) -> None:
    """Filled in uneven micro-batches, padded to other lengths, read in whole batches."""
    run([*texts, *EXACT, "hardware.micro_batch=[2,9]"], tmp_path / "cut")
    run([*texts, *EXACT], tmp_path / "whole")
    run(texts, tmp_path / "live")
    assert_same_training(tmp_path / "whole", tmp_path / "live", rtol=1e-4)
    assert_same_training(tmp_path / "cut", tmp_path / "live", rtol=1e-4)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tv", "skew_forward", "skew_reverse"])
def test_every_divergence_of_the_kept_tokens_is_a_lower_bound(divergence: str, texts: list[str], tmp_path: Path) -> None:
    words = [*texts, f"objective.divergence={divergence}", "run.max_steps=1"]
    run(words, tmp_path / "live")
    run([*words, *TOP], tmp_path / "top")
    live, top = (training_lines(tmp_path / name)[0]["terms"] for name in ("live", "top"))
    assert 0 < top["kd"] < live["kd"]
    assert top["ce"] == pytest.approx(live["ce"], rel=1e-6)


def test_chunks_of_kept_tokens_are_the_whole(texts: list[str], tmp_path: Path) -> None:
    for cache in (EXACT, TOP):
        name = cache[0].partition("=")[2]
        run([*texts, *cache, "objective.projection=whole"], tmp_path / f"{name}-whole")
        run([*texts, *cache, "objective.projection=chunked"], tmp_path / f"{name}-chunked")
        assert_same_training(tmp_path / f"{name}-chunked", tmp_path / f"{name}-whole", rtol=1e-4)


def test_a_killed_run_on_texts_is_the_unbroken_one(texts: list[str], tmp_path: Path) -> None:
    words = [*texts, *TOP]
    run(words, tmp_path / "a" / "run")
    run_killed(words, tmp_path / "b" / "run", "step_done", 3)
    resume(words, tmp_path / "b" / "run")
    assert_same_run(tmp_path / "b" / "run", tmp_path / "a" / "run")


def test_another_setting_of_the_teacher_is_another_cache(texts: list[str], tmp_path: Path) -> None:
    """The same weights under another epsilon say something else."""
    run([*texts, *TOP], tmp_path / "one")
    summary = run([*texts, *TOP, "+teacher.config.layer_norm_epsilon=0.01"], tmp_path / "other")
    assert summary["cache"]["read"] < summary["cache"]["asked"]
    assert len(list(caches(tmp_path / "root" / "cache"))) == 2


def test_verify_reads_texts(texts: list[str], tmp_path: Path) -> None:
    run([*texts, *TOP], tmp_path / "run")
    found = run_cli("cache", "verify", cached(tmp_path).name, "--root", str(tmp_path / "root"), "--allow", "tests", "--json")
    assert found.code == 0, found.err
    assert found.json["damaged"] == 0
    assert found.json["teacher_top1"] is not None


def test_a_cache_of_another_tokenizer_is_refused_by_name(texts: list[str], tmp_path: Path) -> None:
    run([*texts, *TOP], tmp_path / "run")
    file = cached(tmp_path) / "manifest.json"
    made = read_manifest(file.parent)["made_of"]
    file.write_text(file.read_text().replace(str(made["vocabulary"]), "0" * 64))
    with pytest.raises(Refused, match="another tokenizer"):
        run([*texts, *TOP, f"cache.path={file.parent}"], tmp_path / "other")


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["objective=taid"], "cache=dense"),
        (["source=rollout", "source.batch_size=2", "source.max_new_tokens=4"], "source=loader"),
    ],
)
def test_what_cannot_be_kept_of_texts_is_refused(words: list[str], remedy: str, texts: list[str], tmp_path: Path) -> None:
    base = [word for word in texts if not word.startswith(("objective", "source"))]
    with pytest.raises(Refused) as refused:
        run([*base, *([] if "objective" in words[0] else ["objective=lm_kd"]), *words, *TOP], tmp_path / "run")
    assert any(remedy in problem.remedy for problem in refused.value.problems)


@pytest.mark.parametrize(
    ("missing", "value"), [("bucket", 0.619997), ("zero", 0.999984), ("renormalised", 0.462117), ("truncated", 0.768985)]
)
def test_every_reading_of_what_is_missing(missing: str, value: float) -> None:
    """zT = [2, 1, 0, -1], zS = [0, 1, .5, 0], two kept."""
    teacher, student = torch.tensor([[2.0, 1, 0, -1]]).double(), torch.tensor([[0, 1, 0.5, 0]]).double()
    log_p = teacher.log_softmax(-1)
    kept = Kept(torch.tensor([[0, 1]]), log_p[:, :2], log_p[:, 2:].logsumexp(-1))
    found = LanguageKD(missing=missing)._loss(student, *kept)  # type: ignore[arg-type]
    assert float(found) == pytest.approx(value, abs=5e-7)
    if missing == "bucket":
        assert float(found) == pytest.approx(float(rest_bucket(student, *kept)), abs=1e-12)


def test_readings_other_than_the_bucket_are_of_forward_kl() -> None:
    with pytest.raises(ValueError, match="missing=zero: of forward_kl alone"):
        LanguageKD(divergence="jsd", missing="zero")
    with pytest.raises(ValueError, match="legal values bucket"):
        LanguageKD(missing="none")  # type: ignore[arg-type]
