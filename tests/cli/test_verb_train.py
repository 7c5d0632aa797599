"""kdrun train: one run, as people and as programs read it; what was limited is marked and kept out of the ledger."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
from rich.console import Console

from kdrun.cli import console
from kdrun.cli.view import LiveReporter
from tests.conftest import TINY, Outcome

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # everything but tab and newline
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7])(?:;\d+)*m")
KD = [*TINY, "objective=kd"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """`terminal("train", ...)`: what a colour terminal is sent."""

    def run(*arguments: str) -> str:
        from kdrun.cli import main

        shown = Terminal()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["kdrun", *arguments])
            patch.setattr("sys.stdout", shown)
            console.out.cache_clear()
            with pytest.raises(SystemExit) as ended:
                main()
        assert ended.value.code == 0
        return shown.getvalue()

    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    yield run
    console.out.cache_clear()


def test_a_run_says_what_it_does_and_ends_with_its_number(finished: tuple[Path, Outcome]) -> None:
    folder, outcome = finished
    lines = outcome.out.splitlines()
    assert re.fullmatch(r"run: fitnet,? mlp -> mlp", lines[0])
    for fact in (
        "data     gaussians: 96 train, 60 test; 6 classes",
        "schedule 2 epochs, 6 steps, momentum, lr 0.05",
        "seed     1",
        f"folder   {folder}",
    ):
        assert f"  {fact}" in lines
    assert any(re.match(r"teacher measured here: top1 \d", line) for line in lines)
    assert any(re.match(r"student epoch 2  test: top1 [\d.]+% .*agreement [\d.]+%", line) for line in lines)
    summary = json.loads((folder / "summary.json").read_text())
    assert re.search(rf"fitnet \(mlp\)\W+{summary['value']:.2f}", outcome.out)
    assert re.search(rf"teacher \(mlp\)\W+{summary['teacher']['top1']:.2f}", outcome.out)
    assert f"measure  kdrun eval {folder}" in lines
    assert outcome.err == ""


def test_a_run_leaves_what_it_promises(finished: tuple[Path, Outcome]) -> None:
    folder = finished[0]
    files = "config.yaml run.json provenance.json metrics.jsonl timing.jsonl summary.json evaluation.json"
    assert {p.name for p in folder.iterdir()} == {*files.split(), "student.safetensors", "checkpoints", "plots"}
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["teacher"]["sha256"]
    assert provenance["data"]["fingerprint"]
    assert provenance["environment"]["packages"]["torch"] == metadata.version("torch")
    assert provenance["origins"]["optim.epochs"] == "command line"
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "loss" in m] == [1, 2, 3, 4, 5, 6]
    assert set(metrics[0]["terms"]) == {"ce", "hint"}


def test_json_is_one_object_and_nothing_else(kdrun: Callable[..., Outcome], here: Path) -> None:
    outcome = kdrun("train", *KD, "--json")
    summary = outcome.json  # raises if anything else was printed
    assert summary["metric"] == "top1"
    assert summary["value"] == summary["test"]["top1"]
    assert summary == json.loads((Path(summary["folder"]) / "summary.json").read_text())
    assert outcome.err == ""


def test_quiet_prints_the_result_and_no_progress(kdrun: Callable[..., Outcome], here: Path) -> None:
    outcome = kdrun("train", *KD, "-q")
    assert "kd (mlp)" in outcome.out
    assert "epoch 1" not in outcome.out
    assert "compile" not in outcome.out


def test_a_loss_that_is_not_finite_ends_the_run_with_exit_code_1(kdrun: Callable[..., Outcome], here: Path) -> None:
    outcome = kdrun("train", *KD, "optim.lr=1e30", "optim.epochs=9", "run.dir=run", "-q")
    assert outcome.code == 1
    assert re.match(r"failed: not finite at step \d+ of student, phase student: term.* (ce|kd).*; batch of 32 samples, ids \d", outcome.err)
    assert "Traceback" not in outcome.err
    assert kdrun("ls", "runs", "--root=.", "--json").json[0]["state"] in ("started", "resumable")


@pytest.mark.slow
def test_a_pipe_gets_no_control_codes(tiny_cifar100: Path, tmp_path: Path) -> None:
    """The whole process, with a data set that its library would show bars for, where colours are wished for by the environment's TERM."""
    command = [
        sys.executable,
        "-m",
        "kdrun",
        "train",
        "dataset=cifar100",
        f"dataset.path={tiny_cifar100}",
        "student=resnet8",
        "run.dry=true",
    ]
    environment = {**os.environ, "TERM": "xterm-256color", "HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": os.getcwd()}
    done = subprocess.run([*command, "hardware=cpu"], capture_output=True, env=environment, cwd=tmp_path, check=True, timeout=300)
    assert not CONTROL.findall(done.stdout.decode() + done.stderr.decode())


def test_plain_output_has_no_control_codes(finished: tuple[Path, Outcome], compared: tuple[Path, Outcome]) -> None:
    for outcome in (finished[1], compared[1]):
        assert not CONTROL.findall(outcome.out + outcome.err)


def test_a_terminal_gets_colours_and_a_live_line(terminal: Callable[..., str], here: Path) -> None:
    shown = terminal("train", *KD, "run.dry=true")
    assert COLOUR.search(shown)
    assert "\x1b[2K" in shown  # a line that is written over


