"""A critic is a language model's body with another head."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdrun.losses.divergence import cross_entropy
from kdrun.student.critic import LAST, TextCritic, log_odds, text_critic
from kdrun.student.language import causal_lm
from kdrun.student.taps import model_spec
from kdrun.student.window import WindowLM

CONFIG = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 8, "tie_word_embeddings": False}
NODE = {"_target_": "kdrun.student.language.causal_lm", "config": CONFIG, "pretrained": True}
ROWS = torch.tensor([[1, 2, 3, 0, 0], [4, 5, 0, 0, 0], [6, 7, 8, 9, 1]])
ENDS = torch.tensor([2, 1, 4])


def critic(**more: object) -> TextCritic:
    torch.manual_seed(0)
    made = text_critic(2, 11, NODE, **more)  # type: ignore[arg-type]
    assert isinstance(made, TextCritic)
    return made.eval()


def test_its_bias_says_the_prior() -> None:
    """log(.77 / .23) = 1.208311, the released bias; with zero weights it says .77."""
    assert log_odds(0.77) == pytest.approx(1.208311, abs=5e-7)
    network = critic(prior=0.77)
    with torch.no_grad():
        network.head[-1].weight.zero_()  # type: ignore[union-attr, operator]
        said = network(ROWS, ENDS).softmax(1)[:, 1]
    torch.testing.assert_close(said, torch.full((3,), 0.77))
    for prior in (0.0, 1.0):
        with pytest.raises(ValueError, match="legal range"):
            log_odds(prior)


def test_cross_entropy_of_what_it_says_is_binary_cross_entropy_also_far_out() -> None:
    z = torch.tensor([-2000.0, -3.0, 0.0, 2.5, 500.0, 40.0], requires_grad=True)
    y = torch.tensor([0, 1, 1, 0, 0, 1])
    ours = cross_entropy(torch.stack([torch.zeros_like(z), z], 1), y)
    torch.testing.assert_close(ours, F.binary_cross_entropy_with_logits(z, y.float(), reduction="none"))
    (slope,) = torch.autograd.grad(ours.sum(), z)
    torch.testing.assert_close(slope, z.detach().sigmoid() - y)


def test_padding_changes_no_score() -> None:
    network = critic()
    padded = network(ROWS, ENDS)
    for row, end, said in zip(ROWS, ENDS, padded, strict=True):
        torch.testing.assert_close(network(row[None, : end + 1], end[None])[0], said)
    torch.testing.assert_close(network(torch.where(ROWS == 0, 10, ROWS), ENDS), padded)


def test_it_begins_as_the_language_model_without_its_output_layer() -> None:
    torch.manual_seed(5)
    teacher: nn.Module = causal_lm(11, config=dict(CONFIG))
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    network = critic()
    network.begin_as(teacher)
    body = network.body.state_dict()
    assert {name.removeprefix("transformer.") for name in before} - body.keys() == {"lm_head.weight"}
    assert all(torch.equal(body[name], before[f"transformer.{name}"]) for name in body)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_models_of_its_own_kind_can_be_critics_too() -> None:
    window = {"_target_": "kdrun.student.window.WindowLM", "contexts": 5, "hidden": 8}
    network = text_critic(2, 11, window)
    assert isinstance(network, TextCritic)
    network.begin_as(WindowLM(11, contexts=5, hidden=8))
    rows = ROWS.clone()
    rows[:, 0] = torch.tensor([11, 13, 15])  # conditioning tokens
    assert network(rows, ENDS).shape == (3, 2)


def test_shapes_can_be_traced_and_a_hidden_layer_trained() -> None:
    network = critic(hidden=512, dropout=0.1)
    assert model_spec(network, (5,), {}).classes == 2
    assert [type(layer) for layer in network.head] == [nn.Dropout, nn.Linear, nn.GELU, nn.Dropout, nn.Linear]
    assert network.takes == (LAST,)
    network.train()
    loss: Tensor = cross_entropy(network(ROWS, ENDS), torch.tensor([0, 1, 1])).sum()
    loss.backward()
    assert all(p.grad is not None and math.isfinite(p.grad.norm()) for p in network.parameters())


def test_three_classes_are_no_critic() -> None:
    with pytest.raises(ValueError, match="wrong and right"):
        text_critic(3, 11, NODE)
