"""Low-rank adapters (LoRA, ICLR 2022, arXiv 2106.09685) inside a network's layers, and the plain network that they come to.

A network with adapters stays of its own class; a layer that has some keeps its weights under `base_layer`. What is saved are the merged
weights by the plain network's names, and such a file can be loaded under fresh adapters.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

BASE = "base_layer"
NEUTRAL = ("lora_B", "lora_embedding_A")  # the factors that are 0 in a fresh adapter


def is_adapted(network: nn.Module) -> bool:
    return any(hasattr(module, BASE) for module in network.modules())


def plain_name(name: str) -> str | None:
    """What a tensor is called in the network without adapters; None for an adapter's own."""
    words = name.split(".")
    return None if any(word.startswith("lora_") for word in words) else ".".join(word for word in words if word != BASE)


def plain_state(network: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain network that does the same. The network itself stays as it is."""
    if not is_adapted(network):
        return network.state_dict()
    merged = copy.deepcopy(network)
    for module in list(merged.modules()):
        if hasattr(module, BASE):
            module.merge()  # type: ignore[operator]
    return {plain: tensor for name, tensor in merged.state_dict().items() if (plain := plain_name(name)) is not None}


def as_adapted(network: nn.Module, plain: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a network that does what a plain one with these tensors does: under adapters without an effect."""
    found = {}
    for name, tensor in network.state_dict().items():
        own = plain_name(name)
        neutral = any(word in NEUTRAL for word in name.split("."))
        found[name] = torch.zeros_like(tensor) if neutral else tensor if own is None else plain.get(own, tensor)
    return found
