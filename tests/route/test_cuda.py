"""Routing and annealing on a GPU; reported as skipped elsewhere."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import _pytree

import gradloc
from gradloc.core.activations import ACTIVATIONS
from gradloc.core.plan import HUB, BlockPlan
from gradloc.route.conditional import CUDA_KERNELS, LOOKING_KERNELS, MOST_BLOCKS, IndexRoutedFFN
from gradloc.route.find import find_operators
from gradloc.route.lanes import side_by_side
from tests.anneal.test_training_loops import target
from tests.conftest import make_net
from tests.distributed.route_worker import conditional
from tests.oracles.routing import gated_ffn
from tests.route.operator_cases import CASES, draw_labels
from tests.route.test_operators import close, planned, routed_model, routed_of
from tests.route.test_routed import conditional_plan, integers, some_router, structural_plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@contextlib.contextmanager
def never_waiting() -> Iterator[None]:
    """Whatever waits for the device raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("equal", [True, False])
def test_every_operator_equals_its_masked_module(name: str, equal: bool) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    module = case.make(4, True).double().eval()
    (operator,), _ = find_operators(module)
    plan = planned(module, draw_labels(operator.widths, 2, 5, equal))
    expected = case.twin(module, list(plan.labels))(*(inputs := case.inputs(module)))
    module.cuda()
    inputs = _pytree.tree_map(lambda x: x.cuda() if isinstance(x, torch.Tensor) else x, inputs)
    routed = routed_of(plan, module)[0].eval()
    for kernel in routed.kernels():
        found = routed.run(*inputs, kernel=kernel)
        close(_pytree.tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, found), expected)
    fast = routed_model(plan, module)
    assert fast.certificate.passed


def network(
    dtype: torch.dtype, blocks: int = 4, size: int = 16, hub: int = 8, projections: int = 1, active: int = 2, width: int = 24,
    weighted: bool = False,
) -> tuple[IndexRoutedFFN, tuple[object, ...]]:  # fmt: skip
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    hidden = blocks * size + hub
    label = random.permutation(np.r_[np.arange(blocks * size) % blocks, np.full(hub, HUB)])
    ups, biases = ([integers(-1, 1, hidden, *more) for _ in range(projections)] for more in ((width,), ()))
    down, down_bias = integers(-1, 1, width, hidden), integers(-1, 1, width)
    router = some_router("linear", width, blocks, None, random, weighted)
    routed = IndexRoutedFFN(ups, biases, down, down_bias, "relu", label, blocks, active, router)
    routed = routed.to("cuda", dtype).requires_grad_().eval()
    routed.router.to(torch.promote_types(dtype, torch.float32))  # as a plan's is: of rounded scores many are equal
    return routed, (ups, biases, down, down_bias, label, router, active)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("projections", [1, 2])
@pytest.mark.parametrize("hub", [0, 8])
@pytest.mark.parametrize("tokens", [1, 7, 130])
@pytest.mark.parametrize("weighted", [False, True])
def test_every_conditional_kernel_equals_the_gated_reference(
    dtype: torch.dtype, projections: int, hub: int, tokens: int, weighted: bool
) -> None:
    routed, parts = network(dtype, hub=hub, projections=projections, weighted=weighted)
    assert ("grouped" in routed.kernels()) == (dtype == torch.bfloat16)
    assert "slices" in routed.kernels()
    x = integers(-1, 1, tokens, 24)
    given = x.to("cuda", dtype)
    with torch.no_grad():
        gates = routed.gates(given)
        for kernel in routed.kernels():
            if dtype == torch.bfloat16:  # whose picks may be others than the reference's
                limits = {"rtol": 0.05, "atol": 1.0}
                torch.testing.assert_close(routed.run(given, kernel), routed.run(given, "dense", gates), **limits)
            else:  # integers are exact, what a block's weight makes of them isn't
                limits = {"rtol": 1e-5, "atol": 1e-4} if weighted and dtype == torch.float32 else {}
                torch.testing.assert_close(routed.run(given, kernel).double().cpu(), gated_ffn(x, *parts), **limits)


