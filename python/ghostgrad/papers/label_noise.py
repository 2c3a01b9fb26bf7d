"""Label noise as a regulariser: three settings in which SGD drifts along the zero-error set towards small ``reg``.

G. Blanc, N. Gupta, G. Valiant, P. Valiant, "Implicit regularization for deep neural networks driven by an Ornstein-Uhlenbeck like process", COLT 2020.

The regulariser is ``reg(theta) = (1/n) sum_i ||grad_theta f(x_i)||^2``, over all parameters. The paper steps on ``(f - y - z)^2`` with one sample at a
time; here the loss is ``1/2 (f - y - z)^2``, so that the paper's learning rate is half of ours. Why ``reg``, near a point of zero error, with
``v_i = grad f(x_i)``, ``H_i`` the Hessian of ``f(x_i)``, noise of variance s^2 and learning rate eta:

- Across the zero-error set the deviation ``u`` obeys ``u <- u - eta v_i (v_i' u - z)``. Its stationary covariance ``C`` solves, to first order in eta,
  ``V C + C V = eta s^2 V`` with ``V = mean_i v_i v_i'``: ``C = (eta s^2 / 2) P``, P the projection on the span of the ``v_i``, whatever V's eigenvalues.
- Along the set the drift is the second-order part of the step's mean, ``-eta mean_i [H_i u (v_i' u) + v_i u'H_i u / 2]``. The second term lies in the span.
  The first averages to ``-eta mean_i H_i C v_i = -(eta^2 s^2 / 2) mean_i H_i v_i = -(eta^2 s^2 / 4) grad reg``, because ``grad ||v_i||^2 = 2 H_i v_i``.

So the *variance* of the noise enters, not its standard deviation (which the paper's introduction names; its proofs agree with the above), and the time to
reach the floor goes as ``1 / (eta^2 s^2)``. Only while the labels are clean is the error zero; see :class:`LabelNoise`, ``settle``.

*Side by side.* The networks are tiny and the steps are many, so all arms and seeds of a setting are trained as one batched network (``torch.func.vmap``
over a leading dimension R of *replicas*), and ``CHUNK`` steps of it are traced into one graph, which ``torch.compile`` turns into one call where that pays.
Which sample a step sees and which noise its label gets is a function of (seed, step) alone, see :func:`draws`: a run of fewer seeds or one of another arm meets
the same draws.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from scipy.optimize import linprog, minimize_scalar
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import ghostgrad as gg

from ..training import Claim, Clock, CompileError, Outcome, Reading, Run, Setting, check_finite, philox, reading_steps
from .figures import BLUE, RED, name_curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Arm",
    "LabelNoise",
    "MatrixSensing",
    "OnePoint",
    "Problem",
    "ReLU1D",
    "Replica",
    "Stack",
    "draws",
    "one_point_floor",
    "relu_1d_floor",
    "statistical_dimension",
    "unit_cost",
]

AUTHORS = "Blanc, Gupta, Valiant, Valiant (COLT 2020)"
NOISY, CLEAN = BLUE, RED  # one colour per arm, in every figure
DTYPE = torch.float64  # the drift per step is some 1e-6 of a parameter, which float32 would round to a handful of values
CHUNK = 16  # steps per compiled call: long enough to hide the call (20 us), short enough to compile in seconds
DRAW_BLOCK = 1024  # steps per key of the counter-based generator; part of the address, so changing it changes every run
COMPILE_FROM = 100_000  # steps from which compiling (10 to 20 s, the first time) is cheaper than tracing alone


def _normal(seed: int, *shape: int) -> Tensor:
    """Standard normals that depend on seed and shape alone; arms of a seed start alike because they ask for the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


# -------------------------------------------------------------------------------------------------------------------------------------- the family


@dataclass(frozen=True)
class Arm:
    """One way of training. All arms of a seed start from the same parameters and see the same samples in the same order."""

    name: str
    noise_variance: float  # of the fresh label noise; 0 for none
    variant: str = ""  # which of the setting's models, where it has several


@dataclass(frozen=True)
class Problem:
    """A model, at its start, with the data that it is to fit and the value that theory says its regulariser cannot go below."""

    model: nn.Module  # (n, ...) -> (n,)
    x: Tensor  # (n, ...)
    y: Tensor  # (n,)
    floor: float  # of reg = mean_i ||grad f(x_i)||^2, over all parameters with f(x_i) = y_i
    truth: Tensor | None = None  # what the model is to find, where that is known


@dataclass(frozen=True)
class Replica:
    """One of the networks trained side by side."""

    arm: Arm
    seed: int
    problem: Problem


