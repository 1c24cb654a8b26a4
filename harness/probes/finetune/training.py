"""An encoder and its head in training, as one network: parameter groups by layer, drop path, steps, checkpoints; and the scoring of the result.

Shape legend: B images, C classes, D features, H W pixels.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from timm.data.mixup import Mixup, mixup_target
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models._manipulate import group_with_matcher
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.functional import cross_entropy

from harness.core import Encoder, Predictions, Proposal, Rows, Sample, State, StreamSetting
from harness.data.augment import CropAndFlip
from harness.data.preprocess import prepare
from harness.encoders.trainable import TrainableEncoder
from harness.errors import ProbeError
from harness.features.readouts import blocks_needed, parse_readout, read
from harness.probes.fields import learning_rates
from harness.probes.finetune import NAME, FinetuneFields, learning_rate
from harness.probes.lib.pictures import Pictured, label_of
from harness.probes.lib.softmax import most_probable

_UNMATCHED = "a name that no matcher knows"
_FINAL_NORMS = ("norm", "fc_norm")
_NOT_DECAYED = ("*pos_embed", "*_token")
"""In addition to parameters of one dimension and those that the network itself lists."""
_DROP_PATHS = ("drop_path", "drop_path1", "drop_path2")
_BATCH_NORM = torch.nn.modules.batchnorm._BatchNorm


# --- the network ------------------------------------------------------------------------------------------------------


class FinetuneNetwork(nn.Module):
    """A copy of an encoder's trunk, with a linear head on one of its readouts."""

    def __init__(self, encoder: Encoder, readout: str, classes: int) -> None:
        super().__init__()
        self._encoder = TrainableEncoder(encoder)
        self._readout = parse_readout(readout)
        self._blocks = blocks_needed([self._readout], encoder.info)
        self.trunk = self._encoder.trunk
        device = next(self.trunk.parameters()).device
        self.head = nn.Linear(self._width(device), classes).to(device)

    def initialise(self, std: float, seed: int) -> None:
        """Draw the head's weights by `seed`; the trunk stays pretrained."""
        first = torch.empty(self.head.weight.shape).normal_(0, std, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            self.head.weight.copy_(first)
            self.head.bias.zero_()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """float [B, C] logits of images, float [B, 3, H, W], normalised."""
        logits: torch.Tensor = self.head(self._rows(images))
        return logits

    def group_matcher(self, coarse: bool = False) -> Any:
        """Parameter name → layer, as timm.optim.param_groups_layer_decay expects it."""
        layers = layers_of(self.trunk)
        top = max(layers.values())
        named = {f"trunk.{name}": layer for name, layer in layers.items() if name != _UNMATCHED}
        return lambda name: named.get(name, top)

    def not_decayed(self) -> tuple[str, ...]:
        """Patterns of the parameters of more than one dimension that have no weight decay."""
        no_weight_decay = getattr(self.trunk, "no_weight_decay", None)
        return (*_NOT_DECAYED, *(f"trunk.{name}" for name in (no_weight_decay() if no_weight_decay is not None else ())))

    def _rows(self, images: torch.Tensor) -> torch.Tensor:
        return read(self._encoder(images, blocks=self._blocks), self._readout, self._encoder.info)

    def _width(self, device: torch.device) -> int:
        training = self.trunk.training
        self.trunk.eval()
        with torch.no_grad():
            width = self._rows(torch.zeros(1, 3, *self._encoder.info.preprocessing.size, device=device)).shape[1]
        self.trunk.train(training)
        return width


def layers_of(trunk: nn.Module) -> dict[str, int]:
    """Layer of each parameter: 0 for the embedding, 1 for the first block and so on, the highest for the final norm and everything outside blocks.

    ViTs are numbered as in BEiT (optim_factory.py of github.com/microsoft/unilm) and MAE (util/lr_decay.py), other networks as timm groups them. A
    network without a group_matcher has the single layer 0. The entry of the name that no matcher knows is the head's layer.
    """
    names = [*(name for name, _ in trunk.named_parameters()), _UNMATCHED]
    matcher = getattr(trunk, "group_matcher", None)
    if matcher is None:
        return dict.fromkeys(names, 0)
    layers = group_with_matcher([(name, name) for name in names], matcher(coarse=False), reverse=True)
    below = {name: layer for name, layer in layers.items() if layer != layers[_UNMATCHED] and name.split(".")[0] not in _FINAL_NORMS}
    order = {layer: rank for rank, layer in enumerate(sorted(set(below.values())))}
    return {name: order[below[name]] if name in below else len(order) for name in names}


def parameter_groups(network: FinetuneNetwork, fields: FinetuneFields) -> list[dict[str, Any]]:
    """Groups for an optimiser: params, weight_decay, and lr_scale = layer_decay ** (highest layer - layer)."""
    groups: list[dict[str, Any]] = param_groups_layer_decay(
        network, weight_decay=fields.weight_decay, no_weight_decay_list=network.not_decayed(), layer_decay=fields.layer_decay
    )
    return groups


def set_drop_path(trunk: nn.Module, rate: float) -> int:
    """Let images skip residual branches at random while `trunk` trains: linearly from 0 at the first block to `rate` at the last one.

    Returns the number of blocks with a place for timm's drop path. Stochastic depth: arXiv 1603.09382.
    """
    blocks = [(module, [name for name in _DROP_PATHS if _has_place(module, name)]) for module in trunk.modules()]
    blocks = [(module, names) for module, names in blocks if names]
    for (module, names), probability in zip(blocks, calculate_drop_path_rates(rate, len(blocks)), strict=True):
        for name in names:
            if probability:
                setattr(module, name, DropPath(probability))
            elif getattr(module, name) is not None:
                setattr(module, name, nn.Identity())
    return len(blocks)


def _has_place(module: nn.Module, name: str) -> bool:
    """timm's ResNets have None as drop path, its other networks a module that does nothing."""
    return hasattr(module, name) and isinstance(getattr(module, name), nn.Identity | DropPath | None)


@contextlib.contextmanager
def seeded(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Make everything that a step draws a function of (seed, step); the random states of the process are restored."""
    number = int.from_bytes(hashlib.sha256(f"{seed}/{step}/{NAME}".encode()).digest()[:4], "big")
    before = np.random.get_state()  # noqa: NPY002 (timm's Mixup draws from the global state)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(number)
            np.random.seed(number)  # noqa: NPY002
            yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


# --- training ---------------------------------------------------------------------------------------------------------


class FinetuneTrainer:
    """One encoder at one learning rate, by AdamW: float32 weights, passes in the run's precision."""

    def __init__(self, setting: StreamSetting[FinetuneFields], proposals: Sequence[Proposal]) -> None:
        """Raises ProbeError for more than one proposal (every proposal has its own network), and in fp16."""
        if len(proposals) != 1:
            raise ProbeError(f"{NAME} probe: expected one learning rate at a time, got {len(proposals)}; train them one after the other")
        if setting.encoder.precision == "fp16":
            raise ProbeError(f"{NAME} probe: expected bf16 or float32, in which gradients need no scaling, got fp16; set resources.precision")
        ((readout, _),) = proposals
        (self._rate,) = learning_rates(NAME, [rate for _, rate in proposals])
        self._setting = setting
        self._fields = fields = setting.protocol
        self._augment = CropAndFlip(scale=fields.crop_scale, flip=fields.flip) if fields.augment == "crop-flip" else None
        self._mixup = _mixup(fields, setting.classes)
        self.network = FinetuneNetwork(setting.encoder.encoder, readout, setting.classes)
        self.network.initialise(fields.init_std, setting.seed)
        set_drop_path(self.network.trunk, fields.drop_path)
        self.network.train()
        self.optimizer = torch.optim.AdamW(parameter_groups(self.network, fields), lr=self._rate, betas=fields.betas)
        self._average = None if fields.ema_decay is None else ModelEmaV3(self.network, decay=fields.ema_decay)
        self.batch_size = fields.batch_size
        self.epochs: int | None = fields.epochs

    def steps(self, per_epoch: int) -> int:
        return self._fields.epochs * per_epoch

    def draw(self, sample: Sample, generator: np.random.Generator) -> Pictured:
        """A random crop, or the encoder's own view where the protocol says so."""
        target, preprocessing = label_of(sample, self._setting.classes), self._setting.encoder.info.preprocessing
        image = prepare(sample.image, preprocessing, "crop") if self._augment is None else self._augment(sample.image, preprocessing, generator)
        return Pictured(image=image, target=target, group=sample.group or sample.key)

    def step(self, batch: Sequence[Pictured], step: int, steps: int) -> None:
        """One step on the mean loss of the batch. Raises ProbeError where the loss is not finite."""
        start = time.perf_counter()
        device, fields = self._setting.encoder.device, self._fields
        rate = learning_rate(self._rate, step, steps, warmup=fields.warmup, min_lr=fields.min_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        self.optimizer.zero_grad(set_to_none=True)
        with seeded(self._setting.seed, step, device):
            images = torch.stack([picture.image for picture in batch]).to(device)
            images, targets = self.mixed(images, torch.tensor([picture.target for picture in batch], device=device))
            loss = self._backward(images, targets)
        if not np.isfinite(loss):
            raise ProbeError(f"{NAME} probe: expected a finite loss, got {loss} at learning rate {self._rate:g}, step {step}; search below it")
        if fields.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), fields.clip_norm)
        self.optimizer.step()
        if self._average is not None:
            self._average.update(self.network, step=step + 1)
        self._setting.encoder.count(len(batch), time.perf_counter() - start)

    def state(self) -> list[dict[str, torch.Tensor]]:
        """Weights, batch statistics, AdamW's moments, the moving average."""
        tensors = {f"network/{name}": tensor for name, tensor in self.network.state_dict().items()}
        for number, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{number}/{name}": tensor for name, tensor in moments.items()}
        if self._average is not None:
            tensors |= {f"average/{name}": tensor for name, tensor in self._average.module.state_dict().items()}
        return [{name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}]

    def load(self, states: Sequence[State]) -> None:
        (state,) = states
        self.network.load_state_dict(_below(state, "network/"))
        if self._average is not None:
            self._average.module.load_state_dict(_below(state, "average/"))
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in _below(state, "optimizer/").items():
            number, _, moment = name.partition("/")
            moments.setdefault(int(number), {})[moment] = tensor
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def fitted(self) -> list[dict[str, torch.Tensor]]:
        """The whole network, or its moving average where the protocol sets one."""
        scored = self.network if self._average is None else self._average.module
        state = {name: tensor.to("cpu", copy=True) for name, tensor in scored.state_dict().items()}
        return [{**state, "lr": torch.tensor(self._rate, dtype=torch.float64)}]

    def _backward(self, images: torch.Tensor, targets: torch.Tensor) -> float:
        """The mean loss of the batch; the gradients of its pieces are summed."""
        pieces = -(-len(images) // self._setting.encoder.batch_size)
        total = 0.0
        for piece, piece_targets in zip(images.tensor_split(pieces), targets.tensor_split(pieces), strict=True):
            self._set_batch_norms(self._fields.batch_norm == "train" and len(piece) > 1)  # one image has no spread
            with self._setting.encoder.autocast():
                logits = self.network(piece)
            smoothing = 0.0 if targets.is_floating_point() else self._fields.label_smoothing  # timm smooths what it mixes
            loss = cross_entropy(logits.float(), piece_targets, label_smoothing=smoothing) * (len(piece) / len(images))
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def _set_batch_norms(self, train: bool) -> None:
        for module in self.network.modules():
            if isinstance(module, _BATCH_NORM):
                module.train(train)

    def mixed(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images, and classes or (where images are mixed) class shares, float32 [B, C]. timm mixes even numbers: the last of an odd batch stays."""
        if self._mixup is None:
            return images, targets
        even = len(images) // 2 * 2
        parts = [self._mixup(images[:even], targets[:even])] if even else []
        if even < len(images):
            parts.append((images[even:], mixup_target(targets[even:], self._setting.classes, smoothing=self._fields.label_smoothing)))
        mixed, shares = zip(*parts, strict=True)
        return torch.cat(mixed), torch.cat(shares)


def _mixup(fields: FinetuneFields, classes: int) -> Any:
    if not fields.mixup and not fields.cutmix:
        return None
    return Mixup(mixup_alpha=fields.mixup, cutmix_alpha=fields.cutmix, label_smoothing=fields.label_smoothing, num_classes=classes)


def _below(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


# --- scoring ----------------------------------------------------------------------------------------------------------


class FinetuneScorer:
    """Fine-tuned networks on the encoder's own resize and centre crop."""

    def __init__(self, setting: StreamSetting[FinetuneFields], heads: Sequence[tuple[str, State]]) -> None:
        self._setting = setting
        self._networks = [(float(state["lr"]), self._restored(readout, state)) for readout, state in heads]

    def view(self, sample: Sample) -> Pictured:
        target = label_of(sample, self._setting.scored_classes or self._setting.classes)
        image = prepare(sample.image, self._setting.encoder.info.preprocessing, "crop")
        return Pictured(image=image, target=target, group=sample.group or sample.key)

    def inputs(self, example: Pictured) -> int:
        return 1

    def predict(self, keys: Sequence[str], batch: Sequence[Pictured]) -> list[Predictions | ProbeError]:
        rows = Rows(
            keys=keys,
            groups=[picture.group for picture in batch],
            targets=np.array([picture.target for picture in batch], np.int64),
            features=np.zeros((len(batch), 0), np.float32),
        )
        images = torch.stack([picture.image for picture in batch])
        return [self._predicted(rate, self._logits(network, images), rows) for rate, network in self._networks]

    def _predicted(self, rate: float, logits: torch.Tensor, rows: Rows) -> Predictions | ProbeError:
        if not bool(logits.isfinite().all()):
            return ProbeError(f"{NAME} probe: expected finite outputs, got NaN or infinity at learning rate {rate:g}; search below it")
        return most_probable(rows, logits.softmax(dim=1))

    def _logits(self, network: FinetuneNetwork, images: torch.Tensor) -> torch.Tensor:
        """float32 [B, C], on the CPU; in padded batches of one size, so that an image's logits do not depend on its batch."""
        start, encoder = time.perf_counter(), self._setting.encoder
        parts = []
        for chunk in torch.split(images, encoder.batch_size):
            padding = chunk[:1].expand(encoder.batch_size - len(chunk), -1, -1, -1)
            with torch.inference_mode(), encoder.autocast():
                parts.append(network(torch.cat([chunk, padding]).to(encoder.device))[: len(chunk)].float().cpu())
        encoder.count(len(images), time.perf_counter() - start)
        return torch.cat(parts)

    def _restored(self, readout: str, state: State) -> FinetuneNetwork:
        network = FinetuneNetwork(self._setting.encoder.encoder, readout, self._setting.classes)
        network.load_state_dict({name: tensor for name, tensor in state.items() if name != "lr"})
        return network.eval()
