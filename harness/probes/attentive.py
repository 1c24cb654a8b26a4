"""The attentive probe: one learned query attends to all tokens, and a linear classifier reads what it gathers; a stack of them, one a learning rate.

Zhu et al., TMLR 2023 (arXiv 2301.11915): layer norm on query, keys and values, multi-head cross-attention, no residual and no MLP, batch norm without
affine, Linear; SGD as for the linear probe. Not stated there: biases as torch.nn.MultiheadAttention and the authors' released code (patch_lincls.py,
vits.py) have them, but for the keys', which makes no difference (below); layer norms with eps 1e-6 and a classifier of N(0, 0.01), as there. The
defaults of `anneal`, `bn_eps` and `init` are chosen here; the released code has others.

The attention is computed as torch.nn.MultiheadAttention would, with its products in another order. There is one query, so the key projection is
applied to it and not to every token, and the value projection to the weighted mean of the tokens (the weights sum to 1): O(T D heads) a row, not
O(T D²). What adds the same amount to all scores of a head (the bias of the keys, the shift of their layer norm) does not pass the softmax and is
left out.

Every head runs the very calls that it would make alone; the stack shares the reading and the normalising of each batch.

Shape legend: N rows, B batch, T tokens, D features, A attention heads, d = D / A, C classes, K heads of the stack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from harness.core import Predictions, Probe, Rows
from harness.errors import ProbeError
from harness.probes.augmented import KeptRows
from harness.probes.features import Features, batch_order, checked_features, checked_targets, needed, on_device
from harness.probes.fields import AfterEpoch, Bounds, Count, Fields, Momentum, NonNegative, Positive, learning_rates
from harness.probes.schedule import Anneal, annealed
from harness.probes.softmax import most_probable

NAME = "attentive"
EPS = 1e-6
"""Of the layer norms."""
RELEASE: dict[str, Any] = {"anneal": "epoch", "bn_eps": 1e-5, "init": "trunc-normal"}
"""How the authors' released code trains it, where that is not the default."""
INIT_STD = 0.02
"""Of the query, and of projections that are not Xavier-uniform."""
RUNNING_MOMENTUM = 0.1
"""Of the running statistics, as torch.nn.BatchNorm1d's."""
VELOCITY = "velocity/"
"""How the names of a head's momentum begin in its checkpoint."""


class AttentiveFields(Fields):
    """Defaults: the attentive probe of Zhu et al."""

    epochs: Count = 90
    batch_size: Count = 1024
    momentum: Momentum = 0.9
    weight_decay: NonNegative = 0.0
    attention_heads: Count = 12
    init_std: NonNegative = 0.01
    """Of the classifier's weights."""
    init: Literal["xavier", "trunc-normal"] = "xavier"
    """Of the projections, Xavier-uniform beside a query of N(0, 0.02), or of both, N(0, 0.02) within one standard deviation."""
    anneal: Anneal = "step"
    bn_eps: Positive = 1e-6
    bn_eval: Literal["running", "batch"] = "running"
    """Statistics at prediction: those of training, or (as the release does) those of each batch of `bn_batch` rows, in their order."""
    bn_batch: Count = 256
    lr_bounds: Bounds = None


DEFAULTS: dict[str, Any] = AttentiveFields().model_dump()


