"""docs/examples runs, and logs the numbers that a loop over single samples gives."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ghostgrad as gg
from ghostgrad.tap import _ACTIVE

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("accumulation", [1, 2])
def test_huggingface(accumulation: int, tmp_path: Path) -> None:
    """Sentences of different lengths, one optimiser step: each norm is that of ``B sum_t l_it / N``, B sentences and N tokens in the step."""
    pytest.importorskip("transformers")
    module = example("huggingface")
    seen: list[Any] = []

    class Recording(module.NormCallback):  # type: ignore[name-defined,misc]
        def tapped_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            loss = super().tapped_step(model, inputs, *args, **kwargs)
            seen.append((before, inputs, self.norms[-1], self.noise[-1]))
            return loss

    module.NormCallback = Recording
    trainer = module.main(str(tmp_path), max_steps=2, logging_steps=1, gradient_accumulation_steps=accumulation)
    assert len(seen) == 2 * accumulation
    logged = [entry for entry in trainer.state.log_history if "sample_norm" in entry]
    assert len(logged) == 2
    model = trainer.model.double().eval()
    for step in range(2):
        batches = seen[step * accumulation : (step + 1) * accumulation]
        tokens = sum(int((inputs["labels"][:, 1:] >= 0).sum()) for _, inputs, _, _ in batches)
        samples = sum(len(inputs["labels"]) for _, inputs, _, _ in batches)
        norms = []
        for before, inputs, got, noise in batches:
            model.load_state_dict(before, strict=False)
            rows = []
            for i in range(len(inputs["labels"])):
                logits = model(input_ids=inputs["input_ids"][i : i + 1], attention_mask=inputs["attention_mask"][i : i + 1]).logits[0, :-1]
                loss = F.cross_entropy(logits, inputs["labels"][i, 1:], reduction="sum") * samples / tokens
                rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
            g = torch.stack(rows)
            torch.testing.assert_close(got.double(), g.norm(dim=1), rtol=1e-4, atol=0)
            trace, gram = g.var(0).sum(), g @ g.T
            square = (gram.sum() - gram.trace()) / (len(g) * (len(g) - 1))
            assert noise.snr() == pytest.approx(float(square / trace), rel=1e-3)
            norms.append(g.norm(dim=1))
        assert logged[step]["sample_norm"] == pytest.approx(float(torch.cat(norms).mean()), rel=1e-4)
        assert logged[step]["sample_norm_max"] == pytest.approx(float(torch.cat(norms).max()), rel=1e-4)
        assert logged[step]["noise_scale"] > 0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_lightning(accumulation: int, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    module = example("lightning_callback")
    torch.manual_seed(0)
    seen: list[torch.Tensor] = []

    class Recording(module.PerSampleNorms):  # type: ignore[name-defined,misc]
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(gg.sqnorms(pl_module.net, F.cross_entropy, *batch).sqrt())
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            super().on_train_batch_end()
            assert float(trainer.callback_metrics["sample_norm"]) == pytest.approx(float(seen[-1].mean()), rel=1e-5)

    module.PerSampleNorms = Recording
    trainer, callback = module.main(str(tmp_path), accumulate_grad_batches=accumulation, logger=False)
    assert len(seen) == 16
    assert len(callback.noise) == 16
    assert float(trainer.callback_metrics["sample_norm_max"]) == pytest.approx(float(seen[-1].max()), rel=1e-5)
    assert float(trainer.callback_metrics["noise_scale"]) > 0

    class Failing(module.Classifier):  # type: ignore[name-defined,misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            super().training_step(batch, batch_idx)
            raise ArithmeticError

    module.Classifier = Failing
    with pytest.raises(ArithmeticError):
        module.main(str(tmp_path), logger=False)
    assert not _ACTIVE.taps  # no block was left open


def test_data_parallel() -> None:
    module = example("ddp")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, EXAMPLES / "ddp.py"], check=True, capture_output=True, text=True, env=environment, timeout=300)
    number = r"([-+.e\d]+)"
    steps = re.findall(rf"step \d+ norm {number} largest {number} trace {number} squared {number}", done.stdout)
    assert len(steps) == 3
    model = module.make_model()
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    for step, logged in enumerate(steps):
        x, y = module.make_batch(step)
        optimiser.zero_grad()
        with gg.tap(model) as tap:
            F.cross_entropy(model(x), y).backward()
        norms, noise = tap.sqnorms().sqrt(), gg.noise_scale(tap)
        expected = (float(norms.mean()), float(norms.max()), noise.trace, noise.grad_sqnorm)
        assert [float(value) for value in logged] == pytest.approx(expected, rel=1e-4)
        optimiser.step()


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    example("tensorboard_logging").main(str(tmp_path), epochs=2)
    events = EventAccumulator(str(tmp_path), {"histograms": 0})  # keep all of them
    events.Reload()
    snr = {f"snr/{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias")}
    assert set(events.Tags()["scalars"]) == {"loss", "noise/scale", "noise/trace", "noise/grad_sqnorm"} | snr
    assert [event.step for event in events.Scalars("noise/scale")] == list(range(16))
    for scale, trace, square in zip(*(events.Scalars(f"noise/{name}") for name in ("scale", "trace", "grad_sqnorm"))):
        assert scale.value == pytest.approx(trace.value / square.value, rel=1e-5)
    histograms = events.Histograms("sample_norm")
    assert len(histograms) == 16
    assert histograms[0].histogram_value.num == 64
