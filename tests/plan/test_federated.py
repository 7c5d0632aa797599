"""Clients that learn from each other: one stage each, exchanges between their segments, the same bytes however they are interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kdrun.config.compose import compose
from kdrun.engine import state
from kdrun.engine.build import load_data
from kdrun.engine.records import METRICS, SUMMARY, read_json, read_lines
from kdrun.errors import Refused, RunFailed
from kdrun.objective.edgefd import COVERED
from kdrun.plan.client import Client
from kdrun.plan.exchange import Upload, precision_and_recall
from kdrun.plan.federated import Federated
from kdrun.plan.federation import RECORD
from tests.conftest import Outcome
from tests.engine.running import (
    Killed,
    Notes,
    assert_bit_equal,
    checkpoint_tensors,
    killing,
    run,
    run_killed,
    training_lines,
    weights,
)

CLIENTS, ROUNDS, LOCAL, DISTILL = 4, 3, 2, 3
FEDERATION = [
    "dataset=bimodal", "dataset.classes=4", "dataset.dimension=4", "dataset.train_per_class=24", "dataset.test_per_class=10",
    "teacher=none", "student=mlp", "student.hidden=[8]", "objective=edgefd",
    "source=federated", "source.batch_size=16", "source.proxy_batch_size=8",
    "plan=federated", f"plan.clients={CLIENTS}", f"plan.rounds={ROUNDS}", f"plan.local_steps={LOCAL}", f"plan.distill_steps={DISTILL}",
    "plan.proxy_fraction=0.3", "plan.students=[{hidden: [6]}]",
    "optim=adamw", f"optim.epochs={ROUNDS}", "optim.lr=0.01", "hardware=cpu", "hardware.threads=1", "run.log_every=1",
]  # fmt: skip

RANKS = ["hardware=multi_gpu", "hardware.device=cpu"]


def exchanges(folder: Path) -> list[dict[str, Any]]:
    """What was kept of every round, in order."""
    found = [state.newest(folder / "kept" / f"round-{number}") for number in range(1, ROUNDS + 1)]
    assert all(f is not None for f in found)
    return [f[1] for f in found if f is not None]


def assert_same_federation(broken: Path, unbroken: Path) -> None:
    """Nothing that a run leaves behind, but for the clock, tells that it was broken."""
    assert (broken / RECORD).read_bytes() == (unbroken / RECORD).read_bytes()
    assert_bit_equal(weights(broken), weights(unbroken))
    for ours, theirs in zip(exchanges(broken), exchanges(unbroken), strict=True):
        assert torch.equal(ours["targets"], theirs["targets"])
        assert {k: v for k, v in ours.items() if k not in ("ids", "targets")} == {
            k: v for k, v in theirs.items() if k not in ("ids", "targets")
        }
    for number in range(CLIENTS):
        a, b = (folder / "clients" / str(number) for folder in (broken, unbroken))
        assert (a / METRICS).read_bytes() == (b / METRICS).read_bytes()
        assert_bit_equal(checkpoint_tensors(a), checkpoint_tensors(b))


@pytest.fixture(autouse=True)
def no_federation_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `no_pictures`; the unbroken run, which is older, has drawn its own."""
    monkeypatch.setattr("kdrun.plan.federation.draw", lambda *args: None)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    run(FEDERATION, folder)
    return folder


