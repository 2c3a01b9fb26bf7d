"""Per-sample gradient norms and the noise scale in a Hugging Face ``Trainer``: copy ``NormCallback``, then ``trainer.add_callback(NormCallback(trainer))``.

A callback has no event that encloses forward and backward: a tap opened in one event and closed in another would stay open if an exception came between.
So this one takes the trainer and puts the tap around its ``training_step``, which holds both; what it found it logs in the callback's own events.

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
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import ghostgrad as gg


class NormCallback(TrainerCallback):
    """Logs ``sample_norm`` (mean), ``sample_norm_max`` and ``noise_scale`` every ``logging_steps``."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.training_step = trainer, trainer.training_step
        trainer.training_step = self.tapped_step
        self.norms: list[torch.Tensor] = []  # (B,) for each batch since the last log
        self.noise: list[gg.NoiseScale] = []

    def tapped_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        with gg.tap(model, grad_sqnorm=True) as tap:  # grad_sqnorm: right under gradient accumulation, too
            loss = self.training_step(model, *args, **kwargs)
        self.norms.append(self.trainer.current_gradient_accumulation_steps * tap.sqnorms().sqrt())  # by which the Trainer has divided the loss
        self.noise.append(gg.noise_scale(tap))
        return loss

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.norms and state.global_step % state.logging_steps == 0:
            norms, noise = torch.cat(self.norms), gg.noise_scale(self.noise)
            self.norms, self.noise = [], []
            self.trainer.log({"sample_norm": float(norms.mean()), "sample_norm_max": float(norms.max()), "noise_scale": noise.scale})


class Sentences(Dataset[dict[str, torch.Tensor]]):
    """Counting with a step that differs from sentence to sentence, of different lengths: padding has the label -100."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        tokens, length = (torch.arange(12) * (1 + i % 5) + i) % 50, 6 + i % 7
        mask = torch.arange(12) < length
        return {"input_ids": tokens, "attention_mask": mask.long(), "labels": torch.where(mask, tokens, -100)}


def main(output: str, **options: Any) -> Trainer:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=16, **sizes))
    settings = {"per_device_train_batch_size": 8, "max_steps": 12, "logging_steps": 4, "learning_rate": 1e-2} | options
    arguments = TrainingArguments(output, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, **settings)
    trainer = Trainer(model, arguments, train_dataset=Sentences())
    trainer.add_callback(NormCallback(trainer))
    trainer.train()
    return trainer


if __name__ == "__main__":
    main("/tmp/trainer")
