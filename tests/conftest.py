"""What several test folders share: the command line in this process, tiny data in the hub's schemas, tiny experiments."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
# Read when `datasets` or `transformers` is first imported, which in a whole session is before any command line runs.
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@dataclass
class Outcome:
    """What a command line did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run_cli(*arguments: str) -> Outcome:
    """The same for fixtures that live longer than one test."""
    from kdrun.cli import main

    code, told, complained = 0, io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(told), redirect_stderr(complained):
        patch.setattr("sys.argv", ["kdrun", *arguments])
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Outcome(code, told.getvalue(), complained.getvalue())


@pytest.fixture
def kdrun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`kdrun("train", "recipe=...")`: the real entry point in this process."""

    def run(*arguments: str) -> Outcome:
        from kdrun.cli import main

        monkeypatch.setattr("sys.argv", ["kdrun", *arguments])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


# A small experiment without BatchNorm, so that the exact laws hold: a world of vectors, an MLP, a few steps.
TINY = [
    "dataset=gaussians",
    "dataset.classes=6",
    "dataset.superclasses=3",
    "dataset.n_train=96",
    "dataset.n_test=60",
    "teacher=truth",
    "student=mlp",
    "student.hidden=[8]",
    "source.batch_size=32",
    "optim.epochs=2",
    "hardware=cpu",
    "hardware.threads=1",
    "run.log_every=1",
]


@pytest.fixture
def tiny() -> list[str]:
    return list(TINY)


def write_parquet(folder: Path, image: str, labels: dict[str, int], size: int, rows: dict[str, int], mode: str = "RGB") -> Path:
    """A data set in the hub's schema: random pictures as PNG bytes, every class in turn."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for split, count in rows.items():
        cells = []
        for _ in range(count):
            buffer = io.BytesIO()
            shape = (size, size, 3) if mode == "RGB" else (size, size)
            Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8), mode).save(buffer, "PNG")
            cells.append({"bytes": buffer.getvalue(), "path": None})
        columns = {image: pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
        features: dict[str, Any] = {image: {"_type": "Image"}}
        for name, classes in labels.items():
            columns[name] = pa.array([i % classes for i in range(count)], pa.int64())
            features[name] = {"names": [f"{name}{c}" for c in range(classes)], "_type": "ClassLabel"}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        pq.write_table(pa.table(columns).replace_schema_metadata(metadata), folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="session")
def tiny_cifar100(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 + 100 random pictures in the schema of uoft-cs/cifar100."""
    return write_parquet(
        tmp_path_factory.mktemp("cifar100"), "img", {"fine_label": 100, "coarse_label": 20}, 32, {"train": 200, "test": 100}
    )
