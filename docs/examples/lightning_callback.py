"""Per-sample gradient norms and the noise scale in Lightning: copy ``PerSampleNorms``, pass ``Trainer(callbacks=[PerSampleNorms()])``.

The callback opens a tap before ``training_step`` and closes it after backward, or when an exception ends the fit. The tapped module must be the one that is
called with the batch: the LightningModule itself if ``training_step`` calls ``self(x)``, else the name of the submodule that it calls.
"""

from __future__ import annotations

import contextlib
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ghostgrad as gg


class PerSampleNorms(L.Callback):
    """Logs ``sample_norm`` (mean), ``sample_norm_max`` and ``noise_scale``, over the last ``window`` batches, for a loss that is a mean over the samples."""

    def __init__(self, module: str = "", window: int = 20):
        self.module, self.window = module, window
        self.noise: list[gg.NoiseScale] = []
        self._block = contextlib.ExitStack()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._tap = self._block.enter_context(gg.tap(pl_module.get_submodule(self.module), grad_sqnorm=True))

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._block.close()
        norms = trainer.accumulate_grad_batches * self._tap.sqnorms().sqrt()  # by which Lightning has divided the loss
        self.noise = [*self.noise, gg.noise_scale(self._tap)][-self.window :]
        pl_module.log_dict({"sample_norm": norms.mean(), "sample_norm_max": norms.max(), "noise_scale": gg.noise_scale(self.noise).scale})

    def on_train_batch_end(self, *_: Any) -> None:
        self._block.close()  # of a batch whose training_step returned None

    def on_exception(self, *_: Any) -> None:
        self._block.close()


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def main(folder: str, **options: Any) -> tuple[L.Trainer, PerSampleNorms]:
    L.seed_everything(0, verbose=False)
    x = torch.randn(256, 10)
    loader = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 32)
    callback = PerSampleNorms("net")
    settings = {"max_epochs": 2, "log_every_n_steps": 1, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False} | options
    trainer = L.Trainer(default_root_dir=folder, callbacks=[callback], enable_checkpointing=False, **settings)
    trainer.fit(Classifier(), loader)
    print({name: float(value) for name, value in trainer.callback_metrics.items()})
    return trainer, callback


if __name__ == "__main__":
    main("/tmp/lightning")