@pytest.mark.parametrize(
    ("client", "step", "more"),
    [
        ("clients 0", 1, []),  # before anybody has spoken
        ("clients 2", 4, []),  # in the middle of a distillation, two clients ahead
        ("clients 3", 7, []),  # at the last local step before an exchange
        ("clients 1", 9, ["run.checkpoint_every=0.4"]),  # with checkpoints inside a round
        ("clients 1", 13, ["run.checkpoint_every=2"]),  # with fewer: all of them hear of round 3 anew
        ("clients 2", 10, ["run.checkpoint_every=2"]),  # client 0 has saved round 2, client 2 nothing
        ("clients 2", 14, ["run.checkpoint_every=50"]),  # all begin anew, and hear what was said
        ("clients 3", 15, []),  # at the very end
    ],
)
def test_a_federation_killed_inside_a_round_is_resumed_to_the_same_bytes(
    client: str, step: int, more: list[str], unbroken: Path, tmp_path: Path, kdrun: Callable[..., Outcome]
) -> None:
    run_killed([*FEDERATION, *more], tmp_path / "run", "step_done", step, client)
    assert kdrun("resume", str(tmp_path / "run"), "--quiet").code == 0
    if more:  # it has other checkpoints
        assert (tmp_path / "run" / RECORD).read_bytes() == (unbroken / RECORD).read_bytes()
        assert_bit_equal(weights(tmp_path / "run"), weights(unbroken))
    else:
        assert_same_federation(tmp_path / "run", unbroken)


def test_a_federation_killed_in_an_exchange_and_again_later_is_resumed_to_the_same_bytes(
    unbroken: Path, tmp_path: Path, kdrun: Callable[..., Outcome]
) -> None:
    original = Client.speak

    def speak(self: Client, *args: Any) -> Upload:
        if self.number == 2 and self.training.stage.step > LOCAL:
            raise Killed
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Client, "speak", speak)
        with pytest.raises(Killed):
            run(FEDERATION, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        killing(patch, "step_done", 11, "clients 1")
        with pytest.raises(Killed):
            kdrun("resume", str(tmp_path / "run"), "--quiet")
    assert kdrun("resume", str(tmp_path / "run"), "--quiet").code == 0
    assert_same_federation(tmp_path / "run", unbroken)


def test_clients_are_saved_at_the_run_s_cadence_and_not_at_every_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[tuple[str, int]] = []
    original = state.save

    def save(folder: Path, step: int, *args: Any, **more: Any) -> Path:
        saved.append((folder.parent.name, step))
        return original(folder, step, *args, **more)

    monkeypatch.setattr(state, "save", save)
    run([*FEDERATION, "run.checkpoint_every=2"], tmp_path / "run")
    assert sorted(s for s in saved if s[0] != "kept") == [(str(n), step) for n in range(CLIENTS) for step in (10, 15)]


def test_what_is_not_finite_is_not_exchanged(tmp_path: Path) -> None:
    """On a GPU the losses are looked at now and then only."""
    original = Client.speak

    def speak(self: Client, *args: Any) -> Upload:
        if self.number == 1:
            with torch.no_grad():
                next(self.training.exported().parameters()).fill_(torch.nan)
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Client, "speak", speak)
        with pytest.raises(RunFailed, match=f"client 1 says what is not finite at step {LOCAL}"):
            run(FEDERATION, tmp_path / "run")
    assert not (tmp_path / "run" / "kept" / "round-1").exists()


def test_the_order_of_the_clients_does_not_matter(unbroken: Path, tmp_path: Path) -> None:
    original = Federated._enrol

    def enrol(self: Federated, *args: Any) -> Any:
        clients, outcome = original(self, *args)
        return clients[::-1], outcome

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Federated, "_enrol", enrol)
        run(FEDERATION, tmp_path / "run")
    assert (tmp_path / "run" / RECORD).read_bytes() == (unbroken / RECORD).read_bytes()
    assert_bit_equal(weights(tmp_path / "run"), weights(unbroken))
    for ours, theirs in zip(exchanges(tmp_path / "run"), exchanges(unbroken), strict=True):
        assert torch.equal(ours["targets"], theirs["targets"])


