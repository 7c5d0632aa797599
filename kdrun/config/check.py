"""Every fault of a configuration at once: unknown keys, wrong types, illegal values, classes that may not be named.

Typed by the dataclasses in `schema` for the fixed parts, and by the named class's own dataclass fields or signature for
parts with a `_target_` (that part imports the class, hence torch; the rest does not).
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from kdrun.config import schema
from kdrun.config.compose import Composed
from kdrun.config.rules import cross_checks
from kdrun.config.targets import ALLOWED, UNSET, component
from kdrun.errors import Problem, Refused, did_you_mean


def check(composed: Composed, build: bool = True) -> None:
    """Raise `Refused` with all problems. `build=False` skips what would import torch."""
    found = _Findings(composed)
    found.tree(composed.tree, schema.Top, "")
    found.complete(composed.tree, {"seed": int, **schema.FIXED}, "")
    found.section(composed.tree.get("teacher"), schema.TeacherKeys, "teacher")
    found.section(composed.tree.get("student"), schema.StudentKeys, "student")
    for group in ("teacher", "student", "dataset", "source", "objective", "evaluation", "plan"):
        found.target_allowed(composed.tree.get(group), group)
    found.trackers(composed.tree.get("track") or {})
    found.problems.extend(cross_checks(composed))
    wrong = {p.key.split(".")[0] for p in found.problems}
    for group in ("dataset", "objective", "evaluation", "source", "plan") if build else ():
        if group not in wrong:
            found.signature(composed.tree.get(group), group)
    for group, keys in (("teacher", schema.TeacherKeys), ("student", schema.StudentKeys)) if build else ():
        if group not in wrong:
            found.network(composed.tree.get(group), keys, group)
    for name, node in (composed.tree.get("track") or {}).items() if build and "track" not in wrong else ():
        found.signature(node, f"track.{name}")
    if build and "optim" not in wrong:
        found.optimiser(composed.tree["optim"]["name"])
    problems = [*composed.problems, *found.problems]
    if problems:
        raise Refused(sorted(problems, key=lambda p: (p.where, p.key)))


@contextmanager
def located(composed: Composed) -> Iterator[None]:
    """Tell the problems of what is built from a configuration where their keys come from, as far as they do not say so."""
    try:
        yield
    except Refused as refused:
        raise Refused([dataclasses.replace(p, where=p.where or origin_of(composed, p.key)) for p in refused.problems]) from refused


def origin_of(composed: Composed, key: str) -> str:
    """File and line, or command line, of a key; of a group that of its first leaf. "" for what is no key."""
    origins = composed.origins
    return origins.get(key) or next((o for k, o in origins.items() if key and k.startswith(key + ".")), "")


def instantiate(node: Mapping[str, Any], group: str, allowed: Sequence[str] = ALLOWED) -> Any:
    """Build a component from its node. A ValueError of its own checks becomes a `Refused` that names the group."""
    target = component(node.get("_target_"), allowed, group)
    try:
        return target(**{k: v for k, v in node.items() if k != "_target_"})
    except (ValueError, TypeError) as error:
        raise Refused(_own_check(str(error), group, node)) from error


def _own_check(message: str, group: str, node: Mapping[str, Any]) -> Problem:
    """The problem that a class's own check raised. By convention its message begins with the field: `temperature=-3: legal range ...`"""
    field, equals, _ = message.partition("=")
    if not equals or field not in node:
        return Problem(message, group)
    what, _, remedy = message.partition(": ")
    bare = what in (f"{field}={node[field]}", f"{field}={node[field]!r}")
    return Problem(f"cannot be {node[field]}" if bare else what, f"{group}.{field}", "", remedy)


