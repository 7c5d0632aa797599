"""A teacher that reads more than its student: the same tokens to score, after a prompt of its own.

Privileged information (Vapnik and Vashist, 2009): a reference solution, retrieved text, what a tool said. The two prompts differ in
length, so what the teacher says is laid beside the student's positions, token by token: the n-th token of a completion is scored by
position `prompt - 1 + n` of either.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdrun.dataset import tokens
from kdrun.types import Batch

INPUTS = f"{tokens.TEACHER}_{tokens.INPUTS}"  # [B, T'] the teacher's prompt and the student's tokens, or the same text in the teacher's own
TARGETS = f"{tokens.TEACHER}_{tokens.TARGETS}"  # [B, T'] what is scored of a text in the teacher's own tokens, -1 elsewhere
SHIFT = "teacher_shift"  # [B] how much longer the teacher's prompt is than the student's


def in_context(batch: Batch) -> Batch:
    """What the teacher reads; the batch itself where it brings no such prompt (texts that are only evaluated)."""
    if INPUTS not in batch.extra:
        return batch
    inputs = batch.extra[INPUTS]
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    return batch._replace(inputs=inputs, extra={**batch.extra, tokens.POSITIONS: positions})


def beside_student(said: Tensor, batch: Batch) -> Tensor:
    """Rows [B, T', ...] that a teacher said of its own positions, at the student's: [B, T, ...]. Prompts have no counterpart there, and
    nothing of them is scored. A text in the teacher's own tokens has no such places: what is said of it stays where it is."""
    if SHIFT not in batch.extra:
        return said
    place = torch.arange(batch.inputs.shape[1], device=said.device) + batch.extra[SHIFT][:, None]
    place = place.clamp(0, said.shape[1] - 1)
    return said.gather(1, place.view(*place.shape, *[1] * (said.dim() - 2)).expand(-1, -1, *said.shape[2:]))
