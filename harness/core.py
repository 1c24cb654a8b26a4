"""The nouns that every room shares: frozen values and protocols, with no behaviour to speak of. Imports nothing of ours.

Shape legend: B batch, N rows, C classes, D features, H W pixels, h w patch grid, K heads of a stack, G groups (images), M counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch

Level = Literal["object", "part"]
Fit = Literal["crop", "resize"]
Feed = Literal["banked", "streamed"]
PositionKind = Literal["absolute", "relative", "rotary", "none"]
FieldValue = str | int | float | bool | None | tuple["FieldValue", ...]


# --- what a shard holds, and what a view makes of it ------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Keypoint:
    """A named point: x to the right, y down, in pixels, (0, 0) the top left corner of the top left pixel."""

    part: str
    x: float
    y: float
    visible: bool = True
    instance: int | None = None
    """Which thing of the image it belongs to, as the index of that thing's box in `Sample.boxes`; None where the data set does not tell."""


@dataclass(frozen=True, kw_only=True)
class Box:
    """An axis-aligned box in pixels, with the class it bounds (None where the data set does not say)."""

    x: float
    y: float
    width: float
    height: float
    label: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One record of a shard, decoded: whatever its data set has."""

    key: str
    image: np.ndarray
    """uint8 [H, W, 3], RGB."""
    label: int | None = None
    boxes: tuple[Box, ...] = ()
    keypoints: tuple[Keypoint, ...] = ()
    object_mask: np.ndarray | None = None
    """uint8 or uint16 [H', W'] label map."""
    part_mask: np.ndarray | None = None
    """uint8 or uint16 [H', W'] label map."""
    group: str | None = None
    """The photograph that several samples were cut from; None where the sample is one of its own."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Item:
    """One input that a view made of a sample."""

    key: str
    """Unique in its bank; the sample's key, or that with a suffix such as `#head`."""
    group: str
    """The sample's group, or else its key: what the bootstrap resamples, and what `strict` retrieval keeps out of a query's gallery."""
    target: int | None
    image: np.ndarray
    """uint8 [H, W, 3]."""
    masks: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Label maps by name (object, part), for dense tasks; each covers the whole of `image`, at a resolution of its own."""


UNMARKED = 255
"""The mark of a token that has no label."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Altered:
    """What an alteration made of one prepared image, g being the cells of the encoder's grid."""

    image: torch.Tensor
    """float32 [3, H, W], normalised."""
    keep: torch.Tensor | None = None
    """int64 [n], ascending: the (row-major) grid cells whose tokens are encoded; None for all g."""
    positions: torch.Tensor | None = None
    """int64 [n]: the grid cell whose position each of those tokens is given; None for its own."""
    marks: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Labels of those tokens by name, uint8 [1, n], UNMARKED where a token has none: kept as label maps beside readouts of tokens."""


class Alteration(Protocol):
    """Something done to an image after it was prepared, in terms of the encoder's own grid: tokens dropped or misplaced, cells shuffled or greyed."""

    @property
    def identity(self) -> str:
        """Names the alteration and every parameter of it."""

    def refuses(self, info: EncoderInfo) -> str | None:
        """Why this encoder cannot see images so altered, or None where it can."""

    def __call__(self, image: torch.Tensor, grid: tuple[int, int], key: str) -> Altered:
        """What becomes of `image`, float32 [3, H, W]; a function of its arguments alone. The number of tokens kept is that of `grid` alone."""


class View(Protocol):
    """A sample to the inputs that a task family needs. A view inherits from this, and with it `items`."""

    @property
    def identity(self) -> str:
        """Names the view and every parameter of it: part of a bank's key."""

    @property
    def fit(self) -> Fit:
        """How the encoder brings an item to its input size: its own resize and centre crop, or a plain resize."""

    @property
    def alteration(self) -> Alteration | None:
        """What is done to every item once it has its input size."""

    @property
    def items(self) -> int:
        """Items per sample where the view alone tells; a view that says nothing counts as one, as does one whose images tell."""
        return 1

    def __call__(self, sample: Sample) -> list[Item]:
        """The items of one sample, in a fixed order; empty where the sample has none."""


# --- encoders ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an encoder wants its images: resize the shorter side, crop the centre, scale to [0, 1], normalise."""

    size: tuple[int, int]
    """Input height and width in pixels."""
    resize: int
    """The shorter side before the centre crop, in pixels."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What became of every key of a checkpoint."""

    file: str
    sha256: str
    matched: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    """Keys left out on purpose, by the converter's declared list."""


