"""The metrics by name: their unit and which direction is better. No torch here, so that listing and the ledger stay light."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class MetricKind:
    """What a metric's number means."""

    unit: str  # "percent", "nats", "ms", ...
    higher_is_better: bool

    @property
    def difference_unit(self) -> str:
        """The unit of a difference of two such numbers: percentages differ by points."""
        return "points" if self.unit == "percent" else self.unit


_TOP_K = re.compile(r"top[1-9]\d*")
_CLASS_IOU = re.compile(r"iou_\w+")
_RANK_CORRELATION = re.compile(r"(?:tau|rho)_(?:mr|ms|sum|parameters|depth|vanilla)")

KINDS: dict[str, MetricKind] = {
    "teacher_top1": MetricKind("percent", True),
    "agreement": MetricKind("percent", True),
    "pair_order": MetricKind("percent", True),
    "ece": MetricKind("percent", False),
    "nll": MetricKind("nats", False),
    "aurc": MetricKind("thousandths", False),
    "e_aurc": MetricKind("thousandths", False),
    "kl_teacher": MetricKind("nats", False),
    "ua": MetricKind("percent", True),
    "override_rate": MetricKind("percent", True),
    "kept_accuracy": MetricKind("percent", True),
    "kept_sw": MetricKind("", False),
    "mode_balance": MetricKind("percent", True),
    "calls": MetricKind("calls", False),
    "fid": MetricKind("", False),
    "edge_kl": MetricKind("nats", False),
    "neighbour_cosine": MetricKind("", True),
    "miou": MetricKind("percent", True),
    "pixel_accuracy": MetricKind("percent", True),
    **{name: MetricKind("percent", True) for name in ("map", "map_50", "map_75", "ap_small", "ap_medium", "ap_large")},
    "diversity": MetricKind("", False),
    "diversity_start": MetricKind("", False),
    "moved_channel": MetricKind("", True),
    "moved_spatial": MetricKind("", True),
    "alpha_corrupted": MetricKind("", False),
    "alpha_noisy": MetricKind("", True),
    "alpha_clean": MetricKind("", True),
    "alpha_gap": MetricKind("", True),
    "filter_precision": MetricKind("percent", True),
    "filter_recall": MetricKind("percent", True),
    "filter_seconds": MetricKind("s", False),
    "bytes_up": MetricKind("bytes", False),
    "bytes_down": MetricKind("bytes", False),
    "correct_share": MetricKind("percent", True),  # of a teacher's answers, those that name the true class
    "support_share": MetricKind("percent", True),  # of a pool, what could have been drawn
    **{f"top1_{pick}": MetricKind("percent", True) for pick in ("picked", "largest", "random", "best")},
    "perplexity": MetricKind("", False),
    "reward": MetricKind("percent", True),
    "pass_k": MetricKind("percent", True),
    "rouge_l": MetricKind("percent", True),
    "length": MetricKind("tokens", False),
    "entropy": MetricKind("nats", True),
    "truth_entropy": MetricKind("nats", True),
    **{name: MetricKind("nats", False) for name in ("rkl_teacher", "kl_truth", "rkl_truth", "oracle_nll", "own_rkl")},
    "agreement_truth": MetricKind("percent", True),
    "head_mass": MetricKind("", True),
    "tail_mass": MetricKind("", True),
    "taid_t": MetricKind("", True),
    **{name: MetricKind("percent", True) for name in ("preferred", "preferred_by_length")},
    **{name: MetricKind("nats", True) for name in ("margin", "reward_margin")},
    "reward_accuracy": MetricKind("", True),
    # Of what a language model writes, and of the plan `pipeline`: the share that is right.
    **{
        name: MetricKind("percent", True)
        for name in ("accept", "greedy_accept", "teacher_accept", "corpus_accept", "written_accept", "unique_accept")
    },
    "unique_tails": MetricKind("completions", True),
    "corpus_size": MetricKind("rows", True),
    "corpus_tails": MetricKind("completions", True),
    **{name: MetricKind("percent", True) for name in ("critic_precision", "critic_recall", "precision_at_recall", "average_precision")},
    "kept_share": MetricKind("percent", True),
    "critic_tau": MetricKind("", True),
    "parameters": MetricKind("parameters", False),
    "flops": MetricKind("FLOPs", False),
    "latency_ms": MetricKind("ms", False),
}


# Of published tables alone: kdrun does not measure them (a judge model, or people, are needed).
ELSEWHERE: dict[str, MetricKind] = {
    "mt_bench": MetricKind("points of 10", True),
    "human_accept": MetricKind("percent", True),
    "alpaca_eval": MetricKind("percent", True),
}


def kind(name: str) -> MetricKind | None:
    """The kind of a metric, None for a name that kdrun does not know (its direction must then not be guessed)."""
    if _TOP_K.fullmatch(name) or _CLASS_IOU.fullmatch(name):
        return MetricKind("percent", True)
    if _RANK_CORRELATION.fullmatch(name):
        return MetricKind("", True)
    return KINDS.get(name) or ELSEWHERE.get(name)
