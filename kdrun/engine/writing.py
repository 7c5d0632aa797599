"""What texts that networks write themselves ask of data, networks, objective and evaluation, found before anything is spent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from kdrun.dataset.base import Data
from kdrun.dataset.tokens import Ragged, TokenSplit
from kdrun.errors import Problem
from kdrun.evaluation.base import Evaluation
from kdrun.objective.base import Objective
from kdrun.source.rollout import LOSS
from kdrun.student.engines import engine_problems
from kdrun.student.language import position_limit


def writing_problems(
    tree: Mapping[str, Any], data: Data, objective: Objective, evaluation: Evaluation, networks: Mapping[str, nn.Module]
) -> list[Problem]:
    """All that does not fit. `networks` by what the configuration calls them: student, teacher."""
    found = _teaching(tree, data, objective) + _lengths(tree, data, networks)
    if tree["source"].get("share") is None:  # no texts are written
        return found
    if tree["dataset"].get("pack"):
        found.append(Problem("a row of several texts has several prompts", "dataset.pack", data.name, "dataset.pack=false"))
    if tree["hardware"].get("wrap") == "fsdp2":
        what = "ranks that write texts of different lengths would wait for each other for ever in a student that is sharded over them"
        found.append(Problem(what, "hardware.wrap", "", "hardware.wrap=ddp, with adapters if memory is short: student.lora"))
    if tree["source"].get("replay"):
        found += _replaying(data, evaluation)
    writer = networks.get("student" if tree["source"]["writer"] == "student" else "teacher")
    return found if writer is None else found + engine_problems(tree["source"]["engine"], writer)


def _teaching(tree: Mapping[str, Any], data: Data, objective: Objective) -> list[Problem]:
    """What a teacher and rewards ask of texts."""
    share, replay, found = tree["source"].get("share"), tree["source"].get("replay"), []  # None: no texts are written
    if tree["teacher"].get("prompt") == "privileged" and objective.needs().teacher_logits:
        if getattr(data.split("train"), "privileged", None) is None:
            what, remedy = (
                f"{data.name} has no prompts for a privileged teacher",
                "teacher.prompt=own, or data that have them: dataset=sums",
            )
            found.append(Problem(what, "teacher.prompt", data.name, remedy))
        elif share != 1 or replay:
            what = "a teacher with a prompt of its own speaks of texts that are written anew, and not all of them are"
            remedy = "source=rollout source.share=1 source.replay=false, or teacher.prompt=own"
            found.append(Problem(what, "teacher.prompt", "", remedy))
    if share is not None and tree["teacher"].get("kind") == "truth" and objective.needs().teacher_logits:
        what = "the exact distribution is stored beside given texts, and written ones have none"
        found.append(Problem(what, "teacher", data.name, "a live teacher, or source=loader"))
    if getattr(objective, "rewarded", False) and data.reward is None:
        what = f"{data.name} does not say what a right completion is"
        found.append(Problem(what, "objective", data.name, "a data set with a reward, e.g. dataset=sums, or objective=opsd"))
    return found


def _replaying(data: Data, evaluation: Evaluation) -> list[Problem]:
    found = []
    if "validation" not in data.splits:
        what = f"the replay buffer follows the validation loss, and {data.name} has no validation split"
        found.append(Problem(what, "source.replay", data.name, "e.g. dataset.validation=0.1, or source.replay=false"))
    if LOSS not in evaluation.names():
        what = f"the replay buffer follows the validation loss ({LOSS}), which {type(evaluation).__name__} does not measure"
        found.append(Problem(what, "source.replay", "", "evaluation=language, or source.replay=false"))
    return found


def _lengths(tree: Mapping[str, Any], data: Data, networks: Mapping[str, nn.Module]) -> list[Problem]:
    """Prompts that leave a network too few positions for what is to be written after them."""
    found = []
    source, evaluation = (tree[group].get("max_new_tokens") for group in ("source", "evaluation"))
    for group, new, splits in (("source", source, ("train",)), ("evaluation", evaluation, ("validation", "test"))):
        for who, network in networks.items():
            limit = position_limit(network)
            if limit is None or new is None:
                continue
            stored = [split for name, split in data.splits.items() if name in splits and isinstance(split, TokenSplit)]
            aided = group == "source" and tree["teacher"].get("prompt") == "privileged" and ("teacher" not in networks or who == "teacher")
            storages = [split.privileged if aided and split.privileged is not None else split.storage for split in stored]
            longest = max((storage.longest_prompt() for storage in storages if isinstance(storage, Ragged)), default=0)
            if longest + new > limit:
                what = f"a prompt of {longest} tokens and {new} new ones are more than the {limit} positions of the {who}"
                remedy = (
                    f"{group}.max_new_tokens={limit - longest}" if longest < limit else "shorter prompts, or a model with more positions"
                )
                found.append(Problem(what, f"{group}.max_new_tokens", data.name, remedy))
    return found
