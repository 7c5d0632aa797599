"""From a number back to what made it: code, configuration, data, teacher, packages, hardware."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import kdrun

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "datasets",
    "hydra-core",
    "omegaconf",
    "torchmetrics",
    "numpy",
    "scikit-learn",
    "scipy",
    "safetensors",
)

CODE = ("kdrun", "conf", "recipes")  # the folders that a number can depend on
MOST_CHANGES = 20  # changed files that are listed


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and machine, as plain data."""
    return {
        "kdrun": kdrun.__version__,
        "python": platform.python_version(),
        "packages": {p: _version(p) for p in PACKAGES},
        "hardware": hardware(device),
        "platform": platform.platform(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def hardware(device: torch.device) -> str:
    """The machine in a few words, e.g. "2 CPU cores (x86_64)"."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({torch.cuda.device_count()} seen)"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} CPU cores ({platform.machine()}), {torch.get_num_threads()} threads"


def code() -> dict[str, Any]:
    """The commit that the package was run from, and whether the tree had changes; empty outside a git checkout."""
    folder = Path(kdrun.__file__).resolve().parent
    # An installed package may lie inside somebody else's checkout: the commit counts only if it tracks this file.
    commit = _git(folder, "rev-parse", "HEAD") if _git(folder, "ls-files", "__init__.py") else ""
    if not commit:
        return {"commit": None, "dirty": None}
    # Only what a number can depend on: a changed ledger or README does not make the code another one.
    changed = _git(folder.parent, "status", "--porcelain", "--", *CODE)
    return {"commit": commit, "dirty": bool(changed), "changed": changed.splitlines()[:MOST_CHANGES] if changed else []}


def changes_since(commit: str | None) -> str:
    """How the present code differs from that of a commit, in one line: of what a number can depend on, as `code` has it."""
    now, folder = code(), Path(kdrun.__file__).resolve().parent
    if not commit or not now["commit"]:
        return "the commit is not known" if not commit else "this is no git checkout: the present commit is not known"
    if not _git(folder, "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"):
        return f"commit {commit[:7]} is not in this checkout"
    dirty = f"; {len(now['changed'])} uncommitted changes" if now["dirty"] else ""
    if len(now["changed"]) == MOST_CHANGES:
        dirty = dirty.replace("; ", "; at least ")
    stat = _git(folder.parent, "diff", "--shortstat", f"{commit}..HEAD", "--", *CODE)
    return (f"since {commit[:7]}: {stat}" if stat else f"the same as at {commit[:7]}") + dirty


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
