"""From a command line to one resolved configuration, with the origin of every leaf.

Order, later wins: conf/config.yaml < group files < the recipe's body < the recipe's `when` entries < the command line.
Hydra composes the groups and the recipe; overrides are parsed by Hydra's own grammar and applied after the recipe, so
that all faults of a command line are found at once and a setting of the recipe never outlives the choice it belongs to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kdrun.config.origins import Origins, file_origins
from kdrun.config.paths import GROUPS, MANY, SearchPath, importable
from kdrun.errors import Problem, Refused, did_you_mean, nearest

COMMAND_LINE = "command line"
# What a data set holds is told by its fingerprint, wherever it lies.
LOCATION = ("path", "workers", "download")
# Keys that say where a run is kept and shown, not what it computes: they are left out of the configuration's hash.
NOT_SEMANTIC = (
    "run",
    "hardware",
    "track",
    "paper",
    "about",
    "published",
    "rivals",
    "claims",
    "notes",
    "when",
    "name",
    "method",
    "scale",
    "family",
)

# Groups whose keys depend on the option: each is typed by the class that it names.
OPEN_GROUPS = ("teacher", "student", "dataset", "source", "objective", "evaluation", "plan", "track")


@dataclass
class Composed:
    """A resolved configuration and how it came about. `problems` are the faults of the overrides: `kdrun.config.check.check`
    raises them together with its own, so that one attempt shows them all."""

    tree: dict[str, Any]
    origins: Origins
    choices: dict[str, str]  # group -> option; of a group that has several, all with commas between them
    recipe: str | None
    overrides: list[str]
    config_dirs: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def hash(self) -> str:
        """Identifies the experiment: equal for equal settings, however they were written or ordered."""
        semantic = {k: v for k, v in self.tree.items() if k not in NOT_SEMANTIC}
        cache = semantic.pop("cache", None) or {}
        if cache.get("format"):  # rounds what the teacher says; where it lies and how large it may be changes nothing
            semantic["cache"] = {key: cache[key] for key in ("format", "dtype", "k")}
        semantic["teacher"] = {k: v for k, v in semantic["teacher"].items() if k != "placement"}
        semantic["dataset"] = {k: v for k, v in semantic["dataset"].items() if k not in LOCATION}
        return hashlib.sha256(json.dumps(semantic, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def facts(self) -> dict[str, Any]:
        """Every leaf and every choice of an option, by key: what conditions may speak of."""
        return {**flatten(self.tree), **self.choices}

    def set_by_user(self, key: str) -> bool:
        """Whether the command line set this key or a leaf below it."""
        return any(o == COMMAND_LINE and (k == key or k.startswith(key + ".")) for k, o in self.origins.items())


def compose(overrides: Sequence[str], config_dirs: Sequence[str | Path] = (), default_recipe: str | None = None) -> Composed:
    """Compose and resolve. Faults of single overrides are kept in `problems` of the result; raises `Refused` where there is no result."""
    search = SearchPath.of(config_dirs)
    parsed, problems = _parse(overrides, search)
    choices_given, recipe, values = _sort_overrides(parsed, search, problems, default_recipe)
    values = [o for o in values if o.key_or_group.split(".")[0] not in _doubtful(problems, choices_given)]
    config, choices = _hydra(search, choices_given, recipe)
    origins = file_origins(search, choices, recipe)
    given = [o.key_or_group for o in values]
    for override in values:
        _apply(config, override, given, origins, problems)
    # After the command line, whose values the conditions may speak of; what it set stays as it is.
    origins |= _apply_when(config, choices, given, recipe, problems)
    if recipe:
        config["name"] = recipe
        origins["name"] = COMMAND_LINE if any(o.key_or_group == "recipe" for o in parsed) else "default"
    tree = _resolve(config, origins, problems)
    if not tree:
        raise Refused(problems)
    tree.pop("when", None)
    _count_seeds(tree)
    folders = [str(Path(d).expanduser().resolve()) for d in config_dirs]
    importable(folders)
    return Composed(tree, _keep_live(origins, tree), choices, recipe, list(overrides), folders, problems)


def _parse(overrides: Sequence[str], search: SearchPath) -> tuple[list[Override], list[Problem]]:
    parser, parsed, problems = OverridesParser.create(), [], []
    for text in overrides:
        if "=" not in text and not text.startswith("~"):
            problems.append(Problem("this is not KEY=VALUE", text, COMMAND_LINE, _meant(text, search)))
            continue
        try:
            parsed.append(parser.parse_override(text))
        except HydraException as error:
            what = str(error).splitlines()[0]
            problems.append(
                Problem(
                    f"cannot be read as an override ({what})",
                    text,
                    COMMAND_LINE,
                    "write key=value; quote a text that has spaces, commas or = in it",
                )
            )
    return parsed, problems


def _meant(word: str, search: SearchPath) -> str:
    """What somebody wanted who wrote a bare word: a recipe, an option of a group, or a value that was forgotten."""
    keys = {"recipe": "recipes", **{group: group for group in GROUPS}}
    if word in keys:
        return f"{word}=NAME, one of " + ", ".join(search.options(keys[word]))
    named = [f"{key}={word}" for key, folder in keys.items() if word in search.options(folder)]
    return f"write {' or '.join(named)}" if named else f"write {word}=VALUE"


def _doubtful(problems: Sequence[Problem], chosen: Mapping[str, str]) -> set[str]:
    """Groups of which nothing can be said, because the choice itself is wrong: their keys are judged once it is mended."""
    wrong = {p.key for p in problems}
    return {g for g in OPEN_GROUPS if g in wrong or ("recipe" in wrong and g not in chosen)}


def _sort_overrides(
    parsed: list[Override], search: SearchPath, problems: list[Problem], recipe: str | None
) -> tuple[dict[str, str], str | None, list[Override]]:
    """Split into group choices, the recipe and value overrides; unknown choices become problems."""
    choices: dict[str, str] = {}
    values: list[Override] = []
    for override in parsed:
        key = override.key_or_group
        if override.is_sweep_override():
            remedy = "give one value per run here; one that has commas in it is quoted twice: key='\"a,b\"'"
            problems.append(Problem("several values where one is needed", key, COMMAND_LINE, remedy))
        elif key == "recipe" or (key in GROUPS and not override.is_delete()):
            value = override.value()
            names = [str(name) for name in value] if isinstance(value, list) and key in MANY else [str(value)]
            options = search.options("recipes" if key == "recipe" else key)
            unknown = [name for name in names if name not in options]
            if unknown:
                problems += [Problem(f"there is no {key} named '{n}'", key, COMMAND_LINE, did_you_mean(n, options)) for n in unknown]
            elif key == "recipe":
                recipe = names[0]
            else:
                choices[key] = ",".join(names)
        else:
            values.append(override)
    return choices, recipe, values


def _hydra(search: SearchPath, choices: Mapping[str, str], recipe: str | None) -> tuple[DictConfig, dict[str, str]]:
    conf, *more = search.conf_dirs()
    folders = [f"file://{folder}" for folder in (*search.roots, *more)]
    overrides = [f"hydra.searchpath=[{','.join(folders)}]", *(f"{g}=[{n}]" if g in MANY else f"{g}={n}" for g, n in choices.items())]
    if recipe:
        overrides.append(f"recipes={recipe}")
    try:
        with initialize_config_dir(str(conf), version_base="1.3"):
            config = hydra_compose("config", overrides=overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        where = f"recipes/{recipe}.yaml" if recipe else "conf"
        raise Refused(
            Problem(f"the configuration cannot be composed: {error}", "", where, "see `kdrun ls` for what each group offers")
        ) from error
    chosen = {g: str(c) for g, c in config.hydra.runtime.choices.items() if g in GROUPS and c is not None}
    for group in MANY:  # Hydra does not tell of a choice of several: each is a key of the group by its name
        chosen.setdefault(group, ",".join(map(str, config.get(group) or ())) or "none")
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    return config, chosen


def _apply_when(config: DictConfig, choices: Mapping[str, str], given: list[str], recipe: str | None, problems: list[Problem]) -> Origins:
    """Apply the recipe's conditional settings to what the command line left alone."""
    origins: Origins = {}
    for number, entry in enumerate(config.get("when") or []):
        conditions = [str(c) for c in entry.get("if", [])]
        wrong = [c for c in conditions if c.partition("=")[0].split(".")[0] not in GROUPS or not c.partition("=")[2]]
        if wrong or not conditions:
            remedy = "e.g. if: [objective=dkd] or if: [teacher.name=resnet152]"
            problems.append(
                Problem("a condition is a list of group=option or key=value", f"when.{number}.if", f"recipes/{recipe}.yaml", remedy)
            )
            continue
        pairs = [c.partition("=")[::2] for c in conditions]
        if not all(str(choices.get(k, OmegaConf.select(config, k))) in options.split("|") for k, options in pairs):
            continue
        for key, value in entry.items():
            # A whole node that the command line sets (plan.critic=null) is its own; the choice of a group is not.
            nodes = [g for g in given if g not in GROUPS]
            if key == "if" or any(g == key or g.startswith(f"{key}.") for g in given) or any(str(key).startswith(f"{n}.") for n in nodes):
                continue
            OmegaConf.update(config, str(key), value, merge=False)
            origins[str(key)] = f"recipes/{recipe}.yaml (when {', '.join(conditions)})"
    return origins


