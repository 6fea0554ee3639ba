"""Small models of Hugging Face's architectures: which feed-forward networks are found, and that what is routed computes what it did."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import gradloc
from gradloc.core.plan import HUB, BlockPlan, ChainPlan
from gradloc.core.router import RouterWeights
from gradloc.route.find import find_operators
from tests.route.operator_cases import draw_labels

TEXT = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
DECODER = TEXT | {
    "intermediate_size": 24,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIDE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE = SIDE | {"image_size": 8, "patch_size": 4}
OLD = {
    "vocab_size": 32,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {
    "vocab_size": 32,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
CLIP = {
    "text_config": SIDE | {"vocab_size": 32, "max_position_embeddings": 16},
    "vision_config": IMAGE,
    "projection_dim": 8,
}
WHISPER = {
    "vocab_size": 32, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 4, "max_source_positions": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip

# Name of the configuration, of the model, settings, and how many networks can be routed per token.
MODELS = [
    ("GPT2Config", "GPT2LMHeadModel", OLD, 2),
    ("GPTJConfig", "GPTJForCausalLM", OLD | {"rotary_dim": 4}, 2),
    ("LlamaConfig", "LlamaForCausalLM", DECODER, 2),
    ("GemmaConfig", "GemmaForCausalLM", DECODER | {"head_dim": 8}, 2),
    ("PhiConfig", "PhiForCausalLM", DECODER, 2),
    ("Phi3Config", "Phi3ForCausalLM", DECODER, 2),
    ("GPTNeoXConfig", "GPTNeoXForCausalLM", TEXT | {"intermediate_size": 24}, 2),
    ("FalconConfig", "FalconForCausalLM", TEXT | {"bos_token_id": 1, "eos_token_id": 2}, 2),
    ("Starcoder2Config", "Starcoder2ForCausalLM", DECODER, 2),
    ("T5Config", "T5ForConditionalGeneration", T5, 2),
    ("T5Config", "T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu"}, 2),
    ("DistilBertConfig", "DistilBertForMaskedLM", {"vocab_size": 32, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2}, 2),
    ("ViTConfig", "ViTForImageClassification", IMAGE, 2),
    ("Dinov2Config", "Dinov2ForImageClassification", IMAGE, 2),
    ("CLIPConfig", "CLIPModel", CLIP, 4),
    ("WhisperConfig", "WhisperForConditionalGeneration", WHISPER, 2),
    ("BertConfig", "BertForMaskedLM", TEXT | {"intermediate_size": 24}, 2),
    ("AlbertConfig", "AlbertForMaskedLM", TEXT | {"intermediate_size": 24, "embedding_size": 8}, 1),
    ("DebertaV2Config", "DebertaV2ForMaskedLM", TEXT | {"intermediate_size": 24}, 2),
    ("OPTConfig", "OPTForCausalLM", TEXT | {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32}, 2),
    ("BartConfig", "BartForConditionalGeneration", {k: v for k, v in WHISPER.items() if "suppress" not in k and "mel" not in k and "source" not in k}, 2),
    ("ConvNextConfig", "ConvNextForImageClassification", {"hidden_sizes": [16, 24], "depths": [1, 1], "num_stages": 2, "patch_size": 2}, 2),
]  # fmt: skip
EVERY = pytest.mark.parametrize(
    ("configuration", "model", "settings", "networks"), MODELS, ids=[f"{m}{'-gated' if 'feed_forward_proj' in s else ''}" for _, m, s, _ in MODELS]
)  # fmt: skip


def made(configuration: str, model: str, settings: dict[str, Any]) -> nn.Module:
    if not hasattr(transformers, model):
        pytest.skip(f"this transformers has no {model}")
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, configuration)(**copy.deepcopy(settings))).eval()


def answer(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 32, (2, 7), generator=generator)
    pixels = torch.randn(2, 3, 8, 8, generator=generator)
    name = type(model).__name__
    if name == "CLIPModel":
        inputs: dict[str, Any] = {"input_ids": tokens, "pixel_values": pixels}
    elif name.endswith("ImageClassification"):
        inputs = {"pixel_values": pixels}
    elif name.startswith("Whisper"):
        inputs = {"input_features": torch.randn(2, 4, 16, generator=generator), "decoder_input_ids": tokens}
    else:
        inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if name.startswith(("T5", "Bart")) else {})
    with torch.no_grad():
        found = model(**inputs)
    return found.logits_per_image if name == "CLIPModel" else found.logits


def conditional(model: nn.Module, blocks: int = 4) -> BlockPlan:
    """Every network that can, with a random router and all of its blocks."""
    random = np.random.default_rng(0)
    chains = []
    for chain in find_operators(model)[0]:
        if chain.conditional_reason is None:
            width, hidden, out = chain.widths
            router = RouterWeights.linear(random.normal(size=(blocks, width)), random.normal(size=blocks))
            labels = (np.full(width, HUB), random.permutation(np.arange(hidden) % blocks), np.full(out, HUB))
            chains.append(ChainPlan(chain, labels, blocks, blocks, router=router))
    return BlockPlan("conditional", tuple(chains), "none")


def structural(model: nn.Module) -> BlockPlan:
    """Everything that can but embeddings, in two blocks."""
    chains = [chain for chain in find_operators(model)[0] if chain.kind != "embedding"]
    labels = [draw_labels(chain.widths, 2, seed, equal=True) for seed, chain in enumerate(chains)]
    return BlockPlan(
        "structural", tuple(ChainPlan(c, tuple(own), 2) for c, own in zip(chains, labels, strict=True)), "none"
    )


@EVERY
def test_networks_are_found_and_compute_what_they_did(
    configuration: str, model: str, settings: dict[str, Any], networks: int
) -> None:
    dense = made(configuration, model, settings)
    plan = conditional(dense)
    assert len(plan.chains) == networks, find_operators(dense)[1]
    if networks:
        torch.testing.assert_close(answer(gradloc.route_model(dense, plan)), answer(dense), rtol=1e-4, atol=1e-5)


@EVERY
def test_blocks_of_everything_equal_the_masked_model_and_come_back(
    configuration: str, model: str, settings: dict[str, Any], networks: int, tmp_path: Path
) -> None:
    dense = made(configuration, model, settings)
    plan = structural(dense)
    fast = gradloc.route_model(dense, plan)
    plan.masks.apply(dense)
    expected = answer(dense)
    torch.testing.assert_close(answer(fast), expected, rtol=1e-4, atol=1e-5)
    fast.save_pretrained(tmp_path)
    loaded = type(dense).from_pretrained(tmp_path).eval()
    again = gradloc.route_model(loaded, BlockPlan.load(tmp_path / "gradloc_plan.safetensors"))
    torch.testing.assert_close(answer(again), expected, rtol=1e-4, atol=1e-5)
