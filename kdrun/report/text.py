"""A report as Markdown, as LaTeX rows for a paper, and on a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kdrun.report.parts import Report, Section, Table

if TYPE_CHECKING:
    from rich.console import Console

LEADERBOARD = "leaderboard"
FOLDED = ("provenance", "classes")  # sections whose tables are wide: a terminal shows their words alone
LONG = 30  # rows, from which on a terminal leaves a table to the page


def to_markdown(report: Report) -> str:
    """Headings, words and tables; charts are of the page alone."""
    lines = [f"# kdrun report: {report.title}", "", f"Made {report.made} from {len(report.runs.rows)} runs.", ""]
    lines += [*_bullets(report.remarks)]
    for board in report.boards:
        lines += [f"## {board.title}", "", *_bullets(board.summary)]
        for section in board.sections:
            lines += [f"### {section.title}", "", section.about, "", *_bullets(section.words)]
            lines += [line for table in section.tables for line in _markdown(table)]
            drawn = "; ".join(chart.title for chart in section.charts)
            lines += [f"*Drawn in the page (--format html): {drawn}.*", ""] if drawn else []
    return "\n".join([*lines, "## The runs", "", *_markdown(report.runs)]).rstrip() + "\n"


def _bullets(words: object) -> list[str]:
    texts = [f"- {text}" for text in words]  # type: ignore[attr-defined]
    return [*texts, ""] if texts else []


def _markdown(table: Table) -> Iterator[str]:
    if table.title:
        yield from (f"*{table.title}*", "")
    yield "| " + " | ".join(map(_cell, table.columns)) + " |"
    yield "|" + "|".join(["---", *(["---:" if table.numbers else "---"] * (len(table.columns) - 1))]) + "|"
    for i, row in enumerate(table.rows):
        yield "| " + " | ".join(f"**{_cell(c)}**" if i in table.strong and c and j < 2 else _cell(c) for j, c in enumerate(row)) + " |"
    yield ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


# -- LaTeX --------------------------------------------------------------------------------------------------------


def to_latex(report: Report) -> str:
    """The leaderboards as tables of the package booktabs: mean, half of the interval, seeds, difference, p."""
    return (
        "\n\n".join(_latex(board.title, section) for board in report.boards for section in board.sections if section.key == LEADERBOARD)
        + "\n"
    )


def _latex(title: str, section: Section) -> str:
    table = section.tables[0]
    head = " & ".join(_tex(c) for c in table.columns)
    rows = []
    for i, row in enumerate(table.rows):
        cells = [_tex(c) for c in row]
        if i in table.strong:
            cells[1] = rf"\textbf{{{cells[1]}}}"
        rows.append("  " + " & ".join(cells) + r" \\")
    columns = "l" + "r" * (len(table.columns) - 2) + "l"
    lines = [f"% {title}; needs \\usepackage{{booktabs}}", f"% {section.about}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    return "\n".join([*lines, f"  {head} \\\\", r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"])


def _tex(text: str) -> str:
    r"""A cell: what TeX reads as a command is written out, and a minus is a minus."""
    text = re.sub(r"([&%$#_{}])", r"\\\1", text.replace("\\", r"\textbackslash "))
    text = text.replace("~", r"\textasciitilde ").replace("^", r"\textasciicircum ").replace("< ", "$<$ ")
    return re.sub(r"(^|\s)([+-])(?=\d)", r"\1$\2$", text)


# -- terminal -----------------------------------------------------------------------------------------------------


def show(console: Console, report: Report) -> None:
    """Words and the short tables; what is long is in the page."""
    from rich.markup import escape

    console.print(f"[bold]{escape(report.title)}[/]: {len(report.runs.rows)} runs", soft_wrap=True)
    for remark in report.remarks:
        console.print(escape(remark), soft_wrap=True)
    for board in report.boards:
        console.print(f"\n[bold]{escape(board.title)}[/]", soft_wrap=True)
        for text in board.summary:
            console.print(escape(text), soft_wrap=True)
        for section in board.sections:
            if section.key == "curves":
                continue
            tables = [table for table in section.tables if section.key not in FOLDED and len(table.rows) <= LONG]
            if not tables and not section.words:
                continue
            console.print(f"\n[bold cyan]{escape(section.title)}[/]", soft_wrap=True)
            for text in section.words:
                console.print(escape(text), soft_wrap=True)
            for table in tables:
                _show(console, table)
    if len(report.runs.rows) <= LONG:
        console.print("\n[bold cyan]The runs[/]")
        _show(console, report.runs)
    console.print("--out report.html: with charts, gains class by class, settings and provenance", soft_wrap=True)


def _show(console: Console, table: Table) -> None:
    from rich.markup import escape
    from rich.table import Table as Rich

    shown = Rich(box=None, pad_edge=False, title=escape(table.title) or None, title_justify="left", title_style="dim")
    for i, column in enumerate(table.columns):
        shown.add_column(escape(column), justify="right" if table.numbers and i else "left", overflow="fold")
    for i, row in enumerate(table.rows):
        shown.add_row(*map(escape, row), style="bold" if i in table.strong else None)
    console.print(shown)
