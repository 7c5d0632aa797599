"""What is measured of a language model, against the same written out by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdrun.dataset.gaussians import GaussianData
from kdrun.dataset.topics import TopicData
from kdrun.engine.distributed import Ranks
from kdrun.engine.evaluate import Evaluator
from kdrun.errors import Refused, RunFailed
from kdrun.evaluation import language
from kdrun.evaluation.language import BESIDE_TEACHER, BESIDE_TRUTH, SAMPLES, Language
from kdrun.evaluation.metrics import kind
from kdrun.student.taps import Tapped, model_spec
from kdrun.student.window import WindowLM
from kdrun.teacher.live import LiveTeacher
from kdrun.teacher.silent import NoTeacher
from tests.dataset.texts import V, alone, data_of, samples, tiny
from tests.engine.running import run

WORDS = 10


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, WORDS, generator=torch.Generator().manual_seed(seed))


def example() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(student's logits, targets, teacher's, true ones) of 3 rows of 5 places, 8 of them scored."""
    targets = torch.randint(WORDS, (3, 5), generator=torch.Generator().manual_seed(9))
    targets[0, :2] = targets[1, 3:] = -1
    targets[2, [0, 2, 4]] = -1
    own = logits(3, 5)
    return own, targets, logits(3, 5, seed=1), logits(3, 5, seed=2)


def metered(batches: Sequence[tuple[Any, ...]], bins: int = 15) -> dict[str, float]:
    meter = Language(bins=bins).meter(WORDS, "cpu")
    for batch in batches:
        meter.update(*batch)
    return meter.compute()


def by_hand(own: Tensor, targets: Tensor, teacher: Tensor, truth: Tensor, bins: int = 15) -> dict[str, float]:
    """Token by token, in plain Python."""
    sums: dict[str, float] = {}
    hits, confidences = [], []
    for b in range(targets.shape[0]):
        for i in range(targets.shape[1]):
            y = int(targets[b, i])
            if y < 0:
                continue
            q, p, o = ([math.exp(v - max(z)) for v in z] for z in (own[b, i].tolist(), teacher[b, i].tolist(), truth[b, i].tolist()))
            q, p, o = ([v / sum(d) for v in d] for d in (q, p, o))
            best = [max(range(WORDS), key=d.__getitem__) for d in (q, p, o)]
            row = {
                "nll": -math.log(q[y]),
                "top1": 100.0 * (best[0] == y),
                "entropy": -sum(v * math.log(v) for v in q),
                "head_mass": sum(sorted(q)[-5:]),
                "tail_mass": sum(sorted(q)[:2]),
                "agreement": 100.0 * (best[0] == best[1]),
                "kl_teacher": sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)),
                "rkl_teacher": sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)),
                "agreement_truth": 100.0 * (best[0] == best[2]),
                "kl_truth": sum(a * math.log(a / b) for a, b in zip(o, q, strict=True)),
                "rkl_truth": sum(b * math.log(b / a) for a, b in zip(o, q, strict=True)),
                "truth_entropy": -sum(v * math.log(v) for v in o),
            }
            hits.append(best[0] == y)
            confidences.append(max(q))
            for name, value in row.items():
                sums[name] = sums.get(name, 0.0) + value
    found = {name: value / len(hits) for name, value in sums.items()}
    found["perplexity"] = math.exp(found["nll"])
    found["ece"] = 0.0
    for n in range(bins):
        inside = [i for i, c in enumerate(confidences) if n / bins < c <= (n + 1) / bins]
        gap = abs(sum(hits[i] for i in inside) - sum(confidences[i] for i in inside))
        found["ece"] += 100 * gap / len(hits)
    return found


def test_every_metric_is_what_it_says() -> None:
    case = example()
    found, expected = metered([case]), by_hand(*case)
    assert set(found) == set(expected) == set(Language().names())
    assert found == pytest.approx(expected, rel=1e-5)
    assert int((case[1] >= 0).sum()) == 8


def test_uneven_batches_and_lengths_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    own, targets, teacher, truth = example()
    whole = metered([(own, targets, teacher, truth)])
    cut = [(own[:1], targets[:1], teacher[:1], truth[:1]), *((z[1:] for z in (own, targets, teacher, truth)),)]
    assert metered([tuple(part) for part in cut]) == pytest.approx(whole, rel=1e-6)
    by_place = [tuple(z[b : b + 1, i : i + 1] for z in (own, targets, teacher, truth)) for b in range(3) for i in range(5)]
    assert metered(by_place) == pytest.approx(whole, rel=1e-6)
    monkeypatch.setattr(language, "AT_ONCE", 3 * WORDS)  # three tokens at once
    assert metered([(own, targets, teacher, truth)]) == pytest.approx(whole, rel=1e-6)


