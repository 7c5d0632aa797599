from __future__ import annotations

import pytest
import torch
from torch import nn

from kdrun.errors import Refused
from kdrun.student.resnet import resnet20
from kdrun.student.space import Architecture, StageSpace
from kdrun.student.stage_resnet import stage_resnet

S1 = StageSpace((1, 3, 5, 7), ((16, 16, 32, 64),))
SMALL = StageSpace((1, 2, 3), ((4, 4, 4, 8), (8, 8, 8, 16), (12, 12, 12, 24)))


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def parameters(space: StageSpace, architecture: Architecture, classes: int = 100) -> int:
    with torch.device("meta"):
        return count(stage_resnet(classes, **space.config(architecture)))  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "expected"), [("111", 83_892), ("333", 278_324), ("777", 667_188)])
def test_parameter_counts_of_s1(name: str, expected: int) -> None:
    assert parameters(S1, S1.find(name)) == expected


def test_every_block_costs_what_its_convolutions_do() -> None:
    def block(inside: int, outside: int) -> int:
        shortcut = 0 if inside == outside else inside * outside + 2 * outside
        return 9 * inside * outside + 9 * outside * outside + 4 * outside + shortcut

    for architecture in S1.enumerate()[::7]:
        expected, channels = 16 * 27 + 32 + 6500, 16
        for width, depth in zip((16, 32, 64), architecture.depths, strict=True):
            expected += block(channels, width) + (depth - 1) * block(width, width)
            channels = width
        assert parameters(S1, architecture) == expected


def test_parameters_grow_with_the_depth_of_each_stage() -> None:
    cost = {a: parameters(S1, a) for a in S1.enumerate()}
    for a in S1.enumerate():
        for b in S1.neighbours(a):
            assert (cost[b] > cost[a]) == (b.depth > a.depth)


def test_equal_depths_are_the_plain_resnet() -> None:
    torch.manual_seed(0)
    ours = stage_resnet(10, [3, 3, 3])
    torch.manual_seed(0)
    plain = resnet20(10)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), plain.state_dict().values(), strict=True))
    assert list(ours.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize(("kind", "value"), [("depths", [1, 2]), ("depths", [1, 0, 2]), ("widths", [8, 8, 8]), ("shortcut", "none")])
def test_numbers_that_make_no_network_are_refused(kind: str, value: object) -> None:
    with pytest.raises(Refused) as refused:
        stage_resnet(10, **{"depths": [1, 1, 1], kind: value})  # type: ignore[arg-type]
    assert refused.value.problems[0].key == kind


def test_s1_is_64_networks_in_the_order_of_the_table() -> None:
    names = [S1.name(a) for a in S1.enumerate()]
    assert len(set(names)) == 64
    assert names[:6] == ["111", "113", "115", "117", "131", "133"]
    assert names[-1] == "777"


def test_widths_are_a_choice_too() -> None:
    names = [SMALL.name(a) for a in SMALL.enumerate()]
    assert len(set(names)) == 81
    assert SMALL.config(SMALL.find("132w8")) == {"depths": [1, 3, 2], "widths": [8, 8, 8, 16]}


def test_names_find_their_architecture() -> None:
    deep = StageSpace((1, 12), ((4, 4, 4),))
    for space in (S1, SMALL, deep):
        assert [space.find(space.name(a)) for a in space.enumerate()] == space.enumerate()
    assert deep.name(Architecture((1, 12), (4, 4, 4))) == "1-12"
    with pytest.raises(Refused, match="112"):
        S1.find("112")


def test_a_neighbour_differs_in_one_decision() -> None:
    assert {S1.name(a) for a in S1.neighbours(S1.find("131"))} == {"331", "531", "731", "111", "151", "171", "133", "135", "137"}
    around = {SMALL.name(a) for a in SMALL.neighbours(SMALL.find("111w8"))}
    assert around == {"211w8", "311w8", "121w8", "131w8", "112w8", "113w8", "111w4", "111w12"}


def test_a_mutation_is_a_neighbour_within_the_budget_and_drawn_by_its_counters() -> None:
    parent, within = S1.find("333"), {S1.find(n) for n in ("133", "313", "777")}
    children = [S1.mutate(parent, 5, cycle, within=within) for cycle in range(40)]
    assert {S1.name(c) for c in children} == {"133", "313"}
    assert children == [S1.mutate(parent, 5, cycle, within=within) for cycle in range(40)]
    assert S1.mutate(parent, 5, 0, within={S1.find("777")}) == S1.find("777")  # no neighbour is within


def test_a_sample_has_no_repetition_and_every_member_its_chance() -> None:
    assert sorted(map(S1.name, S1.sample(64, 3))) == sorted(map(S1.name, S1.enumerate()))
    assert S1.sample(5, 3) == S1.sample(9, 3)[:5]
    few = S1.enumerate()[:4]
    firsts = [S1.name(S1.sample(1, key, few)[0]) for key in range(400)]
    assert min(firsts.count(S1.name(a)) for a in few) > 60  # 100 each; 60 is 4.6 standard deviations below


@pytest.mark.parametrize(
    "node",
    [
        {"depths": [1, 3]},
        {"depths": [], "widths": [[4, 4]]},
        {"depths": [1, 1], "widths": [[4, 4]]},
        {"depths": [0], "widths": [[4, 4]]},
        {"depths": [1], "widths": [[4, 4], [8, 8, 8]]},
        {"depths": [1], "widths": [[4]]},
        {"depths": [1], "widths": [[4, 4], [4, 8]]},
        {"depths": [1], "widths": []},
        {"depths": [1], "widths": [[4, 0]]},
    ],
)
def test_what_is_no_space_is_said(node: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"space=.*legal"):
        StageSpace.of(node)
