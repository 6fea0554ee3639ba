"""Routed operators against plain masked references, and certificates against sabotage."""

from __future__ import annotations

import copy
import types
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F

import gradloc
from gradloc import errors
from gradloc.core.plan import HUB, BlockPlan, ChainPlan, OperatorChain
from gradloc.core.router import Router, RouterWeights, new_router
from gradloc.route import kernel_choice, operator_timing
from gradloc.route.blocks import UnitLayer
from gradloc.route.certificate import certify_chain, certify_plan
from gradloc.route.conditional import CUDA_KERNELS, IndexRoutedFFN
from gradloc.route.dense import dense_state_dict
from gradloc.route.find import find_operators
from gradloc.route.kernel_choice import KernelTable
from gradloc.route.operator_certificate import _compare, certify_operator
from gradloc.route.operators.linear import RoutedChain, RoutedLinear, named
from gradloc.route.patterns import chain_form, find_chains
from gradloc.route.precision import full_precision
from tests.oracles.routing import gated_ffn, masked_chain


def chain_plan(widths: tuple[int, ...], seed: int, isolated: bool = True) -> ChainPlan:
    random = np.random.default_rng(seed)
    found = [random.integers(-1 if isolated else 0, 3, n) for n in widths]
    names = tuple(f"l{i}" for i in range(len(widths) - 1))
    return ChainPlan(OperatorChain("c", names, ("relu",) * (len(names) - 1), widths), tuple(found), 3)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(0, 10_000), st.integers(1, 5))
def test_structural_equals_the_masked_chain_exactly_on_integers(widths: list[int], seed: int, tokens: int) -> None:
    plan = chain_plan(tuple(widths), seed)
    torch.manual_seed(seed)
    weights = [torch.randint(-3, 4, (o, i)).double() for i, o in pairwise(widths)]
    biases = [torch.randint(-3, 4, (o,)).double() for o in widths[1:]]
    x = torch.randint(-4, 5, (tokens, widths[0])).double()
    routed = RoutedChain.from_plan(plan, weights, biases)
    expected = masked_chain(x, weights, biases, plan.labels)
    for kernel in routed.kernels():
        assert torch.equal(routed.run(x, kernel=kernel), expected)


