"""Networks of pointwise convolutions, routed for each place, against the same for one place after another."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import gradloc
from gradloc import errors
from gradloc.cli.main import main
from gradloc.core.operators import OperatorChain
from gradloc.core.places import as_tokens, example_places, from_tokens, place_count
from gradloc.core.plan import HUB, BlockPlan, ChainPlan
from gradloc.core.router import RouterWeights
from gradloc.route.certificate import certify_plan
from gradloc.route.conditional import IndexRoutedFFN
from gradloc.route.find import find_operators
from gradloc.route.kernel_choice import KernelTable
from tests.oracles.places import at_each_place, tokens_of
from tests.oracles.routing import gated_ffn
from tests.route.test_routed import (
    sabotage_index,
    sabotage_output,
    sabotage_picks,
    sabotage_router,
    sabotage_weight,
    some_router,
)

D, H = 8, 18
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIDES = (4, 3, 2)


def pair(dims: int = 2, activation: type[nn.Module] = nn.GELU) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(CONVS[dims](D, H, 1), activation(), CONVS[dims](H, D, 1))


class Mlp(nn.Module):
    """As Metaformers have it: one dropout in two places, and a norm that is none."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.norm, self.act, self.fc2 = nn.Conv2d(D, H, 1), nn.Identity(), nn.GELU(), nn.Conv2d(H, D, 1)
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.norm(self.fc1(x))))))


