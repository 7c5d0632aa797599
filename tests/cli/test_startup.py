"""Help and listings come at once: none of them imports torch or anything as heavy (law 10)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import kdrun as package
from tests.conftest import Outcome

ROOT = Path(__file__).parents[2]
HEAVY = [
    "torch", "torchvision", "timm", "datasets", "transformers", "sklearn", "scipy", "numpy", "pandas", "pyarrow", "matplotlib",
    "torchmetrics",
]  # fmt: skip
LIGHT = [
    ["--help"], ["--version"], ["--show-completion", "--shell=bash"],
    ["train", "--help"], ["eval", "--help"], ["resume", "--help"], ["plan", "--help"], ["doctor", "--help"], ["bench", "--help"],
    ["report", "--help"],
    ["export", "--help"], ["new", "--help"], ["ls", "track"], ["show", "recipe=pld_digits", "track=[tensorboard,mlflow]"],
    ["ls"], ["ls", "recipes"], ["ls", "objective"], ["ls", "objectives"], ["ls", "teachers", "--json"], ["ls", "students"],
    ["ls", "datasets", "-q"], ["ls", "runs"],
    ["show", "recipe=pld_cifar100"], ["show", "recipe=pld_cifar100", "--diff", "kd_cifar100"], ["show", "recipe=pld_cifar100", "--hash"],
    ["show", "objective=kd"], ["show", "recipe=pld_cifar10"],
    ["ledger"], ["ledger", "--json"], ["ledger", "--markdown"], ["cache", "--help"], ["cache", "ls"],
]  # fmt: skip
# Every light verb, and two presses of TAB, in one fresh interpreter; what it then holds, on the last line.
SCRIPT = """
import json, os, sys
from kdrun.cli import main
os.environ["_KDRUN_COMPLETE"] = "complete_bash"
for os.environ["_KDRUN_LINE"] in ("kdrun train objective=d", "kdrun train recipe=kd_cifar100 optim."):
    main()
del os.environ["_KDRUN_COMPLETE"]
codes = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["kdrun", *arguments]
    try:
        main()
        codes.append(0)
    except SystemExit as stop:
        codes.append(int(stop.code or 0))
print(json.dumps({"codes": codes, "modules": sorted({name.partition(".")[0] for name in sys.modules})}))
"""


def test_help_and_listings_import_nothing_heavy(compared: tuple[Path, Outcome]) -> None:
    command = [sys.executable, "-c", SCRIPT, json.dumps([*LIGHT, ["ledger", "--root", str(compared[0].parent)]])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=120)
    told = json.loads(done.stdout.splitlines()[-1])
    assert [line for line, code in zip(LIGHT, told["codes"], strict=False) if code] == [
        ["show", "recipe=pld_cifar10"]
    ]  # a refusal is as quick
    assert not set(told["modules"]) & set(HEAVY)
    assert "rich" in told["modules"]  # the list of modules is a real one


def test_python_dash_m_tells_the_version() -> None:
    done = subprocess.run([sys.executable, "-m", "kdrun", "--version"], capture_output=True, text=True, cwd=ROOT, check=True, timeout=60)
    assert done.stdout == f"kdrun {package.__version__}\n"