def test_what_is_not_scored_is_not_looked_at() -> None:
    own, targets, teacher, truth = example()
    spoilt = [z.masked_fill((targets < 0)[..., None], torch.nan) for z in (own, teacher, truth)]
    assert metered([(spoilt[0], targets, spoilt[1], spoilt[2])]) == metered([(own, targets, teacher, truth)])


def test_without_teacher_and_truth_their_metrics_are_absent() -> None:
    own, targets, teacher, _ = example()
    alone_ = metered([(own, targets)])
    assert not {*BESIDE_TEACHER, *BESIDE_TRUTH} & {*alone_}
    beside = metered([(own, targets, teacher)])
    assert set(beside) - set(alone_) == {*BESIDE_TEACHER}
    assert {name: beside[name] for name in alone_} == alone_


def test_a_batch_without_a_scored_token_adds_nothing_and_none_at_all_fails() -> None:
    case = example()
    nothing = (case[0], torch.full_like(case[1], -1), case[2], case[3])
    assert metered([case, nothing]) == metered([case])
    with pytest.raises(RunFailed, match="no scored token"):
        metered([nothing])
    with pytest.raises(RunFailed, match="no scored token"):
        metered([])


def test_a_teacher_and_a_truth_that_exclude_tokens_are_measured() -> None:
    own, targets, teacher, truth = example()
    for said in (teacher, truth):
        said[..., 0] = -torch.inf
    targets[targets == 0] = 1
    found = metered([(own, targets, teacher, truth)])
    assert all(math.isfinite(found[name]) for name in ("kl_teacher", "kl_truth", "truth_entropy"))
    assert found["rkl_teacher"] == found["rkl_truth"] == math.inf  # it puts mass where they have none


def test_logits_in_half_precision_are_measured_in_float32() -> None:
    own, targets, teacher, truth = (z.to(torch.bfloat16) if z.is_floating_point() else z for z in example())
    wide = own.float(), targets, teacher.float(), truth.float()
    assert metered([(own, targets, teacher, truth)]) == metered([wide])


def test_a_loss_beyond_numbers_has_a_finite_perplexity_and_a_nan_stays_one() -> None:
    own = torch.tensor([[[0.0, 5000.0]]])
    assert metered([(own, torch.tensor([[0]]))])["perplexity"] == pytest.approx(math.exp(700))
    assert math.isnan(metered([(own * torch.nan, torch.tensor([[0]]))])["nll"])


def test_every_metric_has_a_direction_and_a_unit() -> None:
    assert [name for name in Language().names() if kind(name) is None] == []
    assert [name for name in ("nll", "kl_truth", "top1") if kind(name).higher_is_better] == ["top1"]  # type: ignore[union-attr]


def test_fields_outside_their_range_are_refused() -> None:
    with pytest.raises(Refused, match=r"evaluation\.bins"):
        Language(bins=0)
    with pytest.raises(Refused, match=r"evaluation\.examples"):
        Language(examples=-1)
    with pytest.raises(Refused, match=r"did you mean nll"):
        Language(primary="nl")


def test_what_is_no_text_is_refused() -> None:
    assert [p.key for p in Language().problems(GaussianData(n_train=10, n_test=10).load())] == ["evaluation"]
    assert Language().problems(TopicData(n_train=2, n_test=2).load()) == []


# -- beside data and a teacher ----------------------------------------------------------------------------------------


def topic_pair() -> tuple[Any, nn.Module, LiveTeacher]:
    data = TopicData(n_train=4, n_test=30).load()
    torch.manual_seed(0)
    student, bare = WindowLM(40), WindowLM(40, hidden=9)
    return data, student, LiveTeacher(Tapped(bare, {}), model_spec(bare, data.input_shape, {}))


