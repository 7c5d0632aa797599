"""A report as one HTML page that needs nothing else: no script, no font, no picture from anywhere; light and dark, wide and narrow."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from kdrun.report import svg
from kdrun.report.parts import BoardReport, Chart, Report, Section, Table
from kdrun.report.style import STYLE

LONG = 30  # rows from which on a table is folded away


def to_html(report: Report) -> str:
    """The whole page."""
    title = f"kdrun report: {escape(report.title)}"
    several = len(report.boards) > 1
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{STYLE}</style></head><body>",
        f'<h1>{title}</h1><p class="muted">Made {escape(report.made)} from {len(report.runs.rows)} runs.</p>',
        _words(report.remarks),
        "<nav>" + "".join(f'<a href="#b{i}">{escape(b.title)}</a>' for i, b in enumerate(report.boards)) + "</nav>" if several else "",
        *(_board(i, board) for i, board in enumerate(report.boards)),
        '<h2 id="runs">The runs</h2><p class="about">Every run that was looked at, and how it stands.</p>',
        _table(report.runs),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part)


def _board(number: int, board: BoardReport) -> str:
    links = "".join(f'<a href="#b{number}-{s.key}">{escape(s.title)}</a>' for s in board.sections)
    head = f'<h2 id="b{number}">{escape(board.title)}</h2>'
    lead = "".join(f"<li>{_linked(text)}</li>" for text in board.summary)
    return f'{head}<ul class="lead">{lead}</ul><nav>{links}</nav>' + "".join(_section(number, s) for s in board.sections)


def _section(number: int, section: Section) -> str:
    charts = "".join(_figure(chart) for chart in section.charts)
    charts = f'<div class="charts">{charts}</div>' if charts else ""
    head = f'<h3 id="b{number}-{section.key}">{escape(section.title)}</h3><p class="about">{escape(section.about)}</p>'
    tables = "".join(_table(table) for table in section.tables)
    return f"<section>{head}{_words(section.words)}{charts}{tables}</section>"


def _words(words: Sequence[str]) -> str:
    return f'<ul class="words">{"".join(f"<li>{_linked(text)}</li>" for text in words)}</ul>' if words else ""


def _linked(text: str) -> str:
    """Text with its links to papers and code made links."""
    return re.sub(r"https://(?:arxiv\.org|github\.com)/[\w./-]*\w", lambda m: f'<a href="{m[0]}">{m[0]}</a>', escape(text))


def _figure(chart: Chart) -> str:
    legend = ""
    if len(chart.series) > 1 and not (chart.kind == "scatter" and len(chart.series) <= 12):
        legend = f'<div class="legend">{"".join(_key(s.name, s.colour) for s in chart.series)}</div>'
    return f"<figure><figcaption>{escape(chart.title)}</figcaption>{legend}{svg.draw(chart)}</figure>"


def _key(name: str, number: int) -> str:
    line = f'<line x1="0" x2="28" y1="5" y2="5" stroke="{svg.colour(number)}" stroke-width="2.5" stroke-dasharray="{svg.dash(number)}"/>'
    return f'<span><svg viewBox="0 0 28 10" aria-hidden="true">{line}</svg>{escape(name)}</span>'


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = "".join(
        f"<tr{' class=strong' if i in table.strong else ''}>{''.join(f'<td>{_linked(cell)}</td>' for cell in row)}</tr>"
        for i, row in enumerate(table.rows)
    )
    caption = f"<caption>{escape(table.title)}</caption>" if table.title else ""
    kind = "numbers" if table.numbers else "plain"
    whole = f'<div class="wide"><table class="{kind}">{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    if len(table.rows) <= LONG:
        return whole
    return f"<details><summary>{escape(table.title) or 'Table'} ({len(table.rows)} rows)</summary>{whole}</details>"
