"""Mixtures of experts: found, watched, and left whole; Hugging Face's with stacked weights and one written by hand."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import gradloc
from gradloc import errors
from gradloc.core.mixtures import Mixture, stacked_parameters
from gradloc.core.run_info import RunInfo
from gradloc.route.mixtures import find_mixtures


class Moe(nn.Module):
    """A linear gate, the best experts of each token, weights that add up to 1."""

    def __init__(self, width: int = 16, hidden: int = 32, count: int = 4, per_token: int = 2) -> None:
        super().__init__()
        self.gate, self.per_token = nn.Linear(width, count), per_token
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)) for _ in range(count)
        )
        self.register_buffer("calls", torch.zeros(1))

    def chosen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight, chosen = (self.gate(x) + 1e-3 * torch.randn(len(self.experts))).softmax(-1).topk(self.per_token)
        return weight / weight.sum(-1, keepdim=True), chosen

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        tokens = x.reshape(-1, x.shape[-1])
        weight, chosen = self.chosen(tokens)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            out = out.index_add(0, token, weight[token, place, None] * expert(tokens[token]))
        return out.view(x.shape)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.moe, self.ffn = nn.Linear(8, 16), Moe(), nn.Sequential(nn.Linear(16, 32), nn.ReLU())
        self.ffn.append(nn.Linear(32, 16))
        self.leave = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = x + self.moe(x)
        return self.leave(x + self.ffn(x))


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        )
    )  # fmt: skip


class EveryExpert(Moe):
    """A weighted mean of all experts: nothing is routed."""

    def forward(self, x: Tensor) -> Tensor:
        share = self.gate(x).softmax(-1)
        return sum(share[..., n, None] * expert(x) for n, expert in enumerate(self.experts))


class Stack(Moe):
    """As many blocks, one after another, as there are classes."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.experts:
            x = x + block(x)
        return self.gate(x)


STACKED = pytest.mark.skipif(
    importlib.util.find_spec("transformers.integrations.moe") is None, reason="this transformers loops over experts"
)


def mixture_names(model: nn.Module) -> list[str]:
    """By what transformers calls them, which differs between its versions."""
    return [name for name, module in model.named_modules() if type(module).__name__ == "MixtralSparseMoeBlock"]


def test_mixtures_are_known_by_what_comes_to_their_experts() -> None:
    model = mixtral()
    one, two = find_mixtures(model)
    assert [one.name, two.name] == mixture_names(model)
    assert one.router == f"{one.name}.gate"
    if one.stacked:
        assert one.stacked == (f"{one.name}.experts.gate_up_proj", f"{one.name}.experts.down_proj")
    assert one.said == "routed already: 4 experts, 2 per token"
    for per_token in (1, 2, 3):
        (found,) = find_mixtures(nn.Sequential(Moe(per_token=per_token)))
        assert (found.name, found.router, found.count, found.per_token) == ("0", "0.gate", 4, per_token)
        assert found.experts == ("0.experts.0", "0.experts.1", "0.experts.2", "0.experts.3")
    assert find_mixtures(Moe(per_token=1))[0].experts[0] == "experts.0"
    assert find_mixtures(OfRows())[0].per_token == 2
    for other in (EveryExpert(), Stack(), Moe(per_token=4), nn.ModuleList(nn.Linear(3, 3) for _ in range(3))):
        assert find_mixtures(other) == ()
    assert Mixture.from_dict(one.to_dict()) == one


class OfRows(Moe):
    """Takes tokens as rows only."""

    def forward(self, x: Tensor) -> Tensor:
        rows, _ = x.shape
        return super().forward(x.view(rows, -1))