class Spelled(nn.Module):
    """As ConvNeXt writes it, in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm = nn.Conv2d(D, D, 3, padding=1, groups=D), nn.GroupNorm(1, D)
        self.up, self.act, self.down = nn.Conv2d(D, H, 1), nn.GELU(), nn.Conv2d(H, D, 1)
        self.scale = nn.Parameter(torch.full((D, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(self.act(self.up(self.norm(self.mix(x)))))


def in_a_row() -> nn.Module:
    mix = nn.Conv2d(D, D, 3, padding=1, groups=D)
    return nn.Sequential(mix, nn.BatchNorm2d(D), nn.Conv2d(D, H, 1), nn.GELU(), nn.Conv2d(H, D, 1))


MADE = {"pair": pair, "mlp": Mlp, "spelled out": Spelled, "in a row": in_a_row}
EVERY = pytest.mark.parametrize("make", MADE.values(), ids=MADE)


def chain_of(model: nn.Module) -> OperatorChain:
    (chain,) = [chain for chain in find_operators(model)[0] if chain.conditional_reason is None]
    return chain


def plan_of(model: nn.Module, active: int = 2, weighted: bool = True) -> BlockPlan:
    """Four blocks of four hidden units, and a hub of two."""
    random = np.random.default_rng(0)
    router = RouterWeights.linear(random.normal(size=(4, D)), random.normal(size=4), weighted=weighted)
    labels, hub = random.permutation(np.r_[np.arange(16) % 4, HUB, HUB]), np.full(D, HUB)
    plan = ChainPlan(chain_of(model), (hub, labels, hub), 4, active, router=router, weighted=weighted)
    return BlockPlan("conditional", (plan,), "none")


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(0, 3), st.lists(st.integers(1, 4), min_size=3, max_size=3), st.integers(0, 2))
def test_places_are_tokens_one_after_another(dims: int, batch: int, sides: list[int], layout: int) -> None:
    shape = (*([batch] if batch else []), 3, *sides[:dims])
    x = torch.arange(float(np.prod(shape))).reshape(shape)
    x = (x, x.movedim(-1 - dims, -1).contiguous().movedim(-1, -1 - dims), x.flip(-1).transpose(-1, -dims))[layout]
    tokens = as_tokens(x, dims)
    assert torch.equal(tokens, tokens_of(x, dims))
    assert place_count(x, dims) == len(tokens)
    assert torch.equal(from_tokens(tokens, x, dims), x)
    if batch:
        count, *sizes = example_places(len(tokens), dims)
        assert len(sizes) == dims
        assert 0.5 * len(tokens) <= count * np.prod(sizes) <= 2 * len(tokens) + 1


@pytest.mark.parametrize("dims", CONVS)
@pytest.mark.parametrize(("threshold", "weighted"), [(None, False), (0.3, False), (None, True)])
def test_every_kernel_equals_the_gated_reference_at_each_place(
    dims: int, threshold: float | None, weighted: bool
) -> None:
    """Exactly, on integers that count once."""
    torch.manual_seed(0)
    random = np.random.default_rng(dims)
    up, up_bias, down, down_bias = (
        torch.randint(-3, 4, shape).double() for shape in ((H, D), (H,), (5, H), (5,))
    )  # fmt: skip
    labels = random.permutation(np.r_[np.arange(16) % 4, HUB, HUB])
    router = some_router("linear", D, 4, threshold, random, weighted)
    routed = IndexRoutedFFN([up], [up_bias], down, down_bias, "relu", labels, 4, 2, router, dims=dims).eval()
    assert "conv" in routed.kernels()

    def gated(token: Tensor) -> Tensor:
        return gated_ffn(token, [up], [up_bias], down, down_bias, labels, router, 2)

    for shape in ((2, D, *SIDES[:dims]), (D, *SIDES[:dims])):
        x = torch.randint(-4, 5, shape).double()
        expected = at_each_place(x, dims, gated, 5)
        for kernel in routed.kernels():
            routed.kernel_table = KernelTable({1: kernel})
            for found in (
                routed(x),
                routed.through(x, kernel),
                from_tokens(routed.run(as_tokens(x, dims), kernel), x, dims),
            ):
                if weighted:
                    torch.testing.assert_close(found, expected, msg=lambda m, k=kernel: f"{k}: {m}")
                else:
                    assert torch.equal(found, expected), kernel


@pytest.mark.parametrize("kernel", ["conv", "padded"])
def test_outputs_lie_in_memory_as_a_convolutions_do(kernel: str) -> None:
    images = torch.randn(2, D, 4, 3)
    nhwc = torch.channels_last
    inputs = (
        images,
        images.to(memory_format=nhwc),
        images.transpose(2, 3),
        images[0],
        images.to(memory_format=nhwc)[0],
    )
    fast = gradloc.route_model(pair(), plan_of(pair()), kernel=kernel, certify=False)
    for x in inputs:
        assert fast(x).stride() == pair()(x).stride()
    rows = torch.randn(2, 5, D).transpose(1, 2)  # as networks of sequences hand them over
    model = pair(1)
    fast = gradloc.route_model(model, plan_of(model), kernel=kernel, certify=False)
    assert fast(rows).stride() == model(rows).stride()
    assert fast(rows[:0]).shape == (0, D, 5)
    model = pair(3)
    fast = gradloc.route_model(model, plan_of(model), kernel=kernel, certify=False)
    x = torch.randn(2, D, 2, 3, 4).to(memory_format=torch.channels_last_3d)
    assert fast(x).stride() == model(x).stride()


def norms_between() -> nn.Module:
    return nn.Sequential(nn.Conv2d(D, H, 1), nn.BatchNorm2d(H), nn.ReLU(), nn.Conv2d(H, D, 1))


def test_what_is_no_network_of_each_place_says_why() -> None:
    conv = nn.Conv2d
    told = {
        "kernel 1 and stride 1 without padding .* 0 isn't": nn.Sequential(conv(D, H, 3, padding=1), nn.GELU(), conv(H, D, 1)),
        "kernel 1 and stride 1 without padding .* 2 isn't": nn.Sequential(conv(D, H, 1), nn.GELU(), conv(H, D, 1, stride=2)),
        "without padding are .* 0 isn't": nn.Sequential(conv(D, H, 1, padding=1), nn.GELU(), conv(H, D, 1)),
        "norm between": norms_between(),
        "what follows belongs outside": nn.Sequential(*pair(), nn.BatchNorm2d(D)),
        "what follows belongs": nn.Sequential(*pair(), nn.ReLU()),
        "no activation between": nn.Sequential(conv(D, H, 1), conv(H, D, 1)),
        "one hidden layer .* this one is conv": nn.Sequential(*pair(), nn.GELU(), conv(D, D, 1)),
    }  # fmt: skip
    for reason, model in told.items():
        (chain,) = find_operators(model)[0]
        with pytest.raises(AssertionError, match=reason):
            assert chain.conditional_reason is None, chain.conditional_reason
        ends = [np.full(width, HUB) for width in chain.widths]
        plan = ChainPlan(chain, tuple(np.zeros(w, int) if i == 1 else e for i, (w, e) in enumerate(zip(chain.widths, ends, strict=True))), 1, 1)  # fmt: skip
        with pytest.raises(errors.UnsupportedError, match=reason):
            gradloc.route_model(model, BlockPlan("conditional", (plan,), "none"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(errors.UnsupportedError, match=reason):
            gradloc.Annealer(model, optimizer, BlockPlan("conditional", (plan,), "none"), steps=2)
    same = nn.Sequential(conv(D, H, 1, padding="same", dilation=2), nn.Tanh(), conv(H, D, 1, padding="valid"))
    assert chain_of(same).dims == 2
    for left in (conv(D, H, 1, groups=2), conv(D, H, 1, padding_mode="reflect"), nn.ConvTranspose2d(D, H, 1)):
        assert not [c for c in find_operators(nn.Sequential(left, nn.GELU(), conv(H, D, 1)))[0] if c.conditional_reason is None]  # fmt: skip
    early = nn.Sequential(conv(D, H, 1), nn.Dropout(0.1), nn.GELU(), conv(H, D, 1))
    assert [len(c.operators) for c in find_operators(early)[0]] == [1, 1]


def test_dropout_makes_one_network_only_where_places_do_not_see_one_another() -> None:
    model = nn.Sequential(nn.Conv2d(D, H, 3), nn.GELU(), nn.Dropout(0.1), nn.Conv2d(H, D, 1))
    assert [c.operators for c in find_operators(model)[0]] == [("0",), ("3",)]
    drops = Mlp(0.5).train()
    labels = tuple(np.arange(width) % 2 for width in (D, H, D))
    blocks = BlockPlan("structural", (ChainPlan(chain_of(drops), labels, 2),), "none")
    blocks.masks.apply(drops)
    for plan in (blocks, plan_of(drops)):
        fast = gradloc.route_model(drops, plan, kernel="dense")
        assert fast.dropouts == (0.0, 0.5, 0.5)
        x = torch.ones(2, D, 16, 16)
        found = fast(x)
        assert 0.4 < float((found == 0).float().mean()) < 0.6
        assert torch.equal(fast.eval()(x), fast(x))
        if plan is blocks:
            torch.testing.assert_close(fast(x), drops.eval()(x))
            drops.train()


@EVERY
@pytest.mark.parametrize("training", [False, True])
def test_all_blocks_equal_the_dense_model_and_some_the_gated_one(make: Any, training: bool) -> None:
    torch.manual_seed(0)
    model = make().train(training)
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, D, 5, 6)
    torch.testing.assert_close(gradloc.route_model(model, plan_of(model, 4, False), certify=False)(x), model(x))
    model.load_state_dict(before)  # a norm in training has counted a batch
    plan = plan_of(model)
    fast = gradloc.route_model(model, plan, certify=not training)
    chain, router = plan.chains[0], plan.chains[0].router
    up, down = (model.get_submodule(name) for name in chain.chain.operators)
    seen: list[Tensor] = []

    def shut(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        scores = seen[0].movedim(1, -1) @ torch.from_numpy(router.weights[0]).T + torch.from_numpy(router.biases[0])
        picks = torch.zeros_like(scores).scatter(-1, scores.topk(2, -1).indices, 1.0) * 2 * torch.sigmoid(scores)
        gates = torch.cat([picks, torch.ones_like(picks[..., :1])], -1)[..., chain.labels[1] % 6]  # the hub is -2
        return (inputs[0] * gates.movedim(-1, 1),)

    assert HUB % 6 == 4
    handles = [
        up.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0])),
        down.register_forward_pre_hook(shut),
    ]
    expected = model(x)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(fast(x), expected)


@EVERY
def test_it_trains_copies_pickles_and_goes_back(make: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make()
    plan = BlockPlan.load(plan_of(model).save(tmp_path / "plan.safetensors"))
    fast = gradloc.route_model(model, plan, certify=False)
    state, again = gradloc.dense_state_dict(fast)
    assert again.chains[0].chain == chain_of(model)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert state.keys() == model.state_dict().keys()
    x = torch.randn(2, D, 5, 6).to(memory_format=torch.channels_last)
    fast(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in fast.get_submodule(plan.chains[0].chain.name).parameters())
    torch.optim.SGD(fast.parameters(), lr=0.01).step()
    fast.eval()
    other = gradloc.route_model(model, plan, certify=False).eval()
    assert not torch.allclose(other(x), fast(x))
    other.load_state_dict(fast.state_dict())
    for same in (other, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        torch.testing.assert_close(same(x), fast(x))


@pytest.mark.parametrize("make", [pair, lambda: nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D))])
def test_autocast_gives_one_dtype_whatever_the_kernel(make: Any) -> None:
    model = make()
    shape = (2, D, 3, 3) if isinstance(model[0], nn.Conv2d) else (5, D)
    fast = gradloc.route_model(model, plan_of(model), certify=False)
    with torch.autocast("cpu", torch.bfloat16):
        for kernel in fast.kernels():
            fast.kernel_table = KernelTable({1: kernel})
            for x in (torch.ones(shape), torch.ones(shape, dtype=torch.bfloat16)):
                found, dense = fast(x), fast.through(x, "dense")
                assert found.dtype == model(x).dtype == torch.bfloat16
                torch.testing.assert_close(found, dense, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kernel", ["batched", "conv"])
def test_it_compiles_to_one_graph(kernel: str) -> None:
    fast = gradloc.route_model(pair(), plan_of(pair()), kernel=kernel, certify=False).eval()
    torch._dynamo.reset()
    x = torch.randn(2, D, 5, 6).to(memory_format=torch.channels_last)
    with torch.no_grad():
        compiled, expected = torch.compile(fast, backend="aot_eager", fullgraph=True)(x), fast(x)
    torch.testing.assert_close(compiled, expected)
    assert compiled.stride() == expected.stride()


@pytest.mark.parametrize("kernel", ["measured", "conv"])
def test_it_is_exported_for_any_number_of_places(kernel: str) -> None:
    fast = gradloc.route_model(pair(), plan_of(pair()), kernel=kernel, certify=False).eval()
    dynamic = ({0: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(fast, (torch.randn(2, D, 5, 6),), dynamic_shapes=dynamic).module()
    for shape in ((2, D, 5, 6), (3, D, 5, 7)):
        images = torch.randn(shape)
        torch.testing.assert_close(exported(images), fast(images))


def test_dense_is_what_the_model_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of convolutions is measured beside the others, and the certificate's dense side is convolutions."""
    ran: list[tuple[int, ...]] = []
    conv2d = F.conv2d

    def count(x: Tensor, *more: Any, **named: Any) -> Tensor:
        ran.append(tuple(x.shape))
        return conv2d(x, *more, **named)

    monkeypatch.setattr("gradloc.route.certificate.F.conv2d", count)
    monkeypatch.setattr("gradloc.route.conditional.CONVOLVE", {2: count})
    monkeypatch.setattr("gradloc.route.kernel_choice._CACHE", {})
    fast = gradloc.route_model(pair(), plan_of(pair()), certify=False)
    assert all("conv" in seconds for seconds in fast.kernel_table.seconds.values())
    assert {(1, D, 1, 1), (8, D, 16, 16)} <= set(ran)
    ran.clear()
    fast = gradloc.route_model(pair(), plan_of(pair()), kernel="dense")
    assert {(1, D, 1, 1), (8, D, 16, 16)} <= set(ran)
    assert {item.kernel for item in fast.certificate.latency} == {"dense"}
    with pytest.raises(errors.ConfigError, match="kernel='conv' can't run"):
        ffn = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D))
        gradloc.route_model(ffn, plan_of(ffn), kernel="conv")


