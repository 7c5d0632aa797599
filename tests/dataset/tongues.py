"""A student of whole words and a teacher of single bytes and pairs of them, in folders, and questions for both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kdrun.dataset.text import TextData
from tests.dataset.words import pairs, write_bytes_tokenizer, write_jsonl, write_model


def write_two(folder: Path) -> dict[str, Path]:
    """{student, teacher: a folder, file: questions}."""
    student = write_model(folder / "student", max_position_embeddings=128)
    teacher = write_bytes_tokenizer(folder / "teacher", ["o n", "on e", "Ġ p", "e e"])
    ids = json.loads((teacher / "tokenizer.json").read_text())["model"]["vocab"]
    write_model(teacher, seed=1, tokenizer=False, rows=len(ids) + 5, hidden_size=24, max_position_embeddings=128)
    return {"student": student, "teacher": teacher, "file": write_jsonl(folder / "my.jsonl", pairs(24))}


def load(folders: dict[str, Path], **values: Any) -> Any:
    own, theirs = str(folders["student"]), str(folders["teacher"])
    return TextData(path=str(folders["file"]), **{"tokenizer": own, "teacher_tokenizer": theirs, "max_length": 96} | values).load()


def words_of(folders: dict[str, Path], *more: str) -> list[str]:
    """Overrides of a run on them."""
    return [
        "recipe=lm_kd", "objective=uld", f"teacher.name={folders['teacher']}", f"dataset.teacher_tokenizer={folders['teacher']}",
        f"student.name={folders['student']}", f"dataset.path={folders['file']}", "source.batch_size=5", "hardware=cpu",
        "hardware.threads=1", "run.log_every=1", "dataset.max_length=96", "run.rivals=false", "optim.epochs=2", "optim.lr=0.02",
        *more,
    ]  # fmt: skip
