"""What the settings' figures share: the colours, and names beside curves in place of a legend."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["BLUE", "GREEN", "GREY", "OCHRE", "RED", "SKY", "name_curves"]

BLUE, RED, GREY, OCHRE, SKY, GREEN = "#0b6e99", "#d1603d", "#8a8a8a", "#b8860b", "#67b2cf", "#4f9d69"


def name_curves(ax: Axes, ends: Iterable[tuple[float, str, str]]) -> None:
    """(last value, name, colour) of each curve: the name stands beside its end, or above the name below, if they would lie on each other.

    Comes last: scales and limits of the axes are heeded as they then are.
    """
    low, high = ax.transScale.transform([(1, y) for y in ax.get_ylim()])[:, 1]
    taken = -math.inf
    for value, name, colour in sorted(ends):
        height = 0.04 * len(name.splitlines())
        place = max(float((ax.transScale.transform((1, value))[1] - low) / (high - low)), taken + height)
        ax.annotate(name, (1.01, place), xycoords="axes fraction", color=colour, va="center", fontsize=9, annotation_clip=False)
        taken = place + height - 0.03