class _Findings:
    def __init__(self, composed: Composed) -> None:
        self.composed = composed
        self.problems: list[Problem] = []
        self.allowed = (*ALLOWED, *(composed.tree.get("run", {}).get("allow") or []))

    def add(self, what: str, key: str, remedy: str) -> None:
        self.problems.append(Problem(what, key, origin_of(self.composed, key), remedy))

    def tree(self, node: Mapping[str, Any], cls: type, prefix: str) -> None:
        """Hold a mapping against a dataclass: every key known, every value of its type."""
        hints = get_type_hints(cls)
        for key, value in node.items():
            name = f"{prefix}.{key}" if prefix else str(key)
            if key not in hints:
                self.add("unknown key", name, did_you_mean(str(key), hints))
            else:
                self.value(value, hints[key], name)

    def complete(self, node: Mapping[str, Any], hints: Mapping[str, Any], prefix: str) -> None:
        """The fixed parts must have all of their keys: `~optim.lr` and a group file of one's own may have left some out."""
        for key, hint in hints.items():
            name = f"{prefix}{key}"
            if key not in node:
                self.add("this key is missing", name, f"set {name}=..., or leave out ~{name}")
            elif dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(node[key], Mapping):
                self.complete(node[key], get_type_hints(hint), f"{name}.")

    def section(self, node: Any, cls: type, prefix: str) -> None:
        """Check the known keys of a part that also carries a model's own arguments."""
        hints = get_type_hints(cls)
        for key, value in (node or {}).items():
            if key in hints:
                self.value(value, hints[key], f"{prefix}.{key}")

    def value(self, value: Any, hint: Any, name: str) -> None:
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            if isinstance(value, Mapping):
                self.tree(value, hint, name)
            else:
                keys = [f.name for f in dataclasses.fields(hint)]
                self.add(
                    f"a group of keys is needed, not {value!r}", name, f"set a key of it: {', '.join(f'{name}.{k}' for k in keys[:4])}, ..."
                )
        elif get_origin(hint) is list and isinstance(value, list) and dataclasses.is_dataclass(get_args(hint)[0]):
            for i, item in enumerate(value):
                self.value(item, get_args(hint)[0], f"{name}.{i}")
        elif get_origin(hint) in (dict, Mapping) and isinstance(value, Mapping):
            for key, item in value.items():
                self.value(item, get_args(hint)[1], f"{name}.{key}")
        elif _optional_dataclass(hint) is not None and value is not None:
            self.value(value, _optional_dataclass(hint), name)
        elif not fits(value, hint):
            self.add(f"{_shown(value)} is not {describe(hint)}", name, _legal(value, hint))

    def target_allowed(self, node: Any, group: str) -> None:
        if not isinstance(node, Mapping):
            self.add("a group of settings is needed here", group, f"choose one: {group}=...")
            return
        target = node.get("_target_")
        if target is None:
            return
        package = str(target).split(".")[0]
        if package not in self.allowed:
            self.add(
                f"'{target}' lies outside the packages that a configuration may name",
                f"{group}._target_",
                f"if you trust it: run.allow=[{package}]",
            )

    def trackers(self, nodes: Mapping[str, Any]) -> None:
        for name, node in nodes.items():
            if isinstance(node, Mapping) and "_target_" not in node:
                self.add("this tracker is not chosen", f"track.{name}", f"track={name}, or its class: track.{name}._target_=...")
            else:
                self.target_allowed(node, f"track.{name}")

    def optimiser(self, name: str) -> None:
        from timm.optim import list_optimizers

        names = [str(n) for n in list_optimizers()]
        if name not in names:
            self.add(f"timm has no optimiser named '{name}'", "optim.name", did_you_mean(name, names))

    def signature(self, node: Any, group: str) -> None:
        """Hold a part against the class it names: its fields, their types, then its own checks."""
        if not isinstance(node, Mapping) or "_target_" not in node:
            return
        try:
            target = component(node["_target_"], self.allowed, group)
        except Refused as refused:
            for p in refused.problems:
                self.add(p.what, p.key, p.remedy)
            return
        hints = settings_of(target)
        before = len(self.problems)
        for key, value in node.items():
            if key == "_target_":
                continue
            if key not in hints:
                self.add("unknown key", f"{group}.{key}", did_you_mean(str(key), hints))
            else:
                self.value(value, hints[key], f"{group}.{key}")
        if len(self.problems) == before:
            try:
                instantiate(node, group, self.allowed)
            except Refused as refused:
                for p in refused.problems:
                    self.add(p.what, p.key, p.remedy)

    def network(self, node: Any, keys: type, group: str) -> None:
        """Hold a network's own arguments against the types of its signature. What it does not know, lacks or refuses is said when it is
        built: only then are the data's classes and channels known."""
        if not isinstance(node, Mapping) or node.get("_target_") in UNSET:
            return
        from kdrun.config.networks import argument_types, resolve

        try:
            target = resolve(node["_target_"], self.allowed, f"{group}._target_")
        except Refused as refused:
            for p in refused.problems:
                self.add(p.what, p.key, p.remedy)
            return
        hints = argument_types(target)
        for key in node.keys() & hints.keys() - get_type_hints(keys).keys():
            self.value(node[key], hints[key], f"{group}.{key}")


def settings_of(target: type) -> dict[str, Any]:
    """The names and types of what a class is made with. A dataclass's inherited fields are typed where they are written."""
    if dataclasses.is_dataclass(target):
        hints = get_type_hints(target)
        return {f.name: hints[f.name] for f in dataclasses.fields(target) if f.init}
    hints = get_type_hints(target.__init__)  # type: ignore[misc]
    hints.pop("return", None)
    return hints


def _optional_dataclass(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        return next((a for a in get_args(hint) if dataclasses.is_dataclass(a)), None)
    return None


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain YAML value is of a type. An int is a float; a bool is not a number; null only where it is said."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, a) for a in args)
    if origin is Literal:
        return any(value == a and type(value) is type(a) for a in args)
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is tuple:
        return isinstance(value, (list, tuple)) and (
            all(fits(v, args[0]) for v in value)
            if len(args) == 2 and args[1] is ...
            else len(value) == len(args) and all(map(fits, value, args))
        )
    if origin in (list, Sequence):
        return isinstance(value, (list, tuple)) and all(fits(v, args[0]) for v in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(fits(k, args[0]) and fits(v, args[1]) for k, v in value.items())
    return isinstance(value, hint) if isinstance(hint, type) else True


def describe(hint: Any) -> str:
    """A type in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in args)
    if origin in (list, tuple, Sequence):
        return f"a list of {describe(args[0]).removeprefix('a ').removeprefix('an ')}s"
    if origin in (dict, Mapping):
        return "a mapping"
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "a text", type(None): "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _legal(value: Any, hint: Any) -> str:
    words = [
        str(a)
        for part in (get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,))
        if get_origin(part) is Literal
        for a in get_args(part)
    ]
    if words:
        return did_you_mean(str(value), words)
    if fits("", hint) and isinstance(value, (int, float)):
        return f"a text that looks like something else is quoted twice: \"'{_shown(value)}'\""
    return f"give {describe(hint)}"


def _shown(value: Any) -> str:
    """A value as it is written in YAML and on the command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
