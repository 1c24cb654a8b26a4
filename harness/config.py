"""Sweep file → typed, validated Sweep.

YAML is read safely (no tags, no aliases, a bounded size), numbers such as 1e-3 are numbers, and every fault is reported in one line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from harness.errors import RequestError, complaint, nearest

MAX_BYTES = 1 << 20
_FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

Count = Annotated[int, Field(strict=True, ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Search(_Section):
    """How learning rates are searched, per study: `trials` proposals of `stack` learning rates each; three or more rates are tried as they are."""

    trials: Count = 4
    stack: Count = 8
    lr: tuple[float, ...] = (1e-3, 10.0)
    """Two are bounds, log-uniform; more are tried as they are, in one stack, whatever `trials` and `stack`. Actual rates at the protocol's batch."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0

    @field_validator("lr", mode="before")
    @classmethod
    def _bounds_or_rates(cls, value: object) -> object:
        if not isinstance(value, list | tuple) or len(value) < 2:
            raise ValueError(f"expected [lowest, highest] learning rate, or three or more rates to try, got {value!r}")
        if any(isinstance(rate, bool) or not isinstance(rate, int | float) for rate in value):
            raise ValueError(f"expected numbers, got {value!r}")
        rates = tuple(float(rate) for rate in value)
        if len(rates) > 2:
            if not all(math.isfinite(rate) and rate > 0 for rate in rates) or len(set(rates)) < len(rates):
                raise ValueError(f"expected positive, finite rates to try, no two the same, got {value!r}")
        elif not (math.isfinite(rates[0]) and math.isfinite(rates[1]) and 0 < rates[0] <= rates[1]):
            raise ValueError(f"expected 0 < lowest <= highest, both finite, got {value!r}")
        return rates


class Resources(_Section):
    """What the run may use. `auto`: one actor per GPU, else one per core; bf16 where the hardware has it, else float32."""

    actors: Literal["auto"] | Count = "auto"
    gpus_per_actor: Literal["auto"] | Annotated[float, Field(ge=0, le=64)] = "auto"
    """A fraction of one GPU, or whole ones."""
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 64
    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    """CPU threads that each actor computes with; fixed, since results may depend on it to rounding."""
    decode_threads: Annotated[int, Field(ge=1, le=256)] = 2
    decoder: Literal["pillow", "torchcodec"] = "pillow"
    """What decodes JPEGs: Pillow, or torchcodec, which is faster and an optional package."""
    checkpoint_seconds: Annotated[float, Field(ge=0, le=7 * 86400)] = 120.0
    """Seconds of training on a stream between saves of the heads, from which training resumes after an interruption."""
    lease_timeout: Annotated[float, Field(gt=0, le=7 * 86400)] = 1800.0
    """Seconds after which a shard is taken from an actor that has not returned it."""

    @field_validator("gpus_per_actor")
    @classmethod
    def _fraction_or_whole(cls, value: float | str) -> float | str:
        if isinstance(value, float) and value > 1 and not value.is_integer():
            raise ValueError(f"expected a fraction of one GPU or a whole number, got {value:g}")
        return value


