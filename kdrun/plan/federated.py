"""Federated distillation: clients that never show their rows or weights and learn from each other's soft labels on shared samples.

Federated Distillation on Edge Devices (EdgeFD; Mujtaba, Radchenko, Prodan, Masana, FLTA 2025, arXiv 2508.14769). Once: every client
gives a share of its inputs to the proxy set and fits an estimator of its own density, which says of which proxy samples it speaks.
Every round: local steps; predictions on the proxy samples up, from competent clients alone; their average per sample down; distillation
steps. Without a filter this is FedMD (Li, Wang 2019, arXiv 1910.03581), without distillation steps every client is alone.

Each client is one training stage of the run, by the one loop; a round is an epoch. Between the stages' segments lie the exchanges,
which are kept, so a run goes on where it was stopped although its clients stand at different steps.

Clients that outgrow one process are shared out over ranks: client k is rank k mod W's, which alone trains it, judges and speaks for it
and writes its folder. Uploads travel, and every rank averages the same ones in the same order, so that on CPUs the result is that of one
process to the last bit.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor

from kdrun import rng
from kdrun.config.schema import STUDENT_KEYS
from kdrun.config.targets import allowed, component
from kdrun.dataset.base import Data, Split, taken
from kdrun.errors import EXIT_STOPPED, KdrunError, Problem, Refused
from kdrun.objective.edgefd import COVERED, EdgeFD
from kdrun.plan.base import Plan, Session
from kdrun.plan.client import Client, Extract, Filter, Report, client_seed, points
from kdrun.plan.exchange import Share, average, precision_and_recall, size
from kdrun.plan.federation import Exchange, Outcome, Quiet
from kdrun.plan.peers import Peers, ranks_of
from kdrun.source import federated as source
from kdrun.source.features import PCA_NAME, principal_components, timm_features
from kdrun.source.partition import by_class, contributed, dirichlet, holders, unlabelled
from kdrun.student.build import build as build_network


@dataclass(eq=False)
class Federated(Plan):
    """Clients, rounds, who holds what, who speaks of what. Raises ValueError for a field outside its range."""

    clients: int = 10
    rounds: int = 20
    local_steps: int = 8
    distill_steps: int = 16
    partition: Literal["classes", "iid", "dirichlet"] = "classes"
    classes_per_client: int = 1
    concentration: float = 0.5
    proxy_fraction: float = 0.1
    proxy_per_round: int | None = None
    share: Share = "probs"
    estimator: Literal["kmeans", "kulsif", "oracle", "none"] = "kmeans"
    centroids_per_class: int = 1
    id_quantile: float = 0.95
    auxiliary: int = 400
    kernel_width: float | None = None
    ridge: float = 0.1
    extractor: str | None = None
    extractor_pretrained: bool = True
    components: int = 50
    students: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in (
            "clients",
            "rounds",
            "local_steps",
            "classes_per_client",
            "centroids_per_class",
            "auxiliary",
            "proxy_per_round",
            "components",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: legal range [1, inf)")
        if self.distill_steps < 0:
            raise ValueError(f"distill_steps={self.distill_steps}: legal range [0, inf)")
        for name in ("concentration", "kernel_width", "ridge"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: legal range (0, inf)")
        if not 0 < self.proxy_fraction <= 1:
            raise ValueError(f"proxy_fraction={self.proxy_fraction}: legal range (0, 1]")
        if not 0 <= self.id_quantile <= 1:
            raise ValueError(f"id_quantile={self.id_quantile}: legal range [0, 1]")

    @property
    def round_steps(self) -> int:
        """Optimiser steps of one client in one round."""
        return self.local_steps + self.distill_steps

    # -- what does not fit ----------------------------------------------------------------------------------------

    def problems(self, tree: Mapping[str, Any], data: Data) -> list[Problem]:
        found: list[Problem] = []
        packages = allowed(tree)
        if not issubclass(component(tree["source"]["_target_"], packages, "source"), source.Federated):
            found.append(Problem("a client takes turns between its own rows and the shared ones", "source", "", "source=federated"))
        elif any(tree["source"][key] != getattr(self, key) for key in ("local_steps", "distill_steps")):
            remedy = "set plan.local_steps and plan.distill_steps alone: the source takes them from there"
            found.append(Problem("the steps of a round differ from those of the plan", "source.local_steps", "", remedy))
        if self.distill_steps and not issubclass(component(tree["objective"]["_target_"], packages, "objective"), EdgeFD):
            remedy = "objective=edgefd, or plan.distill_steps=0 for clients that stay alone"
            found.append(Problem("this objective does not learn from what other clients say", "objective", "", remedy))
        if tree["teacher"].get("kind", "none") != "none":
            found.append(Problem("the clients are each other's teacher", "teacher", "", "teacher=none"))
        if self.start_from and self.students:
            found.append(
                Problem("one student's weights do not fit into networks of several kinds", "plan.students", "", "plan.students=[]")
            )
        if tree["optim"]["epochs"] != self.rounds or tree["optim"].get("steps"):
            what = f"a round is an epoch, and {self.rounds} rounds are planned"
            found.append(Problem(what, "optim.epochs", "", f"optim.epochs={self.rounds} optim.steps=null"))
        if self.extractor not in (None, PCA_NAME) and len(data.input_shape) != 3:
            found.append(Problem(f"{data.name} has no images", "plan.extractor", "", "plan.extractor=null"))
        if data.whole:
            found.append(Problem(f"{data.name} is one graph and cannot be shared out", "dataset", "", "a data set of single samples"))
        if tree["evaluation"].get("patience") is not None:
            what = "a client that stops early would go on speaking of what it knew then"
            found.append(Problem(what, "evaluation.patience", "", "evaluation.patience=null: all clients train through all rounds"))
        found += self._rank_problems(tree["hardware"])
        return [*found, *self._partition_problems(tree, data), *self._student_problems(tree, data, packages)]

    def _rank_problems(self, hardware: Mapping[str, Any]) -> list[Problem]:
        ranks, found = ranks_of(hardware), []
        if ranks == 1:
            return []
        if ranks > self.clients:
            what = f"{ranks} ranks and {self.clients} clients: a client is on one rank, so some would have none"
            found.append(Problem(what, "hardware.procs", "", f"hardware.procs={self.clients} at most, or more plan.clients"))
        if hardware["wrap"] == "fsdp2":
            found.append(
                Problem("a client's student is whole on its rank", "hardware.wrap", "", "hardware.wrap=ddp, which wraps nothing here")
            )
        if isinstance(hardware["micro_batch"], list):
            what = "sizes are those of a batch that is shared over ranks, and a client's is not"
            found.append(Problem(what, "hardware.micro_batch", "", f"one number, e.g. hardware.micro_batch={max(hardware['micro_batch'])}"))
        return found

    def describe(self) -> str:
        steps = f"{self.local_steps} local steps" + (f" and {self.distill_steps} distillation steps" if self.distill_steps else "")
        return f"{self.clients} clients in {self.rounds} rounds of {steps}; over W ranks client k is on rank k mod W"

    def _partition_problems(self, tree: Mapping[str, Any], data: Data) -> list[Problem]:
        if self.partition == "classes":
            if self.classes_per_client > data.classes:
                what = f"{data.name} has {data.classes} classes"
                return [Problem(what, "plan.classes_per_client", "", f"plan.classes_per_client={data.classes} at most")]
            orphans = [label for label, who in enumerate(holders(self.clients, data.classes, self.classes_per_client)) if not who]
            if orphans:
                enough = -(-data.classes // self.clients)
                what = f"no client would hold class {', '.join(map(str, orphans[:6]))}"
                return [Problem(what, "plan.classes_per_client", "", f"plan.classes_per_client={enough}")]
        bare = [number for number, rows in enumerate(self.split_up(data, tree["seed"])) if not len(rows)]
        if bare:
            what = f"client {', '.join(map(str, bare[:6]))} would hold no row"
            return [Problem(what, "plan.clients", "", "fewer clients, or a larger plan.concentration")]
        return []

    def _student_problems(self, tree: Mapping[str, Any], data: Data, packages: tuple[str, ...]) -> list[Problem]:
        found: list[Problem] = []
        for number, changes in enumerate(self.students):
            node, key = {**tree["student"], **changes}, f"plan.students.{number}"
            try:
                build_network(node, data.classes, data.input_shape, reserved=STUDENT_KEYS, allowed=packages, key=key)
            except Refused as refused:
                found += refused.problems
        return found

    def view(self, tree: Mapping[str, Any], data: Data) -> Data:
        """What the first client has."""
        parts = self.split_up(data, tree["seed"])
        pooled, _ = self._pool(data.split("train"), parts, tree["seed"])
        return client_data(data, parts[0], unlabelled(taken(data.split("train"), pooled)))

    # -- who holds and who says what ------------------------------------------------------------------------------

    def split_up(self, data: Data, seed: int) -> list[Tensor]:
        """The positions in the training split that each client holds."""
        split = data.split("train")
        if self.partition == "dirichlet":
            return dirichlet(split.targets, split.ids, data.classes, self.clients, self.concentration, seed)
        per_client = data.classes if self.partition == "iid" else self.classes_per_client
        who = holders(self.clients, data.classes, per_client)
        return by_class(split.targets, split.ids, who, self.clients, seed)

    def _pool(self, split: Split, parts: list[Tensor], seed: int) -> tuple[Tensor, Tensor]:
        """(positions [P] of the proxy rows, rising by id; who gave which, bool [clients, P])."""
        given = [contributed(rows, split.ids, self.proxy_fraction, seed) for rows in parts]
        pooled = torch.cat(given).unique()
        pooled = pooled[split.ids[pooled].argsort()]
        return pooled, torch.stack([torch.isin(pooled, rows) for rows in given])

    def _masks(self, session: Session, peers: Peers, datas: Mapping[int, Data], own: Tensor, truth: Tensor) -> dict[str, Any]:
        """Who speaks of what, fixed for all rounds: {"mask": bool [clients, P], "seconds": of each client's filter}. `datas` are those of
        this rank's clients."""
        if not self.distill_steps or self.estimator in ("none", "oracle"):
            mask = truth | own if self.estimator == "oracle" else torch.ones_like(own)
            return {"mask": mask, "seconds": [0.0] * self.clients}
        judged = ChainMap(*peers.together(lambda: self._judge(session, datas, own)))
        mask = torch.stack([judged[number][0] for number in range(self.clients)])
        return {"mask": mask, "seconds": [judged[number][1] for number in range(self.clients)]}

    def _judge(self, session: Session, datas: Mapping[int, Data], own: Tensor) -> dict[int, tuple[Tensor, float]]:
        """(mask [P], seconds) of the filters of this rank's clients, by client."""
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

        first = next(iter(datas.values()))
        extract = self._extractor(first, session.device)
        proxy = points(first, source.PROXY, extract, session.device)
        found = {}
        # One thread: the sums behind a centroid depend on how many there are, and so would the seconds.
        with threadpool_limits(1):
            for number, data in datas.items():
                local = len(data.split("train").targets.unique())
                how = Filter(
                    "kmeans" if self.estimator == "kmeans" else "kulsif",
                    self.centroids_per_class * local, self.id_quantile, self.auxiliary, self.kernel_width, self.ridge,
                )  # fmt: skip
                private = points(data, "train", extract, session.device)
                found[number] = how.judge(private, proxy, own[number], client_seed(session.tree["seed"], number))
        return found

    def _extractor(self, data: Data, device: torch.device) -> Extract:
        if self.extractor is None:
            return lambda inputs: inputs
        if self.extractor == PCA_NAME:
            return principal_components(points(data, source.PROXY, lambda inputs: inputs, device), self.components)
        return timm_features(self.extractor, self.extractor_pretrained, data.mean, data.std, device, "plan.extractor")

    # -- carrying it out ------------------------------------------------------------------------------------------

    def run(self, session: Session) -> Any:
        peers = Peers(session.ranks.rank, session.ranks.world, session.folder)
        with peers.listening():
            clients, outcome = self._enrol(session, peers)
            try:
                self._carry_out(session, peers, clients, outcome)
            except KdrunError as error:
                if error.exit_code == EXIT_STOPPED:  # the client that was training has saved; the others stand where they last spoke
                    for client in clients:
                        client.save()
                raise
            return peers.gather(outcome.finish())[0]

    def _carry_out(self, session: Session, peers: Peers, clients: list[Client], outcome: Outcome) -> None:
        """All rounds of this rank's clients."""

        def train(until: int) -> list[Report]:
            return [client.train(until) for client in clients]

        temperature = float(session.tree["objective"].get("temperature", 1.0))
        last = min(self.rounds, math.ceil(clients[0].training.end / self.round_steps))  # fewer in a dry run
        for number in range(1, last + 1):
            until = (number - 1) * self.round_steps + self.local_steps
            outcome.hear(peers.together(lambda: train(until)))  # noqa: B023
            outcome.tell(number - 1)
            if self.distill_steps:
                exchange = session.kept(f"round-{number}", lambda: self._exchange(session, peers, clients, number, temperature))  # noqa: B023
                outcome.exchanges.append(Exchange(exchange["up"], exchange["down"], exchange["covered"]))
                for client in clients:
                    client.receive(number, exchange["ids"], exchange["targets"])
        outcome.hear(peers.together(lambda: train(last * self.round_steps)))
        outcome.tell(last)

    def _enrol(self, session: Session, peers: Peers) -> tuple[list[Client], Outcome]:
        """Share the rows out, make the filters, start the stages of this rank's clients."""
        tree, train = session.tree, session.data.split("train")
        parts = self.split_up(session.data, tree["seed"])
        pooled, own = self._pool(train, parts, tree["seed"])
        proxy = unlabelled(taken(train, pooled))
        datas = {number: client_data(session.data, rows, proxy) for number, rows in enumerate(parts) if peers.owns(number)}
        truth = torch.stack([torch.isin(train.targets[pooled], train.targets[rows]) for rows in parts])
        filters = session.kept("filter", lambda: self._masks(session, peers, datas, own, truth))
        clients: list[Client] = []

        def start() -> None:
            mine = session.alone()
            for number, data in datas.items():
                node = self.client_tree(tree, number, session.device)
                training: Any = mine.prepare(f"clients/{number}", mine.build(node, data))
                training.reporter = Quiet(session.reporter)
                clients.append(Client(number, data, filters["mask"][number], training, session.device))

        peers.together(start)
        quality = [precision_and_recall(filters["mask"][n : n + 1], truth[n : n + 1]) for n in range(self.clients)]
        table = [
            {
                "client": number,
                "classes": train.targets[rows].unique().tolist(),
                "rows": len(rows),
                "given": int(own[number].sum()),
                "speaks_of": int(filters["mask"][number].sum()),
                "student": self._kind(tree, number),
                **(dict(zip(("filter_precision", "filter_recall"), quality[number], strict=True)) if self.distill_steps else {}),
            }
            for number, rows in enumerate(parts)
        ]
        metrics: dict[str, float] = {}
        if self.distill_steps:
            overall = precision_and_recall(filters["mask"], truth)
            metrics = {"filter_precision": overall[0], "filter_recall": overall[1], "filter_seconds": sum(filters["seconds"])}
        return clients, Outcome(session, list(clients), self.rounds, table, metrics, len(pooled), self._about())

    def _about(self) -> str:
        """How the clients share, in words."""
        classes = f"{self.classes_per_client} class{'es' * (self.classes_per_client > 1)} each"
        partition = {"iid": "IID", "dirichlet": f"Dirichlet {self.concentration:g}"}.get(self.partition, classes)
        if not self.distill_steps:
            return f"{partition}, each alone"
        speak = {"none": "all speak of all (FedMD)", "oracle": "oracle filter"}.get(self.estimator, f"{self.estimator} filter")
        return f"{partition}, {speak}, {self.share} shared"

    def _student(self, tree: Mapping[str, Any], number: int) -> dict[str, Any]:
        """The network of a client: the run's own student is the first kind, and the kinds take turns."""
        kinds: list[dict[str, Any]] = [{}, *self.students]
        return {**tree["student"], **kinds[number % len(kinds)]}

    def _kind(self, tree: Mapping[str, Any], number: int) -> dict[str, Any]:
        """What tells this client's network from those of other clients."""
        node = self._student(tree, number)
        told = {key: node.get(key) for key in dict.fromkeys(key for changes in self.students for key in changes)}
        return {key.strip("_"): str(value).rpartition(".")[2] if key == "_target_" else value for key, value in told.items()}

    def client_tree(self, tree: Mapping[str, Any], number: int, device: torch.device) -> dict[str, Any]:
        """The configuration of one client's stage."""
        hardware = tree["hardware"]
        # A stage that is compiled throws away what the ones before it had compiled; on a CPU auto compiles nothing.
        compiled = "off" if hardware["compile"] == "auto" and device.type == "cuda" else hardware["compile"]
        return {
            **tree,
            "seed": client_seed(tree["seed"], number),
            "student": self._student(tree, number),
            "source": {**tree["source"], "steps_per_epoch": self.round_steps},
            "hardware": {**hardware, "compile": compiled},
        }

    def _exchange(self, session: Session, peers: Peers, clients: list[Client], number: int, temperature: float) -> dict[str, Any]:
        """One round's predictions, of all ranks' clients, and their average, as it is kept."""
        count = len(clients[0].mask)
        rows = torch.arange(count)
        if self.proxy_per_round is not None:
            rows = rng.permutation(rng.key(session.tree["seed"], "proxy of the round"), count, number)[: self.proxy_per_round].sort().values
        said = peers.together(lambda: [client.speak(rows, self.share, temperature) for client in clients])
        uploads = sorted(chain(*said), key=lambda upload: upload.client)
        ids, targets = average(uploads, self.share, temperature)
        return {
            "ids": ids,
            "targets": targets,
            "up": [size(upload.ids, upload.said) for upload in uploads],
            "down": size(ids, targets),
            "covered": len(ids) / len(rows),
        }


def client_data(data: Data, rows: Tensor, proxy: Split) -> Data:
    """A data set as one client has it: its own training rows (positions [N]), the shared inputs, all of the other splits."""
    own = taken(data.split("train"), rows)
    private = replace(own, extra={**own.extra, COVERED: torch.zeros(len(rows), dtype=torch.bool)})
    return replace(data, splits={**data.splits, "train": private, source.PROXY: proxy})
