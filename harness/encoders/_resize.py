"""A network at another input size, for architectures whose sizes are built in (window attention, relative position tables)."""

from __future__ import annotations

import copy

import torch

from harness.errors import EncoderError

_KEPT = 4  # resized copies an encoder remembers


class SizedCopies:
    """Copies of a network, each resized to one input size by timm's own `set_input_size`; the network itself is never changed."""

    def __init__(self, name: str, native: tuple[int, int]) -> None:
        self._name = name
        self._native = native
        self._copies: dict[tuple[tuple[int, int], torch.device], torch.nn.Module] = {}

    def at(self, network: torch.nn.Module, size: tuple[int, int]) -> torch.nn.Module:
        """`network`, where its size is `size` already or does not matter to it, else a resized copy on the same device.

        Raises EncoderError where the architecture cannot take the size.
        """
        if size == self._native or not hasattr(network, "set_input_size"):
            return network
        key = (size, next(network.parameters()).device)
        if key not in self._copies:
            try:
                with torch.inference_mode(False):
                    resized = copy.deepcopy(network)
                    resized.set_input_size(img_size=size)  # type: ignore[operator]
            except Exception as error:  # timm's architectures refuse sizes by assertion, ValueError or RuntimeError
                raise EncoderError(f"encoder {self._name}: cannot take images of {size[0]}x{size[1]} pixels: {one_line(error)}") from error
            if len(self._copies) >= _KEPT:
                self._copies.pop(next(iter(self._copies)))
            self._copies[key] = resized.eval().requires_grad_(False)
        return self._copies[key]


def one_line(error: BaseException) -> str:
    """An exception's message on one line, shortened."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
