"""kdrun bench: speed and memory on this machine, as ratios of pairs that take turns in one run."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from kdrun.cli.options import Json, Overrides

app = typer.Typer(help="Speed and memory on this machine, as ratios of pairs that take turns in one run.", no_args_is_help=True)
Repeats = Annotated[int, typer.Option(help="How often each case is run, in turn.", min=1)]


class Loss(StrEnum):
    forward_kl = "forward_kl"
    reverse_kl = "reverse_kl"
    jsd = "jsd"
    cross_entropy = "cross_entropy"


@app.command("vocab")
def vocab(
    vocab: Annotated[int, typer.Option(help="Tokens of the vocabulary.", min=2)] = 151936,
    tokens: Annotated[int, typer.Option(help="Scored tokens of a step.", min=1)] = 2048,
    width: Annotated[int, typer.Option(help="Features of a hidden state.", min=1)] = 512,
    loss: Annotated[Loss, typer.Option(help="What compares student and teacher.")] = Loss.forward_kl,
    repeats: Repeats = 3,
    json: Json = False,
) -> None:
    """A divergence over a large vocabulary a chunk of tokens at a time, against the logits of all tokens at once."""
    from kdrun.bench.turns import in_turns, middle, ratio

    sizes = ["--loss", loss.value, "--vocab", str(vocab), "--tokens", str(tokens), "--width", str(width)]
    cases = ("dense", "chunked")
    told = in_turns({case: ["kdrun.bench.vocab", case, *sizes] for case in cases}, repeats, _progress(repeats))
    ratios = {number: ratio(told["chunked"], told["dense"], number) for number in ("seconds", "bytes", "loss")}
    document: dict[str, Any] = {
        "vocab": vocab, "tokens": tokens, "width": width, "loss": loss.value, "repeats": repeats, "machine": _machine(),
        "cases": told, "chunked over dense": {number: found._asdict() for number, found in ratios.items()},
    }  # fmt: skip
    if json:
        from kdrun.cli.console import print_json

        print_json(document)
        return
    rows = [
        [
            case,
            f"{1000 * middle(told[case], 'seconds'):,.0f} ms",
            f"{middle(told[case], 'bytes') / 2**20:,.0f} MiB",
            f"{middle(told[case], 'loss'):.6g}",
            f"{middle(told[case], 'gradient_off'):.1e}",
        ]
        for case in cases
    ]
    title = f"{loss.value} of {tokens:,} tokens over {vocab:,} ids, {width} features; {_machine()}"
    _show(title, ["", "time", "memory above the inputs", "loss", "gradient off by"], rows)
    _say(f"chunked over dense, median of {repeats} (least to largest): time {ratios['seconds']}, memory {ratios['bytes']}")


@app.command("loop")
def loop(
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="Timed steps of each case and repetition.", min=1)] = 20,
    usual: Annotated[bool, typer.Option("--usual/--no-usual", help="Also the usual research loop, for small images.")] = True,
    repeats: Repeats = 3,
    json: Json = False,
) -> None:
    """Training steps a second: the engine with a live teacher and with a filled cache, the same step by hand, the usual loop."""
    from kdrun.bench.turns import in_turns, middle, ratio

    cases = ("engine", "cached", "hand", *(["usual"] if usual else []))
    words = overrides or ["recipe=kd_cifar100"]
    told = in_turns({c: ["kdrun.bench.loop", c, "--steps", str(steps), *words] for c in cases}, repeats, _progress(repeats))
    pairs = [("engine", "hand"), ("cached", "engine"), *((case, "usual") for case in ("engine", "cached") if usual)]
    ratios = {f"{a} over {b}": ratio(told[a], told[b], "rate") for a, b in pairs}
    if json:
        from kdrun.cli.console import print_json

        plain = {name: found._asdict() for name, found in ratios.items()}
        print_json({"overrides": words, "steps": steps, "repeats": repeats, "machine": _machine(), "cases": told, "ratios": plain})
        return
    rows = [[case, f"{middle(told[case], 'rate'):,.0f}"] for case in cases]
    _show(f"{' '.join(words)}; {_machine()}", ["", "samples a second"], rows)
    for name, found in ratios.items():
        _say(f"{name}, median of {repeats} (least to largest): {found}")
    for case in ("engine", "cached"):
        shares = {part: sum(t["split"][part] for t in told[case]) / repeats for part in told[case][0]["split"]}
        _say(f"a step of {case}: " + ", ".join(f"{part} {share:.1f} %" for part, share in shares.items()))
    if "peak_share" in told["engine"][0]:
        _say(f"the engine reaches {100 * middle(told['engine'], 'peak_share'):.0f} % of this machine's measured peak")


@app.command("pack")
def pack(
    overrides: Overrides = None,
    objectives: Annotated[str, typer.Option(help="Those that are trained side by side.")] = "kd,dkd,pld,dist",
    rates: Annotated[str, typer.Option(help="Learning rates: every objective is trained with each.")] = "0.05,0.01",
    steps: Annotated[int, typer.Option(help="Timed steps of each student.", min=1)] = 10,
    repeats: Repeats = 3,
    json: Json = False,
) -> None:
    """Several students in one process, on one stream of batches and one forward pass of the teacher, against each alone."""
    from kdrun.bench.turns import in_turns, middle, ratio

    words = overrides or ["recipe=kd_cifar100"]
    members = [f"objective={o} optim.lr={lr}" for o in objectives.split(",") for lr in rates.split(",")]
    cases = ("separate", "packed")
    asked = {c: ["kdrun.bench.pack", c, "--steps", str(steps), "--members", *members, "--common", *words] for c in cases}
    told = in_turns(asked, repeats, _progress(repeats))
    faster = ratio(told["separate"], told["packed"], "seconds")
    if json:
        from kdrun.cli.console import print_json

        found = {"separate over packed": faster._asdict()}
        print_json(
            {"overrides": words, "members": members, "steps": steps, "repeats": repeats, "machine": _machine(), "cases": told, **found}
        )
        return
    rows = [[case, f"{1000 * middle(told[case], 'seconds'):,.0f} ms"] for case in cases]
    _show(f"{len(members)} students of {' '.join(words)}; {_machine()}", ["", "a step of all"], rows)
    _say(f"separate over packed, median of {repeats} (least to largest): {faster}")


def _machine() -> str:
    import torch

    from kdrun.engine.provenance import hardware

    return hardware(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _progress(repeats: int) -> Any:
    """A line on standard error for each case that is done."""
    from kdrun.cli.console import err

    return lambda case, repetition: err().print(f"{case}: {repetition + 1} of {repeats}")


def _show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.table import Table

    from kdrun.cli.console import out

    _say(title)  # as a line: a table's title is broken where the table is narrow
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    out().print(table)


def _say(line: str) -> None:
    from kdrun.cli.console import out

    out().print(line, soft_wrap=True)
