"""The registry of probes, and what they all refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from harness.core import Rows
from harness.errors import ProbeError, RequestError
from harness.probes import grid, probe, probes
from harness.probes.knn import KNNFields
from harness.probes.lib.features import Normaliser
from harness.probes.lib.schedule import annealed, cosine, polynomial

CPU = torch.device("cpu")
POOLED = ["linear", "knn", "logistic"]


def quick(name: str) -> Any:
    fields = probe(name).fields
    return fields(epochs=1) if "epochs" in fields.model_fields else fields()


def pooled_rows(n: int = 20, classes: int = 3, width: int = 8, seed: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    return Rows(
        keys=[f"k{i}" for i in range(n)],
        groups=[f"g{i // 2}" for i in range(n)],
        targets=rng.integers(0, classes, n),
        features=rng.standard_normal((n, width)).astype(np.float32),
    )


def replaced(rows: Rows, **changes: Any) -> Rows:
    return Rows(**{"keys": rows.keys, "groups": rows.groups, "targets": rows.targets, "features": rows.features, "masks": rows.masks} | changes)


def heads_of(name: str) -> list[float | None]:
    return [0.1] if probe(name).has_learning_rate else list(grid(name, probe(name).fields()))


def test_every_probe_has_defaults_that_it_accepts() -> None:
    assert {"linear", "knn", "retrieval", "dense", "logistic", "attentive"} <= set(probes())
    for name, registered in probes().items():
        assert registered.name == name
        if not registered.needs_train:
            registered.fit(None, heads_of(name), classes=3, protocol=registered.fields(), seed=0, device=CPU)


def test_unknown_probes_get_the_nearest_name() -> None:
    with pytest.raises(RequestError, match="did you mean 'linear'"):
        probe("linaer")
    with pytest.raises(RequestError, match="expected one of"):
        probe("schedule")


@pytest.mark.parametrize("name", POOLED)
def test_rows_that_do_not_fit_are_refused(name: str) -> None:
    rows = pooled_rows()
    holes = rows.features.copy()
    holes[3, 2] = np.nan
    orphan = rows.targets.copy()
    orphan[5] = -1
    cases = [
        (None, "expected training rows, got None"),
        (replaced(rows, features=rows.features[:, :, None]), "features of 2 dimensions"),
        (replaced(rows, keys=rows.keys[:5]), "features of 2 dimensions, one a row of 5"),
        (replaced(rows, features=holes), "NaN or infinity in 'k3'"),
        (replaced(rows, targets=orphan), "got -1 for 'k5'"),
        (replaced(rows, targets=rows.targets + 1), "from 0 to 2, got 3"),
        (replaced(rows, keys=[], groups=[], targets=rows.targets[:0], features=rows.features[:0]), "expected rows, got none"),
    ]
    for bad, message in cases:
        with pytest.raises(ProbeError, match=message):
            probe(name).fit(bad, heads_of(name), classes=3, protocol=quick(name), seed=0, device=CPU)
    fitted = probe(name).fit(rows, heads_of(name), classes=3, protocol=quick(name), seed=0, device=CPU)
    with pytest.raises(ProbeError, match="width 8, got 7"):
        fitted.predict(replaced(rows, features=rows.features[:, :7]), 0)
    with pytest.raises(ProbeError, match="NaN or infinity"):
        fitted.predict(replaced(rows, features=holes), 0)


@pytest.mark.parametrize("name", ["linear", "dense"])
@pytest.mark.parametrize("lrs", [[], [None], [0.0], [-1.0], [float("nan")], [float("inf")], [0.1, None]])
def test_learning_rates_that_cannot_be_are_refused(name: str, lrs: list[float | None]) -> None:
    with pytest.raises(ProbeError, match="learning rate"):
        probe(name).fit(pooled_rows(), lrs, classes=3, protocol=quick(name), seed=0, device=CPU)


@pytest.mark.parametrize("name", ["knn", "retrieval"])
def test_probes_that_train_nothing_refuse_learning_rates(name: str) -> None:
    for lrs in ([0.1], [], [None, None]):
        with pytest.raises(ProbeError, match=r"expected \[None\]"):
            probe(name).fit(pooled_rows(), lrs, classes=3, protocol=quick(name), seed=0, device=CPU)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("linear", "epochs", 0),
        ("linear", "epochs", 2.5),
        ("linear", "epochs", True),
        ("linear", "batch_size", "1024"),
        ("linear", "momentum", 1.0),
        ("linear", "momentum", float("nan")),
        ("linear", "weight_decay", -1e-4),
        ("linear", "feature_norm", "batch"),
        ("knn", "k", 0),
        ("knn", "temperature", 0.0),
        ("retrieval", "exclude", "images"),
        ("retrieval", "max_queries", 0),
        ("dense", "optimizer", "adam"),
        ("dense", "ignore_index", -1),
    ],
)
def test_protocol_fields_that_cannot_be_are_refused_by_name(name: str, field: str, value: object) -> None:
    with pytest.raises(RequestError, match=rf"protocol\.{field}[:.].*got {value!r}"):
        probe(name).fields().replaced(**{field: value})


def test_a_protocol_with_more_fields_is_taken_for_the_probes_own() -> None:
    class Cropped(KNNFields):
        crop_side: float = 0.5

    assert len(probe("knn").fit(pooled_rows(), [None], classes=3, protocol=Cropped(), seed=0, device=CPU).predict(pooled_rows(), 0)) == 20


def test_cosine_and_polynomial_value_by_value() -> None:
    for step in range(8):
        assert cosine(step, 8) == pytest.approx(0.5 * (1 + np.cos(np.pi * step / 8)), abs=1e-15)
        assert polynomial(step, 8) == pytest.approx(1 - step / 8, abs=1e-15)
        assert polynomial(step, 8, power=0.9) == pytest.approx((1 - step / 8) ** 0.9, abs=1e-15)


def test_the_rate_of_an_epoch_is_that_of_its_first_step() -> None:
    factors = [annealed(step, 12, epochs=4, anneal="epoch") for step in range(12)]
    assert factors == pytest.approx(np.repeat([1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2], 3), abs=1e-15)
    assert [annealed(step, 12, epochs=4, anneal="step") for step in range(12)] == [cosine(step, 12) for step in range(12)]


def test_cosine_is_that_of_torch() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=13)
    for step in range(13):
        assert 0.4 * cosine(step, 13) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_standardised_features_have_mean_0_and_std_1_and_constants_stay() -> None:
    features = torch.from_numpy(np.random.default_rng(0).normal(5, 3, (5000, 4)).astype(np.float32))
    features[:, 2] = 0.1
    out = Normaliser.fit("standardize", features, CPU)(features).double()
    assert out.mean(dim=0).abs().max() < 1e-5
    assert out.std(dim=0, correction=0)[[0, 1, 3]].numpy() == pytest.approx(1, abs=1e-5)
    assert out[:, 2].abs().max() < 1e-6
