"""What varies in a sweep, in Hydra's own grammar: key=a,b  key=choice(a,b)  key=range(1,6)  group=glob(*)  and paired or tabled values."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, RangeSweep
from hydra.errors import HydraException

from kdrun.config.compose import COMMAND_LINE
from kdrun.config.paths import GROUPS, SearchPath
from kdrun.errors import Problem, Refused, did_you_mean


@dataclass(frozen=True)
class Words:
    """A sweep as it was written: enough to expand it again."""

    overrides: tuple[str, ...]
    zipped: tuple[str, ...] = ()  # "teacher,student": these axes move together
    table: tuple[Mapping[str, str], ...] = ()  # rows of a file: each a set of values that belong together


@dataclass(frozen=True)
class Expanded:
    fixed: list[str]  # overrides that all jobs share
    choices: list[dict[str, str]] = field(default_factory=list)  # of each job: key -> value, as an override writes it


def expand(words: Words, search: SearchPath) -> Expanded:
    """Every job of a sweep, the last axis fastest. Raises `Refused` for what cannot be read, with all faults at once."""
    fixed, axes, problems = [], {}, []
    for text in words.overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            remedy = "write key=value, key=a,b, key=range(1,6), key=choice(a,b) or group=glob(*)"
            problems.append(Problem(f"cannot be read as an override ({str(error).splitlines()[0]})", text, COMMAND_LINE, remedy))
            continue
        if not override.is_sweep_override():
            fixed.append(text)
        elif override.key_or_group in axes:
            problems.append(Problem("this key varies twice", override.key_or_group, COMMAND_LINE, "write all of its values once"))
        else:
            axes[override.key_or_group] = _values(override, search, problems)
    bundles = _bundles(axes, words, problems)
    if problems:
        raise Refused(problems)
    combinations = [dict(pair for part in parts for pair in part.items()) for parts in itertools.product(*bundles)]
    # Whole rows first: all arms of a seed, so that an interrupted sweep can be compared.
    seeds = list(dict.fromkeys(c.get("seed", "") for c in combinations))
    return Expanded(fixed, sorted(combinations, key=lambda c: seeds.index(c.get("seed", ""))))


def _values(override: Override, search: SearchPath, problems: list[Problem]) -> list[str]:
    key, value = override.key_or_group, override.value()
    if isinstance(value, Glob):
        if key not in GROUPS and key != "recipe":
            problems.append(Problem("glob() chooses among the options of a group", key, COMMAND_LINE, f"one of {', '.join(GROUPS)}"))
            return []
        found = value.filter(sorted(search.options("recipes" if key == "recipe" else key)))
        if not found:
            problems.append(Problem(f"no option of {key} fits", key, COMMAND_LINE, f"kdrun ls {key} lists them"))
        return [str(name) for name in found]
    if not isinstance(value, (ChoiceSweep, RangeSweep)):
        problems.append(Problem("values without a step cannot be listed", key, COMMAND_LINE, f"{key}=range(0,1,0.25) or choice(...)"))
        return []
    return [str(text) for text in override.sweep_string_iterator()]


def _bundles(axes: dict[str, list[str]], words: Words, problems: list[Problem]) -> list[list[dict[str, str]]]:
    """The axes that move independently: each a list of {key: value}."""
    together: list[list[str]] = []
    for text in words.zipped:
        keys = [key.strip() for key in text.split(",") if key.strip()]
        unknown = [key for key in keys if key not in axes]
        lengths = {key: len(axes[key]) for key in keys if key in axes}
        if unknown:
            problems.append(Problem("this key does not vary", unknown[0], "--zip", did_you_mean(unknown[0], axes)))
        elif len(set(lengths.values())) > 1:
            told = ", ".join(f"{key} has {count}" for key, count in lengths.items())
            problems.append(Problem(f"keys that move together need as many values each ({told})", text, "--zip", "give each as many"))
        else:
            together.append(keys)
    paired = {key for keys in together for key in keys}
    bundles = [[{key: value} for value in values] for key, values in axes.items() if key not in paired]
    bundles += [[dict(zip(keys, row, strict=True)) for row in zip(*(axes[k] for k in keys), strict=True)] for keys in together]
    if words.table:
        twice = [key for key in words.table[0] if key in axes]
        problems += [Problem("this key varies twice", key, "--table", "leave it to the table or to the command line") for key in twice]
        bundles.append([dict(row) for row in words.table])
    return bundles


def read_table(file: Path) -> tuple[dict[str, str], ...]:
    """Rows of a csv or tsv file, the keys in its first line. Raises `Refused` for one that is not there or has empty cells."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise Refused(
            Problem(f"the table cannot be read ({error.strerror})", str(file), "--table", "a .csv file, keys in its first line")
        ) from error
    rows: list[dict[str, Any]] = list(csv.DictReader(text.splitlines(), delimiter="\t" if file.suffix == ".tsv" else ","))
    bad = [number for number, row in enumerate(rows, 2) if None in row or any(v is None or not v.strip() for v in row.values())]
    if not rows or bad:
        what = "the table has no row" if not rows else f"line {bad[0]} has not one value for each key"
        raise Refused(Problem(what, str(file), "--table", "keys in the first line, a job in each further one"))
    return tuple({key.strip(): value.strip() for key, value in row.items()} for row in rows)


def check_sweepable(fixed: Sequence[str]) -> None:
    """Raise `Refused` for settings that mean several runs by themselves."""
    said = {text.partition("=")[0]: text.partition("=")[2] for text in fixed}
    remedies = {"run.seeds": "seed=range(1,6)", "run.rivals": "objective=ce,kd,... names what is compared", "run.dir": "--name NAME"}
    problems = [
        Problem("a sweep has its own way to say this", key, COMMAND_LINE, remedy)
        for key, remedy in remedies.items()
        if said.get(key, "null") not in ("null", "false")
    ]
    if problems:
        raise Refused(problems)