def test_a_client_that_says_nothing_is_as_if_it_were_not_heard(unbroken: Path, tmp_path: Path) -> None:
    """Without a filter; the last client's uploads are thrown away, or never made."""

    def drop(self: Client, *args: Any) -> Upload:
        said = original(self, *args)
        return said if self.number < CLIENTS - 1 else Upload(self.number, said.ids[:0], said.said[:0])

    original, found = Client.speak, []
    base = [*FEDERATION, "plan.estimator=none"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Client, "speak", drop)
        run(base, tmp_path / "dropped")
        found.append(exchanges(tmp_path / "dropped"))
    silence = Federated._masks

    def masks(self: Federated, *args: Any) -> dict[str, Any]:
        made = silence(self, *args)
        return {**made, "mask": made["mask"] & (torch.arange(CLIENTS) < CLIENTS - 1)[:, None]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Federated, "_masks", masks)
        run(base, tmp_path / "silent")
        found.append(exchanges(tmp_path / "silent"))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one["targets"], other["targets"])
        assert one["up"][-1] == other["up"][-1] == 0
    assert_bit_equal(weights(tmp_path / "dropped"), weights(tmp_path / "silent"))


def test_a_client_alone_that_speaks_of_all_learns_from_its_labels_only(tmp_path: Path) -> None:
    """q = p_c before any update: the first distillation step of a round has a zero gradient."""
    base = [
        *FEDERATION,
        "plan.estimator=none",
        "plan.clients=1",
        "plan.partition=iid",
        "plan.students=[]",
        "optim.name=momentum",
        "optim.weight_decay=0",
        "optim.momentum=0",
    ]
    run(base, tmp_path / "run")
    lines = training_lines(tmp_path / "run" / "clients" / "0")
    assert len(lines) == ROUNDS * (LOCAL + DISTILL)
    for line in lines:
        if "kd" in line["terms"]:
            assert abs(line["terms"]["kd"]) < 1e-6
            assert line["grad_norm"] < 1e-6
        else:
            assert line["grad_norm"] > 1e-2


def test_if_nobody_speaks_no_distillation_step_is_made(tmp_path: Path) -> None:
    masks, base = Federated._masks, [*FEDERATION, "optim.schedule.name=constant"]

    def nobody(self: Federated, *args: Any) -> dict[str, Any]:
        made = masks(self, *args)
        return {**made, "mask": torch.zeros_like(made["mask"])}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Federated, "_masks", nobody)
        summary = run(base, tmp_path / "run")
    run([*base, "objective=ce", "plan.distill_steps=0"], tmp_path / "alone")
    assert_bit_equal(weights(tmp_path / "run"), weights(tmp_path / "alone"))  # Adam did not move either
    assert summary["test"]["bytes_up"] == summary["test"]["bytes_down"] == 0
    assert len(training_lines(tmp_path / "run" / "clients" / "0")) == ROUNDS * LOCAL


def test_who_speaks_of_what_is_fixed_over_the_rounds(unbroken: Path) -> None:
    filters = state.newest(unbroken / "kept" / "filter")
    assert filters is not None
    spoken = filters[1]["mask"].sum(1)
    for exchange in exchanges(unbroken):
        assert exchange["up"] == [int(n) * (8 + 4 * 4) for n in spoken]  # an id and four probabilities each
        assert exchange["down"] == len(exchange["ids"]) * (8 + 4 * 4)
        torch.testing.assert_close(exchange["targets"].sum(1), torch.ones(len(exchange["ids"])))


def test_the_run_s_numbers_are_those_of_all_clients(unbroken: Path) -> None:
    summary = read_json(unbroken / SUMMARY)
    last = [read_lines(unbroken / "clients" / str(n) / METRICS)[-1] for n in range(CLIENTS)]
    for metric in ("top1", "nll", "ece"):
        assert summary["test"][metric] == pytest.approx(sum(line[metric] for line in last) / CLIENTS, rel=1e-12)
    assert summary["value"] == summary["test"]["top1"]
    assert [row["top1"] for row in summary["clients"]] == [line["top1"] for line in last]
    assert [row["classes"] for row in summary["clients"]] == [[0], [1], [2], [3]]
    assert [row["student"] for row in summary["clients"]] == [{"hidden": [8]}, {"hidden": [6]}] * 2
    assert summary["test"]["bytes_up"] == sum(sum(e["up"]) for e in exchanges(unbroken))
    assert summary["test"]["bytes_down"] == CLIENTS * sum(e["down"] for e in exchanges(unbroken))
    assert summary["proxy_samples"] == CLIENTS * round(0.3 * 24)
    lines = read_lines(unbroken / RECORD)
    assert [line["epoch"] for line in lines] == list(range(1, ROUNDS + 1))
    assert lines[-1]["top1"] == pytest.approx(summary["value"], rel=1e-12)
    assert (unbroken / "plots" / "clients.png").stat().st_size > 10_000