@dataclass(frozen=True, kw_only=True)
class EncoderInfo:
    """Everything about an encoder that a record, a bank key or a reader needs."""

    name: str
    family: str
    architecture: str
    source: str
    """Where the weights come from and what is known of them, in words."""
    weights_sha256: str
    """Over the tensors (name, shape, dtype, bytes, by name), whatever file they came in."""
    params: int
    embed_dim: int
    block_dims: tuple[int, ...]
    """Width of each block's output (stages, for convolutional encoders); its length is the number of blocks."""
    grid: tuple[int, int]
    """Patch grid (h, w) at the preprocessing's size."""
    has_cls: bool
    registers: int
    projection_dim: int | None
    positions: PositionKind
    preprocessing: Preprocessing
    preprocessing_source: str = "its family's"
    """Where the preprocessing comes from, in words. It is in no key: equal values give equal features, wherever they come from."""
    preprocessing_replaced: tuple[str, ...] = ()
    """Fields of the preprocessing that the sweep, or what is written in or beside the weights, gives another value than is known of the weights."""
    random: bool = False
    chooses_tokens: bool = False
    """Whether `Encoder.encode` takes `keep` and `positions`."""
    float32_only: bool = False
    """Whether it computes in float32 whatever precision a run asks for, because less would move its features by more than 2 %."""
    load_report: LoadReport | None = None
    notes: tuple[str, ...] = ()
    """Choices worth a line in the record, such as how position embeddings were resized."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """What an encoder gives for a batch, after its final norm."""

    cls: torch.Tensor | None
    """[B, D]."""
    patches: torch.Tensor
    """[B, h, w, D]; [B, 1, n, D] where only n tokens were kept."""
    registers: torch.Tensor | None = None
    """[B, R, D]."""
    blocks: Mapping[int, Tokens] = field(default_factory=dict)
    """Chosen blocks' outputs, by 0-based index, as the blocks give them (before the final norm)."""
    projection: torch.Tensor | None = None
    """[B, P], the pretraining head's output."""


