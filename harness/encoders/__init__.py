"""Encoders by name. The folder `families` is the registry: each of its modules is one family.

A family defines `FAMILY` (its name), `DESCRIPTION` (one line), `names()` (its registered names, each with one line), `claims(spec)` (whether the
spec is its own) and `build(spec)`. A new family is one new file and no edit elsewhere.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from typing import Protocol, cast

from harness.core import Encoder, EncoderInfo
from harness.encoders import families
from harness.encoders.digest import file_sha256
from harness.encoders.preprocessing import beside
from harness.encoders.spec import EncoderSpec, read_by_file, refuse_unknown_keys
from harness.errors import EncoderError, nearest

__all__ = ["EncoderSpec", "all_families", "check_known", "describe", "family_of", "fingerprint", "known_names", "live", "load", "refuse_unknown_keys"]


class Family(Protocol):
    """What a module of `families` defines."""

    FAMILY: str
    DESCRIPTION: str

    def names(self) -> dict[str, str]:
        """Registered names, each with one line; empty for families that are chosen by a prefix or by a file."""

    def claims(self, spec: EncoderSpec) -> bool:
        """Whether `build` takes this spec."""

    def build(self, spec: EncoderSpec) -> Encoder:
        """The encoder, on the CPU, frozen and in eval mode. Raises EncoderError."""


@functools.cache
def all_families() -> tuple[Family, ...]:
    """Every family, sorted by its module's name."""
    modules = sorted(module.name for module in pkgutil.iter_modules(families.__path__))
    return tuple(cast(Family, importlib.import_module(f"{families.__name__}.{module}")) for module in modules)


def known_names() -> dict[str, str]:
    """Every registered name, with its one-line description."""
    return {name: description for family in all_families() for name, description in family.names().items()}


def family_of(spec: EncoderSpec) -> Family:
    """The family that claims `spec`. Raises EncoderError, with the nearest name, where none does."""
    for family in all_families():
        if family.claims(spec):
            return family
    import timm  # as late as the families, which need it

    requested = spec.encoder or spec.architecture or ""
    if timm.is_model(requested.partition(".")[0]):
        raise EncoderError(f"unknown encoder {requested!r}: it is timm's; write timm:{requested} for its published weights")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", requested):
        if requested.startswith("timm/"):
            raise EncoderError(f"unknown encoder {requested!r}: it is an id of Hugging Face's Hub; write hf-hub:{requested}")
        raise EncoderError(f"unknown encoder {requested!r}: it looks like a transformers id, not timm's; {read_by_file(requested)}")
    raise EncoderError(
        f"unknown encoder {requested!r}: expected a registered name, timm:<model> or hf-hub:<id>{nearest(requested, known_names())}; "
        "python -m harness.encoders lists them"
    )


def check_known(spec: EncoderSpec) -> None:
    """Raise EncoderError where no family claims `spec`, or where it names a timm architecture that does not exist. Loads nothing."""
    from harness.encoders.create import check_architecture

    family_of(spec)
    if spec.architecture is not None:
        check_architecture(spec.architecture)
    if spec.encoder is not None and spec.encoder.startswith("timm:"):
        check_architecture(spec.encoder.removeprefix("timm:"))


def load(spec: EncoderSpec) -> Encoder:
    """The encoder of `spec`, on the CPU, frozen and in eval mode. Raises EncoderError where it is unknown or does not load."""
    encoder = family_of(spec).build(spec)
    encoder.module.eval().requires_grad_(False)
    return encoder


def live(value: object) -> tuple[EncoderSpec, Callable[[], Encoder]] | None:
    """The spec of a live torch module, or of a mapping {module, name, preprocessing}, and a function that builds an encoder around a copy of it.

    None where `value` is neither. Raises EncoderError where the mapping is malformed; the function raises it where the layout is not recognised.
    """
    from torch import nn

    if not isinstance(value, nn.Module) and not (isinstance(value, Mapping) and "module" in value):
        return None
    from harness.encoders.live_network import build_live, parse_live  # as late as the families, which need timm

    module, spec = parse_live(value)
    return spec, functools.partial(build_live, module, spec)


def describe(spec: EncoderSpec) -> EncoderInfo:
    """`load(spec).info`. Loads the weights on the CPU once per process, spec, checkpoint and files beside it, and frees them.

    Raises EncoderError where the encoder is unknown or does not load.
    """
    digests = []
    if spec.checkpoint is not None:
        with contextlib.suppress(OSError):  # loading says what is wrong with the file
            digests = [file_sha256(str(file)) for file in (spec.checkpoint, *beside(spec.checkpoint))]
    return describe_once(spec, tuple(digests))


@functools.lru_cache(maxsize=256)
def describe_once(spec: EncoderSpec, digests: tuple[str, ...]) -> EncoderInfo:
    return load(spec).info


def fingerprint(spec: EncoderSpec) -> str:
    """A digest of everything in an encoder that decides a feature's bytes: weights, architecture, preprocessing, choices in its notes; not its label.

    64 hexadecimal digits. Raises EncoderError where the encoder is unknown or does not load.
    """
    info = describe(spec)
    identity = (info.weights_sha256, info.architecture, info.preprocessing, info.positions, info.notes)
    return hashlib.sha256(repr(identity).encode()).hexdigest()
