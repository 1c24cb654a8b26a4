"""One precision per run and encoder: what a key, a stored dtype, a stream and a record say of it, over every encoder's fixture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.config import load_sweep
from harness.encoders import load
from harness.features.bank import BankStore, ShardRows
from harness.features.device import Compute, Precision, device_type
from harness.features.extract import Extractor
from harness.plan.plan import Plan, make_plan
from harness.search.accounts import Accounts
from harness.search.build import state_of, study_of
from harness.search.runner import Runner
from harness.search.state import StudyState
from harness.search.study import Round
from tests.helpers import tiny

FIXTURES = Path(__file__).parents[1] / "fixtures" / "encoders"
EXAMPLES = sorted(FIXTURES.glob("*/*.json"))
TASKS = ["tiny/object-knn", "tiny/object-segmentation"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    tiny.build(root, splits={"train": 3, "val": 3, "test": 3})
    return root


def entry_of(path: Path, **keys: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {**json.loads(path.read_text())["spec"], **keys}
    if "checkpoint" in plain:
        plain["checkpoint"] = str(path.parent / plain["checkpoint"])
    return plain


def planned(shards: Path, folder: Path, precision: Precision, tasks: list[str], *encoders: dict[str, Any], **settings: Any) -> Plan:
    (folder / "sweep.yaml").write_text(tiny.sweep_text(shards, encoders=list(encoders), tasks=tasks, **settings))
    return make_plan(load_sweep(folder / "sweep.yaml"), folder, device_type(False), precision)


def banked(plan: Plan) -> dict[str, ShardRows]:
    """Bank key to the rows of the test shard, as an actor of the run makes them."""
    encoders = {name: load(spec) for name, spec in plan.encoders.items()}
    extractor = Extractor(Compute(plan.precision, False, 1), encoders.__getitem__, batch_size=4, decode_threads=1)
    (work,) = [work for work in plan.shard_work if work.split == "test"]
    return {bank.key: rows for bank, rows, _ in extractor.run(work, node="here", attempts=1)}


def stored(rows: ShardRows) -> tuple[np.dtype[Any], bytes]:
    features = np.stack(rows.features)
    return features.dtype, features.tobytes()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_banks_of_one_key_hold_the_same_bytes_whatever_the_runs_precision(path: Path, shards: Path, tmp_path: Path) -> None:
    exact, half = (planned(shards, tmp_path, precision, TASKS, entry_of(path)) for precision in ("float32", "bf16"))
    (info,) = exact.infos.values()
    of_float32, of_bf16 = banked(exact), banked(half)
    assert (of_float32.keys() == of_bf16.keys()) == info.float32_only
    for key in of_float32.keys() & of_bf16.keys():
        assert stored(of_float32[key]) == stored(of_bf16[key])
    assert {rows.features[0].dtype for rows in of_float32.values()} == {np.dtype(np.float32)}
    dtypes = {rows.features[0].dtype for rows in of_bf16.values() if rows.masks}
    assert dtypes == {np.dtype(np.float32 if info.float32_only else np.float16)}


def test_there_are_fixtures_of_both_kinds(shards: Path, tmp_path: Path) -> None:
    plan = planned(shards, tmp_path, "bf16", TASKS, *(entry_of(path, name=str(number)) for number, path in enumerate(EXAMPLES)))
    assert {info.float32_only for info in plan.infos.values()} == {True, False}


def test_encoders_of_both_precisions_pass_a_shard_together(shards: Path, tmp_path: Path) -> None:
    """An actor has all encoders of a run: what each gives is what it gives alone."""
    entries = [entry_of(FIXTURES / "timm" / f"{name}.json", name=name) for name in ("vit", "efficientnet")]
    together = banked(planned(shards, tmp_path, "bf16", TASKS, *entries))
    alone = [banked(planned(shards, tmp_path, "bf16", TASKS, entry)) for entry in entries]
    assert together.keys() == alone[0].keys() | alone[1].keys()
    for key, rows in {**alone[0], **alone[1]}.items():
        assert stored(together[key]) == stored(rows)


def test_a_pass_in_a_precision_that_the_process_has_not_is_refused(shards: Path, tmp_path: Path) -> None:
    plan = planned(shards, tmp_path, "bf16", TASKS, entry_of(FIXTURES / "timm" / "vit.json"))
    plan.precision = "float32"
    with pytest.raises(ValueError, match="expected a pass in float32, got bf16"):
        banked(plan)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_key_pass_stream_and_record_read_one_value(shards: Path, tmp_path: Path, precision: Precision) -> None:
    entries = [entry_of(path, name=str(number)) for number, path in enumerate(EXAMPLES)]
    plan = planned(shards, tmp_path, precision, ["tiny/object-knn", "tiny/object-linear-streamed"], *entries)
    accounts = Accounts(plan, BankStore(str(tmp_path / "cache")), {})
    for work in plan.shard_work:
        for encoder_pass in work.passes:
            assert encoder_pass.precision == plan.precision_of(plan.infos[encoder_pass.encoder])
    for study in plan.studies:
        expected = "float32" if study.encoder.float32_only else precision
        assert {dict(bank.identity)["precision"] for bank in study.specs} == {expected} == {plan.precision_of(study.encoder)}
        stream = study_of(plan, study, accounts).stream
        assert (stream.precision if stream else expected) == expected


@pytest.mark.parametrize("task", ["object-linear-streamed", "finetune"])
def test_a_streamed_study_of_one_id_has_the_same_heads_whatever_the_runs_precision(shards: Path, tmp_path: Path, task: str) -> None:
    entries = [entry_of(FIXTURES / "timm" / f"{name}.json", name=name) for name in ("vit", "efficientnet")]
    fields = {"epochs": 1, "batch_size": 4, **({"rungs": 1} if task == "finetune" else {})}
    rounds: dict[str, dict[str, bytes]] = {}
    precisions: tuple[Precision, Precision] = ("float32", "bf16")
    for precision in precisions:
        search = {"trials": 1, "stack": 1, "lr": [1e-3, 1e-1]}
        plan = planned(shards, tmp_path, precision, [f"tiny/{task}"], *entries, protocol=fields, search=search)
        cache = tmp_path / precision
        accounts = Accounts(plan, BankStore(str(cache)), {})
        states = [state_of(plan, study, accounts) for study in plan.studies]
        runner = Runner(str(cache), gpu=False, threads=1)
        rounds[precision] = {state.study.id: weights_of(runner, state, cache) for state in states}
    shared = rounds["float32"].keys() & rounds["bf16"].keys()
    assert len(shared) == 1, "the study of the encoder that computes in float32 alone"
    for identity in shared:
        assert rounds["float32"][identity] == rounds["bf16"][identity]


def weights_of(runner: Runner, state: StudyState, cache: Path) -> bytes:
    """What the first round of a study keeps in the cache, run by a process that has run those of other studies before."""
    step = state.next_step()
    assert step is not None
    outcome = runner.run(state.study, state.test, step)
    assert isinstance(outcome, Round)
    assert [head.error for head in outcome.heads] == [None] * len(outcome.heads)
    data = BankStore(str(cache)).read_bytes("studies", state.study.id, "round-0.safetensors")
    assert data
    return data


def test_a_second_device_of_a_process_does_not_change_the_precision_of_the_first() -> None:
    first, second = Compute("bf16", False, 1), Compute("float32", False, 1)
    values, default = torch.ones(2, 2), torch.get_autocast_dtype("cpu")
    torch.set_autocast_dtype("cpu", torch.float16)  # as a GPU's is: what autocast takes that is given no precision
    try:
        for compute, dtype in ((first, torch.bfloat16), (second, torch.float32), (first, torch.bfloat16)):
            with compute.autocast():
                assert (values @ values).dtype == dtype
    finally:
        torch.set_autocast_dtype("cpu", default)
