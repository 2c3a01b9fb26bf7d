"""Architectures as users write them, from a model library: tiny, with random weights, nothing downloaded. Exact for every parameter, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
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


def mixtral(implementation: str) -> nn.Module:
    config = transformers.MixtralConfig(num_key_value_heads=1, num_local_experts=5, experts_implementation=implementation, **TEXT)
    model: nn.Module = transformers.MixtralForCausalLM(config).eval()
    return model


@pytest.mark.filterwarnings("ignore:ghostgrad")
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_a_mixture_of_experts_is_exact(implementation: str) -> None:
    """Expert by expert, one copy of the matrices for each token, or sorted tokens in one grouped product (float32 alone, as torch has it)."""
    torch.manual_seed(0)
    model, inputs, target = mixtral(implementation), {"input_ids": ids()}, torch.randn(B)
    if implementation != "grouped_mm":
        report = gg.check(model, loss_fn, inputs, target)
        assert report, f"\n{report}"
        assert {row.name for row in report.rows} == {name for name, _ in model.named_parameters()}
    norms = gg.sqnorms(model, loss_fn, inputs, target, by_param=True)
    model.config._experts_implementation = "eager"
    exact = gg.sqnorms(model.double(), loss_fn, inputs, target.double(), by_param=True)
    for name, norm in norms.items():
        torch.testing.assert_close(norm.double(), exact[name], rtol=1e-5, atol=0, msg=name)


@pytest.mark.filterwarnings("ignore:ghostgrad")
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_a_mixture_of_experts_with_its_own_loss(implementation: str) -> None:
    torch.manual_seed(0)
    model, tokens = mixtral(implementation), ids()
    with gg.tap(model) as tap:
        model(input_ids=tokens, labels=tokens).loss.backward()
    for i in range(B):
        model.zero_grad()
        model(input_ids=tokens[i : i + 1], labels=tokens[i : i + 1]).loss.backward()
        torch.testing.assert_close(tap.sqnorms()[i], sum(p.grad.square().sum() for p in model.parameters()), rtol=1e-4, atol=0)


@pytest.mark.filterwarnings("ignore:ghostgrad")
@pytest.mark.parametrize("masked", [False, True])
def test_the_load_balancing_loss_is_refused(masked: bool) -> None:
    """It multiplies shares of the tokens of all samples, so no part of it is one sample's."""
    model, tokens = mixtral("eager"), ids()
    inputs = {"input_ids": tokens, "labels": tokens, "output_router_logits": True, **({"attention_mask": torch.ones_like(tokens)} if masked else {})}
    with pytest.raises(gg.BatchCouplingError, match="no sum over the samples.*keep the samples apart"), gg.tap(model):
        model(**inputs).loss.backward()
    with pytest.raises(gg.BatchCouplingError, match="loss"):
        gg.sqnorms(model, lambda out, _: out.loss, inputs, torch.zeros(B))


@pytest.mark.filterwarnings("ignore:ghostgrad")
def test_masked_tokens_of_a_language_model() -> None:
    """The head, tied to the embedding, on the masked tokens alone, and the mean over a sample's own tokens."""
    torch.manual_seed(0)
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**TEXT)).eval().double()

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = bert

        def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
            hidden, mask = self.bert.bert(input_ids).last_hidden_state, labels >= 0
            losses = torch.nn.functional.cross_entropy(self.bert.cls(hidden[mask]), labels[mask], reduction="none")
            counts = mask.sum(1)
            return losses.new_zeros(len(labels)).index_add(0, mask.nonzero()[:, 0], losses) / counts

    labels = torch.where(torch.rand(B, T) < 0.5, ids(), -1)
    labels[:, 0] = 1
    assert gg.check(Masked(), lambda losses, _: losses.mean(), {"input_ids": ids(), "labels": labels}, torch.zeros(B))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", [gpt2, llama, t5, vit, swin, convnext, wav2vec2], ids=lambda build: build.__name__)
def test_compiled_in_one_graph(build: Callable[[], tuple[nn.Module, dict[str, Tensor]]]) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, inputs = build()
    model, target = model.eval().double(), torch.randn(B, dtype=torch.float64)
    inputs = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    expected = gg.sqnorms(model, loss_fn, inputs, target, by_param=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with gg.tap(model, by_param=True) as tap:
        loss_fn(compiled(**inputs), target).backward()
    assert not any(tap.uses().values()), "the tap saw uses outside of the graph"
    torch.testing.assert_close(tap.sqnorms(by_param=True), expected)


@pytest.mark.filterwarnings("ignore")
def test_a_padding_mask_in_a_compiled_graph_is_refused() -> None:
    """The model picks elements of the mask by an index."""
    torch._dynamo.reset()
    model, inputs = bert()
    with pytest.raises(gg.UnsupportedUseError, match="run this model uncompiled"), gg.tap(model.eval()):
        torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)