@dataclass(frozen=True)
class LabelNoise(Setting):
    """SGD with batch size 1 on ``1/2 (f(x_i) - y_i - z)^2``, the label noise ``z`` fresh in every step.

    At the end of the run, for the last ``settle`` of its steps, the labels are clean in every arm. Label noise keeps a network at a distance from the
    interpolating ones, and only for those is the floor a floor: with the noise on, ``reg`` does fall a few percent below it.
    """

    title: ClassVar[str] = "Implicit regularization for deep neural networks driven by an Ornstein-Uhlenbeck like process"
    ops: ClassVar[tuple[str, ...]] = ("gg.output_sqnorms",)
    compilable: ClassVar[bool] = True

    steps: int = 100_000
    """Steps of SGD, one sample each."""
    read_every: int = 1_000
    """Steps between two readings of the regulariser; before the first of them it is also read at its halves, quarters, ..."""
    lr: float = 0.01
    """Learning rate, for the half-squared loss 1/2 (f - y)^2 (for the paper's (f - y)^2 it would be half of this)."""
    noise_variance: float = 1.0
    """Variance, not standard deviation, of the label noise. The drift per step is -(lr^2 variance / 4) grad reg."""
    settle: float = 0.2
    """Share of the steps, at the end, that have clean labels in every arm, so that all networks end at zero error."""

    def rules(self) -> list[tuple[str, bool, str]]:
        return [
            *self.at_least(1, "steps", "read_every"),
            *self.positive("lr"),
            ("noise_variance", 0 <= self.noise_variance < math.inf, "at least 0 and finite"),
            ("settle", 0 <= self.settle <= 1, "between 0 and 1"),
        ]

    def compile_pays(self) -> bool:
        return self.steps >= COMPILE_FROM

    def arms(self) -> list[Arm]:
        return [Arm("with noise", self.noise_variance), Arm("without noise", 0.0)]

    @abstractmethod
    def problem(self, arm: Arm, seed: int) -> Problem:
        """The model at its start and the data; a function of its arguments and the setting's fields alone."""

    @abstractmethod
    def measure(self, problem: Problem) -> dict[str, float]:
        """The setting's own columns of ``metrics.csv``, beside ``loss``, ``reg`` and ``reg_over_floor``."""

    def start(self, device: torch.device, compiled: bool) -> Stack:
        def to_device(problem: Problem) -> Problem:
            return dataclasses.replace(problem, model=problem.model.to(device), x=problem.x.to(device), y=problem.y.to(device))

        return Stack(self, [Replica(arm, seed, to_device(self.problem(arm, seed))) for arm in self.arms() for seed in self.seeds], compiled)