@pytest.mark.parametrize("harm", [sabotage_picks, sabotage_index, sabotage_output, sabotage_weight, sabotage_router])
def test_sabotage_fails_the_certificate(harm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pair()
    plan = plan_of(model)
    arrays = {name: tensor.detach().numpy() for name, tensor in model.named_parameters()}
    assert certify_plan(plan, arrays, timed=False).passed
    make = IndexRoutedFFN.from_plan

    def harmed(*given: Any) -> IndexRoutedFFN:
        routed = make(*given)
        harm(routed)
        return routed

    monkeypatch.setattr(IndexRoutedFFN, "from_plan", harmed)
    with pytest.raises(errors.CertificateError):
        gradloc.route_model(model, plan)
    assert not certify_plan(plan, arrays, timed=False).passed


def test_places_in_another_order_fail_the_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    def turned(tokens: Tensor, like: Tensor, dims: int = 0) -> Tensor:
        found = from_tokens(tokens, like, dims)
        return found.flip(-1) if dims else found

    monkeypatch.setattr("gradloc.route.conditional.from_tokens", turned)
    with pytest.raises(errors.CertificateError, match="batch shapes"):
        gradloc.route_model(pair(), plan_of(pair()))


@pytest.mark.parametrize("count", [1, 3])
def test_blocks_over_devices_equal_the_whole(count: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, D, 1), pair()).double()
    plan = plan_of(model)
    whole = gradloc.route_model(model, plan)
    spread = gradloc.spread_over_devices(copy.deepcopy(whole), ["cpu"] * count)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    for shape in (x, x.to(memory_format=torch.channels_last), x[0]):
        torch.testing.assert_close(spread(shape), whole(shape))
        assert spread(shape).stride() == whole(shape).stride()


