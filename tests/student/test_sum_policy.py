"""The policy for running sums: what it may look at, and what it may not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdrun.dataset.sums import BASE, COLON, EQUALS, LENGTH, MISSING, SYMBOLS
from kdrun.student.language import has_plain_head, head_of, hidden_states
from kdrun.student.sum_policy import SumPolicy

DIGITS = torch.tensor([3, 1, 4, 1, 5, 9])
HINTS = torch.tensor([3, 4, 8, 9, 4, 3])
WRITTEN = torch.tensor([3, 5, 8, 0, 2, 3])


@pytest.fixture
def policy() -> SumPolicy:
    torch.manual_seed(0)
    return SumPolicy(SYMBOLS.size).double()


def row(digits: Tensor = DIGITS, hints: Tensor | None = None, written: Tensor = WRITTEN) -> Tensor:
    aided = [] if hints is None else [torch.tensor([COLON]), hints]
    return torch.cat([digits, *aided, torch.tensor([EQUALS]), written[:-1]])[None]


def said(policy: SumPolicy, x: Tensor) -> Tensor:
    """The logits [LENGTH, V] that score the sums."""
    with torch.no_grad():
        return policy(x)[0, -LENGTH:]


def changed(a: Tensor, b: Tensor) -> list[int]:
    """Which sums are scored otherwise."""
    return [n for n in range(LENGTH) if not torch.allclose(a[n], b[n], rtol=0, atol=1e-12)]


def test_a_prompt_without_the_reference_is_one_with_every_entry_missing(policy: SumPolicy) -> None:
    missing = torch.full((LENGTH,), MISSING)
    assert changed(said(policy, row()), said(policy, row(hints=missing))) == []
    assert changed(said(policy, row()), said(policy, row(hints=HINTS))) == list(range(LENGTH))


@pytest.mark.parametrize("aided", [False, True])
@pytest.mark.parametrize("n", range(LENGTH))
def test_a_sum_is_predicted_from_its_own_digit_entry_and_the_token_before(policy: SumPolicy, n: int, aided: bool) -> None:
    hints = HINTS if aided else None
    plain = said(policy, row(hints=hints))
    digits = DIGITS.clone()
    digits[n] = (digits[n] + 1) % BASE
    assert changed(plain, said(policy, row(digits, hints))) == [n]
    written = WRITTEN.clone()
    written[n] = (written[n] + 1) % BASE
    assert changed(plain, said(policy, row(hints=hints, written=written))) == [n + 1] * (n + 1 < LENGTH)
    if aided:
        for other in ((int(HINTS[n]) + 1) % BASE, MISSING):
            told = HINTS.clone()
            told[n] = other
            assert changed(plain, said(policy, row(hints=told))) == [n]


@pytest.mark.parametrize("hints", [None, HINTS])
@pytest.mark.parametrize("n", range(1, LENGTH))
def test_logits_do_not_depend_on_later_tokens(policy: SumPolicy, n: int, hints: Tensor | None) -> None:
    """From the first sum on: a shorter row says the same as the longer one."""
    x = row(hints=hints)
    start = x.shape[1] - LENGTH
    with torch.no_grad():
        whole, part = policy(x), policy(x[:, : start + n])
    torch.testing.assert_close(whole[0, start : start + n], part[0, start : start + n], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pad", [0, 5, EQUALS, MISSING])
def test_padding_on_the_right_and_rows_of_another_length_change_nothing(policy: SumPolicy, pad: int) -> None:
    short, long = row(), row(hints=HINTS)
    width = long.shape[1] + 3
    both = torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[1]), value=pad) for x in (short, long)])
    with torch.no_grad():
        together = policy(both)
    for x, logits in zip((short, long), together, strict=True):
        end = x.shape[1]
        torch.testing.assert_close(logits[end - LENGTH : end], said(policy, x), rtol=1e-12, atol=1e-12)


def test_symbols_that_are_no_digits_may_be_written_and_are_read_as_a_start(policy: SumPolicy) -> None:
    plain = said(policy, row())
    strange = torch.tensor([EQUALS, COLON, MISSING, 0, 2, 3])
    told = said(policy, row(written=strange))
    assert changed(told, plain) == [1, 2, 3]
    assert told.isfinite().all()
    assert changed(told, said(policy, row(written=torch.tensor([COLON, *strange[1:]])))) == []


def test_logits_are_hidden_states_times_the_head(policy: SumPolicy) -> None:
    x = row(hints=HINTS)
    assert has_plain_head(policy)
    torch.testing.assert_close(torch.nn.functional.linear(hidden_states(policy, x), *head_of(policy)), policy(x))
    assert policy.vocabulary == SYMBOLS.size == 13


def test_rows_of_zeros_are_read(policy: SumPolicy) -> None:
    """Shapes are traced with them: shorter than a prompt, without an equals sign."""
    for width in (1, 5, 6, 7, 13, 30):
        assert policy(torch.zeros(2, width, dtype=torch.int64)).shape == (2, width, 13)


def test_a_hidden_layer_has_a_width() -> None:
    with pytest.raises(ValueError, match="hidden=0"):
        SumPolicy(13, hidden=0)
