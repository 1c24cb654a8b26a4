"""What a process computes on, whatever launched it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

from harness.features import device
from harness.features.device import Compute, without_launchers

LAUNCHERS = {
    "Open MPI": {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
    "MPICH": {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
    "PMIx": {"PMIX_RANK": "1", "PMIX_NAMESPACE": "slurm.pmix.1.0"},
    "MVAPICH": {"MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_LOCAL_RANK": "1"},
    "Slurm": {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"},
    "torchrun": {
        "WORLD_SIZE": "2",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "ROLE_RANK": "1",
        "ROLE_WORLD_SIZE": "2",
        "ROLE_NAME": "default",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "1",
        "TORCHELASTIC_RUN_ID": "x",
    },
    "a notebook launcher": {"FORK_LAUNCHED": "1", "NODE_RANK": "0", "NPROC": "2"},
    "accelerate": {"ACCELERATE_MIXED_PRECISION": "fp8", "ACCELERATE_TORCH_DEVICE": "meta", "ACCELERATE_CPU_AFFINITY": "1"},
    "accelerate with junk": {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto",
        "ACCELERATE_USE_CPU": "perhaps",
        "ACCELERATE_DYNAMO_BACKEND": "none such",
    },
    "DeepSpeed": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "LOCAL_RANK": "0"},
    "FSDP": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_SHARDING_STRATEGY": "none such"},
    "Megatron": {"ACCELERATE_USE_MEGATRON_LM": "true", "MEGATRON_LM_TP_DEGREE": "2"},
    "a parallelism configuration": {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_what_launchers_leave_in_the_environment_reaches_no_actor(monkeypatch: pytest.MonkeyPatch, launcher: str) -> None:
    for name, value in LAUNCHERS[launcher].items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with without_launchers():
        assert not LAUNCHERS[launcher].keys() & os.environ.keys(), "accelerate would wait for peers, or for plugins"
    assert dict(os.environ) == before, "the environment is the user's"
    compute = Compute("bf16", False, torch.get_num_threads())
    assert compute.device == torch.device("cpu")
    assert compute.accelerator.num_processes == 1
    assert compute.accelerator.mixed_precision == "bf16"
    assert dict(os.environ) == before


def test_the_environment_comes_back_where_the_construction_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        assert "RANK" not in os.environ
        raise RuntimeError("no such device")

    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(device, "Accelerator", fail)
    with pytest.raises(RuntimeError, match="no such device"):
        Compute("float32", False, torch.get_num_threads())
    assert os.environ["RANK"] == "3"


HARMLESS = {"OMP_NUM_THREADS", "PT_HPU_LAZY_MODE", "PYTORCH_ENABLE_MPS_FALLBACK", "XLA_USE_BF16", "XLA_DOWNCAST_BF16", "FOO"}
"""Read or written by accelerate, or an example of its documentation, and no launcher's."""


def test_every_variable_that_accelerate_reads_is_known() -> None:
    package = Path(accelerate.__file__).parent
    text = "".join((package / name).read_text() for name in ("state.py", "accelerator.py", "parallelism_config.py", "utils/environment.py"))
    text += (package / "utils" / "dataclasses.py").read_text()
    read = set(re.findall(r"""(?:environ(?:\.get\(|\[)|from_env\(\[?)\s*["']([A-Z][A-Z0-9_]+)["']""", text))
    read |= {name for group in re.findall(r"get_int_from_env\(\s*\[([^\]]*)\]", text) for name in re.findall(r'"([A-Z0-9_]+)"', group)}
    read |= set(re.findall(r'prefix = "([A-Z0-9_]+_)"', text))
    assert len(read) > 40, "the search has lost its way"
    assert {name for name in read - HARMLESS if not device.LAUNCHER_VARIABLE.fullmatch(name)} == set()
