"""The attentive probe against torch's attention and batch norm, and a stack against its heads alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from harness.core import Rows
from harness.errors import ProbeError
from harness.probes.attentive import PROBE, RELEASE, AttentiveFields, AttentiveNetwork, normalised
from harness.probes.heads import HeadStack

CPU = torch.device("cpu")


def tokens(n: int = 60, classes: int = 3, grid: tuple[int, ...] = (3, 4), width: int = 24, seed: int = 0) -> Rows:
    """One token of each row, at a random place, shows the class; the others are noise."""
    fixed, rng = np.random.default_rng(1), np.random.default_rng(seed)
    targets = rng.integers(0, classes, n)
    features = rng.standard_normal((n, int(np.prod(grid)), width))
    features[np.arange(n), rng.integers(0, np.prod(grid), n)] = 3 * fixed.standard_normal((classes, width))[targets]
    keys = [f"k{i}" for i in range(n)]
    return Rows(keys=keys, groups=keys, targets=targets, features=features.reshape(n, *grid, width).astype(np.float16))


def fit(rows: Rows, lrs: list[float], *, seed: int = 0, **protocol: Any) -> HeadStack[AttentiveFields]:
    fitted = PROBE.fit(rows, lrs, classes=3, protocol=AttentiveFields(**{"attention_heads": 4, "batch_size": 25, **protocol}), seed=seed, device=CPU)
    assert isinstance(fitted, HeadStack)
    return fitted


def random_head(width: int = 24, classes: int = 3, bn_eps: float = 1e-6) -> AttentiveNetwork:
    head, generator = AttentiveNetwork(width, classes, 4, bn_eps), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return head


def reference_layers(head: AttentiveNetwork, width: int = 24) -> tuple[nn.LayerNorm, nn.LayerNorm, nn.LayerNorm, nn.MultiheadAttention]:
    """The same parameters in torch's own layers, with any bias and shift of the keys, which must not matter."""
    norms = [nn.LayerNorm(width, eps=1e-6) for _ in range(3)]
    attention = nn.MultiheadAttention(width, 4, batch_first=True)
    with torch.no_grad():
        norms[0].weight.copy_(head.norm_query_weight)
        norms[0].bias.copy_(head.norm_query_bias)
        norms[1].weight.copy_(head.norm_key_weight)
        norms[1].bias.normal_()
        norms[2].weight.copy_(head.norm_value_weight)
        norms[2].bias.copy_(head.norm_value_bias)
        attention.in_proj_weight.copy_(torch.cat([head.query_weight, head.key_weight, head.value_weight]))
        attention.in_proj_bias.copy_(torch.cat([head.query_bias, torch.randn(width), head.value_bias]))
        attention.out_proj.weight.copy_(head.out_weight)
        attention.out_proj.bias.copy_(head.out_bias)
    return norms[0], norms[1], norms[2], attention


def test_pooling_is_multi_head_attention_and_so_are_its_gradients() -> None:
    torch.manual_seed(0)
    head, raw = random_head(), torch.randn(7, 12, 24)
    query_norm, key_norm, value_norm, attention = reference_layers(head)
    query = head.query.detach().clone().requires_grad_()
    expected, _ = attention(query_norm(query).expand(7, 1, -1), key_norm(raw), value_norm(raw), need_weights=False)
    gathered = head.gather(normalised(raw, CPU))
    assert torch.allclose(gathered, expected[:, 0], rtol=1e-4, atol=1e-4)
    weights = torch.randn(7, 24)
    (gathered * weights).sum().backward()
    (expected[:, 0] * weights).sum().backward()
    query_gradient, key_gradient, value_gradient = attention.in_proj_weight.grad.chunk(3)
    for ours, theirs in (
        (head.query, query),
        (head.query_weight, query_gradient),
        (head.key_weight, key_gradient),
        (head.value_weight, value_gradient),
        (head.norm_key_weight, key_norm.weight),
        (head.norm_value_weight, value_norm.weight),
        (head.norm_value_bias, value_norm.bias),
        (head.out_weight, attention.out_proj.weight),
    ):
        gradient = theirs.grad if isinstance(theirs, nn.Parameter) or theirs is query else theirs
        assert ours.grad is not None
        assert torch.allclose(ours.grad, gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_the_running_statistics_are_those_of_batch_norm(eps: float) -> None:
    torch.manual_seed(0)
    head = random_head(bn_eps=eps).train()
    norm = nn.BatchNorm1d(24, affine=False, eps=eps)
    for _ in range(5):
        batch = normalised(torch.randn(9, 12, 24), CPU)
        logits = head(batch, True)
        expected = nn.functional.linear(norm(head.gather(batch)), head.classifier_weight, head.classifier_bias)
        assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)
    head.eval(), norm.eval()
    batch = normalised(torch.randn(9, 12, 24), CPU)
    expected = nn.functional.linear(norm(head.gather(batch)), head.classifier_weight, head.classifier_bias)
    assert torch.allclose(head(batch, False), expected, rtol=1e-4, atol=1e-4)
    before = head.running_mean.clone()
    head(batch, True)
    assert torch.equal(head.running_mean, before)