class Sweep(_Section):
    """One sweep, as in its file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
    shards: str
    """Folder or URL holding `<data set>/manifest.json`, absolute."""
    encoders: Annotated[list[str | dict[str, Any]], Field(min_length=1)]
    tasks: Annotated[list[str], Field(min_length=1)]
    search: Search = Search()
    resources: Resources = Resources()
    protocol: dict[str, Any] = Field(default_factory=dict)
    metrics: list[str] = Field(default_factory=list)
    """Further metrics, by name, of every task that can give them."""

    @field_validator("encoders", mode="before")
    @classmethod
    def _names_or_mappings(cls, value: object) -> object:
        for index, entry in enumerate(value if isinstance(value, list) else ()):
            if not isinstance(entry, str | dict):
                raise ValueError(f"expected a name or a mapping as entry {index}, got {str(entry)[:80]!r}")
        return value


class _Loader(yaml.SafeLoader):
    """Safe YAML without aliases (which let a page expand to gigabytes) and without duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed here; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.YAMLError(f"expected text as a key, got {key!r}")
            if key in seen:
                raise yaml.YAMLError(f"key {key!r} comes twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(rf"^(?:{_FLOAT.pattern})$"), list("-+0123456789."))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, where: str) -> Any:
    """`text` as plain YAML. Raises RequestError, with `where` as the name of the source."""
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise RequestError(f"{where}: expected a page of YAML, got one that is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise RequestError(f"{where}: expected plain YAML, got an error: {_one_line(error)}") from None


def load_sweep(path: str | Path, overrides: Sequence[str] = (), *, check_encoder: Callable[[object], None] | None = None) -> Sweep:
    """The sweep that `path` describes, with `--set` overrides `a.b=value` (YAML values). Raises RequestError in one line.

    Unknown keys are reported first, since other faults may follow from one. `check_encoder` raises for unknown keys of an encoder's entry, which only
    the encoders know.
    """
    file = Path(path)
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise RequestError(f"{path}: expected a sweep file, got {error.strerror or error}") from None
    if len(raw) > MAX_BYTES:
        raise RequestError(f"{path}: expected a page of YAML, got {len(raw)} bytes")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise RequestError(f"{path}: expected YAML text, got binary data") from None
    plain = parse_yaml(text, str(path))
    if not isinstance(plain, dict):
        raise RequestError(f"{path}: expected a mapping of keys to values, got {type(plain).__name__}")
    for override in overrides:
        _override(plain, override)
    return parse_sweep(plain, str(path), file.parent, check_encoder=check_encoder)


def parse_sweep(plain: Mapping[str, Any], where: str, base: Path, *, check_encoder: Callable[[object], None] | None = None) -> Sweep:
    """The sweep of plain values, with paths relative to `base`. Raises RequestError in one line, with `where` as the name of the source."""
    _refuse_unknown_keys(plain, where)
    if check_encoder is not None and isinstance(plain.get("encoders"), list):
        for entry in plain["encoders"]:
            check_encoder(entry)
    _refuse_nan(plain, where)
    sweep = _validate(plain, where)
    return sweep.model_copy(update={"shards": resolve_path(sweep.shards, base)})


def resolve_path(text: str, base: Path) -> str:
    """`text` if it is a URL, else the absolute path that it names relative to `base`."""
    return text if "://" in text else str((base / Path(text).expanduser()).resolve())


def _override(plain: dict[str, Any], text: str) -> None:
    dotted, equals, value = text.partition("=")
    steps = dotted.strip().split(".")
    if not equals or not all(steps):
        raise RequestError(f"--set: expected KEY=VALUE with dots between keys, got {text!r}")
    place: Any = plain
    for step in steps[:-1]:
        place = place.setdefault(step, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise RequestError(f"--set {dotted}: expected a key below {step!r}, but that is no section")
    place[steps[-1]] = parse_yaml(value, f"--set {dotted}")


def _refuse_unknown_keys(plain: Mapping[str, Any], where: str) -> None:
    """Raise RequestError, with the nearest match, for the first unknown key of the file or of a section."""
    for mapping, section, place in (
        (plain, Sweep, where),
        (plain.get("search"), Search, f"{where}: search"),
        (plain.get("resources"), Resources, f"{where}: resources"),
    ):
        keys = list(section.model_fields)
        for key in mapping if isinstance(mapping, dict) else ():
            if key not in keys:
                hint = nearest(key, keys) or nearest(key.lower(), keys)
                raise RequestError(f"{place}: unknown key {key[:80]!r}{hint}; known keys are {', '.join(keys)}")


def _refuse_nan(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _refuse_nan(inner, f"{where}: {key}" if ": " not in where else f"{where}.{key}")
    elif isinstance(value, list):
        for inner in value:
            _refuse_nan(inner, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise RequestError(f"{where}: expected a finite number, got {value}")


def _validate(plain: Mapping[str, Any], where: str) -> Sweep:
    try:
        return Sweep.model_validate(plain)
    except ValidationError as error:
        raise RequestError(f"{where}: {complaint(error)}") from None


def _one_line(value: object) -> str:
    return " ".join(str(value).split())[:300]
