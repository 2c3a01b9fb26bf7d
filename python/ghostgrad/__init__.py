"""Per-sample squared gradient norms and Hessian traces of any PyTorch model, at the price of the backward pass that runs anyway.

>>> import torch, ghostgrad as gg
>>> model = torch.nn.Linear(3, 2)
>>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
>>> gg.sqnorms(model, torch.nn.functional.cross_entropy, x, y).shape
torch.Size([8])
"""

import torch as torch  # its libraries must be loaded before the extension's

from . import _C as _C
from . import compiled as compiled
from . import layers as layers
from . import noise as noise
from . import ops as ops
from . import optim as optim
from . import recurrent as recurrent
from . import reference as reference
from . import rules as rules
from .contributions import Affine as Affine
from .contributions import Contribution as Contribution
from .contributions import Full as Full
from .contributions import Outer as Outer
from .contributions import Positions as Positions
from .contributions import Rows as Rows
from .contributions import Segments as Segments
from .costs import explain as explain
from .eigenvalues import Eigenvalues as Eigenvalues
from .eigenvalues import top_eigenvalue as top_eigenvalue
from .errors import BatchCouplingError as BatchCouplingError
from .errors import GhostgradError as GhostgradError
from .errors import TapStateError as TapStateError
from .errors import UnsupportedUseError as UnsupportedUseError
from .gauss_newton import CurvatureTrace as CurvatureTrace
from .gauss_newton import fisher_trace as fisher_trace
from .gauss_newton import ggn_trace as ggn_trace
from .gram import gram as gram
from .inputs import input_sqnorms as input_sqnorms
from .norms import check as check
from .norms import gradient_variance as gradient_variance
from .norms import output_sqnorms as output_sqnorms
from .norms import second_moments as second_moments
from .norms import sqnorms as sqnorms
from .perturb import perturbed as perturbed
from .rules import register_rule as register_rule
from .scores import ScoresFileError as ScoresFileError
from .scores import scores as scores
from .statistics import NoiseScale as NoiseScale
from .statistics import noise_scale as noise_scale
from .tap import Tap as Tap
from .tap import declare_samples as declare_samples
from .tap import tap as tap
from .trace import HessianTrace as HessianTrace
from .trace import hessian_trace as hessian_trace
from .weighted import clipped_backward as clipped_backward
from .weighted import weighted_backward as weighted_backward

__version__ = "0.1.0"
