"""The MLP probe against torch's own layers and optimiser, and its tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from harness.core import Rows
from harness.errors import RequestError
from harness.probes.heads import HeadStack, seeded
from harness.probes.lib.features import batch_order
from harness.probes.mlp import PROBE, MLPFields
from harness.tasks import select
from tests.helpers import tiny

torch.set_num_threads(1)
CPU = torch.device("cpu")
CLASSES, WIDTH = 3, 10
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


def rows_of(count: int, seed: int = 0) -> Rows:
    """Classes that no linear classifier of the features separates: thirds of the distance from the origin."""
    features = np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)
    distance = np.linalg.norm(features, axis=1)
    targets = np.searchsorted(np.quantile(distance, [1 / 3, 2 / 3]), distance).astype(np.int64)
    names = [f"{index:03d}" for index in range(count)]
    return Rows(keys=names, groups=names, targets=targets, features=features)


def fit(rows: Rows, rates: list[float], *, seed: int = 0, **protocol: Any) -> HeadStack[MLPFields]:
    return PROBE.fit(rows, rates, classes=CLASSES, protocol=MLPFields(**{"width": 16, "batch_size": 20, **protocol}), seed=seed, device=CPU)


def reference(rows: Rows, rate: float, fields: MLPFields, seed: int) -> dict[str, torch.Tensor]:
    """The same by torch.nn and torch.optim.SGD with torch's cosine schedule; only the batches and the seeds are ours."""
    generator = torch.Generator().manual_seed(seed)
    hidden, out = nn.Linear(WIDTH, fields.width), nn.Linear(fields.width, CLASSES)
    with torch.no_grad():
        hidden.weight.normal_(0, (2 / WIDTH) ** 0.5, generator=generator)
        out.weight.normal_(0, fields.init_std, generator=generator)
        hidden.bias.zero_()
        out.bias.zero_()
    model = nn.Sequential(hidden, ACTIVATIONS[fields.activation](), nn.Dropout(fields.dropout), out)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=fields.momentum, weight_decay=fields.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, fields.epochs * -(-len(rows) // fields.batch_size))
    features, targets, step = torch.from_numpy(np.asarray(rows.features[:])), torch.from_numpy(rows.targets), 0
    for _ in range(fields.epochs):
        for chosen in batch_order(len(rows), fields.batch_size, generator):
            optimizer.zero_grad()
            with seeded(seed, step, CPU):
                nn.functional.cross_entropy(model(features[chosen]), targets[chosen]).backward()
            optimizer.step()
            schedule.step()
            step += 1
    return model.state_dict()


@pytest.mark.parametrize("protocol", [
    {},
    {"activation": "gelu", "momentum": 0.5, "weight_decay": 0.01},
    {"dropout": 0.5, "init_std": 0.1},
])  # fmt: skip
def test_it_is_torchs_own_network_under_torchs_own_sgd(protocol: dict[str, Any]) -> None:
    rows, protocol = rows_of(50), {"epochs": 4, **protocol}
    stack = fit(rows, [0.01, 0.1], seed=3, **protocol)
    for head, rate in enumerate((0.01, 0.1)):
        expected = reference(rows, rate, MLPFields(**{"width": 16, "batch_size": 20, **protocol}), seed=3)
        for name, tensor in expected.items():
            torch.testing.assert_close(stack.state(head)[name], tensor, rtol=1e-4, atol=1e-6)


def test_it_tells_apart_what_no_linear_classifier_does() -> None:
    train, test = rows_of(600), rows_of(300, seed=1)
    predictions = fit(train, [0.1], epochs=60, width=64).predict(test, 0)
    assert (predictions.predictions == predictions.targets).mean() > 0.7


def test_a_step_that_drops_units_draws_from_its_seeds_alone() -> None:
    torch.manual_seed(1)
    first = fit(rows_of(50), [0.1], epochs=2, dropout=0.5)
    before = torch.random.get_rng_state()
    torch.manual_seed(2)
    again = fit(rows_of(50), [0.1], epochs=2, dropout=0.5)
    assert all(torch.equal(first.state(0)[name], tensor) for name, tensor in again.state(0).items())
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), before)  # nothing was drawn from the process's own
    other = fit(rows_of(50), [0.1], epochs=2)
    assert not torch.equal(first.state(0)["0.weight"], other.state(0)["0.weight"])


def test_nothing_is_dropped_in_prediction() -> None:
    stack = fit(rows_of(50), [0.1], epochs=2, dropout=0.5)
    first, again = stack.predict(rows_of(30, seed=1), 0), stack.predict(rows_of(30, seed=1), 0)
    assert np.array_equal(first.scores, again.scores)


@pytest.mark.parametrize(("field", "value"), [("width", 0), ("dropout", 1.0), ("dropout", -0.1), ("activation", "tanh")])
def test_fields_that_cannot_be_are_refused(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"protocol.{field}: "):
        MLPFields().replaced(**{field: value})


def test_its_tasks_are_asked_for_by_name(tmp_path: Path) -> None:
    tiny.build(tmp_path, name="tiny")

    def names(*patterns: str) -> list[str]:
        return [task.name.removeprefix("tiny/") for task in select([f"tiny/{pattern}" for pattern in patterns], str(tmp_path), {})[0]]

    assert not [name for name in names("*", "object-*", "part-*", "*-streamed", "*-linear*") if "mlp" in name]
    assert sorted(names("*-mlp", "*-mlp-streamed")) == ["object-mlp", "object-mlp-streamed", "part-mlp"]
    assert names("object-mlp-streamed") == ["object-mlp-streamed"]
    assert "object-linear-streamed" in names("*-streamed")
