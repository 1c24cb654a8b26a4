"""Full fine-tuning: the whole encoder and a linear head, trained together on augmented images. Fields, learning-rate schedule and rungs.

The training itself is in harness.probes.finetune.training. It cannot use a feature bank, since the features change with every step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import pydantic

from harness.core import Passes, Proposal, Reading, Rungs, Scorer, State, StreamProbe, StreamSetting, Trainer
from harness.probes.fields import BelowOne, Count, Momentum, NonNegative, Positive, PositiveAsWritten, Probability, RateFields, Share, TrainedFields

NAME = "finetune"
TRAINING_PASSES = 3
"""Training an encoder takes about three forward passes per image: one forward pass, and a backward pass of twice its time."""


class FinetuneFields(TrainedFields, RateFields):
    """The defaults are our choice: DILEMMA (arXiv 2204.04788) fine-tunes with a recipe that is not published.

    "As MAE" refers to the released fine-tuning of ViT-B (He et al., arXiv 2111.06377; FINETUNE.md, main_finetune.py and util/ of
    github.com/facebookresearch/mae). Unlike that recipe, the defaults have no RandAugment, random erasing, mixup or cutmix, take the mean of the
    patch tokens after the final norm and not before it, and search the learning rate.
    """

    epochs: Count = 100
    """As MAE."""
    batch_size: Count = 1024
    """As MAE. A batch is split into pieces of the encoder's batch size, whose gradients are summed."""
    warmup: BelowOne = 0.05
    """Share of the training in which the rate rises linearly from 0: 5 of 100 epochs, as MAE."""
    min_lr: NonNegative = 1e-6
    """Final value of the cosine, times the layer's scale; as MAE. A lower rate stays constant."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    """Of AdamW; as MAE."""
    weight_decay: NonNegative = 0.05
    """As MAE. Not applied to parameters of one dimension (norms, biases, layer scales), position embeddings, cls and register tokens."""
    layer_decay: Annotated[float, pydantic.Field(gt=0, le=1)] = 0.65
    """Ratio of a layer's rate to that of the next layer; as MAE. No effect on networks without timm's group_matcher, whose layers are unknown."""
    drop_path: BelowOne = 0.1
    """Probability that an image skips a residual branch, rising linearly from 0 at the first block to this at the last; as MAE. No effect on networks
    without a place for timm's drop path."""
    mixup: NonNegative = 0.0
    """Alpha of mixup (arXiv 1710.09412); 0 is off."""
    cutmix: NonNegative = 0.0
    """Alpha of cutmix (arXiv 1905.04899); 0 is off. With both on, a batch uses cutmix with probability 1/2."""
    label_smoothing: BelowOne = 0.1
    """As MAE."""
    ema_decay: Annotated[int | float, pydantic.Field(ge=0, lt=1)] | None = None
    """Decay of a moving average of the weights, which is then scored in their place; None for no average."""
    clip_norm: PositiveAsWritten | None = None
    """Maximum norm of the gradient over all parameters; None for no bound, as MAE."""
    batch_norm: Literal["train", "frozen"] = "train"
    """Whether batch norms use and update batch statistics, or keep those of the pretraining; their weights are trained in both cases."""
    init_std: NonNegative = 2e-5
    """Standard deviation of the head's initial weights, which are normal; as MAE. Its biases start at 0."""
    augment: Literal["crop-flip", "none"] = "crop-flip"
    """None: the encoder's own resize and centre crop, as at test time."""
    crop_scale: tuple[Share, Share] = (0.08, 1.0)
    """Bounds of the crop's share of the image's area."""
    flip: Probability = 0.5
    lr_bounds: tuple[Positive, Positive] = (1e-5, 1e-2)
    """Bounds of the search, in place of the sweep's, which are meant for heads on frozen features. They are actual rates at `batch_size`."""
    rungs: Count = 3
    """Stages of successive halving within a round; with 1, every learning rate is trained to the end."""
    eta: Annotated[int, pydantic.Field(ge=2)] = 3
    """One in `eta` learning rates of a rung continues, for `eta` times the epochs."""

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> Self:
        for low, high in (self.lr_bounds, self.crop_scale):
            if low > high:
                raise ValueError(f"expected bounds in order, got {low:g} before {high:g}")
        return self


def learning_rate(rate: float, step: int, steps: int, *, warmup: float, min_lr: float) -> float:
    """The rate of a step, 0 to steps - 1: a linear rise from 0 over the first `warmup` share of the steps, then half a cosine towards `min_lr`.

    Source: util/lr_sched.py of github.com/facebookresearch/mae, where fractional epochs stand for the shares of the training used here.
    """
    share = step / steps
    if share < warmup:
        return rate * share / warmup
    least = min(min_lr, rate)
    return least + (rate - least) * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup))) / 2


def rung_ends(epochs: int, rungs: int, eta: int) -> tuple[int, ...]:
    """Epochs after which each rung ends: the last rung after all epochs, each earlier one after 1/eta of the next, rounded up.

    Successive halving: Jamieson and Talwalkar, arXiv 1502.07943. Rungs that would end together are merged.
    """
    return tuple(sorted({-(-epochs // eta**left) for left in range(rungs)}))


class FinetuneProbe(StreamProbe[FinetuneFields]):
    """A copy of the encoder and a linear head, one network per learning rate, by successive halving; the networks are not kept with the results."""

    def trainer(self, setting: StreamSetting[FinetuneFields], proposals: Sequence[Proposal]) -> Trainer[Any]:
        from harness.probes.finetune.training import FinetuneTrainer

        return FinetuneTrainer(setting, proposals)

    def scorer(self, setting: StreamSetting[FinetuneFields], heads: Sequence[tuple[str, State]]) -> Scorer[Any]:
        from harness.probes.finetune.training import FinetuneScorer

        return FinetuneScorer(setting, heads)

    def rungs(self, fields: FinetuneFields) -> Rungs:
        return Rungs(ends=rung_ends(fields.epochs, fields.rungs, fields.eta), eta=fields.eta)

    def passes(self, fields: FinetuneFields, reading: Reading) -> Passes:
        """Networks are trained one by one, up to the rung at which they stop; all networks of a rung are scored at its end."""
        images, scored, heads, before = 0.0, 0.0, reading.heads, 0
        for end in self.rungs(fields).ends:
            images += heads * (end - before) * reading.train
            scored += heads
            heads, before = max(1, heads // fields.eta), end
        return Passes(decoded=images + scored * reading.read_to_choose, encoded=TRAINING_PASSES * images + scored * reading.chosen_on)


PROBE = FinetuneProbe(name=NAME, fields=FinetuneFields, has_learning_rate=True, keeps_heads=False)
