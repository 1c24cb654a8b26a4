"""`resources.decoder` reaches every reader of a data set and the keys of all that is made of it; the usual one leaves no trace."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.config import load_sweep
from harness.data import images
from harness.features.device import device_type
from harness.plan.plan import Plan, make_plan
from tests.helpers import tiny


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    tiny.build(folder / "shards")
    return folder


def planned(root: Path, **resources: object) -> Plan:
    file = root / "sweep.yaml"
    file.write_text(tiny.sweep_text(root / "shards", tasks=["tiny/object-knn", "tiny/object-linear-streamed"], resources=resources))
    return make_plan(load_sweep(file), root, device_type(False), "float32")


def keys(plan: Plan) -> set[str]:
    return {bank.key for bank in plan.banks()}


def test_another_decoder_reads_every_shard_and_is_in_every_key(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "version", lambda _: "0.17.0")
    usual, other = planned(root, batch_size=8), planned(root, batch_size=8, decoder="torchcodec")
    assert {work.rules.decoder for work in usual.shard_work} == {"pillow"}
    assert {work.rules.decoder for work in other.shard_work} == {"torchcodec"} == {other.source("tiny", "train").rules.decoder}
    assert not keys(usual) & keys(other)
    assert all(dict(bank.identity)["decoder"] == "torchcodec 0.17.0" for bank in other.banks())
    monkeypatch.setattr(images, "version", lambda _: "0.18.0")
    assert not keys(other) & keys(planned(root, batch_size=8, decoder="torchcodec"))


def test_to_name_the_usual_decoder_changes_no_key_and_no_run(root: Path) -> None:
    usual, named = planned(root, batch_size=8), planned(root, batch_size=8, decoder="pillow")
    assert (keys(usual), usual.run_id) == (keys(named), named.run_id)
    assert not any("decoder" in dict(bank.identity) for bank in named.banks())
