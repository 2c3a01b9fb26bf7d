"""The papers' settings, by the name that ``ghostgrad run`` knows them under.

One module per family. A setting is a frozen dataclass of its parameters, a few functions (how a run starts, what is measured, its figure) and its claims;
the loop is :func:`ghostgrad.training.train`. A new setting is entered here.
"""

from __future__ import annotations

import difflib

from ..training import Setting
from . import (
    batch_size,
    benign_oscillation,
    discretisation,
    identification,
    label_noise,
    learning,
    linear_regime,
    minima,
    noise_digits,
    noise_regimes,
    noise_stability,
    regression,
    reservoir,
    stability,
)

__all__ = ["SETTINGS", "suggest"]

SETTINGS: dict[str, type[Setting]] = {
    setting.name: setting
    for setting in (
        *(label_noise.OnePoint, label_noise.ReLU1D, label_noise.MatrixSensing),
        *(noise_stability.MatrixSensing, noise_digits.NoiseDigits, noise_stability.Quantisation),
        *(regression.ModelCollapse, regression.CollapseScaling, regression.MoreIsBetter),
        *(linear_regime.BenignOverfitting, linear_regime.LinearRegime, linear_regime.GeneralisationDynamics, linear_regime.ReLUStudent),
        *(identification.ARX, reservoir.LMNT),
        *stability.SETTINGS,
        *discretisation.SETTINGS,
        *(noise_regimes.Perceptron, noise_regimes.PhaseDiagram, benign_oscillation.BenignOscillation),
        *(batch_size.TrainLonger, batch_size.BatchHessian),
        *(minima.BadMinima, minima.SharedAttention, learning.RehearsalFree, learning.SparseGroupLasso),
    )
}


def suggest(name: str) -> list[str]:
    """Known names close to ``name``; its last part alone ("relu1d") counts too."""
    tails = sorted({known.split("/")[-1] for known in SETTINGS})
    meant = difflib.get_close_matches(name.split("/")[-1], tails, n=3, cutoff=0.6)
    close = difflib.get_close_matches(name, SETTINGS, n=3, cutoff=0.5)
    close += [known for tail in meant for known in SETTINGS if known.split("/")[-1] == tail]
    return list(dict.fromkeys(close))
