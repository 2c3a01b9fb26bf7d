"""Differentially private training: Opacus' accountant, sampling and optimiser, with the clipped gradients of :func:`ghostgrad.clipped_backward`.

Noise and accounting are Opacus' own, whose model wrappers are not needed: any model that the tap takes can be trained. Needs ``pip install opacus``.

::

    accountant = opacus.accountants.RDPAccountant()
    optimizer, loader = make_private(accountant, optimizer, loader, noise_multiplier=1.0, max_norm=1.0)
    for x, y in loader:
        optimizer.zero_grad()
        with gg.tap(model) as tap:
            private_backward(F.cross_entropy(model(x), y, reduction="none"), tap, optimizer)
        optimizer.step()
    accountant.get_epsilon(delta=1e-5)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from .tap import Tap
from .weighted import clipped_backward

if TYPE_CHECKING:
    from opacus.accountants import IAccountant
    from opacus.optimizers import DPOptimizer

__all__ = ["make_private", "private_backward"]


def make_private(
    accountant: IAccountant,
    optimizer: Optimizer,
    data_loader: DataLoader[Any],
    *,
    noise_multiplier: float,
    max_norm: float,
    poisson_sampling: bool = True,
    generator: torch.Generator | None = None,
    secure_mode: bool = False,
) -> tuple[DPOptimizer, DataLoader[Any]]:
    """What ``opacus.PrivacyEngine.make_private`` does, without wrapping the model.

    Args:
        accountant: Opacus', told of every step: ``PrivacyEngine().accountant``, or one of ``opacus.accountants``.
        optimizer: any torch optimiser. Opacus' around it adds noise of deviation ``noise_multiplier * max_norm`` to the sum of clipped gradients, divides by
            the expected size of a batch, and lets it step.
        data_loader: its length says the sampling rate, ``1 / len(data_loader)``, and the expected size of a batch.
        noise_multiplier: not negative.
        max_norm: C of the clipping, positive.
        poisson_sampling: draw every sample with that rate, as the accountant assumes; batches then differ in size and may be empty. Otherwise the loader stays.
        generator, secure_mode: of the noise, as in Opacus.

    Returns:
        The optimiser and the loader to use.

    Raises:
        ValueError: ``noise_multiplier`` is negative, or ``max_norm`` is not positive.
    """
    from opacus.data_loader import DPDataLoader
    from opacus.optimizers import DPOptimizerFastGradientClipping

    if not noise_multiplier >= 0:
        raise ValueError(f"make_private: noise_multiplier must not be negative, got {noise_multiplier}")
    if not 0 < max_norm < float("inf"):
        raise ValueError(f"make_private: max_norm must be positive and finite, got {max_norm}")
    rate = 1 / len(data_loader)
    private = DPOptimizerFastGradientClipping(
        optimizer,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_norm,
        expected_batch_size=int(len(data_loader.dataset) * rate),  # type: ignore[arg-type]
        generator=generator,
        secure_mode=secure_mode,
    )
    private.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=rate))
    return private, DPDataLoader.from_data_loader(data_loader, generator=generator) if poisson_sampling else data_loader


def private_backward(losses: Tensor, tap: Tap, optimizer: DPOptimizer, **options: Any) -> Tensor:
    """:func:`ghostgrad.clipped_backward` with the optimiser's own limit, of all the parameters that the optimiser changes.

    Args:
        losses: (B,) one for each sample; B may be 0, then ``.grad`` is zero and the step is noise alone.
        tap: of all parameters of the optimiser that require a gradient.
        optimizer: of :func:`make_private`.
        options: further ones of ``clipped_backward``.

    Returns:
        The clip factors (B,).

    Raises:
        the errors of ``clipped_backward``; ValueError if the optimiser has a parameter that the tap does not see: its gradient would not be clipped.
    """
    tapped = {id(p): name for name, p in tap._names.values()}
    unseen = [tuple(p.shape) for p in optimizer.params if id(p) not in tapped]
    if unseen:
        raise ValueError(
            f"private_backward: the optimiser changes {len(unseen)} parameter(s) that the tap does not see, the first of shape {unseen[0]}: their gradients "
            "would not be clipped. Tap the whole model, or leave them out of the optimiser"
        )
    factors: Tensor = clipped_backward(losses, tap, float(optimizer.max_grad_norm), **options) if len(losses) else losses.detach()
    for p in optimizer.params:
        if p.grad is None:  # not reached by any sample of the batch; it gets noise like the others
            p.grad = torch.zeros_like(p)
    return factors