def integers(low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(low, high + 1, shape).double()


def some_router(
    kind: str, width: int, blocks: int, threshold: float | None, random: np.random.Generator, weighted: bool = False
) -> RouterWeights:
    # Real-valued, so that no two blocks score the same: which of equals runs isn't promised.
    sizes = [(blocks, width)] if kind == "linear" else [(3, width), (blocks, 3)]
    biases = [random.normal(size=n) if kind == "mlp" or n == blocks else np.zeros(n) for n, _ in sizes]
    parts = [tuple(a.astype("f4") for a in arrays) for arrays in ([random.normal(size=s) for s in sizes], biases)]
    return RouterWeights(parts[0], parts[1], kind, threshold, weighted)


@settings(deadline=None, max_examples=80)
@given(
    st.integers(2, 5), st.integers(1, 4), st.integers(0, 4), st.integers(0, 10_000), st.integers(1, 20),
    st.sampled_from([1, 2]), st.sampled_from(["linear", "low_rank", "mlp"]), st.sampled_from([None, -0.5, 0.5]), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_conditional_equals_the_gated_reference_exactly_on_integers(
    blocks: int,
    size: int,
    hub: int,
    seed: int,
    tokens: int,
    projections: int,
    kind: str,
    threshold: float | None,
    equal: bool,
    weighted: bool,
) -> None:
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    hidden, width = blocks * size + hub, 4
    places = np.arange(blocks * size) % blocks if equal else random.integers(0, blocks, blocks * size)
    label = random.permutation(np.r_[places, np.full(hub, HUB)])
    ups, biases = ([integers(-3, 3, hidden, *more) for _ in range(projections)] for more in ((width,), ()))
    down, down_bias = integers(-3, 3, width, hidden), integers(-3, 3, width)
    router = some_router(kind, width, blocks, threshold, random, weighted)
    x = integers(-4, 4, tokens, width)
    for active in range(1, blocks + 1):
        routed = IndexRoutedFFN(ups, biases, down, down_bias, "relu", label, blocks, active, router)
        expected = gated_ffn(x, ups, biases, down, down_bias, label, router, active)
        for kernel in (*routed.kernels(), "unrolled"):
            if weighted:  # weights of blocks are no integers
                torch.testing.assert_close(routed.run(x, kernel), expected, msg=lambda m, k=kernel: f"{k}: {m}")
            else:
                assert torch.equal(routed.run(x, kernel), expected), kernel
    if threshold is None and projections == 1 and not weighted:
        assert torch.equal(expected, F.linear(F.relu(F.linear(x, ups[0], biases[0])), down, down_bias))


@pytest.mark.parametrize("kernel", ["dense", "batched", "padded", "sorted", "loop"])
def test_gradients_through_a_conditional_network_equal_the_gated_ones(kernel: str) -> None:
    random = np.random.default_rng(0)
    ups, biases = [torch.randn(8, 4).double() for _ in range(2)], [torch.randn(8).double() for _ in range(2)]
    down, down_bias = torch.randn(4, 8).double(), torch.randn(4).double()
    label, router = random.permutation(np.arange(8) % 4), some_router("mlp", 4, 4, None, random)
    routed = IndexRoutedFFN(ups, biases, down, down_bias, "relu", label, 4, 2, router)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    routed.run(x, kernel).square().sum().backward()
    gated_ffn(y, ups, biases, down, down_bias, label, router, 2).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("kernel", ["dense", "batched", "padded", "sorted", "loop", "unrolled"])
def test_gradients_of_weighted_blocks_reach_the_router(kernel: str) -> None:
    """Through the weights of the blocks that run, and no others."""
    random = np.random.default_rng(0)
    up, bias, down = torch.randn(8, 4).double(), torch.randn(8).double(), torch.randn(4, 8).double()
    label, given = random.permutation(np.r_[np.arange(6) % 3, HUB, HUB]), some_router("mlp", 4, 3, None, random, True)
    routed = IndexRoutedFFN([up], [bias], down, None, "relu", label, 3, 2, given)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    y, router = x.detach().clone().requires_grad_(), copy.deepcopy(routed.router)
    routed.run(x, kernel).square().sum().backward()
    first, last = router.layers
    scores = last(torch.relu(first(y)))
    lowest = scores.argmin(1, keepdim=True)
    counted = (2.0 * torch.sigmoid(scores)).scatter(1, lowest, 0.0)
    times = torch.stack([counted[:, block] if block != HUB else torch.ones(5).double() for block in label.tolist()], 1)
    (torch.relu(y @ up.T + bias) * times @ down.T).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for found, expected in zip(routed.router.parameters(), router.parameters(), strict=True):
        assert expected.grad.abs().max() > 0
        torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.parametrize("settings", [{}, {"fused": True}])
def test_validation_between_steps_sees_the_weights_of_now(settings: dict[str, bool]) -> None:
    """A fused optimizer changes weights without raising their version."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    fast = gradloc.route_model(model, structural_plan(model), kernel="dense")
    optimizer, x = torch.optim.AdamW(fast.parameters(), lr=0.05, **settings), torch.randn(13, 8)
    for _ in range(3):
        fast(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch.testing.assert_close(fast(x), fast.run(x, kernel="loop"))


def test_gradients_through_blocks_equal_the_masked_ones() -> None:
    plan = chain_plan((6, 8, 6), 3)
    weights = [torch.randn(8, 6, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64)]
    routed = RoutedChain.from_plan(plan, weights, [None, None])
    x, y = (torch.randn(5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y.data.copy_(x.data)
    routed(x).square().sum().backward()
    masked_chain(y, weights, [None, None], plan.labels).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(4, 8), nn.Linear(8, 4), nn.Dropout(0.1)

    def forward(self, x):
        return self.drop(self.b(F.gelu(self.a(x), approximate="tanh")))


class HandWritten(nn.Module):
    """GELU as GPT-2's authors wrote it."""

    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


class Clipped(nn.Module):
    """GELU for all that is small."""

    def forward(self, x):
        return F.gelu(x).clamp(-10, 10)


class AcrossUnits(nn.Module):
    def forward(self, x):
        return F.relu(x) + x.mean(-1, keepdim=True)


class Noisy(nn.Module):
    def forward(self, x):
        return F.relu(x) * 2 if self.training else F.relu(x)


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (HandWritten(), "gelu_tanh"), (nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (nn.ReLU(inplace=True), "relu"), (nn.Mish(), "mish"),
        (nn.LeakyReLU(), "leaky_relu"), (nn.LeakyReLU(0.2), None), (nn.ELU(), "elu"), (nn.Hardswish(), "hardswish"), (nn.PReLU(), None),
        (nn.Softmax(-1), None), (Clipped(), None), (Noisy(), None), (nn.Tanh(), "tanh"), (nn.Sigmoid(), "sigmoid"), (nn.SiLU(), "silu"),
        (nn.RReLU(), None), (AcrossUnits(), None), (nn.Identity(), "identity"), (nn.GLU(), None), (nn.Softplus(), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)  # fmt: skip
def test_an_activation_is_known_by_what_it_computes(activation: nn.Module, name: str | None) -> None:
    model = nn.Sequential(nn.Linear(4, 8), activation, nn.Linear(8, 4))
    gated = Gated(activation)
    assert [chain.activations for chain in find_chains(model)] == ([] if name is None else [(name,)])
    assert [o.activations for o in find_operators(gated)[0] if o.kind == "gated"] == ([] if name is None else [(name,)])


class Gated(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.gate, self.up, self.down, self.act = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4), activation

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Residual(Functional):
    def forward(self, x):
        return x + super().forward(x)


class Branching(Functional):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


def test_only_exact_chains_are_found() -> None:
    assert [c.activations for c in find_chains(Functional())] == [("gelu_tanh",)]
    assert find_chains(Residual()) == ()
    assert find_chains(Branching()) == ()
    assert [c.name for c in find_chains(nn.ModuleDict({"ffn": Functional(), "r": Residual()}))] == ["ffn"]
    assert find_chains(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.LogSoftmax(-1))) == ()
    three = find_chains(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)))
    assert three[0].widths == (4, 5, 6, 2)
    shared = nn.Linear(4, 4)
    assert find_chains(nn.Sequential(shared, nn.ReLU(), shared)) == ()


class Dropped(Functional):
    """A functional dropout that follows the module's mode, after a look at a weight, as T5's; or one that is always on."""

    def __init__(self, always: bool = False, doubles: bool = False) -> None:
        super().__init__()
        self.always, self.doubles = always, doubles

    def forward(self, x):
        h = F.relu(self.a(x))
        if isinstance(self.b.weight, torch.Tensor) and h.dtype != self.b.weight.dtype:
            h = h.to(self.b.weight.dtype)
        h = F.dropout(h, 0.3, training=self.training or self.always)
        return F.relu(self.b(h)) if self.doubles and not self.training else self.b(h)


@pytest.mark.parametrize("training", [True, False])
def test_a_functional_dropout_is_kept(training: bool) -> None:
    model = Dropped().train(training)
    assert chain_form(model).dropouts == [0.0, 0.3, 0.0]
    fast = gradloc.route_model(model, conditional_plan(model))
    assert fast.dropouts == (0.0, 0.3, 0.0)
    assert find_chains(Dropped(always=True).train(training)) == ()
    assert find_chains(Dropped(doubles=True).train(training)) == ()


