"""Law 1 over ranks: two gloo ranks, started as a user starts them, train what one process trains."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import yaml

from kdrun.engine.records import CONFIG, METRICS
from tests.engine.processes import count_lines, kdrun_process, kdrun_to_end, wait_until
from tests.engine.running import assert_same_training, run, training_lines, weights

RANKS = ["hardware=multi_gpu", "hardware.device=cpu", "hardware.procs=2"]
# 33 samples are 17 and 16 for two ranks; the last batch of an epoch has 30.
ODD = ["source.batch_size=33"]
PLD, RKD, DIST = ["objective=pld"], ["objective=rkd"], ["objective=dist"]
CRD = ["objective=crd", "objective.negatives=20", "objective.width=8"]
FSDP2 = ["hardware.wrap=fsdp2"]
EVERY_OTHER = ["objective._target_=tests.engine.parts.EveryOther"]
TWO_PHASES = ["objective._target_=tests.engine.parts.TwoPhases"]


def assert_ranks_change_nothing(base: list[str], ranks: list[str], tmp_path: Path) -> None:
    run(base, tmp_path / "one")
    done = kdrun_to_end("train", *base, *RANKS, *ranks, f"run.dir={tmp_path / 'two'}", f"run.root={tmp_path / 'root'}", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)  # one object and nothing else, whatever the ranks had to say
    assert summary["steps"] == 6
    trees = [yaml.safe_load((tmp_path / folder / CONFIG).read_text()) for folder in ("one", "two")]
    assert [tree["hardware"]["procs"] for tree in trees] == [1, 2]
    assert json.loads((tmp_path / "two" / "provenance.json").read_text())["ranks"] == 2
    assert_same_training(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize(
    ("objective", "ranks"),
    [
        pytest.param(PLD, [], id="pld"),  # no coupling
        pytest.param(CRD, [], id="crd"),  # features gathered with gradient, connectors, state
        pytest.param(RKD, FSDP2, id="rkd-fsdp2"),
        pytest.param(EVERY_OTHER, [], id="every-other", marks=pytest.mark.slow),  # a connector without gradient at some steps
        pytest.param(RKD, [], id="rkd", marks=pytest.mark.slow),
        pytest.param(DIST, [], id="dist", marks=pytest.mark.slow),
        pytest.param(PLD, ["hardware.micro_batch=5"], id="pld-accumulated", marks=pytest.mark.slow),
        pytest.param(PLD, [*FSDP2, "hardware.micro_batch=5"], id="pld-fsdp2-accumulated", marks=pytest.mark.slow),
        pytest.param(CRD, FSDP2, id="crd-fsdp2", marks=pytest.mark.slow),
        pytest.param(TWO_PHASES, [], id="two-phases", marks=pytest.mark.slow),
        pytest.param([*TWO_PHASES, "optim.clip_norm=0.3"], FSDP2, id="two-phases-fsdp2-clipped", marks=pytest.mark.slow),
        pytest.param([*PLD, "optim.ema=0.9", "optim.clip_norm=0.5"], [], id="pld-ema-clipped", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_train_what_one_process_trains(
    objective: list[str], ranks: list[str], tiny: list[str], live: list[str], tmp_path: Path
) -> None:
    assert_ranks_change_nothing([*tiny, *live, *ODD, *objective], ranks, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_ranks_that_are_told_to_stop_save_and_can_be_resumed(wrap: str, tiny: list[str], live: list[str], tmp_path: Path) -> None:
    base = [
        *tiny,
        *live,
        *ODD,
        *CRD,
        *RANKS,
        f"hardware.wrap={wrap}",
        "optim.epochs=150",
        "evaluation.every_epochs=50",
        "run.checkpoint_every=50",
    ]
    folder = tmp_path / "run"
    with kdrun_process("train", *base, f"run.dir={folder}", "--quiet") as child:
        wait_until(lambda: count_lines(folder / METRICS) > 20, child)
        child.send_signal(signal.SIGTERM)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 75, err
    assert f"kdrun resume {folder}" in err
    steps = len(training_lines(folder))
    assert 20 <= steps < 450
    resumed = kdrun_to_end("resume", str(folder), "--quiet")
    assert resumed.returncode == 0, resumed.stderr
    unbroken = kdrun_to_end("train", *base, f"run.dir={tmp_path / 'unbroken'}", "--quiet")
    assert unbroken.returncode == 0, unbroken.stderr
    assert (folder / METRICS).read_bytes() == (tmp_path / "unbroken" / METRICS).read_bytes()
    ours, theirs = weights(folder), weights(tmp_path / "unbroken")
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_refusal_in_a_rank_is_the_refusal_of_the_command(tiny: list[str], tmp_path: Path) -> None:
    """Only the data's size can tell that a tail batch leaves a rank without samples: nobody sees it before the ranks do."""
    base = [*tiny, *RANKS, "source.batch_size=19", f"run.dir={tmp_path / 'run'}"]  # 96 = 5 * 19 + 1
    done = kdrun_to_end("train", *base)
    assert done.returncode == 2, done.stderr
    assert "source.drop_last=true" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
