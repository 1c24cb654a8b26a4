"""Models of timm, with their published weights or random ones, and Hugging Face Hub models through timm."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from torch import nn

from harness.core import Encoder, LoadReport
from harness.encoders.create import check_architecture, create, create_random, describe_architecture, known_preprocessing, tag_of, wrap
from harness.encoders.files import Checkpoint, read_checkpoint
from harness.encoders.identity import Identity
from harness.encoders.loading import first_few
from harness.encoders.positions import PositionResize, position_rule
from harness.encoders.preprocessing import decide
from harness.encoders.resize import one_line
from harness.encoders.spec import EncoderSpec, read_by_file
from harness.encoders.stated import read_json
from harness.errors import EncoderError

FAMILY = "timm"
DESCRIPTION = "a model of timm: timm:<model>[.<tag>] or hf-hub:<id> with published weights, {architecture: <model>, random: true} without"

_TIMM, _HUB = "timm:", "hf-hub:"
_WEIGHT_FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
_WRAPPERS = ("state_dict_ema.", "model_ema.", "state_dict.", "model.")  # where timm looks for the weights in a file, in this order
_BUILT_FOR = ("img_size", "patch_size")
_COUNTERS = "num_batches_tracked"


def names() -> dict[str, str]:
    """None: timm has its own list (timm.list_pretrained())."""
    return {}


def claims(spec: EncoderSpec) -> bool:
    """`timm:` and `hf-hub:` names, and bare architectures with random weights."""
    if spec.encoder is None:
        return spec.random
    return spec.encoder.startswith((_TIMM, _HUB)) and (spec.checkpoint is None or spec.random)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model as timm creates it."""

    name: str
    """For timm.create_model: an architecture, with or without a tag, or hf-hub:<id>."""
    architecture: str
    """timm's, with the tag where the name has one."""
    tag: str
    options: tuple[tuple[str, object], ...]
    """Everything that its constructor is given: the sweep file's options, over those of a hub repository's config.json."""


def build(spec: EncoderSpec) -> Encoder:
    """The model with its published weights, or its random twin. Raises EncoderError where the weights are unavailable."""
    if spec.checkpoint is not None:
        raise EncoderError(f"encoder {spec.name}: both checkpoint and random: true; keep one of them")
    return _build(spec, None)


def build_published(spec: EncoderSpec, file: str) -> Encoder:
    """The model with a file in the place of its published weights, read as timm reads those. Raises EncoderError where it does not fit."""
    return _build(spec, file)


def _build(spec: EncoderSpec, file: str | None) -> Encoder:
    model = _model(spec)
    report = None
    if spec.random:
        network, notes = create_random(model.architecture, spec.options, spec.seed, model=model.name)
        source = "random weights, never trained"
    else:
        network, report, notes = _pretrained(model, spec, file)
        source = _source(model.name, network) if file is None else f"own checkpoint {file}, read as timm reads its weights of {model.name}"
    base, words = known_preprocessing(network, model.name, spec.options, published=spec.encoder is not None)
    identity = Identity(
        name=spec.name,
        family=FAMILY,
        architecture=describe_architecture(model.architecture, model.options),
        source=source,
        preprocessing=decide(spec, base, words, None if file is None else read_checkpoint(file)),
        position_resize=position_resize_of(model),
        random=spec.random,
        load_report=report,
        notes=notes,
    )
    return wrap(network, identity)


def _model(spec: EncoderSpec) -> Model:
    name = spec.architecture if spec.encoder is None else spec.encoder.removeprefix(_TIMM)
    assert name is not None
    if not name.startswith(_HUB):
        tag = name.partition(".")[2] if spec.encoder is None else tag_of(name)
        return Model(name=name, architecture=name, tag=tag, options=spec.options)
    _refuse_transformers(name, _download(name.removeprefix(_HUB), "config.json", spec), spec)
    try:
        published, architecture, arguments = timm.models.load_model_config_from_hf(name.removeprefix(_HUB))
        options = {**arguments, **dict(spec.options)}
        tag = published.get("tag") or name.partition(".")[2]
    except Exception as error:  # a foreign repository may hold anything
        raise EncoderError(f"encoder {spec.name}: config.json of {name} is not timm's: {one_line(error)}; give another id") from error
    check_architecture(str(architecture))
    return Model(name=name, architecture=architecture, tag=tag, options=tuple(sorted(options.items())))


