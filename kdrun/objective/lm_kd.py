"""Distillation of a language model on given texts: L = ce_weight * CE + kd_weight * D(p, q) of every scored token, p teacher, q student.

`divergence`, at temperature `temperature` and without a factor T^2 (language-model papers have T 1):
    forward_kl   KL(p || q)                                            reverse_kl   KL(q || p)   (MiniLLM, arXiv 2306.08543)
    jsd          b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q, b = `beta`   (GKD, arXiv 2306.13649)
    tv           sum |p - q| / 2
    skew_forward KL(p || a p + (1 - a) q), skew_reverse KL(q || (1 - a) p + a q), a = `skew`   (DistiLLM, arXiv 2402.03898)
    adaptive     forward and reverse KL weighed by the gaps over the head and the tail, head mass `mu`   (AKL, arXiv 2404.02657)

A teacher of which the K likeliest tokens of every position were kept (cache=topk) is compared over these and "any other token", which
bounds every divergence from below (`missing: bucket`). Forward KL has three more readings of what is missing: both models renormalised
over the K (`renormalised`), the teacher alone (`zero`), neither (`truncated`, which is no divergence); names and what they do to the
student as in the public code of DistillKit and in Anshumann et al. (ACL 2025, arXiv 2503.16870).

Unit: nats per token. Constants: beta 0.5 is the default of GKD's public code (TRL), skew 0.1 and mu 0.5 those of their papers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from kdrun.losses import sparse, token
from kdrun.losses.chunked import RowLoss
from kdrun.losses.divergence import cross_entropy
from kdrun.objective._checks import require_nonnegative, require_positive, require_share
from kdrun.objective._language import TEACHER, TOKENS, LanguageObjective
from kdrun.types import Progress

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "tv", "skew_forward", "skew_reverse", "adaptive"]

Missing = Literal["bucket", "zero", "renormalised", "truncated"]


@dataclass(eq=False)
class LanguageKD(LanguageObjective):
    sparse: ClassVar[Literal["bounded", "invalid"]] = "bounded"

    divergence: Divergence = "forward_kl"
    ce_weight: float = 0.0
    kd_weight: float = 1.0
    temperature: float = 1.0
    beta: float = 0.5
    skew: float = 0.1
    mu: float = 0.5
    missing: Missing = "bucket"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_nonnegative(self, "ce_weight", "kd_weight")
        if not self.ce_weight and not self.kd_weight:
            raise ValueError("ce_weight=0 and kd_weight=0: one of them above 0, or nothing is learned")
        require_positive(self, "temperature")
        require_share(self, "beta", "skew", "mu")
        if self.divergence not in get_args(Divergence):
            raise ValueError(f"divergence={self.divergence!r}: legal values {', '.join(get_args(Divergence))}")
        if self.missing not in get_args(Missing):
            raise ValueError(f"missing={self.missing!r}: legal values {', '.join(get_args(Missing))}")
        if self.missing != "bucket" and self.divergence != "forward_kl":
            raise ValueError(f"missing={self.missing}: of forward_kl alone; with {self.divergence} bucket")

    def listens(self) -> bool:
        return self.kd_weight > 0

    def weights(self, progress: Progress) -> dict[str, float]:
        return {"ce": self.ce_weight, "kd": self.kd_weight}

    def row_losses(self) -> Mapping[str, tuple[RowLoss, tuple[str, ...]]]:
        losses: dict[str, tuple[RowLoss, tuple[str, ...]]] = {"ce": (cross_entropy, (TOKENS,))} if self.ce_weight else {}
        return losses | ({"kd": (self._loss, (TEACHER,))} if self.kd_weight else {})

    def _loss(self, logits: Tensor, *theirs: Tensor) -> Any:
        """Of the teacher's logits [N, V], or of the ids, log-probabilities [N, K] and the rest [N] that were kept of them."""
        if len(theirs) == 1:
            return self._divergence()(logits, *theirs, temperature=self.temperature)
        ids, log_probs, log_rest = theirs
        if self.missing == "bucket":
            return self._divergence()(*sparse.bucketed(logits, ids, log_probs, log_rest, self.temperature))
        reading = {"zero": sparse.zero_missing, "renormalised": sparse.renormalised, "truncated": sparse.truncated}[self.missing]
        return reading(logits, ids, log_probs, self.temperature)

    def _divergence(self) -> RowLoss:
        choices: dict[str, RowLoss] = {
            "forward_kl": token.forward_kl,
            "reverse_kl": token.reverse_kl,
            "jsd": partial(token.generalised_jsd, beta=self.beta),
            "tv": token.total_variation,
            "skew_forward": partial(token.skew_forward_kl, alpha=self.skew),
            "skew_reverse": partial(token.skew_reverse_kl, alpha=self.skew),
            "adaptive": partial(token.adaptive_kl, mu=self.mu),
        }
        return choices[self.divergence]
