"""The pipeline: what is kept of every row, what a killed run does again, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdrun.config.compose import compose
from kdrun.dataset.events import EventData, Oracle
from kdrun.engine.build import load_data
from kdrun.errors import Refused, RunFailed
from kdrun.plan import critic, pipeline, writing
from kdrun.plan.corpus import Corpus, prompts_in
from kdrun.plan.pipeline import CORPUS, Pipeline
from kdrun.student.weights import sha256_of
from tests.engine.processes import kdrun_to_end
from tests.engine.running import (
    Killed,
    assert_bit_equal,
    assert_same_run,
    checkpoint_tensors,
    resume,
    run,
    run_killed,
    training_lines,
    weights,
)

GPT = "{model_type: gpt2, n_embd: 8, n_head: 2, n_inner: 16, n_layer: 1, n_positions: 4, tie_word_embeddings: false, resid_pdrop: 0.0, embd_pdrop: 0.0, attn_pdrop: 0.0}"  # noqa: E501
SMALL = [
    "dataset=events", "dataset.verbs=6", "dataset.objects=6", "dataset.relations=2", "dataset.tails=10", "dataset.groups=2",
    "dataset.web_events=24", "dataset.human_events=4", "dataset.per_cell=4",
    "teacher=causal_lm", f"teacher.config={GPT}", "teacher.pretrained=false", "teacher.fit={optim.steps: 8}",
    "student=causal_lm", f"student.config={GPT}", "student.pretrained=false", "objective=sft", "plan=pipeline", "plan.generate.samples=4",
    "plan.generate.max_new_tokens=1", "plan.generate.top_p=0.9", "plan.generate.chunk=20", "plan.critic.labels=100",
    "plan.critic.held_out=0.4",
    "plan.critic.fit={optim.lr: 3e-3, optim.epochs: 2, optim.steps: null}", "evaluation=acceptance", "evaluation.max_new_tokens=1",
    "evaluation.samples=3", "evaluation.every_epochs=100", "source.batch_size=16", "optim=adamw", "optim.steps=6", "optim.lr=0.01",
    "hardware=cpu", "hardware.threads=1", "run.log_every=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    run(SMALL, folder)
    return folder


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / CORPUS).read_text().splitlines()]


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())  # type: ignore[no-any-return]


# -- what is left of a run ------------------------------------------------------------------------------------------------


def test_every_row_says_where_it_comes_from_and_what_became_of_it(unbroken: Path) -> None:
    rows, told = lines(unbroken), summary_of(unbroken)
    assert len({(row["prompt_id"], row["completion"]) for row in rows}) == len(rows)
    assert sum(row["repeats"] for row in rows) == 24 * 2 * 4
    sampling = {"temperature": 1.0, "top_p": 0.9, "top_k": None, "max_new_tokens": 1, "samples": 4}
    assert {(row["teacher"], row["seed"]) for row in rows} == {(told["teacher"]["sha256"], 1)}
    assert all(row["sampling"] == sampling for row in rows)
    assert all(row["kept"] == (row["score"] >= told["test"]["critic_tau"]) for row in rows)
    assert sum(row["label"] >= 0 for row in rows) == 100
    data = EventData(verbs=6, objects=6, relations=2, tails=10, groups=2, web_events=24, human_events=4, per_cell=4).load()
    assert data.oracle is not None
    assert data.vocabulary is not None
    right = [data.oracle(data.vocabulary.encode(row["prompt"]), data.vocabulary.encode(row["completion"])) for row in rows]
    assert all(row["label"] in (-1, answer) for row, answer in zip(rows, right, strict=True))
    kept = [answer for row, answer in zip(rows, right, strict=True) if row["kept"]]
    test = told["test"]
    assert test["corpus_size"] == len(kept) < len(rows)
    assert test["corpus_accept"] == pytest.approx(100 * sum(kept) / len(kept))
    assert test["unique_accept"] == pytest.approx(100 * sum(right) / len(right))
    often = [row["repeats"] for row in rows]
    assert test["written_accept"] == pytest.approx(100 * sum(n * a for n, a in zip(often, right, strict=True)) / sum(often))
    assert test["teacher_accept"] == told["teacher"]["accept"]


def test_the_cost_of_every_stage_is_told(unbroken: Path) -> None:
    stages = summary_of(unbroken)["stages"]
    assert set(stages) == {"generate", "label", "critic", "score", "student"}
    assert stages["generate"]["tokens"] == stages["generate"]["rows"] == 24 * 2 * 4
    assert stages["label"]["rows"] == 100
    assert stages["student"] == {"steps": 6, "rows": summary_of(unbroken)["test"]["corpus_size"], "seconds": stages["student"]["seconds"]}
    assert all(stage["seconds"] > 0 for name, stage in stages.items() if name != "label")


def test_the_student_sees_prompts_of_the_web_and_kept_completions_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    original = Corpus.as_training
    monkeypatch.setattr(Corpus, "as_training", lambda self, data: seen.append(original(self, data)) or seen[-1])
    run(SMALL, tmp_path / "run")
    batch = next(seen[0].batches("train", 10**4))
    texts = {(row["prompt"], row["completion"]) for row in lines(tmp_path / "run") if row["kept"]}
    decode = seen[0].vocabulary.decode
    assert {(decode(x), decode([y])) for x, y in zip(batch.inputs.tolist(), batch.targets[:, 2].tolist(), strict=True)} == texts
    assert bool((batch.targets[:, :2] == -1).all())  # the tail alone is learned
    assert batch.ids.min() >= 24 * 2 * 4
    assert len(set(batch.ids.tolist())) == len(texts)


def test_the_oracle_is_heard_on_judged_rows_alone(unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told otherwise of the rows that nobody paid a label for, the same student comes out."""
    original = Corpus.judged

    def judged(self: Corpus, data: Any) -> Tensor:
        return original(self, data) if len(self) == 100 else ~original(self, data)

    monkeypatch.setattr(Corpus, "judged", judged)
    other = run(SMALL, tmp_path / "run")
    assert_bit_equal(weights(unbroken), weights(tmp_path / "run"))
    assert other["test"]["corpus_accept"] == pytest.approx(100 - summary_of(unbroken)["test"]["corpus_accept"])


