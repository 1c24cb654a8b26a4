"""The nouns that every room shares: frozen values and protocols, with no behaviour to speak of. Imports nothing of ours but errors.

Shape legend: B batch, N rows, C classes, D features, H W pixels, h w patch grid, K heads of a stack, G groups (images), M counts.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, Self, TypeVar, get_args, get_origin

import numpy as np
import pydantic
import torch

from harness.errors import ProbeError, RequestError, complaint, nearest

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
    """Unique in its bank, and told by `harness.data.item_key.ItemKey` of which sample it is."""
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
    channels_last: bool = False
    """Whether its weights and feature maps lie in memory with the channels last, which may change its features to rounding."""
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


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """What a probe measures of every item, where it predicts nothing."""

    name: str
    unit: str
    undefined: str
    """Why an item, or all of them, may have no value."""
    is_outcome: bool = False
    """Whether it is 0 or 1 of every item, so that its mean is a share."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """One row per scored item. Enough to recompute every metric of its task.

    Classification: target and predicted class, score = the predicted class's probability. Retrieval: target = the query's class, prediction = its
    nearest neighbour's class (-1 without any), score = its average precision (NaN where undefined). Segmentation: one row per
    (image, true class, predicted class) that occurs, score = number of pixels. Measurements: one row per (item, quantity), target = the quantity's
    number among `Probe.quantities`, prediction = -1, score = its value (NaN where undefined).
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


ScoreKind = Literal["probabilities", "cosines", "average precisions", "pixels", "log odds", "quantities"]
"""What the scores of predictions are: probabilities are of the predicted class."""
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
    def reads(self) -> tuple[ScoreKind, ...]:
        """The predictions that it can be worked out from, by what their scores are: by default those of a class, whose score it does not read."""
        return ("probabilities", "cosines")

    @property
    def additive(self) -> bool:
        """Whether counts of parts of the predictions may be summed: not where what a column counts depends on the rows."""
        return True

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
        """What `RowProbe.restore` needs beside the training rows; empty for probes without weights."""


# --- probes -----------------------------------------------------------------------------------------------------------


class Fields(pydantic.BaseModel):
    """Choices that move a number, each with its type, range and default.

    A probe has some, a family of tasks has some, and a task's protocol inherits those of both. Values are plain: text, numbers, None, tuples of them.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _as_tuple(cls, value: object, info: pydantic.ValidationInfo) -> object:
        """A list, as YAML and JSON have it, as a tuple; one value in place of a list of one, where a field takes any number of them."""
        if isinstance(value, list):
            return tuple(value)
        kind = cls.model_fields[str(info.field_name)].annotation
        takes_any_number = get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis
        return (value,) if takes_any_number and value is not None and not isinstance(value, tuple) else value

    def replaced(self, **changes: object) -> Self:
        """The same with other values of some fields, checked together. Raises RequestError for the first that cannot be."""
        for name in changes:
            if name not in type(self).model_fields:
                hint = nearest(name, type(self).model_fields)
                raise RequestError(f"protocol.{name}: expected the name of a field, got one that is none{hint}")
        try:
            return self.model_validate({**dict(self), **changes})
        except pydantic.ValidationError as error:
            raise RequestError(complaint(error, "protocol")) from None

    def to_json(self) -> str:
        """As records and keys have it, by name."""
        return json.dumps(self.model_dump(), sort_keys=True)


F = TypeVar("F", bound=Fields)
"""The protocol fields of a probe, or a protocol that has them."""
E = TypeVar("E")
"""What becomes of a sample on a stream; of one in training, `shown` are the labels that are trained on with it."""
State = Mapping[str, torch.Tensor]
"""Tensors of one head, by name."""
Proposal = tuple[str, float | None]
"""Readout and learning rate of one head."""
NeighbourKind = Literal["relevant", "shared"]
"""What is told of a query's nearest items: whether each is of the query's class, or what each shares with it (part, image, class)."""


@dataclass(frozen=True, kw_only=True)
class Probe(Generic[F]):
    """How features become predictions: what a probe can do, and what it asks of whoever runs it.

    A probe is a `RowProbe`, a `StreamProbe`, or both.
    """

    name: str
    fields: type[F]
    """The protocol fields that it reads, with their defaults."""
    has_learning_rate: bool = False
    """Whether its heads differ in a learning rate, which is searched."""
    needs_train: bool = True
    """Whether it reads training rows."""
    keeps_heads: bool = True
    """Whether the chosen head's weights are kept beside the results; a whole network stays in the cache alone."""
    neighbours: NeighbourKind | None = None
    """Whether the nearest items of some test items are kept for the report, and what it tells of them."""
    scores: ScoreKind = "probabilities"
    """What the scores of its predictions are."""
    quantities: tuple[Quantity, ...] = ()
    """What it measures of every item; each is a metric of that name, the mean over items."""
    metrics: tuple[str, ...] = ("accuracy", "mean_class_accuracy")
    """What its predictions are scored by where a task does not say; the first is searched for."""

    def grid(self, fields: F) -> tuple[float | None, ...]:
        """What its heads differ in, where that is no learning rate: the values of a grid of its own, or one None."""
        return (None,)

    def refuses(self, fields: F, info: EncoderInfo, samples: int) -> str | None:
        """Why this encoder cannot be probed so, or None where it can; `samples` are those of the train split.

        Raises RequestError where no encoder could.
        """
        return None


