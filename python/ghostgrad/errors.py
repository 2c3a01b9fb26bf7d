"""The errors that ghostgrad raises on purpose. All of them are :class:`GhostgradError`."""

from __future__ import annotations

__all__ = ["BatchCouplingError", "GhostgradError", "TapStateError", "UnsupportedUseError"]


class GhostgradError(RuntimeError):
    """Base class of the errors below."""


class UnsupportedUseError(GhostgradError):
    """A parameter is used in a way whose per-sample gradient cannot be taken. The message names the parameter, the operation and a way out."""


class BatchCouplingError(GhostgradError):
    """The model mixes the samples of a batch (batch statistics, say), so that "the gradient of sample i" has no meaning."""


class TapStateError(GhostgradError):
    """A tap was read or used out of order: before a backward, after two of them, with a batch of another size."""
