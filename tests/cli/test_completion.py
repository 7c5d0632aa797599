"""TAB: what is offered for a line, and what bash makes of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.main

from kdrun.cli.app import app
from kdrun.cli.complete import offered
from tests.conftest import Outcome

ROOT = Path(__file__).parents[2]
GROUPS = ["teacher", "student", "dataset", "source", "objective", "plan", "optim", "evaluation", "hardware", "cache", "track"]


def offers(line: str) -> list[str]:
    return offered(line, typer.main.get_command(app))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("kdrun tr", ["train"]),
        ("kdrun cache ", ["ls", "verify", "rm", "pack", "add"]),
        ("kdrun zzz", []),
        ("kdrun train --conf", ["--config-dir"]),
        ("kdrun plan --no", ["--no-probe"]),
        ("kdrun train rec", ["recipe="]),
        ("kdrun train objective=dk", ["objective=dkd"]),
        ("kdrun train -q objective=dk", ["objective=dkd"]),  # a flag takes no word
        ("kdrun train 'objective=dk", ["objective=dkd"]),  # a quote that is open
        ("FOO=1 /usr/bin/kdrun train objective=dk", ["objective=dkd"]),
        ("kdrun train teacher=resnet5", ["teacher=resnet50", "teacher=resnet56"]),
        ("kdrun train recipe=pld_cifar100_", ["recipe=pld_cifar100_bench"]),
        ("kdrun train hardware=", ["hardware=auto", "hardware=cpu", "hardware=gpu", "hardware=multi_gpu", "hardware=slurm"]),
        ("kdrun train recipe=kd_cifar100 optim.l", ["optim.lr="]),
        ("kdrun train recipe=kd_cifar100 optim.sch", ["optim.schedule."]),
        ("kdrun train recipe=kd_cifar100 optim.schedule.mi", ["optim.schedule.milestones=", "optim.schedule.min_lr="]),
        ("kdrun train objective=kd objective.", ["objective.ce_weight=", "objective.kd_weight=", "objective.temperature="]),
        ("kdrun train objective=kd objective.temperature=", ["objective.temperature=4.0"]),  # what it is now
        ("kdrun train dataset=cifar100 dataset.pat", ["dataset.path="]),
        ("kdrun train dataset=cifar100 dataset.path=", []),  # the shell's own: files
        ("kdrun train run.dry=", ["run.dry=true", "run.dry=false"]),
        ("kdrun train run.seeds=", ["run.seeds=3", "run.seeds=5", "run.seeds=10"]),  # seeds 1 to 3, 5 or 10
        ("kdrun train hardware.compile=o", ["hardware.compile=on", "hardware.compile=off"]),
        ("kdrun train hardware.deterministic=f", ["hardware.deterministic=false"]),
        ("kdrun train hardware.channels_last=t", ["hardware.channels_last=true"]),  # or auto, which it is
        ("kdrun train nonsense optim.l", ["optim.lr="]),
        ("kdrun train student=custom optim.l", []),  # cannot be composed yet: no reason to fail
        ("kdrun train zzz", []),
        ("kdrun ls ob", ["objectives"]),
        ("kdrun ls objectives ", []),  # it takes no more
        ("kdrun show --diff kd_c", ["kd_cifar100"]),
        ("kdrun export --format o", ["onnx"]),
        ("kdrun new o", ["objective"]),
        ("kdrun new recipe mine --from pld_cifar100_", ["pld_cifar100_bench"]),
        ("kdrun train track=ten", ["track=tensorboard"]),
        ("kdrun train track=wandb track.wandb.mo", ["track.wandb.mode="]),
        ("kdrun ledger --verdict rep", ["reproduced"]),
        ("kdrun ledger --family gr", ["graph"]),
        ("kdrun ledger ", ["rerun"]),
        ("kdrun reproduce pld_cifar100_", ["pld_cifar100_bench"]),
        ("kdrun reproduce pld_cifar100_bench objective=dk", ["objective=dkd"]),
        ("kdrun ledger --scale=p", ["--scale=paper"]),
        ("kdrun bench vocab --loss re", ["reverse_kl"]),
    ],
)  # fmt: skip
def test_what_is_offered(line: str, words: list[str]) -> None:
    assert offers(line) == words


def test_all_groups_and_their_options_are_offered() -> None:
    assert offers("kdrun train ") == ["recipe=", *(f"{group}=" for group in GROUPS), "seed=", "run."]
    assert all(offers(f"kdrun train {group}=") for group in ["recipe", *GROUPS])
    assert offers("kdrun show r") == ["recipe=", "run=", "run."]


def test_a_folder_of_ones_own_is_offered(own_recipes: Path) -> None:
    assert offers("kdrun train recipe=sma") == []
    assert offers(f"kdrun train --config-dir {own_recipes} recipe=sma") == ["recipe=small"]
    assert offers(f"kdrun train --config-dir={own_recipes} recipe=small dataset.n_tr") == ["dataset.n_train="]
    assert offers(f"kdrun train --config-dir {own_recipes / 'nowhere'} recipe=sma") == []


def test_records_are_offered_where_one_is_asked_for(here: Path) -> None:
    (here / "outputs" / "ledger").mkdir(parents=True)
    (here / "outputs" / "ledger" / "kd_digits.json").write_text("{}")
    assert offers("kdrun ledger rerun kd") == ["kd_digits"]
    assert offers("kdrun show ledger=k") == ["ledger=kd_digits"]
    assert "ledger=" in offers("kdrun show l")


def test_runs_are_offered_where_one_is_asked_for(here: Path) -> None:
    for name in ("a", "b"):
        (here / "outputs" / "run" / name).mkdir(parents=True)
        (here / "outputs" / "run" / name / "run.json").touch()
    newest_first = ["outputs/run/b", "outputs/run/a"]
    assert offers("kdrun eval ") == offers("kdrun resume out") == newest_first
    assert offers("kdrun show run=") == [f"run={folder}" for folder in newest_first]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_answered_in_whole_words_line_by_line(shell: str) -> None:
    asked = {**os.environ, "_KDRUN_COMPLETE": f"complete_{shell}", "_KDRUN_LINE": "kdrun ledger --verdict d"}
    done = subprocess.run([sys.executable, "-m", "kdrun"], capture_output=True, text=True, cwd=ROOT, check=True, timeout=60, env=asked)
    assert (done.stdout, done.stderr) == ("direction\\ only\n" if shell == "bash" else "direction only\n", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_is_shown_and_installed_once(
    shell: str, kdrun: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "ZDOTDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    script = kdrun("--show-completion", f"--shell={shell}").out
    assert "_KDRUN_COMPLETE=complete_" + shell in script
    settings = {"bash": ".bashrc", "zsh": ".zshrc"}.get(shell)
    if settings:
        (tmp_path / settings).write_text("alias ll='ls -l'")
    for _ in range(2):
        told = kdrun("--install-completion", f"--shell={shell}").out
    file = Path(told.split(" is in ")[1].split(";")[0])
    assert file.read_text() == script
    if settings:
        own, *ours = (tmp_path / settings).read_text().splitlines()
        assert own == "alias ll='ls -l'"
        assert len(ours) == 1
    if shutil.which(shell):
        subprocess.run([shell, "-n", str(file)], check=True)


def test_a_shell_without_a_script_is_refused(kdrun: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    outcome = kdrun("--install-completion", "--shell", "bas")
    assert outcome.code == 2
    assert "did you mean bash" in outcome.err
    assert not list(tmp_path.iterdir())


# Readline's word breaks have = and : among them: only what follows the last one is replaced by what is in COMPREPLY.
BASH = r"""
COMP_WORDBREAKS=$' \t\n"\'@><=;|&(:'
kdrun() { "$PYTHON" -m kdrun "$@"; }
compopt() { echo "compopt $*"; }
source /dev/stdin <<< "$(kdrun --show-completion --shell=bash)"
while read -r line; do
    COMP_LINE="$line" COMP_POINT=${#line} COMPREPLY=()
    _kdrun_completion kdrun
    printf '%s\n' "${COMPREPLY[*]}"
done
complete -p kdrun
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_gets_what_follows_its_last_word_break() -> None:
    train = ["kdrun train objective=dk", "kdrun train objective=", "kdrun train rec"]
    lines = [*train, "kdrun ledger --scale=p", "kdrun tr", "kdrun train x=a:b"]
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", BASH], input="\n".join(lines) + "\n", capture_output=True, text=True, check=True, timeout=120, env=environment
    )
    objectives = " ".join(word.partition("=")[2] for word in offers("kdrun train objective="))
    assert done.stdout.splitlines() == [
        "dkd", objectives, "compopt -o nospace", "recipe=", "paper", "train", "", "complete -o default -F _kdrun_completion kdrun",
    ]  # fmt: skip


