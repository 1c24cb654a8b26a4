"""A live torch module as an encoder: a frozen float32 copy, so that the module itself stays unchanged."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from harness.core import Encoder, Preprocessing
from harness.encoders.create import known_preprocessing, wrap
from harness.encoders.identity import Identity
from harness.encoders.positions import position_rule
from harness.encoders.preprocessing import IMAGENET, at_side, decide
from harness.encoders.resize import one_line
from harness.encoders.spec import EncoderSpec, check_name, parse_preprocessing
from harness.encoders.vit import is_vit
from harness.errors import EncoderError, nearest

FAMILY = "live module"
KEYS = ("module", "name", "preprocessing")
EXPECTED = (
    "expected a vision transformer of timm's making, or a network with forward_features(images), which gives a feature map [B, D, h, w], "
    "such as timm's"
)


def parse_live(value: nn.Module | Mapping[str, Any]) -> tuple[nn.Module, EncoderSpec]:
    """The network and its spec (name and preprocessing), from a module or from a mapping {module, name, preprocessing}.

    Raises EncoderError where the mapping has other keys, or values of a wrong type.
    """
    entry = value if isinstance(value, Mapping) else {"module": value}
    module = entry["module"]
    if not isinstance(module, nn.Module):
        raise EncoderError(f"encoder: module must be a torch module, got {type(module).__name__}; give a name or a checkpoint without `module`")
    network = _unwrapped(module)
    name = entry.get("name", type(network).__name__)
    if not isinstance(name, str) or not name.strip():
        raise EncoderError(f"an encoder's name must be text, got {name!r}; give it a name such as mine")
    check_name(name)
    for key in entry:
        if key not in KEYS:
            raise EncoderError(f"encoder {name}: unknown key {key!r} of a live module; known keys: {', '.join(KEYS)}{nearest(str(key), KEYS)}")
    preprocessing = parse_preprocessing(entry.get("preprocessing"), f"encoder {name}: preprocessing")
    return network, EncoderSpec(name=name, preprocessing=preprocessing)


def build_live(module: nn.Module, spec: EncoderSpec) -> Encoder:
    """The encoder around a copy of `module` on the CPU, without its classifier. Raises EncoderError where its layout is not recognised."""
    network = _copied(module, spec.name)
    if not is_vit(network) and not callable(getattr(network, "forward_features", None)):
        raise EncoderError(f"encoder {spec.name}: {EXPECTED}, got a {type(network).__name__} without either; wrap it in a module that has one")
    try:
        if getattr(network, "num_classes", 0) and callable(getattr(network, "reset_classifier", None)):
            network.reset_classifier(0)  # type: ignore[operator]
        encoder = wrap(network, _identity(network, spec))
    except EncoderError:
        raise
    except Exception as error:  # a foreign module may have timm's names and other contents
        raise EncoderError(f"encoder {spec.name}: {EXPECTED}, got a {type(network).__name__} that fails with {one_line(error)}") from error
    encoder.module.eval().requires_grad_(False)
    return encoder


def _identity(network: nn.Module, spec: EncoderSpec) -> Identity:
    config: Any = getattr(network, "pretrained_cfg", None) or {}
    architecture = config.get("architecture") or type(network).__name__
    source = "by default, ImageNet's, as a live module does not say how its images are prepared"
    return Identity(
        name=spec.name,
        family=FAMILY,
        architecture=architecture,
        source=f"a live {type(network).__name__}",
        preprocessing=decide(spec, _imagenets(network), source),
        position_resize=position_rule(architecture, "", network.state_dict()),
    )


def _imagenets(network: nn.Module) -> Preprocessing:
    """ImageNet's preprocessing at the size that the network was built for, 224 px where it does not say."""
    size = getattr(getattr(network, "patch_embed", None), "img_size", None)
    if isinstance(size, tuple | list) and len(size) == 2:
        return at_side(IMAGENET, (int(size[0]), int(size[1])))
    return known_preprocessing(network, type(network).__name__, published=False)[0]


def _unwrapped(module: nn.Module) -> nn.Module:
    """The network itself, without the wrappers of torch.compile, DataParallel and DistributedDataParallel."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return _unwrapped(module.module)
    compiled = getattr(module, "_orig_mod", None)
    return _unwrapped(compiled) if isinstance(compiled, nn.Module) else module


def _copied(module: nn.Module, name: str) -> nn.Module:
    try:
        with torch.no_grad():
            return copy.deepcopy(module).cpu().float().eval()
    except Exception as error:
        raise EncoderError(
            f"encoder {name}: expected a module that copy.deepcopy can copy, got a {type(module).__name__} that fails with {one_line(error)}; "
            "save its weights and give them as a checkpoint"
        ) from error