def _apply(config: DictConfig, override: Override, given: list[str], origins: Origins, problems: list[Problem]) -> None:
    key = override.key_or_group
    known = _known(config, key)
    if override.is_delete():
        parent, _, leaf = key.rpartition(".")
        node = OmegaConf.select(config, parent) if parent else config
        if known and node is not None:
            del node[leaf]
            origins[key] = COMMAND_LINE
        else:
            problems.append(_unknown(config, key))
    elif known or override.is_add() or override.is_force_add() or _open(config, key, given):
        try:
            OmegaConf.update(config, key, override.value(), merge=False, force_add=True)
        except OmegaConfBaseException as error:
            problems.append(
                Problem(f"cannot be set ({str(error).splitlines()[0]})", key, COMMAND_LINE, "set the whole node, or a leaf of it")
            )
        for leaf in [o for o in origins if o.startswith(key + ".")]:
            del origins[leaf]
        origins[key] = COMMAND_LINE
    else:
        problems.append(_unknown(config, key))


_ABSENT = object()
FREE = {"taps", "columns", "fit", "splits", "track"}  # mappings whose keys are the user's own names


def _known(config: DictConfig, key: str) -> bool:
    """Whether the tree has this key; one that must still be given (???) counts."""
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(config, parent, default=None) if parent else config
    return isinstance(node, DictConfig) and leaf in set(map(str, node.keys()))


