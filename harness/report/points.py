"""Names of protocols that are points of a curve: `<protocol>[<field>=<value>,…]`."""

from __future__ import annotations

import re

_POINT = re.compile(r"(?P<base>[^\[\]]+)\[(?P<fields>[^\[\]]*=[^\[\]]*)\]")


def is_point(protocol: str | None) -> bool:
    """Whether a row of that protocol is a point of a curve."""
    return _POINT.fullmatch(str(protocol)) is not None


def base_protocol(protocol: str | None) -> str:
    """The protocol's name without its point."""
    match = _POINT.fullmatch(str(protocol))
    return match["base"] if match else str(protocol)


def point_fields(protocol: str | None) -> dict[str, str]:
    """The point's fields and values from the name; empty where it is not a point."""
    match = _POINT.fullmatch(str(protocol))
    pairs = (part.partition("=") for part in match["fields"].split(",")) if match else ()
    return {name.strip(): value for name, _, value in pairs}
