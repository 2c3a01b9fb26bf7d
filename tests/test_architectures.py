"""Architectures as users write them, from a model library: tiny, with random weights, nothing downloaded. Exact for every parameter, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ghostgrad as gg

transformers = pytest.importorskip("transformers", reason="the architectures come from the transformers package")

B, T = 3, 7
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {**SMALL, "vocab_size": 50, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}


def ids(length: int = T) -> Tensor:
    return torch.randint(50, (B, length))


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=1)
    return transformers.GPT2LMHeadModel(config), {"input_ids": ids()}  # the head is tied to the embedding


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=1, **TEXT)), {"input_ids": ids()}


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    mask = torch.ones(B, T, dtype=torch.long)
    mask[1, 4:] = 0
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT)), {"input_ids": ids(), "attention_mask": mask}


def t5() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=50)
    return transformers.T5ForConditionalGeneration(config), {"input_ids": ids(), "decoder_input_ids": ids(4)}


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=16, patch_size=4, **SMALL)), {"pixel_values": torch.randn(B, 3, 16, 16)}


def swin() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4)
    return transformers.SwinForImageClassification(config), {"pixel_values": torch.randn(B, 3, 32, 32)}


def convnext() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
    return transformers.ConvNextForImageClassification(config), {"pixel_values": torch.randn(B, 3, 32, 32)}


def wav2vec2() -> tuple[nn.Module, dict[str, Tensor]]:
    convolutions = {"conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (8, 8), "num_feat_extract_layers": 2}
    config = transformers.Wav2Vec2Config(vocab_size=20, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, **convolutions, **SMALL)
    return transformers.Wav2Vec2ForCTC(config), {"input_values": torch.randn(B, 400)}


def loss_fn(out: Any, target: Tensor) -> Tensor:
    logits = out.logits.flatten(1)
    return (logits.square().mean(1) + (logits * target[:, None]).sin().mean(1)).mean()


@pytest.mark.filterwarnings("ignore:ghostgrad")
@pytest.mark.parametrize("build", [gpt2, llama, bert, t5, vit, swin, convnext, wav2vec2], ids=lambda build: build.__name__)
def test_exact_for_every_parameter(build: Callable[[], tuple[nn.Module, dict[str, Tensor]]]) -> None:
    torch.manual_seed(0)
    model, inputs = build()
    report = gg.check(model.eval(), loss_fn, inputs, torch.randn(B))
    assert report, f"\n{report}"
    assert {row.name for row in report.rows} == {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_mixture_of_experts_is_refused_by_name() -> None:
    """Its experts work on tokens of all samples, sorted by expert."""
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(num_key_value_heads=1, num_local_experts=3, **TEXT)).eval()
    with pytest.raises(gg.GhostgradError, match="experts.gate_up_proj"):
        gg.sqnorms(model, loss_fn, {"input_ids": ids()}, torch.randn(B))
