"""Every kind of structural operator: against its masked torch module, through training, files, compilers, and sabotage."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence
from torch.utils import _pytree

import gradloc
from gradloc import errors
from gradloc.core.artifact import load_artifact, save_artifact
from gradloc.core.plan import HUB, BlockPlan, ChainPlan
from gradloc.route.blocks import BlockTensor
from gradloc.route.find import find_operators
from gradloc.route.kernel_choice import KernelTable
from gradloc.route.kinds import kind_of
from gradloc.route.operator_certificate import certify_operator, reassemble
from gradloc.route.operators import recurrent
from tests.route.operator_cases import CASES, Causal, Packed, SwiGLU, draw_labels

EVERY = pytest.mark.parametrize("name", CASES)


def leaves(result: Any) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def close(found: Any, expected: Any, **limits: float) -> None:
    torch.testing.assert_close(leaves(found), leaves(expected), **limits)


def planned(module: nn.Module, labels: Any = None, blocks: int = 2, seed: int = 0) -> ChainPlan:
    """A plan for a module that is one operator by itself."""
    (operator,), _ = find_operators(module)
    if labels is None:
        labels = draw_labels(operator.widths, blocks, seed, equal=True)
    return ChainPlan(operator, tuple(labels), blocks)


def routed_of(plan: ChainPlan, module: nn.Module) -> tuple[Any, dict[str, Tensor]]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return kind_of(plan.chain).build(plan, tensors, module), tensors


def routed_model(plan: ChainPlan, module: nn.Module, **options: Any) -> nn.Module:
    return gradloc.route_model(module, BlockPlan("structural", (plan,), "none"), **options)


@EVERY
@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(2, 6), st.integers(1, 4), st.booleans(), st.booleans(), st.integers(0, 10_000))
def test_blocks_equal_the_masked_module(name: str, units: int, blocks: int, bias: bool, equal: bool, seed: int) -> None:
    torch.manual_seed(seed)
    case = CASES[name]
    module = case.make(units, bias).double().eval()
    (operator,), skipped = find_operators(module)
    assert operator.kind == case.kind
    assert skipped == {}
    plan = planned(module, draw_labels(operator.widths, blocks, seed, equal), blocks)
    routed = routed_of(plan, module)[0].eval()
    dense, inputs = case.twin(module, list(plan.labels)), case.inputs(module)
    for kernel in routed.kernels():
        close(routed.run(*inputs, kernel=kernel), dense(*inputs))
    with torch.no_grad():
        close(routed(*inputs), dense(*inputs))


@EVERY
@pytest.mark.parametrize("equal", [True, False])
def test_gradients_equal_those_of_the_masked_module(name: str, equal: bool) -> None:
    torch.manual_seed(1)
    case = CASES[name]
    module = case.make(4, True).double().eval()
    (operator,), _ = find_operators(module)
    plan = planned(module, draw_labels(operator.widths, 2, 5, equal))
    dense = case.twin(module, list(plan.labels))
    inputs = case.inputs(module)
    for kernel in routed_of(plan, module)[0].kernels():
        routed = routed_of(plan, module)[0].eval()
        x, y = (
            [part.clone().requires_grad_() if part.is_floating_point() else part for part in leaves(inputs)]
            for _ in range(2)
        )
        tree = _pytree.tree_structure(inputs)
        for side, run, tried in ((routed, lambda *a, r=routed, k=kernel: r.run(*a, kernel=k), x), (dense, dense, y)):
            side.zero_grad()
            sum(out.square().sum() for out in leaves(run(*_pytree.tree_unflatten(tried, tree)))).backward()
        for a, b in zip(x, y, strict=True):
            if a.is_floating_point():
                torch.testing.assert_close(a.grad, b.grad)
        own = copy.deepcopy(routed)
        for mine, theirs in zip(own.modules(), routed.modules(), strict=True):
            if isinstance(theirs, BlockTensor) and isinstance(theirs.flat, nn.Parameter):
                mine.flat.data = torch.zeros_like(theirs.flat) if theirs.flat.grad is None else theirs.flat.grad
        gradients, kept = reassemble(own, plan), BlockPlan("structural", (plan,), "none").masks
        for parameter in operator.parameters:
            there = dict(dense.named_parameters()).get(parameter.name)
            if there is not None:
                expected = torch.zeros_like(there) if there.grad is None else there.grad
                mask = kept[parameter.name] if parameter.matrix else (gradients[parameter.name] != 0) | (expected == 0)
                if parameter.matrix or parameter.out not in operator.hidden_layers:
                    mask = mask if parameter.matrix else torch.ones_like(expected, dtype=torch.bool)
                torch.testing.assert_close(gradients[parameter.name] * mask, expected * mask)


@EVERY
def test_a_model_is_certified_trains_on_and_goes_through_files(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    model = case.make(4, True)
    plan = BlockPlan("structural", (planned(model),), "none")
    again = BlockPlan.load(plan.save(tmp_path / "plan.safetensors"))
    assert again.chains[0].chain == plan.chains[0].chain
    before = copy.deepcopy(model.state_dict())
    fast = gradloc.route_model(model, again)
    assert fast.certificate.passed
    assert len(fast.certificate.latency) > 1
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    other = gradloc.route_model(case.make(4, True), plan)
    save_file(fast.state_dict(), tmp_path / "fast.safetensors")
    other.load_state_dict(load_file(tmp_path / "fast.safetensors"))
    inputs = _pytree.tree_map(lambda x: x.float() if x.is_floating_point() else x, case.inputs(model))
    fast.eval(), other.eval()
    with torch.no_grad():
        first = leaves(fast(*inputs))
        close(first, other(*inputs))
        torch.save(fast, tmp_path / "fast.pt")
        close(first, torch.load(tmp_path / "fast.pt", weights_only=False)(*inputs))
    sum(out.sum() for out in leaves(fast(*inputs))).backward()
    torch.optim.SGD(fast.parameters(), lr=0.1).step()
    with torch.no_grad():
        assert not torch.equal(first[0], leaves(fast(*inputs))[0])


def corrupt_weight(routed: Any) -> None:
    with torch.no_grad():
        next(m for m in routed.modules() if isinstance(m, BlockTensor)).flat[1] += 1e-2


def corrupt_bias(routed: Any) -> None:
    with torch.no_grad():
        [m for m in routed.modules() if isinstance(m, BlockTensor)][-1].flat[0] += 1e-2


def corrupt_inputs(routed: Any) -> None:
    index = routed.layers[0].index
    index[[0, -1]] = index[[-1, 0]]


def corrupt_outputs(routed: Any) -> None:
    index = routed.layers[-1].index
    index[[0, -1]] = index[[-1, 0]]


@EVERY
@pytest.mark.parametrize("harm", [corrupt_weight, corrupt_bias, corrupt_inputs, corrupt_outputs])
def test_a_corrupted_operator_fails_its_certificate(name: str, harm: Any) -> None:
    torch.manual_seed(0)
    module = CASES[name].make(4, True)
    plan = planned(module)
    routed, tensors = routed_of(plan, module)
    assert certify_operator(plan, tensors, routed, module, timed=False).passed
    harm(routed)
    assert not certify_operator(plan, tensors, routed, module, timed=False).passed


@EVERY
def test_another_plan_fails_the_certificate(name: str) -> None:
    torch.manual_seed(0)
    module = CASES[name].make(4, True)
    plan = planned(module)
    routed, tensors = routed_of(plan, module)
    for layer in range(len(plan.labels)):
        labels = [found.copy() for found in plan.labels]
        one = int(np.flatnonzero(labels[layer] == 0)[0])
        labels[layer][one] = 1
        other = ChainPlan(plan.chain, tuple(labels), plan.blocks)
        assert not certify_operator(other, tensors, routed, module, timed=False).passed


@EVERY
def test_functional_checks_alone_notice_wrong_places(name: str) -> None:
    """Outputs in each other's places, with every index as planned: only what is computed can show it."""
    torch.manual_seed(0)
    module = CASES[name].make(4, True)
    plan = planned(module)
    routed, tensors = routed_of(plan, module)
    whole = routed.forward

    def swapped(*inputs: Any) -> Any:
        found = whole(*inputs)
        first = found[0] if isinstance(found, tuple) else found
        axis = 1 if plan.chain.kind == "conv" else -1
        first = first.flip(axis)
        return (first, *found[1:]) if isinstance(found, tuple) else first

    routed.forward = swapped
    failed = {check.name for check in certify_operator(plan, tensors, routed, module, timed=False).failures}
    assert failed == {"batch shapes: relative error", "against the masked module: relative error"}


