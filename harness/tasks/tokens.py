"""What an encoder makes of tokens that are dropped, misplaced or shuffled: occlusion, the binding of content to position, shape against texture.

DILEMMA (Sameni et al., AAAI 2023, arXiv 2204.04788); occlusion and shuffling as in Naseer et al., NeurIPS 2021 (arXiv 2105.10497). A curve is a
task a point. Dropped and shuffled test images are told by k-NN among intact training images, under the readout chosen on intact ones: at the point
that alters nothing the value is that of `object-knn`. Every point is a pass of the encoder, so no pattern but one that has a task's last word asks
for it.
"""

from __future__ import annotations

from collections.abc import Mapping

from harness.core import View
from harness.data.manifest import Manifest
from harness.data.views.dropped_tokens import DroppedTokens
from harness.data.views.misplaced_tokens import MARK, MisplacedTokens
from harness.data.views.shuffled_patches import ShuffledPatches
from harness.data.views.whole import Whole
from harness.metrics import metric
from harness.probes import defaults
from harness.tasks import Fields, Template
from harness.tasks.objects import POOLED, whole

DETECTION = ("AUROC", "balanced_accuracy", "bce", "bce_chance")
BEARING = ("accuracy", "mean_class_accuracy", "cosine_to_intact")
DETECTED: Mapping[str, str] = {"thetas": "theta", "kept_shares": "kept_share", "blocks": "block"}
"""Fields that hold the points of `misplaced-tokens`, to the field of each."""
DILEMMA: Fields = {"thetas": (0.2,), "kept_shares": (0.25,), "blocks": (None, -4, -7), "mask": MARK, "token_seed": 0}
"""Theta, and the share in the example, of the authors' released code, which reads the final norm's output: block None. The other blocks, read before
that norm, are a choice of this harness: three quarters and one half of the way through twelve."""
HIDDEN: Mapping[str, Fields] = {
    f"{how}{suffix}": {"mode": mode, "how": how}
    for how in ("drop", "grey")
    for suffix, mode in (("", "random"), ("-centre", "centre"), ("-block", "block"))
}
"""Protocol of `dropped-tokens` to what goes and how."""
KEPT_SHARES = (1.0, 0.5, 0.25)
GRIDS = (1, 2, 4, 8, 0)
"""Cells a side; 0 is the encoder's own grid."""


def tokens_of_block(fields: Fields) -> tuple[str, ...]:
    """The tokens of the point's block, or of the final norm's output where that is None."""
    return ("tokens",) if fields["block"] is None else (f"tokens@{fields['block']}",)


def misplaced(fields: Fields) -> View:
    """The view of the point. Raises RequestError where a field has a value that it cannot take."""
    return Whole(alteration=MisplacedTokens(kept_share=fields["kept_share"], theta=fields["theta"], seed=fields["token_seed"]))


def dropped(fields: Fields) -> View:
    """The view of the point. Raises RequestError where a field has a value that it cannot take."""
    return Whole(alteration=DroppedTokens(kept_share=fields["kept_share"], mode=fields["mode"], how=fields["how"], seed=fields["token_seed"]))


def shuffled(fields: Fields) -> View:
    """The view of the point. Raises RequestError where a field has a value that it cannot take."""
    return Whole(alteration=ShuffledPatches(grid=fields["grid"], seed=fields["token_seed"]))


def misplaced_template(manifest: Manifest) -> Template:
    """Part level: what is asked is whether a token's place fits its content and the other tokens, not what the image shows.

    Heads are chosen by the loss that they are trained with: one whose odds are far too large ranks tokens as well as one whose are right.
    """
    own = {name: value for name, value in defaults("detector").items() if name not in DETECTED.values()}
    return Template(
        name="misplaced-tokens",
        level="part",
        probe="detector",
        metrics=tuple(metric(one) for one in DETECTION),
        chosen_by=metric("bce"),
        protocols={"dilemma": {**own, **DILEMMA}},
        curves=DETECTED,
        view=misplaced,
        classes=lambda _: ("in place", "misplaced"),
        readouts=tokens_of_block,
        listed=False,
    )


def templates(manifest: Manifest) -> list[Template]:
    """Misplaced tokens for any images; dropped and shuffled ones where samples have labels."""
    found = [misplaced_template(manifest)]
    if "label" not in manifest.annotations:
        return found
    own = {**defaults("perturbed"), "readouts": POOLED, "token_seed": 0}
    hidden = {name: {**own, **fields, "kept_shares": KEPT_SHARES} for name, fields in HIDDEN.items()}
    for name, protocols, curves, view, instead in (
        ("dropped-tokens", hidden, {"kept_shares": "kept_share"}, dropped, {name: name.replace("drop", "grey") for name in HIDDEN if "drop" in name}),
        ("shuffled-patches", {"shuffle": {**own, "grids": GRIDS}}, {"grids": "grid"}, shuffled, {}),
    ):
        found.append(
            Template(
                name=name,
                level="object",
                probe="perturbed",
                metrics=tuple(metric(one) for one in BEARING),
                protocols=protocols,
                curves=curves,
                view=view,
                train_view=whole,
                reference_view=whole,
                classes=lambda _: manifest.classes,
                instead=instead,
                listed=False,
            )
        )
    return found
