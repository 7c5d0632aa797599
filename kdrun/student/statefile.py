"""Reading a file of weights, of whichever making, into plain names and tensors; whatever is wrong with it is said in words."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kdrun.errors import Problem, Refused, nearest

# What training code puts a state dict under: the CRD benchmark and timm, torch's tutorials, Lightning, kdrun, ...
WRAPPERS = ("state_dict", "model", "net", "student", "model_state_dict", "model_state", "network", "weights", "module")

# How a torch file begins: as a zip archive, or, before torch 1.6, as a pickle of protocol 2.
TORCH = (b"PK\x03\x04", b"\x80")
SHOWN = 40  # bytes of a file that is something else


class StateFile(NamedTuple):
    tensors: dict[str, Tensor]  # on the CPU
    wrappers: tuple[str, ...]  # the keys under which they lay, outermost first
    metadata: dict[str, str]  # of a safetensors file


def _refuse(path: Path, key: str, what: str, remedy: str) -> Refused:
    return Refused(Problem(what, key=key, where=str(path), remedy=remedy))


def _missing(path: Path, key: str) -> Refused:
    folder = path.parent
    if path.is_dir():
        names = sorted(file.name for file in path.iterdir() if file.is_file())
        remedy = f"name one of its files: {', '.join(names[:6])}" if names else "it is empty"
        return _refuse(path, key, "is a folder, not a file of weights", remedy)
    if not folder.is_dir():
        return _refuse(path, key, f"no such file: there is not even a folder {folder}", "correct the path")
    names = [file.name for file in folder.iterdir() if file.is_file()]
    close = nearest(path.name, names) or sorted(names)[:6]
    return _refuse(path, key, "no such file", f"in that folder there is {' or '.join(close)}" if close else "that folder has no files")


def _read_safetensors(path: Path, key: str) -> StateFile:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            metadata = dict(file.metadata() or {})
    except (SafetensorError, ValueError, OSError) as error:
        raise _refuse(path, key, f"truncated or corrupt, or no safetensors file: {error}", "fetch or write it again") from error
    if not tensors:
        raise _refuse(path, key, "has no tensors in it", "write it again")
    return StateFile(tensors, (), metadata)


def _refuse_pickle(path: Path, key: str, error: Exception) -> Refused:
    """`weights_only` refuses both files with code in them and files that are no torch files at all: say which."""
    code = re.search(r"GLOBAL ([\w.]+)", str(error)) or re.search(r"got <class '([\w.]+)'>", str(error))
    head = _head(path)
    plain_pickle = head[:1] == b"\x80" and "Unsupported operand" in str(error)
    if code or plain_pickle:
        named = f"it names {code.group(1)}" if code else "it is a plain Python pickle"
        convert = (
            "if you trust its origin, convert it once where nothing can be lost: "
            f"import torch; s = torch.load({path.name!r}, map_location='cpu', weights_only=False); "
            f"torch.save(s['state_dict'], {path.stem + '.clean.pt'!r})  # or s['model'], or s.state_dict() of a whole module"
        )
        return _refuse(path, key, f"holds more than tensors ({named}), so opening it could run code; it was not opened", convert)
    return _no_weights(path, key, head)


def _no_weights(path: Path, key: str, head: bytes) -> Refused:
    return _refuse(path, key, f"no file of weights: it begins with {head!r}", "fetch it again; a safetensors or torch file is wanted")


def _holds_pickle(path: Path) -> bool:
    """False for a whole zip archive that is something else: an npz, a document."""
    if not zipfile.is_zipfile(path):
        return True
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("data.pkl") for name in archive.namelist())


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(SHOWN)


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def _unwrap(content: Any, path: Path, key: str) -> StateFile:
    wrappers: list[str] = []
    while not _is_state(content):
        inner = [name for name in WRAPPERS if isinstance(content, Mapping) and isinstance(content.get(name), Mapping)]
        if not inner:
            held = f"keys {', '.join(map(str, list(content)[:8]))}" if isinstance(content, Mapping) else type(content).__name__
            remedy = f"save the state dict alone, or under one of {', '.join(WRAPPERS)}"
            raise _refuse(path, key, f"has no state dict that can be recognised: it holds {held}", remedy)
        wrappers.append(inner[0])
        content = content[inner[0]]
    return StateFile(dict(content), tuple(wrappers), {})


def read_state(path: str | Path, key: str = "checkpoint") -> StateFile:
    """The tensors of a safetensors or torch file (.pth, .pt, .th, .bin, ...), unwrapped, on the CPU.

    Torch files are opened with ``weights_only=True``: no code in them is run. `key` is what errors call the file's place in the
    configuration.

    Raises `kdrun.errors.Refused` for a file that is missing, truncated, corrupt, a pickle with code, or without a state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise _missing(path, key)
    if path.suffix == ".safetensors":
        return _read_safetensors(path, key)
    head = _head(path)
    # The unpickler would take a text for instructions, and fail in their words.
    if head and not (head.startswith(TORCH) and _holds_pickle(path)):
        raise _no_weights(path, key, head)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refuse_pickle(path, key, error) from error
    except (EOFError, RuntimeError, OSError, ValueError, KeyError, IndexError) as error:  # what torch raises on damaged files
        broken = isinstance(error, (KeyError, IndexError, UnicodeError))  # of the unpickler's stack and memory: no words for people
        said = "" if broken else str(error).partition(". This is")[0]
        said = said or ("it is not what a pickle looks like" if broken else "it ends too early")
        raise _refuse(path, key, f"truncated or corrupt: {said}", "fetch or write it again") from error
    return _unwrap(content, path, key)
