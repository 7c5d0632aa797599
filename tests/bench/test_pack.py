"""The packed case trains what the separate one does. No time is asserted."""

from __future__ import annotations

from pathlib import Path

import torch

from kdrun.bench.pack import CASES, _walk, measure, member
from kdrun.engine.packed import share
from tests.bench.test_loop import SMALL

MEMBERS = ["objective=kd optim.lr=0.1", "objective=dkd", "objective=pld"]


def test_both_cases_tell_the_seconds_of_all_members() -> None:
    for case in CASES:
        told = measure(case, MEMBERS, SMALL, 2)
        assert told["members"] == 3
        assert told["seconds"] > 0


def test_the_packed_students_are_the_separate_ones(tmp_path: Path) -> None:
    def trained(packed: bool) -> list[dict[str, torch.Tensor]]:
        made = [member([*SMALL, *own.split()], tmp_path / f"{packed}{n}") for n, own in enumerate(MEMBERS)]
        for group in [made] if packed else [[one] for one in made]:
            _walk(group, share(group) if packed else [], 2)
        return [one.training.built.network.state_dict() for one in made if one.training is not None]

    for ours, theirs in zip(trained(True), trained(False), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
