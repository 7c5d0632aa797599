"""Clients shared out over ranks: the same bytes as in one process, however the ranks end. Two gloo ranks."""

from __future__ import annotations

import json
import shutil
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kdrun.config.check import check
from kdrun.config.compose import compose
from kdrun.engine.distributed import Ranks
from kdrun.engine.records import METRICS, SUMMARY, read_json
from kdrun.engine.report import Reporter
from kdrun.engine.run import execute
from kdrun.engine.stage import StageRun
from kdrun.errors import KdrunError
from kdrun.plan.federation import RECORD
from kdrun.plan.peers import Peers
from tests.engine.processes import count_lines, kdrun_process, kdrun_to_end, wait_until
from tests.engine.running import Killed, Notes, assert_bit_equal, killing, resume, run, weights
from tests.plan.test_federated import CLIENTS, FEDERATION, RANKS, assert_same_federation

SHARED = [*(o for o in FEDERATION if not o.startswith("hardware")), *RANKS, "hardware.procs=2", "hardware.threads=1"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of it."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdrun.plan.federation.draw", lambda *args: None)
        run(FEDERATION, folder)
    return folder


# By folder: the stage at whose step the rank that has it is killed, before or after the hook has done its work.
DEATHS: dict[str, tuple[str, int, bool] | None] = {"whole": None, "early": ("clients 0", 4, False), "late": ("clients 3", 10, True)}


def one_rank(rank: int, folder: str) -> None:
    """A rank's part of several runs."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    told = {name: tell_of_a_run(Path(folder) / name, death, Ranks(rank, 2, rank)) for name, death in DEATHS.items()}
    Path(folder, f"{rank}.json").write_text(json.dumps(told, default=str), encoding="utf-8")
    dist.destroy_process_group()


def tell_of_a_run(home: Path, death: tuple[str, int, bool] | None, ranks: Ranks) -> dict[str, Any]:
    """What a rank says of a run; one that is killed is gone on with."""
    composed = compose([*SHARED, f"run.dir={home}", f"run.root={home.parent / 'root'}"])
    check(composed)
    failure, notes = [], Notes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdrun.plan.federation.draw", lambda *args: None)
        patch.setattr("kdrun.engine.session.plot_curves", lambda folder: None)
        if death is not None:
            with pytest.MonkeyPatch.context() as end:
                killing(end, "step_done", death[1], death[0], death[2])
                with pytest.raises((Killed, KdrunError)) as caught:
                    execute(composed, Reporter(), home, ranks=ranks)
            failure = [type(caught.value).__name__, str(caught.value)]
        stages = names_of_stages(patch)
        summary = execute(composed, notes, home, resume=death is not None, ranks=ranks).summary
    return {"failure": failure, "stages": stages, "summary": summary, "notes": notes.notes, "group": dist.is_initialized()}


def names_of_stages(patch: pytest.MonkeyPatch) -> list[str]:
    """A list that fills with the stages that begin from now on."""
    begun: list[str] = []
    original = StageRun.begin

    def begin(self: StageRun, resume: bool) -> None:
        begun.append(self.stage.name)
        original(self, resume)

    patch.setattr(StageRun, "begin", begin)
    return begun


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of their runs, and what both ranks tell of each."""
    folder = tmp_path_factory.mktemp("two-ranks")
    mp.spawn(one_rank, args=(str(folder),), nprocs=2)
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_two_ranks_make_what_one_process_makes(two_ranks: tuple[Path, list[dict[str, Any]]], unbroken: Path) -> None:
    folder, told = two_ranks[0] / "whole", [t["whole"] for t in two_ranks[1]]
    assert_same_federation(folder, unbroken)
    assert [t["stages"] for t in told] == [["clients 0", "clients 2"], ["clients 1", "clients 3"]]
    ours, theirs = (read_json(f / SUMMARY) for f in (folder, unbroken))
    assert told[0]["summary"] == told[1]["summary"] == ours
    for summary in (ours, theirs):
        summary["test"].pop("filter_seconds")
        for row in summary["clients"]:
            assert row.pop("seconds") > 0  # also those of the other rank's clients
    for key in ("value", "test", "clients", "steps", "student", "proxy_samples", "test_reads"):
        assert ours[key] == theirs[key], key
    assert read_json(folder / "provenance.json")["ranks"] == 2
    rounds = [[note for note in t["notes"] if note.startswith("round ")] for t in told]
    assert rounds[0] == rounds[1]
    assert "on average over 4 clients" in rounds[0][-1]