def test_how_a_head_begins() -> None:
    by_rule = {}
    for init in ("xavier", "trunc-normal"):
        head = AttentiveNetwork(192, 3, 4, 1e-6)
        head.initialise(torch.Generator().manual_seed(0), AttentiveFields.model_validate({"init": init}))
        by_rule[init] = {name: getattr(head, f"{name}_weight").detach() for name in ("query", "key", "value", "out")} | {"asks": head.query.detach()}
    bound = (6 / (2 * 192)) ** 0.5
    for name in ("query", "key", "value", "out"):
        assert 0.99 * bound < by_rule["xavier"][name].abs().max() <= bound
    # a normal distribution within one standard deviation has 0.5396 of it
    for tensor in by_rule["trunc-normal"].values():
        assert tensor.abs().max() <= 0.02
        assert tensor.std() == pytest.approx(0.5396 * 0.02, rel=0.02 if tensor.numel() > 192 else 0.2)


def test_the_release_trains_in_another_way() -> None:
    rows = tokens()
    plain = fit(rows, [0.1], epochs=2).state(0)
    for name, value in RELEASE.items():
        other = fit(rows, [0.1], epochs=2, **{name: value}).state(0)
        assert not torch.equal(plain["classifier_weight"], other["classifier_weight"]), name


def test_a_head_of_a_stack_of_8_equals_the_same_head_alone() -> None:
    rows, ladder = tokens(), np.geomspace(1e-4, 1e3, 8).tolist()
    stack = fit(rows, ladder, epochs=6)
    for head, lr in enumerate(ladder):
        together, alone = stack.state(head), fit(rows, [lr], epochs=6).state(0)
        for name, tensor in alone.items():
            assert torch.equal(torch.nan_to_num(together[name]), torch.nan_to_num(tensor)), f"{name} at learning rate {lr:g}"


def test_it_finds_the_token_that_tells_the_class() -> None:
    train, test = tokens(300), tokens(200, seed=5)
    predictions = fit(train, [0.1], epochs=60).predict(test, 0)
    assert (predictions.predictions == test.targets).mean() > 0.9
    assert (list(predictions.keys), predictions.targets.tolist()) == (list(test.keys), test.targets.tolist())
    assert ((predictions.scores > 1 / 3) & (predictions.scores <= 1)).all()


def test_a_grid_and_a_row_of_tokens_are_the_same_to_it() -> None:
    rows = tokens()
    flat = Rows(keys=rows.keys, groups=rows.groups, targets=rows.targets, features=rows.features.reshape(60, 12, 24))
    assert torch.equal(fit(rows, [0.1], epochs=2).state(0)["query"], fit(flat, [0.1], epochs=2).state(0)["query"])


def test_batch_statistics_at_prediction_depend_on_the_batch_and_running_ones_do_not() -> None:
    train, test = tokens(), tokens(40, seed=5)
    part = Rows(keys=test.keys[:10], groups=test.groups[:10], targets=test.targets[:10], features=test.features[:10])
    for mode, same in (("running", True), ("batch", False)):
        stack = fit(train, [0.1], epochs=5, bn_eval=mode, bn_batch=16)
        whole, alone = stack.predict(test, 0).scores[:10], stack.predict(part, 0).scores
        assert (np.abs(whole - alone).max() < 1e-5) == same


def test_batch_statistics_by_hand() -> None:
    train, test = tokens(), tokens(40, seed=5)
    stack = fit(train, [0.1], epochs=5, bn_eval="batch", bn_batch=16)
    head, scores = stack.heads[0].module, []
    for start in (0, 16, 32):
        batch = head.gather(normalised(torch.from_numpy(test.features[start : start + 16]), CPU))
        norm = nn.functional.batch_norm(batch, None, None, training=True, eps=1e-6)
        scores.append(nn.functional.linear(norm, head.classifier_weight, head.classifier_bias).softmax(dim=1).max(dim=1).values)
    assert stack.predict(test, 0).scores == pytest.approx(torch.cat(scores).detach().numpy(), abs=1e-5)


def test_a_head_that_diverges_is_undefined_and_leaves_the_others_as_they_were() -> None:
    rows = tokens()
    stack = fit(rows, [0.1, 1e30, 0.2], epochs=4)
    with pytest.raises(ProbeError, match=r"learning rate 1e\+30"):
        stack.predict(rows, 1)
    assert torch.equal(stack.state(2)["key_weight"], fit(rows, [0.2], epochs=4).state(0)["key_weight"])


def test_a_last_batch_of_one_row_does_no_harm() -> None:
    rows = tokens(26)
    stack = fit(rows, [0.1], epochs=3)
    assert np.isfinite(stack.predict(rows, 0).scores).all()


def test_a_restored_head_predicts_the_same() -> None:
    train, test = tokens(), tokens(seed=4)
    stack = fit(train, [0.01, 0.1], epochs=3)
    back = PROBE.restore(stack.state(1), None, classes=3, protocol=AttentiveFields(attention_heads=4), seed=0, device=CPU)
    assert back.predict(test, 0).scores.tolist() == stack.predict(test, 1).scores.tolist()
    with pytest.raises(ProbeError, match="expected weights of 4 classes, got 3"):
        PROBE.restore(stack.state(1), None, classes=4, protocol=AttentiveFields(attention_heads=4), seed=0, device=CPU)


def test_a_width_that_the_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ProbeError, match="7 attention heads divide, got 24"):
        fit(tokens(), [0.1], attention_heads=7)
    pooled = Rows(keys=["a"], groups=["a"], targets=np.array([0]), features=np.zeros((1, 24), np.float32))
    with pytest.raises(ProbeError, match="features of 3 dimensions"):
        fit(pooled, [0.1])