def _refuse_transformers(name: str, config: str, spec: EncoderSpec) -> None:
    """Raise EncoderError where a repository's config.json is transformers', with the way to read its weights."""
    values = read_json(Path(config)) or {}
    if "architecture" in values or not ({"model_type", "architectures"} & set(values)):
        return
    raise EncoderError(
        f"encoder {spec.name}: {name} is a model of transformers ({values.get('model_type') or values['architectures']}), which timm does not load; "
        f"{read_by_file(name.removeprefix(_HUB))}"
    )


# --- published weights ------------------------------------------------------------------------------------------------


def _pretrained(model: Model, spec: EncoderSpec, given: str | None) -> tuple[nn.Module, LoadReport, tuple[str, ...]]:
    """timm's network with its published weights but no classifier, a report on the file's keys, and notes.

    Raises EncoderError where a weight of the network would keep a random value, or where timm meets a key that it does not use.
    """
    for option, _ in spec.options:
        if option in _BUILT_FOR:
            raise EncoderError(
                f"encoder {spec.name}: published weights have their own {option}: expected preprocessing: {{size: …}} for images of another size, "
                f"got options {option}; leave it out"
            )
    file = given or (_download(model.name.removeprefix(_HUB), None, spec) if model.name.startswith(_HUB) else _published_file(model.name, spec))
    published = read_checkpoint(file)
    shapes = _shapes(published)
    try:  # with the classifier of the weights: timm tolerates missing and unexpected keys where another number of classes is given
        network = create(
            model.architecture, spec.options, classes=None, model=model.name, pretrained=True, pretrained_cfg_overlay={"source": "", "file": file}
        )
    except EncoderError as error:
        why = _misfit(model, spec, shapes) or error
        raise EncoderError(f"encoder {spec.name}: published weights {file} do not fit: {why}; {_remedy(spec)}") from error
    missing = _unfilled(network, model, spec, shapes)
    whole = dict(network.state_dict())
    if getattr(network, "num_classes", 0):
        network.reset_classifier(0)  # type: ignore[operator]
    state = network.state_dict()
    for key, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise EncoderError(f"encoder {spec.name}: published weights {file}: {key} holds NaN or infinite values; delete the file and try again")
    converted = [name for name in state if name not in shapes and name not in missing and not name.endswith(_COUNTERS)]
    report = LoadReport(
        file=published.file,
        sha256=published.sha256,
        matched=sum(name not in missing and not (name.endswith(_COUNTERS) and name not in shapes) for name in state),
        missing=tuple(missing),
        resized=tuple(name for name in state if name in shapes and shapes[name].numel() != state[name].numel()),
        dropped=tuple(sorted(name for name in (whole if converted else shapes) if name not in state)),
    )
    notes = (f"{len(converted)} tensors made by timm from keys of other names in the file",) if converted else ()
    return network.eval(), report, notes


def _shapes(published: Checkpoint) -> dict[str, torch.Size]:
    """Shapes of a published file's weights, by name, without the wrappers that timm strips."""
    tensors = published.tensors
    wrapper = next((wrapper for wrapper in _WRAPPERS if any(name.startswith(wrapper) for name in tensors)), "")
    inner = {name.removeprefix(wrapper): tensor.shape for name, tensor in tensors.items() if name.startswith(wrapper)}
    return {name.removeprefix("_orig_mod.").removeprefix("module.").removeprefix("_orig_mod."): shape for name, shape in inner.items()}


def _unfilled(network: nn.Module, model: Model, spec: EncoderSpec, shapes: dict[str, torch.Size]) -> list[str]:
    """Tensors that the file did not fill, all of them constants such as a norm's: timm loads some families without a check.

    Raises EncoderError where one of them is random.
    """
    absent = [name for name in network.state_dict() if name not in shapes and not name.endswith(_COUNTERS)]
    if not absent:
        return []
    loaded = network.state_dict()
    first, second = (create(model.architecture, spec.options, seed=seed, classes=None, model=model.name).state_dict() for seed in (0, 1))
    unfilled = [name for name in absent if torch.equal(loaded[name], first[name])]
    drawn = [name for name in unfilled if not torch.equal(first[name], second[name])]
    if drawn:
        raise EncoderError(
            f"encoder {spec.name}: published weights do not fit {model.architecture}: {len(drawn)} missing ({first_few(drawn)}); {_remedy(spec)}"
        )
    return unfilled