def test_the_live_line_tells_epoch_terms_rate_memory_and_time_left() -> None:
    shown = Terminal()
    live = LiveReporter(Console(file=shown, force_terminal=True, width=200))
    with live.progress:
        live.stage_started("student", 0, 20, 10, 32)
        live.step_done("student", 5)
        record = {"loss": 1.25, "terms": {"ce": 1.0, "kd": 0.5}, "lr": 0.05, "images_per_s": 4321.0, "memory_bytes": 3 * 2**30}
        live.logged("student", 5, record)
        live.evaluated("student", 0.5, {"test": {"top1": 61.24}})
        live.progress.refresh()
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown.getvalue())
    assert re.search(
        r"student test top1 61\.24%.*5/20 epoch 0\.5  loss 1\.250 \(ce 1 kd 0\.5\)  lr 0\.05 4,321/s 3\.0 GiB [-\d]:[-\d]{2}:", plain
    )


def test_no_color_is_honoured(terminal: Callable[..., str], here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    shown = terminal("train", *KD, "run.dry=true")
    assert "kd (mlp)" in shown
    assert not COLOUR.search(shown)


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (["run.dry=true"], "run.dry"),
        (["run.max_steps=3"], "run.max_steps=3"),
        (["dataset=digits", "student=mlp", "dataset.subset=40"], "dataset.subset from the command line"),
        (["dataset=digits", "student=mlp", "dataset.subset_test=40"], "dataset.subset_test from the command line"),
    ],
)
def test_a_limited_run_is_tainted_and_says_so(kdrun: Callable[..., Outcome], here: Path, limit: list[str], said: str) -> None:
    own = [o for o in TINY if not (limit[0] == "dataset=digits" and o.startswith(("dataset", "teacher")))]
    outcome = kdrun("train", *own, "objective=ce", "teacher=none", "run.dir=run", *limit)
    assert outcome.code == 0, outcome.err
    assert re.search(rf"tainted \(.*{re.escape(said)}.*\): may not enter the ledger", outcome.out)
    (taint,) = json.loads((here / "run" / "summary.json").read_text())["tainted"]
    assert said in taint


@pytest.mark.parametrize("primary", ["agreement", "nll"])
def test_a_run_may_be_judged_by_another_metric(kdrun: Callable[..., Outcome], here: Path, own_recipes: Path, primary: str) -> None:
    """One that a teacher does not have, or of which less is better; the published accuracies are not put beside it."""
    small = ["recipe=small", f"--config-dir={own_recipes}", f"evaluation.primary={primary}", "scale=paper", 'claims=["pld > kd"]']
    for arms in (["run.rivals=false", "run.seeds=null"], ["rivals={kd: ['objective=kd']}", "run.seeds=[1,2]"]):
        outcome = kdrun("train", *small, *arms)
        assert outcome.code == 0, outcome.err
        assert primary in outcome.out
        assert "60.00" not in outcome.out
    assert kdrun("ls", "runs", "--json").json[0]["result"].startswith(primary)


def test_a_whole_run_is_not_tainted(finished: tuple[Path, Outcome]) -> None:
    folder, outcome = finished
    assert json.loads((folder / "summary.json").read_text())["tainted"] == []
    assert "tainted" not in outcome.out


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        ("run.dry=true", "run.dry"),
        ("run.max_steps=3", "run.max_steps=3"),
        ("optim.lr=0.3", "optim.lr is set on the command line, not by the recipe"),
        ("dataset.n_train=50", "dataset.n_train is set on the command line"),
        ("optim=adamw", "optim is set on the command line"),
        ("source.batch_size=7", "source.batch_size is set on the command line"),
    ],
)
def test_what_is_not_the_recipe_is_refused_for_the_ledger_before_it_costs_anything(
    kdrun: Callable[..., Outcome], here: Path, own_recipes: Path, limit: str, reason: str
) -> None:
    for extra in ([], ["run.rivals=false", "run.seeds=null"]):
        outcome = kdrun("train", "recipe=small", f"--config-dir={own_recipes}", "run.ledger=true", limit, *extra)
        assert outcome.code == 3
        assert outcome.err.startswith("check failed: this may not enter the ledger: ")
        assert reason in outcome.err
        assert "remedy" in outcome.err
        assert not list(here.iterdir())


def test_a_run_without_a_recipe_is_refused_for_the_ledger(kdrun: Callable[..., Outcome], here: Path) -> None:
    outcome = kdrun("train", *KD, "run.ledger=true")
    assert outcome.code == 3
    assert "a record is that of a recipe" in outcome.err


def test_a_single_run_may_enter_the_ledger_and_is_underpowered(kdrun: Callable[..., Outcome], here: Path, own_recipes: Path) -> None:
    small = ["recipe=small", f"--config-dir={own_recipes}", "run.rivals=false", "run.seeds=null"]
    outcome = kdrun("train", *small, "run.ledger=true")
    assert outcome.code == 0, outcome.err
    record = json.loads((here / "outputs" / "ledger" / "small.json").read_text())
    assert (record["seeds"], list(record["arms"]), record["verdict"]["name"]) == ([1], ["pld"], "underpowered")


def test_without_a_recipe_the_newcomer_s_is_meant_unless_parts_are_named(kdrun: Callable[..., Outcome]) -> None:
    for verb in (["show", "--json"], ["plan", "--no-probe", "--json"]):
        named = kdrun(*verb, "recipe=pld_digits").json
        assert kdrun(*verb).json == {**named, **({"name": {**named["name"], "origin": "default"}} if verb[0] == "show" else {})}
    assert kdrun("show", "dataset=gaussians", "--json").json["name"]["value"] is None
