"""Completions: the same text however it is asked for, drawn from the distribution that is told."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdrun import rng
from kdrun.dataset.vocabulary import Tokenized
from kdrun.student.generate import LOGITS_AT_ONCE, Completions, Mixed, Sampling, _rows_at_once, complete
from kdrun.student.language import causal_lm
from tests.dataset.texts import PADDED, V, tiny

CPU = torch.device("cpu")
PROMPTS = [torch.tensor(ids) for ids in ([1, 2, 3], [4], [5, 6, 7, 8, 9], [2, 2])]
IDS = torch.tensor([7, 3, 11, 20])


class Asked(nn.Module):
    """A model of transformers as any other network: ids in, logits out, nothing that it could write with."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.vocabulary = model, model.vocabulary

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


class Constant(nn.Module):
    """Says the same of every token."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits, self.vocabulary = nn.Parameter(logits), len(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(*x.shape, -1)


def write(network: nn.Module, sampling: Sampling, rows: Sequence[int] = range(4), key: int = 5, pad: int = 0) -> Completions:
    return complete(network, [PROMPTS[i] for i in rows], sampling, key, IDS[list(rows)], pad, CPU)


def said_after(model: Any, prompt: Tensor, text: Tensor) -> Tensor:
    """The logits [L, V] that score each token of a completion, by one plain forward."""
    with torch.no_grad():
        return model(torch.cat([prompt, text])[None]).logits[0, len(prompt) - 1 : -1, :V]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("how", [Sampling(9), Sampling(9, temperature=0.7, top_p=0.8, top_k=6), Sampling(9, temperature=0)])
def test_cache_and_left_padding_write_what_plain_asking_writes(name: str, how: Sampling) -> None:
    model = tiny(name)
    generated, asked = write(model, how), write(Asked(model), how)
    assert torch.equal(generated.tokens, asked.tokens)
    assert torch.equal(generated.lengths, asked.lengths)
    torch.testing.assert_close(generated.log_probs, asked.log_probs, rtol=0, atol=1e-5)
    assert len({tuple(row) for row in generated.tokens.tolist()}) > 1  # the prompt counts


def test_a_model_of_transformers_is_asked_for_one_token_at_a_time() -> None:
    """Training switches the cache off; writing 1024 tokens without it would cost five hundred times as much."""
    model, widths = tiny(), []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    write(model, Sampling(6))
    assert widths == [5, 1, 1, 1, 1, 1]
    assert model.config.use_cache is False


@pytest.mark.parametrize("wrap", [lambda model: model, Asked])
@pytest.mark.parametrize("rows", [[0], [2], [3, 1], [2, 0, 1]])
def test_other_rows_of_the_batch_change_no_text(wrap: Any, rows: list[int]) -> None:
    network, how = wrap(tiny()), Sampling(9, stop=(3, 4))
    whole, part = write(network, how), write(network, how, rows)
    for place, row in enumerate(rows):
        n = int(whole.lengths[row])
        assert int(part.lengths[place]) == n
        assert torch.equal(part.tokens[place, :n], whole.tokens[row, :n])
        torch.testing.assert_close(part.log_probs[place, :n], whole.log_probs[row, :n], rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrap", [lambda model: model, Asked])
def test_a_text_ends_with_its_first_stop_token(wrap: Any) -> None:
    network = wrap(tiny())
    free = write(network, Sampling(9))
    stop = (int(free.tokens[0, 2]), int(free.tokens[1, 0]))
    cut = write(network, Sampling(9, stop=stop), pad=12)
    for row in range(4):
        hits = [i for i, token in enumerate(free.tokens[row].tolist()) if token in stop]
        n = hits[0] + 1 if hits else 9
        assert int(cut.lengths[row]) == n
        assert torch.equal(cut.tokens[row, :n], free.tokens[row, :n])
        torch.testing.assert_close(cut.log_probs[row, :n], free.log_probs[row, :n], rtol=0, atol=1e-5)
        assert (cut.tokens[row, n:] == 12).all()
        assert (cut.log_probs[row, n:] == 0).all()
    assert cut.tokens.shape[1] == int(cut.lengths.max())


@pytest.mark.parametrize("wrap", [lambda model: model, Asked])
def test_writing_ends_when_every_text_has(wrap: Any) -> None:
    network = wrap(tiny())
    everything = write(network, Sampling(40, stop=tuple(range(V))))
    assert everything.tokens.shape == (4, 1)
    assert everything.lengths.tolist() == [1] * 4


@pytest.mark.parametrize(
    "how",
    [Sampling(8), Sampling(8, temperature=0.5), Sampling(8, temperature=1.3, top_k=4), Sampling(8, top_p=0.6), Sampling(8, temperature=0)],
)
def test_log_probabilities_are_those_of_the_distribution_drawn_from(how: Sampling) -> None:
    model = tiny()
    told = write(model, how)
    for row, prompt in enumerate(PROMPTS):
        expected = how.log_probs(said_after(model, prompt, told.tokens[row])).gather(-1, told.tokens[row][:, None])[:, 0]
        torch.testing.assert_close(told.log_probs[row], expected, rtol=0, atol=1e-5)
    assert told.log_probs.isfinite().all()


def test_truncation_by_hand() -> None:
    p = torch.tensor([0.4, 0.1, 0.3, 0.2])
    cases = {
        Sampling(): p,
        Sampling(top_k=2): torch.tensor([4, 0, 3, 0]) / 7,
        Sampling(top_k=9): p,
        Sampling(top_p=0.4): torch.tensor([1.0, 0, 0, 0]),  # the first token reaches it
        Sampling(top_p=0.41): torch.tensor([4, 0, 3, 0]) / 7,
        Sampling(top_p=0.75): torch.tensor([4, 0, 3, 2]) / 9,
        Sampling(top_k=3, top_p=0.5): torch.tensor([4, 0, 3, 0]) / 7,  # of the 3 that are left, 4/9 is not yet half
        Sampling(temperature=0): torch.tensor([1.0, 0, 0, 0]),
        Sampling(temperature=0.5): p.square() / p.square().sum(),
    }
    for how, expected in cases.items():
        torch.testing.assert_close(how.log_probs(p.log()[None]).exp()[0], expected.double(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("how", [Sampling(5), Sampling(5, temperature=0.6), Sampling(5, top_k=3), Sampling(5, top_p=0.7)])
def test_draws_follow_the_distribution(how: Sampling) -> None:
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0, -2.5, 0.8])
    rows = 4000
    told = complete(Constant(logits), [torch.tensor([1])] * rows, how, 9, torch.arange(rows), 0, CPU)
    expected = how.log_probs(logits[None]).exp()[0]
    counts = torch.bincount(told.tokens.flatten(), minlength=6).double()
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    chi2 = ((counts - 5 * rows * expected).square()[kept] / (5 * rows * expected[kept])).sum()
    assert chi2 < 16.7  # 99.5 % of a chi square with 5 degrees of freedom
    follows = torch.zeros(6, 6, dtype=torch.float64)  # no place of a text says anything of the next
    follows.index_put_((told.tokens[:, :-1].flatten(), told.tokens[:, 1:].flatten()), torch.ones(4 * rows).double(), accumulate=True)
    pairs = expected[:, None] * expected * 4 * rows
    kept = pairs > 0
    assert ((follows - pairs).square()[kept] / pairs[kept]).sum() < 60.3  # 99.5 % with 35


def test_greedy_takes_the_likeliest_token_and_its_probability_is_one() -> None:
    model = tiny()
    told = write(model, Sampling(7, temperature=0))
    for row, prompt in enumerate(PROMPTS):
        assert torch.equal(told.tokens[row], said_after(model, prompt, told.tokens[row]).argmax(-1))
    assert (told.log_probs == 0).all()
    assert torch.equal(told.tokens, write(model, Sampling(7, temperature=0), key=99).tokens)


@pytest.mark.parametrize("wrap", [lambda model: model, Asked])
def test_padding_of_a_vocabulary_is_never_drawn(wrap: Any) -> None:
    model = tiny()
    before = write(wrap(model), Sampling(9))
    with torch.no_grad():
        model.lm_head.weight[V:] = 100 * model.lm_head.weight[0]
    assert model.lm_head.weight.shape[0] == PADDED
    after = write(wrap(model), Sampling(9))
    assert int(after.tokens.max()) < V
    assert torch.equal(after.tokens, before.tokens)


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_the_ends_of_a_uniform_draw_tokens_that_can_be(u: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rng, "uniform", lambda key, ids, n: torch.full(ids.shape, u))
    logits = torch.tensor([-torch.inf, 0.0, -1.0, -torch.inf])
    told = complete(Constant(logits), [torch.tensor([1])], Sampling(1), 0, torch.tensor([0]), 0, CPU)
    assert told.tokens.item() == (1 if u == 0 else 2)
    assert told.log_probs.isfinite().all()


@pytest.mark.parametrize(
    "settings", [{"repetition_penalty": 3.0}, {"suppress_tokens": [0, 1, 2, 3, 4]}, {"eos_token_id": [1, 2, 3, 4, 5, 6]}]
)
def test_settings_that_a_published_model_brings_change_no_draw(settings: dict[str, Any]) -> None:
    model = tiny()
    plain = write(model, Sampling(9))
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    told = write(model, Sampling(9))
    assert torch.equal(told.tokens, plain.tokens)
    assert told.lengths.tolist() == [9] * 4
    assert {name: getattr(model.generation_config, name) for name in settings} == settings  # and stay the model's own


def test_key_and_ids_decide_every_draw_and_no_other_randomness_does() -> None:
    model = tiny()
    first = write(model, Sampling(9))
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = write(model, Sampling(9))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first.tokens, write(model, Sampling(9), key=6).tokens)
    other = complete(model, PROMPTS, Sampling(9), 5, IDS + 1, 0, CPU)
    assert (other.tokens != first.tokens).any(1).all()


def test_dropout_is_off_and_every_mode_is_given_back() -> None:
    model = tiny("gpt2", resid_pdrop=0.5)
    model.train()
    model.transformer.h[0].mlp.eval()  # frozen by someone who had a reason
    modes = [module.training for module in model.modules()]
    first, second = write(model, Sampling(6)), write(model, Sampling(6))
    assert torch.equal(first.tokens, second.tokens)
    assert [module.training for module in model.modules()] == modes


def test_completions_are_plain_tensors_without_gradient() -> None:
    model = tiny()
    told = write(model, Sampling(4))
    assert all(not t.requires_grad and not t.is_inference() for t in told)
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()
    F.embedding(told.tokens, torch.ones(V, 1, requires_grad=True)).sum().backward()  # autograd may keep them


@pytest.mark.parametrize("wrap", [lambda model: model, Asked])
def test_a_processor_sees_the_text_so_far_and_its_word_counts(wrap: Any) -> None:
    seen: list[Tensor] = []

    def only_rising(ids: Tensor, logits: Tensor) -> Tensor:
        seen.append(ids)
        return logits.masked_fill(torch.arange(V) != (len(seen) - 1) % V, -torch.inf)

    told = complete(wrap(tiny()), [torch.tensor([7, 8])], Sampling(5, processors=(only_rising,)), 0, torch.tensor([0]), 0, CPU)
    assert told.tokens.tolist() == [[0, 1, 2, 3, 4]]
    assert seen[3].tolist() == [[7, 8, 0, 1, 2]]
    assert (told.log_probs == 0).all()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"top_k": 0}, "top_k"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
    ],
)
def test_values_out_of_range_are_refused_by_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"{named}="):
        Sampling(**values)


def test_half_precision_logits_are_drawn_from_in_float64() -> None:
    told = complete(Constant(torch.tensor([0.1, 0.2]).bfloat16()), PROMPTS, Sampling(3), 0, IDS, 0, CPU)
    assert told.log_probs.dtype == torch.float64
    exact = F.log_softmax(torch.tensor([0.1, 0.2]).bfloat16().double(), -1)
    torch.testing.assert_close(told.log_probs, exact[told.tokens], rtol=1e-12, atol=0)


@pytest.mark.realdata
def test_a_published_model_writes_what_it_writes_by_itself() -> None:
    """Greedy, through its own `generate`, in sentences that are English."""
    transformers = pytest.importorskip("transformers")
    folder = Path(os.environ.get("KDRUN_DATA", "/nonexistent")) / "stories260k"
    if not folder.is_dir():
        pytest.skip("KDRUN_DATA names no folder with stories260k (a Llama of 260,000 weights, TinyStories)")
    words = Tokenized(transformers.AutoTokenizer.from_pretrained(folder))
    model = causal_lm(words.size, name=str(folder)).eval()
    prompts = [torch.tensor(words.encode(text)) for text in ("Once upon a time, there was a little girl", "The dog")]
    told = complete(model, prompts, Sampling(20, temperature=0), 0, torch.arange(2), words.pad, CPU)
    for prompt, text in zip(prompts, told.tokens, strict=True):
        own = model.generate(input_ids=prompt[None], max_new_tokens=20, do_sample=False, eos_token_id=None, use_cache=False)
        assert torch.equal(own[0, len(prompt) :], text)
    assert "named" in words.decode(told.tokens[0].tolist())


# -- two that write together, and rows that are written apart -------------------------------------------------------------


def together(one: nn.Module, other: nn.Module, sampling: Sampling, weight: float, rows: Sequence[int] = range(4)) -> Completions:
    return complete(one, [PROMPTS[i] for i in rows], sampling, 5, IDS[list(rows)], 0, CPU, Mixed(other, weight))


@pytest.mark.parametrize("how", [Sampling(9), Sampling(9, temperature=0.7, top_k=6), Sampling(9, stop=(3, 4))])
def test_a_mixture_is_the_same_however_each_network_is_read(how: Sampling) -> None:
    first, second = tiny("llama"), tiny("gpt2", seed=2)
    told = [together(a, b, how, 0.3) for a in (first, Asked(first)) for b in (second, Asked(second))]
    for other in told[1:]:
        assert torch.equal(other.tokens, told[0].tokens)
        assert torch.equal(other.lengths, told[0].lengths)
        torch.testing.assert_close(other.log_probs, told[0].log_probs, rtol=0, atol=1e-5)


def test_log_probabilities_of_a_mixture_are_those_of_the_mixture() -> None:
    first, second, how = tiny("llama"), tiny("gpt2", seed=2), Sampling(8, temperature=0.8)
    told = together(first, second, how, 0.2)
    for row, prompt in enumerate(PROMPTS):
        p, q = (how.log_probs(said_after(model, prompt, told.tokens[row])).exp() for model in (second, first))
        expected = (0.2 * p + 0.8 * q).log().gather(-1, told.tokens[row][:, None])[:, 0]
        torch.testing.assert_close(told.log_probs[row], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_at_its_ends_a_mixture_is_one_of_the_two(weight: float) -> None:
    first, second = tiny("llama"), tiny("gpt2", seed=2)
    mixed, alone = together(first, second, Sampling(9), weight), write(second if weight else first, Sampling(9))
    assert torch.equal(mixed.tokens, alone.tokens)
    torch.testing.assert_close(mixed.log_probs, alone.log_probs, rtol=0, atol=1e-5)


def test_a_mixture_draws_what_one_of_the_two_would_never_draw() -> None:
    """Truncated each by itself: a token that only the second keeps has a times its probability."""
    first, second = (Constant(torch.tensor(row)) for row in ([2.0, 0.0, 0.0], [0.0, 0.0, 2.0]))
    rows = 3000
    told = complete(first, [torch.tensor([1])] * rows, Sampling(1, top_k=1), 9, torch.arange(rows), 0, CPU, Mixed(second, 0.25))
    counts = torch.bincount(told.tokens.flatten(), minlength=3)
    assert int(counts[1]) == 0
    assert abs(int(counts[2]) / rows - 0.25) < 0.025  # three standard deviations
    assert set(told.log_probs.exp().flatten().round(decimals=9).tolist()) == {0.25, 0.75}


@pytest.mark.parametrize("wrap", [lambda model: model, Asked])
@pytest.mark.parametrize("mixed", [False, True])
def test_what_memory_holds_changes_no_text(wrap: Any, mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    network, how, widths = wrap(tiny()), Sampling(9, stop=(3, 4)), []
    ask = lambda: together(network, tiny("gpt2"), how, 0.5) if mixed else write(network, how)  # noqa: E731
    whole = ask()
    (network if wrap is Asked else network.model).register_forward_pre_hook(
        lambda module, args, named: widths.append(len(args[0] if args else named["input_ids"])), with_kwargs=True
    )
    for bound in ("LOGITS_AT_ONCE", "KEPT_AT_ONCE"):
        with monkeypatch.context() as patch:
            patch.setattr(f"kdrun.student.generate.{bound}", 1)
            parts = ask()
        assert torch.equal(parts.tokens, whole.tokens)
        assert torch.equal(parts.lengths, whole.lengths)
        torch.testing.assert_close(parts.log_probs, whole.log_probs, rtol=0, atol=1e-5)
        assert bound == "KEPT_AT_ONCE" or set(widths) == {1}


def test_of_a_large_vocabulary_only_the_last_place_is_counted() -> None:
    """A hundred rows of 150,000 tokens: with logits of every place it would be one."""
    assert _rows_at_once(Asked(tiny()), 100) == LOGITS_AT_ONCE // (V * 100)
    model = tiny()
    model.vocabulary = 150_000
    assert _rows_at_once(model, 4000) == 111
    model.config.num_hidden_layers, model.config.head_dim, model.config.num_key_value_heads = 32, 128, 8
    assert _rows_at_once(model, 4096) == 8  # 2 x 32 x 8 x 128 x 4096 numbers each


def test_a_recurrent_model_is_asked_anew() -> None:
    torch.manual_seed(0)
    model = causal_lm(V, config={"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 1, "state_size": 4, "vocab_size": PADDED})
    told, plain = together(model, model, Sampling(5), 0.5), write(Asked(model), Sampling(5))
    assert torch.equal(told.tokens, plain.tokens)
