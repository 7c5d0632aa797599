"""What a federation came to: its numbers round by round, said, kept and drawn."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

from kdrun.evaluation.protocol import reported
from kdrun.plan.base import Session
from kdrun.plan.client import Client, Report
from kdrun.plan.federation_picture import Course, draw, scale
from kdrun.strict_json import to_json

RECORD = "rounds.jsonl"  # one object per evaluation: the means over clients and the traffic so far


class Exchange(NamedTuple):
    """The traffic of one round."""

    up: list[int]  # bytes of each client
    down: int  # bytes to each client
    covered: float  # share of the round's proxy samples that somebody spoke of


class Quiet:
    """The reporter of one client of many, whose lines would drown the federation's. Notes are passed on."""

    brief = True

    def __init__(self, reporter: Any) -> None:
        self.note = reporter.note

    def stage_started(self, *args: Any) -> None: ...
    def logged(self, *args: Any) -> None: ...
    def step_done(self, *args: Any) -> None: ...
    def evaluated(self, *args: Any) -> None: ...
    def stage_done(self, *args: Any) -> None: ...


@dataclass(eq=False)
class Outcome:
    """Looks on while the clients train, on every rank; `finish` ends the run."""

    session: Session
    clients: list[Client]  # this rank's; of the others it knows what they report
    rounds: int
    table: list[dict[str, Any]]  # what is known of each client from the start
    metrics: dict[str, float]  # of the filter
    proxy_samples: int
    about: str  # in words, how the clients share
    exchanges: list[Exchange] = field(default_factory=list)
    histories: list[list[dict[str, Any]]] = field(init=False)  # of evaluations, by client
    seconds: list[float] = field(init=False)  # of training, by client

    def __post_init__(self) -> None:
        self.histories, self.seconds = [[] for _ in self.table], [0.0] * len(self.table)
        first = self.clients[0].training.built
        self.evaluation, self.per_round = first.evaluation, first.steps_per_epoch
        done = min(client.training.stage.step for client in self.clients) // self.per_round
        self.session.reporter.stage_started("rounds", done, self.rounds, 1, len(self.table))

    def hear(self, told: Iterable[Iterable[Report]]) -> None:
        """What the clients of every rank report."""
        for report in chain(*told):
            self.histories[report.client] += report.history
            self.seconds[report.client] = report.seconds

    def history(self) -> list[dict[str, Any]]:
        """{"step", "epoch", "each": the metrics of every client on test} of the evaluations that all have made."""
        found = []
        for entries in zip(*self.histories, strict=False):
            found.append({"step": entries[0]["step"], "epoch": entries[0]["epoch"], "each": [e["test"] or {} for e in entries]})
        return found

    def tell(self, number: int) -> None:
        """Say how round `number` ended; in one of many runs, the last one alone."""
        reporter, primary = self.session.reporter, self.evaluation.primary
        if number:
            reporter.step_done("rounds", number)
        brief = getattr(reporter, "brief", False) and number < self.rounds
        now = [entry for entry in self.history() if entry["epoch"] == number]
        if brief or not now:
            return
        each = [metrics[primary] for metrics in now[-1]["each"]]
        up, down = self.traffic(number)
        reporter.note(
            f"round {number} of {self.rounds}: {primary} {statistics.fmean(each):.2f} on average over {len(each)} clients "
            f"({min(each):.2f} to {max(each):.2f})" + (f", {_bytes(up)} sent, {_bytes(down)} received so far" if up else "")
        )

    def traffic(self, number: int) -> tuple[int, int]:
        """(bytes up, bytes down) of all clients in the first `number` rounds."""
        first = self.exchanges[:number]
        return sum(sum(e.up) for e in first), sum(e.down for e in first) * len(self.table)

    def finish(self) -> Any:
        """The means over clients as the run's numbers; client 0's network, which is the first rank's, stands for the run's student."""
        self.session.reporter.stage_done("rounds")
        last = self.history()[-1]["each"]
        metrics = {name: statistics.fmean(m[name] for m in last) for name in last[0] if all(name in m for m in last)}
        how = self.evaluation
        own = [reported(history, how.protocol, how.primary, how.last_k, how.ties).value for history in self.histories]
        metrics[how.primary] = statistics.fmean(own)
        up, down = self.traffic(len(self.exchanges))
        metrics |= {"bytes_up": float(up), "bytes_down": float(down), **self.metrics}
        for number, (row, value) in enumerate(zip(self.table, own, strict=True)):
            row |= {how.primary: value, "bytes_up": sum(e.up[number] for e in self.exchanges)}
            row |= {"bytes_down": sum(e.down for e in self.exchanges), "seconds": self.seconds[number]}
        if self.session.ranks.first:
            self._write()
        facts = {"clients": self.table, "proxy_samples": self.proxy_samples, "rounds": len(self.exchanges) or self.rounds}
        return self.session.finish(self.clients[0].training, metrics, facts)

    def _write(self) -> None:
        """What all clients came to, beside the metrics.jsonl of each, and a picture."""
        lines = [to_json(self._line(entry)) for entry in self.history()]
        (self.session.folder / RECORD).write_text("\n".join([*lines, ""]), encoding="utf-8")
        draw(self.session.folder, self._course(), self.evaluation.primary)

    def _course(self) -> Course:
        history = self.history()
        sent = [[sum(e.up[i] for e in self.exchanges[: round(entry["epoch"])]) for i in range(len(self.table))] for entry in history]
        networks = [" ".join(f"{key} {value}" for key, value in row["student"].items()) for row in self.table]
        return Course(
            [entry["epoch"] for entry in history],
            [[metrics[self.evaluation.primary] for metrics in entry["each"]] for entry in history],
            sent,
            sum(e.down for e in self.exchanges),
            networks,
            f"{len(self.table)} clients, {self.about}",
        )

    def _line(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        each, number = entry["each"], round(entry["epoch"])
        means = {name: statistics.fmean(m[name] for m in each) for name in each[0] if all(name in m for m in each)}
        up, down = self.traffic(number)
        line = {"stage": "clients", "step": entry["step"], "epoch": round(entry["epoch"], 4), "split": "test", **means}
        covered = [exchange.covered for exchange in self.exchanges[:number]][-1:]
        return {**line, "bytes_up": up, "bytes_down": down, "covered": covered[0] if covered else None}


def _bytes(count: float) -> str:
    unit, divisor = scale(count)
    return f"{count / divisor:.3g} {unit}"
