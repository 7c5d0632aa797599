"""Every model of timm by its name (https://github.com/huggingface/pytorch-image-models)."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

from kdrun.errors import Problem, Refused, did_you_mean


def create(name: str, num_classes: int, in_chans: int = 3, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The timm model `name`, its head made for `num_classes` and its stem for `in_chans`. `kwargs` go to the model.

    Raises `kdrun.errors.Refused` for a name or argument that timm does not know, and for pretrained weights that cannot be had.
    """
    if not timm.is_model(name):
        raise Refused(Problem(f"timm has no model {name!r}", key="name", remedy=did_you_mean(name, timm.list_models())))
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans, **kwargs)
    except TypeError as error:
        what = f"timm's {name} refuses an argument: {error}"
        raise Refused(Problem(what, remedy="leave that argument out, or correct its name")) from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        what = f"the pretrained weights of timm's {name} cannot be had: {error}"
        raise Refused(Problem(what, key="pretrained", remedy="pretrained=false, and checkpoint=<a local file with the weights>")) from error
