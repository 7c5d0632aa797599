"""Law 2, the files: a checkpoint exists whole or not at all, and a damaged one is recognised."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from kdrun.engine import state

CONTENT = {
    "learner": {"student.weight": torch.arange(6.0).reshape(2, 3), "step": torch.tensor(3)},
    "optimizers": {
        "student": {
            "state": {0: {"momentum": torch.ones(2), "step": 5}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0]}],
        }
    },
    "ema": None,
    "history": [{"epoch": 1.0, "test": {"top1": 50.0}}, []],
    "bf16": torch.ones(2, dtype=torch.bfloat16),
}


def assert_same(a: object, b: object) -> None:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert isinstance(b, dict)
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert isinstance(b, (list, tuple))
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    step, loaded = state.load(state.save(tmp_path, 7, CONTENT, keep=2))
    assert step == 7
    assert_same(loaded, CONTENT)


def test_memory_formats_and_shared_storage_do_not_matter(tmp_path: Path) -> None:
    image = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    content = {"a": image, "b": image, "c": image[:, 1]}
    assert_same(state.load(state.save(tmp_path, 1, content, keep=1))[1], content)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 30, 4000):
        state.save(tmp_path, step, CONTENT, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000030", "step-00004000"]


def test_a_value_that_cannot_be_kept_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="objective/bank"):
        state.save(tmp_path, 1, {"objective": {"bank": object()}}, keep=1)
    assert state.newest(tmp_path) is None


def test_an_interrupted_save_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state.save(tmp_path, 1, CONTENT, keep=2)

    def crash(*arguments: object) -> None:
        raise OSError("power failure")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="power failure"):
        state.save(tmp_path, 2, CONTENT, keep=2)
    found = state.newest(tmp_path)
    assert found is not None
    assert (found[0], found[2]) == (1, [])


@pytest.mark.parametrize("damage", ["truncated tensors", "changed tensors", "truncated json", "missing tensors", "changed json"])
def test_a_damaged_checkpoint_is_passed_over_with_a_remark(tmp_path: Path, damage: str) -> None:
    state.save(tmp_path, 1, CONTENT, keep=3)
    newest = state.save(tmp_path, 2, CONTENT, keep=3)
    tensors, document = newest / state.TENSORS, newest / state.STATE
    if damage == "truncated tensors":
        tensors.write_bytes(tensors.read_bytes()[:-20])
    elif damage == "changed tensors":
        content = bytearray(tensors.read_bytes())
        content[-1] ^= 1
        tensors.write_bytes(bytes(content))
    elif damage == "truncated json":
        document.write_text(document.read_text()[:50])
    elif damage == "missing tensors":
        tensors.unlink()
    else:
        document.write_text(document.read_text().replace("50.0", "99.0"))
    found = state.newest(tmp_path)
    assert found is not None
    assert found[0] == 1
    assert "step-00000002" in found[2][0]


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert state.newest(tmp_path / "nowhere") is None