def test_dropout_before_an_activation_is_dropout_after_it_only_where_that_scales() -> None:
    def chain(activation: nn.Module) -> list[str]:
        found, _ = find_operators(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), activation, nn.Linear(8, 4)))
        return [operator.kind for operator in found]

    assert chain(nn.ReLU()) == ["chain"]
    assert chain(nn.GELU()) == ["linear", "linear"]  # had been routed with another training


@pytest.mark.parametrize("model", [Dropped(), Gated(nn.SiLU())], ids=["chain", "gated"])
def test_weights_of_several_dtypes_stay_dense(model: nn.Module) -> None:
    last = model.b if isinstance(model, Dropped) else model.down
    last.double()  # as T5 keeps its last weight in full precision
    operators, skipped = find_operators(model)
    assert {operator.kind for operator in operators} == {"linear"}
    assert skipped[""] == "its weights are of several dtypes: float32, float64"


def conditional_plan(model: nn.Module) -> BlockPlan:
    chain = find_chains(model)[0]
    random = np.random.default_rng(0)
    width, hidden, _ = chain.widths
    router = RouterWeights.linear(random.normal(size=(4, width)), random.normal(size=4))
    hub = np.full(width, HUB)
    return BlockPlan(
        "conditional",
        (ChainPlan(chain, (hub, random.permutation(np.arange(hidden) % 4), hub), 4, 2, router=router),),
        "none",
    )


def weighted_plan(model: nn.Module) -> BlockPlan:
    plan = conditional_plan(model)
    chains = tuple(replace(c, weighted=True, router=replace(c.router, weighted=True)) for c in plan.chains)
    return replace(plan, chains=chains)


def structural_plan(model: nn.Module) -> BlockPlan:
    chain = find_chains(model)[0]
    random = np.random.default_rng(0)
    return BlockPlan(
        "structural", (ChainPlan(chain, tuple(random.permutation(np.arange(n) % 4) for n in chain.widths), 4),), "none"
    )


@pytest.mark.parametrize("make", [structural_plan, conditional_plan, weighted_plan])
def test_what_a_replaced_module_does_beside_its_weights_fails_the_certificate(make, monkeypatch) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    plan = make(model)
    assert gradloc.route_model(model, plan).certificate.passed
    # Something that finding doesn't see.
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: F.relu(x) * (2 if x.shape[-1] == 16 else 1))
    with pytest.raises(errors.CertificateError, match=r"the (masked )?module"):
        gradloc.route_model(model, plan)


@pytest.mark.parametrize("make", [structural_plan, conditional_plan, weighted_plan])
def test_a_model_is_copied_certified_and_trains_on(make, tmp_path) -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)))
    before = copy.deepcopy(model.state_dict())
    plan = make(model)
    fast = gradloc.route_model(model, plan)
    assert fast.certificate.passed
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    again = gradloc.route_model(model, BlockPlan.load(plan.save(tmp_path / "plan.safetensors")))
    again.load_state_dict(fast.state_dict())
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(fast(x), again(x))
    fast(x).sum().backward()
    torch.optim.SGD(fast.parameters(), lr=0.1).step()
    assert not torch.equal(fast(x), again(x))


def test_a_compiled_model_is_routed_as_the_one_inside() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)))
    plan = structural_plan(model)
    fast = gradloc.route_model(torch.compile(model, backend="aot_eager"), plan)
    assert type(fast) is nn.Sequential
    assert fast.certificate.passed
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(fast(x), gradloc.route_model(model, plan)(x))


@pytest.mark.parametrize("make", [structural_plan, conditional_plan, weighted_plan])
def test_a_network_in_several_places_is_routed_in_all(make) -> None:
    torch.manual_seed(0)
    ffn = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    once = nn.Sequential(ffn, nn.Tanh())
    model = nn.Sequential(once, ffn, once)
    fast = gradloc.route_model(model, make(model))
    x, alone = torch.randn(5, 8), fast[1]
    torch.testing.assert_close(fast(x), torch.tanh(alone(alone(torch.tanh(alone(x))))))
    assert len(find_chains(fast)) == 0
    state, plan = dense_state_dict(fast)
    assert state.keys() == model.state_dict().keys()
    again = copy.deepcopy(model)
    again.load_state_dict(state)
    torch.testing.assert_close(gradloc.route_model(again, plan)(x), fast(x))


class Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.dtype)


@pytest.mark.parametrize("kind", ["structural", "conditional"])
def test_parts_of_a_model_keep_their_own_dtype(kind: str) -> None:
    """Whatever else the model holds, and whatever comes first in it: devices are taken from the same places."""
    kinds = (torch.float64, torch.bfloat16, torch.float32)
    parts = [nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).to(dtype) for dtype in kinds]
    steps = [step for dtype, part in zip(kinds, parts, strict=True) for step in (Cast(dtype), part)]
    model = nn.Sequential(*steps)
    make = conditional_plan if kind == "conditional" else structural_plan
    chains = [replace(make(part).chains[0], chain=chain) for part, chain in zip(parts, find_chains(model), strict=True)]
    fast = gradloc.route_model(model, BlockPlan(kind, tuple(chains), "none"))
    assert fast.certificate.passed
    for number, dtype in enumerate(kinds):
        routed = fast[2 * number + 1]
        routers = {p.dtype for name, p in routed.named_parameters() if name.startswith("router.")}
        assert {p.dtype for name, p in routed.named_parameters() if not name.startswith("router.")} == {dtype}
        assert routers <= {torch.promote_types(dtype, torch.float32)}, "a rounded score may pick another block"
        assert {t.device for t in (*routed.parameters(), *routed.buffers())} == {parts[number][0].weight.device}
    assert fast(torch.randn(3, 8)).dtype == torch.float32


