"""Load a checkpoint's tensors into a network, account for every key and refuse what is unexplained."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from harness.core import LoadReport
from harness.encoders.files import Checkpoint
from harness.encoders.positions import has_moco_positions
from harness.errors import EncoderError

USUAL_WRAPPERS = frozenset(
    (
        "_orig_mod",
        "backbone",
        "base_encoder",
        "encoder",
        "encoder_q",
        "ema",
        "image_encoder",
        "model",
        "module",
        "net",
        "network",
        "state_dict",
        "student",
        "teacher",
        "trunk",
        "visual",
    )
)
_OPTIONAL = ("num_batches_tracked",)  # training counters

_TWELVE_HEADS = {
    "moco_v3": (r"(^|\.)(base_encoder|momentum_encoder)\.", (384,)),
    "cae": (r"(^|\.)(alignment_encoder|pretext_neck|regresser)\.", (192, 384)),
}
"""Formats whose small ViTs have 12 attention heads where other authors' ViTs of that width have fewer: a pattern of their keys, and the widths."""


class OtherKeysError(EncoderError):
    """A file's keys are not those of the network."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorSelection:
    """A checkpoint's tensors under one prefix, by the network's names, and what lies elsewhere in the file."""

    checkpoint: Checkpoint
    prefix: str
    tensors: Mapping[str, torch.Tensor]
    elsewhere: tuple[str, ...]
    """Groups of keys outside the prefix, e.g. `optimizer.* (300)`."""


def select(
    checkpoint: Checkpoint, expected: Sequence[str], *, prefix: str | None, rename: Sequence[tuple[str, str]] = (), architecture: str
) -> TensorSelection:
    """The tensors under `prefix`, or under the one prefix, made of the usual wrappers, that holds all of `expected`.

    Raises EncoderError where the prefix leads nowhere, where several places of the file would fit, or where none does.
    """
    if prefix is None:
        renamed = _rename(checkpoint, checkpoint.tensors, rename)
        prefix = _detect(checkpoint, renamed, expected, architecture)
        return TensorSelection(checkpoint=checkpoint, prefix=prefix, tensors=_under(renamed, prefix), elsewhere=_elsewhere(renamed, prefix))
    if prefix and not prefix.endswith(".") and all(name.startswith(f"{prefix}.") for name in checkpoint.tensors if name.startswith(prefix)):
        prefix = f"{prefix}."
    tensors = _under(checkpoint.tensors, prefix)
    if not tensors:
        starts = ", ".join(sorted({_start(name) for name in checkpoint.tensors})[:8])
        raise EncoderError(f"checkpoint {checkpoint.path}: no key begins with the prefix {prefix!r}; keys begin with {starts}")
    renamed = _rename(checkpoint, tensors, rename)
    return TensorSelection(checkpoint=checkpoint, prefix=prefix, tensors=renamed, elsewhere=_elsewhere(checkpoint.tensors, prefix))


def _under(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _start(name: str) -> str:
    first, dot, _ = name.partition(".")
    return f"{first}{dot}"


def _elsewhere(tensors: Mapping[str, torch.Tensor], prefix: str) -> tuple[str, ...]:
    return grouped(name for name in tensors if not name.startswith(prefix))


def grouped(names: Iterable[str]) -> tuple[str, ...]:
    """Keys by the first part of their path, with counts."""
    groups = Counter(map(_start, names))
    return tuple(f"{start}* ({count})" if start.endswith(".") else start for start, count in sorted(groups.items()))


def _rename(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor], rules: Sequence[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """`tensors` by their new names: every rule reads the names in the file, never what another rule wrote.

    Where two rules match at one place, the longer one is applied, whatever their order.
    """
    longest_first = sorted((old for old, _ in rules), key=len, reverse=True)
    pattern, new_texts = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)"), dict(rules)
    applied: set[str] = set()
    renamed: dict[str, torch.Tensor] = {}

    def replaced(match: re.Match[str]) -> str:
        applied.add(match[0])
        return new_texts[match[0]]

    for name, tensor in tensors.items():
        new = pattern.sub(replaced, name)
        if new in renamed:
            raise EncoderError(f"checkpoint {checkpoint.path}: rename gives two tensors the name {new!r}; make the rules more specific")
        renamed[new] = tensor
    for old, _ in rules:
        if old in applied:
            continue
        if not any(old in name for name in tensors):
            raise EncoderError(f"checkpoint {checkpoint.path}: rename rule {old!r} matches no key; a key is e.g. {next(iter(tensors))}")
        raise EncoderError(
            f"checkpoint {checkpoint.path}: rename rule {old!r} is never applied: other rules take every key that it matches; leave it out"
        )
    return renamed


def _detect(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor], expected: Sequence[str], architecture: str) -> str:
    """The one prefix under which every expected key lies."""
    required = {name for name in expected if not name.endswith(_OPTIONAL)}
    counts: Counter[str] = Counter()
    for name in tensors:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in required:
                counts["".join(f"{part}." for part in parts[:start])] += 1
    complete = sorted(prefix for prefix, count in counts.items() if count == len(required))
    if len(complete) > 1:
        listed = ", ".join(repr(prefix) for prefix in complete)
        raise EncoderError(f"checkpoint {checkpoint.path}: {architecture} fits in {len(complete)} places; say which one: prefix: one of {listed}")
    if complete:
        unusual = [part for part in complete[0].split(".")[:-1] if part not in USUAL_WRAPPERS]
        if unusual:
            raise EncoderError(
                f"checkpoint {checkpoint.path}: {architecture} fits under {complete[0]!r} only; if that is meant, give prefix: {complete[0]}"
            )
        return complete[0]
    best = max(counts, key=lambda prefix: (counts[prefix], -len(prefix)), default=None)
    if best is None:
        example = ", ".join(list(tensors)[:3])
        raise OtherKeysError(
            f"checkpoint {checkpoint.path}: holds no key of {architecture}: expected e.g. {sorted(required)[0]}, got e.g. {example}; "
            "name the right architecture, or give prefix and rename"
        )
    missing = sorted(name for name in required if f"{best}{name}" not in tensors)
    unexpected = [name.removeprefix(best) for name in tensors if name.startswith(best) and name.removeprefix(best) not in required]
    raise OtherKeysError(
        f"checkpoint {checkpoint.path}: does not fit {architecture}: {len(missing)} of {len(required)} keys missing under {best!r} "
        f"({first_few(missing)}); " + (_remedy(architecture, missing, unexpected) or "name the right architecture, or give prefix and rename")
    )


def _remedy(target: str, missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """The remedy that the missing and unexpected keys suggest; empty where they suggest none."""
    architecture = target.partition("(")[0]
    if "reg_token" in missing:
        plain = re.sub(r"_reg\d+", "", architecture)
        return f"it has no registers: give architecture: {plain}" if plain != architecture else "it has no registers: leave reg_tokens out of options"
    if "reg_token" in unexpected:
        return "it has registers: give the architecture with as many of them (…_reg4_…), or options: {reg_tokens: …, no_embed_class: true}"
    if set(missing) == {"norm.weight", "norm.bias"} and "fc_norm.weight" in unexpected:
        return (
            "its final norm lies behind mean pooling, as after fine-tuning: "
            "give {architecture: <timm model>, checkpoint: FILE, options: {global_pool: avg}}"
        )
    if list(missing) == ["cls_token"]:
        return "it has no cls token: give options: {class_token: false, global_pool: avg, fc_norm: false}"
    if unexpected and not missing and {name.rpartition(".")[0] for name in unexpected} in ({"head"}, {"fc"}):
        return f"drop: [{unexpected[0].partition('.')[0]}.] leaves its classifier out"
    if {name.rpartition(".")[2] for name in (*missing, *unexpected)} == {"gamma"}:
        if not unexpected:
            return "its blocks have no layer scales: give options: {init_values: null}"
        if not missing:
            return "its blocks have layer scales: give options: {init_values: 1.0}"
    return ""


def refuse_silent_misfit(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor], *, width: object, heads: int | None, reader: str) -> None:
    """Raise EncoderError where the file is MoCo v3's or CAE's and `reader` would read its small ViT, `tensors`, with other than 12 heads.

    The number of heads leaves no trace in the weights: they fit in shape and compute something else.
    """
    by_positions = has_moco_positions(tensors.get("pos_embed"))  # CAE's are the same, in BEiT's blocks
    split = any(name.endswith(".q_bias") for name in tensors)
    for family, (pattern, widths) in _TWELVE_HEADS.items():
        recognised = any(re.search(pattern, name) for name in checkpoint.tensors) or (by_positions and split == (family == "cae"))
        if width in widths and heads != 12 and recognised:
            raise EncoderError(
                f"checkpoint {checkpoint.path}: looks like one of {family}, whose small ViT has 12 attention heads where {reader} has {heads}: "
                f"its weights would fit and compute something else; use encoder: {family}, or give options: {{num_heads: 12}} or {heads}"
            )


def check_keys(network: nn.Module, selection: TensorSelection, *, target: str, droppable: Sequence[str] = ()) -> list[str]:
    """Keys that are left out, each allowed by `droppable`. Raises EncoderError, with keys and remedy, for any that are missing or unexpected."""
    path, tensors, state = selection.checkpoint.path, selection.tensors, network.state_dict()
    missing = sorted(name for name in state if name not in tensors and not name.endswith(_OPTIONAL))
    extra = sorted(name for name in tensors if name not in state)
    dropped = [name for name in extra if name.startswith(tuple(droppable))]
    unexpected = [name for name in extra if name not in set(dropped)]
    if not missing and not unexpected:
        return dropped
    faults = [f"{len(names)} {word} ({first_few(names)})" for names, word in ((missing, "missing"), (unexpected, "unexpected")) if names]
    remedy = _remedy(target, missing, unexpected) or (
        "name the right architecture" + ("; what is to be left out on purpose goes under drop" if unexpected else " or rename keys")
    )
    raise OtherKeysError(f"checkpoint {path}: does not fit {target}: keys {', '.join(faults)}; {remedy}")


def load_into(
    network: nn.Module,
    selection: TensorSelection,
    *,
    target: str,
    droppable: Sequence[str] = (),
) -> LoadReport:
    """Copy the selected tensors into `network`, strictly, and account for every key. `droppable` are beginnings of keys that may be left out.

    Raises EncoderError, with the keys and the remedy, for anything missing or unexpected, of another shape, not floating point or not finite.
    """
    path, tensors = selection.checkpoint.path, selection.tensors
    state = network.state_dict()
    dropped = check_keys(network, selection, target=target, droppable=droppable)
    used = {name: tensor for name, tensor in tensors.items() if name in state}
    _check_shapes(path, target, used, state)
    _check_values(path, used, state)
    network.load_state_dict({**{name: state[name] for name in state if name not in used}, **used}, strict=True)
    return LoadReport(
        file=selection.checkpoint.file,
        sha256=selection.checkpoint.sha256,
        matched=len(used),
        missing=tuple(name for name in state if name not in used),
        dropped=(*(f"{selection.prefix}{name}" for name in dropped), *selection.elsewhere),
    )


def _check_shapes(path: str, target: str, tensors: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
    wrong = [name for name in sorted(tensors) if tensors[name].shape != state[name].shape]
    if wrong:
        name = wrong[0]
        others = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise EncoderError(
            f"checkpoint {path}: does not fit {target}: {name} is {list(tensors[name].shape)}, expected {list(state[name].shape)}{others}; "
            "name the right architecture"
        )


def _check_values(path: str, tensors: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() != state[name].is_floating_point():
            raise EncoderError(f"checkpoint {path}: {name} holds {tensor.dtype}, expected {state[name].dtype}; save unquantised weights")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise EncoderError(
                f"checkpoint {path}: {name} holds NaN or infinite values; the training diverged or the file is damaged, use another one"
            )


def first_few(names: Sequence[str]) -> str:
    """The first four names, and how many more there are."""
    return ", ".join(names[:4]) + (f", and {len(names) - 4} more" if len(names) > 4 else "")
