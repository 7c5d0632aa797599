"""What `kdrun new` writes, and where: every file is new, and all that stands in its way is said at once. Imports no torch."""

from __future__ import annotations

import importlib.util
import keyword
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import yaml

from kdrun.config.paths import SearchPath
from kdrun.errors import Problem, Refused, did_you_mean

KINDS = ("objective", "recipe", "dataset", "student")
TEMPLATES = Path(__file__).parent / "templates"
NAME = re.compile(r"[a-z][a-z0-9_]*")
# What the tests of a scaffold import beside it.
BESIDE = {
    "objective": "from kdrun.types import Batch, Connectors, Output, Progress, Signal, Term",
    "student": "from kdrun.student.taps import Tapped",
    "dataset": "from kdrun.errors import Refused",
}
# Of a recipe that another begins as: what was published and measured of it is its own.
ITS_OWN = ("published", "notes")


@dataclass(frozen=True)
class Scaffold:
    """The files of one new thing and the lines that use it."""

    files: dict[Path, str]
    commands: list[str]


def plan(kind: str, name: str, folder: Path, origin: str | None) -> Scaffold:
    """The files to write. Raises `Refused` for a name that cannot be, is taken, or files that are there; nothing is written."""
    house = (folder / "conf" / "config.yaml").is_file() and (folder / "kdrun" / "objective").is_dir()
    search = SearchPath.of([] if house or not folder.is_dir() else [folder])
    problems = _name_problems(kind, name, search, own=not house)
    if origin is not None and kind != "recipe":
        problems.append(
            Problem("only a recipe begins as another one", "--from", "command line", f"kdrun new recipe {name} --from {origin}")
        )
    elif origin is not None and origin not in search.options("recipes"):
        problems.append(
            Problem(f"there is no recipe named '{origin}'", "--from", "command line", did_you_mean(origin, search.options("recipes")))
        )
    if problems:
        raise Refused(problems)
    found = _recipe(name, folder, origin, search, house) if kind == "recipe" else _part(kind, name, folder, house)
    there = [file for file in found.files if file.exists()]
    if there:
        raise Refused([Problem("is there already, and nothing is overwritten", name, str(file), "another name or --dir") for file in there])
    return found


def write(scaffold: Scaffold) -> None:
    for file, text in scaffold.files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def _name_problems(kind: str, name: str, search: SearchPath, own: bool) -> list[Problem]:
    group = "recipes" if kind == "recipe" else kind
    if not NAME.fullmatch(name) or keyword.iskeyword(name):
        near = re.sub(r"\W+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)).strip("_").lower()
        near = f"my_{near}" if keyword.iskeyword(near) or not NAME.fullmatch(near) else near
        remedy = f"did you mean {near}?" if NAME.fullmatch(near) else "small letters, digits and _, a letter first"
        return [Problem(f"'{name}' is no name for a file and for Python", "NAME", "command line", remedy)]
    if name in search.options(group):
        where = search.short(search.options(group)[name])
        free = next(n for n in (f"my_{name}", *(f"my_{name}_{i}" for i in range(2, 99))) if n not in search.options(group))
        return [
            Problem(
                f"there is {'an' if kind == 'objective' else 'a'} {kind} named '{name}' ({where})",
                "NAME",
                "command line",
                f"did you mean {free}?",
            )
        ]
    if own and kind != "recipe" and _importable(name):
        what = f"'{name}' is the name of a Python module that is there already, which would be found in its place"
        return [Problem(what, "NAME", "command line", f"did you mean my_{name}?")]
    return []


def _importable(name: str) -> bool:
    """Whether Python finds a module of that name, in a folder or package of its own."""
    if name in sys.stdlib_module_names:
        return True
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None


def _part(kind: str, name: str, folder: Path, house: bool) -> Scaffold:
    """An objective, data set or student: its configuration, code and tests."""
    words = {"name": name, "Class": "".join(word.capitalize() for word in name.split("_"))}
    words["module"] = f"kdrun.{kind}.{name}" if house else name
    tested = name if kind == "student" else words["Class"]
    words["imports"] = "\n".join(sorted([BESIDE[kind], f"from {words['module']} import {tested}"]))  # as a linter orders them
    code = folder / "kdrun" / kind / f"{name}.py" if house else folder / f"{name}.py"
    tests = folder / "tests" / kind / f"test_{name}.py" if house else folder / f"test_{name}.py"
    made = {
        folder / "conf" / kind / f"{name}.yaml": f"{kind}.yaml",
        code: f"{kind}.py",
        tests: f"{kind}_test.py",
    }
    if kind == "student":
        made[folder / "conf" / "teacher" / f"{name}.yaml"] = "teacher.yaml"
    files = {file: _filled(template, words) for file, template in made.items()}
    own = "" if house else f" run.allow=[{name}] --config-dir {folder}"
    used = {
        "objective": f"recipe=kd_digits objective={name}",
        "student": f"dataset=digits student={name} teacher=resnet8x4 objective=kd optim.epochs=20",
        "dataset": f"dataset={name} student=mlp optim.epochs=20",
    }
    return Scaffold(files, [f"python -m pytest {tests}", f"kdrun train {used[kind]}{own}"])


def _filled(template: str, words: dict[str, str]) -> str:
    return Template((TEMPLATES / f"{template}.txt").read_text(encoding="utf-8")).substitute(words)


def _recipe(name: str, folder: Path, origin: str | None, search: SearchPath, house: bool) -> Scaffold:
    file = folder / "recipes" / f"{name}.yaml"
    text = (
        _filled("recipe.yaml", {"name": name})
        if origin is None
        else derived(search.options("recipes")[origin], name, origin, () if house else ITS_OWN)
    )
    own = "" if house else f" --config-dir {folder}"
    return Scaffold({file: text}, [f"kdrun show recipe={name}{own}", f"kdrun train recipe={name}{own}"])


def derived(file: Path, name: str, origin: str, without: Sequence[str] = ITS_OWN) -> str:
    """The text of a recipe as the beginning of another: its settings with their comments, without what was published and noted of it (which
    kdrun's own recipes must state)."""
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    node: Any = yaml.compose(text)
    starts = [(key.value, key.start_mark.line) for key, _ in node.value]
    # A block ends where the next one begins, but for the comments just above that one.
    ends = [_without_comments(lines, line) for _, line in starts[1:]] + [len(lines)]
    kept: list[str] = []
    for (key, start), end in zip(starts, ends, strict=True):
        block = lines[_without_comments(lines, start) : end] if kept else lines[start:end]
        if key in without:
            continue
        if key == "scale":
            block = ["scale: bench            # paper: the published setting, exactly", *block[1:]]
        elif key == "about":
            block = [f'about: "From the recipe {origin}; say here what you ask."', ""]
        kept += block
    head = [
        "# @package _global_",
        f'# {name}: begun as {origin}. Change what is yours and say where each value comes from: a table, a section, or "ours".',
    ]
    return "\n".join([*head, *kept]).rstrip("\n") + "\n"


def _without_comments(lines: Sequence[str], line: int) -> int:
    """The first of the comment lines that stand directly above a line."""
    while line > 0 and lines[line - 1].startswith("#"):
        line -= 1
    return line