def draws(seed: int, start: int, stop: int, num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample index and standard normal of each of the steps ``start ... stop - 1``: a function of (seed, step, num_samples) alone.

    At the address (seed, step // 1024): any range of steps can be drawn without drawing what came before it.
    """
    index, normal = [], []
    for block in range(start // DRAW_BLOCK, -(-stop // DRAW_BLOCK)):
        rng = philox(seed, block)
        steps = slice(max(start - block * DRAW_BLOCK, 0), min(stop - block * DRAW_BLOCK, DRAW_BLOCK))
        index.append(rng.integers(num_samples, size=DRAW_BLOCK)[steps])
        normal.append(rng.standard_normal(DRAW_BLOCK)[steps])
    return np.concatenate(index), np.concatenate(normal)


class Stack(Run):
    """All replicas as one batched network: parameters (R, ...), samples (R, n, ...), and the steps that move them."""

    def __init__(self, setting: LabelNoise, replicas: list[Replica], compiled: bool) -> None:
        self.setting, self.replicas, self.compiled = setting, replicas, compiled
        self.reading_steps = reading_steps(setting.steps, setting.read_every)
        problems = [r.problem for r in replicas]
        self.template = problems[0].model
        self.params = {k: torch.stack([p.model.get_parameter(k).detach() for p in problems]) for k, _ in self.template.named_parameters()}
        self.fixed: dict[str, Any] = {
            "buffers": {k: torch.stack([p.model.get_buffer(k) for p in problems]) for k, _ in self.template.named_buffers()},
            "x": torch.stack([p.x for p in problems]),  # (R, n, ...)
            "y": torch.stack([p.y for p in problems]),  # (R, n)
            "row": torch.arange(len(replicas), device=problems[0].x.device),  # (R,)
        }
        self.calls: dict[int, Callable[..., dict[str, Tensor]]] = {}

    @property
    def preparing(self) -> str:  # type: ignore[override]
        return "compiling" if self.compiled and CHUNK not in self.calls else ""

    def _chunk(
        self,
        params: dict[str, Tensor],  # (R, ...)
        fixed: dict[str, Any],
        index: Tensor,  # (K, R)
        noise: Tensor,  # (K, R)
    ) -> dict[str, Tensor]:  # (R, ...)
        """K steps of SGD: ``theta <- theta - lr grad 1/2 (f(x_i) - y_i - z)^2``."""

        def loss(params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
            return 0.5 * (functional_call(self.template, {**params, **buffers}, (x[None],))[0] - target).square()

        x = fixed["x"][fixed["row"], index]  # (K, R, ...)
        target = fixed["y"][fixed["row"], index] + noise  # (K, R)
        for k in range(index.shape[0]):
            gradient = vmap(grad(loss))(params, fixed["buffers"], x[k], target[k])
            params = {name: p - self.setting.lr * gradient[name] for name, p in params.items()}
        return params

    def advance(self, start: int, stop: int, between: Callable[[], None]) -> None:
        """Arms of one seed share its draws; the noise is scaled by the arm, and is 0 while the run settles."""
        setting, replicas, y = self.setting, self.replicas, self.fixed["y"]
        by_seed = {seed: draws(seed, start, stop, y.shape[1]) for seed in setting.seeds}
        index = np.stack([by_seed[r.seed][0] for r in replicas], axis=1)  # (K, R)
        noise = np.stack([math.sqrt(r.arm.noise_variance) * by_seed[r.seed][1] for r in replicas], axis=1)  # (K, R)
        noise[np.arange(start, stop) >= setting.steps - round(setting.settle * setting.steps)] = 0.0

        whole = len(index) // CHUNK
        sizes = [CHUNK] * whole + [1] * (len(index) - whole * CHUNK)  # the rest one by one: two graphs serve every length
        params = self.params
        for i, z in zip(torch.from_numpy(index).to(y.device).split(sizes), torch.from_numpy(noise).to(y).split(sizes), strict=True):
            between()
            if len(i) not in self.calls:
                # Traced once to plain operations: without a compiler this alone is three times as fast as vmap(grad(...)) in every step.
                call = make_fx(lambda *args: self._chunk(*args))(params, self.fixed, i, z)
                self.calls[len(i)] = self._compile(call, (params, self.fixed, i, z)) if self.compiled and len(i) == CHUNK else call
            params = self.calls[len(i)](params, self.fixed, i, z)

        finite = torch.stack([p.isfinite().reshape(len(p), -1).all(1) for p in params.values()]).all(0).tolist()
        advice = f"The learning rate is too large for this noise or start: try --lr {setting.lr / 2:g}, or a smaller --noise-variance."
        check_finite([(r.arm.name, r.seed) for r in replicas], finite, start, stop, advice)
        self.load_state_dict(params)

    def _compile(self, call: Callable[..., dict[str, Tensor]], example: tuple[Any, ...]) -> Callable[..., dict[str, Tensor]]:
        compiled = torch.compile(call)
        try:
            compiled(*example)
        except Exception as error:  # whatever is wrong with the compiler of this machine
            raise CompileError(
                f"torch.compile failed here ({type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}). "
                "Run with --compile no (and --overwrite, or another --out): the same training, some 30 times slower for the smallest networks."
            ) from error
        return compiled

    def read(self, step: int) -> Reading:
        """One row per replica. The loss is that of the clean labels."""
        rows, clock = [], Clock()
        for replica in self.replicas:
            problem = replica.problem
            with clock, warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*has no fused rule")  # one copy of a tiny network's gradient per sample is cheap
                reg = gg.output_sqnorms(problem.model, problem.x).mean().item()
            with torch.no_grad():
                loss = 0.5 * (problem.model(problem.x) - problem.y).square().mean().item()
                measured = self.setting.measure(problem)
            row = {"step": step, "arm": replica.arm.name, "seed": replica.seed, "loss": loss, "reg": reg, "reg_over_floor": reg / problem.floor}
            rows.append({**row, **measured})
        noisy = [row for row, r in zip(rows, self.replicas, strict=True) if r.arm.noise_variance > 0] or rows
        loss, reg = (np.mean([row[k] for row in noisy]) for k in ("loss", "reg"))
        return Reading(rows, clock.seconds, f"loss {loss:.2e}, reg {reg:.4g}")

    def state_dict(self) -> dict[str, Tensor]:
        return self.params

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.params = {k: v.to(self.params[k]) for k, v in state.items()}
        with torch.no_grad():
            for r, replica in enumerate(self.replicas):
                for name, p in replica.problem.model.named_parameters():
                    p.copy_(self.params[name][r])

    def summary(self) -> dict[str, Any]:
        return {"floors": [{"arm": r.arm.name, "seed": r.seed, "floor": r.problem.floor} for r in self.replicas]}


def _replicas(outcome: Outcome) -> list[Replica]:
    assert isinstance(outcome.run, Stack)
    return outcome.run.replicas


# ---------------------------------------------------------------------------------------------------------------------------------------- one point


def unit_cost(
    activation: str,
    o: float | np.ndarray,  # what the unit contributes, c s(w'x)
    q: float,  # ||x||^2
) -> float | np.ndarray:
    """``R_o(o)``: the least that a unit ``c s(w'x)`` adds to ``||grad f(x)||^2`` if its output is to be ``o``.

    The unit adds ``h^2 + c^2 s'^2 q`` with ``h = s(w'x)`` and ``c = o / h``. With ``t = o^2 q``:

    - logistic, ``s' = h (1 - h)``: ``h^2 + t (1 - h)^2``, least at ``h = t / (1 + t)``, where it is ``t / (1 + t)``;
    - tanh, ``s' = 1 - h^2``: ``h^2 + t (1 - h^2)^2 / h^2``, least at ``h^2 = sqrt(t / (1 + t))``, where it is ``2 sqrt(t) (sqrt(1 + t) - sqrt(t))``.
    """
    t = np.square(o) * q
    if activation == "logistic":
        return t / (1 + t)
    return 2 * np.sqrt(t) / (np.sqrt(1 + t) + np.sqrt(t))  # the same, without the cancellation at large t


def one_point_floor(activation: str, y: float, q: float, width: int) -> float:
    """The least ``||grad f(x)||^2`` of ``width`` units whose outputs add up to ``y``.

    tanh: with ``r = |o| sqrt(q)``, ``R_o = 2 r / (sqrt(1 + r^2) + r)`` is strictly concave in r and 0 at 0, so sharing costs more: one unit does all the
    work, ``R_o(y)``. logistic: ``r^2 / (1 + r^2)`` is convex up to ``r^2 = 1/3`` and concave after, so that at a minimum at most one unit stands in the concave
    part, and those in the convex part are equal: a search over the one unit's share. (Units of opposite sign only cost more: R_o grows with |o|.)
    """
    if activation == "tanh" or width == 1:
        return float(unit_cost(activation, y, q))

    def cost(share: float | np.ndarray) -> float | np.ndarray:
        return unit_cost(activation, share * y, q) + (width - 1) * unit_cost(activation, (1 - share) * y / (width - 1), q)

    grid = np.linspace(0.0, 1.0, 10_001)  # the cost may have two minima in the share; the grid finds the right valley
    best = grid[int(np.argmin(cost(grid)))]
    found = minimize_scalar(lambda share: float(cost(share)), bounds=(max(best - 1e-4, 0.0), min(best + 1e-4, 1.0)), method="bounded", options={"xatol": 1e-12})
    return float(min(found.fun, np.min(cost(grid))))


class _OnePointNet(nn.Module):
    """``f(x) = sum_k c_k s(w_k'x)``. The activation is a buffer, so that networks with either can be trained side by side."""

    def __init__(self, weight: Tensor, c: Tensor, activation: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)  # (width, dim)
        self.c = nn.Parameter(c)  # (width,)
        self.register_buffer("is_tanh", torch.tensor(activation == "tanh"))
        self.is_tanh: Tensor

    def hidden(self, x: Tensor) -> Tensor:  # (n, dim) -> (n, width)
        z = nn.functional.linear(x, self.weight)
        return torch.where(self.is_tanh, z.tanh(), z.sigmoid())

    def forward(self, x: Tensor) -> Tensor:  # (n, dim) -> (n,)
        return self.hidden(x) @ self.c


@dataclass(frozen=True)
class OnePoint(LabelNoise):
    """One data point, one hidden layer: how label noise shares the work among the units."""

    name: ClassVar[str] = "label-noise/one-point"
    paper: ClassVar[str] = AUTHORS
    summary: ClassVar[str] = "one data point: label noise leaves a single active tanh unit, or logistic units of at most two kinds"
    duration: ClassVar[str] = "under 1 minute"

    steps: int = 1_000_000
    read_every: int = 10_000
    lr: float = 0.1
    noise_variance: float = 1.0
    activation: Literal["both", "tanh", "logistic"] = "both"
    """Hidden activation; "both" trains the two side by side."""
    width: int = 5
    """Hidden units."""
    dim: int = 3
    """Dimension of the data point."""
    input_sqnorm: float = 1.0
    """Squared norm q of the data point."""
    target: float = 2.0
    """Label y of the data point."""

    def rules(self) -> list[tuple[str, bool, str]]:
        return [
            *super().rules(),
            *self.at_least(1, "width", "dim"),
            ("input_sqnorm", self.input_sqnorm > 0, "positive"),
            ("target", self.target != 0, "other than 0, or there is nothing to share"),
        ]

    @property
    def activations(self) -> list[str]:
        return ["tanh", "logistic"] if self.activation == "both" else [self.activation]

    def arms(self) -> list[Arm]:
        plain = super().arms()
        return [Arm(f"{a}, {arm.name}", arm.noise_variance, a) for a in self.activations for arm in plain]

    def problem(self, arm: Arm, seed: int) -> Problem:
        start = _normal(seed, self.width + 1, self.dim + 1)
        x = start[-1:, :-1]
        x = x * math.sqrt(self.input_sqnorm) / x.norm()
        model = _OnePointNet(start[:-1, :-1].clone(), start[:-1, -1].clone(), arm.variant)
        floor = one_point_floor(arm.variant, self.target, self.input_sqnorm, self.width)
        return Problem(model, x, torch.full((1,), self.target, dtype=DTYPE), floor)

    def measure(self, problem: Problem) -> dict[str, float]:
        assert isinstance(problem.model, _OnePointNet)
        h, c = problem.model.hidden(problem.x)[0], problem.model.c
        out = c * h  # (width,)
        # A unit is off when it does less than 1 % of the work; two units are of one kind when c and h agree to 1 % of the largest of each.
        kinds: list[tuple[float, float]] = []
        scale_c, scale_h = c.abs().max().item(), h.abs().max().item()
        for ci, hi in zip(c.tolist(), h.tolist(), strict=True):
            if not any(abs(ci - ck) <= 0.01 * scale_c and abs(hi - hk) <= 0.01 * scale_h for ck, hk in kinds):
                kinds.append((ci, hi))
        return {
            "active_units": int((out.abs() > 0.01 * abs(self.target)).sum()),
            "distinct_units": len(kinds),
            **{f"output_{k}": v for k, v in enumerate(out.tolist())},
        }

    def claims(self) -> list[Claim]:
        claims = []
        if "tanh" in self.activations:
            claims += [
                Claim("tanh: exactly one unit stays active", "tanh, with noise", "active_units", "==", 1),
                Claim(
                    "tanh: reg is within 1 % of the floor R_o(y)",
                    "tanh, with noise",
                    "reg_over_floor",
                    "<=",
                    1.01,
                    formula="min ‖∇f(x)‖² = R_o(y) = 2r/(√(1+r²) + r), r = |y|‖x‖",
                ),
            ]
        if "logistic" in self.activations:
            claims += [Claim("logistic: the units are of at most two kinds (c, h)", "logistic, with noise", "distinct_units", "<=", 2)]
        return claims

    def figure(self, outcome: Outcome) -> Figure:
        from matplotlib.figure import Figure

        titles = {
            "tanh": _title(outcome, "tanh: one unit is left with all the work", "tanh, with noise"),
            "logistic": _title(outcome, "logistic: the units come to share it", "logistic, with noise"),
        }
        panels = len(self.activations) + 1
        figure = Figure(figsize=(4.4 * panels, 3.8), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)
        frame = outcome.metrics[outcome.metrics["step"] > 0]
        for ax, activation in zip(axes[0], self.activations, strict=False):
            noisy = frame[(frame["arm"] == f"{activation}, with noise") & (frame["seed"] == self.seed)]
            for k in range(self.width):
                ax.plot(noisy["step"], noisy[f"output_{k}"], color=NOISY, alpha=0.4 + 0.6 * k / self.width)
            ax.set(xscale="log", xlabel="step", ylabel="output of each unit", title=titles[activation], xlim=(min(4, self.steps / 2), self.steps))
            ax.axhline(self.target, color="black", lw=0.8, ls=":")
            ax.text(0.02, self.target, "label y", transform=ax.get_yaxis_transform(), va="bottom", fontsize=8)
            _mark_settling(ax, self)
        ax = axes[0, -1]
        ends = _curves(ax, outcome, "reg_over_floor", "reg / floor", _title(outcome, "reg falls to its floor", "reg over its floor"), seeds=[self.seed])
        ax.axhline(1.0, color="black", lw=1, ls=":")
        ax.text(0.02, 0.98, "floor", transform=ax.get_yaxis_transform(), va="top", fontsize=9)
        _mark_settling(ax, self)
        name_curves(ax, ends)
        return figure


# ------------------------------------------------------------------------------------------------------------------------------------------ 1-D ReLU


def relu_1d_floor(
    x: np.ndarray,  # (n,), distinct
    y: np.ndarray,  # (n,)
    rtol: float = 1e-9,
) -> float:
    """The least ``reg`` of any ReLU network, of any width, with a trained affine part, that passes through the points: a linear programme.

    A unit ``c relu(a x + b)`` with kink ``k = -b/a`` bends the function by ``s = c |a|`` there and adds ``a^2 S2 + c^2 S1`` to ``n reg``, where over the
    points that it is active on ``S2 = sum (x_j - k)^2`` and ``S1 = sum (x_j^2 + 1)``. Scaling a up and c down leaves s alone, so by the inequality of the
    means a unit costs ``|s| w(k)``, ``w = 2 sqrt(S1 S2)``. The affine part is free (its own gradients add the constant ``sum (x_j^2 + 1)``), so a unit that is
    active left of its kink does the same as one active right of it, and the cheaper counts. Hence

        minimise sum_k w(k) |s_k|  subject to  alpha + beta x_j + sum_k s_k (x_j - k)_+ = y_j,

    a weighted total variation of the slope, over kinks *anywhere*. Its dual asks for multipliers l with ``sum l_j = sum l_j x_j = 0`` and
    ``|sum_j l_j (x_j - k)_+| <= w(k)`` at every k. Between two data points, for either direction, the left side is linear in k and w a norm of a linear
    function, so the largest ratio rho of the two has a closed form. Solve for some kinks, add those where the dual is broken, repeat; dividing l by rho
    makes it feasible, so that (value / rho) is a lower bound at any time. That bound is returned, once it is within ``rtol`` of the value.

    A kink *at* a data point counts as not active there: the limit of kinks just beside it.
    """
    order = np.argsort(x)
    x, y = np.asarray(x, float)[order], np.asarray(y, float)[order]
    n = len(x)
    if n < 3:
        return float(np.sum(x**2 + 1) / max(n, 1))
    # (left end, right end, points active, multipliers of them that make up the dual's left side) of each gap and direction
    cells = [(x[j], x[j + 1], x[active]) for j in range(n - 1) for active in (slice(j + 1, n), slice(0, j + 1))]
    atoms = [(k, cell) for cell in cells for k in np.linspace(cell[0], cell[1], 3)]

    def cost(k: float, active: np.ndarray) -> float:
        return float(2 * np.sqrt(np.sum(active**2 + 1)) * np.linalg.norm(active - k))

    while True:
        bends = np.maximum(x[:, None] - np.array([k for k, _ in atoms]), 0.0)  # (n, kinks)
        weights = np.array([cost(k, cell[2]) for k, cell in atoms])
        affine = np.stack([np.ones(n), x], axis=1)
        programme = linprog(
            np.concatenate([weights, weights, np.zeros(2)]),
            A_eq=np.concatenate([bends, -bends, affine], axis=1),
            b_eq=y,
            bounds=[(0, None)] * (2 * len(atoms)) + [(None, None)] * 2,
            method="highs",
        )
        if not programme.success or programme.fun is None:
            raise RuntimeError(f"relu_1d_floor: the linear programme was not solved ({programme.message})")
        multiplier = programme.eqlin.marginals
        rho, broken = 1.0, []
        for cell in cells:
            left, right, active = cell
            beyond = x > left
            p, r = multiplier[beyond] @ x[beyond], -multiplier[beyond].sum()  # the dual's left side is |p + r k|
            # The largest (p s + r m) / ||active s - m|| over all (s, m = k s), and its k, if that lies in the gap; else an end of the gap has it.
            quadratic = np.array([[active @ active, -active.sum()], [-active.sum(), len(active)]])
            s, m = np.linalg.lstsq(quadratic, np.array([p, r]), rcond=None)[0]
            for k in {left, right, *([m / s] if s != 0 and left < m / s < right else [])}:
                w = cost(k, active)
                if w > 0 and abs(p + r * k) > w * (1 + rtol):
                    broken.append((k, cell))
                    rho = max(rho, abs(p + r * k) / w)
        if not broken:
            return float((programme.fun / (1 + rtol) + np.sum(x**2 + 1)) / n)
        if len(atoms) > 10_000:
            return float((programme.fun / rho + np.sum(x**2 + 1)) / n)
        atoms += broken


class _ReLUNet(nn.Module):
    """``f(x) = sum_k c_k relu(a_k x + b_k) + slope x + bias``, all of them trained."""

    def __init__(self, a: Tensor, b: Tensor, c: Tensor) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Parameter(a), nn.Parameter(b), nn.Parameter(c)  # (width,)
        self.slope, self.bias = nn.Parameter(torch.zeros((), dtype=DTYPE)), nn.Parameter(torch.zeros((), dtype=DTYPE))

    def forward(self, x: Tensor) -> Tensor:  # (n,) -> (n,)
        return torch.relu(x[:, None] * self.a + self.b) @ self.c + x * self.slope + self.bias


@dataclass(frozen=True)
class ReLU1D(LabelNoise):
    """A wide ReLU network through a dozen points of the plane: label noise takes out every bend that the points do not ask for."""

    name: ClassVar[str] = "label-noise/relu-1d"
    paper: ClassVar[str] = AUTHORS
    summary: ClassVar[str] = "a ReLU network through 12 points: label noise removes every bend that the data do not ask for"
    duration: ClassVar[str] = "about 1 minute"
    PAPER: ClassVar[dict[str, Any]] = {"num_seeds": 10}

    steps: int = 3_000_000
    read_every: int = 20_000
    lr: float = 0.01
    noise_variance: float = 0.25
    width: int = 60
    """Hidden units."""

    def rules(self) -> list[tuple[str, bool, str]]:
        return [*super().rules(), *self.at_least(1, "width")]

    @staticmethod
    def data() -> tuple[np.ndarray, np.ndarray]:
        """12 points on a plateau between two flats (the paper has 12 points and gives no coordinates)."""
        return np.linspace(-1.5, 1.5, 12), np.array([-0.6, -0.6, -0.6, -0.3, 0.3, 0.6, 0.6, 0.3, -0.3, -0.6, -0.6, -0.6])

    def problem(self, arm: Arm, seed: int) -> Problem:
        x, y = self.data()
        a, b, c = _normal(seed, 3, self.width).unbind()
        return Problem(_ReLUNet(a.clone(), b.clone(), c.clone()), torch.from_numpy(x), torch.from_numpy(y), relu_1d_floor(x, y))

    def measure(self, problem: Problem) -> dict[str, float]:
        """The length of the curve between the outer data points, the paper's own measure."""
        x = problem.x
        grid = torch.linspace(float(x[0]), float(x[-1]), 2001, dtype=DTYPE, device=x.device)
        return {"curve_length": torch.hypot(grid.diff(), problem.model(grid).diff()).sum().item()}

    def claims(self) -> list[Claim]:
        return [
            Claim(
                "with noise, reg ends within 15 % of the floor",
                "with noise",
                "reg_over_floor",
                "<=",
                1.15,
                formula="n reg = Σᵢ ‖∇f(xᵢ)‖² ≥ min Σₖ 2|sₖ| √(S₁(k) S₂(k)) + Σᵢ (xᵢ² + 1), over kinks k",
            ),
            Claim("without noise, reg stays at least 5 times the floor", "without noise", "reg_over_floor", ">=", 5.0),
        ]

    def figure(self, outcome: Outcome) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        x, y = self.data()
        grid = np.linspace(x[0] - 0.05, x[-1] + 0.05, 1001)
        with torch.no_grad():
            for replica in reversed(_replicas(outcome)):  # the arm with noise on top
                noisy = replica.arm.noise_variance > 0
                device = replica.problem.x.device
                f = replica.problem.model(torch.from_numpy(grid).to(device)).cpu()
                left.plot(grid, f, color=NOISY if noisy else CLEAN, lw=2.2 if noisy else 1.2, alpha=0.9)
        left.plot(x, y, "o", color="black", ms=6, zorder=5)
        left.set(xlabel="x", ylabel="f(x)", title=_title(outcome, "Label noise straightens what the points leave open", "The functions learnt"))
        left.text(0.0, 0.05, "with\nlabel noise", color=NOISY, weight="bold", ha="center")
        left.text(0.0, -0.05, "without", color=CLEAN, weight="bold", ha="center", va="top")
        left.text(0.0, -0.2, "1 seed" if self.num_seeds == 1 else f"{self.num_seeds} seeds each", color="0.4", ha="center", va="top", fontsize=8)
        title = _title(outcome, "and drives reg from where SGD leaves it down to the floor", "reg while training")
        ends = _curves(right, outcome, "reg", "reg = mean ‖∇f(xᵢ)‖²", title)
        floor = _replicas(outcome)[0].problem.floor
        right.axhline(floor, color="black", lw=1, ls=":")
        right.text(0.02, 0.95 * floor, f"floor {floor:.2f}, by linear programming", transform=right.get_yaxis_transform(), va="top", fontsize=9)
        right.set_ylim(bottom=0.6 * floor)
        _mark_settling(right, self)
        name_curves(right, ends)
        return figure


# ----------------------------------------------------------------------------------------------------------------------------------- matrix sensing


def statistical_dimension(d: int, r: int) -> float:
    """``delta = d (d+1)/2 - (d-r)(d-r+1)/4``: from about this many measurements on, being positive semidefinite pins a d x d matrix of rank r by itself.

    The cone of feasible directions at X* >= 0 of rank r is, in the splitting by X*'s range, {symmetric, with a semidefinite block of size d - r}. A
    self-dual cone such as that block's has half the statistical dimension of its space, (d-r)(d-r+1)/4, and the free rest, ``d(d+1)/2 - (d-r)(d-r+1)/2``,
    counts in full. With more measurements than delta, any method that fits them finds X*, and label noise has nothing to show.
    """
    return d * (d + 1) / 2 - (d - r) * (d - r + 1) / 4


class _SensingNet(nn.Module):
    """``f(A) = <A, U U'>``."""

    def __init__(self, u: Tensor) -> None:
        super().__init__()
        self.u = nn.Parameter(u)  # (d, d)

    def forward(self, a: Tensor) -> Tensor:  # (n, d, d) -> (n,)
        return ((a @ self.u) * self.u).sum((1, 2))


@dataclass(frozen=True)
class MatrixSensing(LabelNoise):
    """Recovering a matrix of low rank from fewer measurements than pin it: label noise minimises the nuclear norm."""

    name: ClassVar[str] = "label-noise/matrix-sensing"
    paper: ClassVar[str] = AUTHORS
    summary: ClassVar[str] = "matrix sensing: label noise finds the low-rank matrix that plain SGD misses"
    duration: ClassVar[str] = "under 1 minute"
    needs: ClassVar[str] = "d = 100, r = 5, n = 2500: a smaller learning rate by the Hessian's trace, ten times as large, and so some 100 times the steps"

    steps: int = 200_000
    read_every: int = 4_000
    lr: float = 2e-4
    noise_variance: float = 16.0
    dim: int = 30
    """Size d of the matrix."""
    rank: int = 1
    """Rank r of the true matrix X*."""
    num_measurements: int = 150
    """How many inner products <A_i, X*> are known; below the statistical dimension, or there is no contrast to show."""
    truth_trace: float = 15.0
    """Nuclear norm of X*. The start, U = identity, has nuclear norm d; the larger it is beside the truth's, the farther away plain SGD stops."""

    def rules(self) -> list[tuple[str, bool, str]]:
        delta = statistical_dimension(self.dim, self.rank)
        return [
            *super().rules(),
            *self.at_least(1, "dim"),
            ("rank", 1 <= self.rank <= self.dim, f"between 1 and dim={self.dim}"),
            (
                "num_measurements",
                1 <= self.num_measurements < delta,
                f"at least 1 and below the statistical dimension {delta:g} of dim={self.dim}, rank={self.rank} (beyond it, positive semidefiniteness alone "
                "pins the matrix and plain SGD finds it as well)",
            ),
            ("truth_trace", self.truth_trace > 0, "positive"),
        ]

    def problem(self, arm: Arm, seed: int) -> Problem:
        """The floor is reg at the truth, ``<M, X*>`` with ``M = (1/n) sum (A_i + A_i')^2``: the nuclear norm of X* as these measurements weigh it.

        ``||grad f(A_i)||^2 = ||(A_i + A_i')U||^2``. Off the diagonal ``A_i + A_i'`` has variance 2, on it 4, so the mean over A_i is
        ``2 (d+1) ||U||^2 = 2 (d+1) ||UU'||_*``, and M is close to 2 (d+1) times the identity. That X* has the least ``<M, X>`` of all semidefinite X that fit
        is no theorem at finite n. The tests certify it for the default size and some seeds, by duality: multipliers for which ``M - sum l_i A_i`` is
        semidefinite and kills X*.
        """
        draw = _normal(seed, self.num_measurements + 1, self.dim, self.dim)
        a, u = draw[1:], draw[0, :, : self.rank]
        u = u * math.sqrt(self.truth_trace / u.square().sum().item())
        model = _SensingNet(torch.eye(self.dim, dtype=DTYPE))
        floor = ((a + a.mT) @ u).square().sum().item() / self.num_measurements
        return Problem(model, a, (a @ u * u).sum((1, 2)), floor, truth=u @ u.T)

    def measure(self, problem: Problem) -> dict[str, float]:
        assert isinstance(problem.model, _SensingNet)
        assert problem.truth is not None
        u, truth = problem.model.u, problem.truth.to(problem.model.u)
        found = u @ u.T
        return {"distance": ((found - truth).norm() / truth.norm()).item(), "nuclear_ratio": (found.trace() / truth.trace()).item()}

    def claims(self) -> list[Claim]:
        return [
            Claim(
                "with noise, ||UU' - X*||_F / ||X*||_F ends at 0.1 at most",
                "with noise",
                "distance",
                "<=",
                0.1,
                formula="reg = 2(d+1) tr UU′ in the mean over A",
            ),
            Claim("without noise, it ends at 0.3 at least", "without noise", "distance", ">=", 0.3),
        ]

    def figure(self, outcome: Outcome) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        title = _title(outcome, "Label noise finds the matrix; plain SGD stops short", "Distance to the truth")
        name_curves(left, _curves(left, outcome, "distance", "‖UU′ − X*‖ / ‖X*‖", title))
        _mark_settling(left, self)
        top = min(self.dim, 10)
        for replica in _replicas(outcome):
            assert isinstance(replica.problem.model, _SensingNet)
            values = torch.linalg.svdvals(replica.problem.model.u.detach()).square().cpu()  # eigenvalues of UU', in descending order
            right.plot(np.arange(1, top + 1), values[:top], "o-", ms=4, lw=1.2, color=NOISY if replica.arm.noise_variance > 0 else CLEAN, alpha=0.8)
        truth = _replicas(outcome)[0].problem.truth
        assert truth is not None
        values = torch.linalg.eigvalsh(truth).flip(0).cpu()
        right.plot(np.arange(1, top + 1), values[:top], "_", ms=18, mew=1.5, color="black", zorder=5)
        title = _title(outcome, f"Only label noise finds the rank, {self.rank}, of the truth (black)", "Eigenvalues found, and the truth's (black)")
        right.set(xlabel="eigenvalue number", ylabel="eigenvalue of UU′", title=title)
        right.set_xticks(range(1, top + 1))
        return figure


# ------------------------------------------------------------------------------------------------------------------------------------------- figures


def _title(outcome: Outcome, finding: str, subject: str) -> str:
    """What a figure shows, stated as a finding only where the run bears it out."""
    return finding if outcome.holds else f"{subject} (not all claims hold)"


def _curves(ax: Axes, outcome: Outcome, column: str, label: str, title: str, seeds: list[int] | None = None) -> list[tuple[float, str, str]]:
    """A column over the steps, log-log, one line per seed; where each arm ends, to name it there."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    frame = outcome.metrics[outcome.metrics["step"] > 0]
    frame = frame if seeds is None else frame[frame["seed"].isin(seeds)]
    ends = []
    setting = outcome.setting
    assert isinstance(setting, LabelNoise)
    for arm in setting.arms():
        colour = NOISY if arm.noise_variance > 0 else CLEAN
        curves = [rows for _, rows in frame[frame["arm"] == arm.name].groupby("seed")]
        for rows in curves:
            ax.plot(rows["step"], rows[column], color=colour, lw=1.3, ls="--" if arm.variant == "logistic" else "-", alpha=0.8)
        ends.append((float(np.exp(np.mean([np.log(rows[column].iloc[-1]) for rows in curves]))), arm.name, colour))
    ax.set(xscale="log", yscale="log", xlabel="step", ylabel=label, title=title, xlim=(min(4, setting.steps / 2), setting.steps))
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    return ends


def _mark_settling(ax: Axes, setting: LabelNoise) -> None:
    if setting.settle > 0:
        ax.axvspan((1 - setting.settle) * setting.steps, setting.steps, color="0.9", zorder=0, lw=0)
        ax.text((1 - setting.settle) * setting.steps, 0.03, "labels clean ", transform=ax.get_xaxis_transform(), ha="right", fontsize=8, color="0.4")
