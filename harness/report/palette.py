"""One style for each encoder, the same in every figure and on the page.

Colours by Okabe and Ito (Color Universal Design, 2008) and by Tol (SRON/EPS/TN/09-002, muted scheme), which people with any usual colour vision can
tell apart; markers differ too. An encoder with random weights has its trained partner's colour, greyed, with open markers, dashed lines and hatching.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#332288", "#882255", "#999933", "#44AA99", "#CC6677", "#661100")
MARKERS = "osD^vPXph<>d"
GREY = "#8A8F98"
RIGHT, WRONG, NEITHER = "#0072B2", "#D55E00", "#8A8F98"
"""Right and wrong answers: told apart by their symbols too."""


@dataclass(frozen=True, kw_only=True)
class Style:
    """How an encoder is drawn."""

    colour: str
    """#rrggbb."""
    marker: str
    random: bool

    @property
    def line(self) -> str:
        return "--" if self.random else "-"

    @property
    def face(self) -> str:
        """Fill of a marker."""
        return "#ffffff" if self.random else self.colour


@dataclass(frozen=True, kw_only=True)
class Palette:
    """The style of every encoder of a run, and which one is whose random twin."""

    styles: Mapping[str, Style]
    twins: Mapping[str, str | None]


def make_palette(encoders: Sequence[str], twins: Mapping[str, str | None]) -> Palette:
    """`twins` names the encoders with random weights, each with its trained partner, or None where it has none."""
    return Palette(styles=_styles(encoders, twins), twins={name: partner for name, partner in twins.items() if name in encoders})


def _styles(encoders: Sequence[str], twins: Mapping[str, str | None]) -> dict[str, Style]:
    trained = [encoder for encoder in encoders if encoder not in twins]
    place = {encoder: i for i, encoder in enumerate(trained)}
    styles = {}
    for i, encoder in enumerate(encoders):
        partner = twins.get(encoder)
        at = place.get(encoder, place.get(partner, i) if partner else i)
        colour = COLOURS[at % len(COLOURS)]
        if encoder in twins:
            colour = mix(colour, GREY, 0.6) if partner in place else GREY
        styles[encoder] = Style(colour=colour, marker=MARKERS[at % len(MARKERS)], random=encoder in twins)
    return styles


def mix(colour: str, other: str, share: float) -> str:
    """`colour` with `share` in [0, 1] of `other`, both #rrggbb, in plain RGB."""
    pairs = ((int(colour[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)
