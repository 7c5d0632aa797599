"""Opening the files of a data set with the `datasets` library: a hub name, or a folder of parquet, images, csv, jsonl,
save_to_disk or npz. Every way that this can fail says what to put where.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kdrun.errors import Problem, Refused, did_you_mean

Format = Literal["auto", "parquet", "imagefolder", "csv", "tsv", "jsonl", "txt", "disk", "npz"]
SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "parquet": (".parquet",),
    "csv": (".csv", ".csv.gz"),
    "tsv": (".tsv", ".tsv.gz"),
    "jsonl": (".jsonl", ".json", ".jsonl.gz", ".json.gz"),
    "npz": (".npz",),
}
LINES = (".txt", ".txt.gz")  # a row is a line
LOADERS = {"jsonl": "json", "txt": "text", "tsv": "csv"}  # what the library calls them
SETTINGS: Mapping[str, Mapping[str, str]] = {"tsv": {"sep": "\t"}}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")


@dataclass(frozen=True, eq=False)
class Table:
    """One split as it lies in its files."""

    rows: Any  # datasets.Dataset, or a mapping of arrays [N, ...] by column
    where: str
    sources: tuple[Path, ...] = ()  # the files it was read from, if they are known

    def __len__(self) -> int:
        return len(next(iter(self.rows.values()), ())) if isinstance(self.rows, dict) else len(self.rows)

    @property
    def columns(self) -> list[str]:
        return list(self.rows) if isinstance(self.rows, dict) else list(self.rows.column_names)

    def array(self, column: str) -> np.ndarray:
        """A whole column, [N, ...]."""
        if isinstance(self.rows, dict):
            return np.asarray(self.rows[column])
        return np.asarray(self.rows.select_columns([column]).with_format("numpy")[:][column])

    def class_names(self, column: str) -> list[str] | None:
        """The names of the classes, where the files carry them."""
        names = None if isinstance(self.rows, dict) else getattr(self.rows.features[column], "names", None)
        return None if names is None else list(names)


@dataclass(frozen=True)
class Files:
    """Where the rows of a data set lie."""

    path: str | None = None  # a folder or file; None: the hub
    hub: str | None = None  # owner/name
    revision: str | None = None  # of the hub data set
    format: Format = "auto"
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})  # ours -> theirs
    columns: Sequence[str] = ()  # for messages: the columns that are wanted
    access: str | None = None  # for messages: what the hub asks for before it gives the data
    lines: bool = False  # whether lines of plain text are rows: elsewhere a note may lie beside anything

    def open(self) -> dict[str, Table]:
        """The tables by split name.

        Raises:
            Refused: nothing there, not readable, a split missing or empty.
        """
        tables = self._from_hub() if self.path is None else self._from_path(Path(self.path).expanduser())
        for split, table in tables.items():
            if len(table) == 0:
                raise Refused(Problem(f"the {split} split is empty", "dataset.splits", table.where, "check the files of this split"))
        return tables

    def _from_hub(self) -> dict[str, Table]:
        from datasets import load_dataset

        if self.hub is None:
            raise Refused(Problem("no place to read from", "dataset.path", "", self._how_to_get()))
        try:
            found = load_dataset(self.hub, revision=self.revision)
        except _load_errors() as error:
            what = f"the hub data set {self.hub} cannot be had ({_first_line(error)})"
            raise Refused(Problem(what, "dataset.hub", self.hub, self._how_to_get())) from error
        self._require(found.keys(), self.hub)
        return {ours: Table(found[theirs], f"{self.hub} ({theirs})", _arrow_files(found[theirs])) for ours, theirs in self.splits.items()}

    def _from_path(self, path: Path) -> dict[str, Table]:
        if not path.exists():
            near = did_you_mean(path.name, [f.name for f in path.parent.iterdir()]) if path.parent.is_dir() and path.suffix else ""
            raise Refused(Problem("no such folder or file", "dataset.path", str(path), near or self._how_to_get()))
        files = _files_below(path)
        form = self._detect(path, files) if self.format == "auto" else self.format
        try:
            if form == "npz":
                return self._open_npz(path)
            if form == "disk":
                return self._open_disk(path)
            return self._open_files(path if path.is_dir() else path.parent, files, form)
        except _load_errors() as error:
            empty = [file.name for file in files if not file.stat().st_size]
            why = f"{empty[0]} is empty" if empty else _first_line(error.__cause__ or error)
            remedy = "mend the file, or dataset.format=..." if path.is_file() else self._how_to_get()
            raise Refused(Problem(f"cannot be read as {form} ({why})", "dataset.path", str(path), remedy)) from error

    def _detect(self, path: Path, files: Sequence[Path]) -> str:
        names = {f.name for f in files}
        if "dataset_dict.json" in names or "state.json" in names:
            return "disk"
        for form, suffixes in {**SUFFIXES, "imagefolder": IMAGE_SUFFIXES}.items():
            if any(_ends(f, suffixes) for f in files):
                return form
        if self.lines and any(_ends(f, LINES) for f in files):
            return "txt"
        raise Refused(Problem("nothing readable lies here", "dataset.path", str(path), self._how_to_get()))

    def _open_files(self, path: Path, below: Sequence[Path], form: str) -> dict[str, Table]:
        from datasets import load_dataset

        suffixes = {**SUFFIXES, "txt": LINES}.get(form, IMAGE_SUFFIXES)
        files = [f for f in below if _ends(f, suffixes)]
        by_folder = form == "imagefolder"
        chosen = {ours: [f for f in files if _belongs(f.relative_to(path), theirs, by_folder)] for ours, theirs in self.splits.items()}
        there = [self.splits[ours] for ours, some in chosen.items() if some]
        self._require(there, str(path), _split_names(files, path, self.splits["train"]))
        # One pattern for a folder of images: their paths one by one would take the library minutes.
        patterns = {ours: [str(f) for f in some] for ours, some in chosen.items()}
        if by_folder:
            patterns = {ours: [str(path / theirs / "**")] for ours, theirs in self.splits.items()}
        found = load_dataset(LOADERS.get(form, form), data_files=patterns, **SETTINGS.get(form, {}))
        return {ours: Table(found[ours], f"{path} ({self.splits[ours]})", tuple(chosen[ours])) for ours in self.splits}

    def _open_disk(self, path: Path) -> dict[str, Table]:
        from datasets import load_from_disk

        folders = {f.parent.name: f.parent for f in sorted(path.glob("*/state.json"))}
        self._require(folders, str(path))
        tables = {ours: load_from_disk(str(folders[theirs])) for ours, theirs in self.splits.items()}
        return {ours: Table(rows, f"{path} ({self.splits[ours]})", _arrow_files(rows)) for ours, rows in tables.items()}

    def _open_npz(self, path: Path) -> dict[str, Table]:
        """One npz with arrays COLUMN_SPLIT (x_train, y_train, ...), or a folder with one npz per split."""
        files = [path] if path.is_file() else sorted(path.glob("*.npz"))
        if len(files) == 1:
            with np.load(files[0], allow_pickle=False) as arrays:
                tables = {theirs: _arrays_of(arrays, "_" + theirs) for theirs in self.splits.values()}
            self._require([name for name, columns in tables.items() if columns], str(files[0]))
            sources = dict.fromkeys(tables, files[0])
        else:
            sources = {f.stem: f for f in files}
            self._require(sources, str(path))
            tables = {}
            for theirs in self.splits.values():
                with np.load(sources[theirs], allow_pickle=False) as arrays:
                    tables[theirs] = _arrays_of(arrays, "")
        return {ours: Table(tables[theirs], f"{sources[theirs]} ({theirs})", (sources[theirs],)) for ours, theirs in self.splits.items()}

    def _require(self, there: Iterable[str], where: str, known: Iterable[str] = ()) -> None:
        """Raise `Refused` for every split that is wanted and not there."""
        there = set(there)
        others = sorted({*there, *known} - set(self.splits.values()))
        problems = []
        for ours, theirs in self.splits.items():
            if theirs not in there:
                remedy = f"there is {', '.join(others)}: e.g. dataset.splits.{ours}={others[0]}" if others else self._how_to_get()
                problems.append(Problem(f"no {ours} split ('{theirs}')", f"dataset.splits.{ours}", where, remedy))
        if problems:
            raise Refused(problems)

    def _how_to_get(self) -> str:
        layout = " and ".join(f"{theirs}*.parquet" for theirs in self.splits.values())
        columns = f" with the columns {', '.join(self.columns)}" if self.columns else ""
        lines = [
            f"put {layout}{columns} into a folder: dataset.path=FOLDER",
            "or one subfolder per split, of parquet, csv, jsonl, or images in a folder per class",
        ]
        if self.hub:
            lines.append(f"with a network: hf download {self.hub} --repo-type dataset --local-dir FOLDER")
        if self.access:
            lines.append(self.access)
        return "\n          ".join(lines)


def find_column(tables: Mapping[str, Table], wanted: str | None, usual: Sequence[str], key: str) -> str:
    """The column to read: the one wanted, or another of the usual names for the same thing if that is what lies there.

    Raises:
        Refused: none of them is there; lists the columns that are.
    """
    table = tables["train"]
    # A usual name may stand for its siblings (img for image); an unusual one was chosen with care and has no substitute.
    names = [wanted, *usual] if wanted in usual else [wanted] if wanted is not None else list(usual)
    name = next((n for n in names if n in table.columns), None)
    if name is None:
        missing = wanted or usual[0]
        what = f"no column '{missing}'; there are {', '.join(table.columns)}"
        raise Refused(Problem(what, key, table.where, f"{key}=COLUMN; {did_you_mean(missing, table.columns)}"))
    for table in tables.values():
        if name not in table.columns:
            what = f"no column '{name}' as in the training split; there are {', '.join(table.columns)}"
            raise Refused(Problem(what, key, table.where, "give all splits the same columns"))
    return name


def extra_columns(table: Table, columns: Mapping[str, str], taken: Sequence[str]) -> dict[str, Tensor]:
    """The columns that a configuration names beside those already taken, [N, ...] by the name that it gives them.

    Raises:
        Refused: no such column, or one that does not hold numbers.
    """
    found = {}
    for name, column in columns.items():
        if name in taken:
            continue
        key = f"dataset.columns.{name}"
        values = table.array(find_column({"train": table}, column, (), key))
        if values.dtype.kind not in "iufb":
            raise Refused(Problem(f"column '{column}' does not hold numbers ({values.dtype})", key, table.where, "leave it out"))
        found[name] = torch.from_numpy(values.copy())
    return found


def _belongs(file: Path, split: str, by_folder_only: bool) -> bool:
    """Whether a file is of a split: it lies in a folder of that name, or its own name begins with it (train-00000-of-00001)."""
    if by_folder_only:
        return len(file.parts) > 1 and file.parts[0] == split
    return split in file.parts[:-1] or re.match(rf"{re.escape(split)}([-_.]|$)", file.stem) is not None


def _ends(file: Path, suffixes: Sequence[str]) -> bool:
    """Whether a file's name ends so: packed files have two suffixes."""
    return file.name.lower().endswith(tuple(suffixes))


def _split_names(files: Iterable[Path], root: Path, known: str) -> set[str]:
    """What the splits of a folder seem to be called: what stands where the name of the known one stands, a folder or a file's beginning."""
    below = [f.relative_to(root) for f in files]
    depth = next((p.parts.index(known) for p in below if known in p.parts[:-1]), None)
    if depth is None:
        return {re.split(r"[-_.]", p.stem)[0] for p in below}
    return {p.parts[depth] for p in below if len(p.parts) > depth + 1}


def _files_below(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = []
    for folder, folders, names in os.walk(path, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _arrays_of(arrays: Mapping[str, np.ndarray], suffix: str) -> dict[str, np.ndarray]:
    return {name.removesuffix(suffix): arrays[name] for name in arrays if name.endswith(suffix)}


def _arrow_files(rows: Any) -> tuple[Path, ...]:
    return tuple(Path(f["filename"]) for f in rows.cache_files)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _load_errors() -> tuple[type[Exception], ...]:
    from datasets.exceptions import DatasetsError

    # Network and file faults, bad archives and arrays, and what the library wraps; anything else is a bug and shows itself.
    return (OSError, ValueError, DatasetsError, StopIteration)  # StopIteration: what it makes of an empty file
