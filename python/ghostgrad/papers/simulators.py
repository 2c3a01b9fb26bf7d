"""Differential equations that the papers' settings learn from, solved on a grid."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import fft

__all__ = ["KuramotoSivashinsky"]


class KuramotoSivashinsky:
    """``u_t = -u u_x - u_xx - u_xxxx`` on a circle: ``simulator(u)`` is u one time step later, for fields (..., points).

    Exponential time differencing of fourth order (ETDRK4; Cox and Matthews 2002): in Fourier modes ``v' = c v + N(v)`` with ``c = k² - k⁴`` and
    ``N(v) = -(ik/2) FFT(u²)``, the linear part is solved exactly and the integral over N by a rule of Runge-Kutta type. Its coefficients, such as
    ``(e^z - 1) / z`` at ``z = c step``, lose their digits where z is near 0; after Kassam and Trefethen (SIAM J. Sci. Comput. 2005) they are averaged over
    ``contour`` points of the unit circle round z, which by Cauchy's formula is the value at its centre.
    """

    def __init__(self, length: float = 22.0, points: int = 64, step: float = 0.25, contour: int = 16) -> None:
        self.length, self.points, self.step = length, points, step
        k = 2 * np.pi / length * np.arange(points // 2 + 1)
        z = step * (k**2 - k**4)
        self.derivative = -0.5j * np.where(np.arange(len(k)) < (points + 1) // 2, k, 0.0)  # the highest mode of an even number has no derivative
        self.full, self.half = np.exp(z), np.exp(z / 2)
        w = z[:, None] + np.exp(1j * np.pi * (np.arange(contour) + 0.5) / contour)  # half a circle: the other half is its mirror image
        e = np.exp(w)

        def coefficient(values: NDArray[np.complex128]) -> NDArray[np.float64]:
            return step * values.mean(1).real

        self.inner = coefficient((np.exp(w / 2) - 1) / w)
        self.first = coefficient((-4 - w + e * (4 - 3 * w + w**2)) / w**3)
        self.middle = coefficient((2 + w + e * (w - 2)) / w**3)
        self.last = coefficient((-4 - 3 * w - w**2 + e * (4 - w)) / w**3)

    def __call__(self, u: NDArray[np.float64]) -> NDArray[np.float64]:
        v = fft.rfft(u)
        at_start = self.derivative * fft.rfft(u * u)
        a = self.half * v + self.inner * at_start
        at_a = self._nonlinear(a)
        at_b = self._nonlinear(self.half * v + self.inner * at_a)
        at_c = self._nonlinear(self.half * a + self.inner * (2 * at_b - at_start))
        return fft.irfft(self.full * v + self.first * at_start + 2 * self.middle * (at_a + at_b) + self.last * at_c, self.points)

    def _nonlinear(self, v: NDArray[np.complex128]) -> NDArray[np.complex128]:
        u = fft.irfft(v, self.points)
        return self.derivative * fft.rfft(u * u)

    def trajectory(
        self,
        u: NDArray[np.float64],  # (..., points)
        steps: int,
    ) -> NDArray[np.float64]:  # (steps, ..., points), from one step after u
        out = np.empty((steps, *u.shape))
        for t in range(steps):
            out[t] = u = self(u)
        return out
