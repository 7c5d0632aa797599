"""Law 2, the files within a run: any state comes back, and a disk that fails or lies costs no more than the steps since."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdrun.engine import state
from kdrun.engine.records import METRICS
from tests.conftest import Outcome
from tests.engine.running import assert_same_run, run, run_killed

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]


def tensors() -> st.SearchStrategy[Tensor]:
    shapes = st.lists(st.integers(0, 3), max_size=3)
    return st.builds(lambda shape, dtype: (torch.arange(math.prod(shape)).reshape(shape) % 2).to(dtype), shapes, st.sampled_from(DTYPES))


LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), tensors())
KEYS = st.one_of(st.sampled_from(["a", "b", "a/b", "/", "0", "", "__tensor__", "__dict__", "__tuple__"]), st.integers(-2, 2), st.booleans())
NESTED = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.tuples(inner, inner), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    """Equal in type, structure and every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return [(type(k), k) for k in a] == [(type(k), k) for k in b] and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=st.dictionaries(KEYS, NESTED, max_size=4))
def test_any_nested_state_comes_back_bit_for_bit(tree: dict[Any, Any], tmp_path: Path) -> None:
    step, back = state.load(state.save(tmp_path, 3, tree, keep=1))
    assert step == 3
    assert same(back, tree)


def test_tensors_with_one_path_do_not_overwrite_each_other(tmp_path: Path) -> None:
    tree = {"a": {"b": torch.zeros(1), 1: torch.ones(1)}, "a/b": torch.full((1,), 2.0), "a/1": torch.full((1,), 3.0)}
    assert same(state.load(state.save(tmp_path, 0, tree, keep=1))[1], tree)


@pytest.mark.parametrize(
    ("tree", "place", "kind"),
    [
        ({"optimizers": {"student": [{"lr": np.float32(0.1)}]}}, "/optimizers/student/0/lr", "float32"),
        ({"source": ({1, 2},)}, "/source/0", "set"),
        ({"banks": {("class", 1): 0}}, "/banks", "tuple"),  # JSON would turn it into a list, and no load would take it back
    ],
)
def test_what_cannot_be_kept_is_named_with_its_place(tree: dict[str, Any], place: str, kind: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=f"{place} .*{kind}"):
        state.save(tmp_path, 1, tree, keep=1)
    assert state.newest(tmp_path) is None


def truncate(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("content", [None, b"", b"\0" * 100, b"[]", b"{}", b'{"sha256": 1, "state_sha256": 2, "step": "x"}'])
def test_a_state_file_of_any_other_content_is_passed_over(content: bytes | None, tmp_path: Path) -> None:
    for step in (3, 6):
        state.save(tmp_path, step, {"step": step}, keep=2)
    file = tmp_path / "step-00000006" / state.STATE
    file.unlink() if content is None else file.write_bytes(content)
    step, back, remarks = state.newest(tmp_path) or (None, None, [])
    assert (step, back) == (3, {"step": 3})
    assert [remark.split(" (")[0] for remark in remarks] == ["step-00000006 is damaged"]


def test_damaged_later_checkpoints_do_not_push_out_whole_ones(tmp_path: Path) -> None:
    """A run that passed over a damaged step 6 and goes on from 2 keeps what it writes at 4."""
    for step in (2, 6):
        state.save(tmp_path, step, {"step": step}, keep=2)
    truncate(tmp_path / "step-00000006" / state.TENSORS)
    state.save(tmp_path, 4, {"step": 4}, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004"]


def test_a_run_with_a_damaged_newest_checkpoint_goes_on_from_the_one_before(
    tiny: list[str], tmp_path: Path, kdrun: Callable[..., Outcome]
) -> None:
    base = [*tiny, "optim.epochs=4"]
    run(base, tmp_path / "unbroken")
    run_killed(base, tmp_path / "run", "step_done", 10)
    truncate(tmp_path / "run" / "checkpoints" / "step-00000009" / state.TENSORS)
    resumed = kdrun("resume", str(tmp_path / "run"))
    assert resumed.code == 0
    assert "step-00000009 is damaged" in resumed.out
    assert "goes on at step 6" in resumed.out
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")


def test_a_run_whose_checkpoints_are_all_damaged_starts_from_the_beginning(
    tiny: list[str], tmp_path: Path, kdrun: Callable[..., Outcome]
) -> None:
    base = [*tiny, "optim.epochs=4"]
    run(base, tmp_path / "unbroken")
    run_killed(base, tmp_path / "run", "step_done", 10)
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        truncate(folder / state.STATE)
    resumed = kdrun("resume", str(tmp_path / "run"))
    assert resumed.code == 0
    assert "starts from the beginning" in resumed.out
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_checkpoint_exists_whole_or_not_at_all(failing: str, tiny: list[str], tmp_path: Path, kdrun: Callable[..., Outcome]) -> None:
    """The disk fails while the second checkpoint is written: the first one stands, and nothing else looks like one."""
    run(tiny, tmp_path / "unbroken")
    original, calls = getattr(os, failing), []

    def fails(*args: Any) -> None:
        calls.append(args)
        if any("step-00000006" in str(a) for a in args) or (failing == "fsync" and len(calls) == 6):
            raise OSError("no space left on device")
        original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state.os, failing, fails)
        with pytest.raises(OSError, match="no space left"):
            run(tiny, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [p.name for p in checkpoints.glob("step-*")] == ["step-00000003"]
    assert (state.newest(checkpoints) or [None])[0] == 3
    assert kdrun("resume", str(tmp_path / "run"), "--quiet").code == 0
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-00000003", "step-00000006"]  # the half-written one is gone


def test_a_checkpoint_knows_how_much_of_the_metrics_is_its_own(tiny: list[str], tmp_path: Path) -> None:
    run_killed(tiny, tmp_path / "run", "step_done", 5)
    found = state.newest(tmp_path / "run" / "checkpoints")
    assert found is not None
    whole = (tmp_path / "run" / METRICS).read_bytes()
    mine = whole[: found[1]["metrics_offset"]].decode().splitlines()
    assert [json.loads(line)["step"] for line in mine] == [1, 2, 3, 3]  # three steps and the evaluation of the third
    assert [json.loads(line)["step"] for line in whole.decode().splitlines()] == [1, 2, 3, 3, 4, 5]


def test_the_cost_of_a_run_counts_what_was_spent_before_a_kill(tiny: list[str], tmp_path: Path, kdrun: Callable[..., Outcome]) -> None:
    run_killed(tiny, tmp_path / "run", "step_done", 5)
    found = state.newest(tmp_path / "run" / "checkpoints")
    assert found is not None
    before = found[1]["seconds"]
    assert min(before) > 0  # by the clock, and of the processor
    resumed = kdrun("resume", str(tmp_path / "run"), "--json")
    assert resumed.json["cost"]["seconds"] > before[0]
