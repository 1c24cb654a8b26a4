"""A network at another input size, for architectures whose sizes are built in (window attention, relative position tables)."""

from __future__ import annotations

import copy

import torch
from timm.models.beit import Beit

from harness.encoders.positions import resize_bias_table
from harness.errors import EncoderError

_MAX_COPIES = 4  # resized copies an encoder remembers


class SizedCopies:
    """Copies of a network, each resized to one input size by timm's `set_input_size` (BEiT's biases as its authors do); the original stays."""

    def __init__(self, name: str, native: tuple[int, int]) -> None:
        self._name = name
        self._native = native
        self._copies: dict[tuple[tuple[int, int], torch.device], torch.nn.Module] = {}

    def at(self, network: torch.nn.Module, size: tuple[int, int]) -> torch.nn.Module:
        """`network` where it already has `size` or takes any size, else a resized copy on the same device.

        Raises EncoderError where the architecture cannot take the size.
        """
        if size == self._native or not hasattr(network, "set_input_size"):
            return network
        key = (size, next(network.parameters()).device)
        if key not in self._copies:
            try:
                with torch.inference_mode(False), torch.autocast(key[1].type, enabled=False):
                    resized = copy.deepcopy(network)
                    resized.set_input_size(img_size=size)  # type: ignore[operator]
                    if isinstance(network, Beit) and isinstance(resized, Beit):
                        _resize_biases(network, resized)
            except Exception as error:  # timm's architectures refuse sizes by assertion, ValueError or RuntimeError
                raise EncoderError(f"encoder {self._name}: cannot take images of {size[0]}x{size[1]} pixels: {one_line(error)}") from error
            if len(self._copies) >= _MAX_COPIES:
                self._copies.pop(next(iter(self._copies)))
            self._copies[key] = resized.eval().requires_grad_(False)
        return self._copies[key]

    def settled(self, network: torch.nn.Module, size: tuple[int, int]) -> tuple[torch.nn.Module, SizedCopies]:
        """`network` at `size`, and copies of it there, where that size is its own from now on. Raises EncoderError as `at` does."""
        return self.at(network, size), SizedCopies(self._name, size)


def _resize_biases(network: Beit, resized: Beit) -> None:
    """Replace timm's linearly resized tables by BEiT's own."""
    native, grid = network.patch_embed.grid_size, resized.patch_embed.grid_size
    tables = dict(network.named_parameters())
    for name, parameter in resized.named_parameters():
        if name.endswith("relative_position_bias_table"):
            parameter.data = resize_bias_table(tables[name].data, native, grid)


def one_line(error: BaseException) -> str:
    """An exception's message on one line, shortened."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
