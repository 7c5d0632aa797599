"""DistiLLM's replay buffer: its schedule, its draws, and whole runs of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kdrun.dataset.base import Data
from kdrun.engine import state
from kdrun.engine.records import METRICS, read_lines
from kdrun.losses.policy import group_advantages
from kdrun.source.replay import Replay, Text
from kdrun.source.rollout import ADVANTAGE, BEHAVIOUR, LOSS, REWARD, ReplayStream, Rollout
from kdrun.student.weights import save_student
from kdrun.student.window import WindowLM
from kdrun.types import Batch, Hears, Writes
from tests.conftest import Outcome
from tests.dataset.texts import tiny
from tests.engine.processes import kdrun_to_end
from tests.engine.running import assert_same_run, assert_same_training, resume, run, run_killed, training_lines
from tests.source.test_rollout import group, rows, uneven


def text(i: int) -> Text:
    return Text(i, 0, [i] * (1 + i % 3), [-0.5] * (1 + i % 3), float(i), 0.25)


def memory(**values: Any) -> Replay:
    return Replay(**{"capacity": 4, "phi": 0.5, "step": 0.1, "eps": 0.1, **values})


# -- the schedule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("r", "done", "held", "kind"),
    [
        (0.49, 0.0, 4, "fresh"),  # below phi (1 - step / total)
        (0.26, 0.5, 4, "replayed"),  # between it and phi, and the buffer is full
        (0.26, 0.5, 3, "fresh"),  # the same, and it is not
        (0.24, 0.5, 4, "fresh"),
        (0.5, 0.0, 0, "given"),
        (0.99, 0.9, 4, "given"),
        (0.0, 1.0, 4, "replayed"),
    ],
)
def test_a_draw_and_the_share_that_is_done_say_where_a_step_comes_from(r: float, done: float, held: int, kind: str) -> None:
    buffer = memory()
    buffer.texts.extend(map(text, range(held)))
    assert buffer.kind(r, done) == kind


def test_with_phi_zero_nothing_is_written() -> None:
    assert {memory(phi=0.0).kind(r, 0.0) for r in (0.0, 0.5)} == {"given"}


def test_phi_rises_where_the_validation_loss_does_and_only_then_is_the_loss_remembered() -> None:
    buffer, seen = memory(phi=0.0), []
    for loss in (2.0, 1.5, 2.05, 2.11, 2.15, 2.21, 9.0):
        buffer.hear(loss)
        seen.append((round(buffer.phi, 10), buffer.previous))
    assert seen == [(0, 2.0), (0, 2.0), (0, 2.0), (0.1, 2.11), (0.1, 2.11), (0.2, 2.21), (0.3, 9.0)]
    full = memory(phi=0.95, previous=0.0)
    full.hear(1.0)
    assert full.phi == 1.0


def test_the_oldest_texts_make_room_and_draws_are_without_replacement() -> None:
    buffer = memory()
    buffer.texts.extend(map(text, range(6)))
    assert [t.row for t in buffer.texts] == [2, 3, 4, 5]
    assert {t.row for t in buffer.drawn(4, 7, 0)} == {2, 3, 4, 5}
    drawn = [[t.row for t in buffer.drawn(3, 7, step)] for step in range(20)]
    assert all(len(set(one)) == 3 for one in drawn)
    assert {row for one in drawn for row in one} == {2, 3, 4, 5}
    assert drawn[3] == [t.row for t in buffer.drawn(3, 7, 3)]


@pytest.mark.parametrize("held", [0, 1, 4])
def test_a_checkpoint_brings_everything_back(held: int, tmp_path: Path) -> None:
    buffer = memory(phi=0.3, previous=1.25)
    buffer.texts.extend(map(text, range(held)))
    state.save(tmp_path, 3, buffer.state_dict(), keep=1)
    other = memory()
    other.load_state_dict(state.load(tmp_path / "step-00000003")[1])
    assert (other.phi, other.previous, list(other.texts)) == (0.3, 1.25, list(buffer.texts))
    assert other.texts.maxlen == 4


# -- the source -----------------------------------------------------------------------------------------------------------


def stream(data: Data, total_steps: int = 10**9, **values: Any) -> ReplayStream:
    where = {key: values.pop(key) for key in ("rank", "world", "micro_batch") if key in values}
    spec = Rollout(**{"batch_size": 4, "max_new_tokens": 6, "replay": True, "replay_capacity": 8, "replay_start": 1.0, **values})
    opened = spec.open(data, seed=1, **where)
    assert isinstance(opened, ReplayStream)
    opened.attach(tiny(), None, total_steps)
    return opened


def texts_of(batches: list[Batch]) -> list[tuple[Any, ...]]:
    """(id, prompt, text) and what stands beside each text, to the bit."""
    beside: list[tuple[Any, ...]] = []
    for batch in batches:
        scored = batch.targets >= 0
        names = [name for name in (BEHAVIOUR, ADVANTAGE) if name in batch.extra]
        each = [[batch.extra[name][i][scored[i]].tolist() for name in names] for i in range(len(batch.ids))]
        beside += [(*values, float(batch.extra[REWARD][i])) for i, values in enumerate(each)]
    return [(*row, *more) for row, more in zip(rows(batches), beside, strict=True)]


def test_until_the_buffer_is_full_texts_are_those_of_a_plain_rollout_and_then_they_come_again() -> None:
    data = uneven(8)
    source = stream(
        data, total_steps=1, per_prompt=2, replay_capacity=16
    )  # from step 1 on only a buffer that is not full asks for fresh ones
    assert isinstance(source, Hears)
    assert isinstance(source, Writes)
    written = [texts_of(source.group(step)) for step in (0, 1)]
    assert written == [texts_of(group(data, tiny(), step, max_new_tokens=6, batch_size=4, per_prompt=2)) for step in (0, 1)]
    again = [texts_of(source.group(step)) for step in (2, 3, 4)]
    kept = [row for step in written for row in step]
    assert all(len({json.dumps(row) for row in step}) == 8 for step in again)
    assert all(row in kept for step in again for row in step)
    assert again[0] != again[1] != again[2]
    assert source.report()["replayed_texts"] == 24
    assert source.report()["fresh_texts"] == 16
    assert source.report()["generated_tokens"] == sum(len(row[2]) for row in kept)


def test_behaviour_and_advantages_of_replayed_texts_are_those_of_when_they_were_written() -> None:
    source = stream(uneven(8), total_steps=1, per_prompt=4, batch_size=2)
    written = texts_of(source.group(0))
    advantages = group_advantages(torch.tensor([row[-1] for row in written]).view(-1, 4), "unbiased").flatten()
    assert [row[4][0] for row in written] == advantages.tolist()
    source.attach(tiny(seed=3), None, 1)  # another policy by now
    again = texts_of(source.group(1))
    assert sorted(map(json.dumps, again)) == sorted(map(json.dumps, written))
    assert again != written


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_replay_together_what_one_does(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = uneven(14)
    alone = stream(data, 1, batch_size=7, per_prompt=2, replay_capacity=28)
    ranks = [stream(data, 1, batch_size=7, per_prompt=2, replay_capacity=28, rank=rank, world=world) for rank in range(world)]
    shares: list[Any] = []
    for rank in ranks:
        monkeypatch.setattr(rank, "_of_all_ranks", lambda texts: shares.append(texts) or [])
    for step in range(4):
        whole, shares[:] = texts_of(alone.group(step)), []
        parts = [texts_of(rank.group(step)) for rank in ranks]
        for rank in ranks:
            rank.memory.texts.extend(text for share in shares for text in share)
        assert [row for part in parts for row in part] == whole
        assert len(whole) == 14
    assert alone.report()["replayed_texts"] == 28 == sum(rank.report()["replayed_texts"] for rank in ranks)


def test_micro_batches_hold_the_same_texts_and_data_steps_are_the_datas_own() -> None:
    whole, cut = stream(uneven(8), 1, replay_start=0.6), stream(uneven(8), 1, replay_start=0.6, micro_batch=3)
    kinds = [len({BEHAVIOUR in batch.extra for batch in cut.group(step)}) for step in range(12)]
    assert set(kinds) == {1}
    other = stream(uneven(8), 1, replay_start=0.6, micro_batch=3)
    for step in range(12):
        one, parts = whole.group(step), other.group(step)
        assert rows(parts) == rows(one)
        if BEHAVIOUR in one[0].extra:
            assert texts_of(parts) == texts_of(one)
            assert max(len(batch.ids) for batch in parts) == 2
    assert min(whole.report().values()) > 0


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"replay_capacity": 3}, "replay_capacity"),
        ({"replay_capacity": 0}, "replay_capacity"),
        ({"share": 0.5}, "share"),
        ({"replay_start": 1.5}, "replay_start"),
        ({"replay_step": -1}, "replay_step"),
        ({"replay_eps": -0.1}, "replay_eps"),
    ],
)
def test_values_out_of_range_are_refused_by_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"{named}="):
        Rollout(**{"batch_size": 4, "replay": True, **values})


# -- whole runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdrun.engine.session.plot_curves", lambda folder: None)


WRITTEN = ["source=rollout", "source.batch_size=11", "source.max_new_tokens=5", "source.replay=true", "source.replay_capacity=22"]


@pytest.fixture
def plain(tmp_path: Path) -> list[str]:
    """Eighteen steps of language-model distillation on topics, with a learning rate that makes the validation loss go up and down."""
    torch.manual_seed(7)
    network = WindowLM(8, contexts=3, hidden=8)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)
    save_student(network, tmp_path / "teacher.safetensors")
    return [
        "dataset=topics", "dataset.topics=3", "dataset.tokens=8", "dataset.length=5", "dataset.n_train=33", "dataset.n_validation=20",
        "dataset.n_test=20", "teacher=window_lm", "teacher.contexts=3", "teacher.hidden=8",
        f"teacher.checkpoint={tmp_path}/teacher.safetensors", "student=window_lm", "student.contexts=3", "student.hidden=4",
        "objective=lm_kd", "objective.divergence=skew_reverse", "evaluation=language", "evaluation.every_epochs=0.34", "optim=adamw",
        "optim.lr=0.1", "optim.epochs=6", "hardware=cpu", "hardware.threads=1", "run.log_every=1",
    ]  # fmt: skip


@pytest.fixture
def words(plain: list[str]) -> list[str]:
    return [*plain, *WRITTEN, "source.replay_start=0.4", "source.replay_eps=0.001"]


def buffer_of(folder: Path) -> dict[str, Any]:
    found = state.newest(folder / "checkpoints")
    assert found is not None
    return dict(found[1]["source"])


def test_a_run_says_how_many_texts_came_from_where_and_raises_phi(words: list[str], tmp_path: Path) -> None:
    summary = run(words, tmp_path / "run")
    written = summary["written"]
    assert written["fresh_texts"] + written["replayed_texts"] + written["given_texts"] == 18 * 11
    assert min(written.values()) > 0
    assert written["generated_tokens"] == 5 * written["fresh_texts"]
    kept = buffer_of(tmp_path / "run")
    assert kept["phi"] > 0.4
    assert kept["texts"]["lengths"].tolist() == [5] * 22
    losses = [line[LOSS] for line in read_lines(tmp_path / "run" / METRICS) if line.get("split") == "validation"]
    assert kept["previous"] in losses


def test_the_loss_before_training_is_the_first_that_is_heard(words: list[str], tmp_path: Path) -> None:
    """A rise by 1000 nats never comes, so the one that is remembered is the untrained student's: about log 8."""
    run([*words, "source.replay_eps=1000"], tmp_path / "run")
    kept = buffer_of(tmp_path / "run")
    assert kept["phi"] == 0.4
    assert kept["previous"] == pytest.approx(2.08, abs=0.3)
    assert kept["previous"] not in [line[LOSS] for line in read_lines(tmp_path / "run" / METRICS) if line.get("split") == "validation"]


