"""VGG in directories of Hugging Face as timm writes them: settings, and where leaves lie."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kd.io.torch_weights import LEAVES, Find, Part, kernel_axes
from kd.models.vgg_features import VGGFeatures

_OTHERS = r'^(pre_logits|head|classifier)\.'


def arguments(config: Mapping[str, Any], tensors: Any, where: Any) -> dict[str, Any]:
    """What `VGGFeatures` takes, which is that of sixteen layers."""
    del config, tensors, where
    return {}


def find(of: VGGFeatures, tensors: Iterable[str], where: Any) -> tuple[Find, str]:
    """Where each leaf lies, and an expression for what is left over, the classifier."""
    del of, tensors, where

    def found(keys: tuple[str, ...], shape: tuple[int, ...]) -> Part:
        module, leaf = keys[-2:]
        axes = kernel_axes(len(shape)) if leaf == 'kernel' else None
        return Part(f'{module.replace("_", ".")}.{LEAVES[leaf]}', axes)

    return found, _OTHERS
