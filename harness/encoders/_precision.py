"""Which precisions a device computes in."""

from __future__ import annotations

from harness.errors import RequestError, nearest

PRECISIONS = ("float32", "bf16", "fp16")


def check_precision(precision: str, device_type: str) -> None:
    """Raise RequestError where `device_type` ("cpu" or "cuda") cannot compute in `precision`, one of float32, bf16, fp16.

    fp16 on a CPU is refused although accelerate accepts it: it computes float32 there and reports fp16.
    """
    if precision not in PRECISIONS:
        raise RequestError(f"unknown precision {precision!r}: expected one of {', '.join(PRECISIONS)}{nearest(precision, PRECISIONS)}")
    if precision == "fp16" and device_type == "cpu":
        raise RequestError("precision fp16 on a CPU: accelerate would compute float32 and call it fp16; use bf16 or float32")
