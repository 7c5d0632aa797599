"""kdrun show run=NAME --provenance: from a number back to what made it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdrun.errors import Problem, Refused, did_you_mean

RERUN = "measure it again: kdrun ledger rerun {name}"


def show_provenance(overrides: list[str], root: Path, json: bool) -> None:
    """Of a run's folder (run=NAME) or of a record (ledger=NAME). Raises `Refused` where neither is named."""
    from kdrun.cli.show import run_named
    from kdrun.ledger.lineage import of_folder, of_record

    named = [o.partition("=")[2] for o in overrides if o.startswith("ledger=")]
    if named and len(overrides) == 1:
        told = of_record(record_named(named[0], root))
    elif named:
        other = " ".join(o for o in overrides if not o.startswith("ledger="))
        raise Refused(Problem("a record is what it was", other, "command line", "leave it out; or leave out ledger=..."))
    else:
        folder = run_named(overrides, root)
        if folder is None:
            raise Refused(Problem("of which number?", "--provenance", "command line", "run=FOLDER (`kdrun ls runs`), or ledger=RECIPE"))
        told = of_folder(folder)
    if json:
        from kdrun.cli.console import print_json

        print_json(told)
    else:
        _show(told)
        if named:
            print(RERUN.format(name=named[0]))


def record_named(name: str, root: Path) -> dict[str, Any]:
    """The record <root>/ledger/<name>.json. Raises `Refused` where there is none."""
    from kdrun.engine.records import read_json

    files = {file.stem: file for file in sorted((root / "ledger").glob("*.json"))}
    if name not in files:
        raise Refused(Problem(f"the ledger has no record '{name}'", "ledger", str(root), did_you_mean(name, files) or "`kdrun ledger`"))
    found: dict[str, Any] = read_json(files[name])
    return found


def _show(told: dict[str, Any]) -> None:
    """A line for each fact; lists one entry a line; what was not kept is said to be missing."""
    from rich.markup import escape
    from rich.table import Table

    from kdrun.cli.console import out

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("", no_wrap=True, style="bold")
    table.add_column("", overflow="fold")
    for key, value in told.items():
        lines = value if isinstance(value, list) and value and isinstance(value[0], dict) else [value]
        for number, line in enumerate(lines):
            table.add_row("" if number else key.replace("_", " "), escape(_text(line)))
    out().print(table)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items() if v not in ({}, [])) or "not kept"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "not kept" if value is None else str(value)