def sabotage_index(routed) -> None:
    index = routed.layers[0].index if isinstance(routed, RoutedChain) else routed.unit_order
    index[[0, -1]] = index[[-1, 0]]


def sabotage_output(routed) -> None:
    index = routed.layers[-1].place if isinstance(routed, RoutedChain) else routed.group_of_unit
    index[[0, 5]] = index[[5, 0]] if index[0] != index[5] else index[[5, 0]] + 1


def sabotage_weight(routed) -> None:
    weight = routed.tensors["2_weight"].flat if isinstance(routed, RoutedChain) else routed.down_weight
    weight.data.view(-1)[3] += 1e-3


def sabotage_router(routed) -> None:
    if isinstance(routed, RoutedChain):
        routed.tensors["0_bias"].flat.data[0] += 1
    else:
        routed.router.layers[0].weight.data[0, 0] += 1e-3


@pytest.mark.parametrize("make", [structural_plan, conditional_plan])
def test_memory_is_measured_beside_dense(make) -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    (memory,) = gradloc.route_model(model, make(model)).certificate.memory
    result = memory.tokens * 64 * 4
    hidden = memory.tokens * 256 * 4
    assert result + hidden <= memory.dense_peak < 4 * hidden
    assert result <= memory.routed_peak
    assert memory.dense_weights == sum(p.numel() * 4 for p in model.parameters())
    if make is structural_plan:
        assert memory.routed_weights < memory.dense_weights