@pytest.mark.parametrize("size", [1, 5, 130])
def test_slices_read_blocks_of_any_size(size: int) -> None:
    routed, parts = network(torch.float64, blocks=3, size=size, hub=1, width=521, projections=2)
    x = integers(-2, 2, 5, 521)
    with torch.no_grad():
        assert torch.equal(routed.run(x.cuda(), "slices").cpu(), gated_ffn(x, *parts))


def test_a_grouped_product_trains() -> None:
    routed, _ = network(torch.bfloat16, projections=2, weighted=True)
    x = torch.randn(64, 24, device="cuda", dtype=torch.bfloat16)
    gradients = []
    for kernel in ("grouped", "dense"):
        own = copy.deepcopy(routed)
        own.run(x, kernel).float().square().sum().backward()
        learnt = (own.up_weight, own.down_weight, own.router.layers[0].weight)
        gradients.append([parameter.grad.float() for parameter in learnt])
    for one, other in zip(*gradients, strict=True):
        assert float((one - other).norm() / other.norm()) < 0.02


@pytest.mark.parametrize("kernel", [*CUDA_KERNELS, "dense", "batched"])
def test_kernels_of_a_gpu_never_wait_for_it(kernel: str) -> None:
    routed, _ = network(torch.bfloat16)
    x = torch.randn(16, 24, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        routed.run(x, kernel)
        with never_waiting():
            routed.run(x, kernel)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = routed.run(x, kernel)
        x.copy_(torch.randn(16, 24))
        graph.replay()
        torch.testing.assert_close(found, routed.run(x, kernel), rtol=0.02, atol=0.05)


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.parametrize("kernel", CUDA_KERNELS)
def test_they_compile_to_one_graph(kernel: str) -> None:
    model = nn.Sequential(nn.LayerNorm(32), nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)))
    model = model.to("cuda", torch.bfloat16)
    fast = gradloc.route_model(model, conditional_plan(model), kernel=kernel)
    assert fast.certificate.passed
    assert kernel not in LOOKING_KERNELS
    x = torch.randn(8, 32, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(fast, fullgraph=True)(x), fast(x), rtol=0.05, atol=0.05)


def test_slices_give_way_to_training() -> None:
    routed, _ = network(torch.float32)
    routed.train()
    routed.kernel_table.kernels.update(dict.fromkeys(routed.kernel_table.kernels, "slices"))
    routed(torch.randn(3, 24, device="cuda")).sum().backward()
    assert float(routed.up_weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_routed_certified_and_saved(dtype: torch.dtype, tmp_path) -> None:
    model = nn.Sequential(nn.LayerNorm(32), nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)))
    model = model.to("cuda", dtype)
    plan = conditional_plan(model)
    fast = gradloc.route_model(model, BlockPlan.load(plan.save(tmp_path / "plan.safetensors")))
    assert fast.certificate.passed
    assert {p.device.type for p in fast.parameters()} == {"cuda"}
    names = {check.name.split(":")[0] for check in fast.certificate.checks}
    assert "slices" in names
    fast(torch.randn(3, 32, device="cuda", dtype=dtype)).sum().backward()


@pytest.mark.parametrize("make", [conditional_plan, structural_plan])
def test_a_users_tf32_is_no_fault_of_the_blocks(make) -> None:
    model = nn.Sequential(
        nn.LayerNorm(512), nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 512))
    ).cuda()
    torch.set_float32_matmul_precision("high")
    try:
        assert gradloc.route_model(model, make(model)).certificate.passed
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_lanes_are_streams() -> None:
    x = torch.randn(256, 256, device="cuda")
    seen = []

    def job(number: int) -> torch.Tensor:
        seen.append(torch.cuda.current_stream().cuda_stream)
        return x @ x + number

    found = side_by_side([lambda n=n: job(n) for n in range(3)], x)
    assert len(set(seen)) == 3
    for number, value in enumerate(found):
        torch.testing.assert_close(value, x @ x + number)