# -- readers that leave -------------------------------------------------------------------------------------------------

# Standard output is a pipe whose reader has gone before the first byte.
DEAF = """
import os, subprocess, sys, json
ends = os.pipe()
os.close(ends[0])
done = subprocess.run([sys.executable, "-m", "kdrun", *sys.argv[1:]], stdout=ends[1], stderr=subprocess.PIPE, text=True)
print(json.dumps([done.returncode, done.stderr]))
"""


@pytest.mark.parametrize("line", ["ls", "ls plans -q", "show objective=kd", "show --json", "--help", "train --help", "ledger --markdown"])
def test_a_reader_that_leaves_ends_a_verb_as_it_ends_cat(line: str) -> None:
    done = subprocess.run([sys.executable, "-c", DEAF, *line.split()], capture_output=True, text=True, cwd=ROOT, check=True, timeout=60)
    assert json.loads(done.stdout) == [128 + 13, ""]


def test_an_evaluation_whose_reader_leaves_has_no_traceback(finished: tuple[Path, Outcome]) -> None:
    line = ["eval", str(finished[0]), "--no-latency"]
    done = subprocess.run([sys.executable, "-c", DEAF, *line], capture_output=True, text=True, cwd=ROOT, check=True, timeout=120)
    assert json.loads(done.stdout) == [128 + 13, ""]
