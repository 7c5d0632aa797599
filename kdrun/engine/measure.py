"""Measuring a student again, from whatever holds its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from kdrun.config.compose import Composed
from kdrun.engine import state
from kdrun.engine.build import build_first, load_data
from kdrun.engine.device import pick_device, set_up
from kdrun.engine.distributed import Ranks
from kdrun.engine.evaluate import Evaluator, teacher_score
from kdrun.engine.records import STUDENT_FILE, SUMMARY, read_json
from kdrun.engine.summary import cost_of
from kdrun.errors import Problem, Refused
from kdrun.plan.single import teacher_stage
from kdrun.student.weights import bare, load_weights
from kdrun.teacher.live import LiveTeacher
from kdrun.teacher.silent import NoTeacher

STUDENT = "student.module."  # of the student's weights in a learner's


def measure(composed: Composed, path: Path, home: Path | None, latency: bool) -> dict[str, Any]:
    """Metrics on every split, and the cost, of the student in `path` (run folder, checkpoint folder or weights file)."""
    tree = composed.tree
    device = pick_device(tree["hardware"])
    set_up(tree["hardware"], device)
    data = load_data(tree)
    built = build_first(tree, data, device, Ranks())
    weights = load_student(built.network, built.learner, path)
    facts = load_known_teacher(composed, built, home)
    teacher = built.teacher if facts is not None else NoTeacher()
    evaluator = Evaluator(data, built.evaluation, teacher, device, Ranks())
    metrics = evaluator.measure_all(built.network)
    report: dict[str, Any] = {"weights": str(weights), "data": f"{data.name} ({data.fingerprint[:12]})", "metrics": metrics, "cost": {}}
    if facts:
        report["teacher"] = facts
    networks = {"student": built.network}
    if isinstance(teacher, LiveTeacher):
        networks["teacher"] = bare(teacher.module)
    for name, network in networks.items():
        report["cost"][name] = cost_of(network, data.input_shape, latency)
    return report


def load_student(network: nn.Module, learner: nn.Module, path: Path) -> Path:
    """Put the weights in `path` into the student. Returns the file or folder that was used. Raises `Refused`."""
    if (path / STUDENT_FILE).is_file():
        path = path / STUDENT_FILE
    if path.is_file():
        load_weights(network, path)
        return path
    folder = path if (path / state.STATE).is_file() else None
    if folder is None:
        found = state.newest(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
        arms = sorted(path.glob(f"arms/*/*/{STUDENT_FILE}"))
        if found is None and arms:
            raise Refused(Problem("this is a comparison of several runs", "", str(path), f"choose one: kdrun eval {arms[0].parent}"))
        if found is None:
            raise Refused(Problem("there is no finished student and no whole checkpoint here", "", str(path), f"kdrun resume {path}"))
        saved = found[1]
    else:
        try:
            saved = state.load(folder)[1]
        except (OSError, ValueError) as error:
            raise Refused(
                Problem(f"the checkpoint is damaged ({error})", "", str(folder), "take the one before it, or `kdrun resume` the run")
            ) from error
    average = saved.get("ema")
    if average:
        network.load_state_dict({k.removeprefix("module."): v for k, v in average.items() if k.startswith("module.")})
    else:
        # The student alone: connectors may be made only when a run begins.
        network.load_state_dict({k.removeprefix(STUDENT): v for k, v in saved["learner"].items() if k.startswith(STUDENT)})
    return path


def load_known_teacher(composed: Composed, built: Any, home: Path | None) -> dict[str, Any] | None:
    """Load the run's teacher if its weights are at hand; None if there is none to compare with, as of one that was the student itself."""
    tree = composed.tree
    if built.teacher.spec is None or built.teacher.follows:
        return None
    if isinstance(built.teacher, LiveTeacher):
        spec = teacher_stage(tree, built.data.fingerprint)
        told = read_json(home / SUMMARY)["teacher"].get("from") if home is not None and (home / SUMMARY).is_file() else None
        trained = Path(told) if told and spec is not None else spec.folder if spec is not None else None
        weights = trained / STUDENT_FILE if trained is not None else tree["teacher"].get("checkpoint")
        if weights and not Path(weights).is_file():
            return None
        if weights:
            load_weights(built.teacher.module, Path(weights), tree["teacher"].get("rename") or ())
    device = next(iter(built.learner.parameters())).device
    return dict(teacher_score(built.data, built.evaluation, built.teacher, device, Ranks()))
