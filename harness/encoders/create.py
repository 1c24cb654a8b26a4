"""timm's networks: created by name, with random weights from a seed, and with the preprocessing that timm records for them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, Literal

import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn

from harness.core import Encoder, Preprocessing
from harness.encoders.identity import Identity
from harness.encoders.map import MapEncoder
from harness.encoders.preprocessing import IMAGENET, at_side, differences
from harness.encoders.resize import one_line
from harness.encoders.spec import Option, PreprocessingOverride
from harness.encoders.vit import VitEncoder, is_vit
from harness.errors import EncoderError, nearest

Options = Iterable[tuple[str, Option]]


def check_architecture(name: str) -> None:
    """Raise EncoderError, with the nearest name, where timm has no such architecture or no such tag of it."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise EncoderError(f"unknown timm architecture {architecture!r}{nearest(architecture, timm.list_models())}; timm.list_models() lists them")
    tags = [model.partition(".")[2] for model in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        listed = ", ".join(tags) or "none"
        raise EncoderError(f"unknown tag {tag!r} of timm architecture {architecture}: expected one of {listed}{nearest(tag, tags)}")


def tag_of(name: str) -> str:
    """The tag of timm's weights for a model's name, the default tag where the name has none; empty where timm publishes none."""
    return name.partition(".")[2] or getattr(timm.get_pretrained_cfg(name), "tag", None) or ""


def create(
    architecture: str,
    options: Options = (),
    *,
    seed: int = 0,
    device: Literal["cpu", "meta"] = "cpu",
    classes: int | None = 0,
    model: str | None = None,
    **keywords: Any,
) -> nn.Module:
    """timm's network, its weights drawn at `seed` without a change to the global random state.

    `classes` is the width of its classifier: 0 for none, None for that of its published weights. `model` is timm's name for it where that is not the
    architecture's own. Raises EncoderError where the name is unknown or the options do not fit.
    """
    check_architecture(architecture)
    given = dict(options)
    if timm.models.model_entrypoint(architecture.partition(".")[0]).__module__.endswith(".eva"):
        given.setdefault("dynamic_img_size", True)  # otherwise its rotary positions are those of one fixed grid
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(seed)
            network: nn.Module = timm.create_model(model or architecture, num_classes=classes, **given, **keywords)
    except Exception as error:  # timm checks few of its arguments: any exception may come
        described = ", ".join(f"{key}={value}" for key, value in given.items()) or "no options"
        raise EncoderError(f"timm architecture {architecture} with {described}: {one_line(error)}; check the options") from error
    return network.eval()


def describe_architecture(architecture: str, options: Iterable[tuple[str, object]]) -> str:
    """The architecture with its options: what decides the forward pass besides the weights."""
    given = ", ".join(f"{key}={value}" for key, value in sorted(options))
    return f"{architecture}({given})" if given else architecture


def fair_residuals(network: nn.Module) -> int:
    """Set residual branches that start (nearly) silent to full strength, and return how many scales were set.

    LayerScale starts at 1e-5 or so, the last batch norm of a residual block and NFNet's last gain at 0: trained networks outgrow this, a random twin
    cannot, and its features would hardly depend on the image.
    """
    changed = 0
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            *_, owner, last = ("", *name.split("."))
            scale = re.match(r"gamma|layer_scale|ls\d+$", last) is not None or owner.startswith("layer_scale")
            silent = (last.endswith("gain") or (last == "weight" and parameter.ndim == 1)) and not parameter.any()
            if scale or silent:
                parameter.fill_(1.0)
                changed += 1
    return changed


def create_random(architecture: str, options: Options, seed: int, *, model: str | None = None) -> tuple[nn.Module, tuple[str, ...]]:
    """A random twin of an architecture, and its notes."""
    network = create(architecture, options, seed=seed, model=model)
    changed = fair_residuals(network)
    note = f"random weights, seed {seed}" + (f", {changed} residual scales set to 1" if changed else "")
    return network, (note,)


def known_preprocessing(network: nn.Module, name: str, options: Options = (), *, published: bool = True) -> tuple[Preprocessing, str]:
    """The preprocessing of a network of timm, at the img_size of `options` if given, and where it comes from, in words.

    Weights that `name` identifies, by timm's tag or a hub's id, have the preprocessing that timm records. An architecture alone identifies none: its
    weights are assumed to be trained as self-supervised ViTs are, with ImageNet's mean and standard deviation, at the architecture's default size.
    """
    preprocessing, notes = _kept_by_timm(network)
    built_for = dict(options).get("img_size")
    if published or "." in name:
        values = preprocessing if built_for is None else _at_size(preprocessing, built_for)
        config = f"config.json of {name}" if name.startswith("hf-hub:") else f"timm's for {_tagged(network, name)}"
        return values, f"{config} ({', '.join(notes)})" if notes else config
    values = at_side(IMAGENET, preprocessing.size if built_for is None else _pair(built_for))
    other = differences(preprocessing)
    return values, "by default, ImageNet's" + (f" (the weights that timm publishes for {name} have {other})" if other else "")


def _tagged(network: nn.Module, name: str) -> str:
    """`name` with the tag that timm takes where it has none."""
    tag = getattr(network, "pretrained_cfg", {}).get("tag")
    return name if "." in name or not tag else f"{name}.{tag}"


def _kept_by_timm(network: nn.Module) -> tuple[Preprocessing, list[str]]:
    """The preprocessing that timm records for a network, and notes on what is not followed."""
    config = resolve_model_data_config(network)
    _, height, width = config["input_size"]
    notes = []
    interpolation = config["interpolation"]
    if interpolation not in ("bicubic", "bilinear"):
        notes.append(f"bicubic in place of {interpolation}")
        interpolation = "bicubic"
    if config["crop_mode"] != "center":
        notes.append(f"centre crop in place of {config['crop_mode']}")
    preprocessing = Preprocessing(
        size=(height, width),
        resize=math.floor(min(height, width) / config["crop_pct"]),
        interpolation=interpolation,
        mean=_triple(config["mean"]),
        std=_triple(config["std"]),
    )
    return preprocessing, notes


def _at_size(base: Preprocessing, size: Option) -> Preprocessing:
    """`base` for crops of a side, or of [height, width], in pixels, with the same crop share of the resized image."""
    return PreprocessingOverride(size=_pair(size)).apply(base)


def _pair(size: Option) -> tuple[int, int]:
    height, width = size if isinstance(size, tuple) else (size, size)
    return int(height), int(width)  # type: ignore[arg-type]


def wrap(trunk: nn.Module, identity: Identity, projector: nn.Module | None = None) -> Encoder:
    """The encoder around a network: a token encoder where the network has tokens, else one around its feature map."""
    if is_vit(trunk):
        return VitEncoder(trunk, identity, projector)
    return MapEncoder(trunk, identity, projector)


def _triple(values: Iterable[float]) -> tuple[float, float, float]:
    first, second, third = values
    return (float(first), float(second), float(third))
