"""The shop window is true: its table is the ledger's, its commands compose, its examples run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from kdrun.config.check import check
from kdrun.config.compose import compose
from kdrun.ledger.readme import with_table
from tests.conftest import Outcome

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [
    line.split(" #")[0].strip() for kind, block in BLOCKS if not kind for line in block.splitlines() if line.startswith("kdrun train")
]
OWN_NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4, num_classes)

    def forward(self, x):
        return self.head(self.body(x))
"""
SHORT = ["run.dry=true", "run.rivals=false", "run.seeds=null", "run.root=runs", "-q"]


def block(kind: str, first_line: str) -> str:
    return next(text for k, text in BLOCKS if k == kind and text.startswith(first_line))


def command(words: str) -> list[str]:
    """The arguments of the README's command that contains these words."""
    return shlex.split(next(c for c in COMMANDS if words in c))[1:]


def test_the_table_is_what_the_ledger_gives() -> None:
    assert with_table(TEXT, ROOT / "outputs") == TEXT


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("line", COMMANDS)
def test_every_train_command_composes(line: str, tmp_path: Path) -> None:
    words = shlex.split(line)[2:]
    dirs = []
    if "--config-dir" in words:
        at = words.index("--config-dir")
        words = words[:at] + words[at + 2 :]
        (tmp_path / "conf" / "objective").mkdir(parents=True)
        (tmp_path / "conf" / "objective" / "logit_matching.yaml").write_text(block("yaml", "# mine/"))
        dirs = [tmp_path]
    check(compose(words, dirs), build=False)


def test_an_objective_of_ones_own_trains(kdrun: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_loss.py").write_text(block("python", "# my_loss.py"))
    conf = tmp_path / "mine" / "conf" / "objective"
    conf.mkdir(parents=True)
    (conf / "logit_matching.yaml").write_text(block("yaml", "# mine/"))
    outcome = kdrun(*command("logit_matching"), *SHORT)
    assert outcome.code == 0, outcome.err
    assert "match" in next((tmp_path / "runs").glob("*/*/metrics.jsonl")).read_text()


def test_a_model_of_ones_own_trains(
    kdrun: Callable[..., Outcome], tiny_cifar100: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_net.py").write_text(OWN_NET)
    small = ["teacher=resnet8", f"dataset.path={tiny_cifar100}", "objective=rkd"]  # rkd asks for the tap "pooled"
    outcome = kdrun(*command("my_net.Net"), *small, *SHORT)
    assert outcome.code == 0, outcome.err


def test_pictures_of_ones_own_train(kdrun: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 6), ("test", 3)):
        for shade, name in enumerate(("cat", "dog")):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), (100 * shade + i, 9 * i, 40)).save(folder / f"{i}.png")
    # README's own command, only smaller: a narrower teacher, on 32 pixels instead of 224.
    small = ["teacher=resnet8", "dataset.input_shape=[3,32,32]", "dataset.eval_resize=36", "dataset.workers=0"]
    outcome = kdrun(*command("dataset=folder"), *small, *SHORT)
    assert outcome.code == 0, outcome.err