class RowProbe(Probe[F], ABC):
    """A probe that reads rows of feature banks. `fit` and selection never see a test split."""

    @abstractmethod
    def fit(self, train: Rows | None, lrs: Sequence[float | None], *, classes: int, protocol: F, seed: int, device: torch.device) -> FittedStack:
        """One head for each of `lrs`. Raises ProbeError on rows, rates or fields that cannot be."""

    @abstractmethod
    def restore(self, state: State, train: Rows | None, *, classes: int, protocol: F, seed: int, device: torch.device) -> FittedStack:
        """The stack of one head that `state` was taken from."""


class StreamProbe(Probe[F], ABC):
    """A probe that is trained and scored while images stream through the encoder."""

    @abstractmethod
    def trainer(self, setting: StreamSetting[F], proposals: Sequence[Proposal]) -> Trainer[Any]:
        """The heads of a round in training."""

    @abstractmethod
    def scorer(self, setting: StreamSetting[F], heads: Sequence[tuple[str, State]]) -> Scorer[Any]:
        """From (readout, what `Trainer.fitted` gave) of each head."""

    @abstractmethod
    def passes(self, fields: F, reading: Reading) -> Passes:
        """What a round of its search and its test cost."""

    def rungs(self, fields: F) -> Rungs | None:
        """The rungs of successive halving; None where all heads of a round are trained to the end, as one stack."""
        return None

    def together(self, setting: StreamSetting[F]) -> int:
        """Inputs of the encoder that a scorer is given at once, where there are so many left."""
        return setting.encoder.batch_size


@dataclass(frozen=True, kw_only=True)
class Rungs:
    """How a round's heads are trained where only the better ones are trained to the end."""

    ends: tuple[int, ...]
    """Epochs after which each rung ends."""
    eta: int
    """Of the heads of a rung one in so many goes on."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a streamed study reads in a round, as far as the plan knows."""

    train: float
    """Images of an epoch."""
    chosen_on: float
    """Images that heads are scored on after it."""
    read_to_choose: float
    """Images that are decoded to find those."""
    heads: int
    """Of a round."""
    input_size: tuple[int, int]
    """Of the encoder: height and width in pixels."""
    sizes: tuple[tuple[int, int], ...]
    """Height and width of some of the train images; empty where none could be read."""


@dataclass(frozen=True, kw_only=True)
class Passes:
    """A cost in images that are decoded and in passes of the encoder: images of its own input size, larger ones counting by their pixels."""

    decoded: float
    """Of a round."""
    encoded: float
    """Of a round; images that an encoder is trained on count as several."""
    encoded_per_test_image: float = 1.0


class StreamEncoder(Protocol):
    """An encoder on its device, fed in batches of one size, padded, so that an image's tokens do not depend on its batch."""

    info: EncoderInfo
    encoder: Encoder
    device: torch.device
    batch_size: int
    precision: str
    images: int
    """That it has seen."""
    seconds: float
    """That these took."""

    def __call__(
        self, images: torch.Tensor, pick: Callable[[Tokens], Sequence[torch.Tensor]], *, blocks: Sequence[int] = (), projection: bool = False
    ) -> list[torch.Tensor]:
        """What `pick` takes of the tokens of images [B, 3, H, W], float32 [B, ...] each, on the device."""

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of a forward pass."""

    def count(self, images: int, seconds: float) -> None:
        """Note what a pass took."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamSetting(Generic[F]):
    """What a probe is trained and scored under on a stream."""

    encoder: StreamEncoder
    protocol: F
    classes: int
    seed: int
    scored_classes: int = 0
    """Of the samples that are scored, where they are of another data set than the heads; 0 where they are of the same one."""


class Trainer(Protocol[E]):
    """K heads in training on a stream."""

    batch_size: int
    epochs: int | None
    """None where the protocol counts iterations."""

    def steps(self, per_epoch: int) -> int:
        """Steps in all, at so many an epoch."""

    def draw(self, sample: Sample, generator: np.random.Generator) -> E:
        """The training view. Raises ShardError where the sample has not what the task needs."""

    def step(self, batch: Sequence[E], step: int, steps: int) -> None: ...

    def state(self) -> list[dict[str, torch.Tensor]]:
        """Everything that the next step depends on, one a head."""

    def load(self, states: Sequence[State]) -> None: ...

    def fitted(self) -> list[dict[str, torch.Tensor]]:
        """What a head is scored from, one a head."""


class Scorer(Protocol[E]):
    """K fitted heads on a stream."""

    def view(self, sample: Sample) -> E:
        """The deterministic view. Raises ShardError where the sample has not what the task needs."""

    def inputs(self, example: E) -> int:
        """Images that the encoder sees for it."""

    def predict(self, keys: Sequence[str], batch: Sequence[E]) -> list[Predictions | ProbeError]:
        """One a head."""


# --- tasks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TaskProtocol:
    """Every choice that moves a number, named."""

    name: str
    fields: Fields


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
    probe: Probe[Any]
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
