"""Random crops of an image that are drawn once and kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from harness.core import Fit, Item, Sample, View
from harness.data.augment import CropAndFlip, draw
from harness.data.item_key import ItemKey
from harness.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class RandomCrops(View):
    """`count` items per sample, `<key>#<crop>`, with the sample's label and group without its label maps: random-resized crops, flipped at random.

    Crop v is what `augment` draws with the generator of (seed, v, key), as epoch v of a stream at that seed draws it. It is resized to the encoder's
    input with the encoder's own interpolation, where a stream always resizes bicubically; and it is flipped before resizing, where a stream flips
    afterwards, which moves a value by rounding at most.

    Raises RequestError unless there is at least one crop.
    """

    count: int
    augment: CropAndFlip = field(default_factory=CropAndFlip)
    seed: int = 0

    fit: ClassVar[Fit] = "resize"
    alteration: ClassVar[None] = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise RequestError(f"random crops: expected at least one, got {self.count}; raise it")

    @property
    def identity(self) -> str:
        scale, ratio = ("..".join(f"{bound:.9g}" for bound in bounds) for bounds in (self.augment.scale, self.augment.ratio))
        return f"random_crops(count={self.count};scale={scale};ratio={ratio};flip={self.augment.flip:.9g};seed={self.seed})"

    @property
    def items(self) -> int:
        """Crops of a sample."""
        return self.count

    def __call__(self, sample: Sample) -> list[Item]:
        return [self._crop(sample, index) for index in range(self.count)]

    def _crop(self, sample: Sample, index: int) -> Item:
        generator = draw(self.seed, index, sample.key)
        (top, left, height, width), flipped = self.augment.drawn(sample.image.shape[0], sample.image.shape[1], generator)
        image = sample.image[top : top + height, left : left + width]
        return Item(
            key=str(ItemKey(sample.key, index)),
            group=sample.group or sample.key,
            target=sample.label,
            image=image[:, ::-1] if flipped else image,
        )
