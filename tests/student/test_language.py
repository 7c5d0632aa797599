"""Causal language models of transformers: what is built, what is refused, what is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from kdrun.dataset.tokens import POSITIONS
from kdrun.errors import Refused
from kdrun.student.build import build
from kdrun.student.language import causal_lm, has_plain_head, head_of, hidden_states
from kdrun.student.taps import Tapped, ask, model_spec, reads_tokens, zeros_for
from kdrun.student.weights import load_weights, save_student
from tests.dataset.texts import GPT2, LLAMA, MODELS, PADDED, V, batch_of, samples, tiny

LORA = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
CAPPED: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 4, "final_logit_softcapping": 30.0},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.25},
}


def capped(kind: str) -> Any:
    torch.manual_seed(0)
    return causal_lm(V, config={**LLAMA, "model_type": kind, **CAPPED[kind]})


def x_of(length: int = 6) -> Tensor:
    return torch.arange(length)[None] % V


def problem(**arguments: Any) -> tuple[str, str, str]:
    """(key, what, remedy) of the refusal."""
    with pytest.raises(Refused) as caught:
        causal_lm(V, **arguments)
    (found,) = caught.value.problems
    assert found.remedy
    return found.key, found.what, found.remedy


def folder_of(network: Any, folder: Path) -> str:
    network.save_pretrained(folder)
    return str(folder)


# -- what it says -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_padding_of_the_matrix_is_cut_before_anything_sees_it(name: str) -> None:
    network = tiny(name)
    batch = batch_of([samples([7])])
    whole = network(batch.inputs, position_ids=batch.extra[POSITIONS]).logits
    assert whole.shape[-1] == PADDED
    assert torch.equal(ask(network, batch), whole[..., :V])
    assert torch.equal(Tapped(network, {})(batch.inputs, batch.extra)[0], whole[..., :V])
    assert model_spec(network, (6,), {}).output == (6, V)
    weight, bias = head_of(network)
    assert weight.shape == (V, 8)
    assert bias is None


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_hidden_states_times_the_head(name: str) -> None:
    network, batch = tiny(name), batch_of([samples([7, 4])])
    assert has_plain_head(network)
    hidden = hidden_states(network, batch.inputs, **{POSITIONS: batch.extra[POSITIONS]})
    torch.testing.assert_close(F.linear(hidden, *head_of(network)), ask(network, batch), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", CAPPED)
def test_a_head_that_caps_or_scales_is_not_plain(kind: str) -> None:
    network = capped(kind)
    product = F.linear(hidden_states(network, x_of()), *head_of(network))
    assert not torch.allclose(product, network(x_of()).logits[..., :V], rtol=1e-3)
    assert not has_plain_head(network)


def test_a_layer_before_the_head_or_an_adapter_on_it_is_not_plain() -> None:
    network = tiny()
    network.set_output_embeddings(nn.Sequential(network.get_output_embeddings()))
    assert not has_plain_head(network)
    network = tiny()
    forward = network.forward
    network.forward = lambda *a, **k: type("Said", (), {"logits": forward(*a, **k).logits * 2})
    assert not has_plain_head(network)
    assert not has_plain_head(causal_lm(V, config=LLAMA, lora={**LORA, "target_modules": ["lm_head"]}))
    assert has_plain_head(causal_lm(V, config=LLAMA, lora=LORA))


def test_asking_about_the_head_leaves_mode_and_random_state() -> None:
    network = tiny("gpt2", embd_pdrop=0.5).train()
    before = torch.get_rng_state()
    assert has_plain_head(network)
    assert network.training
    assert torch.equal(torch.get_rng_state(), before)


def test_it_looks_back_only() -> None:
    network, x = tiny(), x_of()
    changed = x.clone()
    changed[0, 4] = 11
    assert torch.equal(network(changed).logits[:, :4], network(x).logits[:, :4])
    assert not torch.equal(network(changed).logits[:, 4], network(x).logits[:, 4])


def test_zeros_for_a_language_model_are_ids() -> None:
    network = tiny()
    assert reads_tokens(network)
    assert zeros_for(network, (6,), 2).dtype == torch.int64
    assert zeros_for(nn.Linear(3, 2).half(), (3,), 2).dtype == torch.float16


# -- what is built ----------------------------------------------------------------------------------------------------


def test_a_configuration_makes_fresh_weights_for_the_vocabulary() -> None:
    torch.manual_seed(3)
    one = causal_lm(V, config={k: v for k, v in LLAMA.items() if k != "vocab_size"})
    torch.manual_seed(3)
    again = causal_lm(V, config={k: v for k, v in LLAMA.items() if k != "vocab_size"})
    assert one.get_input_embeddings().num_embeddings == one.ids == one.vocabulary == V
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert (one.config.bos_token_id, one.config.eos_token_id, one.config.pad_token_id) == (None, None, None)
    assert causal_lm(V, config=LLAMA).ids == PADDED


@pytest.mark.parametrize("kind", MODELS)  # the head of gpt2 is its embedding, and not in the file
def test_a_folder_gives_its_weights_or_its_shape(kind: str, tmp_path: Path) -> None:
    name = folder_of(tiny(kind).float(), tmp_path)
    loaded, fresh = causal_lm(V, name=name), causal_lm(V, name=name, pretrained=False)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), tiny(kind).float().parameters(), strict=True))
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in loaded.parameters()]
    assert not torch.equal(fresh.lm_head.weight, loaded.lm_head.weight)
    changed = {"llama": "attention_dropout", "gpt2": "attn_pdrop"}[kind]
    assert getattr(causal_lm(V, name=name, config={changed: 0.25}).config, changed) == 0.25


@pytest.mark.parametrize(("dtype", "wanted"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_have_the_dtype_that_is_asked_for(dtype: str, wanted: torch.dtype) -> None:
    assert {p.dtype for p in causal_lm(V, config=LLAMA, dtype=dtype).parameters()} == {wanted}


def test_attention_is_the_implementation_that_is_asked_for() -> None:
    assert causal_lm(V, config=LLAMA, attention="eager").config._attn_implementation == "eager"


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_student_loads_in_plain_transformers(name: str, tmp_path: Path) -> None:
    network = tiny(name).float()
    save_student(network, tmp_path / "student.safetensors")
    state = load_file(tmp_path / "student.safetensors")
    plain = AutoModelForCausalLM.from_config(network.config)
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    assert torch.equal(plain(x_of()).logits, network(x_of()).logits)


# -- adapters ---------------------------------------------------------------------------------------------------------


def adapted(config: dict[str, Any] = LLAMA, seed: int = 0) -> Any:
    """A model whose adapters have learned something."""
    torch.manual_seed(seed)
    network = causal_lm(V, config=config, lora=LORA)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return network


def test_lora_trains_its_adapters_alone() -> None:
    network = causal_lm(V, config=LLAMA, lora=LORA)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert {name.split(".")[4] for name in trained} == {f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")}
    frozen = {name: p.detach().clone() for name, p in network.named_parameters() if name not in trained}
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 1.0)
    network(x_of(), labels=x_of()).loss.backward()
    optimizer.step()
    assert all(torch.equal(p, frozen[name]) for name, p in network.named_parameters() if name in frozen)


def test_fresh_adapters_change_nothing() -> None:
    torch.manual_seed(0)
    plain = causal_lm(V, config=LLAMA)
    torch.manual_seed(0)
    assert torch.equal(causal_lm(V, config=LLAMA, lora=LORA)(x_of()).logits, plain(x_of()).logits)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_student_with_adapters_is_saved_merged(config: dict[str, Any], tmp_path: Path) -> None:
    network = adapted(config)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    save_student(network, tmp_path / "student.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    plain = AutoModelForCausalLM.from_config(network.config)
    plain.load_state_dict(load_file(tmp_path / "student.safetensors"))
    torch.testing.assert_close(plain(x_of()).logits, network(x_of()).logits, rtol=1e-4, atol=1e-4)
    other = adapted(config, seed=1)
    load_weights(other, tmp_path / "student.safetensors")
    torch.testing.assert_close(other(x_of()).logits, network(x_of()).logits, rtol=1e-4, atol=1e-4)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_unknown_names_are_refused_with_the_nearest() -> None:
    key, what, remedy = problem(config={**LLAMA, "model_type": "lama"})
    assert (key, "lama" in what, "llama" in remedy) == ("config.model_type", True, True)
    key, what, remedy = problem(config={"model_type": "resnet"})
    assert (key, "no causal language model" in what) == ("config.model_type", True)
    key, what, remedy = problem(config=LLAMA, dtype="bf61")
    assert (key, "bf16" in remedy) == ("dtype", True)
    key, what, remedy = problem(config={**LLAMA, "hiden_size": 8})
    assert (key, "hidden_size" in remedy) == ("config.hiden_size", True)
    key, what, remedy = problem(config=LLAMA, attention="spda")
    assert (key, "sdpa" in remedy) == ("attention", True)


@pytest.mark.parametrize("changes", [{"hidden_size": "wide"}, {"num_attention_heads": 3}])
def test_settings_that_make_no_model_are_refused_in_transformers_words(changes: dict[str, Any]) -> None:
    key, what, _ = problem(config={**LLAMA, **changes})
    assert key == "config"
    assert "hidden" in what


def test_no_name_and_no_configuration_is_refused() -> None:
    assert problem() == ("name", "no language model is named", "name=<hub name or folder>, or config.model_type=llama with its sizes")


def test_a_folder_that_is_not_there_or_has_no_weights_is_refused(tmp_path: Path) -> None:
    assert problem(name=str(tmp_path / "nowhere"))[0] == "name"
    tiny().config.save_pretrained(tmp_path)
    assert problem(name=str(tmp_path))[0] == "name"


def test_weights_that_would_be_made_up_are_refused(tmp_path: Path) -> None:
    """transformers only warns where a file lacks tensors of the model, and goes on with random ones."""
    network = tiny().float()
    state = {name: tensor for name, tensor in network.state_dict().items() if "lm_head" not in name}
    network.save_pretrained(tmp_path, state_dict=state)
    key, what, _ = problem(name=str(tmp_path))
    assert (key, "lm_head.weight" in what) == ("name", True)
    folder_of(network, tmp_path)
    assert problem(name=str(tmp_path), config={"hidden_size": 16})[0] == "config"


def test_a_matrix_smaller_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    key, what, remedy = problem(config={**LLAMA, "vocab_size": V - 1})
    assert (key, what) == ("name", f"its matrix has {V - 1} rows, the data's tokenizer has {V} tokens")
    assert "dataset.tokenizer" in remedy


def test_code_of_a_repository_runs_only_when_it_is_trusted(tmp_path: Path) -> None:
    name = folder_of(tiny().float(), tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    described |= {"model_type": "mine", "auto_map": {"AutoConfig": "their_config.Mine", "AutoModelForCausalLM": "their_model.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(described))
    ran = tmp_path / "ran"
    head = "from transformers import LlamaConfig\n"
    (tmp_path / "their_config.py").write_text(f"{head}open({str(ran)!r}, 'w')\nclass Mine(LlamaConfig):\n    model_type = 'mine'\n")
    (tmp_path / "their_model.py").write_text("from transformers import LlamaForCausalLM\nclass Model(LlamaForCausalLM):\n    pass\n")
    key, _, remedy = problem(name=name)
    assert (key, remedy) == ("name", "trust_remote_code=true, if you trust the code of that repository")
    assert not ran.exists()
    assert problem(name=name, pretrained=False)[2] == remedy
    assert not ran.exists()


@pytest.mark.parametrize(
    ("lora", "key"),
    [
        ({"rank": 2}, "lora"),
        ({"r": 2, "target_modules": ["q_prj"]}, "lora"),
        ({**LORA, "use_dora": True}, "lora.use_dora"),
        ({**LORA, "modules_to_save": ["lm_head"]}, "lora.modules_to_save"),
    ],
)
def test_adapters_that_cannot_be_are_refused(lora: dict[str, Any], key: str) -> None:
    assert problem(config=LLAMA, lora=lora)[0] == key


def test_a_refusal_says_where_in_the_configuration_it_is() -> None:
    node = {"_target_": "kdrun.student.language.causal_lm", "config": {**LLAMA, "model_type": "lama"}}
    with pytest.raises(Refused, match=r"^teacher\.config\.model_type: "):
        build(node, V, (6,), key="teacher")