def _misfit(model: Model, spec: EncoderSpec, shapes: dict[str, torch.Size]) -> str | None:
    """The keys that the file lacks and those that it has in excess, where timm reports a misfit."""
    try:
        expected = create(model.architecture, spec.options, classes=None, model=model.name, device="meta").state_dict()
    except EncoderError:
        return None
    missing = [name for name in expected if name not in shapes and not name.endswith(_COUNTERS)]
    unexpected = [name for name in shapes if name not in expected]
    faults = [f"{len(names)} {word} ({first_few(names)})" for word, names in (("missing", missing), ("unexpected", unexpected)) if names]
    return f"keys {', '.join(faults)} for {describe_architecture(model.architecture, model.options)}" if faults else None


def _remedy(spec: EncoderSpec) -> str:
    return "leave out the options that change its layers" if spec.options else "delete the file and try again, or name another model"


def _published_file(name: str, spec: EncoderSpec) -> str:
    config: Any = timm.get_pretrained_cfg(name)
    if config is not None and config.file:
        return str(config.file)
    if config is not None and config.hf_hub_id:
        return _download(config.hf_hub_id, config.hf_hub_filename, spec)
    if config is not None and config.url:
        try:
            return str(timm.models.download_cached_file(config.url))
        except (OSError, RuntimeError) as error:  # RuntimeError: not the bytes that the address promises
            raise _unavailable(name, error, spec) from error
    raise EncoderError(f"encoder {spec.name}: timm publishes no weights for {name}; give checkpoint: FILE or random: true, or another tag")


def _download(hub_id: str, filename: str | None, spec: EncoderSpec) -> str:
    """A file of a hub repository, by default its weights, in Hugging Face's local cache, downloaded if it is not there."""
    repository, _, revision = hub_id.partition("@")
    filenames = [filename] if filename else list(_WEIGHT_FILES)
    try:
        for candidate in filenames:
            cached = huggingface_hub.try_to_load_from_cache(repository, candidate, revision=revision or None)
            if isinstance(cached, str):
                return cached
    except HFValidationError as error:
        raise EncoderError(f"encoder {spec.name}: expected hf-hub:<owner>/<model>[@revision], got {_HUB}{hub_id}; correct the id") from error
    missing: Exception | None = None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries would come between the lines of a progress display
    for candidate in filenames:
        try:
            return str(huggingface_hub.hf_hub_download(repository, candidate, revision=revision or None))
        except LocalEntryNotFoundError as error:  # no connection: the other names would not help
            raise _unavailable(repository, error, spec) from error
        except EntryNotFoundError as error:
            missing = error
        except (OSError, ValueError) as error:
            raise _unavailable(repository, error, spec) from error
    assert missing is not None
    raise EncoderError(f"encoder {spec.name}: {repository} holds none of {', '.join(filenames)}; give another id") from missing


def _unavailable(origin: str, error: Exception, spec: EncoderSpec) -> EncoderError:
    thing, instead = (
        ("config.json", "{architecture: <timm model>, random: true}") if spec.random else ("weights", "checkpoint: FILE, or random: true")
    )
    return EncoderError(f"{thing} of {origin} cannot be had ({type(error).__name__}); connect to the network, or give {instead}")


def _source(name: str, network: nn.Module) -> str:
    config: Any = network.pretrained_cfg
    origin = config.get("origin_url") or config.get("hf_hub_id") or config.get("url") or "timm"
    licence = f", licence {config['license']}" if config.get("license") else ""
    return f"published weights {name} ({origin}{licence})"


def position_resize_of(model: Model) -> PositionResize:
    """How the authors of a tag's weights resize position embeddings."""
    return position_rule(model.architecture, model.tag)
