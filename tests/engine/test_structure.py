"""The house: the loop knows no method, imports go one way, rooms are small."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from kdrun.config.paths import GROUPS

PACKAGE = Path(__file__).parents[2] / "kdrun"
FILES = sorted(PACKAGE.rglob("*.py"))
# A room may import from rooms of a lower or the same storey. The configuration sits below the groups: they read it.
STOREY = {
    "types": 0,
    "errors": 0,
    "rng": 0,
    "losses": 1,
    "config": 1,
    **dict.fromkeys(GROUPS, 2),
    "plan": 3,
    "engine": 4,
    "ledger": 5,
    "export": 6,
    "report": 5,
    "hardware": 6,
    "cli": 7,
}
# The schema knows the objective's base nowhere; what a group's rooms share among each other is the interfaces.
EXCEPTIONS = {("ledger/verdict.py", "evaluation"), ("hardware/worker.py", "cli")}


def imports(file: Path) -> set[str]:
    """First-level rooms of kdrun that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else []
        )
        found |= {n.split(".")[1] for n in names if n.startswith("kdrun.")}
        if isinstance(node, ast.ImportFrom) and node.module == "kdrun":
            found |= {a.name for a in node.names}
    return found & STOREY.keys()


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", [f for f in FILES if room(f) in STOREY], ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_go_one_way(file: Path) -> None:
    name = str(file.relative_to(PACKAGE))
    wrong = {r for r in imports(file) if STOREY[r] > STOREY[room(file)] and (name, r) not in EXCEPTIONS}
    assert not wrong


def test_the_loop_names_no_method_and_imports_none() -> None:
    text = (PACKAGE / "engine" / "loop.py").read_text(encoding="utf-8")
    words = set(ast.dump(ast.parse(text)).lower().replace("'", " ").split())
    methods = {p.stem for p in (PACKAGE.parent / "conf" / "objective").glob("*.yaml")}
    assert not methods & words
    modules = {n.module for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom) and n.module}
    assert {m for m in modules if m.startswith("kdrun.objective")} <= {"kdrun.objective.base"}


def test_there_is_one_loop_and_it_is_short() -> None:
    assert len((PACKAGE / "engine" / "loop.py").read_text(encoding="utf-8").splitlines()) < 300
    # Yardsticks that the loop is held against train by hand; no run does.
    files = [f for f in FILES if room(f) != "bench"]
    assert [str(f.relative_to(PACKAGE)) for f in files if ".backward(" in f.read_text(encoding="utf-8")] == ["engine/loop.py"]
    assert not [f for f in files if room(f) != "cli" and "kdrun.bench" in f.read_text(encoding="utf-8")]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_rooms_are_small(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name


def test_a_config_group_is_a_package_is_a_test_folder() -> None:
    for group in GROUPS:
        if group != "optim":  # optimisers are timm's
            assert (PACKAGE / group / "__init__.py").is_file()
    for objective in (PACKAGE.parent / "conf" / "objective").glob("*.yaml"):
        assert (PACKAGE / "objective" / f"{objective.stem}.py").is_file()
        assert (PACKAGE.parent / "tests" / "objective" / f"test_{objective.stem}.py").is_file()