@pytest.mark.parametrize("name", [name for name, death in DEATHS.items() if death is not None])
def test_ranks_of_which_one_is_killed_are_resumed_to_the_same_bytes(
    name: str, two_ranks: tuple[Path, list[dict[str, Any]]], unbroken: Path
) -> None:
    assert_same_federation(two_ranks[0] / name, unbroken)
    told, death = [t[name] for t in two_ranks[1]], DEATHS[name]
    assert death is not None
    owner = int(death[0][-1]) % 2
    assert told[owner]["failure"] == ["Killed", ""]
    assert told[1 - owner]["failure"] == ["KdrunError", "Killed: "]  # it does not wait for the other, and says why it ends
    assert [t["group"] for t in told] == [True, True]


def test_a_run_of_two_ranks_is_gone_on_with_by_one(two_ranks: tuple[Path, list[dict[str, Any]]], unbroken: Path, tmp_path: Path) -> None:
    """Nothing that is kept depends on who made it."""
    shutil.copytree(two_ranks[0] / "whole", tmp_path / "run")
    for number in (1, 2):  # as if the ranks had ended before these clients' last checkpoints were whole
        newest = max((tmp_path / "run" / "clients" / str(number) / "checkpoints").iterdir())
        (newest / "state.json").unlink()
    resume(FEDERATION, tmp_path / "run")
    assert_same_federation(tmp_path / "run", unbroken)


def test_a_failure_of_one_rank_is_that_of_all_with_its_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    peers = Peers(0, 2, tmp_path)
    monkeypatch.setattr(Peers, "gather", lambda self, value: [value, (None, ("stopped at step 3 of 15", 75))])
    with pytest.raises(KdrunError, match="stopped at step 3 of 15") as caught:
        peers.together(lambda: 1)
    assert caught.value.exit_code == 75
    with pytest.raises(ZeroDivisionError):  # its own comes first
        peers.together(lambda: 1 // 0)


def test_a_signal_between_two_stages_stops_the_run_and_leaves_it_resumable(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdrun.plan.federation.draw", lambda *args: None)
    original = Peers.together
    seen: list[int] = []

    def together(self: Peers, work: object) -> object:
        seen.append(1)
        if len(seen) == 4:
            signal.raise_signal(signal.SIGTERM)
        return original(self, work)  # type: ignore[arg-type]

    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        patch.setattr(Peers, "together", together)
        with pytest.raises(KdrunError, match="go on with: kdrun resume") as caught:
            run(FEDERATION, tmp_path / "run")
    assert caught.value.exit_code == 75
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    steps = [max(p.name for p in (tmp_path / "run" / "clients" / str(n) / "checkpoints").iterdir()) for n in range(CLIENTS)]
    assert steps == ["step-00000002"] * CLIENTS  # all of them, though none was at its cadence
    resume(FEDERATION, tmp_path / "run")
    assert_same_federation(tmp_path / "run", unbroken)


@pytest.mark.slow
def test_ranks_that_are_told_to_stop_save_and_can_be_resumed(tmp_path: Path) -> None:
    """As a user starts and stops them."""
    rounds = ["plan.rounds=60", "optim.epochs=60", "run.checkpoint_every=7", "evaluation.every_epochs=20"]
    one = [o for o in FEDERATION if not o.startswith(("plan.rounds", "optim.epochs"))]
    two = [o for o in SHARED if not o.startswith(("plan.rounds", "optim.epochs"))]
    folder = tmp_path / "run"
    with kdrun_process("train", *two, *rounds, f"run.dir={folder}", "--quiet") as child:
        wait_until(lambda: count_lines(folder / "clients" / "1" / METRICS) > 60, child)
        child.send_signal(signal.SIGTERM)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 75, err
    assert f"kdrun resume {folder}" in err
    assert not (folder / SUMMARY).exists()
    resumed = kdrun_to_end("resume", str(folder), "--quiet")
    assert resumed.returncode == 0, resumed.stderr
    run([*one, *rounds], tmp_path / "one")
    assert (folder / RECORD).read_bytes() == (tmp_path / "one" / RECORD).read_bytes()
    assert_bit_equal(weights(folder), weights(tmp_path / "one"))
    for number in range(CLIENTS):
        ours, theirs = (f / "clients" / str(number) / METRICS for f in (folder, tmp_path / "one"))
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
def test_more_ranks_than_clients_are_refused_by_the_command(tmp_path: Path) -> None:
    done = kdrun_to_end("train", *SHARED, "plan.clients=1", "plan.partition=iid", f"run.dir={tmp_path / 'run'}")
    assert done.returncode == 2, done.stderr
    assert "hardware.procs=1 at most" in done.stderr
    assert not (tmp_path / "run").exists()


def test_no_group_is_seen_by_work_done_apart(tmp_path: Path) -> None:
    """Also where that work fails; torchmetrics would add up the hits of different clients."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        peers = Peers(0, 1, tmp_path)
        assert peers.together(dist.is_initialized) == [False]
        with pytest.raises(ZeroDivisionError):
            peers.together(lambda: 1 // 0)
        assert dist.is_initialized()
        dist.all_reduce(torch.ones(1))
    finally:
        dist.destroy_process_group()
