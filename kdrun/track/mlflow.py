"""MLflow Tracking (https://mlflow.org/docs/latest/ml/tracking): on a server, or in a file of this machine."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from kdrun.track.base import Ending, Tracked, Tracker

LONGEST = 6000  # characters of a parameter's value that MLflow takes (mlflow.utils.validation.MAX_PARAM_VAL_LENGTH)
AT_ONCE = 100  # parameters of one request (mlflow.utils.validation.MAX_PARAMS_TAGS_PER_BATCH)
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
# A server that does not answer must not hold the training up for minutes, which MLflow's own patience would.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


@dataclass(eq=False)
class Mlflow(Tracker):
    package: ClassVar[str] = "mlflow"

    uri: str | None = None
    experiment: str | None = None

    _client: Any = field(default=None, init=False, repr=False)
    _run: str = field(default="", init=False, repr=False)
    _resumed: set[str] = field(default_factory=set, init=False, repr=False)  # stages that go on, some of whose steps may be there
    _last: dict[str, int] = field(default_factory=dict, init=False, repr=False)  # by metric: the last step that is there

    def begin(self, run: Tracked) -> dict[str, Any]:
        for name, value in PATIENCE.items():
            os.environ.setdefault(name, value)
        import mlflow

        for talker in ("mlflow", "alembic"):
            logging.getLogger(talker).setLevel(logging.WARNING)
        own = f"sqlite:///{(run.root / 'mlflow.db').resolve()}"
        uri = run.kept.get("uri") or self.uri or os.environ.get("MLFLOW_TRACKING_URI") or own
        if uri == own:
            run.root.mkdir(parents=True, exist_ok=True)
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        if run.kept:
            self._run = run.kept["run"]
            self._client.update_run(self._run, status="RUNNING")
        else:
            tags = {"kdrun.folder": str(run.folder), "mlflow.note.content": run.title}
            self._run = self._client.create_run(self._experiment(run), run_name=run.name, tags=tags).info.run_id
            self._settings(mlflow, run.settings)
        return {"uri": uri, "run": self._run, "where": f"run {self._run} at {uri}"}

    def _experiment(self, run: Tracked) -> str:
        name = self.experiment or run.group
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found is not None else self._client.create_experiment(name))

    def _settings(self, mlflow: Any, settings: Mapping[str, Any]) -> None:
        values = [mlflow.entities.Param(key, str(value)[:LONGEST]) for key, value in settings.items()]
        for i in range(0, len(values), AT_ONCE):
            self._client.log_batch(self._run, params=values[i : i + AT_ONCE])

    def stage(self, name: str, step: int) -> None:
        if step:
            self._resumed.add(name)

    def _there(self, stage: str, name: str) -> int:
        """The last step of a metric that an earlier process has told."""
        if stage not in self._resumed:
            return -1
        if name not in self._last:
            self._last[name] = max((m.step for m in self._client.get_metric_history(self._run, name)), default=-1)
        return self._last[name]

    def numbers(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        told = [Metric(f"{stage}/{name}", float(value), now, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=[m for m in told if m.step > self._there(stage, m.key)])

    def summary(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            self._client.set_tag(self._run, f"summary.{name}", str(value)[:LONGEST])

    def end(self, how: Ending) -> None:
        if self._client is not None:
            self._client.set_terminated(self._run, STATUS[how])
