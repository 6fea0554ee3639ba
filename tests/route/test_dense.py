"""Weights of routed models for the dense model: there and back, through Hugging Face's files too."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils import _pytree
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import gradloc
from gradloc import errors
from gradloc.core.plan import HUB, BlockPlan, ChainPlan
from gradloc.core.router import RouterWeights
from gradloc.route.dense import PLAN_FILE
from gradloc.route.find import find_operators
from tests.route.operator_cases import CASES
from tests.route.test_operators import leaves, planned

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(intermediate_size=64, **SIZES)).eval()


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = MixtralConfig(intermediate_size=48, num_local_experts=4, num_experts_per_tok=2, **SIZES)
    return MixtralForCausalLM(config).eval()


def per_token(model: nn.Module) -> BlockPlan:
    """Blocks in every feed-forward network, with routers as annealing leaves them."""
    random = np.random.default_rng(0)
    chains = []
    for chain in find_operators(model)[0]:
        if chain.kind in ("gated", "chain"):
            width, hidden, _ = chain.widths
            router = RouterWeights.linear(random.normal(size=(4, width)), random.normal(size=4))
            labels = (np.full(width, HUB), random.permutation(np.arange(hidden) % 4), np.full(width, HUB))
            chains.append(ChainPlan(chain, labels, 4, 2, router=router))
    return BlockPlan("conditional", tuple(chains), "none")


def static(model: nn.Module, name: str) -> BlockPlan:
    operator = next(o for o in find_operators(model)[0] if o.name == name)
    labels = tuple(np.random.default_rng(0).permutation(np.arange(n) % 2) for n in operator.widths)
    return BlockPlan("structural", (ChainPlan(operator, labels, 2),), "none")


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(24).view(2, 12)).logits


def train_a_little(fast: nn.Module) -> None:
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.5)
    tokens = torch.arange(24).view(2, 12)
    fast(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()


CASES_OF_HF = [(llama, per_token), (llama, lambda m: static(m, "lm_head")), (mixtral, lambda m: static(m, "lm_head"))]


@pytest.mark.parametrize(("make", "plan_of"), CASES_OF_HF, ids=["llama, per token", "llama, static", "mixtral, static"])
@pytest.mark.parametrize("trained", [False, True])
def test_hugging_face_models_load_back(make: Any, plan_of: Any, trained: bool, tmp_path: Path) -> None:
    model = make()
    fast = gradloc.route_model(model, plan_of(model))
    assert type(fast) is type(model)
    if trained:
        train_a_little(fast)
        if fast.get_submodule(fast._routed_from.plan.chains[0].chain.name).__class__.__name__ == "IndexRoutedFFN":
            with torch.no_grad():
                fast.model.layers[0].mlp.router.layers[0].weight.mul_(-1)  # a router may be trained on, too
    fast.save_pretrained(tmp_path)
    dense, told = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    again = gradloc.route_model(dense.eval(), BlockPlan.load(tmp_path / PLAN_FILE))
    torch.testing.assert_close(logits(again), logits(fast))
    if not trained and plan_of is per_token:
        assert all(torch.equal(a, dense.state_dict()[name]) for name, a in model.state_dict().items())


def test_the_trainers_way_of_saving_writes_dense_weights_too(tmp_path: Path) -> None:
    fast = gradloc.route_model(llama(), per_token(llama()))
    for place, state in (("none", None), ("own", fast.state_dict())):
        fast.save_pretrained(tmp_path / place, state_dict=state)
        assert set(load_file(tmp_path / place / "model.safetensors")) == set(llama().state_dict())
        assert BlockPlan.load(tmp_path / place / PLAN_FILE).kind == "conditional"


def test_copies_save_themselves(tmp_path: Path) -> None:
    fast = gradloc.route_model(llama(), per_token(llama()))
    other = copy.deepcopy(fast)
    train_a_little(other)
    other.save_pretrained(tmp_path / "other")
    torch.save(other, tmp_path / "whole.pt")
    torch.load(tmp_path / "whole.pt", weights_only=False).save_pretrained(tmp_path / "loaded")
    for place in ("other", "loaded"):
        found = LlamaForCausalLM.from_pretrained(tmp_path / place)
        assert torch.equal(found.lm_head.weight, other.lm_head.weight)
    assert not torch.equal(other.lm_head.weight, fast.lm_head.weight)
    assert json.loads((tmp_path / "other" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("name", CASES)
def test_every_kind_goes_back_to_the_dense_names(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    model = nn.ModuleDict({"one": case.make(4, True), "other": nn.Linear(2, 2)}).eval()
    chain = planned(model["one"])
    operator = next(o for o in find_operators(model)[0] if o.name == "one")
    plan = BlockPlan("structural", (replace(chain, chain=operator),), "none")
    fast = gradloc.route_model(model, plan, certify=False)
    state, same = gradloc.dense_state_dict(fast)
    save_file(state, tmp_path / "dense.safetensors")
    dense = copy.deepcopy(model)
    dense.load_state_dict(load_file(tmp_path / "dense.safetensors"), strict=True)
    inputs = _pytree.tree_map(lambda x: x.float() if x.is_floating_point() else x, case.inputs(model["one"]))
    expected = fast["one"].eval()(*inputs)
    for found in (dense["one"].eval()(*inputs), gradloc.route_model(dense, same, certify=False)["one"].eval()(*inputs)):
        torch.testing.assert_close(leaves(found), leaves(expected))


def test_what_has_no_way_back_is_refused() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    once = gradloc.route_model(model, static(model, "a"))
    assert set(gradloc.dense_state_dict(once)[0]) == set(model.state_dict())
    with pytest.raises(errors.UnsupportedError, match="routed twice"):
        gradloc.dense_state_dict(gradloc.route_model(once, static(once, "b")))
    once["a"] = nn.Linear(4, 4)
    with pytest.raises(errors.UnsupportedError, match="a is a Linear"):
        gradloc.dense_state_dict(once)