def test_filter_quality_is_counted_over_all_pairs() -> None:
    truth = torch.tensor([[True, True, False], [False, False, True]])
    mask = torch.tensor([[True, False, True], [False, True, True]])
    assert precision_and_recall(mask, truth) == (50.0, pytest.approx(200 / 3))
    assert precision_and_recall(torch.ones_like(truth), truth) == (50.0, 100.0)


@pytest.mark.parametrize(("estimator", "precision", "recall"), [("none", 25.0, 100.0), ("oracle", 100.0, 100.0), ("kulsif", None, None)])
def test_filters_of_every_kind_speak_as_they_should(estimator: str, precision: float | None, recall: float | None, tmp_path: Path) -> None:
    summary = run([*FEDERATION, f"plan.estimator={estimator}", "plan.rounds=1", "optim.epochs=1"], tmp_path / "run")
    test = summary["test"]
    if precision is not None:
        assert (test["filter_precision"], test["filter_recall"], test["filter_seconds"]) == (precision, recall, 0.0)
    else:
        assert test["filter_recall"] > 80
        assert test["filter_precision"] > 25  # better than chance
        assert test["filter_seconds"] > 0
    assert all(row["speaks_of"] >= row["given"] for row in summary["clients"])  # one's own always


def test_a_filter_on_all_principal_components_is_that_on_the_inputs(unbroken: Path, tmp_path: Path) -> None:
    """As many components as inputs are a rotation, which no distance sees; one component is another filter."""

    def mask(folder: Path) -> torch.Tensor:
        kept = state.newest(folder / "kept" / "filter")
        assert kept is not None
        return kept[1]["mask"]

    for components in (4, 1):
        run([*FEDERATION, "plan.extractor=pca", f"plan.components={components}", "run.dry=true"], tmp_path / str(components))
    assert torch.equal(mask(tmp_path / "4"), mask(unbroken))
    assert not torch.equal(mask(tmp_path / "1"), mask(unbroken))


def test_a_subset_of_the_proxy_samples_is_the_same_for_all_and_another_in_every_round(tmp_path: Path) -> None:
    run([*FEDERATION, "plan.estimator=none", "plan.proxy_per_round=5"], tmp_path / "run")
    chosen = [tuple(e["ids"].tolist()) for e in exchanges(tmp_path / "run")]
    assert [len(ids) for ids in chosen] == [5] * ROUNDS
    assert len(set(chosen)) == ROUNDS
    assert [e["up"] for e in exchanges(tmp_path / "run")] == [[5 * 24] * CLIENTS] * ROUNDS


def test_a_client_is_shown_no_label_and_no_further_row_of_the_others() -> None:
    composed = compose(FEDERATION)
    data = load_data(composed.tree)
    plan = Federated(**{k: v for k, v in composed.tree["plan"].items() if k != "_target_"})
    seen = plan.view(composed.tree, data)
    assert (seen.split("proxy").targets == -1).all()
    assert seen.split("proxy").extra == {}
    assert seen.split("train").targets.unique().tolist() == [0]
    assert not seen.split("train").extra[COVERED].any()
    assert torch.isin(seen.split("train").ids, data.split("train").ids).all()
    positions = torch.arange(len(seen.split("proxy")))
    shared = seen.rows("proxy", positions, torch.zeros_like(positions), 0)
    whole = torch.searchsorted(data.split("train").ids, shared.ids)
    assert torch.equal(shared.inputs, data.rows("train", whole, torch.zeros_like(whole), 0).inputs)


