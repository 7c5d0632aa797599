"""Checkpoints: atomic, checksummed, safetensors; a damaged one is recognised and the one before it is used.

A checkpoint is a folder `step-00001234/` with `tensors.safetensors` and `state.json`. The JSON holds the nested state
with every tensor replaced by its name, and the SHA-256 of the tensor file and of that state. The folder is written under
another name, flushed to disk and renamed, so that a checkpoint either exists whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TENSORS, STATE = "tensors.safetensors", "state.json"


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of a step and delete all but the newest `keep`. Returns its folder.

    Raises TypeError, naming the place, where the state holds what a checkpoint cannot keep.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = _pack(state, "", tensors)
    final = folder / f"step-{step:08d}"
    part = folder / f".{final.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file(tensors, part / TENSORS)
    document = {"format": 1, "step": step, "sha256": _sha256(part / TENSORS), "state_sha256": _digest(step, tree), "state": tree}
    (part / STATE).write_text(json.dumps(document), encoding="utf-8")
    for name in (TENSORS, STATE, "."):
        _flush(part / name)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(part, final)
    _flush(folder)
    written = sorted(folder.glob("step-*"))
    # Later ones are damaged: a run that goes on from an earlier step has passed over them.
    later, mine = [c for c in written if c.name > final.name], [c for c in written if c.name <= final.name]
    for old in (*later, *mine[:-keep]):
        shutil.rmtree(old, ignore_errors=True)
    return final


def newest(folder: Path) -> tuple[int, dict[str, Any], list[str]] | None:
    """(step, state, remarks) of the newest whole checkpoint; remarks name damaged ones that were passed over."""
    remarks: list[str] = []
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        try:
            step, state = load(candidate)
        except (OSError, ValueError) as error:
            remarks.append(f"{candidate.name} is damaged ({error}); the one before it is used")
            continue
        return step, state, remarks
    return None


def load(checkpoint: Path) -> tuple[int, dict[str, Any]]:
    """Read one checkpoint folder. Raises OSError or ValueError where it is damaged."""
    document = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    try:
        told = (document["sha256"], document["state_sha256"])
        found = (_sha256(checkpoint / TENSORS), _digest(document["step"], document["state"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{STATE} is not that of a checkpoint: {error!r}") from error
    if found != told:
        raise ValueError("checksum does not match")
    return int(document["step"]), _unpack(document["state"], load_file(checkpoint / TENSORS))


def _pack(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        # safetensors stores values, not aliases or memory formats; the loader copies into tensors that have theirs.
        name = f"{len(tensors)}{name}"  # the number, because {"a/b": x} and {"a": {"b": x}} have one path
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"__tensor__": name}
    if isinstance(value, dict):
        wrong = [k for k in value if not isinstance(k, (str, int, float, bool, NoneType))]
        if wrong:
            raise TypeError(f"{name or 'state'} has a key of type {type(wrong[0]).__name__}, which a checkpoint cannot keep")
        pairs = [[k, _pack(v, f"{name}/{k}", tensors)] for k, v in value.items()]
        return {"__dict__": pairs}
    if isinstance(value, (list, tuple)):
        items = [_pack(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]
        return {"__tuple__": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name or 'state'} holds a {type(value).__name__}, which a checkpoint cannot keep")


def _unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(v, tensors) for v in value]
    if isinstance(value, dict):
        if "__tensor__" in value:
            return tensors[value["__tensor__"]]
        if "__tuple__" in value:
            return tuple(_unpack(v, tensors) for v in value["__tuple__"])
        return {k: _unpack(v, tensors) for k, v in value["__dict__"]}
    return value


def _sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _digest(step: int, tree: Any) -> str:
    return hashlib.sha256(json.dumps([step, tree]).encode()).hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
