"""The dense probe against torch on pixels, scikit-learn's confusion matrix, and a stack against its heads alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix

from harness.core import Rows
from harness.errors import ProbeError
from harness.metrics import metric
from harness.probes.dense import PROBE, DenseFields, factor
from harness.probes.heads import HeadStack
from harness.probes.lib.patch_labels import PatchLabels, patch_of_pixel

CPU = torch.device("cpu")


def scenes(
    n: int = 12, classes: int = 3, grid: tuple[int, int] = (4, 6), patch: int = 4, width: int = 10, seed: int = 0, ignored: float = 0.1
) -> Rows:
    """Label maps whose boundaries cross patches, and tokens that hint at the classes in them."""
    fixed, rng = np.random.default_rng(1), np.random.default_rng(seed)
    height, across = grid[0] * patch, grid[1] * patch
    cut = rng.integers(3, across - 3, n)
    masks = np.where(np.arange(across) < cut[:, None], rng.integers(0, classes, (n, 1)), rng.integers(0, classes, (n, 1)))
    masks = np.broadcast_to(masks[:, None, :], (n, height, across)).copy()
    shares = np.stack([(masks == c).reshape(n, grid[0], patch, grid[1], patch).mean(axis=(2, 4)) for c in range(classes)], axis=-1)
    tokens = shares @ fixed.standard_normal((classes, width)) * 2 + 0.2 * rng.standard_normal((n, *grid, width))
    masks[rng.random(masks.shape) < ignored] = 255
    keys = [f"k{i}" for i in range(n)]
    return Rows(
        keys=keys, groups=[f"g{i}" for i in range(n)], targets=np.full(n, -1), features=tokens.astype(np.float16), masks=masks.astype(np.uint8)
    )


def with_masks(rows: Rows, masks: np.ndarray | None) -> Rows:
    return Rows(keys=rows.keys, groups=rows.groups, targets=rows.targets, features=rows.features, masks=masks)


def fit(rows: Rows, lrs: list[float], *, classes: int = 3, seed: int = 0, **protocol: Any) -> HeadStack[DenseFields]:
    fitted = PROBE.fit(rows, lrs, classes=classes, protocol=DenseFields(**protocol), seed=seed, device=CPU)
    assert isinstance(fitted, HeadStack)
    return fitted


def value(name: str, rows: Rows, stack: HeadStack[DenseFields], classes: int = 3, head: int = 0) -> float:
    chosen = metric(name)
    return float(chosen.value(chosen.counts(stack.predict(rows, head), classes).sum(axis=0)))


@pytest.mark.parametrize("size", [(8, 12), (7, 13), (3, 4), (5, 20)])
def test_a_pixel_belongs_to_the_patch_that_holds_its_centre(size: tuple[int, int]) -> None:
    grid = (3, 4)
    expected = [[int((y + 0.5) / size[0] * grid[0]) * grid[1] + int((x + 0.5) / size[1] * grid[1]) for x in range(size[1])] for y in range(size[0])]
    assert patch_of_pixel(*size, grid).tolist() == expected


@pytest.mark.parametrize("target", ["soft", "majority"])
def test_patch_targets_by_counting(target: Any) -> None:
    mask = np.array([[0, 0, 1, 255], [0, 1, 255, 255], [2, 2, 1, 1], [1, 1, 2, 1]], dtype=np.uint8)
    labels = PatchLabels.of(np.stack([mask, np.full_like(mask, 2)]), (2, 2), 3, (255,), target)
    targets = labels.batch(torch.tensor([1, 0]), 3).T.reshape(2, 4, 3)
    soft = [[0.75, 0.25, 0], [0, 0.25, 0], [0, 0.5, 0.5], [0, 0.75, 0.25]]
    majority = [[1, 0, 0], [0, 0.25, 0], [0, 1, 0], [0, 1, 0]]
    assert targets[0].tolist() == [[0, 0, 1]] * 4
    assert targets[1].tolist() == (soft if target == "soft" else majority)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_is_that_of_torch_on_pixels_under_nearest_upsampling(optimizer: str) -> None:
    rows = scenes()
    stack = fit(rows, [0.05], optimizer=optimizer, epochs=4, batch_size=5, weight_decay=0.02, warmup_steps=3, seed=3)
    generator = torch.Generator().manual_seed(3)
    layer = torch.nn.Conv2d(10, 3, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.empty(3, 10).normal_(0, 0.01, generator=generator)[:, :, None, None])
        layer.bias.zero_()
    reference: torch.optim.Optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05, weight_decay=0.02)
    if optimizer == "sgd":
        reference = torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9, weight_decay=0.02)
    images, masks = torch.from_numpy(rows.features).float().permute(0, 3, 1, 2), torch.from_numpy(rows.masks).long()
    step = 0
    for _ in range(4):
        order = torch.randperm(12, generator=generator)
        for batch in (order[:5], order[5:10], order[10:]):
            warm = 1e-6 + (1 - 1e-6) * step / 3 if step < 3 else 1.0
            reference.param_groups[0]["lr"] = 0.05 * (1 - step / 12) * warm
            reference.zero_grad()
            logits = torch.nn.functional.interpolate(layer(images[batch]), size=masks.shape[1:], mode="nearest")
            torch.nn.functional.cross_entropy(logits, masks[batch], ignore_index=255).backward()
            reference.step()
            step += 1
    assert torch.allclose(stack.state(0)["weight"], layer.weight[:, :, 0, 0], rtol=1e-4, atol=1e-5)
    assert torch.allclose(stack.state(0)["bias"], layer.bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_head_of_a_stack_equals_the_same_head_alone(optimizer: str) -> None:
    rows, ladder = scenes(), np.geomspace(1e-4, 10, 8).tolist()
    stack = fit(rows, ladder, optimizer=optimizer, epochs=10, batch_size=5)
    for head, lr in enumerate(ladder):
        alone = fit(rows, [lr], optimizer=optimizer, epochs=10, batch_size=5)
        assert (stack.state(head)["weight"] - alone.state(0)["weight"]).norm() <= 1e-5 * alone.state(0)["weight"].norm(), f"learning rate {lr:g}"


@pytest.mark.parametrize("schedule", ["polynomial", "cosine"])
def test_the_schedule_value_by_value(schedule: Any) -> None:
    fields = DenseFields(schedule=schedule, warmup_steps=4)
    for step in range(10):
        decay = 1 - step / 10 if schedule == "polynomial" else 0.5 * (1 + np.cos(np.pi * step / 10))
        warm = 1e-6 + (1 - 1e-6) * step / 4 if step < 4 else 1.0
        assert factor(step, 10, fields) == pytest.approx(decay * warm, rel=1e-12)


@pytest.mark.parametrize("size", [(16, 24), (11, 17)])
def test_predictions_are_the_confusion_cells_of_bilinear_logits(size: tuple[int, int]) -> None:
    train = scenes()
    rng = np.random.default_rng(4)
    test = with_masks(scenes(7, seed=5), np.where(rng.random((7, *size)) < 0.1, 255, rng.integers(0, 3, (7, *size))).astype(np.uint8))
    stack = fit(train, [0.05])
    predictions = stack.predict(test, 0)
    layer = torch.nn.functional.conv2d(
        torch.from_numpy(test.features).float().permute(0, 3, 1, 2), stack.state(0)["weight"][:, :, None, None], stack.state(0)["bias"]
    )
    predicted = torch.nn.functional.interpolate(layer, size=size, mode="bilinear", align_corners=False).argmax(dim=1).numpy()
    assert test.masks is not None
    for image in range(7):
        labelled = test.masks[image] != 255
        expected = confusion_matrix(test.masks[image][labelled], predicted[image][labelled], labels=range(3))
        table = np.zeros((3, 3))
        lines = [i for i, key in enumerate(predictions.keys) if key == f"k{image}"]
        table[predictions.targets[lines], predictions.predictions[lines]] = predictions.scores[lines]
        assert table.tolist() == expected.tolist()
        assert {predictions.groups[i] for i in lines} == {f"g{image}"}
    assert predictions.scores.min() > 0


def test_images_in_chunks_give_the_same_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = scenes()
    stack = fit(rows, [0.05])
    whole = stack.predict(rows, 0)
    monkeypatch.setattr("harness.probes.dense.LOGITS", 1)
    chunked = stack.predict(rows, 0)
    assert (chunked.keys, chunked.scores.tolist()) == (whole.keys, whole.scores.tolist())


def test_it_learns_what_tokens_show_and_no_more() -> None:
    train, test = scenes(40), scenes(20, seed=7)
    assert value("aAcc", test, fit(train, [0.05])) > 0.95
    blind = Rows(keys=train.keys, groups=train.groups, targets=train.targets, features=np.ones_like(train.features), masks=train.masks)
    assert value("aAcc", blind, fit(blind, [0.05])) < 0.6


def test_an_ignored_class_is_neither_counted_nor_predicted() -> None:
    rows = scenes(30, ignored=0.0)
    stack = fit(rows, [0.05], ignore_index=0)
    predictions = stack.predict(rows, 0)
    assert 0 not in predictions.targets
    assert 0 not in predictions.predictions
    assert rows.masks is not None
    assert predictions.scores.sum() == (rows.masks != 0).sum()
    assert value("aAcc", rows, stack) > 0.95


def test_an_image_without_labels_has_no_cells_and_a_batch_of_them_no_gradient() -> None:
    rows = scenes()
    assert rows.masks is not None
    masks = rows.masks.copy()
    masks[3] = 255
    predictions = fit(with_masks(rows, masks), [0.05], batch_size=1).predict(with_masks(rows, masks), 0)
    assert "k3" not in predictions.keys
    assert len(set(predictions.keys)) == 11


def test_masks_that_do_not_fit_are_refused() -> None:
    rows = scenes()
    assert rows.masks is not None
    high = rows.masks.copy()
    high[4, 0, 0] = 7
    for masks, message in (
        (None, "got none"),
        (rows.masks[:, 0], "got shape"),
        (rows.masks[:5], "got shape"),
        (high, "got 7 in 'k4'"),
        (np.full_like(rows.masks, 255), "expected labelled pixels"),
    ):
        with pytest.raises(ProbeError, match=message):
            fit(with_masks(rows, masks), [0.1])
    with pytest.raises(ProbeError, match="got 255 in 'k0'"):
        fit(rows, [0.1], ignore_index=None)


def test_a_head_that_diverges_is_undefined_and_leaves_the_others_as_they_were() -> None:
    rows = scenes()
    stack = fit(rows, [0.01, 1e30, 0.02], optimizer="sgd", weight_decay=1.0)
    with pytest.raises(ProbeError, match=r"learning rate 1e\+30"):
        stack.predict(rows, 1)
    assert torch.equal(stack.state(2)["weight"], fit(rows, [0.02], optimizer="sgd", weight_decay=1.0).state(0)["weight"])
    assert np.isfinite(value("mIoU", rows, stack, head=2))


@pytest.mark.parametrize("norm", ["none", "l2", "standardize"])
def test_a_restored_head_predicts_the_same(norm: str) -> None:
    rows = scenes()
    stack = fit(rows, [0.01, 0.1], feature_norm=norm)
    back = PROBE.restore(stack.state(1), None, classes=3, protocol=DenseFields(feature_norm=norm), seed=0, device=CPU)
    before, after = stack.predict(rows, 1), back.predict(rows, 0)
    assert (before.keys, before.predictions.tolist(), before.scores.tolist()) == (after.keys, after.predictions.tolist(), after.scores.tolist())


def test_sixteen_bit_masks_of_many_classes() -> None:
    rows = scenes(ignored=0.0)
    assert rows.masks is not None
    masks = rows.masks.astype(np.uint16) + 297
    predictions = fit(with_masks(rows, masks), [0.05], classes=300, ignore_index=65535).predict(with_masks(rows, masks), 0)
    assert set(predictions.targets.tolist()) <= {297, 298, 299}
    assert predictions.scores.sum() == masks.size