class Encoder(Protocol):
    """A frozen network, its preprocessing and its identity."""

    @property
    def info(self) -> EncoderInfo: ...

    @property
    def module(self) -> torch.nn.Module:
        """The network, for placing on a device."""

    def encode(
        self,
        images: torch.Tensor,
        *,
        blocks: Sequence[int] = (),
        projection: bool = False,
        keep: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> Tokens:
        """Tokens of `images`, float [B, 3, H, W], already normalised.

        `keep` [B, n] int64 are the (row-major) grid indices of the patch tokens to encode, the others being dropped before the first block.
        `positions` [B, n] int64 gives each kept token the position embedding of that grid index in place of its own.
        Raises EncoderError where the architecture cannot do what is asked.
        """


# --- feature rows and predictions -------------------------------------------------------------------------------------


class FeatureArray(Protocol):
    """What is read of features: a NumPy array, or one that lies in many files and does not fit into memory."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def ndim(self) -> int: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def nbytes(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, where: Any, /) -> np.ndarray:
        """A slice of rows, or the rows at int64 [...]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Rows of a feature bank, in the manifest's order."""

    keys: Sequence[str]
    groups: Sequence[str]
    targets: np.ndarray
    """int64 [N]; -1 where a row has none."""
    features: FeatureArray
    """float32 [N, D], or float16/float32 [N, h, w, D] for tokens."""
    masks: np.ndarray | None = None
    """uint8 or uint16 [N, H, W], for dense tasks."""
    reference: Rows | None = None
    """Rows of another view of the same split, which these are compared with; matched by group."""

    def __len__(self) -> int:
        return len(self.keys)


QUANTITIES: Mapping[str, tuple[str, ...]] = {
    "convergence": ("cosine", "cosine_floor", "relative_distance", "relative_distance_floor"),
    "locality": ("same_part", "same_part_chance", "same_image", "same_image_chance", "same_class", "same_class_chance"),
}
"""Probe to what it measures of every item, where it predicts nothing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """One row per scored item. Enough to recompute every metric of its task.

    Classification: target and predicted class, score = the predicted class's probability. Retrieval: target = the query's class, prediction = its
    nearest neighbour's class (-1 without any), score = its average precision (NaN where undefined). Segmentation: one row per
    (image, true class, predicted class) that occurs, score = number of pixels. Measurements: one row per (item, quantity), target = the quantity's
    number in QUANTITIES, prediction = -1, score = its value (NaN where undefined).
    """

    keys: Sequence[str]
    groups: Sequence[str]
    targets: np.ndarray
    """int64 [N]."""
    predictions: np.ndarray
    """int64 [N]."""
    scores: np.ndarray
    """float64 [N]."""

    def __len__(self) -> int:
        return len(self.keys)


FRACTION = "fraction"
"""The unit of accuracies, AP, IoU and the like."""


class Metric(Protocol):
    """A metric as additive counts per group and a function of their sum, so that a bootstrap is one matrix product.

    A metric is a subclass: it gives `name`, `counts` and `value`, and whatever else differs from what stands here.
    """

    @property
    def name(self) -> str: ...

    @property
    def unit(self) -> str:
        """What its values are in."""
        return FRACTION

    @property
    def lower_is_better(self) -> bool:
        """Whether of two values the lower one is the better."""
        return False

    @property
    def is_mean_of_outcomes(self) -> bool:
        """Whether its value is a mean of outcomes that are each 0 or 1, such as wrong and right, every one counting alike."""
        return False

    @property
    def undefined(self) -> str | None:
        """Why it has no value where rows were counted and yet it has none; None where there is no more to say than that nothing was counted."""
        return None

    @property
    def uncounted(self) -> str:
        """What is the matter with items that it does not count."""
        return "they have no label"

    def counted(self, predictions: Predictions) -> np.ndarray:
        """bool [N]: the rows that the value is of."""
        return predictions.targets >= 0

    def counts(self, predictions: Predictions, classes: int) -> np.ndarray:
        """float64 [G, M], groups in order of first appearance in `predictions`."""

    def value(self, sums: np.ndarray) -> np.ndarray:
        """[..., M] counts to [...] values; NaN where undefined."""


class FittedStack(Protocol):
    """K heads trained in one pass over the data, each as it would have been alone."""

    def predict(self, rows: Rows, head: int) -> Predictions:
        """Predictions of one head. Raises ProbeError where `rows` do not fit."""

    def state(self, head: int) -> dict[str, torch.Tensor]:
        """What `Probe.restore` needs beside the training rows; empty for probes without weights."""


class Probe(Protocol):
    """How features become predictions. `fit` and selection never see a test split."""

    @property
    def name(self) -> str: ...

    @property
    def has_learning_rate(self) -> bool: ...

    @property
    def needs_train(self) -> bool: ...

    def fit(
        self, train: Rows | None, lrs: Sequence[float | None], *, classes: int, protocol: Mapping[str, Any], seed: int, device: torch.device
    ) -> FittedStack: ...

    def restore(
        self,
        state: Mapping[str, torch.Tensor],
        train: Rows | None,
        *,
        classes: int,
        protocol: Mapping[str, Any],
        seed: int,
        device: torch.device,
    ) -> FittedStack:
        """The stack of one head that `state` was taken from."""


# --- tasks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TaskProtocol:
    """Every choice that moves a number, named."""

    name: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """data × view × readout × probe × metric × protocol, with a level."""

    name: str
    """`<data set>/<task>`."""
    level: Level
    dataset: str
    classes: tuple[str, ...]
    """What the probe predicts."""
    view: View
    readouts: tuple[str, ...]
    """Candidates, in order of preference; the search chooses among them on val."""
    probe: Probe
    metrics: tuple[Metric, ...]
    """The first is the one that is searched for, unless `chosen_by` names another."""
    protocol: TaskProtocol
    feed: Feed = "banked"
    """Whether the probe reads feature banks, or trains while its images stream through the encoder."""
    train_view: View | None = None
    """What the probe is trained and chosen on, where that is another view than `view`, which is then of the test split alone."""
    val_view: View | None = None
    """What heads are chosen on, where that is another view than `train_view`. Without a val split: of the images of train that are held out."""
    reference_view: View | None = None
    """The view of the test split whose rows come along as `Rows.reference`."""
    chooses_readout: bool = True
    """Whether the search chooses among the readouts, or the first one that the encoder has is taken."""
    instead: Task | None = None
    """What stands in for this task where the encoder cannot see its view."""
    levels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Coarser levels of the classes, at which metrics named `<metric>@<level>` are taken: class → its class at the level."""
    train_dataset: str | None = None
    """The data set that the probe is trained and chosen on, where that is another one, whose labels it then predicts."""
    counterparts: tuple[tuple[int, ...], ...] = ()
    """Where it is trained on another data set: label → the labels there that mean the same. Items of labels without any are not scored, and any
    prediction that is none of an item's counterparts is wrong."""
    chosen_by: Metric | None = None
    """What the search is for, where that is not the first of `metrics`."""

    @property
    def searched(self) -> Metric:
        """What heads are chosen by."""
        return self.chosen_by or self.metrics[0]