def _open(config: DictConfig, key: str, given: list[str]) -> bool:
    """A key below a null or empty mapping may be added freely, and so may names of the user's own (taps, columns) and the
    arguments of a class that the command line itself names by `_target_`: schema and signature judge them later."""
    parent = key.rpartition(".")[0]
    if FREE & set(parent.split(".")):
        return True
    while parent:
        node = OmegaConf.select(config, parent, default=_ABSENT)
        if node is not _ABSENT:
            return node is None or (isinstance(node, DictConfig) and (len(node) == 0 or f"{parent}._target_" in given))
        parent = parent.rpartition(".")[0]
    return False


def _unknown(config: DictConfig, key: str) -> Problem:
    legal = list(flatten(OmegaConf.to_container(config, resolve=False)))
    parents = {k.rsplit(".", n)[0] for k in legal for n in range(1, k.count(".") + 1)}
    siblings = [k for k in legal if k.rpartition(".")[0] == key.rpartition(".")[0]]
    close = nearest(key, siblings) or nearest(key, {*legal, *parents})
    remedy = f"did you mean {' or '.join(close)}?" if close else did_you_mean(key, siblings)
    return Problem("unknown key", key, COMMAND_LINE, remedy)


def _resolve(config: DictConfig, origins: Origins, problems: list[Problem]) -> dict[str, Any]:
    open_keys = sorted(OmegaConf.missing_keys(config))
    if open_keys:
        problems += [Problem("must be given", key, origins.get(key, ""), f"{key}=...") for key in open_keys]
        return {}
    try:
        tree = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", "") or "")
        problems.append(Problem(str(error).splitlines()[0], key, origins.get(key, ""), f"set {key}=... on the command line" if key else ""))
        return {}
    assert isinstance(tree, dict)
    return {str(k): v for k, v in tree.items()}


def _count_seeds(tree: Mapping[str, Any]) -> None:
    """run.seeds=5 means the seeds 1 to 5: whoever reads the configuration finds the list. What is no such number is left to the check."""
    run = tree.get("run")
    count = run.get("seeds") if isinstance(run, dict) else None
    if isinstance(run, dict) and isinstance(count, int) and not isinstance(count, bool) and count > 0:
        run["seeds"] = list(range(1, count + 1))


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted leaf -> value. Lists and empty mappings are leaves."""
    if isinstance(node, (DictConfig, ListConfig)):
        node = OmegaConf.to_container(node, resolve=False)
    if isinstance(node, Mapping) and (node or not prefix):
        found: dict[str, Any] = {}
        for key, value in node.items():
            found |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
        return found
    return {prefix: node}


def _keep_live(origins: Origins, tree: dict[str, Any]) -> Origins:
    """One origin for each leaf of the tree; a leaf below a key that was set whole has that key's origin."""
    found: Origins = {}
    for leaf in flatten(tree):
        name = leaf
        while name and name not in origins:
            name = name.rpartition(".")[0]
        found[leaf] = origins.get(name, "conf/config.yaml")
    return found
