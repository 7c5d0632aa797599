"""kdrun export: a finished student for the world outside."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from kdrun.cli.options import Json


class Format(StrEnum):
    safetensors = "safetensors"
    torch = "torch"
    onnx = "onnx"
    all = "all"


def export(
    run: Annotated[str, typer.Argument(help="A finished run's folder.")],
    to: Annotated[str | None, typer.Option("--to", help="The folder to write; it must be new. Otherwise export/ in the run's.")] = None,
    format: Annotated[
        Format, typer.Option("--format", help="safetensors: weights; torch: a .pt2 of torch.export; onnx; all: what this student can have.")
    ] = Format.safetensors,
    json: Json = False,
) -> None:
    """Write the student of a run, alone, with a model card and the lines that load it. Graphs (torch, onnx) are held against the student
    on real samples: exit code 3 where one is too far off."""
    from kdrun.config.check import located
    from kdrun.engine.records import load_run

    folder = Path(run).resolve()
    composed = load_run(folder)  # checked when it was run; a key that came later is no reason to refuse it
    from kdrun.export.export import FORMATS
    from kdrun.export.export import export as write

    wanted = FORMATS if format is Format.all else (format.value,)
    with located(composed):
        facts = write(composed, folder, Path(to).expanduser().resolve() if to else folder / "export", wanted, every=format is Format.all)
    if json:
        from kdrun.cli.console import print_json

        print_json(facts)
    else:
        _show(facts)


def _show(facts: dict[str, Any]) -> None:
    from rich.markup import escape

    from kdrun.cli.console import out

    console = out()
    console.print(f"[bold]{escape(facts['folder'])}[/]: the student alone, and README.md, which says what it is", soft_wrap=True)
    for name, told in facts["formats"].items():
        console.print(f"\n{name}: {told['file']}", soft_wrap=True)
        if "parity" in told:
            p = told["parity"]
            console.print(
                f"  held against the student on {p['samples']} test samples: max difference of a logit {p['max_difference']:.2g} "
                f"(tolerance {p['tolerance']:.2g}), argmax equal in {p['agreement']:.2%}",
                soft_wrap=True,
            )
        for line in told["load"]:
            console.print(f"    {escape(line)}", soft_wrap=True)
    for name, why in facts["left_out"].items():
        console.print(f"\n{name}: left out; {escape(why)}", soft_wrap=True)
