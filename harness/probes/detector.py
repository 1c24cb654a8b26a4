"""The detector: one logistic unit on each frozen token, which predicts whether the token lies in a wrong place.

DILEMMA (Sameni et al., AAAI 2023, arXiv 2204.04788) trains encoders with a Linear(D, 1) on the final-norm patch tokens and the mean binary cross
entropy of the tokens that are kept; here the encoder is frozen and only the unit is trained, on any block. Standardised tokens are a choice of this
harness: a linear unit can express the same function on them, and blocks whose outputs differ in scale become comparable at one learning rate.

Shape legend: N images, B images of a batch, n = h w tokens of an image, M = B n, D features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import pydantic
import torch

from harness.core import UNMARKED, Predictions, Rows, State
from harness.data.item_key import ItemKey
from harness.errors import ProbeError
from harness.probes.fields import Count, MaskFields
from harness.probes.heads import AffineHead, Examples, HeadStack, NormedFields, TrainedProbe, sgd_or_adamw
from harness.probes.lib.features import CHUNK_ROWS, FeatureNorm, Normaliser, as_tensor, checked_features, on_device
from harness.probes.lib.schedule import cosine

NAME = "detector"


Theta = Annotated[float, pydantic.Field(gt=0, lt=1)]


class DetectorFields(NormedFields, MaskFields):
    """How the unit is trained, and on what."""

    mask: Literal["object", "part", "misplaced"] = "misplaced"
    theta: Theta = 0.2
    """The expected share of wrong tokens: a token is predicted to be wrong where its probability is at least this. At 0 and 1 there would be only
    one class."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """`momentum` is for sgd; adamw has betas 0.9 and 0.999."""
    epochs: Count = 30
    batch_size: Count = 64
    """Images."""
    feature_norm: FeatureNorm = "standardize"
    max_tokens: Count = 1_000_000
    """Maximum number of scored tokens. Whole images are scored; a seed chooses among them where the tokens are too many."""


def log_odds(share: float) -> float:
    """Natural logarithm."""
    return math.log(share / (1 - share))


def checked_marks(rows: Rows) -> torch.Tensor:
    """uint8 [N, n]: 1 for wrong tokens, 0 for right ones, UNMARKED for neither. Raises ProbeError where the rows have no such marks."""
    masks, tokens = rows.masks, rows.features.shape[1] * rows.features.shape[2]
    if masks is None or len(masks) != len(rows) or int(np.prod(masks.shape[1:])) != tokens:
        got = "none" if masks is None else f"shape {masks.shape}"
        raise ProbeError(
            f"{NAME} probe: expected one mark for each of {tokens} tokens of {len(rows)} images, got {got}; give tokens that were misplaced"
        )
    others = masks[(masks > 1) & (masks != UNMARKED)]
    if len(others):
        raise ProbeError(f"{NAME} probe: expected marks of 0 and 1, or {UNMARKED} for none, got {others[0]}; set the protocol's mask to misplaced")
    return as_tensor(masks).reshape(len(rows), tokens)


class DetectorHead(AffineHead[DetectorFields, torch.Tensor]):
    """One logistic unit and its optimiser; its bias starts at the log odds of theta, which is the base rate."""

    def __init__(self, tensors: State, fields: DetectorFields) -> None:
        super().__init__(tensors, sgd_or_adamw(fields.optimizer, momentum=fields.momentum, weight_decay=fields.weight_decay))

    @classmethod
    def drawn(cls, width: int, classes: int, fields: DetectorFields, generator: torch.Generator) -> State:
        """weight [D], bias [1]."""
        return {"weight": torch.empty(width).normal_(0, fields.init_std, generator=generator), "bias": torch.full((1,), log_odds(fields.theta))}

    @staticmethod
    def shape(state: State) -> tuple[int, int]:
        return len(state["weight"]), 2

    def step(self, inputs: torch.Tensor, target: torch.Tensor, lr: float, seeds: tuple[int, int]) -> None:
        """One step on the mean binary cross entropy of tokens [M, D] with marks [M], whose gradient is a subtraction."""
        gradient_M = self.logits(inputs).sigmoid_().sub_(target).div_(len(target))
        self.descend(inputs.T @ gradient_M, gradient_M.sum()[None], lr)

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """float32 [M]: the log odds of lying wrong."""
        return torch.addmv(self.bias, inputs, self.weight)


@dataclass(frozen=True, kw_only=True)
class DetectorProbe(TrainedProbe[DetectorFields]):
    """A logistic unit on tokens [N, h, w, D] with marks [N, 1, n], with a cosine decay to 0. UNMARKED tokens are not trained on."""

    def examples(self, rows: Rows, classes: int, fields: DetectorFields, device: torch.device) -> Examples:
        features, marks = checked_features(NAME, rows, dims=4), checked_marks(rows)
        normaliser = Normaliser.fit(fields.norm, features, device)
        features = on_device(features, device)

        def batch(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
            tokens = normaliser(features[chosen.to(features.device)].to(device).flatten(0, 2))
            wrong = marks[chosen].flatten()
            if (wrong == UNMARKED).any():
                tokens, wrong = tokens[(wrong != UNMARKED).to(device)], wrong[wrong != UNMARKED]
            return (tokens, wrong.to(device, torch.float32)) if len(wrong) else None

        return Examples(width=features.shape[-1], normaliser=normaliser, batch=batch)

    def factor(self, step: int, steps: int, fields: DetectorFields) -> float:
        return cosine(step, steps)

    def predict(self, stack: HeadStack[DetectorFields], rows: Rows, head: int) -> Predictions:
        """One row per token, under `<key>#<place among the image's tokens>`: target 1 where the token lies wrong, -1 where it has no mark; the score
        is the log odds of lying wrong.

        Places count from 0, row by row of the grid; where tokens were dropped, over the remaining ones. The prediction is 1 where the probability is
        at least theta.
        """
        fitted = stack.heads[head]
        features, marks = checked_features(NAME, rows, dims=4, width=fitted.shape(fitted.tensors())[0]), checked_marks(rows)
        images = scored_images(len(rows), marks.shape[1], stack.fields.max_tokens, stack.seed)
        step = max(1, CHUNK_ROWS // marks.shape[1])
        chunks = []
        for start in range(0, len(images), step):
            tokens = stack.normaliser(features[images[start : start + step]].to(fitted.device).flatten(0, 2))
            chunks.append(fitted.logits(tokens).double().cpu())
        odds = torch.cat(chunks).numpy()
        if not np.isfinite(odds).all():
            raise stack.diverged(head)
        places, targets = range(marks.shape[1]), marks[images].flatten().long()
        return Predictions(
            keys=[str(ItemKey(rows.keys[image], place)) for image in images.tolist() for place in places],
            groups=[rows.groups[image] for image in images.tolist() for _ in places],
            targets=targets.masked_fill_(targets == UNMARKED, -1).numpy(),
            predictions=(odds >= log_odds(stack.fields.theta)).astype(np.int64),
            scores=odds,
        )


def scored_images(images: int, tokens: int, max_tokens: int, seed: int) -> torch.Tensor:
    """int64 [N], ascending: the scored images among `images`, with `tokens` tokens per image."""
    most = max(1, max_tokens // tokens)
    if images <= most:
        return torch.arange(images)
    return torch.from_numpy(np.sort(np.random.default_rng(seed).choice(images, most, replace=False)))


PROBE = DetectorProbe(
    name=NAME, fields=DetectorFields, scores="log odds", head=DetectorHead, metrics=("AUROC", "balanced_accuracy", "bce", "bce_chance")
)
