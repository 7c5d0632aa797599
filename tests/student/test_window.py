"""The language model of a conditioning token and the last two."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kdrun.student.language import has_plain_head, head_of, hidden_states
from kdrun.student.taps import model_spec, reads_tokens
from kdrun.student.window import WIDTH, WindowLM

TOKENS, CONTEXTS = 7, 3


def network(hidden: int = 5) -> WindowLM:
    torch.manual_seed(0)
    return WindowLM(TOKENS, CONTEXTS, hidden)


def ids(rows: int = 4, length: int = 9) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    x = torch.randint(TOKENS, (rows, length), generator=g)
    x[:, 0] = TOKENS + torch.arange(rows) % CONTEXTS
    return x


def test_it_sees_the_first_token_and_the_last_two_and_nothing_else() -> None:
    model, x = network(), ids(1)
    said = model(x)
    for place in range(x.shape[1]):
        changed = x.clone()
        changed[0, place] = TOKENS + (x[0, 0] - TOKENS + 1) % CONTEXTS if place == 0 else (x[0, place] + 1) % TOKENS
        moved = (model(changed) != said).any(-1)[0].tolist()
        seen_by = range(2, 9) if place == 0 else {place, place + 1}
        assert [i for i in range(2, 9) if moved[i]] == [i for i in range(2, 9) if i in seen_by]


def test_it_is_three_embeddings_a_hidden_layer_and_a_head() -> None:
    model, x = network(), ids()
    i = 5
    read = torch.cat([model.context(x[:, 0] - TOKENS), model.before(x[:, i - 1]), model.last(x[:, i])], -1)
    torch.testing.assert_close(model(x)[:, i], model.head(F.gelu(model.body(read))))
    sizes = CONTEXTS * WIDTH + 2 * TOKENS * WIDTH + (3 * WIDTH + 1) * 5 + 6 * TOKENS
    assert sum(p.numel() for p in model.parameters()) == sizes


def test_its_head_is_plain() -> None:
    model, x = network(), ids()
    assert has_plain_head(model)
    assert torch.equal(F.linear(hidden_states(model, x), *head_of(model)), model(x))


def test_it_tells_what_it_reads_and_says() -> None:
    model = network()
    assert reads_tokens(model)
    assert (model.vocabulary, model.ids) == (TOKENS, TOKENS + CONTEXTS)
    spec = model_spec(model, (9,), {})
    assert (spec.classes, spec.output) == (TOKENS, (9, TOKENS))
    assert model(ids(2, 1)).shape == (2, 1, TOKENS)


@pytest.mark.parametrize("sizes", [(0, 3, 4), (7, 0, 4), (7, 3, 0)])
def test_sizes_below_one_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        WindowLM(*sizes)