def test_the_evaluator_measures_beside_teacher_and_truth() -> None:
    data, student, teacher = topic_pair()
    found = Evaluator(data, Language(), teacher, torch.device("cpu"), Ranks()).measure(student, "test")
    batch = next(data.batches("test", 30))
    meter = Language().meter(40, "cpu")
    with torch.no_grad():
        meter.update(student(batch.inputs), batch.targets, teacher.network(batch.inputs), batch.extra["truth_logits"])
    assert found == pytest.approx(meter.compute(), rel=1e-6)
    assert found["truth_entropy"] == pytest.approx(1.82, abs=0.1)


def test_the_halves_of_two_ranks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes every other batch; the sums of both are those of the split."""
    data, student, teacher = topic_pair()
    monkeypatch.setattr("kdrun.engine.evaluate.BATCH", 7)
    meters = [language._Sums() for _ in range(2)]
    ids = []
    for rank, meter in enumerate(meters):
        for batch, said in Evaluator(data, Language(), teacher, torch.device("cpu"), Ranks(rank, 2))._rows("test"):
            m = batch.targets >= 0
            assert said is not None
            meter.update(student(batch.inputs)[m].detach(), batch.targets[m], said[m], batch.extra["truth_logits"][m])
            ids += batch.ids.tolist()
    assert sorted(ids) == data.splits["test"].ids.tolist()
    meters[0].total = meters[0].total + meters[1].total  # what torchmetrics does over ranks: dist_reduce_fx="sum"
    whole = Evaluator(data, Language(), teacher, torch.device("cpu"), Ranks()).measure(student, "test")
    assert meters[0].compute() == pytest.approx({name: whole[name] for name in language._Sums.NAMES}, rel=1e-6)


def test_logits_of_a_large_vocabulary_are_said_anew_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    data, student, teacher = topic_pair()
    kept = Evaluator(data, Language(), teacher, torch.device("cpu"), Ranks())
    expected = kept.measure(student, "test")
    assert kept._said
    monkeypatch.setattr("kdrun.engine.evaluate.KEPT", 30 * 14 * 40 - 1)
    anew = Evaluator(data, Language(), teacher, torch.device("cpu"), Ranks())
    assert anew.measure(student, "test") == expected
    assert not anew._said


def test_inputs_of_a_large_vocabulary_come_in_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    data, _, teacher = topic_pair()
    monkeypatch.setattr("kdrun.engine.evaluate.ELEMENTS", 4 * 14 * 40)
    evaluator = Evaluator(data, Language(), teacher, torch.device("cpu"), Ranks())
    assert [len(batch.ids) for batch in evaluator.batches("test")] == [4] * 7 + [2]


def test_some_test_rows_are_written_as_text(tmp_path: Path) -> None:
    data, network = data_of(alone(samples([6, 4, 9, 5]))), tiny().train()
    Language(examples=3).picture(tmp_path, network, NoTeacher(), data, torch.device("cpu"))
    assert network.training
    rows = [json.loads(line) for line in (tmp_path / SAMPLES).read_text().splitlines()]
    batch = next(data.batches("test", 3))
    chosen = network(batch.inputs).logits[..., :V].argmax(-1)
    for row, x, y, z in zip(rows, batch.inputs, batch.targets, chosen, strict=True):
        assert row["prompt"] == " ".join(f"w{i}" for i in x[:2])
        assert row["text"] == " ".join(f"w{i}" for i in y[y >= 0])
        assert row["student"] == " ".join(f"w{i}" for i in z[y >= 0])


def test_no_examples_are_written_where_none_are_asked_for(tmp_path: Path) -> None:
    Language(examples=0).picture(tmp_path, tiny(), NoTeacher(), data_of(alone(samples([6]))), torch.device("cpu"))
    assert not (tmp_path / SAMPLES).exists()


def test_a_run_writes_its_metrics_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdrun.engine.session.plot_curves", lambda folder: None)
    base = ["dataset=topics", "dataset.n_train=40", "dataset.n_test=10", "source.batch_size=20", "hardware=cpu", "hardware.threads=1"]
    summary = run(
        [*base, "student=window_lm", "teacher=truth", "objective=lm_kd", "evaluation=language", "optim.epochs=1"], tmp_path / "run"
    )
    assert {*Language().names()} <= {*summary["test"]}
    assert summary["value"] == summary["test"]["nll"]
    assert summary["test"]["kl_teacher"] == pytest.approx(summary["test"]["kl_truth"])  # the truth teaches
    lines = (tmp_path / "run" / SAMPLES).read_text().splitlines()
    assert len(lines) == 4
    assert json.loads(lines[0])["prompt"].startswith("topic")