def test_a_round_is_one_line_for_people(tmp_path: Path) -> None:
    reporter = Notes()
    run(FEDERATION, tmp_path / "run", reporter)
    rounds = [note for note in reporter.notes if note.startswith("round ")]
    assert [note.split(":")[0] for note in rounds] == [f"round {n} of {ROUNDS}" for n in range(1, ROUNDS + 1)]
    assert "on average over 4 clients" in rounds[0]
    brief = Notes()
    brief.brief = True
    run(FEDERATION, tmp_path / "brief", brief)
    assert [note for note in brief.notes if note.startswith("round ")] == rounds[-1:]


def test_a_dry_run_takes_two_steps_of_every_client(tmp_path: Path) -> None:
    summary = run([*FEDERATION, "run.dry=true"], tmp_path / "run")
    assert summary["steps"] == 2
    assert summary["tainted"]
    assert all(len(training_lines(tmp_path / "run" / "clients" / str(n))) == 2 for n in range(CLIENTS))


@pytest.mark.parametrize(
    ("change", "key", "remedy"),
    [
        (["source=loader"], "source", "source=federated"),
        (["objective=ce"], "objective", "plan.distill_steps=0"),
        (["teacher=mlp"], "teacher", "teacher=none"),
        (["optim.epochs=7"], "optim.epochs", "optim.epochs=3"),
        (["source.local_steps=1"], "source.local_steps", "plan.local_steps"),
        (["plan.clients=2"], "plan.classes_per_client", "plan.classes_per_client=2"),
        (["plan.classes_per_client=5"], "plan.classes_per_client", "plan.classes_per_client=4"),
        (["plan.clients=100"], "plan.clients", "fewer clients"),
        (["plan.students=[{hiden: [6]}]"], "plan.students.0.hiden", "hidden"),
        (["plan.extractor=resnet18"], "plan.extractor", "plan.extractor=null"),
        (["plan.start_from=elsewhere"], "plan.students", "plan.students=[]"),
        (["plan.ridge=0"], "plan.ridge", "(0, inf)"),
        (["plan.components=0"], "plan.components", "[1, inf)"),
        (["evaluation.patience=2"], "evaluation.patience", "evaluation.patience=null"),
        ([*RANKS, "hardware.procs=5"], "hardware.procs", "hardware.procs=4 at most"),
        ([*RANKS, "hardware.procs=2", "hardware.wrap=fsdp2"], "hardware.wrap", "hardware.wrap=ddp"),
        ([*RANKS, "hardware.procs=2", "hardware.micro_batch=[6,2]"], "hardware.micro_batch", "hardware.micro_batch=6"),
        (["plan.estimator=kmean"], "plan.estimator", "kmeans"),
        (["plan=single", "source=loader"], "dataset", "rows it has"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_spent(change: list[str], key: str, remedy: str, tmp_path: Path) -> None:
    # The groups of the base that a change replaces must not be set key by key.
    replaced = tuple(f"{c.partition('=')[0]}." for c in change if "." not in c.partition("=")[0])
    kept = [o for o in FEDERATION if not o.startswith(replaced)] if replaced else FEDERATION
    with pytest.raises(Refused) as caught:
        run([*kept, *change], tmp_path / "run")
    assert key in [p.key for p in caught.value.problems]
    assert any(remedy in p.remedy for p in caught.value.problems if p.key == key)
    assert list(tmp_path.iterdir()) == []


def test_the_option_states_every_field() -> None:
    tree = compose(["plan=federated", "source=federated"]).tree
    assert {k: v for k, v in tree["plan"].items() if k != "_target_"} == vars(Federated())
    assert json.dumps(tree["source"])


def test_data_without_a_proxy_split_is_as_it_was() -> None:
    """A client's data keep the name, ids and test rows of the whole."""
    composed = compose(FEDERATION)
    data = load_data(composed.tree)
    seen = Federated(clients=4, students=[]).view(composed.tree, data)
    assert replace(seen, splits=data.splits).fingerprint == data.fingerprint
    assert seen.split("test") is data.split("test")
