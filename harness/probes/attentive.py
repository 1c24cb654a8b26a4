"""The attentive probe: one learned query attends to all tokens, and a linear classifier reads the result; a stack, one per learning rate.

Zhu et al., TMLR 2023 (arXiv 2301.11915): layer norm on query, keys and values, multi-head cross-attention, no residual and no MLP, batch norm without
affine, Linear; SGD as for the linear probe. The paper leaves some details open. As in the authors' released code (patch_lincls.py, vits.py) there
are biases as in torch.nn.MultiheadAttention, except for the keys', which makes no difference (below), layer norms with eps 1e-6 and a classifier of
N(0, 0.01). The defaults of `anneal`, `bn_eps` and `init` are our choice; the released code has others.

The attention equals that of torch.nn.MultiheadAttention, with the products in another order. There is one query, so the key projection is applied to
the query and not to every token, and the value projection to the weighted mean of the tokens (the weights sum to 1): O(T D heads) per row, not
O(T D²). Terms that add the same amount to all scores of a head (the bias of the keys, the shift of their layer norm) cancel in the softmax and are
left out.

Shape legend: N rows, B batch, T tokens, D features, A attention heads, d = D / A, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from harness.core import Rows, State, StreamSetting
from harness.errors import ProbeError
from harness.probes.classifier import ClassifierProbe
from harness.probes.fields import Count, Positive
from harness.probes.heads import AnnealedFields, NetworkHead
from harness.probes.lib.features import Features, Normaliser, checked_features

NAME = "attentive"
EPS = 1e-6
"""Of the layer norms."""
RELEASE: Mapping[str, object] = {"anneal": "epoch", "bn_eps": 1e-5, "init": "trunc-normal"}
"""How the authors' released code trains the probe, where it departs from the defaults."""
INIT_STD = 0.02
"""Of the query, and of projections that are not Xavier-uniform."""
RUNNING_MOMENTUM = 0.1
"""Of the running statistics, as in torch.nn.BatchNorm1d."""


class AttentiveFields(AnnealedFields):
    """Defaults: the attentive probe of Zhu et al."""

    attention_heads: Count = 12
    init: Literal["xavier", "trunc-normal"] = "xavier"
    """Xavier-uniform projections with a query of N(0, 0.02), or both of N(0, 0.02) truncated at one standard deviation."""
    bn_eps: Positive = 1e-6
    bn_eval: Literal["running", "batch"] = "running"
    """Statistics at prediction: those of training, or (as in the release) those of each batch of `bn_batch` consecutive rows."""
    bn_batch: Count = 256


class AttentiveNetwork(nn.Module):
    """Parameters are named after their layers; the module's docstring says which ones are left out."""

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
        """[B, D]: the attention output of the query over tokens [B, T, D], which are normalised over D without affine."""
        heads, size = self.attention_heads, tokens.shape[-1] // self.attention_heads
        query = nn.functional.layer_norm(self.query, self.query.shape, self.norm_query_weight, self.norm_query_bias, EPS)
        query_A1d = (nn.functional.linear(query, self.query_weight, self.query_bias) * size**-0.5).view(heads, 1, size)
        scoring_AD = (query_A1d @ self.key_weight.view(heads, size, -1))[:, 0] * self.norm_key_weight
        attention_BAT = (tokens @ scoring_AD.T).softmax(dim=1).transpose(1, 2)
        mean_BAD = attention_BAT @ tokens * self.norm_value_weight + self.norm_value_bias
        value_BAd = torch.einsum("bad,aed->bae", mean_BAD, self.value_weight.view(heads, size, -1)) + self.value_bias.view(heads, size)
        return nn.functional.linear(value_BAd.flatten(1), self.out_weight, self.out_bias)

    def forward(self, tokens: torch.Tensor, batch_statistics: bool = True) -> torch.Tensor:
        """Logits [B, C] of normalised tokens [B, T, D]; training mode updates the running statistics."""
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


class AttentiveHead(NetworkHead[AttentiveFields]):
    """The network under SGD with momentum."""

    module: AttentiveNetwork

    def __init__(self, tensors: State, fields: AttentiveFields) -> None:
        super().__init__(tensors, fields)
        self._batch_statistics = fields.bn_eval == "batch"

    @staticmethod
    def network(width: int, classes: int, fields: AttentiveFields) -> AttentiveNetwork:
        if width % fields.attention_heads:
            message = f"expected a width that {fields.attention_heads} attention heads divide, got {width}"
            raise ProbeError(f"{NAME} probe: {message}; set attention_heads")
        return AttentiveNetwork(width, classes, fields.attention_heads, fields.bn_eps)

    @staticmethod
    def initialise(module: nn.Module, fields: AttentiveFields, generator: torch.Generator) -> None:
        assert isinstance(module, AttentiveNetwork)
        module.initialise(generator, fields)

    @staticmethod
    def shape(state: State) -> tuple[int, int]:
        return len(state["query"]), len(state["classifier_bias"])

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """float32 [B, C] of normalised tokens, float32 [B, T, D]; B is the batch whose statistics are used, where the protocol says so."""
        logits: torch.Tensor = self.module.eval()(inputs, self._batch_statistics)
        return logits

    def is_finite(self) -> bool:
        """Always True: outputs are checked by themselves, since infinite running statistics need not make them infinite."""
        return True


def normalised(tokens: torch.Tensor, device: torch.device) -> torch.Tensor:
    """float32 [B, T, D] of tokens [B, T, D] or [B, h, w, D]: every token with mean 0 and variance 1 over D."""
    tokens = tokens.to(device).float().flatten(1, -2)
    return nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=EPS)


@dataclass(frozen=True, kw_only=True)
class AttentiveProbe(ClassifierProbe[AttentiveFields]):
    """Attentive pooling and a linear classifier on tokens: [N, T, D] (any tokens, including a cls) or [N, h, w, D]."""

    def checked(self, rows: Rows, width: int | None = None) -> Features:
        return checked_features(NAME, rows, dims=4 if rows.features.ndim == 4 else 3, width=width)

    def inputs(self, features: torch.Tensor, normaliser: Normaliser, device: torch.device) -> torch.Tensor:
        return normalised(features, device)

    def rows_at_once(self, fields: AttentiveFields) -> int:
        return fields.bn_batch

    def together(self, setting: StreamSetting[AttentiveFields]) -> int:
        """The batch whose statistics normalise, where the protocol uses batch statistics; otherwise the encoder's batch size."""
        fields = setting.protocol
        return fields.bn_batch if fields.bn_eval == "batch" else setting.encoder.batch_size


PROBE = AttentiveProbe(name=NAME, fields=AttentiveFields, head=AttentiveHead)