@pytest.mark.parametrize("kind", ["masks", "conditional"])
def test_an_annealing_step_never_waits_for_the_device(kind: str) -> None:
    model, _ = make_net()
    model.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    batches = [torch.randint(11, (8, 33), generator=torch.Generator().manual_seed(i)).cuda() for i in range(20)]
    annealer = gradloc.Annealer(model, optimizer, target(kind), steps=20)

    def step(tokens: torch.Tensor) -> None:
        logits = model(tokens[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        annealer.step()
        optimizer.zero_grad()

    for tokens in batches[:2]:
        step(tokens)
    with never_waiting():
        for tokens in batches[2:18]:
            step(tokens)
    for tokens in batches[18:]:
        step(tokens)
    result = annealer.finish()
    assert annealer.exact
    if kind == "conditional":
        fast = gradloc.route_model(model, result)
        model.eval(), fast.eval()
        with torch.no_grad():
            torch.testing.assert_close(fast(batches[0]), model(batches[0]), rtol=1e-3, atol=1e-3)
    annealer.close()


def test_mixed_precision_anneals_to_a_routed_model() -> None:
    model, _ = make_net()
    model.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    annealer = gradloc.Annealer(model, optimizer, target("conditional"), steps=12)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**24)  # the first steps overflow
    for number in range(12):
        tokens = torch.randint(11, (8, 33), generator=torch.Generator().manual_seed(number)).cuda()
        with torch.autocast("cuda", torch.float16):
            logits = model(tokens[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        annealer.step()
        optimizer.zero_grad()
    plan = annealer.finish()
    annealer.close()
    assert all(np.isfinite(w).all() for w in plan.chains[0].router.weights)
    assert gradloc.route_model(model, plan).certificate.passed


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("kernel", CUDA_KERNELS)
def test_activations_of_fused_kernels_are_those_of_torch(name: str, kernel: str) -> None:
    routed, _ = network(torch.bfloat16, projections=2)
    routed.activation, routed._function = name, ACTIVATIONS[name]
    x = torch.randn(40, 24, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        found, expected = (routed.run(x, k).float() for k in (kernel, "dense"))
        assert float((found - expected).norm() / expected.norm()) < 0.02
        x[7, 3] = torch.nan
        assert routed.run(x, kernel)[7].isnan().all(), "what has diverged must not look healthy"


@pytest.mark.parametrize("spoil", ["hook", "layer", "strides"])
def test_what_stands_in_a_networks_or_routers_place_is_run(spoil: str) -> None:
    routed, _ = network(torch.float32)
    x = torch.randn(5, 24, device="cuda")
    layer = routed.router.layers[0]
    if spoil == "hook":
        layer.register_forward_hook(lambda module, inputs, output: -output)
    elif spoil == "layer":
        routed.router.layers[0] = nn.Linear(24, 4, device="cuda")
    else:
        routed.up_weight.data = routed.up_weight.data.t().contiguous().t()
        layer.weight.data = layer.weight.data.t().contiguous().t()
    with torch.no_grad():
        torch.testing.assert_close(routed.run(x, "slices"), routed.run(x, "dense"), rtol=1e-4, atol=1e-4)


def test_more_blocks_than_a_program_can_rank_go_another_way() -> None:
    routed, _ = network(torch.float32, blocks=MOST_BLOCKS + 1, size=8)
    assert "slices" not in routed.kernels()
    routed, _ = network(torch.bfloat16, blocks=MOST_BLOCKS + 1, size=8)
    x = torch.randn(40, 24, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(routed.run(x, "grouped"), routed.run(x, "dense"), rtol=0.05, atol=0.5)


def test_blocks_over_a_gpu_and_a_cpu_equal_the_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 23), nn.ReLU(), nn.Linear(23, 6))).cuda()
    whole = gradloc.route_model(model, conditional(model, None))
    spread = gradloc.spread_over_devices(copy.deepcopy(whole), ["cuda", "cpu"])
    x = torch.randn(40, 6, device="cuda")
    found = spread(x)
    assert found.is_cuda
    torch.testing.assert_close(found, whole(x), rtol=1e-4, atol=1e-5)
    found.square().sum().backward()
    assert all(p.grad is not None for p in spread.parameters() if p.requires_grad)