def test_looking_for_mixtures_leaves_no_trace() -> None:
    """The trial's own module draws random numbers and counts its calls."""
    model, called = Moe(), []
    model.gate.register_forward_hook(lambda *_: called.append(1))
    model.experts[0].register_forward_hook(lambda *_: called.append(1))
    model.train()
    state = torch.get_rng_state()
    assert find_mixtures(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not called
    assert float(model.calls) == 0
    assert model.training
    assert all(module.training for module in model.modules())


def trained(model: nn.Module, loss: Any, path: Path, steps: int = 12, **settings: Any) -> tuple[gradloc.Run, dict]:
    """A short run, and the sums of squared gradients taken beside it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    gradloc.wrap(optimizer, model, run=path, every=1, flush_every=3, firing_every=1, **settings)
    squares = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    for _ in range(steps):
        loss(model).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                squares[name] += p.grad.double().square()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    return gradloc.load_run(path), squares


def regression(model: nn.Module) -> Tensor:
    x = torch.randn(16, 4, 8)
    return (model(x) - x[..., :4]).square().mean()


def language(model: nn.Module) -> Tensor:
    tokens = torch.randint(64, (4, 12))
    return model(input_ids=tokens, labels=tokens).loss


@pytest.fixture(scope="module")
def of_mixtral(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, gradloc.Run, dict]:
    model = mixtral()
    return model, *trained(model, language, tmp_path_factory.mktemp("mixtral") / "run")


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, gradloc.Run, dict]:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.moe.gate.bias[3] = -1e9  # no token ever comes to the last one
    return model, *trained(model, regression, tmp_path_factory.mktemp("hand") / "run")


@STACKED
def test_stacked_experts_train_apart(of_mixtral: Any) -> None:
    model, run, squares = of_mixtral
    found = run.experts()
    assert list(found["mixture"].unique()) == mixture_names(model)
    for name, rows in found.groupby("mixture"):
        energy = sum(
            squares[f"{name}.experts.{own}"].flatten(1).sum(1).numpy() for own in ("gate_up_proj", "down_proj")
        )
        np.testing.assert_allclose(rows["energy_share"], energy / energy.sum(), rtol=1e-3)
        assert set(rows["state"]) == {"trains"}
        assert set(rows["parameters"]) == {96 * 32 + 32 * 48}
    assert "routed already: 4 experts, 2 per token" in " ".join(
        finding.text for finding in gradloc.report(run, show=False).findings
    )


def test_an_expert_that_no_token_comes_to_never_trains(by_hand: Any) -> None:
    _, run, squares = by_hand
    rows = run.experts()
    energy = np.array(
        [sum(float(s.sum()) for n, s in squares.items() if n.startswith(f"moe.experts.{e}.")) for e in range(4)]
    )
    np.testing.assert_allclose(rows["energy_share"], energy / energy.sum(), rtol=1e-3)
    assert list(rows["state"]) == ["trains", "trains", "trains", "never"]
    text = " ".join(finding.text for finding in gradloc.report(run, show=False).findings)
    assert "1 of 4 experts have no gradient." in text


def test_tokens_of_each_expert_are_counted(by_hand: Any, of_mixtral: Any) -> None:
    model, _, _ = by_hand
    batches = [torch.randn(5, 8) for _ in range(3)]
    came: list[Tensor] = []
    handle = model.moe.gate.register_forward_hook(lambda _, __, scores: came.append(scores.topk(2).indices))
    load = gradloc.expert_load(model, batches)
    handle.remove()
    assert load["tokens"].tolist() == torch.bincount(torch.cat(came).flatten(), minlength=4).tolist()
    assert load["tokens"].sum() == 2 * 15
    assert load["share"].sum() == pytest.approx(1)
    hf, _, _ = of_mixtral
    came.clear()
    second = mixture_names(hf)[1]
    gate = hf.get_submodule(f"{second}.gate")
    handle = gate.register_forward_hook(
        lambda _, __, found: came.append(found[2] if isinstance(found, tuple) else found.topk(2).indices)
    )
    load = gradloc.expert_load(hf, [{"input_ids": torch.randint(64, (2, 9))} for _ in range(2)])
    handle.remove()
    rows = load[load["mixture"] == second]
    assert rows["tokens"].tolist() == torch.bincount(torch.cat(came).flatten(), minlength=4).tolist()
    with pytest.raises(errors.UnsupportedError, match="moe: no batch came"):
        gradloc.expert_load(model, [])


@pytest.mark.parametrize("from_run", [False, True])
@pytest.mark.parametrize("kind", ["structural", "conditional"])
def test_experts_stay_whole_unless_they_are_named(by_hand: Any, kind: str, from_run: bool) -> None:
    model, run, _ = by_hand
    given = None if from_run else model
    plan = gradloc.plan_blocks(given, run, kind=kind, blocks=4)
    assert [chain.chain.name for chain in plan.chains] == ["ffn"]
    assert plan.description["mixtures"] == {"moe": {"experts": 4, "per_token": 2}}
    inside = gradloc.plan_blocks(given, run, kind=kind, blocks=4, include=["moe.experts.0", "moe.experts.1"])
    assert [chain.chain.name for chain in inside.chains] == ["moe.experts.0", "moe.experts.1"]
    with pytest.raises(errors.ConfigError, match="moe is routed already: 4 experts, 2 per token"):
        gradloc.plan_blocks(given, run, kind=kind, blocks=4, include=["leave"], **_only("chain", kind))


def _only(operator: str, kind: str) -> dict[str, Any]:
    return {"operators": [operator]} if kind == "structural" else {}


def test_blocks_inside_an_expert_run(by_hand: Any) -> None:
    model, run, _ = by_hand
    plan = gradloc.plan_blocks(model, run, kind="conditional", blocks=4, include=["moe.experts.0"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    annealer = gradloc.Annealer(model, optimizer, plan, steps=2)
    for _ in range(2):
        regression(model).backward()
        optimizer.step()
        annealer.step()
    routed = gradloc.route_model(model, annealer.finish())
    annealer.close()
    assert routed.certificate.passed
    assert find_mixtures(nn.ModuleDict({"whole": model}))  # the model itself is as it was
    assert routed(torch.randn(3, 8)).shape == (3, 4)


def test_masks_and_graphs_say_what_is_routed_already(by_hand: Any, of_mixtral: Any) -> None:
    for (model, run, _), example in ((by_hand, torch.randn(2, 8)), (of_mixtral, torch.randint(64, (1, 4)))):
        masks = gradloc.find_masks(run, density=0.5)
        graph = gradloc.dependency_graph(model, masks, example)
        assert any("routed already: 4 experts, 2 per token" in note for note in graph.notes)


def fed(graph: Any) -> set[tuple[tuple[str, int], tuple[str, int]]]:
    """Edges, whatever the order in which layers were met: by layer and place in it."""
    where = {layer.first + unit: (layer.name, unit) for layer in graph.layers for unit in range(layer.units)}
    pairs = graph.adjacency.tocoo()
    return {(where[a], where[b]) for a, b in zip(pairs.row.tolist(), pairs.col.tolist(), strict=True)}


@pytest.mark.parametrize("torch_has_it", [True, False])
def test_grouped_products_of_experts_are_read_as_a_product_for_each(
    torch_has_it: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between batched and grouped products only the kernel differs, and so the graphs may not."""
    moe = pytest.importorskip("transformers.integrations.moe", reason="this transformers loops over experts")
    if not torch_has_it:
        monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *_: False)
    model, tokens = mixtral(), torch.arange(24).view(2, 12)
    random = np.random.default_rng(0)
    masks = gradloc.MaskSet(
        {n: random.random(tuple(p.shape)) < 0.3 for n, p in model.named_parameters() if ".experts." in n}
    )
    found = {}
    for implementation in ("batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        graph = gradloc.dependency_graph(model, masks, tokens)
        assert not graph.left_out
        assert not any("grouped" in note for note in graph.notes)
        found[implementation] = fed(graph)
    assert found["grouped_mm"] == found["batched_mm"]
    assert any("gate_up_proj" in a for (a, _), _ in found["grouped_mm"])


def test_a_grouped_product_of_activations_is_no_operator() -> None:
    """A stack that is computed is none of the model's weights; the parameter that it is made of is named."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.weight = nn.Linear(16, 16), nn.Parameter(torch.randn(2, 16, 16))

        def forward(self, x: Tensor) -> Tensor:
            ends = torch.tensor([3, 8], dtype=torch.int32)
            return nn.functional.grouped_mm(self.enter(x), self.weight * 2, offs=ends)

    graph = gradloc.dependency_graph(Scaled(), gradloc.MaskSet({}), torch.randn(8, 16))
    assert any(name.startswith("weight: ") for name in graph.left_out)
    assert any("a grouped product of other form" in note for note in graph.notes)
    assert len(set(graph.components().tolist())) == 1, "what isn't read is taken to hang together"


def test_a_mixtral_alone_has_nothing_to_plan_and_says_why(of_mixtral: Any) -> None:
    model, run, _ = of_mixtral
    name = mixture_names(model)[0]
    with pytest.raises(errors.ConfigError, match=f"{re.escape(name)} is routed already"):
        gradloc.plan_blocks(model, run, kind="conditional")
    plan = gradloc.plan_blocks(model, run, include=["lm_head"], blocks=2)
    skipped = plan.description["skipped"]
    assert f"the router of {name}" in skipped[f"{name}.gate"]
    assert any(own.startswith(f"{name}.experts") and f"of {name}, which" in why for own, why in skipped.items())


def test_descriptions_of_runs_hold_mixtures(of_mixtral: Any) -> None:
    model, run, _ = of_mixtral
    assert run.info.mixtures == find_mixtures(model)
    assert RunInfo.from_dict(run.info.to_dict()).mixtures == run.info.mixtures
    name = mixture_names(model)[0]
    assert stacked_parameters(model.get_submodule(name)) == ()
    if run.info.mixtures[0].stacked:
        assert stacked_parameters(model.get_submodule(f"{name}.experts")) == ("gate_up_proj", "down_proj")
