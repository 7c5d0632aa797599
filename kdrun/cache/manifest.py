"""What a cache's folder says of itself: read without torch, so that listing caches is quick."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from kdrun.errors import Problem, Refused

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MANIFEST, LOCK, ROWS, CHECK = "manifest.json", ".lock", ".rows", ".check"
VERSION = 1  # of the layout; a change of it, or of what a view is, must change this number
WORDS = {  # of what a cache is made of
    "teacher": "teacher (other weights)",
    "network": "teacher (other settings of its network)",
    "vocabulary": "tokenizer",
    "data": "data set or transform",
    "seed": "seed (its views are others)",
    "autocast": "precision (hardware.dtype)",
}


def view_file(folder: Path, view: int, kind: str) -> Path:
    return folder / f"view-{view:06d}{kind}"


def views_of(folder: Path) -> list[int]:
    """The views that something was written of."""
    return sorted(int(file.stem.removeprefix("view-")) for file in folder.glob(f"view-*{CHECK}"))


def marks(folder: Path, view: int) -> NDArray[np.uint32] | None:
    """The checksums of the samples of a view, 0 where one is not there; None where nothing is."""
    import numpy as np

    file = view_file(folder, view, CHECK)
    return np.fromfile(file, np.uint32) if file.is_file() else None


def strangers(folder: Path) -> list[str]:
    """Files and folders in a cache's folder that no cache has."""
    own = re.compile(rf"view-\d+({re.escape(ROWS)}|{re.escape(CHECK)})")
    return sorted(f.name for f in folder.iterdir() if f.name not in (MANIFEST, LOCK, "manifest.part") and not own.fullmatch(f.name))


def caches(root: Path) -> Iterator[Path]:
    """The folders of caches below a root."""
    yield from sorted(file.parent for file in root.glob(f"*/{MANIFEST}"))


def open_folder(folder: Path, made_of: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    """Make a cache's folder, or accept the one that is there. `more`: what else the manifest says.

    Raises `Refused` where it was made of something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(str(folder / LOCK)):
        file = folder / MANIFEST
        if not file.is_file():
            partly = file.with_suffix(".part")
            partly.write_text(json.dumps({"version": VERSION, "made_of": made_of, **more}, indent=1, default=str), encoding="utf-8")
            partly.replace(file)
    must_match(folder, made_of)


def must_match(folder: Path, made_of: Mapping[str, Any], leave_out: Sequence[str] = ()) -> None:
    """Raise `Refused` where the cache in a folder is not made of this. `leave_out`: what is not known yet."""
    manifest = read_manifest(folder)
    theirs, ours = manifest.get("made_of", {}), json.loads(json.dumps(made_of, default=str))
    differing = [key for key in sorted({*theirs, *ours}) if key not in leave_out and theirs.get(key) != ours.get(key)]
    if manifest.get("version") != VERSION:
        differing = ["its layout (made by another version of kdrun)"]
    if differing:
        what = "the cache was made with another " + ", another ".join(WORDS.get(key, key) for key in differing)
        raise Refused(Problem(what, "cache.path", str(folder), "cache.path=null makes one that fits, or uses the one that is there"))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises `Refused` where there is none, or it cannot be read."""
    file = folder / MANIFEST
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Refused(Problem("there is no cache in this folder", "cache.path", str(folder), "`kdrun cache ls` lists them")) from error
    except (OSError, ValueError) as error:
        remedy = f"kdrun cache rm {folder.name}"
        raise Refused(Problem(f"its manifest cannot be read ({error})", "cache.path", str(file), remedy)) from error
    if not isinstance(found, dict) or not {"version", "made_of", "record", "samples", "tree"} <= found.keys():
        raise Refused(Problem("this folder is no cache", "cache.path", str(folder), "`kdrun cache ls` lists the caches"))
    return found
