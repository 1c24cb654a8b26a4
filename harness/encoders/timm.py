"""Any model of timm, with its published weights or random ones, and Hugging Face Hub models through timm."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import nn

from harness.core import Encoder, LoadReport
from harness.encoders._create import create, create_random, describe_architecture, timm_preprocessing, wrap
from harness.encoders._digest import file_sha256
from harness.encoders._identity import Identity
from harness.encoders._positions import PositionResize
from harness.encoders._resize import one_line
from harness.encoders._spec import EncoderSpec
from harness.errors import EncoderError

FAMILY = "timm"
DESCRIPTION = "any model of timm: timm:<model>[.<tag>] or hf-hub:<id> with published weights, {architecture: <model>, random: true} without"

_TIMM, _HUB = "timm:", "hf-hub:"
_WEIGHT_FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")


def names() -> dict[str, str]:
    """None: timm has its own list (timm.list_pretrained())."""
    return {}


def claims(spec: EncoderSpec) -> bool:
    """`timm:` and `hf-hub:` names, and bare architectures with random weights."""
    if spec.encoder is None:
        return spec.random
    return spec.encoder.startswith((_TIMM, _HUB)) and (spec.checkpoint is None or spec.random)


def build(spec: EncoderSpec) -> Encoder:
    """The model with its published weights, or its random twin. Raises EncoderError where the weights cannot be had."""
    name = spec.architecture if spec.encoder is None else spec.encoder.removeprefix(_TIMM)
    assert name is not None
    report = None
    if spec.checkpoint is not None:
        raise EncoderError(f"encoder {spec.name}: both checkpoint and random: true; keep one of them")
    if spec.random:
        if name.startswith(_HUB):
            raise EncoderError(
                f"encoder {spec.name}: a random twin of {name} needs its architecture: give {{architecture: <timm model>, random: true}}"
            )
        network, notes = create_random(name, spec.options, spec.seed)
        source = "random weights, never trained"
    else:
        network, report = _pretrained(name, spec)
        source, notes = _source(name, network), ()
    own, more = timm_preprocessing(network)
    identity = Identity(
        name=spec.name,
        family=FAMILY,
        architecture=describe_architecture(name, spec.options),
        source=source,
        preprocessing=spec.preprocessing.apply(own),
        position_resize=_position_resize(name),
        random=spec.random,
        load_report=report,
        notes=(*notes, *more, *spec.preprocessing.notes()),
    )
    return wrap(network, identity)


def _pretrained(name: str, spec: EncoderSpec) -> tuple[nn.Module, LoadReport]:
    """timm's network with its published weights, which timm itself loads strictly."""
    if name.startswith(_HUB):
        file = _download(name.removeprefix(_HUB), None, spec)
        network = _load_hub(name, spec)
    else:
        file = _published_file(name, spec)
        network = create(name, spec.options, pretrained=True, pretrained_cfg_overlay={"file": file})
    for key, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise EncoderError(f"encoder {spec.name}: published weights {file}: {key} holds NaN or infinite values; delete the file and try again")
    classifier = network.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
    dropped = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    count = len(network.state_dict())
    return network, LoadReport(file=Path(file).name, sha256=file_sha256(file), matched=count, dropped=tuple(f"{name}.*" for name in dropped))


def _published_file(name: str, spec: EncoderSpec) -> str:
    config: Any = timm.get_pretrained_cfg(name)
    if config is not None and config.file:
        return str(config.file)
    if config is not None and config.hf_hub_id:
        return _download(config.hf_hub_id, config.hf_hub_filename, spec)
    if config is not None and config.url:
        try:
            return str(timm.models.download_cached_file(config.url))
        except OSError as error:
            raise _unavailable(name, error) from error
    raise EncoderError(f"encoder {spec.name}: timm publishes no weights for {name}; give checkpoint: FILE or random: true, or another tag")


def _download(hub_id: str, filename: str | None, spec: EncoderSpec) -> str:
    """The weight file in Hugging Face's local cache, fetched there where need be."""
    repository, _, revision = hub_id.partition("@")
    wanted = [filename] if filename else list(_WEIGHT_FILES)
    for candidate in wanted:
        cached = huggingface_hub.try_to_load_from_cache(repository, candidate, revision=revision or None)
        if isinstance(cached, str):
            return cached
    missing: Exception | None = None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries would come between the lines of a progress display
    for candidate in wanted:
        try:
            return str(huggingface_hub.hf_hub_download(repository, candidate, revision=revision or None))
        except LocalEntryNotFoundError as error:  # no connection: the other names would not help
            raise _unavailable(repository, error) from error
        except EntryNotFoundError as error:
            missing = error
        except (OSError, ValueError) as error:
            raise _unavailable(repository, error) from error
    assert missing is not None
    raise EncoderError(f"encoder {spec.name}: {repository} holds none of {', '.join(wanted)}; give another id") from missing


def _unavailable(what: str, error: Exception) -> EncoderError:
    return EncoderError(f"weights of {what} cannot be had ({type(error).__name__}); connect to the network, give checkpoint: FILE, or random: true")


def _load_hub(name: str, spec: EncoderSpec) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=True, num_classes=0, **dict(spec.options)).eval()  # type: ignore[no-any-return]
    except Exception as error:  # whatever a stranger's repository makes of timm
        raise EncoderError(f"encoder {spec.name}: {name} does not load through timm: {one_line(error)}; give another id") from error


def _source(name: str, network: nn.Module) -> str:
    config: Any = network.pretrained_cfg
    origin = config.get("origin_url") or config.get("hf_hub_id") or config.get("url") or "timm"
    licence = f", licence {config['license']}" if config.get("license") else ""
    return f"published weights {name} ({origin}{licence})"


def _position_resize(name: str) -> PositionResize:
    """How the authors of a tag's weights resize position embeddings."""
    name = name.rpartition("/")[2]  # a Hub id names the model after its owner
    tag = name.partition(".")[2]
    if tag == "dino" or ("dinov2" in name and "reg4" not in name):
        return "offset"
    if tag.startswith("mae") or name.startswith(("deit_", "deit3_")):
        return "bicubic"
    return "antialias"
