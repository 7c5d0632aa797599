"""FitNet: Hints for Thin Deep Nets (Romero et al., ICLR 2015, arXiv 1412.6550), in its usual one-stage form.

    L = CE + beta * mean (r(fs) - ft)^2

fs and ft are the maps of a hint layer and r a trained regressor to the teacher's shape, dropped at export. Vectors count as
1x1 maps.

Unit: squared feature units, the mean over the elements of a sample's map, per sample. Constants: layer f2, beta 100 and the
regressor (convolution, BatchNorm, ReLU) are those of the benchmark code of CRD (HobbitLong/RepDistiller), which trains hint
and label together where the paper trains the hint first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from kdrun.errors import Problem, Refused
from kdrun.losses.feature import mean_squared_error
from kdrun.objective._checks import require_nonnegative
from kdrun.objective._labels import label_cross_entropy
from kdrun.objective.base import Objective
from kdrun.types import Batch, Connectors, Context, Needs, Output, Progress, Signal, Term


class ConvRegressor(nn.Module):
    """Convolution, BatchNorm, ReLU from the student's map to the teacher's shape.

    Twice as large: 3x3 with stride 2; half as large: transposed 4x4 with stride 2; else a valid convolution of size
    1 + Hs - Ht. Shapes are (C, H, W) or (D,) without the batch; maps [B, Cs, Hs, Ws] -> [B, *teacher].

    Raises ValueError where no such convolution exists.
    """

    def __init__(self, student: Sequence[int], teacher: Sequence[int]) -> None:
        super().__init__()
        (cs, hs, ws), (ct, ht, wt) = _as_map(student), _as_map(teacher)
        self.shape = tuple(teacher)
        if (hs, ws) == (2 * ht, 2 * wt):
            self.conv: nn.Module = nn.Conv2d(cs, ct, kernel_size=3, stride=2, padding=1)
        elif (2 * hs, 2 * ws) == (ht, wt):
            self.conv = nn.ConvTranspose2d(cs, ct, kernel_size=4, stride=2, padding=1)
        elif hs >= ht and ws >= wt:
            self.conv = nn.Conv2d(cs, ct, kernel_size=(1 + hs - ht, 1 + ws - wt))
        else:
            raise ValueError(f"no convolution takes a map of {hs}x{ws} to {ht}x{wt}")
        self.norm = nn.BatchNorm2d(ct)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        maps = x if x.dim() == 4 else x[:, :, None, None]
        return self.relu(self.norm(self.conv(maps))).reshape(-1, *self.shape)


def _as_map(shape: Sequence[int]) -> tuple[int, int, int]:
    if len(shape) not in (1, 3):
        raise ValueError(f"a hint is a map (C, H, W) or a vector (D,), not {tuple(shape)}")
    channels, height, width = shape if len(shape) == 3 else (shape[0], 1, 1)
    return channels, height, width


@dataclass(eq=False)
class FitNet(Objective):
    mixes: ClassVar[bool] = True

    ce_weight: float = 1.0
    beta: float = 100.0
    student_tap: str = "f2"
    teacher_tap: str = "f2"

    def __post_init__(self) -> None:
        require_nonnegative(self, "ce_weight", "beta")

    def needs(self) -> Needs:
        return Needs(teacher_taps=(self.teacher_tap,), student_taps=(self.student_tap,)) if self.beta else Needs()

    def setup(self, context: Context) -> Connectors:
        """The regressor from the student's tap to the teacher's. Raises Refused where no regressor joins the two shapes."""
        if not self.beta:
            return nn.ModuleDict()
        assert context.teacher is not None
        student, teacher = context.student.taps[self.student_tap], context.teacher.taps[self.teacher_tap]
        try:
            return nn.ModuleDict({"regressor": ConvRegressor(student, teacher)})
        except ValueError as error:
            raise Refused(
                Problem(
                    what=f"{error} (student {self.student_tap} {tuple(student)}, teacher {self.teacher_tap} {tuple(teacher)})",
                    key="objective.student_tap",
                    remedy="name taps whose student map is at least as large as the teacher's, or half of it: "
                    "objective.student_tap=..., objective.teacher_tap=...",
                )
            ) from error

    def weights(self, progress: Progress) -> dict[str, float]:
        return {"ce": self.ce_weight, "hint": self.beta}

    def terms(self, output: Output, signal: Signal, batch: Batch, phase: str, connectors: Connectors) -> dict[str, Term]:
        terms = {"ce": Term(label_cross_entropy(output.logits, batch).sum(), "label")}
        if self.beta:
            regressed = connectors["regressor"](output.taps[self.student_tap])
            terms["hint"] = Term(mean_squared_error(regressed, signal.taps[self.teacher_tap].detach()).sum(), "sample")
        return terms
