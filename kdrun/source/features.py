"""Features for data whose pixels tell little of density: of a fixed pretrained network, or principal components."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kdrun.errors import Problem, Refused, did_you_mean

PCA_NAME = "pca"  # where the name of a network could stand


def principal_components(rows: NDArray[np.float64], count: int) -> Callable[[Tensor], Tensor]:
    """Inputs [B, ...] -> float64 [B, K], their projections on the first `count` principal components of `rows` [N, D] (fewer where there
    are fewer), in the scale of the inputs."""
    from sklearn.decomposition import PCA

    found = PCA(min(count, *rows.shape), svd_solver="full").fit(rows)
    return lambda inputs: torch.from_numpy(found.transform(inputs.flatten(1).double().cpu().numpy()))


def timm_features(
    name: str, pretrained: bool, mean: Sequence[float], std: Sequence[float], device: torch.device, key: str
) -> Callable[[Tensor], Tensor]:
    """Images [B, C, H, W], normalised with `mean` and `std` per channel -> pooled features [B, D] of a model of timm.

    Grey images are repeated over the model's channels; all are resized and normalised as the model was trained. Raises `Refused` for a
    model that timm does not have or vectors instead of images. `key`: its place in the configuration.
    """
    import timm
    from timm.data import resolve_model_data_config

    if not timm.is_model(name.partition(".")[0]):
        raise Refused(Problem(f"timm has no model named '{name}'", key, "", did_you_mean(name, timm.list_models())))
    network = timm.create_model(name, pretrained=pretrained, num_classes=0).to(device).eval()
    wants = resolve_model_data_config(network)
    channels, height, width = wants["input_size"]

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=device).view(1, -1, 1, 1)

    def extract(inputs: Tensor) -> Tensor:
        pixels = (inputs * column(std) + column(mean)).expand(-1, channels, -1, -1)
        resized = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True, align_corners=False)
        return network((resized - column(wants["mean"])) / column(wants["std"]))

    return extract
