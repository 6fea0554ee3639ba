"""Routed operators in exported graphs: `torch.export`, `torch.compile`, and ONNX run by ONNX Runtime."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree

import gradloc
from gradloc.core.plan import HUB, BlockPlan, ChainPlan
from gradloc.core.router import RouterWeights
from gradloc.route.conditional import CONDITIONAL_KERNELS, LOOKING_KERNELS
from gradloc.route.find import find_operators
from tests.route.operator_cases import CASES, SwiGLU
from tests.route.test_operators import planned, routed_model

ANY_NUMBER = {0: torch.export.Dim.DYNAMIC}
"""Of tokens."""


class Residual(nn.Module):
    """A feed-forward network within something larger, as in a transformer."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.norm, self.ffn = nn.LayerNorm(6), SwiGLU(6, 18, True) if gated else _plain()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(self.norm(x))


def _plain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 18), nn.GELU(), nn.Linear(18, 6), nn.Dropout(0.1))


def conditional(
    kernel: str, gated: bool, threshold: float | None, equal: bool = True, weighted: bool = True
) -> nn.Module:
    """Four blocks of four hidden units and a hub of two, or blocks of other sizes, of which one is empty."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    model = Residual(gated).eval()
    chain = next(o for o in find_operators(model)[0] if o.kind in ("chain", "gated"))
    hidden = np.r_[np.arange(16) % 4, HUB, HUB] if equal else np.r_[random.integers(0, 3, 16), HUB, HUB]
    router = RouterWeights.linear(random.normal(size=(4, 6)), random.normal(size=4), threshold, weighted)
    hub = np.full(6, HUB)
    plan = ChainPlan(chain, (hub, random.permutation(hidden), hub), 4, 2, router=router, weighted=weighted)
    return gradloc.route_model(model, BlockPlan("conditional", (plan,), "none"), kernel=kernel).eval()


CONDITIONAL = pytest.mark.parametrize(
    ("kernel", "gated", "threshold", "equal"),
    [
        ("dense", False, None, True),
        ("dense", True, None, False),
        ("batched", True, 0.3, True),
        ("padded", False, None, True),
        ("sorted", True, 0.3, False),
        ("loop", True, None, False),
        ("measured", False, None, True),
    ],
)


@CONDITIONAL
@pytest.mark.parametrize("strict", [False, True])
def test_conditional_networks_are_exported_for_any_number_of_tokens(
    kernel: str, gated: bool, threshold: float | None, equal: bool, strict: bool
) -> None:
    fast = conditional(kernel, gated, threshold, equal)
    exported = torch.export.export(fast, (torch.randn(2, 3, 6),), dynamic_shapes=(ANY_NUMBER,), strict=strict).module()
    for x in (torch.randn(n, 3, 6) for n in (1, 2, 40)):
        torch.testing.assert_close(exported(x), fast(x))


@pytest.mark.parametrize("kernel", [*CONDITIONAL_KERNELS, "measured"])
def test_conditional_networks_compile(kernel: str) -> None:
    """Kernels that look at the tokens run beside the graph; the others are in it."""
    fast = conditional(kernel, gated=False, threshold=None)
    torch._dynamo.reset()
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=kernel not in (*LOOKING_KERNELS, "measured"))
    if kernel in LOOKING_KERNELS:
        with pytest.raises(torch._dynamo.exc.Unsupported, match="for one graph take kernel='dense' or 'batched'"):
            torch.compile(fast, backend="aot_eager", fullgraph=True)(torch.randn(2, 3, 6))
    with torch.no_grad():
        for x in (torch.randn(n, 3, 6) for n in (1, 2, 40)):
            torch.testing.assert_close(compiled(x), fast(x))


def test_an_exported_graph_runs_only_what_was_picked() -> None:
    """Every block's product has the size of its own tokens, which only the router knows."""
    exported = torch.export.export(conditional("loop", gated=False, threshold=None), (torch.randn(2, 3, 6),))
    assert sum(node.target == torch.ops.aten.nonzero.default for node in exported.graph.nodes) == 4


# ---- ONNX


def in_onnx(model: nn.Module, inputs: tuple[Any, ...], dynamic: Any = None) -> Any:
    """The model's graph as ONNX Runtime runs it."""
    pytest.importorskip("onnxscript", reason="needs the extra 'onnx'")
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, about itself
        program = torch.onnx.export(model, inputs, dynamo=True, verbose=False, dynamic_shapes=dynamic)
    session = runtime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(*given: Any) -> list[Tensor]:
        arrays = [x.numpy() for x in _pytree.tree_leaves(given) if isinstance(x, Tensor)]
        return [torch.from_numpy(found) for found in session.run(None, dict(zip(names, arrays, strict=True)))]

    return run


@pytest.mark.parametrize("name", CASES)
def test_structural_operators_in_onnx(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    module = case.make(4, True).eval()
    inputs = _pytree.tree_map(lambda x: x.float() if x.is_floating_point() else x, case.inputs(module))
    if name == "torch attention":
        inputs = tuple(x.clone() for x in inputs)
    fast = routed_model(planned(module), module).eval()
    found = in_onnx(fast, inputs)(*inputs)
    expected = [leaf for leaf in _pytree.tree_leaves(fast(*inputs)) if isinstance(leaf, Tensor)]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@CONDITIONAL
def test_conditional_networks_in_onnx(kernel: str, gated: bool, threshold: float | None, equal: bool) -> None:
    fast = conditional(kernel, gated, threshold, equal)
    run = in_onnx(fast, (torch.randn(2, 3, 6),), (ANY_NUMBER,))
    for x in (torch.randn(n, 3, 6) for n in (1, 2, 40)):
        torch.testing.assert_close(run(x), [fast(x)], atol=1e-5, rtol=1e-4)
