"""kdrun cache: what teachers have said, kept on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kdrun.cli.options import Json

app = typer.Typer(help="What teachers have said, kept on disk: list, verify, remove, pack and add.", no_args_is_help=True)
Root = Annotated[str, typer.Option(help="The folder that holds cache/.")]
Name = Annotated[str, typer.Argument(help="A cache: its name as `kdrun cache ls` shows it, or its folder.")]


@app.command("ls")
def ls(root: Root = "outputs", json: Json = False) -> None:
    """List the caches: format, how much is there, size on disk."""
    from kdrun.cache.manifest import caches
    from kdrun.errors import Refused

    rows, broken = [], []
    for folder in caches(Path(root) / "cache"):
        try:
            rows.append(_facts(folder))
        except Refused as refused:
            broken.append(f"{folder.name}: {refused.problems[0].what}; kdrun cache rm {folder.name}")
    if json:
        from kdrun.cli.console import print_json

        print_json(rows)
    elif not rows and not broken:
        from kdrun.cli.console import out

        out().print(f"there is no cache in {root}/cache; `kdrun train ... cache=dense` makes one while it trains")
    elif rows:
        _table(rows)
    for line in broken:
        from kdrun.cli.console import err

        err().print(line, soft_wrap=True)


@app.command("verify")
def verify(
    name: Name,
    samples: Annotated[int, typer.Option(help="Rows that are computed again.", min=1)] = 64,
    allow: Annotated[list[str] | None, typer.Option(help="A package of your own whose classes it names. May be repeated.")] = None,
    root: Root = "outputs",
    json: Json = False,
) -> None:
    """Ask the teacher again about some of the rows: exit code 3 where what is kept is not what it says (but for the format's rounding)."""
    folder = _found(name, root)
    from kdrun.engine.verifying import verify as check
    from kdrun.errors import CheckFailed

    found = check(folder, samples, allow or ())
    if json:
        from kdrun.cli.console import print_json

        print_json(found)
    else:
        from kdrun.cli.console import out

        top1 = "" if found["teacher_top1"] is None else f"; the teacher is right in {found['teacher_top1']:.1f} % of them"
        allowed = f"{100 * found['tolerance']:g} % is allowed"
        line = f"{found['name']}: {found['checked']} of {found['filled']} rows computed again{top1}"
        out().print(
            f"{line}\n  off by {100 * found['off']:.2g} % of their range at most ({allowed}), {found['damaged']} damaged", soft_wrap=True
        )
    if found["damaged"] or found["off"] > found["tolerance"]:
        raise CheckFailed(f"{found['name']} is not what its teacher says; kdrun cache rm {found['name']}")


@app.command("rm")
def rm(name: Name, root: Root = "outputs") -> None:
    """Remove a cache."""
    import shutil

    from kdrun.cache.manifest import strangers
    from kdrun.cli.console import out
    from kdrun.errors import Problem, Refused

    folder = _found(name, root)
    if others := strangers(folder):
        what = f"this folder has files that no cache has: {', '.join(others[:6])}"
        raise Refused(Problem(what, "cache", str(folder), "remove it by hand, if it is to go"))
    size = _bytes(folder)
    shutil.rmtree(folder)

    out().print(f"removed {folder.name}: {size / 1e6:,.1f} MB", soft_wrap=True)


@app.command("pack")
def pack(
    name: Name, file: Annotated[str, typer.Argument(help="The archive to write, e.g. teacher.tar.gz.")], root: Root = "outputs"
) -> None:
    """Put a cache into one archive, for another machine."""
    from kdrun.cache.archive import pack as write

    folder, target = _found(name, root), Path(file)
    write(folder, target)
    from kdrun.cli.console import out

    out().print(
        f"{target}: {target.stat().st_size / 1e6:,.1f} MB; kdrun cache add {target.name} puts it into place elsewhere", soft_wrap=True
    )


@app.command("add")
def add(file: Annotated[str, typer.Argument(help="An archive that `kdrun cache pack` wrote.")], root: Root = "outputs") -> None:
    """Put a packed cache into place; every row of it is checked first."""
    from kdrun.cache.archive import unpack
    from kdrun.cli.console import out

    folder, rows = unpack(Path(file), Path(root) / "cache")
    out().print(f"added {folder.name}: {rows:,} rows, all whole", soft_wrap=True)


def _found(name: str, root: str) -> Path:
    """The folder of a cache. Raises `Refused` for a name that there is not."""
    from kdrun.cache.manifest import MANIFEST, caches
    from kdrun.errors import Problem, Refused, did_you_mean

    here = Path(root) / "cache"
    for folder in (here / name, Path(name)):
        if (folder / MANIFEST).is_file():
            return folder.resolve()
    names = [folder.name for folder in caches(here)]
    remedy = did_you_mean(name, names) if names else "`kdrun train ... cache=dense` makes one"
    raise Refused(Problem(f"there is no cache named '{name}'", "cache", str(here), remedy))


def _facts(folder: Path) -> dict[str, Any]:
    from kdrun.cache.manifest import marks, read_manifest, views_of

    manifest = read_manifest(folder)
    made_of, views = manifest["made_of"], views_of(folder)
    form = made_of["format"]
    filled = sum(int((found != 0).sum()) for view in views if (found := marks(folder, view)) is not None)
    return {
        "name": folder.name,
        "format": f"top {form['k']}" if form["name"] == "topk" else form["name"] + (f" {form['dtype']}" if form["name"] == "dense" else ""),
        "taps": sorted(form["taps"]),
        "seed": made_of["seed"],
        "views": len(views),
        "samples": manifest["samples"],
        "filled": filled / (len(views) * manifest["samples"]) if views else 0.0,
        "bytes": _bytes(folder),
        "teacher": made_of["teacher"]["sha256"],
        "data": made_of["data"],
    }


def _bytes(folder: Path) -> int:
    """On disk: a file that fills up has holes."""
    return sum(file.stat().st_blocks * 512 for file in folder.iterdir())


def _table(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from kdrun.cli.console import out

    table = Table()
    for column in ("cache", "format", "seed", "views", "samples", "filled", "on disk"):
        table.add_column(column, justify="left" if column in ("cache", "format") else "right", overflow="fold")
    for row in rows:
        seed = "any" if row["seed"] is None else str(row["seed"])
        form = row["format"] + "".join(f", {tap}" for tap in row["taps"])
        size, filled = f"{row['bytes'] / 1e6:,.1f} MB", f"{100 * row['filled']:.0f} %"
        table.add_row(row["name"], form, seed, str(row["views"]), f"{row['samples']:,}", filled, size)
    out().print(table)
