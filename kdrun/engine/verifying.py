"""Is a cache what its teacher says? Some of its rows are computed again, from the configuration that made it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdrun import rng
from kdrun.cache import wanted
from kdrun.cache.format import Decoded
from kdrun.cache.manifest import must_match, read_manifest, views_of
from kdrun.cache.store import Ints, Store
from kdrun.dataset.base import Data
from kdrun.dataset.tokens import TokenSplit
from kdrun.engine.build import Built, build_first, load_data
from kdrun.engine.device import pick_device, set_up
from kdrun.engine.distributed import Ranks
from kdrun.engine.records import STUDENT_FILE
from kdrun.engine.teaching import load_checkpoint
from kdrun.errors import CheckFailed, Problem, Refused
from kdrun.plan.single import teacher_stage
from kdrun.student.weights import load_weights
from kdrun.teacher.cached import CachedTeacher, difference
from kdrun.teacher.live import LiveTeacher
from kdrun.types import Batch


def verify(folder: Path, samples: int, allow: Sequence[str] = ()) -> dict[str, Any]:
    """Compute `samples` rows again, drawn over all views: how far off they are, how many are damaged, how often the teacher is right.

    A manifest may come from elsewhere, so it is not believed where it says whose code may run: `allow` names further packages.

    Raises:
        Refused: there is no cache, or the teacher or data that made it are no longer there.
        CheckFailed: the configuration no longer makes this teacher and these views.
    """
    manifest = read_manifest(folder)
    tree = untrusted(manifest["tree"], allow)
    device = pick_device(tree["hardware"])
    set_up(tree["hardware"], device)
    data = load_data(tree)
    built = build_first(tree, data, device, Ranks())
    live = with_weights(tree, built)
    needs = built.objective.needs()
    form = wanted.format_of(tree, data, built.objective, needs, live)
    try:
        must_match(folder, wanted.made_of(tree, data, form, live))
    except Refused as refused:
        raise CheckFailed("\n".join(problem.what for problem in refused.problems)) from refused
    split = data.split("train")
    store = Store(folder, form.record, wanted.counts(split))
    redrawn = wanted.Redrawn.of(tree, split)
    teacher = CachedTeacher(live, store, form, redrawn, split.ids, data.total_ids, isinstance(split, TokenSplit))
    there = {view: np.flatnonzero(store.filled(view)) for view in views_of(folder)}
    found: dict[str, Any] = {"name": folder.name, "filled": sum(map(len, there.values())), "checked": 0, "damaged": 0, "off": 0.0}
    right = asked = 0
    for view, places in _drawn(there, samples).items():
        whole = np.array([p for p in places if store.read(view, np.array([p])) is not None], np.int64)
        found["checked"] += len(places)
        found["damaged"] += len(places) - len(whole)
        if not len(whole):
            continue
        batch = _rows(data, tree, whole, view, device)
        records = store.read(view, whole)
        assert records is not None
        kept = form.decode(records, "cpu")
        with torch.no_grad():
            now = form.decode(teacher.encoded(batch, needs), "cpu")
        found["off"] = max(found["off"], difference(kept, now))
        hits = _hits(kept, batch)
        right, asked = right + int(hits.sum()), asked + len(hits)
    found["tolerance"] = form.tolerance
    found["teacher_top1"] = 100 * right / asked if asked else None
    return found


def untrusted(tree: Mapping[str, Any], allow: Sequence[str]) -> dict[str, Any]:
    """A configuration that somebody else may have written: no package of its own, no code of a hub repository."""
    found = {**tree, "run": {**tree["run"], "allow": list(allow)}}
    for group in ("teacher", "student", "dataset"):
        if "trust_remote_code" in found[group]:
            found[group] = {**found[group], "trust_remote_code": False}
    return found


def with_weights(tree: Mapping[str, Any], built: Built) -> LiveTeacher:
    """The built teacher with the weights that an earlier run left, or its checkpoint's. Raises `Refused` where they are gone."""
    assert isinstance(built.teacher, LiveTeacher)
    spec = teacher_stage(tree, built.data.fingerprint)
    if spec is None:
        load_checkpoint(tree, built)
        return built.teacher
    file = spec.folder / STUDENT_FILE
    if not file.is_file():
        raise Refused(
            Problem("the teacher that made it is no longer there", str(file), "", "train it again by the run that made the cache")
        )
    load_weights(built.teacher.module, file)
    return built.teacher


def _drawn(there: Mapping[int, Ints], samples: int) -> dict[int, Ints]:
    """So many of the filled places, at random and the same every time, by view."""
    pairs = [(view, int(place)) for view, places in there.items() for place in places]
    order = rng.permutation(rng.key(0, "cache verify"), len(pairs), 0)[:samples].tolist() if pairs else []
    found: dict[int, list[int]] = {}
    for number in order:
        view, place = pairs[number]
        found.setdefault(view, []).append(place)
    return {view: np.array(sorted(places), np.int64) for view, places in sorted(found.items())}


def _rows(data: Data, tree: Mapping[str, Any], places: Ints, view: int, device: torch.device) -> Batch:
    index = torch.from_numpy(places)
    return data.rows("train", index, torch.full_like(index, view), tree["seed"], tree["source"].get("augment", True), device)


def _hits(kept: Decoded, batch: Batch) -> Tensor:
    """Whether the likeliest class or token is the right one, by item; [0] where no logits are kept or items have no one class."""
    targets = batch.targets.cpu()
    targets = targets[targets >= 0] if targets.dim() == 2 else targets
    if kept.kept is not None:
        return kept.kept.ids[:, 0] == targets
    if kept.logits is None or kept.logits.dim() != 2:
        return torch.zeros(0)
    return kept.logits.argmax(1) == targets