class Digits(nn.Module):
    """A small ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.mix = nn.Conv2d(1, 12, 2, stride=2), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.norm, self.ffn = nn.GroupNorm(1, 12), nn.Sequential(nn.Conv2d(12, 48, 1), nn.GELU(), nn.Conv2d(48, 12, 1))
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        x = x + self.ffn(self.norm(self.mix(x)))
        return self.head(x.mean((-2, -1)))


def test_real_images_from_record_to_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits = load_digits()
    x, y = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None], torch.tensor(digits.target)
    torch.manual_seed(0)
    model = Digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step() -> None:
        rows = torch.randint(1500, (32,))
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()

    gradloc.wrap(optimizer, model, run=tmp_path / "run", every=2, flush_every=5, firing_tokens=16)
    for _ in range(30):
        step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    plan = gradloc.plan_blocks(model, tmp_path / "run", kind="conditional", blocks=8)
    assert [chain.chain.name for chain in plan.chains] == ["ffn"]
    assert "kernel" not in plan.description["skipped"]["patches"]
    annealer = gradloc.Annealer(model, optimizer, plan, steps=30)
    for _ in range(30):
        step()
        annealer.step()
        optimizer.zero_grad()
    finished = annealer.finish()
    assert annealer.exact
    fast = gradloc.route_model(model.eval(), finished)
    assert fast.certificate.passed
    held_out = x[1500:]
    with torch.no_grad():
        torch.testing.assert_close(fast(held_out), model(held_out), rtol=1e-4, atol=1e-5)
        gated = float(F.cross_entropy(model(held_out), y[1500:]))
        annealer.close()
        assert gated != float(F.cross_entropy(model(held_out), y[1500:]))
        assert float(F.cross_entropy(fast(held_out), y[1500:])) == pytest.approx(gated, rel=1e-4)
    state, again = gradloc.dense_state_dict(fast)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    words = [f"plan={again.save(tmp_path / 'p.safetensors')}", f"weights={tmp_path}/w.safetensors"]
    assert main(["verify", *words]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "passed"
    chains = tuple(replace(c, chain=replace(c.chain, activations=("gelu", "relu"))) for c in again.chains)
    with pytest.raises(errors.UnsupportedError, match="what follows belongs"):
        gradloc.route_model(model, replace(again, chains=chains))


def test_a_kernel_that_small_inputs_do_not_need_is_certified_too(monkeypatch: pytest.MonkeyPatch) -> None:
    convolved = IndexRoutedFFN._convolved

    def turned(routed: IndexRoutedFFN, x: Tensor, gates: Tensor) -> Tensor:
        return convolved(routed, x, gates).flip(-1)  # the row of tokens that have no places is one wide

    monkeypatch.setattr(IndexRoutedFFN, "_convolved", turned)
    with pytest.raises(errors.CertificateError, match="batch shapes"):
        gradloc.route_model(pair(), plan_of(pair()), kernel="dense")
