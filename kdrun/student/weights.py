"""Weights in and out: loading with names and shapes checked first, a hash of what a network is, the exported student."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdrun.errors import Problem, Refused
from kdrun.student.adapters import as_adapted, plain_state
from kdrun.student.known import BATCHES, fitting
from kdrun.student.statefile import read_state
from kdrun.student.taps import Tapped

# What wrappers put before every name: DataParallel and DDP, torch.compile, kdrun's and other distillation code, Lightning, ...
PREFIXES = ("module.", "_orig_mod.", "student.", "backbone.", "model.", "net.", "network.", "encoder.")
SHOWN = 4  # how many names an error lists

Rules = Sequence[Sequence[str]]  # pairs (regular expression, replacement)


class _Naming(NamedTuple):
    """One reading of a file's names."""

    tensors: dict[str, Tensor]  # by the network's names
    stripped: str  # the prefixes that were taken off
    renamed: int  # how many names the renaming changed


def bare(module: nn.Module) -> nn.Module:
    """The network inside wrappers (`Tapped`, torch.compile, DistributedDataParallel), whose names have no prefix."""
    while True:
        wrapper = isinstance(module, (Tapped, nn.DataParallel, DistributedDataParallel))
        inner = module.module if wrapper else getattr(module, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def _rename(tensors: Mapping[str, Tensor], rules: Rules, key: str) -> tuple[dict[str, Tensor], int]:
    renamed: dict[str, Tensor] = {}
    changed = 0
    for name, tensor in tensors.items():
        new = name
        for pattern, replacement in rules:
            try:
                new = re.sub(pattern, replacement, new)
            except re.error as error:
                what = f"{pattern!r} -> {replacement!r} is no regular expression and replacement: {error}"
                raise Refused(Problem(what, key=key, remedy="as in Python's re.sub; a literal dot is written \\.")) from error
        if new in renamed:
            raise Refused(Problem(f"two tensors of the file become {new}", key=key, remedy="make the patterns narrower"))
        renamed[new] = tensor
        changed += new != name
    return renamed, changed


def _namings(tensors: dict[str, Tensor], rules: Rules, key: str) -> Iterator[_Naming]:
    """The file's names as they are, then with one common prefix after the other taken off."""
    stripped = ""
    while True:
        renamed, changed = _rename(tensors, rules, key)
        yield _Naming(renamed, stripped, changed)
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in tensors)), None)
        if prefix is None:
            return
        stripped += prefix
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f", ... ({len(names)} in all)" if len(names) > SHOWN else "")


def _wrong_classes(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], mismatched: list[str]) -> tuple[int, int] | None:
    """(classes of the file, classes of the network) if the shapes differ in the rows of the last layer and nowhere else."""
    layers = {name.rpartition(".")[0] for name in mismatched}
    rows = {(theirs[name].shape[:1], own[name].shape[:1]) for name in mismatched}
    rest_equal = all(theirs[n].ndim == own[n].ndim and theirs[n].shape[1:] == own[n].shape[1:] for n in mismatched)
    last = [name.rpartition(".")[0] for name in own if name.endswith(".weight")][-1:]
    if len(rows) != 1 or not rest_equal or layers != set(last):
        return None
    ((file_rows, own_rows),) = rows
    return file_rows[0], own_rows[0]


def _rename_remedy(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], missing: list[str], unexpected: list[str]) -> str:
    """The renaming to try: spelt out where the missing and the unexpected are the same layers in the same order by other names."""
    same = len(missing) == len(unexpected) and all(
        own[mine].shape == theirs[its].shape and mine.rpartition(".")[2] == its.rpartition(".")[2]
        for mine, its in zip(missing, unexpected, strict=True)
    )
    layers = {its.rpartition(".")[0]: mine.rpartition(".")[0] for mine, its in zip(missing, unexpected, strict=False)}
    if same and len(layers) <= SHOWN:
        rules = ", ".join(f"['^{re.escape(its)}\\.', '{mine}.']" for its, mine in layers.items())
        return f"if they are the same layers: rename: [{rules}]"
    return "map the file's names to the network's with rename: [[regular expression, replacement], ...]"


