"""What TAB offers: verbs, options, recipes, groups and their options, dotted keys with their values, runs, caches. Imports no torch."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from kdrun.config.paths import GROUPS, SearchPath
from kdrun.errors import KdrunError

NAMES = {"recipe": "recipes", **{group: group for group in GROUPS}}
EXAMPLES = {"run.seeds": ("3", "5", "10")}  # of leaves that have no words of their own and say little of themselves
FILES = ("path", "checkpoint", "dir", "root", "start_from")  # leaves that name a file or a folder: the shell completes those


@dataclass(frozen=True)
class Typed:
    """A command line before the cursor: the verb, the values of its parameters so far, and the parameter that the next word is for."""

    verb: tuple[str, ...]
    command: Any  # of click
    values: Mapping[str, Sequence[str]]
    waiting: Any  # a parameter of it, or None


def offered(line: str, root: Any) -> list[str]:
    """Whole words that may stand in place of the last one of `line`. `root`: the command `kdrun`. [] leaves it to the shell."""
    *words, last = split(line)
    first = next((i for i, word in enumerate(words) if Path(word).name == root.name), 0)  # fish counts an `and` in front of it
    typed = read(words[first + 1 :], root)
    if last.startswith("-"):
        if "=" not in last:
            return sorted(n for p in typed.command.params for n in (*p.opts, *p.secondary_opts) if n.startswith(last) and n[:2] == "--")
        name, _, last = last.partition("=")
        waiting = _option(typed.command, name)
        found = _of(Typed(typed.verb, typed.command, typed.values, waiting), last)
        return [f"{name}={word}" for word in found]
    if typed.waiting is None and hasattr(typed.command, "commands"):
        return [name for name in typed.command.commands if name.startswith(last)]
    return _of(typed, last)


def split(line: str) -> list[str]:
    """The words of a line as a shell reads them; the last may be empty, or begin with a quote that is not closed yet."""
    reader = shlex.shlex(line, posix=True, punctuation_chars=False)
    reader.whitespace_split, reader.commenters = True, ""
    words: list[str] = []
    try:
        words.extend(reader)
    except ValueError:
        words.append(reader.token.lstrip("'\""))
        return words
    return [*words, ""] if not words or line[-1:].isspace() else words


def read(words: Sequence[str], root: Any) -> Typed:
    """What the words before the last one say, without judging them."""
    command, verb, free = root, [], []
    values: dict[str, list[str]] = {}
    waiting = None
    for word in words:
        if waiting is not None:
            values.setdefault(waiting.name, []).append(word)
            waiting = None
        elif word.startswith("-"):
            option, equals, value = _option(command, word.partition("=")[0]), *word.partition("=")[1:]
            if option is not None and equals:
                values.setdefault(option.name, []).append(value)
            elif option is not None and not option.is_flag:
                waiting = option
        elif word in getattr(command, "commands", {}):
            command = command.commands[word]
            verb.append(word)
        else:
            free.append(word)
    if waiting is None:
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        for argument in arguments:
            taken = free if argument.nargs == -1 else free[:1]
            values[argument.name], free = taken, free[len(taken) :]
        waiting = next((a for a in arguments if a.nargs == -1 or not values[a.name]), None)
    return Typed(tuple(verb), command, values, waiting)


def _option(command: Any, name: str) -> Any:
    return next((p for p in command.params if name in (*p.opts, *p.secondary_opts) and p.param_type_name == "option"), None)


def _of(typed: Typed, last: str) -> list[str]:
    """The values of the parameter that waits for one."""
    if typed.waiting is None:
        return []
    offer = OFFERS.get(("".join(typed.verb[:1]), typed.waiting.name)) or OFFERS.get(("", typed.waiting.name))
    try:
        return [] if offer is None else [word for word in offer(typed, last) if word.startswith(last)]
    except KdrunError:  # a folder that is not there, a configuration that cannot be composed yet
        return []


def overrides(typed: Typed, last: str) -> Iterable[str]:
    """`rec` -> recipe=, `objective=d` -> objective=dist objective=dkd, `optim.l` -> optim.lr=, `run.dry=` -> run.dry=true ..."""
    key, equals, _ = last.partition("=")
    folders = typed.values.get("config_dir") or []
    if equals and key in NAMES:
        return [f"{key}={option}" for option in SearchPath.of(folders).options(NAMES[key])]
    if equals and typed.verb == ("show",) and key == "run":
        return [f"run={folder}" for folder in runs(typed, last)]
    if equals and typed.verb == ("show",) and key == "ledger":
        return [f"ledger={name}" for name in records(typed, last)]
    if "." not in key and not equals:
        more = ["run=", "run.", "ledger="] if typed.verb == ("show",) else ["run."]
        below = [f"{group}." for group in GROUPS if key and group.startswith(key)]
        return [*(f"{name}=" for name in NAMES), "seed=", *more, *below]
    leaves = _leaves(typed, folders)
    return [f"{key}={value}" for value in _values(key, leaves.get(key))] if equals else _next_level(key, leaves)


def _leaves(typed: Typed, folders: Sequence[str]) -> dict[str, Any]:
    """Every leaf of the configuration that the line means so far."""
    from kdrun.cli.options import default_recipe
    from kdrun.config.compose import compose, flatten

    said = list(typed.values.get("overrides") or [])
    return flatten(compose(said, folders, default_recipe(said)).tree)


def _next_level(key: str, leaves: Iterable[str]) -> list[str]:
    """`optim.` -> optim.lr= ... optim.schedule.; names that begin with _ only where they are asked for."""
    above, _, begun = key.rpartition(".")
    found: dict[str, None] = {}
    for leaf in leaves:
        if leaf.startswith(f"{above}."):
            name, dot, _ = leaf[len(above) + 1 :].partition(".")
            if begun.startswith("_") or not name.startswith("_"):
                found[f"{above}.{name}{'.' if dot else '='}"] = None
    return list(found)


def _values(key: str, now: Any) -> list[str]:
    """The legal words of a leaf, or else what it is now."""
    if key in EXAMPLES:
        return list(EXAMPLES[key])
    legal = [str(v).lower() if isinstance(v, bool) else str(v) for v in _words(bool if isinstance(now, bool) else _hint(key))]
    if legal or key.rpartition(".")[2] in FILES:
        return legal
    return [str(now)] if isinstance(now, (int, float, str)) and str(now) else []


def _hint(key: str) -> Any:
    """The type of a key of the fixed parts of a configuration; None of any other."""
    from kdrun.config import schema

    first, *rest = key.split(".")
    hint: Any = {"teacher": schema.TeacherKeys, "student": schema.StudentKeys}.get(first) or get_type_hints(schema.Top).get(first)
    for name in rest:
        hint = get_type_hints(hint).get(name) if is_dataclass(hint) and isinstance(hint, type) else None
    return hint


def _words(hint: Any) -> list[Any]:
    """The words that a type names, in it or in a part of it."""
    if hint is bool:
        return [True, False]
    return list(get_args(hint)) if get_origin(hint) is Literal else [word for part in get_args(hint) for word in _words(part)]


def runs(typed: Typed, last: str) -> Iterable[str]:
    """Folders of runs, the newest first."""
    from kdrun.cli.listing import run_folders

    return (str(folder) for folder in reversed(run_folders(Path("outputs"))))


def records(typed: Typed, last: str) -> Iterable[str]:
    """The rows of the ledger, by the names of their files."""
    return sorted(file.stem for file in (Path((typed.values.get("root") or ["outputs"])[-1]) / "ledger").glob("*.json"))


def caches(typed: Typed, last: str) -> Iterable[str]:
    from kdrun.cache.manifest import caches as found

    return [folder.name for folder in found(Path((typed.values.get("root") or ["outputs"])[-1]) / "cache")]


def kinds(typed: Typed, last: str) -> Iterable[str]:
    from kdrun.cli.listing import KINDS

    return list(KINDS)


def recipes(typed: Typed, last: str) -> Iterable[str]:
    return list(SearchPath.of(typed.values.get("config_dir") or []).options("recipes"))


def _words_of(module: str, name: str) -> Callable[[Typed, str], Iterable[str]]:
    def offer(typed: Typed, last: str) -> Iterable[str]:
        from importlib import import_module

        return [str(member.value) for member in getattr(import_module(f"kdrun.cli.{module}"), name)]

    return offer


OFFERS: dict[tuple[str, str], Callable[[Typed, str], Iterable[str]]] = {
    ("", "overrides"): overrides,
    ("eval", "what"): runs,
    ("export", "run"): runs,
    ("export", "format"): _words_of("export", "Format"),
    ("new", "kind"): _words_of("new", "Kind"),
    ("new", "origin"): recipes,
    ("resume", "run"): runs,
    ("report", "what"): runs,
    ("ls", "what"): kinds,
    ("cache", "name"): caches,
    ("show", "diff"): recipes,
    ("reproduce", "recipe"): recipes,
    ("ledger", "row"): records,
    ("ledger", "family"): _words_of("ledger", "Family"),
    ("ledger", "scale"): _words_of("ledger", "Scale"),
    ("ledger", "verdict"): _words_of("ledger", "Verdict"),
    ("bench", "loss"): _words_of("bench", "Loss"),
}
