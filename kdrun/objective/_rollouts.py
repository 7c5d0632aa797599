"""What an objective asks of the texts that it learns from, where its gradient is right in expectation over their drawing alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from kdrun.errors import Problem


def drawing_problems(
    tree: Mapping[str, Any], temperature: float, writers: Collection[str] = ("student",), given: bool = False
) -> list[Problem]:
    """Why the texts of the tree's source are not drawn from the student itself at `temperature`; `given`: whether those of the data may
    be among them.

    What top_k or top_p never draw has probability above 0 in the student, so no weight of what was drawn makes up for it.
    """
    source = tree["source"]
    if source.get("share") is None:
        return [Problem("it learns from texts that the student writes itself", "source", "", "source=rollout")]
    found = []
    for key in ("top_k", "top_p"):
        if source.get(key) not in (None, 1):
            what = f"texts are drawn from a part of the vocabulary, and the gradient is right for texts from all of it ({key})"
            found.append(Problem(what, f"source.{key}", "", "source.top_k=null source.top_p=1"))
    if source["temperature"] != temperature:
        what = f"the rollouts are drawn at temperature {source['temperature']}, so the ratio would not begin at 1"
        found.append(Problem(what, "objective.temperature", "", f"objective.temperature={source['temperature']}"))
    if source["writer"] not in writers:
        what = f"texts of the writer '{source['writer']}' are not drawn from the student"
        found.append(Problem(what, "source.writer", "", " or ".join(f"source.writer={writer}" for writer in writers)))
    if source.get("replay"):
        what = "texts that are read again were drawn from an earlier student"
        found.append(Problem(what, "source.replay", "", "source.replay=false"))
    if source["share"] < 1 and not given:
        found.append(Problem("given texts are not drawn from the student", "source.share", "", "source.share=1"))
    return found
