"""Symbolic Knowledge Distillation by its numbers: sampling, the critical teacher, what deduplication does."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from kdrun import rng
from kdrun.evaluation.threshold import keeps
from kdrun.losses.divergence import cross_entropy, soft_cross_entropy
from kdrun.plan.corpus import Corpus, Prompts, first_of_each, group_split

TEACHER, STUDENT = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)


def corpus_of(prompt: Tensor, completions: list[list[int]]) -> Corpus:
    prompts = Prompts(
        [[p] for p in range(int(prompt.max()) + 1)], torch.arange(int(prompt.max()) + 1), torch.arange(int(prompt.max()) + 1) // 2
    )
    draws = torch.arange(len(completions)) % 10
    return Corpus(prompts, prompt, draws, torch.zeros(len(completions)).double(), completions, 10)


def test_the_slope_of_the_exact_loss_is_student_minus_teacher() -> None:
    z = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(soft_cross_entropy(z, TEACHER[None]).sum(), z)
    assert slope[0].tolist() == pytest.approx([-0.166667, 0.033333, 0.133333], abs=1e-6)


def test_cross_entropy_entropy_and_divergence() -> None:
    told = soft_cross_entropy(STUDENT.log()[None], TEACHER[None]).item()
    entropy = -(TEACHER * TEACHER.log()).sum().item()
    assert told == pytest.approx(1.077122, abs=1e-6)
    assert entropy == pytest.approx(1.029653, abs=1e-6)
    assert told - entropy == pytest.approx(0.047469, abs=1e-6)


def test_the_critical_teacher_is_the_teacher_where_the_critic_says_yes() -> None:
    kept = keeps("released", torch.tensor([0.9, 0.8, 0.1]), 0.5)
    critical = TEACHER * kept / (TEACHER * kept).sum()
    assert critical.tolist() == pytest.approx([0.625, 0.375, 0], abs=1e-15)
    assert soft_cross_entropy(STUDENT.log()[None], critical[None]).item() == pytest.approx(0.770756, abs=1e-6)


def drawn(probabilities: Tensor, number: int, name: str) -> Tensor:
    u = rng.uniform(rng.key(1, name), torch.arange(number)).double()
    return (probabilities.cumsum(0) <= u[:, None]).sum(1)


def test_the_loss_of_samples_has_the_exact_loss_as_its_mean_and_filtered_ones_that_of_the_critical_teacher() -> None:
    tails = drawn(TEACHER, 40000, "samples")
    losses = cross_entropy(STUDENT.log().expand(len(tails), 3), tails)
    assert losses.mean().item() == pytest.approx(1.077122, abs=4 * losses.std().item() / 200)
    left = losses[keeps("released", torch.tensor([0.9, 0.8, 0.1]), 0.5)[tails]]
    assert left.mean().item() == pytest.approx(0.770756, abs=4 * left.std().item() / len(left) ** 0.5)


def test_unique_tails_weigh_the_rare_one_up() -> None:
    """P = (.9, .1), 10 draws: a share of .1 with repeats and of .325661 without, exactly, over all 1024 outcomes."""
    outcomes = list(product((0, 1), repeat=10))
    weights = [math.prod(0.1 if tail else 0.9 for tail in row) for row in outcomes]
    prompt = torch.arange(1024).repeat_interleave(10)
    completions = [[tail] for row in outcomes for tail in row]
    positions, repeats = first_of_each(prompt, completions)
    rare = [[] for _ in outcomes]  # type: ignore[var-annotated]
    for place in positions.tolist():
        rare[place // 10].append(completions[place][0])
    assert sum(w * sum(row) / 10 for w, row in zip(weights, outcomes, strict=True)) == pytest.approx(0.1, abs=1e-12)
    assert sum(w * sum(tails) / len(tails) for w, tails in zip(weights, rare, strict=True)) == pytest.approx(0.325661, abs=5e-7)
    assert repeats.sum() == 10240


def test_no_row_comes_twice_and_the_first_one_stays() -> None:
    prompt = torch.tensor([0, 0, 0, 1, 1, 2])
    positions, repeats = first_of_each(prompt, [[5], [6], [5], [5], [5, 6], [5]])
    assert positions.tolist() == [0, 1, 3, 4, 5]
    assert repeats.tolist() == [2, 1, 1, 1, 1]


def test_filtering_commutes_with_shuffling_and_with_deduplication() -> None:
    """The score is a fixed function of prompt and completion."""
    tails = drawn(TEACHER, 400, "corpus")
    corpus = corpus_of(torch.arange(40).repeat_interleave(10), [[t] for t in tails.tolist()])
    table = rng.uniform(9, torch.arange(40)[:, None], torch.arange(3)).double()

    def filtered(rows: Corpus) -> Corpus:
        scores = table[rows.prompt, torch.tensor([text[0] for text in rows.completions])]
        return rows.at(keeps("largest", scores, 0.4).nonzero()[:, 0])

    def unique(rows: Corpus) -> Corpus:
        return rows.at(first_of_each(rows.prompt, rows.completions)[0])

    one, other = filtered(unique(corpus)), unique(filtered(corpus))
    assert torch.equal(one.ids, other.ids)
    assert one.completions == other.completions
    order = rng.permutation(3, 400)
    shuffled = filtered(corpus.at(order))
    assert sorted(shuffled.ids.tolist()) == filtered(corpus).ids.tolist()
    assert 0 < len(one) < len(unique(corpus)) < len(corpus)


def test_a_head_is_on_one_side_alone_whatever_rows_it_has() -> None:
    heads = torch.arange(2000) % 500
    held = group_split(heads, 0.2, 7)
    assert not {*heads[held].tolist()} & {*heads[~held].tolist()}
    assert held.double().mean().item() == pytest.approx(0.2, abs=4 * (0.16 / 500) ** 0.5)
    order = rng.permutation(3, 2000)[:900]
    assert torch.equal(group_split(heads[order], 0.2, 7), held[order])
    assert not torch.equal(group_split(heads, 0.2, 8), held)