@EVERY
def test_exports_and_compiles(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    module = case.make(4, True).double().eval()
    fast = routed_model(planned(module), module, certify=False).eval()
    inputs = case.inputs(module)
    expected = fast(*inputs)
    close(torch.export.export(fast, inputs).module()(*inputs), expected)
    # The compiler has no recurrences; it leaves them to torch and goes on behind them.
    whole = case.kind != "recurrent"
    close(torch.compile(fast, backend="aot_eager", fullgraph=whole)(*inputs), expected)
    with torch.no_grad():
        close(torch.compile(fast, backend="aot_eager", fullgraph=whole)(*inputs), expected)


def test_dense_weights_are_kept_only_while_they_hold() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    fast = routed_model(planned(layer), layer, kernel="dense").eval()
    x = torch.randn(3, 4)
    with torch.no_grad():
        before = fast(x)
        assert fast._kept_dense
        assert torch.equal(fast(x), before)
        fast.tensors["weight"].flat.mul_(2)
        torch.testing.assert_close(fast(x) - layer.bias, 2 * (before - layer.bias))
        fast.load_state_dict(routed_model(planned(layer), layer).state_dict())
        torch.testing.assert_close(fast(x), before)
        assert fast.double()(x.double()).dtype == torch.float64
    assert not copy.deepcopy(fast)._kept_dense
    fast(x.double()).sum().backward()
    assert fast.tensors["weight"].flat.grad is not None


def test_training_takes_no_dense_kernel_that_was_measured() -> None:
    layer = nn.Linear(4, 4)
    fast = routed_model(planned(layer), layer)
    fast.kernel_table.kernels.update(dict.fromkeys(fast.kernel_table.kernels, "dense"))
    assert fast.pick(1) != "dense"
    with torch.no_grad():
        assert fast.pick(1) == "dense"


# ---- blocks that overlap


@pytest.mark.parametrize(
    "name", ["chain", "gated", "torch attention", "grouped attention", "conv chain", "lstm", "linear", "conv2d"]
)
@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10_000))
def test_overlapping_blocks_and_hubs_equal_the_masked_module(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    case = CASES[name]
    module = case.make(4, True).double().eval()
    (operator,), _ = find_operators(module)
    labels = draw_labels(operator.widths, 3, seed)
    for layer in operator.free_layers:
        if random.random() < 0.5:
            labels[layer] = random.random((3, operator.widths[layer])) < 0.5
        else:
            labels[layer][random.random(operator.widths[layer]) < 0.4] = HUB
    plan = ChainPlan(operator, tuple(labels), 3)
    routed, tensors = routed_of(plan, module)
    inputs = case.inputs(module)
    for kernel in routed.kernels():
        close(routed.eval().run(*inputs, kernel=kernel), case.twin(module, labels)(*inputs))
    assert certify_operator(plan, tensors, routed, module, timed=False).passed


def test_a_linear_operator_may_overlap_at_its_outputs_instead() -> None:
    layer = nn.Linear(4, 3).double()
    outputs = np.array([[True, True, False], [False, True, True]])
    plan = planned(layer, [np.array([0, 0, 1, 1]), outputs])
    x = torch.randn(2, 4, dtype=torch.float64)
    torch.testing.assert_close(routed_model(plan, layer)(x), CASES["linear"].twin(layer, list(plan.labels))(x))


def test_no_dependency_may_be_in_two_blocks() -> None:
    (operator,), _ = find_operators(nn.Linear(4, 4))
    with pytest.raises(errors.ConfigError, match="counted twice"):
        ChainPlan(operator, (np.full(4, HUB), np.full(4, HUB)), 2)
    (chain,), _ = find_operators(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    with pytest.raises(errors.ConfigError, match="one block only"):
        ChainPlan(chain, (np.zeros(4, int), np.full(4, HUB), np.zeros(4, int)), 2)
    with pytest.raises(errors.ConfigError, match="memberships of 3 blocks"):
        ChainPlan(chain, (np.ones((3, 4), bool), np.zeros(4, int), np.zeros(4, int)), 2)


# ---- attention's own arguments, sequences of other lengths


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_torch_attention_takes_every_argument(batch_first: bool, isolated: bool) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 4, batch_first=batch_first).double().eval()
    nn.init.normal_(module.in_proj_bias)
    random = np.random.default_rng(0)
    heads = np.array([0, -1, 1, 0]) if isolated else np.array([1, 0, 1, 0])
    labels = [random.permutation(np.arange(8) % 2), heads, random.permutation(np.arange(8) % 2)]
    plan = planned(module, labels)
    fast, dense = routed_model(plan, module).eval(), CASES["torch attention"].twin(module, labels)
    query, key, value = (torch.randn(3, t, 8, dtype=torch.float64) for t in (5, 6, 6))
    given = [x if batch_first else x.transpose(0, 1) for x in (query, key, value)]
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[0, -2:] = True
    mask = torch.ones(5, 6, dtype=torch.bool).triu(2)
    own = torch.randn(12, 5, 6, dtype=torch.float64)
    for options in (
        {},
        {"need_weights": False},
        {"key_padding_mask": padding},
        {"attn_mask": mask, "average_attn_weights": False},
        {"attn_mask": own, "key_padding_mask": padding.double()},
        {"attn_mask": own, "need_weights": False},
        {"attn_mask": mask, "key_padding_mask": padding, "need_weights": False},
    ):
        for kernel in fast.kernels():
            fast.kernel_table = fast.block_table = KernelTable({1: kernel})
            close(fast(*given, **options), dense(*given, **options))
    close(
        fast(*(x[0] for x in (query, key, value)), attn_mask=mask),
        dense(*(x[0] for x in (query, key, value)), attn_mask=mask),
    )
    with pytest.raises(errors.UnsupportedError, match="attn_mask"):
        fast(*given, is_causal=True)


@pytest.mark.parametrize("name", ["chain", "gated", "causal attention", "torch attention"])
def test_dropout_in_training_draws_the_same_for_one_seed_whatever_lanes_do(name: str) -> None:
    torch.manual_seed(0)
    module = {
        "chain": nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 8)),
        "gated": SwiGLU(8, 8, True),
        "causal attention": Causal(8, 4, 2, True),
        "torch attention": nn.MultiheadAttention(8, 4, dropout=0.5),
    }[name]
    fast = gradloc.route_model(
        module.train(), BlockPlan("structural", (planned(module),), "none"), kernel="lanes", certify=False
    )
    x = torch.randn(3, 5, 8)
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        found.append(leaves(fast(x, x, x) if name == "torch attention" else fast(x))[0])
    assert torch.equal(*found)
    assert fast.pick(15) != "lanes"
    assert fast.eval().pick(15) == "lanes"


