"""A cache in one file, for another machine. It goes into place only when every row of it is whole."""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from kdrun.cache.manifest import CHECK, LOCK, MANIFEST, marks, read_manifest, views_of
from kdrun.cache.store import Store, record_of
from kdrun.errors import Problem, Refused

AT_ONCE = 4096  # samples


def pack(folder: Path, file: Path) -> None:
    """Write `file`, compressed as its name says (.tar, .tar.gz, .tar.xz). Raises `Refused` where it exists or cannot be written."""
    if file.exists():
        raise Refused(Problem("the file exists already", str(file), "command line", "choose another name, or remove it"))
    kinds = {".tar": "", ".gz": "gz", ".tgz": "gz", ".xz": "xz"}
    if file.suffix not in kinds:
        raise Refused(Problem("this is no name of an archive", str(file), "command line", "NAME.tar, NAME.tar.gz or NAME.tar.xz"))
    kind = kinds[file.suffix]
    partly = file.with_name(file.name + ".part")
    try:
        with tarfile.open(partly, f"w:{kind}") as archive:  # type: ignore[call-overload]
            for inner in sorted(folder.iterdir()):
                if inner.name != LOCK:
                    archive.add(inner, f"{folder.name}/{inner.name}")
        partly.replace(file)
    except OSError as error:
        partly.unlink(missing_ok=True)
        raise Refused(Problem(f"it cannot be written ({error})", str(file), "command line", "a folder that there is, with room")) from error


def unpack(file: Path, root: Path) -> tuple[Path, int]:
    """(the folder under `root`, its rows). Raises `Refused` for what is no whole cache, or is there already; nothing is then left."""
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".adding-") as temporary:
        try:
            with tarfile.open(file) as archive:
                archive.extractall(temporary, filter="data")
        except (OSError, tarfile.TarError) as error:
            what = f"it cannot be read ({str(error).splitlines()[0]})"
            raise Refused(Problem(what, str(file), "command line", "a file that `kdrun cache pack` wrote")) from error
        folders = [found.parent for found in Path(temporary).glob(f"*/{MANIFEST}")]
        if len(folders) != 1:
            raise Refused(Problem("this archive holds no cache", str(file), "command line", "a file that `kdrun cache pack` wrote"))
        rows, target = whole_rows(folders[0], file), root / folders[0].name
        if target.exists():
            remedy = f"kdrun cache rm {target.name}, if the packed one is the better"
            raise Refused(Problem("a cache of this name is there already", target.name, str(root), remedy))
        shutil.move(folders[0], target)
    return target, rows


def whole_rows(folder: Path, file: Path) -> int:
    """The number of rows of a cache. Raises `Refused` for one that is damaged."""
    manifest = read_manifest(folder)
    counts = np.array(manifest.get("counts") or [1] * manifest["samples"], np.int64)
    store = Store(folder, record_of(manifest["record"]), counts)
    rows = 0
    for view in views_of(folder):
        found = marks(folder, view)
        for places in np.array_split(np.flatnonzero(found) if found is not None else np.zeros(0, np.int64), 1 + len(counts) // AT_ONCE):
            if len(places) and store.read(view, places) is None:
                what = f"rows of view {view} are damaged ({folder.name}/view-{view:06d}{CHECK})"
                raise Refused(Problem(what, str(file), "command line", "pack it again; `kdrun cache verify` says which is right"))
            rows += len(places)
    return rows