@pytest.mark.parametrize("step", [1, 7, 13])
def test_a_run_that_was_killed_goes_on_bit_for_bit(step: int, words: list[str], tmp_path: Path) -> None:
    words = [*words, "run.checkpoint_every=0.34"]
    run(words, tmp_path / "unbroken")
    run_killed(words, tmp_path / "broken", "step_done", step)
    resume(words, tmp_path / "broken")
    assert_same_run(tmp_path / "broken", tmp_path / "unbroken")
    assert len(training_lines(tmp_path / "broken")) == 18


def test_accumulation_changes_no_text_and_no_gradient(words: list[str], tmp_path: Path) -> None:
    whole = run(words, tmp_path / "whole")
    cut = run([*words, "hardware.micro_batch=4"], tmp_path / "cut")
    assert_same_training(tmp_path / "cut", tmp_path / "whole", rtol=1e-4)
    assert cut["written"] == whole["written"]


@pytest.mark.slow
def test_two_ranks_write_replay_and_train_what_one_process_does(words: list[str], tmp_path: Path) -> None:
    whole = run(words, tmp_path / "one")
    ranks = ["hardware=multi_gpu", "hardware.device=cpu", "hardware.procs=2", "hardware.threads=1"]
    done = kdrun_to_end("train", *words, *ranks, f"run.dir={tmp_path / 'two'}", f"run.root={tmp_path / 'root'}", "--json")
    assert done.returncode == 0, done.stderr
    assert_same_training(tmp_path / "two", tmp_path / "one", rtol=1e-4)
    assert json.loads(done.stdout)["written"] == whole["written"]
    ours, theirs = (buffer_of(tmp_path / name)["texts"] for name in ("two", "one"))
    assert torch.equal(ours["rows"], theirs["rows"])
    assert torch.equal(ours["tokens"], theirs["tokens"])
    torch.testing.assert_close(ours["log_probs"], theirs["log_probs"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "key", "remedy"),
    [
        (["dataset.n_validation=0"], "source.replay", "dataset.validation=0.1"),
        (["source.share=0.5"], "source.share", "it must be 1"),
        (["source.replay_capacity=4"], "source.replay_capacity", "of a step"),
        (["teacher=truth", "~teacher.contexts", "~teacher.hidden", "~teacher.checkpoint"], "teacher", "source=loader"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_spent(
    change: list[str], key: str, remedy: str, words: list[str], kdrun: Callable[..., Outcome], tmp_path: Path
) -> None:
    drop = {word[1:] for word in change if word.startswith("~")}
    words = [word for word in words if word.partition("=")[0] not in drop] + [word for word in change if not word.startswith("~")]
    refused = kdrun("train", *words, f"run.dir={tmp_path / 'run'}")
    assert refused.code == 2, refused.err
    assert f"\n{key}: " in refused.err or f"{key}=" in refused.err
    assert remedy in refused.err
    assert not (tmp_path / "run").exists()


def test_an_evaluation_without_a_loss_cannot_steer_it(kdrun: Callable[..., Outcome], tmp_path: Path) -> None:
    refused = kdrun(
        "train", "dataset=sums", "dataset.n_train=33", "teacher=none", "student=sum_policy", "objective=sft", "evaluation=generation",
        *WRITTEN, "hardware=cpu", f"run.dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert refused.code == 2, refused.err
    assert "which Generation does not measure" in refused.err
