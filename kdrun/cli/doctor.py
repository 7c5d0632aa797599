"""kdrun doctor: what this machine offers, and what is missing."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from kdrun.cli.options import Json
from kdrun.errors import EXIT_CHECK

NEEDED = (
    "torch",
    "torchvision",
    "timm",
    "hydra-core",
    "omegaconf",
    "datasets",
    "torchmetrics",
    "scikit-learn",
    "scipy",
    "safetensors",
    "matplotlib",
    "rich",
    "typer",
    "filelock",
)
OPTIONAL = {"submitit": "cluster"}
LOW_DISK_GB, LOW_MEMORY_GB = 2, 2


def doctor(
    root: Annotated[str, typer.Option(help="Where runs will be kept.")] = "outputs",
    compile: Annotated[bool, typer.Option("--compile", help="Also try torch.compile (takes a while).")] = False,
    json: Json = False,
) -> None:
    """Check versions, devices, disk, data and write speed. Exit code 3 if something must be mended."""
    checks = [*_packages(), *_machine(), *_disk(Path(root)), *_data()]
    if compile:
        checks.append(_compile())
    if json:
        from kdrun.cli.console import print_json

        print_json(checks)
    else:
        _show(checks)
    if any(c["state"] == "bad" for c in checks):
        raise typer.Exit(EXIT_CHECK)


def _row(name: str, state: str, found: str, remedy: str = "") -> dict[str, str]:
    return {"name": name, "state": state, "found": found, "remedy": remedy}


def _packages() -> list[dict[str, str]]:
    rows = [
        _row(
            "python",
            "ok" if sys.version_info >= (3, 11) else "bad",
            sys.version.split()[0],
            "" if sys.version_info >= (3, 11) else "Python 3.11 or newer",
        )
    ]
    for package in NEEDED:
        version = _version(package)
        rows.append(_row(package, "ok" if version else "bad", version or "missing", "" if version else f"pip install {package}"))
    for package, extra in OPTIONAL.items():
        version = _version(package)
        rows.append(
            _row(
                package,
                "ok" if version else "note",
                version or "not installed (optional)",
                "" if version else f'pip install "kdrun[{extra}]"',
            )
        )
    return rows


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> list[dict[str, str]]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    rows = [_row("cores", "ok", f"{cores} usable, torch uses {torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            memory = f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
            bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
            rows.append(_row(f"gpu {i}", "ok", f"{torch.cuda.get_device_name(i)}, {memory}, {bf16}"))
    else:
        rows.append(_row("gpu", "note", "none that torch can use", "bench recipes run on the CPU; paper-scale recipes want a GPU"))
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free_gb = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        rows.append(
            _row(
                "memory",
                "ok" if free_gb > LOW_MEMORY_GB else "bad",
                f"{free_gb:.1f} GiB free",
                "" if free_gb > LOW_MEMORY_GB else "close other programs",
            )
        )
    return rows


def _disk(root: Path) -> list[dict[str, str]]:
    import shutil
    import tempfile

    parent = root.resolve()
    while not parent.exists():
        parent = parent.parent
    try:
        with tempfile.NamedTemporaryFile(dir=parent) as handle:
            started = time.perf_counter()
            handle.write(b"\0" * 2**25)
            handle.flush()
            os.fsync(handle.fileno())
            speed = 32 / (time.perf_counter() - started)
    except OSError as error:
        return [_row("disk", "bad", f"{parent} cannot be written ({error.strerror})", "give another run.root")]
    free = shutil.disk_usage(parent).free / 2**30
    state = "ok" if free > LOW_DISK_GB else "bad"
    return [
        _row(
            "disk",
            state,
            f"{free:.0f} GiB free under {parent}, writes {speed:.0f} MiB/s",
            "" if state == "ok" else "free some space, or another run.root",
        )
    ]


def _data() -> list[dict[str, str]]:
    offline = any(os.environ.get(v) in ("1", "true", "True") for v in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))
    rows = [
        _row(
            "hub",
            "note" if offline else "ok",
            "offline mode is set" if offline else "not set to offline",
            "data sets are read from dataset.path=FOLDER or the hub's cache" if offline else "",
        )
    ]
    folder = os.environ.get("KDRUN_DATA")
    if folder:
        found = sorted(p.name for p in Path(folder).iterdir() if p.is_dir()) if Path(folder).is_dir() else []
        rows.append(
            _row(
                "KDRUN_DATA",
                "ok" if found else "bad",
                f"{folder}: {', '.join(found) or 'nothing there'}",
                "" if found else "name a folder with one folder a data set",
            )
        )
    return rows


def _compile() -> dict[str, str]:
    import torch

    started = time.perf_counter()
    try:
        torch.compile(lambda x: (x * 2).relu().sum())(torch.ones(8))
    except Exception as error:
        return _row("compile", "bad", str(error).splitlines()[0], "hardware.compile=off; on Linux a C++ compiler is needed")
    return _row("compile", "ok", f"a first function took {time.perf_counter() - started:.1f} s")


def _show(checks: list[dict[str, Any]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from kdrun.cli.console import out

    marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "bad": "[bold red]bad[/]"}
    table = Table(box=None, pad_edge=False)
    for column in ("", "", "found", "remedy"):
        table.add_column(column, overflow="fold")
    for check in checks:
        table.add_row(marks[check["state"]], check["name"], escape(check["found"]), escape(check["remedy"]))
    out().print(table)
