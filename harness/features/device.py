"""What a process computes on: device type, precision, threads."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from harness.errors import RequestError, RunError

Precision = Literal["float32", "bf16", "fp16"]
_MIXED = {"float32": "no", "bf16": "bf16", "fp16": "fp16"}
LAUNCHER_VARIABLE = re.compile(
    r"(ACCELERATE|FSDP|MEGATRON_LM|PARALLELISM_CONFIG|DEEPSPEED|DS|OMPI|PMI|PMI2|PMIX|MPI|I_MPI|MV2|HYDRA|HYDI|TORCHELASTIC|TORCH_NCCL|SLURM|JSM|FLUX|PALS)_.*"
    r"|((LOCAL|NODE|GROUP|ROLE|CROSS)_)?(RANK|WORLD_SIZE|SIZE)|MPI_LOCALN?RANK(ID|S)|ROLE_NAME|MASTER_(ADDR|PORT)|NPROC|FORK_LAUNCHED"
)
"""What MPI, PMI, MVAPICH, Slurm, torchrun, accelerate and DeepSpeed tell the processes that they start, by the names that accelerate 1.15 reads
(accelerate.state, accelerate.utils.environment, accelerate.utils.dataclasses) and their kin."""


def has_gpu() -> bool:
    return torch.cuda.is_available()


def device_type(gpu: bool) -> str:
    """The GPU's model, or the CPU's instruction set: what features may depend on."""
    if gpu:
        return torch.cuda.get_device_name(0)
    bf16 = "+bf16" if _cpu_has_bf16() else ""
    return f"cpu:{torch.backends.cpu.get_cpu_capability()}{bf16}"


def check_device(expected: str, *, gpu: bool, node: str) -> None:
    """Raises RunError where a process of a run finds itself on another device than the run's features and values are recorded as computed on."""
    device = device_type(gpu)
    if device != expected:
        raise RunError(
            f"node {node}: expected every process of a run on {expected}, got {device}; values may depend on it: give the cluster one type of device"
        )


def resolve_precision(name: str, gpu: bool) -> Precision:
    """`auto` is bf16 on GPUs and on CPUs that have it in hardware, else float32. Raises RequestError for fp16 on a CPU."""
    if name == "auto":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if gpu else _cpu_has_bf16()
        return "bf16" if bf16 else "float32"
    if name not in _MIXED:
        raise RequestError(f"resources.precision: expected auto, {', '.join(_MIXED)}, got {name!r}")
    precision: Precision = name  # type: ignore[assignment]
    _check_device(precision, gpu)
    return precision


def _check_device(precision: Precision, gpu: bool) -> None:
    if precision == "fp16" and not gpu:
        raise RequestError("resources.precision: fp16 needs a GPU (on a CPU accelerate computes float32 and calls it fp16); ask for float32 or bf16")


def _cpu_has_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def without_launchers() -> Iterator[None]:
    """The environment without what launchers put there, while the block lasts.

    Where mpirun, torchrun or `accelerate launch` started the run, accelerate would take each actor for one of theirs: it would wait for peers that
    never come, or look for plugins that nobody asked for.
    """
    hidden = {name: value for name, value in os.environ.items() if LAUNCHER_VARIABLE.fullmatch(name)}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextmanager
def undisturbed(gpu: bool) -> Iterator[None]:
    """Leave this process as it was when the block ends, and let nothing of it, such as `torch.no_grad()` or autocast, into the block.

    Threads, random states and accelerate's settings, which are one for all of a process, come back.
    """
    threads, states = torch.get_num_threads(), [kind._shared_state for kind in (AcceleratorState, PartialState, GradientState)]
    before = [dict(state) for state in states]
    devices = [torch.cuda.current_device()] if gpu else []
    autocast = torch.autocast("cuda" if gpu else "cpu", enabled=False)
    try:
        with torch.inference_mode(False), torch.enable_grad(), autocast, torch.random.fork_rng(devices=devices):
            yield
    finally:
        torch.set_num_threads(threads)
        for state, values in zip(states, before, strict=True):
            state.clear()
            state.update(values)


class Compute:
    """One process's device, its precision and a fixed number of threads, through accelerate. Raises RequestError for fp16 on a CPU."""

    def __init__(self, precision: Precision, gpu: bool, threads: int) -> None:
        _check_device(precision, gpu)
        self.precision, self._gpu, self._threads = precision, gpu, threads
        self.use_threads()
        self.accelerator = self._new_accelerator()
        self.device: torch.device = self.accelerator.device

    def use_threads(self) -> None:
        """Let the calling thread compute with the fixed number of threads: OpenMP keeps it per thread.

        Ray's own setting comes too late where torch was imported before it.
        """
        torch.set_num_threads(self._threads)

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision for every call within, whichever method of a module it is (prepare_model would cover `forward` alone)."""
        if AcceleratorState().mixed_precision != _MIXED[self.precision]:  # of another Compute of this process, made since
            self.accelerator = self._new_accelerator()
        context: AbstractContextManager[Any] = self.accelerator.autocast()
        return context

    def _new_accelerator(self) -> Accelerator:
        AcceleratorState._reset_state(True)  # a singleton: a reused process would keep its first precision
        with without_launchers():
            return Accelerator(mixed_precision=_MIXED[self.precision], cpu=not self._gpu)