class AttentiveHead(nn.Module):
    """Parameters named as the layers they stand for; see the module's text for what is left out."""

    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, width: int, classes: int, attention_heads: int, bn_eps: float) -> None:
        super().__init__()
        self.attention_heads, self.bn_eps = attention_heads, bn_eps
        self.query = nn.Parameter(torch.zeros(width))
        self.norm_query_weight, self.norm_query_bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.norm_key_weight = nn.Parameter(torch.ones(width))
        self.norm_value_weight, self.norm_value_bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.query_weight, self.query_bias = nn.Parameter(torch.zeros(width, width)), nn.Parameter(torch.zeros(width))
        self.key_weight = nn.Parameter(torch.zeros(width, width))
        self.value_weight, self.value_bias = nn.Parameter(torch.zeros(width, width)), nn.Parameter(torch.zeros(width))
        self.out_weight, self.out_bias = nn.Parameter(torch.zeros(width, width)), nn.Parameter(torch.zeros(width))
        self.classifier_weight, self.classifier_bias = nn.Parameter(torch.zeros(classes, width)), nn.Parameter(torch.zeros(classes))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator, fields: AttentiveFields) -> None:
        """Random parameters from a CPU generator."""
        projections = (self.query_weight, self.key_weight, self.value_weight, self.out_weight)
        if fields.init == "xavier":
            self.query.normal_(0, INIT_STD, generator=generator)
            for weight in projections:
                nn.init.xavier_uniform_(weight, generator=generator)
        else:
            for weight in (self.query, *projections):
                nn.init.trunc_normal_(weight, std=INIT_STD, a=-INIT_STD, b=INIT_STD, generator=generator)
        self.classifier_weight.normal_(0, fields.init_std, generator=generator)

    def gather(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, D]: what the query gathers from tokens [B, T, D] that were normalised over D, without affine."""
        heads, size = self.attention_heads, tokens.shape[-1] // self.attention_heads
        query = nn.functional.layer_norm(self.query, self.query.shape, self.norm_query_weight, self.norm_query_bias, EPS)
        query_A1d = (nn.functional.linear(query, self.query_weight, self.query_bias) * size**-0.5).view(heads, 1, size)
        asked_AD = (query_A1d @ self.key_weight.view(heads, size, -1))[:, 0] * self.norm_key_weight
        attention_BAT = (tokens @ asked_AD.T).softmax(dim=1).transpose(1, 2)
        mean_BAD = attention_BAT @ tokens * self.norm_value_weight + self.norm_value_bias
        value_BAd = torch.einsum("bad,aed->bae", mean_BAD, self.value_weight.view(heads, size, -1)) + self.value_bias.view(heads, size)
        return nn.functional.linear(value_BAd.flatten(1), self.out_weight, self.out_bias)

    def forward(self, tokens: torch.Tensor, batch_statistics: bool) -> torch.Tensor:
        """Logits [B, C] of normalised tokens [B, T, D]; in training mode the running statistics follow."""
        gathered = self.gather(tokens)
        mean, variance = self.running_mean, self.running_var
        if batch_statistics:
            mean, variance = gathered.mean(dim=0), gathered.var(dim=0, correction=0)
            if self.training and len(gathered) > 1:
                self._follow(mean.detach(), variance.detach() * len(gathered) / (len(gathered) - 1))
        return nn.functional.linear((gathered - mean) * (variance + self.bn_eps).rsqrt(), self.classifier_weight, self.classifier_bias)

    def _follow(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        self.running_mean.lerp_(mean, RUNNING_MOMENTUM)
        self.running_var.lerp_(variance, RUNNING_MOMENTUM)


class HeadInTraining:
    """A head under SGD with momentum, one step at a time; `lr` is given to each step."""

    def __init__(self, module: AttentiveHead, fields: AttentiveFields) -> None:
        self.module = module
        self._optimizer = torch.optim.SGD(module.parameters(), lr=0.0, momentum=fields.momentum, weight_decay=fields.weight_decay, foreach=False)

    def step(self, tokens: torch.Tensor, targets: torch.Tensor, lr: float) -> None:
        """One step on the mean cross entropy of normalised tokens, float32 [B, T, D], and targets, int64 [B], both on the head's device."""
        self._optimizer.param_groups[0]["lr"] = lr
        self._optimizer.zero_grad()
        self.module.train()  # it may have been asked to predict since the last step
        torch.autograd.backward(nn.functional.cross_entropy(self.module(tokens, True), targets))
        self._optimizer.step()

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that the next step depends on, by name, on the CPU; copies. Momentum is there from the first step on."""
        velocities = {
            f"{VELOCITY}{name}": buffer
            for name, parameter in self.module.named_parameters()
            if (buffer := self._optimizer.state[parameter].get("momentum_buffer")) is not None
        }
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in (self.module.state_dict() | velocities).items()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `state` gave."""
        self.module.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith(VELOCITY)})
        for name, parameter in self.module.named_parameters():
            if f"{VELOCITY}{name}" in state:
                self._optimizer.state[parameter]["momentum_buffer"] = state[f"{VELOCITY}{name}"].to(parameter.device, copy=True)

    def fitted(self, lr: float) -> dict[str, torch.Tensor]:
        """What `AttentiveProbe.restore` takes: parameters, running statistics, and the learning rate `lr` []."""
        return _state(self.module, lr)


def fresh_heads(
    count: int, width: int, classes: int, fields: AttentiveFields, generator: torch.Generator, device: torch.device
) -> list[HeadInTraining]:
    """`count` heads with the same parameters, drawn from a CPU generator. Raises ProbeError where the attention heads do not divide the width."""
    if width % fields.attention_heads:
        wanted = f"expected a width that {fields.attention_heads} attention heads divide, got {width}"
        raise ProbeError(f"{NAME} probe: {wanted}; set attention_heads")
    first, *_ = modules = [AttentiveHead(width, classes, fields.attention_heads, fields.bn_eps) for _ in range(count)]
    first.initialise(generator, fields)
    for module in modules:
        module.load_state_dict(first.state_dict())
    return [HeadInTraining(module.to(device), fields) for module in modules]


def _state(module: AttentiveHead, lr: float) -> dict[str, torch.Tensor]:
    tensors = {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
    return tensors | {"lr": torch.tensor(lr, dtype=torch.float64)}


def normalised(tokens: torch.Tensor, device: torch.device) -> torch.Tensor:
    """float32 [B, T, D] of tokens [B, T, D] or [B, h, w, D]: each at mean 0 and variance 1 over D."""
    tokens = tokens.to(device).float().flatten(1, -2)
    return nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=EPS)