def test_the_teacher_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writers: list[torch.nn.Module] = []
    original = pipeline.write
    monkeypatch.setattr(pipeline, "write", lambda session, network, *rest: writers.append(network) or original(session, network, *rest))
    before: list[str] = []
    trained = critic.Critic.trained
    monkeypatch.setattr(
        critic.Critic, "trained", lambda self, s, network, *rest: before.append(sha256_of(network)) or trained(self, s, network, *rest)
    )
    run(SMALL, tmp_path / "run")
    assert before == [sha256_of(writers[0])]


# -- law 2 ----------------------------------------------------------------------------------------------------------------


def told_apart_from_the_clock(folder: Path) -> dict[str, Any]:
    return {k: v for k, v in summary_of(folder)["test"].items() if "seconds" not in k}


def assert_same(broken: Path, unbroken: Path) -> None:
    assert_same_run(broken, unbroken)
    assert (broken / CORPUS).read_bytes() == (unbroken / CORPUS).read_bytes()
    assert_bit_equal(checkpoint_tensors(broken / "critic"), checkpoint_tensors(unbroken / "critic"))
    assert told_apart_from_the_clock(broken) == told_apart_from_the_clock(unbroken)


def test_a_run_killed_while_the_teacher_writes_goes_on_at_that_chunk(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, asked = writing.complete, []

    def counting(stop: int | None) -> Callable[..., Any]:
        def complete(network: Any, prompts: Any, *rest: Any) -> Any:
            asked.append(len(prompts))
            if len(asked) == stop:
                raise Killed
            return original(network, prompts, *rest)

        return complete

    monkeypatch.setattr(writing, "complete", counting(2))
    with pytest.raises(Killed):
        run(SMALL, tmp_path / "run")
    assert asked == [80, 80]
    asked.clear()
    monkeypatch.setattr(writing, "complete", counting(None))
    resume(SMALL, tmp_path / "run")
    assert asked == [80, 32]  # the first chunk is not written again
    assert_same(tmp_path / "run", unbroken)


@pytest.mark.parametrize(
    ("stage", "step", "after"), [("critic", 3, False), ("critic", 6, True), ("student", 2, False), ("student", 5, True)]
)
def test_a_run_killed_in_the_critic_or_the_student_ends_alike(stage: str, step: int, after: bool, unbroken: Path, tmp_path: Path) -> None:
    run_killed(SMALL, tmp_path / "run", "step_done", step, stage, after)
    resume(SMALL, tmp_path / "run")
    assert_same(tmp_path / "run", unbroken)


def test_how_many_prompts_are_written_at_once_changes_nothing(unbroken: Path, tmp_path: Path) -> None:
    run([*SMALL, "plan.generate.chunk=7"], tmp_path / "run")
    ours, theirs = lines(tmp_path / "run"), lines(unbroken)
    assert [(r["prompt_id"], r["draw"], r["completion"]) for r in ours] == [(r["prompt_id"], r["draw"], r["completion"]) for r in theirs]


# -- law 1 ----------------------------------------------------------------------------------------------------------------


def test_accumulation_changes_neither_critic_nor_student(unbroken: Path, tmp_path: Path) -> None:
    run([*SMALL, "hardware.micro_batch=5"], tmp_path / "run")
    for stage in ("critic", "."):
        ours, theirs = training_lines(tmp_path / "run" / stage), training_lines(unbroken / stage)
        assert len(ours) == len(theirs) > 0
        for one, other in zip(ours, theirs, strict=True):
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert [row["kept"] for row in lines(tmp_path / "run")] == [row["kept"] for row in lines(unbroken)]


def test_no_head_is_both_learned_from_and_cut_by(unbroken: Path) -> None:
    for rule, parts in (("largest", {0, 1}), ("released", {0, 1, 2})):
        made = Pipeline(critic=critic.Critic(rule=rule, labels=100, held_out=0.4))  # type: ignore[arg-type]
        assert made.critic is not None
        data = load_data(compose(SMALL).tree)
        prompts = prompts_in(data)
        every = torch.arange(len(prompts)).repeat_interleave(4)
        texts = [[int(t)] for t in data.vocabulary.encode(" ".join(f"tail{i % 10}" for i in range(len(every))))]  # type: ignore[union-attr]
        written = Corpus(prompts, every, torch.arange(len(every)) % 4, torch.zeros(len(every)).double(), texts, 4)
        session: Any = type("S", (), {"tree": {"seed": 1, "run": {"dry": False}}, "data": data})()
        judged = made.critic.judge(session, written)
        heads = written.heads[judged["positions"]]
        sides = [{*heads[judged["part"] == part].tolist()} for part in sorted(parts)]
        assert {*judged["part"].tolist()} == parts
        assert sum(map(len, sides)) == len(set().union(*sides))


# -- other routes ---------------------------------------------------------------------------------------------------------


def test_without_a_critic_all_is_kept_and_with_repeats_it_is_the_teacher_s_own_share(tmp_path: Path) -> None:
    raw = run([*SMALL, "plan.critic=null"], tmp_path / "raw")["test"]
    repeats = run([*SMALL, "plan.critic=null", "plan.deduplicate=false"], tmp_path / "repeats")["test"]
    assert raw["corpus_accept"] == raw["unique_accept"]
    assert repeats["corpus_size"] == 24 * 2 * 4 > raw["corpus_size"]
    assert repeats["corpus_accept"] == repeats["written_accept"] == raw["written_accept"]
    assert not any(name.startswith("critic") for name in raw)


@pytest.mark.parametrize(
    "change",
    [
        ["plan.critic.rule=released", "plan.critic.held_out=0.7"],
        ["plan.critic.hidden=8", "plan.critic.dropout=0.1", "plan.critic.prior=0.77"],
    ],
)
def test_other_critics_run(change: list[str], tmp_path: Path) -> None:
    found = run([*SMALL, *change], tmp_path / "run")
    tau = found["test"]["critic_tau"]
    strict = "plan.critic.rule=released" in change
    assert all(row["kept"] == (row["score"] > tau if strict else row["score"] >= tau) for row in lines(tmp_path / "run"))


def test_a_critic_without_a_recall_scores_and_keeps_all(tmp_path: Path) -> None:
    found = run([*SMALL, "plan.critic.recall=null"], tmp_path / "run")["test"]
    rows = lines(tmp_path / "run")
    assert found["corpus_size"] == len(rows)
    assert all(0 < row["score"] < 1 for row in rows)
    assert "critic_tau" not in found


def test_a_higher_recall_keeps_more(unbroken: Path, tmp_path: Path) -> None:
    run([*SMALL, "plan.critic.recall=0.4"], tmp_path / "run")
    few, many = ({row["prompt"] + row["completion"] for row in lines(f) if row["kept"]} for f in (tmp_path / "run", unbroken))
    assert len(few) < len(many)


# -- what does not fit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (["teacher=none"], "teacher"),
        (["plan.critic.recall=0"], "plan.critic.recall"),
        (["plan.critic.recall=1.5"], "plan.critic.recall"),
        (["plan.critic.labels=9"], "plan.critic.labels"),
        (["plan.critic.labels=193"], "plan.critic.labels"),  # of 48 prompts x 4
        (["plan.critic.held_out=1"], "plan.critic.held_out"),
        (["plan.critic.fit={optim.learning: 1}"], "plan.critic.fit.optim.learning"),
        (["plan.generate.samples=0"], "plan.generate.samples"),
        (["plan.generate.top_p=0"], "plan.generate"),
        (["+plan.critic.recal=1"], "plan.critic.recal"),
        (["+plan.generate.n=1"], "plan.generate.n"),
        (["objective=lm_kd"], "objective"),
        (["plan.start_from=teacher"], "plan.start_from"),
        (["evaluation.primary=corpus_accept"], "evaluation.primary"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_spent(change: list[str], key: str, tmp_path: Path) -> None:
    kept = [o for o in SMALL if not (change == ["teacher=none"] and o.startswith("teacher"))]
    with pytest.raises(Refused) as refused:
        run([*kept, *change], tmp_path / "run")
    assert key in {p.key for p in refused.value.problems}
    assert all(p.remedy for p in refused.value.problems)
    assert list(tmp_path.iterdir()) == []


def test_data_that_cannot_judge_and_data_without_prompts_are_refused() -> None:
    tree = compose(SMALL).tree
    for dataset, key in (("sums", "plan.critic"), ("digits", "dataset")):
        problems = Pipeline().problems(tree, load_data(compose([f"dataset={dataset}"]).tree))
        assert [p.key for p in problems] == [key]
    assert Pipeline(critic=None).problems(tree, load_data(compose(["dataset=sums"]).tree)) == []


def test_labels_that_teach_nothing_and_a_critic_that_keeps_nothing_end_the_run_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Oracle, "__call__", lambda self, prompt, written: 0.0)
        with pytest.raises(RunFailed, match=r"accepted are 0 of \d+ labels to learn from, 0 of \d+ held-out ones"):
            run(SMALL, tmp_path / "one")
    monkeypatch.setattr(critic, "common_threshold", lambda *_: 2.0)
    with pytest.raises(RunFailed, match=r"keeps none of \d+ rows\n  remedy  a larger plan\.critic\.recall"):
        run(SMALL, tmp_path / "two")


def test_the_option_states_every_setting_with_its_default() -> None:
    node = compose(["plan=pipeline"]).tree["plan"]
    made = Pipeline(**{k: v for k, v in node.items() if k != "_target_"})
    assert vars(made.generate) == node["generate"] == vars(writing.Generate())
    assert vars(made.critic) == node["critic"] == vars(critic.Critic())
    assert (made.deduplicate, made.start_from) == (Pipeline().deduplicate, None) == (True, None)


def test_it_says_what_it_will_do() -> None:
    assert Pipeline().describe().endswith("a critic is trained on 4000 judged ones; one student is trained on what the critic keeps")
    assert Pipeline(critic=None).describe() == "the teacher writes 10 completions of every prompt; one student is trained on them"


def test_prompts_are_asked_once() -> None:
    data = EventData(per_cell=3, seed=1).load()
    prompts = prompts_in(data)
    assert len(prompts) == len({tuple(p) for p in prompts.tokens}) == 3600
    assert prompts.ids.tolist() == list(range(0, 3600 * 3, 3))
    assert torch.equal(prompts.heads, data.split("train").extra["head"][prompts.ids])


def test_the_bench_arms_are_what_they_are_called() -> None:
    arms = compose(["recipe=symbolic_kd_bench"]).tree["rivals"]
    plans = {arm: compose(["recipe=symbolic_kd_bench", *overrides]).tree for arm, overrides in {"own": [], **arms}.items()}
    own = plans["own"]["plan"]["critic"]
    assert (own["recall"], own["labels"], own["fit"]["optim.epochs"]) == (0.8, 4000, 30)
    assert plans["r50"]["plan"]["critic"] == {**own, "recall": 0.5}
    assert plans["raw"]["plan"]["critic"] is plans["repeats"]["plan"]["critic"] is None
    assert (plans["raw"]["plan"]["deduplicate"], plans["repeats"]["plan"]["deduplicate"]) == (True, False)
    assert plans["sft"]["plan"]["_target_"].endswith("Single")
    assert (plans["sft"]["dataset"]["graph"], plans["own"]["dataset"]["graph"]) == ("human", "web")
    assert all(tree["plan"]["generate"] == plans["own"]["plan"]["generate"] for arm, tree in plans.items() if arm != "sft")


@pytest.mark.slow
def test_two_ranks_write_judge_and_train_what_one_process_does(unbroken: Path, tmp_path: Path) -> None:
    words = [word for word in SMALL if not word.startswith("hardware")]
    ranks = ["hardware=multi_gpu", "hardware.device=cpu", "hardware.procs=2", "hardware.threads=1"]
    done = kdrun_to_end("train", *words, *ranks, f"run.dir={tmp_path / 'two'}", f"run.root={tmp_path / 'root'}", "--json")
    assert done.returncode == 0, done.stderr
    ours, theirs = lines(tmp_path / "two"), lines(unbroken)
    assert [row["completion"] for row in ours] == [row["completion"] for row in theirs]
    assert [row["kept"] for row in ours] == [row["kept"] for row in theirs]
    assert summary_of(tmp_path / "two")["test"]["accept"] == summary_of(unbroken)["test"]["accept"]
