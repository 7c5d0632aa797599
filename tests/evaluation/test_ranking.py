"""The released S1 table, and what rank correlations say of it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from kdrun.errors import Refused
from kdrun.evaluation.metrics import kind
from kdrun.evaluation.ranking import Ranking, correlations, plot_ranking, read_benchmark
from kdrun.student.space import StageSpace
from kdrun.student.stage_resnet import stage_resnet

TABLE = read_benchmark("s1")
VANILLA, DISTILLED = ([row[column] for row in TABLE.values()] for column in ("vanilla", "distilled"))


def test_the_table_has_the_whole_space() -> None:
    space = StageSpace((1, 3, 5, 7), ((16, 16, 32, 64),))
    assert [space.name(a) for a in space.enumerate()] == list(TABLE)
    assert TABLE["111"] == {"vanilla": 60.20, "distilled": 61.87}
    assert TABLE["777"] == {"vanilla": 72.56, "distilled": 74.44}


def test_the_best_alone_is_not_the_best_distilled() -> None:
    by_vanilla = sorted(TABLE, key=lambda n: TABLE[n]["vanilla"], reverse=True)
    by_distilled = sorted(TABLE, key=lambda n: TABLE[n]["distilled"], reverse=True)
    assert (by_vanilla[0], by_distilled[0]) == ("777", "557")
    assert TABLE["557"]["distilled"] == 74.86
    assert by_vanilla.index("557") == 8  # the ninth
    assert sum(row["distilled"] > TABLE["777"]["distilled"] for row in TABLE.values()) == 2


def test_rank_correlations_of_the_table() -> None:
    found = correlations({"vanilla": VANILLA}, DISTILLED)
    assert found["tau_vanilla"] == pytest.approx(0.836, abs=5e-4)
    assert found["rho_vanilla"] == pytest.approx(0.957, abs=5e-4)


def test_the_trivial_baselines_are_strong() -> None:
    space = StageSpace((1, 3, 5, 7), ((16, 16, 32, 64),))
    with torch.device("meta"):
        networks = [stage_resnet(100, a.depths) for a in space.enumerate()]
    parameters = [float(sum(p.numel() for p in network.parameters())) for network in networks]
    depths = [float(a.depth) for a in space.enumerate()]
    found = correlations({"parameters": parameters, "depth": depths}, DISTILLED)
    assert found["tau_parameters"] == pytest.approx(0.873, abs=5e-4)
    assert found["tau_depth"] == pytest.approx(0.657, abs=5e-4)
    assert correlations({"parameters": parameters}, VANILLA)["tau_parameters"] == pytest.approx(0.789, abs=5e-4)


def test_order_alone_counts() -> None:
    found = correlations({"m_r": [-3.0, -2.0, -1.0], "m_s": [9.0, 1.0, 0.0], "depth": [1.0, 1.0, 1.0]}, [60.0, 61.0, 80.0])
    assert (found["tau_mr"], found["rho_mr"]) == (1, 1)
    assert (found["tau_ms"], found["rho_ms"]) == (-1, -1)
    assert math.isnan(found["tau_depth"])
    assert math.isnan(found["rho_depth"])


def test_every_name_has_a_direction() -> None:
    names = Ranking().names()
    assert {"top1", "tau_mr", "tau_parameters", "rho_vanilla", "top1_picked"} <= set(names)
    assert all(kind(name).higher_is_better for name in names if name.startswith(("tau", "rho", "top1")))  # type: ignore[union-attr]
    assert kind("tau_else") is None


@pytest.mark.parametrize(
    "text", ["architecture,vanilla\n111,3\n", "architecture,vanilla,distilled\n111,3\n", "architecture,vanilla,distilled\n111,3,x\n"]
)
def test_a_table_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(Refused, match="columns architecture, vanilla, distilled"):
        read_benchmark(str(tmp_path / "t.csv"))


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    file = plot_ranking(tmp_path, {"m_r": [-3.0, -2.0, -1.0], "depth": [1.0, 1.0, 1.0]}, [60.0, 61.0, 80.0], "title", (1, "131"))
    assert file.read_bytes()[:4] == b"\x89PNG"
    assert [p.name for p in file.parent.iterdir()] == ["ranking.png"]