def checked_tokens(rows: Rows, width: int | None = None) -> Features:
    """Tokens [N, T, D] (any tokens, a cls among them) or [N, h, w, D]. Raises ProbeError on other shapes."""
    return checked_features(NAME, rows, dims=4 if rows.features.ndim == 4 else 3, width=width)


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentiveStack:
    """K fitted heads."""

    lrs: tuple[float, ...]
    heads: tuple[AttentiveHead, ...]
    fields: AttentiveFields

    @torch.inference_mode()
    def predict(self, rows: Rows, head: int) -> Predictions:
        """The most probable class of each row (the lowest of equals) and its probability.

        Raises ProbeError where `rows` do not fit, or the head's training diverged.
        """
        features, device = checked_tokens(rows, len(self.heads[head].query)), self.heads[head].query.device
        size = self.fields.bn_batch
        batches = (normalised(features[start : start + size], device) for start in range(0, len(rows), size))
        return most_probable(rows, torch.cat([self.probabilities(batch, head).cpu() for batch in batches]))

    @torch.inference_mode()
    def probabilities(self, tokens: torch.Tensor, head: int) -> torch.Tensor:
        """float32 [B, C] of normalised tokens, float32 [B, T, D], on their device; B is the batch whose statistics count, where the protocol says so.

        Raises ProbeError where the head's training diverged.
        """
        found: torch.Tensor = self.heads[head].eval()(tokens, self.fields.bn_eval == "batch").softmax(dim=1)
        if not bool(found.isfinite().all()):
            raise ProbeError(f"{NAME} probe: expected finite outputs, got NaN or infinity at learning rate {self.lrs[head]:g}; search below it")
        return found

    def state(self, head: int) -> dict[str, torch.Tensor]:
        """The module's parameters and running statistics, and the learning rate `lr` []."""
        return _state(self.heads[head], self.lrs[head])


@dataclass(frozen=True)
class AttentiveProbe:
    """Attentive pooling and a linear classifier on banked tokens; `lrs` are the actual rates at the protocol's batch size."""

    name: str = NAME
    has_learning_rate: bool = True
    needs_train: bool = True

    def fit(
        self,
        train: Rows | None,
        lrs: Sequence[float | None],
        *,
        classes: int,
        protocol: Mapping[str, Any],
        seed: int,
        device: torch.device,
        after_epoch: AfterEpoch | None = None,
    ) -> AttentiveStack:
        """One head a learning rate. Raises ProbeError on rows, rates or fields that cannot be; a head that diverges raises when it predicts."""
        fields, rates, rows = AttentiveFields.read(NAME, protocol), learning_rates(NAME, lrs), needed(NAME, train)
        features, targets = checked_tokens(rows), checked_targets(NAME, rows, classes)
        generator = torch.Generator().manual_seed(seed)
        heads = fresh_heads(len(rates), features.shape[-1], classes, fields, generator, device)
        features = on_device(features, device)
        kept = KeptRows.of(NAME, rows, protocol)
        stack = AttentiveStack(lrs=rates, heads=tuple(head.module for head in heads), fields=fields)
        steps = fields.epochs * -(-kept.images // fields.batch_size)
        step = 0
        for epoch in range(fields.epochs):
            for images in batch_order(kept.images, fields.batch_size, generator):
                chosen = kept.rows(images, epoch)
                tokens = normalised(features[chosen.to(features.device)], device)
                target = targets[chosen].to(device)
                for head, lr in zip(heads, rates, strict=True):
                    head.step(tokens, target, lr * annealed(step, steps, epochs=fields.epochs, anneal=fields.anneal))
                step += 1
            if after_epoch is not None:
                after_epoch(stack)
        return stack

    def restore(
        self, state: Mapping[str, torch.Tensor], train: Rows | None, *, classes: int, protocol: Mapping[str, Any], seed: int, device: torch.device
    ) -> AttentiveStack:
        """The stack of one head that `state` was taken from. Raises ProbeError where the state has another number of classes."""
        fields = AttentiveFields.read(NAME, protocol)
        if len(state["classifier_bias"]) != classes:
            got = len(state["classifier_bias"])
            raise ProbeError(f"{NAME} probe: expected weights of {classes} classes, got {got}; restore it for the task it was fitted to")
        head = AttentiveHead(len(state["query"]), classes, fields.attention_heads, fields.bn_eps)
        head.load_state_dict({name: tensor for name, tensor in state.items() if name != "lr"})
        return AttentiveStack(lrs=(float(state["lr"]),), heads=(head.to(device),), fields=fields)


PROBE: Probe = AttentiveProbe()
