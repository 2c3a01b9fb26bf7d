"""Per-sample gradient norms and the noise scale in a Hugging Face ``Trainer``: copy ``TappedTrainer``, use it in place of ``Trainer``.

``Trainer.training_step`` holds both the forward and the backward, so the tap goes around it. A ``TrainerCallback`` has no method that encloses the two: it
would have to open the tap in one event and close it in another, and an exception in between would leave it open.

What a *sample's* loss is: a causal language model's loss is the mean over all tokens of the batch, ``sum_i sum_t l_it / N``, so sample i's part of it is
weighted by its length. The norms are those of ``l_i = B sum_t l_it / N``: the sum over the sample's tokens, divided by how many tokens a sample of the batch
has on average. The mean of ``l_i`` over the samples is the loss that the Trainer minimises; with equal lengths ``l_i`` is the mean over the sample's own
tokens. ``N`` is the Trainer's count of labels (``num_items_in_batch``); with gradient accumulation it is that of all batches of an optimiser step, and ``B``
the number of all their samples, if the batches are equally large.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import ghostgrad as gg


class TappedTrainer(Trainer):
    """Logs ``sample_norm`` (mean), ``sample_norm_max`` and ``noise_scale`` wherever the loss is logged."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.norms: list[torch.Tensor] = []  # (B,) for each batch since the last log
        self.noise: list[gg.NoiseScale] = []

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        with gg.tap(model, grad_sqnorm=True) as tap:  # grad_sqnorm: right under gradient accumulation, too
            loss = super().training_step(model, inputs, *args, **kwargs)
        self.norms.append(self.current_gradient_accumulation_steps * tap.sqnorms().sqrt())  # by which the Trainer has divided the loss
        self.noise.append(gg.noise_scale(tap))
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.norms and "loss" in logs:
            norms = torch.cat(self.norms)
            logs |= {"sample_norm": float(norms.mean()), "sample_norm_max": float(norms.max()), "noise_scale": gg.noise_scale(self.noise).scale}
            self.norms, self.noise = [], []
        super().log(logs, *args, **kwargs)


class Sentences(Dataset[dict[str, torch.Tensor]]):
    """Counting with a step that differs from sentence to sentence, of different lengths: padding has the label -100."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        tokens, length = (torch.arange(12) * (1 + i % 5) + i) % 50, 6 + i % 7
        mask = torch.arange(12) < length
        return {"input_ids": tokens, "attention_mask": mask.long(), "labels": torch.where(mask, tokens, -100)}


def main(output: str, **options: Any) -> TappedTrainer:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=16, **sizes))
    settings = {"per_device_train_batch_size": 8, "max_steps": 12, "logging_steps": 4, "learning_rate": 1e-2} | options
    arguments = TrainingArguments(output, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, **settings)
    trainer = TappedTrainer(model, arguments, train_dataset=Sentences())
    trainer.train()
    return trainer


if __name__ == "__main__":
    main("/tmp/trainer")
