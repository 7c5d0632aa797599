"""kdrun report: what runs have found, for people: on a terminal, as a page, for a paper."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kdrun.cli.options import Json


class Format(StrEnum):
    terminal = "terminal"
    html = "html"
    md = "md"
    latex = "latex"


ENDINGS = {".html": Format.html, ".htm": Format.html, ".md": Format.md, ".tex": Format.latex}


def report(
    what: Annotated[list[Path] | None, typer.Argument(metavar="[WHAT]...", help="Folders of runs, comparisons or sweeps.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write here: FILE.html, FILE.md or FILE.tex.")] = None,
    format: Annotated[Format | None, typer.Option(help="Instead of what the file's name says.")] = None,
    root: Annotated[str, typer.Option(help="Where runs are kept, if no WHAT is given.")] = "outputs",
    open_it: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = False,
    json: Json = False,
) -> None:
    """Curves, leaderboard, class by class, calibration, cost and provenance of runs, side by side. Without WHAT: of all runs."""
    from kdrun.cli.console import out as console
    from kdrun.cli.console import print_json
    from kdrun.report.build import build_report
    from kdrun.report.collect import find

    folders = what or []
    if open_it and out is None:
        out = (folders[0] if len(folders) == 1 else Path(root)) / "report.html"
    chosen = _format(format, out)
    made = build_report(find(folders, Path(root)), folders)
    if out is None and chosen is Format.terminal and not json:
        from kdrun.report.text import show

        show(console(), made)
        return
    if out is not None:
        _write(out, _text(made, chosen))
    if json:
        print_json(made.to_document())
    elif out is None:
        print(_text(made, chosen), end="")
    else:
        console().print(f"written: {out}", soft_wrap=True, markup=False)
    if open_it and out is not None:
        typer.launch(str(out))


def _format(asked: Format | None, out: Path | None) -> Format:
    """What is asked for, else what the file's name says. Raises `Refused` for a name that says nothing."""
    from kdrun.errors import Problem, Refused

    if out is None:
        return asked or Format.terminal
    found = asked or ENDINGS.get(out.suffix.lower())
    if found is None or found is Format.terminal:
        what = "a terminal is no file" if found is Format.terminal else "the file's name does not say what it is to be"
        raise Refused(Problem(what, str(out), "command line", "FILE.html, FILE.md or FILE.tex; or --format html"))
    return found


def _text(report: object, format: Format) -> str:
    from kdrun.report.page import to_html
    from kdrun.report.text import to_latex, to_markdown

    return {Format.html: to_html, Format.md: to_markdown, Format.latex: to_latex}[format](report)  # type: ignore[arg-type]


def _write(file: Path, text: str) -> None:
    """Raises `Refused` where it cannot be written."""
    from kdrun.errors import Problem, Refused

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise Refused(
            Problem(f"the file cannot be written ({error.strerror})", str(file), "command line", "choose another --out")
        ) from error
