"""Evaluation by what is written: completions of test prompts under the data set's own reward."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdrun import rng
from kdrun.dataset.base import Data
from kdrun.dataset.sums import BASE, EQUALS, LENGTH, SYMBOLS, SumData
from kdrun.dataset.topics import TopicData
from kdrun.dataset.vocabulary import Symbols
from kdrun.engine.distributed import Ranks
from kdrun.engine.evaluate import Evaluator, teacher_score
from kdrun.errors import Refused, RunFailed
from kdrun.evaluation.generation import METRICS, Generation
from kdrun.evaluation.language import Language
from kdrun.student.generate import Sampling, complete
from kdrun.student.sum_policy import SumPolicy
from kdrun.student.taps import Tapped
from kdrun.student.weights import save_student
from kdrun.teacher.live import LiveTeacher
from kdrun.teacher.silent import NoTeacher
from kdrun.types import Batch, ModelSpec
from tests.conftest import Outcome
from tests.dataset.texts import tiny
from tests.engine.running import run
from tests.source.test_rollout import EOS, uneven

CPU = torch.device("cpu")


class Adder(nn.Module):
    """Adds up for itself what it has read, and at problems whose first digit is below `wrong` is off by one at the end."""

    def __init__(self, wrong: int = 0) -> None:
        super().__init__()
        self.vocabulary, self.wrong = SYMBOLS.size, wrong
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        start = (x == EQUALS).int().argmax(1)
        n = (torch.arange(x.shape[1]) - start[:, None]).clamp(0, LENGTH - 1)
        sums = x[:, :LENGTH].cumsum(1).gather(1, n)
        off = (x[:, :1] < self.wrong) & (n == LENGTH - 1)
        return 40.0 * torch.nn.functional.one_hot((sums + off) % BASE, SYMBOLS.size) + self.anchor


def sums(rows: int = 40) -> Data:
    return SumData(n_train=8, n_test=rows).load()


def measure(network: nn.Module, data: Data, batch: int = 500, **values: Any) -> dict[str, float]:
    evaluation = Generation(**{"max_new_tokens": LENGTH, **values})
    return evaluation.measure(network, rows(data, batch), data, CPU)


def rows(data: Data, batch: int = 500) -> Iterator[tuple[Batch, None]]:
    return ((part, None) for part in data.batches("test", batch))


def policy(seed: int = 0) -> SumPolicy:
    torch.manual_seed(seed)
    return SumPolicy(SYMBOLS.size)


def test_the_share_of_right_answers_is_counted() -> None:
    data = sums(200)
    first = data.split("test").storage.tokens.view(200, -1)[:, 0]  # type: ignore[attr-defined]
    assert measure(Adder(), data) == {"reward": 100, "pass_k": 100, "length": LENGTH}
    expected = 100 * float((first >= 4).double().mean())
    assert 30 < expected < 90
    assert measure(Adder(wrong=4), data) == {"reward": pytest.approx(expected), "pass_k": pytest.approx(expected), "length": LENGTH}
    assert measure(Adder(), data, max_new_tokens=LENGTH - 1)["reward"] == 0  # an answer that is not finished


def test_pass_k_asks_for_one_right_answer_of_k() -> None:
    data, network = sums(60), policy()
    evaluation = Generation(max_new_tokens=LENGTH, samples=12)
    found = evaluation.measure(network, rows(data), data, CPU)
    batch = next(data.batches("test", 60))
    right = torch.zeros(60, 12)
    reference = batch.targets[:, -1]
    for i in range(60):
        prompts = [batch.inputs[i, : LENGTH + 1]] * 12
        told = complete(network, prompts, Sampling(LENGTH), rng.key(0, "generation"), batch.ids[i] * 12 + torch.arange(12), 0, CPU)
        right[i] = (told.tokens[:, -1] == reference[i]).float()
    assert found["reward"] == pytest.approx(100 * float(right.mean()))
    assert found["pass_k"] == pytest.approx(100 * float(right.any(1).double().mean()))
    assert found["pass_k"] > found["reward"] > 0


@pytest.mark.parametrize("batch", [1, 7, 40])
def test_numbers_do_not_depend_on_how_the_rows_come(batch: int) -> None:
    data, network = sums(), policy()
    whole = measure(network, data, samples=3)
    assert measure(network, data, batch, samples=3) == pytest.approx(whole)
    assert measure(network, data, seed=1, samples=3) != whole
    assert measure(network, data, batch, temperature=0.5, seed=1) == measure(network, data, temperature=0.5, seed=1)


@pytest.mark.parametrize("batch", [2, 5, 40])
def test_only_so_many_prompts_are_answered(batch: int) -> None:
    data, network, asked = sums(), Adder(), []
    network.register_forward_pre_hook(lambda module, args: asked.append(len(args[0])))
    assert measure(network, data, batch, prompts=5)["reward"] == 100
    assert sum(asked) == 5 * LENGTH
    assert measure(network, data, prompts=500)["reward"] == 100
    assert sum(asked) == 45 * LENGTH


def test_lengths_end_with_the_end_of_text() -> None:
    data = uneven(30)
    object.__setattr__(data, "splits", {"test": data.split("train")})
    found = measure(tiny(), data, max_new_tokens=12)
    assert found["reward"] == pytest.approx(100 * found["length"])  # its reward is the length
    assert 2 < found["length"] < 12
    assert data.vocabulary is not None
    assert data.vocabulary.eos == EOS


def test_nothing_to_look_at_is_said() -> None:
    with pytest.raises(RunFailed, match="no prompt"):
        Generation().measure(policy(), iter(()), sums(), CPU)


def test_a_network_keeps_its_mode() -> None:
    network = policy().train()
    Evaluator(sums(), Generation(max_new_tokens=LENGTH), NoTeacher(), CPU, Ranks()).measure(network, "test")
    assert network.training


def test_a_given_teacher_is_measured_by_its_own_writing() -> None:
    data = sums()
    evaluation = Generation(max_new_tokens=LENGTH)
    teacher = LiveTeacher(Tapped(Adder(wrong=3), {}), ModelSpec(SYMBOLS.size, data.input_shape))
    assert teacher_score(data, evaluation, teacher, CPU, Ranks()) == measure(Adder(wrong=3), data)
    texts = uneven(12)
    object.__setattr__(texts, "splits", {"test": texts.split("train")})
    own = LiveTeacher(Tapped(tiny(), {}), ModelSpec(13, texts.input_shape))
    assert teacher_score(texts, evaluation, own, CPU, Ranks()) == measure(tiny(), texts)


def test_some_answers_are_written_beside_their_references(tmp_path: Path) -> None:
    data = sums()
    Generation(max_new_tokens=LENGTH, examples=3, samples=2).picture(tmp_path, Adder(wrong=10), NoTeacher(), data, CPU)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    for line in lines:
        digits = [int(d) for d in line["prompt"].split()[:-1]]
        right = [sum(digits[: i + 1]) % BASE for i in range(LENGTH)]
        assert line["reference"].split() == [str(d) for d in right]
        assert line["written"].split()[:-1] == line["reference"].split()[:-1]
        assert line["written"] != line["reference"]
    Generation(examples=0).picture(tmp_path / "none", Adder(), NoTeacher(), data, CPU)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"samples": 0}, "evaluation.samples"),
        ({"examples": -1}, "evaluation.examples"),
        ({"prompts": 0}, "evaluation.prompts"),
        ({"temperature": -1}, "evaluation"),
        ({"max_new_tokens": 0}, "evaluation"),
        ({"top_p": 0}, "evaluation"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], key: str) -> None:
    with pytest.raises(Refused) as raised:
        Generation(**values)
    assert [p.key for p in raised.value.problems] == [key]


def test_data_without_a_reward_and_data_that_are_no_text_are_refused() -> None:
    data = sums()
    assert Generation().problems(data) == []
    object.__setattr__(data, "reward", None)
    assert ["evaluation=language" in p.remedy for p in Generation().problems(data)] == [True]
    from tests.source.test_loader import data as pictures

    assert ["no text" in p.what for p in Generation().problems(pictures())] == [True]
    assert Generation().names() == list(METRICS)


@pytest.mark.parametrize("world", [1, 3])
def test_prompts_of_a_large_vocabulary_are_answered_together(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are made of the last place alone, so it is not the vocabulary times the length that has to fit."""
    texts, asked = uneven(12), []
    object.__setattr__(texts, "splits", {"test": texts.split("train")})
    monkeypatch.setattr("kdrun.engine.evaluate.ELEMENTS", 100)  # 13 tokens x 8 places: one row of logits
    model = tiny()
    whole = measure(model, texts, max_new_tokens=5)
    model.model.register_forward_pre_hook(lambda module, args, named: asked.append(len(named["input_ids"])), with_kwargs=True)
    assert measure(model, texts, max_new_tokens=5) == pytest.approx(whole)
    assert max(asked) == 12
    shares = [Evaluator(texts, Generation(), NoTeacher(), CPU, Ranks(rank, world)).batches("test") for rank in range(world)]
    assert [[len(batch.ids) for batch in share] for share in shares] == [[12 // world]] * world


# -- whole runs -----------------------------------------------------------------------------------------------------------

WORDS = [
    "dataset=sums", "dataset.n_train=16", "dataset.n_test=12", "student=sum_policy", "objective=opsd", "objective.cap=0.5",
    "source=rollout", "source.batch_size=8", "source.max_new_tokens=6", "evaluation=generation", "evaluation.max_new_tokens=6",
    "optim=adamw", "optim.epochs=1", "hardware=cpu", "hardware.threads=1",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["given", "trained", "current"])
def test_a_run_is_measured_again_with_the_same_numbers(
    kind: str, tmp_path: Path, kdrun: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdrun.engine.session.plot_curves", lambda folder: None)
    teacher = ["teacher=sum_policy", "teacher.prompt=privileged", "plan.start_from=teacher"]
    if kind == "given":
        save_student(policy(3), tmp_path / "base.safetensors")
        teacher.append(f"teacher.checkpoint={tmp_path / 'base.safetensors'}")
    elif kind == "trained":
        teacher.append(
            "teacher.fit={objective: {_target_: kdrun.objective.sft.SFT}, source: {_target_: kdrun.source.loader.Loader, batch_size: 8}}"
        )
    summary = run([*WORDS, *(["teacher=current"] if kind == "current" else teacher)], tmp_path / "run")
    again = kdrun("eval", str(tmp_path / "run"), "--json", "--no-latency")
    assert again.code == 0, again.err
    for name in METRICS:
        assert again.json["metrics"]["test"][name] == pytest.approx(summary["test"][name])
    if kind == "current":
        assert "teacher" not in again.json  # it was the student itself
    else:
        assert again.json["teacher"]["reward"] == pytest.approx(summary["teacher"]["reward"])
    assert (tmp_path / "run" / "samples.jsonl").is_file()


# -- overlap with the reference, and what is said of it ---------------------------------------------------------------------


class Says(nn.Module):
    """After any prompt the same tokens, whatever came before them."""

    def __init__(self, tokens: list[int]) -> None:
        super().__init__()
        self.tokens, self.vocabulary = tokens, SYMBOLS.size
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        start = (x == EQUALS).int().argmax(1)
        n = (torch.arange(x.shape[1]) - start[:, None]).clamp(0, LENGTH - 1)
        return 40.0 * torch.nn.functional.one_hot(torch.tensor(self.tokens)[n], SYMBOLS.size) + self.anchor


def overlap(written: str, reference: str, stemmer: bool = False) -> float:
    words = Symbols(tuple(sorted({*written.split(), *reference.split()})))
    ids = lambda text: [words.names.index(word) for word in text.split()]  # noqa: E731
    data = replace(sums(), vocabulary=words)
    return Generation(rouge=True, stemmer=stemmer)._overlap(data, [ids(reference)], [ids(written)])


@pytest.mark.parametrize(
    ("written", "reference", "expected"),
    [
        ("the cat sat on the mat", "the cat sat on the mat", 1.0),
        ("the cat", "the cat sat on", 2 * 1.0 * 0.5 / 1.5),  # precision 2/2, recall 2/4
        ("mat the on sat", "the cat sat on the mat", 2 * (2 / 4) * (2 / 6) / (2 / 4 + 2 / 6)),  # in common: the on
        ("The CAT, sat!", "the cat sat", 1.0),  # letters and digits alone, in lower case
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("cat cat cat cat", "cat", 2 * 0.25 / 1.25),
    ],
)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(written: str, reference: str, expected: float) -> None:
    assert overlap(written, reference) == pytest.approx(expected, abs=1e-6)


def test_rouge_l_of_stems() -> None:
    pytest.importorskip("nltk")
    assert overlap("cats running", "cat runs") == 0
    assert overlap("cats running", "cat runs", stemmer=True) == pytest.approx(1.0)  # cat run
    assert overlap("walking the dog", "walked slowly", stemmer=True) == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))


def test_rouge_l_is_a_mean_over_completions_in_percent() -> None:
    data = sums(30)
    tokens = [1, 2, 3, 4, 5, 6]
    references = data.split("test").storage.tokens.view(30, -1)[:, -LENGTH:].tolist()  # type: ignore[attr-defined]
    expected = sum(lcs(tokens, row) for row in references) / LENGTH / 30  # precision and recall are the same of equal lengths
    found = measure(Says(tokens), data, rouge=True, samples=2)
    assert 0.2 < expected < 0.9
    assert found["rouge_l"] == pytest.approx(100 * expected, abs=1e-4)
    assert measure(Says(tokens), data, 7, rouge=True, samples=2) == pytest.approx(found)
    assert measure(Adder(), data, rouge=True)["rouge_l"] == pytest.approx(100)


def lcs(a: list[int], b: list[int]) -> int:
    if not a or not b:
        return 0
    return 1 + lcs(a[:-1], b[:-1]) if a[-1] == b[-1] else max(lcs(a[:-1], b), lcs(a, b[:-1]))


def test_data_without_a_reward_are_scored_by_rouge_alone() -> None:
    data = replace(sums(), reward=None)
    assert not data.judges
    found = measure(Adder(), data, rouge=True, primary="rouge_l")
    assert found == {"length": LENGTH, "rouge_l": pytest.approx(100)}
    assert Generation(rouge=True, primary="rouge_l").problems(data) == []
    for values in ({}, {"rouge": True}):
        (problem,) = Generation(**values).problems(data)
        assert "evaluation.primary=rouge_l" in problem.remedy
    with pytest.raises(Refused, match="rouge_l"):
        Generation(primary="rouge_l")


def test_a_stemmer_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdrun.evaluation.generation.find_spec", lambda name: None)
    (problem,) = Generation(rouge=True, stemmer=True).problems(sums())
    assert (problem.key, "nltk" in problem.what) == ("evaluation.stemmer", True)


@pytest.mark.parametrize("batch", [3, 40])
def test_what_is_said_of_the_given_texts_is_what_the_other_evaluation_says(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data, network = sums(), policy()
    expected = Language().measure(network, rows(data), data, CPU)["nll"]
    assert measure(network, data, batch, given=True, prompts=2)["nll"] == pytest.approx(expected, rel=1e-6)  # of all rows
    monkeypatch.setattr("kdrun.evaluation.generation.AT_ONCE", 1)
    assert measure(network, data, batch, given=True)["nll"] == pytest.approx(expected, rel=1e-6)


# -- the exact distribution -------------------------------------------------------------------------------------------------


class Knows(nn.Module):
    """Says the truth of topic texts, flattened by a temperature."""

    def __init__(self, data: Data, temperature: float = 1.0) -> None:
        super().__init__()
        self.data, self.temperature, self.vocabulary = data, temperature, data.classes
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        assert self.data.world is not None
        return self.data.world(x) / self.temperature + self.anchor


def topics() -> Data:
    return TopicData(topics=3, tokens=5, length=4, n_train=4, n_test=60, seed=2).load()


def test_the_world_says_of_a_text_what_is_stored_beside_it() -> None:
    data = topics()
    batch = next(data.batches("test", 60))
    scored = batch.targets >= 0
    assert data.world is not None
    assert torch.equal(data.world(batch.inputs)[scored], batch.extra["truth_logits"][scored])


def test_texts_of_the_truth_itself_are_at_no_distance_from_it() -> None:
    data = topics()
    ours = {"max_new_tokens": 4, "truth": True, "primary": "own_rkl"}
    found = measure(Knows(data), data, **ours)
    assert found["own_rkl"] == pytest.approx(0, abs=1e-6)
    flat = measure(Knows(data, temperature=3.0), data, 7, samples=40, **ours)
    batch = next(data.batches("test", 60))
    true = torch.log_softmax(batch.extra["truth_logits"][:, 2].double(), -1)
    own = torch.log_softmax(batch.extra["truth_logits"][:, 2].double() / 3.0, -1)
    entropies, distances = -(own.exp() * true).sum(-1), (own.exp() * (own - true)).sum(-1)
    one = measure(Knows(data, temperature=3.0), data, samples=200, **{**ours, "max_new_tokens": 1})
    # Of the first token both are known exactly: 12,000 samples, about four standard errors.
    assert one["own_rkl"] == pytest.approx(float(distances.mean()), abs=0.06)
    assert one["oracle_nll"] == pytest.approx(float(entropies.mean()), abs=0.06)
    assert flat["own_rkl"] > 0.1


def test_a_world_that_knows_no_truth_is_refused() -> None:
    (problem,) = Generation(truth=True, primary="own_rkl").problems(sums())
    assert problem.key == "evaluation.truth"
    assert Generation(truth=True, primary="own_rkl").problems(topics()) == []
    assert len(Generation(truth=True).problems(topics())) == 1  # it has no reward
