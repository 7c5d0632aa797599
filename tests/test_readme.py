"""The shop window is true: its table is the ledger's, its commands compose, its examples run."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
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
NEW = [line.strip() for kind, block in BLOCKS if not kind for line in block.splitlines() if line.startswith("kdrun new")]
SHORT = ["run.dry=true", "run.rivals=false", "run.seeds=null", "run.root=runs", "-q"]


def command(words: str) -> list[str]:
    """The arguments of the README's command that contains these words."""
    return shlex.split(next(c for c in COMMANDS if words in c))[1:]


def test_the_table_is_what_the_ledger_gives() -> None:
    assert with_table(TEXT, ROOT / "outputs") == TEXT


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) >= 10


def write_blocks(folder: Path) -> None:
    """Every file that the README shows, at the path that its first line names."""
    for kind, text in BLOCKS:
        if kind in ("python", "yaml") and text.startswith("# "):
            file = folder / text.splitlines()[0].removeprefix("# ")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)


@pytest.fixture
def shown(kdrun: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a reader who has written all that the README shows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path, str(tmp_path)])
    for name in ("my_net", "my_data", "my_loss", "my_kd"):
        monkeypatch.delitem(sys.modules, name, raising=False)  # of the test before
    importlib.invalidate_caches()
    write_blocks(tmp_path)
    for line in NEW:
        outcome = kdrun(*shlex.split(line)[1:])
        assert outcome.code == 0, outcome.err
    return tmp_path


@pytest.mark.parametrize("line", COMMANDS)
def test_every_train_command_composes(line: str, shown: Path) -> None:
    words = shlex.split(line)[2:]
    dirs = []
    if "--config-dir" in words:
        at = words.index("--config-dir")
        dirs, words = [words[at + 1]], words[:at] + words[at + 2 :]
    check(compose(words, dirs), build=False)


@pytest.mark.parametrize("words", ["objective=logit_matching", "objective=my_kd"])
def test_an_objective_of_ones_own_trains(words: str, kdrun: Callable[..., Outcome], shown: Path) -> None:
    outcome = kdrun(*command(words), *SHORT)
    assert outcome.code == 0, outcome.err
    assert "match" in next((shown / "runs").glob("*/*/metrics.jsonl")).read_text()


def test_a_model_of_ones_own_trains(kdrun: Callable[..., Outcome], tiny_cifar100: Path, shown: Path) -> None:
    small = ["teacher=resnet8", f"dataset.path={tiny_cifar100}", "objective=rkd"]  # rkd asks for the tap "pooled"
    outcome = kdrun(*command("my_net.Net"), *small, *SHORT)
    assert outcome.code == 0, outcome.err


def test_data_of_ones_own_train(kdrun: Callable[..., Outcome], shown: Path) -> None:
    draw = np.random.default_rng(0)
    rows = {f"{what}_{name}": value for name, size in (("train", 60), ("test", 20)) for what, value in readings(draw, size).items()}
    np.savez(shown / "my.npz", **rows)
    # Not cut short: what it learns shows that inputs and labels belong together.
    outcome = kdrun(
        *command("dataset=readings"), "teacher.fit={optim.epochs: 20}", "source.batch_size=20", "hardware=cpu", "run.root=runs", "-q"
    )
    assert outcome.code == 0, outcome.err
    (summary,) = (shown / "runs" / "run").glob("*/summary.json")
    assert json.loads(summary.read_text())["value"] > 80


def readings(draw: np.random.Generator, size: int) -> dict[str, np.ndarray]:
    y = np.arange(size) % 2
    return {"x": draw.normal(size=(size, 4)) + 3 * y[:, None], "y": y}


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
