"""A few network connections in the schema of NSL-KDD: 41 features, an attack, a difficulty, no header."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import yaml

CONF = Path(__file__).parents[2] / "conf" / "dataset"
ATTACKS = ("normal", "neptune", "satan", "warezclient", "rootkit")  # one of each kind


def write_connections(folder: Path, rows: dict[str, int] | None = None) -> Path:
    """Gzipped files of the names that conf/dataset/nsl_kdd.yaml has, every kind of attack in turn."""
    node = yaml.safe_load((CONF / "nsl_kdd.yaml").read_text())
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (rows or {"train": 100, "test": 30}).items():
        lines = []
        for i in range(count):
            cells = [f"{v:.2f}" for v in generator.random(43)]
            cells[1:4] = [("tcp", "udp")[i % 2], ("http", "smtp", "ftp")[i % 3], "SF"]
            cells[41:] = [ATTACKS[i % len(ATTACKS)], "21"]
            lines.append(",".join(cells))
        (folder / node["files"][split]).write_bytes(gzip.compress("\n".join(lines).encode()))
    return folder
