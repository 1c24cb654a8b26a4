"""How an encoder handles tokens that are dropped, misplaced or shuffled: occlusion, binding of content to position, shape against texture.

DILEMMA (Sameni et al., AAAI 2023, arXiv 2204.04788); occlusion and shuffling as in Naseer et al., NeurIPS 2021 (arXiv 2105.10497). A curve is
one task per point. Dropped and shuffled test images are classified by k-NN among intact training images, under the readout chosen on intact ones: at
the point that alters nothing the value is that of `object-knn`. Every point is a pass of the encoder, so a pattern must contain the last word of such
a task to match it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from harness.core import View
from harness.data.manifest import Manifest
from harness.data.views.dropped_tokens import DroppedTokens, How, Mode
from harness.data.views.misplaced_tokens import MisplacedTokens
from harness.data.views.shuffled_patches import ShuffledPatches
from harness.data.views.whole import Whole
from harness.metrics import metric
from harness.probes.detector import DetectorFields, Theta
from harness.probes.fields import Several
from harness.probes.perturbed import PerturbedFields
from harness.tasks import BaseProtocol, Points, Template
from harness.tasks.objects import ObjectProtocol, whole

D = TypeVar("D", bound=ObjectProtocol)

DETECTED: Mapping[str, str] = {"thetas": "theta", "kept_shares": "kept_share", "blocks": "block"}
"""Field with the points of `misplaced-tokens` → field with the point."""
MODES: Mapping[str, Mode] = {"": "random", "-centre": "centre", "-block": "block"}
HOWS: Sequence[How] = ("drop", "grey")
HIDDEN = {f"{how}{suffix}": (mode, how) for how in HOWS for suffix, mode in MODES.items()}
"""Protocol of `dropped-tokens` → which tokens are dropped, and how."""


class MisplacedProtocol(BaseProtocol, DetectorFields):
    """Theta, and the share in the example, of the authors' released code, which reads the final norm's output: block None. The other blocks, read
    before that norm, are a choice of this harness: three quarters and one half of the way through twelve."""

    readouts: Several[str] = ("tokens",)
    token_seed: int = 0
    kept_share: float = 0.25
    block: int | None = None
    thetas: Points[Theta] = (0.2,)
    kept_shares: Points[float] = (0.25,)
    blocks: Points[int | None] = (None, -4, -7)


class DroppedProtocol(ObjectProtocol, PerturbedFields):
    """Which tokens are dropped, and how; the view checks the ranges."""

    mode: Mode
    how: How
    token_seed: int = 0
    kept_share: float = 1.0
    kept_shares: Points[float] = (1.0, 0.5, 0.25)


class ShuffledProtocol(ObjectProtocol, PerturbedFields):
    """`grid` is the number of cells per side; 0 is the encoder's own grid."""

    token_seed: int = 0
    grid: int = 1
    grids: Points[int] = (1, 2, 4, 8, 0)


def tokens_of_block(fields: MisplacedProtocol) -> tuple[str, ...]:
    """The tokens of the point's block, or of the final norm's output where that is None."""
    return ("tokens",) if fields.block is None else (f"tokens@{fields.block}",)


def misplaced(fields: MisplacedProtocol) -> View:
    """The view of the point. Raises RequestError where a field has a value that it cannot take."""
    return Whole(alteration=MisplacedTokens(kept_share=fields.kept_share, theta=fields.theta, seed=fields.token_seed))


def dropped(fields: DroppedProtocol) -> View:
    """The view of the point. Raises RequestError where a field has a value that it cannot take."""
    return Whole(alteration=DroppedTokens(kept_share=fields.kept_share, mode=fields.mode, how=fields.how, seed=fields.token_seed))


def shuffled(fields: ShuffledProtocol) -> View:
    """The view of the point. Raises RequestError where a field has a value that it cannot take."""
    return Whole(alteration=ShuffledPatches(grid=fields.grid, seed=fields.token_seed))


def misplaced_template(manifest: Manifest) -> Template[MisplacedProtocol]:
    """Part level: the question is whether a token's place fits its content and the other tokens, not what the image shows.

    Heads are chosen by their training loss: a head whose odds are far too large ranks tokens as well as a calibrated one.
    """
    return Template(
        name="misplaced-tokens",
        level="part",
        probe="detector",
        chosen_by=metric("bce"),
        protocols={"dilemma": MisplacedProtocol()},
        curves=DETECTED,
        view=misplaced,
        classes=lambda _: ("in place", "misplaced"),
        readouts=tokens_of_block,
        listed=False,
    )


def perturbed_template(
    manifest: Manifest, name: str, protocols: Mapping[str, D], curves: Mapping[str, str], view: Callable[[D], View], **options: Any
) -> Template[D]:
    """Altered test images among intact training images."""
    return Template(
        name=name,
        level="object",
        probe="perturbed",
        protocols=protocols,
        curves=curves,
        view=view,
        train_view=whole,
        reference_view=whole,
        classes=lambda _: manifest.classes,
        listed=False,
        **options,
    )


def templates(manifest: Manifest) -> list[Template[Any]]:
    """Misplaced tokens for any images; dropped and shuffled ones where samples have labels."""
    tasks: list[Template[Any]] = [misplaced_template(manifest)]
    if "label" in manifest.annotations:
        hidden = {name: DroppedProtocol(mode=mode, how=how) for name, (mode, how) in HIDDEN.items()}
        grey = {name: name.replace("drop", "grey") for name, (_, how) in HIDDEN.items() if how == "drop"}
        tasks += [
            perturbed_template(manifest, "dropped-tokens", hidden, {"kept_shares": "kept_share"}, dropped, instead=grey),
            perturbed_template(manifest, "shuffled-patches", {"shuffle": ShuffledProtocol()}, {"grids": "grid"}, shuffled),
        ]
    return tasks