@pytest.mark.parametrize("make", [structural_plan, conditional_plan])
def test_a_plan_is_timed_with_the_kernels_that_routing_would_choose(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with those of an operator that was never measured, which are two."""
    model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 24))
    plan, weights = make(model), {name: p.detach().numpy() for name, p in model.named_parameters()}
    # The slowest of all counts as the fastest, so that it can't be the default.
    monkeypatch.setattr("gradloc.route.conditional_timing.measure_kernels", lambda *_: KernelTable({1: "dense"}))
    monkeypatch.setattr(operator_timing, "_fastest", lambda seconds: dict.fromkeys(seconds, "dense"))
    for certificate in (certify_plan(plan, weights), gradloc.route_model(model, plan).certificate):
        assert certificate.passed
        assert {item.kernel for item in certificate.latency} == {"dense"}
    assert not certify_plan(plan, weights, timed=False).latency


def test_chains_without_routers_are_named_in_one_sentence() -> None:
    model = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(14))
    (one,) = conditional_plan(model).chains
    plan = BlockPlan("conditional", tuple(replace(one, chain=c, router=None) for c in find_chains(model)), "none")
    with pytest.raises(errors.ConfigError, match=r"^0, 1, .*, 11 and 2 more: the plan has no router\.") as raised:
        gradloc.route_model(model, plan)
    assert str(raised.value).count("Anneal it first") == 1


class PicksNeighbours(IndexRoutedFFN):
    def gates(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().gates(tokens).roll(1, dims=1)


def sabotage_picks(routed) -> None:
    if isinstance(routed, RoutedChain):
        index = routed.layers[0].index
        index[[0, -1]] = index[[-1, 0]]
    else:
        routed.__class__ = PicksNeighbours


@pytest.mark.parametrize("make", [structural_plan, conditional_plan, weighted_plan])
def test_empty_batches_stay_empty(make) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    fast = gradloc.route_model(model, make(model))
    for shape in ((0, 8), (0, 3, 8), (2, 0, 8)):
        assert fast(torch.randn(shape)).shape == shape


def test_autocast_changes_no_pick() -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    routed = gradloc.route_model(model, weighted_plan(model))
    x = torch.randn(4096, 64)
    plain = routed.gates(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(routed.gates(x), plain)
        assert routed.router(x.bfloat16()).dtype == torch.float32


def test_a_weight_too_small_for_a_number_is_no_fault() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    plan = weighted_plan(model).chains[0]
    router = replace(plan.router, biases=(plan.router.biases[0] - 200,))
    fast = gradloc.route_model(model, BlockPlan("conditional", (replace(plan, router=router),), "none"))
    assert fast.certificate.passed
    assert not fast.gates(torch.randn(3, 8)).any()


def test_weights_of_blocks_are_certified() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    plan = conditional_plan(model).chains[0]
    weighted = weighted_plan(model).chains[0]
    with pytest.raises(errors.ConfigError, match="weighted=False, but its router has True"):
        replace(plan, router=weighted.router)
    weights, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    for own, held in ((plan, weighted), (weighted, plan)):
        routed = IndexRoutedFFN.from_plan(held, weights, biases)
        failed = [c.name for c in certify_chain(own, weights, biases, routed, timed=False).checks if not c.passed]
        assert failed == ["router weights that differ from the plan's"], "the plan's word counts, not the module's own"


@pytest.mark.parametrize("threshold", [-0.3, 0.3])
def test_a_threshold_is_certified(threshold: float) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    plan = conditional_plan(model).chains[0]
    router = RouterWeights.linear(plan.router.weights[0], plan.router.biases[0], threshold)
    fast = gradloc.route_model(model, BlockPlan("conditional", (replace(plan, router=router),), "none"))
    assert fast.certificate.passed
    weights, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    routed = IndexRoutedFFN.from_plan(replace(plan, router=router), weights, biases)
    routed.router.threshold = threshold + 0.2
    assert not certify_chain(replace(plan, router=router), weights, biases, routed, timed=False).passed


def sabotage_bias(routed) -> None:
    """With what no number is larger than."""
    bias = routed.tensors["2_bias"].flat if isinstance(routed, RoutedChain) else routed.down_bias
    bias.data[0] = float("nan")


@pytest.mark.parametrize(
    "harm", [sabotage_picks, sabotage_index, sabotage_output, sabotage_weight, sabotage_router, sabotage_bias]
)
@pytest.mark.parametrize("make", [structural_plan, conditional_plan, weighted_plan])
def test_sabotage_fails_the_certificate(make, harm) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    plan = make(model).chains[0]
    weights, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    routed = (IndexRoutedFFN if plan.conditional else RoutedChain).from_plan(plan, weights, biases)

    def passed() -> bool:
        if plan.conditional:
            return certify_chain(plan, weights, biases, routed, timed=False).passed
        return certify_operator(plan, named(plan.chain, weights, biases), routed, timed=False).passed

    assert passed()
    harm(routed)
    assert not passed()


def slightly_off(routed) -> None:
    weight = routed.tensors["2_weight"].flat if isinstance(routed, RoutedChain) else routed.down_weight
    weight.data.view(-1)[3] *= 1 + 1e-6


def router_slightly_off(routed) -> None:
    routed.router.layers[0].bias.data[0] += 1e-6


def one_block_more(routed) -> None:
    routed.active += 1


def router_of_another_kind(routed) -> None:
    """With the same weights."""
    routed.router.kind = "low_rank"


def idle_group_elsewhere(routed) -> None:
    """Which the kernel of one product goes by."""
    routed.group_of_unit[[0, -1]] = routed.group_of_unit[[-1, 0]]


def idle_output_elsewhere(routed) -> None:
    place = routed.layers[-1].place
    place[[0, 5]] = place[[5, 0]]


def one_kernel_off(routed, tokens: range = range(1000)) -> None:
    own = type(routed)

    def run(self, *inputs, kernel="", **named):
        x, *rest = inputs
        kernel = kernel or rest.pop(0)
        found = own.run(self, x, kernel, *rest, **named)
        return found + 1 if kernel == "dense" and len(x) in tokens else found

    routed.__class__ = type("Off", (own,), {"run": run})
    routed.kernel_table = KernelTable({1: "loop"})


def many_tokens_off(routed) -> None:
    one_kernel_off(routed, range(41, 1000))


def few_tokens_off(routed) -> None:
    one_kernel_off(routed, range(2))


def batches_off(routed) -> None:
    own = type(routed)
    routed.__class__ = type("Off", (own,), {"forward": lambda self, x: own.forward(self, x) + (x.dim() == 3)})


def batches_of_another_shape(routed) -> None:
    own = type(routed)
    routed.__class__ = type("Off", (own,), {"forward": lambda self, x: own.forward(self, x)[..., :1]})


def idle_unit_elsewhere(routed) -> None:
    """One that reads and writes nothing is stored in another one's place, which no output shows."""
    if isinstance(routed, RoutedChain):
        routed.layers[0].index[0] = routed.layers[0].index[1]
    else:
        routed.unit_order[[0, -1]] = routed.unit_order[[-1, 0]]


@pytest.mark.parametrize(
    ("make", "harm", "failed"),
    [
        ("structural", idle_unit_elsewhere, {"units read or written in other places than planned"}),
        ("conditional", idle_unit_elsewhere, {"units stored in another block than planned"}),
        ("conditional", idle_group_elsewhere, {"units stored in another block than planned"}),
        ("conditional", one_block_more, {"picks below what they leave out"}),
        ("conditional", router_of_another_kind, {"router weights that differ from the plan's"}),
        ("structural", slightly_off, {"weights that differ from the masked ones"}),
        ("structural", one_kernel_off, {"dense: error on integers", "dense: relative error"}),
        ("structural", idle_output_elsewhere, {"units read or written in other places than planned"}),
        ("structural", few_tokens_off, {"dense: error on integers", "dense: relative error"}),
        ("conditional", few_tokens_off, {"dense: error on integers", "dense: relative error", "dense: all blocks on"}),
        ("structural", many_tokens_off, {"dense: relative error"}),
        ("conditional", many_tokens_off, {"dense: relative error", "dense: all blocks on"}),
        ("structural", batches_off, {"batch shapes: relative error"}),
        ("structural", batches_of_another_shape, {"batch shapes: relative error"}),
        ("conditional", slightly_off, {"weights that differ from the dense ones"}),
        ("conditional", router_slightly_off, {"router weights that differ from the plan's"}),
        ("conditional", batches_off, {"batch shapes: relative error"}),
        ("conditional", batches_of_another_shape, {"batch shapes: relative error"}),
        ("conditional", one_kernel_off, {"dense: error on integers", "dense: relative error", "dense: all blocks on"}),
    ],
)
def test_each_check_sees_its_own_fault_and_no_other(make, harm, failed: set[str]) -> None:
    """What several would see leaves it open whether each does. The mode is put back, whatever comes of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    weights, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    idle = harm in (idle_unit_elsewhere, idle_output_elsewhere, idle_group_elsewhere)
    if idle:
        for value in (*weights, *biases):
            value.data.zero_()
    if make == "structural":
        plan = structural_plan(model).chains[0]
        routed = RoutedChain.from_plan(plan, weights, biases)
        harm(routed)
        certificate = certify_operator(plan, named(plan.chain, weights, biases), routed, timed=False)
    else:
        plan = conditional_plan(model).chains[0]
        if harm is router_of_another_kind:
            router = some_router("mlp", 8, 4, None, np.random.default_rng(0))
            plan = replace(plan, router=router, router_kind="mlp")
        routed = IndexRoutedFFN.from_plan(plan, weights, biases)
        harm(routed)
        certificate = certify_chain(plan, weights, biases, routed, timed=False)
    assert routed.training
    names = {check.name for check in certificate.failures}
    if idle:  # which weights that were drawn show as well
        names = {name for name in names if "integers" not in name}
    assert names == failed


def test_outputs_that_are_no_numbers_or_of_another_shape_are_infinitely_wrong() -> None:
    """Whichever of several outputs they are in: of a comparison with NaN nothing comes."""
    one, nan = torch.ones(2), torch.tensor([1.0, float("nan")])
    for found in ((one, nan), (nan, one), (one, one[:1]), (one,)):
        assert _compare(found, (one, one))[0] == float("inf")
    assert _compare((one, 1.5 * one), (one, -one)) == (2.5, 1.0)


def test_what_is_cut_is_a_share_of_the_squares() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    plan = structural_plan(model)
    (chain,) = plan.chains
    weights, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    routed = RoutedChain.from_plan(chain, weights, biases)
    found = certify_operator(chain, named(chain.chain, weights, biases), routed, timed=False)
    outside = {
        name: (model.get_parameter(name).detach()[~plan.masks[name]] ** 2).sum() for name in ("0.weight", "2.weight")
    }
    expected = {name: float(cut / model.get_parameter(name).detach().square().sum()) for name, cut in outside.items()}
    assert found.dropped_mass == pytest.approx(expected)
    assert found.cut == found.dropped_mass
    plan.masks.apply(model)
    assert certify_operator(chain, named(chain.chain, weights, biases), routed, timed=False).cut == {}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["0.weight", "2.weight"])
def test_what_is_no_number_outside_of_blocks_is_cut(name: str, bad: float) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    plan = structural_plan(model).with_annealed(True)
    plan.masks.apply(model)
    weights = {own: weight.detach().numpy() for own, weight in model.named_parameters()}
    assert certify_plan(plan, weights, timed=False).passed
    outside = tuple((~plan.masks[name]).nonzero()[0])
    weights[name][outside] = bad
    found = certify_plan(plan, weights, timed=False)
    assert found.cut == {name: 1.0}
    assert [check.name for check in found.failures] == ["share of squared weights outside, where the stage left none"]


def test_refusals_leave_the_model_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    plan = structural_plan(model)
    with pytest.raises(errors.ModelMismatchError, match="no such linear module"):
        gradloc.route_model(nn.Linear(3, 3), plan)
    with pytest.raises(errors.ModelMismatchError, match="shapes"):
        gradloc.route_model(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), plan)
    bare = conditional_plan(model)
    bare = BlockPlan("conditional", (ChainPlan(bare.chains[0].chain, bare.chains[0].labels, 4, 2),), "none")
    with pytest.raises(errors.ConfigError, match="Annealer"):
        gradloc.route_model(model, bare)
    model[0].weight.data[0, 0] = float("inf")
    with pytest.raises(errors.NonFiniteError, match=r"0\.weight"):
        gradloc.route_model(model, plan)
    with pytest.raises(errors.ConfigError, match="kernel='fast'"):
        gradloc.route_model(model, plan, kernel="fast")
    fitting = {"0.weight": np.zeros((16, 8), "f4"), "2.weight": np.zeros((8, 16), "f4")}
    for other, said in (
        ({"0.weight": fitting["0.weight"]}, r"other weights: 2\.weight: the plan needs \(8, 16\), given nothing\."),
        (fitting | {"0.weight": np.zeros((2, 2), "f4")}, r"other weights: 0\.weight: the plan needs .*\(2, 2\)\."),
    ):
        with pytest.raises(errors.ModelMismatchError, match=said):
            certify_plan(plan, other)
    with pytest.raises(errors.ConfigError, match="the plan has no chain"):
        certify_plan(replace(plan, chains=()), fitting)


def test_the_kernel_of_the_nearest_count_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a graph for any number of tokens that of many."""
    table = KernelTable({1: "a", 16: "b", 256: "c"})
    assert [table.pick(count) for count in (0, 1, 3, 5, 63, 65, 10**6)] == ["a", "a", "a", "b", "b", "c", "c"]
    for name in ("is_exporting", "is_dynamo_compiling"):
        monkeypatch.setattr(torch.compiler, name, lambda: True)
    assert table.pick(1) == "c"


def test_the_fastest_kernel_is_kept_for_operators_that_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that go token by token aren't tried for many."""
    monkeypatch.setattr(kernel_choice, "_CACHE", {})
    tried: list[set[str]] = []

    def seconds(runs: dict[str, object], *_: object) -> dict[str, float]:
        tried.append(set(runs))
        return {kernel: {"loop": 1.0, "dense": 2.0, "bmm": 3.0}[kernel] for kernel in runs}

    monkeypatch.setattr(kernel_choice, "median_seconds", seconds)
    like, every = torch.zeros(1), ("bmm", "dense", "loop")

    def measured(key: str, like: torch.Tensor = like) -> kernel_choice.KernelTable:
        return kernel_choice.measure_kernels(
            lambda x, kernel: x, every, lambda count, generator: torch.zeros(count, 4), like, (key,)
        )

    found = measured("one")
    assert found.kernels == {1: "loop", 16: "loop", 256: "dense", 2048: "dense"}
    assert tried == [set(every), set(every), {"bmm", "dense"}, {"bmm", "dense"}]
    assert measured("one") is found
    assert measured("other") is not found
    assert measured("one", like.double()) is not found


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(1, 3), st.booleans(), st.integers(0, 10_000))
def test_layers_gather_and_scatter_as_plain_loops_do(width: int, blocks: int, once: bool, seed: int) -> None:
    """Also where as many places as units hold some units twice and others not at all."""
    random = np.random.default_rng(seed)
    every = random.permutation(width) if once else random.integers(0, width, width)
    members = np.split(every.astype(np.int64), np.sort(random.integers(0, width + 1, blocks - 1)))
    layer = UnitLayer(members, width, hidden=False, device=torch.device("cpu"))
    x, bias = torch.randn(2, width), torch.randn(width)
    order = np.concatenate(members).tolist()
    assert layer.gather(x).tolist() == [[row[unit] for unit in order] for row in x.tolist()]
    for own in (None, bias):
        expected = torch.zeros(2, width) if own is None else own.repeat(2, 1)
        for place, unit in enumerate(order):
            expected[:, unit] += x[:, place]
        torch.testing.assert_close(layer.scatter(x, own), expected)