def _misfit(module: nn.Module, own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """All that keeps the file's tensors from being this network's: (what is wrong, the remedy)."""
    missing = [name for name in own if name not in theirs and not name.endswith(BATCHES)]
    unexpected = [name for name in theirs if name not in own]
    mismatched = [name for name in own if name in theirs and own[name].shape != theirs[name].shape]
    if not (missing or unexpected or mismatched):
        return []
    classes = _wrong_classes(own, theirs, mismatched) if not missing and not unexpected else None
    if classes is not None:
        what = f"wrong number of classes: the file's last layer has {classes[0]} classes, this network {classes[1]}"
        return [(what, f"use weights for {classes[1]} classes, or a data set of {classes[0]} classes")]
    fits = fitting(theirs)
    fit = f"these shapes are those of {' or '.join(fits)}" if fits else "choose the network that the file was made for"
    named = f"{fit}; {_rename_remedy(own, theirs, missing, unexpected)}"
    kind = type(module).__name__
    found = []
    if missing:
        found.append((f"{len(missing)} of the {len(own)} tensors of this {kind} are missing in the file: {_some(missing)}", named))
    if unexpected:
        found.append((f"the file has tensors that this {kind} does not have: {_some(unexpected)}", named))
    if mismatched:
        said = [f"{name} is {list(theirs[name].shape)} in the file, {list(own[name].shape)} here" for name in mismatched]
        found.append((f"shapes differ: {_some(said)}", fit))
    return found


def load_weights(module: nn.Module, path: str | Path, rename: Rules = (), key: str = "checkpoint") -> dict[str, Any]:
    """Load a file of weights into a network; says how it was read.

    Names must match exactly, after prefixes that ALL names share are taken off (see PREFIXES) and after `rename`: pairs
    (regular expression, replacement), applied in order to every name. The counters of BatchNorm alone may be missing: old files
    have none. Dtypes are cast.

    Returns ``{"file", "sha256" (of the file), "tensors", "wrappers", "prefix", "renamed", "metadata"}``.
    Raises `kdrun.errors.Refused`, with nothing loaded, where the file or its fit is wrong (see also `kdrun.student.statefile`).
    """
    path, module = Path(path), bare(module)
    file = read_state(path, key)
    own = plain_state(module)
    namings = list(_namings(file.tensors, rename, f"{key}: rename"))
    naming = max(namings, key=lambda n: len(own.keys() & n.tensors.keys()))  # the first of equals: least taken off
    misfit = _misfit(module, own, naming.tensors)
    if misfit:
        raise Refused([Problem(what, key=key, where=str(path), remedy=remedy) for what, remedy in misfit])
    module.load_state_dict(as_adapted(module, naming.tensors))
    return {
        "file": str(path),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "tensors": len(naming.tensors),
        "wrappers": list(file.wrappers),
        "prefix": naming.stripped,
        "renamed": naming.renamed,
        "metadata": file.metadata,
    }


def copy_parts(module: nn.Module, source: nn.Module, parts: Sequence[str], key: str) -> int:
    """Copy the weights of another network's `parts` (module paths) where names and shapes are the same; how many tensors that were.

    Raises `kdrun.errors.Refused` for a part of which nothing fits. `key`: what names the parts in the configuration.
    """
    own, theirs = bare(module).state_dict(), bare(source).state_dict()
    copied = 0
    for part in parts:
        fits = [name for name, tensor in theirs.items() if name.startswith(f"{part}.") and name in own and own[name].shape == tensor.shape]
        if not fits:
            what = f"nothing of the teacher's '{part}' fits the student"
            raise Refused(Problem(what, key=key, remedy="name parts that both networks have, or none: []"))
        for name in fits:
            own[name].copy_(theirs[name])
        copied += len(fits)
    return copied


def sha256_of(module: nn.Module) -> str:
    """A hash of all weights and buffers, in the order of their names: names, dtypes, shapes, bytes.

    The same for a network and its wrapped form, on every device; another for any change of a single bit (law 6: the teacher's before
    and after a run; and a teacher's identity in a cache).
    """
    module = bare(module)
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\x1f{tensor.dtype}\x1f{list(tensor.shape)}\x1f".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_student(module: nn.Module, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write the student alone as safetensors (law 5): ``network.load_state_dict(safetensors.torch.load_file(path))`` takes it.

    Names have no prefix, tied tensors are written twice so that plain torch finds each name, adapters are merged into their layers.
    `metadata`: strings as they are, anything else as JSON. The same weights and metadata are the same bytes. The file appears whole or not
    at all.
    """
    path = Path(path)
    # clone: safetensors refuses tensors that share memory
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in plain_state(bare(module)).items()}
    text = {name: value if isinstance(value, str) else json.dumps(value) for name, value in (metadata or {}).items()}
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "wb") as written:
            written.write(_in_order(save(state, text)))
            written.flush()
            os.fsync(written.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _in_order(content: bytes) -> bytes:
    """A safetensors file with the names of its header in order: the library writes metadata in the order of a hash map, which every
    process has its own of. The tensors' offsets count from the end of the header, whose length is a multiple of 8."""
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]