def test_a_transformer_encoder_routes_its_attention_and_its_networks() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).eval()
    operators, skipped = find_operators(model)
    assert [o.name for o in operators] == [f"layers.{i}.{own}" for i in (0, 1) for own in ("self_attn", "linear1")]
    assert not skipped
    plan = BlockPlan(
        "structural", tuple(ChainPlan(o, tuple(np.arange(n) % 2 for n in o.widths), 2) for o in operators), "none"
    )
    fast, dense = gradloc.route_model(model, plan).eval(), copy.deepcopy(model)
    plan.masks.apply(dense)
    dense.use_nested_tensor = False
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        found, expected = (m(x, src_key_padding_mask=padding) for m in (fast, dense))
    torch.testing.assert_close(found[~padding], expected[~padding])


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_recurrent_layers_take_packed_and_single_sequences(name: str) -> None:
    torch.manual_seed(0)
    module = CASES[name].make(4, True).double().eval()
    plan = planned(module, draw_labels((6, *(4,) * module.num_layers), 2, 3))
    fast, dense = routed_model(plan, module).eval(), CASES[name].twin(module, list(plan.labels))
    sequences = [torch.randn(t, 6, dtype=torch.float64) for t in (3, 5, 2)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    (found, ended), (expected, last) = fast(packed), dense(packed)
    close(pad_packed_sequence(found), pad_packed_sequence(expected))
    close(ended, last)
    close(fast(sequences[1]), dense(sequences[1]))
    assert fast(sequences[1])[0].shape == (5, 4)


# ---- what is found, what is refused


class Rotary(Causal):
    """Not plain attention: positions turn the queries."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * torch.cos(x))


class Windowed(Packed):
    """The same code as `Packed`, with another mask."""

    def __init__(self) -> None:
        super().__init__(8, 4, True, heads_first=False)
        self.bias.copy_(torch.ones(40, 40).tril().triu(-1))


def test_attention_is_known_by_what_it_computes() -> None:
    (plain,), skipped = find_operators(Packed(8, 4, True, heads_first=False))
    assert (plain.widths, plain.options["causal"], plain.options["packed"]) == ((8, 4, 8), True, "parts")
    assert (plain.options["dropout"], plain.options["dropout_after"]) == (0.1, 0.1)
    assert skipped == {}
    for model in (Rotary(8, 4, 2, True), Windowed()):
        operators, skipped = find_operators(nn.ModuleDict({"attention": model}))
        assert {o.kind for o in operators} == {"linear"}
        assert "plain multi-head attention" in skipped["attention"]
    (grouped,), _ = find_operators(Causal(16, 4, 2, False))
    assert (grouped.widths[1], grouped.options["group"], grouped.options["dropout"]) == (2, 2, 0.1)
    with torch.no_grad():  # recognition looks at the function, not at the weights
        for parameter in (model := Causal(16, 4, 2, False)).parameters():
            parameter.zero_()
    assert find_operators(model)[0][0] == grouped


def test_what_stays_dense_is_named_with_its_reason() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict(
        {
            "bi": nn.LSTM(4, 4, bidirectional=True),
            "projected": nn.LSTM(4, 4, proj_size=2),
            "grouped": nn.Conv1d(4, 4, 1, groups=2),
            "wrapped": nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"),
            "unknown": nn.Bilinear(4, 4, 4),
            "transposed": nn.ConvTranspose1d(4, 4, 1),
            "wide": nn.MultiheadAttention(4, 2, kdim=6),
            "extra": nn.MultiheadAttention(4, 2, add_bias_kv=True),
            "short": nn.Embedding(4, 4, max_norm=1.0),
            "good": shared,
        }
    )
    operators, skipped = find_operators(model)
    assert [o.name for o in operators] == ["good"]
    assert {name: next(word for word in ("bidirectional", "proj_size", "groups=2", "circular", "Bilinear", "ConvTranspose1d", "another width", "add_bias_kv", "max_norm") if word in reason) for name, reason in skipped.items() if name in model} == {
        "bi": "bidirectional", "projected": "proj_size", "grouped": "groups=2", "wrapped": "circular", "unknown": "Bilinear",
        "transposed": "ConvTranspose1d", "wide": "another width", "extra": "add_bias_kv", "short": "max_norm",
    }  # fmt: skip


class Adapted(nn.Linear):
    """A linear with a low-rank addition, as some libraries write it: a subclass, whose weight isn't all that it computes."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__(into, out)
        self.down, self.up = nn.Parameter(torch.randn(2, into)), nn.Parameter(torch.randn(out, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


class InOtherWords(nn.Linear):
    """Falcon's linear."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = x @ self.weight.T
        return product if self.bias is None else product + self.bias


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_is_what_computes_one(bias: bool) -> None:
    def ffn(linear: nn.Module) -> nn.Module:
        return nn.ModuleDict({"ffn": nn.Sequential(linear, nn.ReLU(), nn.Linear(8, 4))})

    (found,), skipped = find_operators(ffn(InOtherWords(4, 8, bias)))
    assert (found.kind, found.operators, skipped) == ("chain", ("ffn.0", "ffn.2"), {})
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(4, 8))
    for other, why in ((Adapted(4, 8), "a Adapted is of no kind"), (parametrized, "a ParametrizationList")):
        operators, skipped = find_operators(ffn(other))
        assert [operator.name for operator in operators] == ["ffn.2"]
        assert any(name.startswith("ffn.0") and why in reason for name, reason in skipped.items())


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(4, 8),
        lambda: nn.Linear(4, 8, bias=False),
        lambda: nn.Embedding(8, 4),
        lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1),
        lambda: nn.Conv2d(4, 8, 3, bias=False),
    ],
    ids=["linear", "linear without bias", "embedding", "conv", "conv without bias"],
)
def test_the_rest_of_a_model_may_ask_a_routed_module_what_it_asked_before(make: Any) -> None:
    model = nn.ModuleDict({"one": make()})
    fast = gradloc.route_model(model, BlockPlan("structural", (planned(model),), "none"))
    plan = fast._routed_from.plan
    kept = {**dict(model.named_parameters()), **reassemble(fast["one"], plan.chains[0])}
    for _ in range(2):  # with gradients, and without
        assert torch.equal(fast["one"].weight, kept["one.weight"])
        assert (fast["one"].weight.dtype, fast["one"].weight.device) == (torch.float32, torch.device("cpu"))
        torch.set_grad_enabled(not torch.is_grad_enabled())
    assert hasattr(fast["one"], "bias") == hasattr(model["one"], "bias")
    if getattr(model["one"], "bias", None) is not None:
        assert torch.equal(fast["one"].bias, kept["one.bias"])
    elif hasattr(model["one"], "bias"):
        assert fast["one"].bias is None
    for name in (
        "in_features",
        "out_features",
        "num_embeddings",
        "embedding_dim",
        "padding_idx",
        "stride",
        "kernel_size",
    ):
        assert getattr(fast["one"], name, "none") == getattr(model["one"], name, "none")


def test_an_operator_of_several_modules_has_no_weight() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    fast = routed_model(planned(module), module)
    assert not hasattr(fast, "weight")
    assert not hasattr(fast, "bias")


def test_what_shares_a_weight_is_named_before_it_is_planned() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(6, 4), "head": nn.Linear(4, 6), "other": nn.Linear(4, 6)})
    model["head"].weight = model["embedding"].weight
    operators, skipped = find_operators(model)
    assert [operator.name for operator in operators] == ["other"]
    assert set(skipped) == {"embedding", "head"}
    assert all("is shared with another" in why for why in skipped.values())


@EVERY
def test_refusals(name: str) -> None:
    model = nn.ModuleDict({"one": CASES[name].make(4, True)})
    (operator,), _ = find_operators(model)
    plan = BlockPlan("structural", (planned(model),), "none")
    with pytest.raises(errors.ModelMismatchError, match="no such"):
        gradloc.route_model(nn.ModuleDict({"other": model["one"]}), plan)
    with pytest.raises(errors.ModelMismatchError, match="shapes"):
        gradloc.route_model(nn.ModuleDict({"one": CASES[name].make(2, True)}), plan)
    with pytest.raises(errors.ConfigError, match=r"can't run operator 'one'|must be one of"):
        gradloc.route_model(model, plan, kernel="sorted")
    weight = model.get_parameter(operator.weights[0])
    twice = nn.ModuleDict({"one": model["one"], "two": nn.ParameterList([weight])})
    with pytest.raises(errors.UnsupportedError, match="shared"):
        gradloc.route_model(twice, plan)
    weight.data.view(-1)[0] = float("nan")
    with pytest.raises(errors.NonFiniteError, match="one"):
        gradloc.route_model(model, plan)


def test_a_module_that_computes_something_else_now_is_refused() -> None:
    conv = nn.Conv2d(4, 4, 3)
    plan = planned(conv)
    with pytest.raises(errors.UnsupportedError, match="conv operator that was planned"):
        routed_model(plan, nn.Conv2d(4, 4, 3, stride=2))
    with pytest.raises(errors.UnsupportedError, match=r"padding_mode"):
        routed_model(plan, nn.Conv2d(4, 4, 3, padding_mode="reflect"))


def test_plans_of_unknown_kinds_are_refused_by_name(tmp_path: Path) -> None:
    plan = BlockPlan("structural", (planned(nn.Linear(4, 4)),), "none")
    arrays, header = load_artifact(plan.save(tmp_path / "plan.safetensors"), "plan")
    header["chains"][0]["chain"]["kind"] = "magnet"
    path = save_artifact(tmp_path / "newer.safetensors", "plan", arrays, header)
    with pytest.raises(errors.UnsupportedError, match=r"'magnet'.*linear"):
        BlockPlan.load(path)


def test_no_tokens_go_through_every_kernel() -> None:
    """As through the dense module: an expert, or a last batch, may get none."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6))
    (operator,), _ = find_operators(model)
    plan = ChainPlan(operator, tuple(np.arange(n) % 2 for n in operator.widths), 2)
    for kernel in ("bmm", "conv", "loop", "lanes", "dense"):
        fast = gradloc.route_model(model, BlockPlan("structural", (plan,), "none"), kernel=kernel, certify=False)
        for shape in ((0, 8), (3, 0, 8)):
            assert fast(torch.zeros(shape)).shape == (*shape[:-1], 6), kernel


def test_cutting_what_is_not_zero_is_warned_of_once_for_all_operators(recwarn: pytest.WarningsRecorder) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.ReLU(), nn.Unflatten(1, (1, 4)), nn.Linear(8, 4), nn.Linear(4, 4))
    found, _ = find_operators(model)
    halves = [tuple(np.arange(n) % 2 for n in operator.widths) for operator in found]
    plan = BlockPlan(
        "structural", tuple(ChainPlan(o, labels, 2) for o, labels in zip(found, halves, strict=True)), "none"
    )
    with torch.no_grad():
        model[4].weight[torch.from_numpy(~plan.masks.array("4.weight"))] = 0.0  # this one was annealed
    share = {
        name: 100 * float((model.get_parameter(name) * ~plan.masks[name]).square().sum() / model.get_parameter(name).square().sum())
        for name in ("0.weight", "3.weight")
    }  # fmt: skip
    for certify in (True, False):
        with pytest.warns(RuntimeWarning, match="anneal first") as heard:
            gradloc.route_model(model, plan, certify=certify)
        assert f"squared weights: 0 ({share['0.weight']:.3g} %), 3 ({share['3.weight']:.3g} %)." in str(
            heard[0].message
        )
        assert len(heard) == 1
    plan.masks.apply(model)
    recwarn.clear()
    assert gradloc.route_model(model, plan).certificate.cut == {}
    assert not recwarn.list


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_recurrent_layers_with_dense_weights_run_in_one_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's module does, which draws the same dropout between the layers."""
    torch.manual_seed(0)
    module = {"lstm": nn.LSTM, "gru": nn.GRU}[name](6, 8, 3, dropout=0.5)
    plan = planned(module)
    fast, twin = routed_model(plan, module, kernel="dense"), copy.deepcopy(module)
    BlockPlan("structural", (plan,), "none").masks.apply(twin)
    mode, calls = module.mode, []
    function = recurrent._FUNCTIONS[mode]
    monkeypatch.setitem(recurrent._FUNCTIONS, mode, lambda *given: calls.append(mode) or function(*given))
    x = torch.randn(5, 2, 6)
    for training in (True, False):
        with torch.no_grad():
            found, expected = [(torch.manual_seed(1), one.train(training)(x))[1] for one in (fast, twin)]
        torch.testing.assert_close(found[0], expected[0])
        close(found[1], expected[1])
    assert calls == [mode] * 2


@EVERY
def test_autocast_gives_the_dtypes_of_the_module_whatever_the_kernel(name: str) -> None:
    torch.manual_seed(0)
    module = CASES[name].make(8, True).float().eval()
    routed = routed_of(planned(module), module)[0].eval()
    inputs = _pytree.tree_map_only(
        Tensor, lambda x: x.float() if x.is_floating_point() else x, CASES[name].inputs(module)
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = [leaf.dtype for leaf in leaves(module(*inputs))]
        for kernel in routed.kernels():
            routed.kernel_table = KernelTable({1: kernel})
            assert [leaf.dtype for leaf in leaves(routed(*inputs))] == expected, kernel