def test_routed_linear_gives_isolated_outputs_their_bias() -> None:
    layer = RoutedLinear(
        torch.ones(3, 2), torch.tensor([1.0, 2.0, 3.0]), np.array([0, -1, 1]), np.array([0, 1]), blocks=2
    )
    assert layer(torch.tensor([[10.0, 20.0]])).tolist() == [[11.0, 2.0, 23.0]]


@pytest.mark.parametrize("kernel", CUDA_KERNELS)
def test_kernels_of_a_gpu_give_way_where_they_cannot_run(kernel: str) -> None:
    """A model that was measured on a GPU may be moved; and blocks that a process has are picked from outside, of some tokens none."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    fast = gradloc.route_model(model, conditional_plan(model), kernel="dense")
    x = torch.randn(5, 8)
    expected = fast(x)
    picks = torch.tensor(
        [[False] * 4, [True, False, False, False], [True] * 4, [False, True, True, False], [False] * 4]
    )
    of_picks = fast.run(x, "dense", picks)
    fast.kernel_table = KernelTable({1: kernel})
    torch.testing.assert_close(fast(x), expected)
    torch.testing.assert_close(fast.run(x, kernel, picks), of_picks)
    fast(x).sum().backward()
    assert float(fast.up_weight.grad.abs().sum()) > 0


def test_certificates_are_of_full_precision() -> None:
    """Convolutions on a GPU have TF32 unless told otherwise, and a user may have asked for it, or for bfloat16, elsewhere."""
    backends = torch.backends
    parts = {"cuda": (backends.cuda.matmul, backends.cudnn.conv), "cpu": (backends.mkldnn.matmul,)}
    torch.set_float32_matmul_precision("medium")
    held = {device: [part.fp32_precision for part in own] for device, own in parts.items()}
    try:
        for device, other in (("cuda", "cpu"), ("cpu", "cuda")):
            assert "ieee" not in held[device]
            with full_precision(device):
                assert {part.fp32_precision for part in parts[device]} == {"ieee"}
                assert [part.fp32_precision for part in parts[other]] == held[other]
            assert [part.fp32_precision for part in parts[device]] == held[device]
        model = nn.Sequential(nn.LayerNorm(64), nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)))
        assert gradloc.route_model(model, structural_plan(model)).certificate.passed
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_torchs_defaults_round_no_router(default: torch.dtype) -> None:
    """Under bfloat16 as the default, a router's weights went through it, and another block was picked."""
    weights = new_router("mlp", 8, 4, 6)
    try:
        torch.set_default_dtype(default)
        with torch.device("meta"):
            router = Router(weights, torch.zeros(1, dtype=torch.float32, device="cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(router.weights().weights, weights.weights, strict=True):
        np.testing.assert_array_equal(one, other)


class Nested(nn.Module):
    """Three networks, some of them wrapped, as with regional compilation and with checkpointing."""

    def __init__(self, wrap: bool, compiled: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Functional() for _ in range(3))
        if wrap:
            if compiled:
                self.blocks[0] = torch.compile(self.blocks[0], backend="eager")
            self.blocks[1] = checkpoint_wrapper(self.blocks[1])
            self.blocks[2].a = checkpoint_wrapper(self.blocks[2].a)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.filterwarnings("ignore:gradloc. firings are not recorded")
@pytest.mark.parametrize("kind", ["structural", "conditional"])
def test_parts_that_are_wrapped_by_themselves_are_planned_annealed_and_routed(kind: str, tmp_path) -> None:
    # Of a model with a compiled part no firings are recorded.
    model, plain = Nested(wrap=True, compiled=kind == "structural"), Nested(wrap=False)
    assert find_operators(model) == find_operators(plain)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    width = find_chains(plain)[0].widths[0]
    gradloc.wrap(optimizer, model, tmp_path / "run", every=1, flush_every=5, firing_tokens=64)
    for _ in range(10):
        model(torch.randn(32, width)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    settings = {"shuffles": 1} if kind == "structural" else {"keep": 0.5}
    plan = gradloc.plan_blocks(model, tmp_path / "run", kind=kind, blocks=2, **settings)
    assert [chain.chain.name for chain in plan.chains] == ["blocks.0", "blocks.1", "blocks.2"]
    annealer = gradloc.Annealer(model, optimizer, plan, steps=6)
    while not annealer.done:
        model(torch.randn(32, width)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        annealer.step()
    fast = gradloc.route_model(model, annealer.finish())
    x = torch.randn(5, width)
    model.eval(), fast.eval()
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    annealer.close()
    assert not any("_orig_mod" in name or "_wrapped" in name for name in fast.state_dict())
    dense = Nested(wrap=False)
    dense.load_state_dict(dense_state_dict(fast)[0])


@pytest.mark.usefixtures("joined")
@pytest.mark.parametrize("make", [conditional_plan, weighted_plan])
def test_a_routed_model_trains_in_replicas(make) -> None:
    """Picks alone give a router no gradient, for which replicas waited."""
    model = Functional().eval()
    replica = nn.parallel.DistributedDataParallel(gradloc.route_model(model, make(model)))
    for _ in range(3):
        replica(torch.randn(4, model.a.in_features)).sum().backward()


@pytest.mark.parametrize("make", [structural_plan, conditional_plan])
def test_what_is_frozen_stays_frozen(make) -> None:
    model = Functional().eval()
    plan = make(model)
    if plan.kind == "structural":
        plan.masks.apply(model)
    model.a.bias.requires_grad_(False)
    model.b.weight.requires_grad_(False)
    with torch.no_grad():
        fast = gradloc.route_model(model, plan)
    free = [name for name, p in fast.named_parameters() if p.requires_grad]
    held = ("up_weight", "down_bias") if plan.kind == "conditional" else ("tensors.a_weight", "tensors.b_bias")
    assert all(any(name.startswith(own) for own in held) for name in free)
    assert len(free) == 2


@pytest.mark.parametrize("make", [structural_plan, conditional_plan])
def test_routing_is_the_same_whatever_modes_are_set(make) -> None:
    model = Functional().eval()
    plan = make(model)
    if plan.kind == "structural":
        plan.masks.apply(model)
    x = torch.randn(7, model.a.in_features)
    expected = gradloc.route_model(model, plan)(x)
    for mode in (torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16)):
        drawn = torch.random.get_rng_state()
        with mode:
            fast = gradloc.route_model(model, plan)
        assert torch.equal(torch.random.get_rng_state(), drawn)
        torch.testing.assert_close(fast(x), expected)
        assert fast(x).requires_grad


def test_autocast_gives_the_dtype_that_dense_gives() -> None:
    model = Functional().eval()
    plan = structural_plan(model)
    plan.masks.apply(model)
    x = torch.randn(9, model.a.in_features)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = model(x)
        for kernel in gradloc.route_model(model, plan).kernels():
            found = gradloc.route_model(model, plan, kernel=kernel)(x)
            assert found.dtype == wanted.dtype == torch.bfloat16, kernel


@pytest.mark.parametrize("make", [structural_plan, conditional_plan])
def test_an_input_may_be_given_by_name(make) -> None:
    model = Functional().eval()
    fast = gradloc.route_model(model, make(model), certify=False)
    x = torch.randn(3, model.a.in_features)
    assert torch.equal(fast(x=x), fast(x))
    assert torch.equal(fast(hidden_states=x), fast(x))
    with pytest.raises(TypeError, match="one input, not 2"):
        fast(x, mask=x)
    with pytest.raises(TypeError, match="one input, not 0"):
        fast()


@pytest.mark.parametrize("make", [structural_plan, conditional_plan])
def test_states_that_are_not_of_these_blocks_are_refused(make) -> None:
    """Another plan's, whose weights belong to other units; and a dense model's, which without `strict` would change nothing."""
    model = nn.Sequential(Functional()).eval()
    inner = make(model[0])
    chain = inner.chains[0]
    named = next(c for c in find_chains(model) if c.name == "0")
    plan = replace(inner, chains=(replace(chain, chain=named),))
    fast = gradloc.route_model(model, plan, certify=False)
    fast.load_state_dict(copy.deepcopy(fast.state_dict()))
    labels = (chain.labels[0], np.roll(chain.labels[1], 1), chain.labels[2])
    other = replace(inner, chains=(replace(chain, chain=named, labels=labels),))
    with pytest.raises(RuntimeError, match="the state is of blocks of other units"):
        fast.load_state_dict(gradloc.route_model(model, other, certify=False).state_dict())
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="0: the state is of the dense model, this one is routed"):
            fast.load_state_dict(model.state_dict(), strict=strict)


@pytest.mark.parametrize("make", [structural_plan, conditional_plan])
def test_hooks_that_routing_leaves_behind_are_named(make) -> None:
    model = Functional().eval()
    plan = make(model)
    if plan.kind == "structural":
        plan.masks.apply(model)
    gradloc.route_model(model, plan)  # no warning
    model.a.register_forward_hook(lambda module, inputs, output: None)
    with pytest.warns(RuntimeWarning, match="hooks there don't run in the routed copy"):
        gradloc.route_model(model, plan)


def test_what_a_routed_model_came_from_is_seen_through_wrappers() -> None:
    model = Functional().eval()
    fast = gradloc.route_model(model, conditional_plan(model))
    state, _ = dense_state_dict(torch.compile(fast, backend="eager"))
    assert {name: tuple(t.shape) for name, t in state.items()} == {
        n: tuple(t.shape) for n, t in model.state_dict().items()
    }


@pytest.mark.usefixtures("joined")
def test_weights_without_values_or_on_other_processes_are_refused() -> None:
    model = Functional().eval()
    plan = conditional_plan(model)
    with pytest.raises(errors.UnsupportedError, match="is on the meta device"):
        gradloc.route_model(copy.deepcopy(model).to("meta"), plan)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    sharded = torch.distributed.fsdp.fully_shard(copy.deepcopy(model), mesh=mesh)
    with pytest.raises(errors.UnsupportedError, match=r"is split over processes\. Gather the weights"):
        gradloc.route_model(sharded, plan)


def test_a_forward_that_was_bound_to_the_model_runs_the_copys_blocks() -> None:
    """As Accelerate binds one; of a model with a wrapped part the copy had run the dense modules, and its certificate passed."""
    model = Nested(wrap=True).eval()
    model.forward = types.MethodType(Nested.forward, model)
    chains = [c for c in find_chains(Nested(wrap=False)) if c.name == "blocks.0"]
    (planned,) = conditional_plan(Functional()).chains
    plan = BlockPlan("conditional", (replace(planned, chain=chains[0]),), "none")
    fast = gradloc.route_model(model, plan)
    x = torch.randn(5, 4)
    before = fast(x)
    with torch.no_grad():
        fast.blocks[0].down_bias.add_(1.0)
    assert not torch.allclose(fast(x), before)


def test_a_part_that_is_compiled_after_routing_leaves_the_way_back() -> None:
    model = Nested(wrap=False).eval()
    chains = [c for c in find_chains(model) if c.name == "blocks.0"]
    (planned,) = conditional_plan(Functional()).chains
    fast = gradloc.route_model(model, BlockPlan("conditional", (replace(planned, chain=chains[0]),), "none"))
    fast.blocks[1] = torch.compile(fast.blocks[1], backend="eager")
    model.load_state_dict(dense_state_dict(fast)[0])
