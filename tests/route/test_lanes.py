"""Jobs side by side: the same results, modes and errors as one after the other."""

from __future__ import annotations

import multiprocessing
import threading
import warnings
from functools import partial

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from gradloc.route.lanes import side_by_side


def test_results_come_in_order_from_different_threads() -> None:
    seen: set[int] = set()
    gate = threading.Barrier(3, timeout=20)

    def job(number: int):
        def run() -> torch.Tensor:
            gate.wait()  # passes only if all three run at once
            seen.add(threading.get_ident())
            return torch.full((2,), float(number))

        return run

    found = side_by_side([job(n) for n in range(3)], torch.ones(1))
    assert [int(x[0]) for x in found] == [0, 1, 2]
    assert len(seen) == 3


def test_gradients_flow_through_every_lane() -> None:
    weights = [torch.randn(4, 4, requires_grad=True) for _ in range(2)]
    x = torch.randn(4, 4)
    sum(y.sum() for y in side_by_side([lambda w=w: x @ w for w in weights], x)).backward()
    for weight in weights:
        torch.testing.assert_close(weight.grad, x.sum(0)[:, None].expand(4, 4))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_lanes_see_the_callers_modes(mode) -> None:
    weight = torch.ones(2, 2, requires_grad=True)
    with mode(), torch.autocast("cpu", torch.bfloat16):
        found = side_by_side([lambda: weight @ weight] * 2, weight)
    assert [y.requires_grad for y in found] == [False, False]
    assert [y.dtype for y in found] == [torch.bfloat16] * 2
    assert all(y.is_inference() == (mode is torch.inference_mode) for y in found)


@pytest.mark.parametrize("bad", [0, 1])
def test_an_error_in_any_lane_is_raised_after_all_have_ended(bad: int) -> None:
    ended = []

    def job(number: int):
        def run() -> torch.Tensor:
            if number == bad:
                raise ZeroDivisionError("lane")
            ended.append(number)
            return torch.zeros(1)

        return run

    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError, match="lane"):
        side_by_side([job(0), job(1)], torch.ones(1))
    assert ended == [1 - bad]
    assert torch.get_num_threads() == before


class _Sum(torch.nn.Module):
    """Each lane has a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.randn(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(side_by_side([partial(torch.matmul, x, weight) for weight in self.weights], x)).sum(0)


@pytest.fixture
def model() -> _Sum:
    torch.manual_seed(0)
    return _Sum()


def test_a_trace_has_every_lane(model: _Sum) -> None:
    x, other = torch.randn(2, 4), torch.randn(2, 4)
    expected = other @ sum(model.weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(model, x, check_trace=False)
    for graph in (traced, make_fx(model)(x)):
        torch.testing.assert_close(graph(other), expected)


def test_transforms_reach_every_lane(model: _Sum) -> None:
    x = torch.randn(2, 4)
    weights = dict(model.named_parameters())
    found = torch.func.grad(lambda held: torch.func.functional_call(model, held, (x,)).sum())(weights)
    for gradient in found.values():
        torch.testing.assert_close(gradient, x.sum(0)[:, None].expand(4, 4))
    torch.testing.assert_close(torch.func.vmap(model)(x[None]), model(x)[None])


def test_whoever_watches_a_thread_sees_every_lane(model: _Sum) -> None:
    x, packed = torch.randn(2, 4), []
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() == 3 * 2 * (2 * 4 * 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        model(x)
    assert len(packed) == 3  # x, which the gradients of the weights need


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_has_lanes_of_its_own() -> None:
    def run() -> list[torch.Tensor]:
        return side_by_side([lambda: torch.zeros(1)] * 2, torch.ones(1))

    run()  # makes threads, which a fork doesn't have
    process = multiprocessing.get_context("fork").Process(target=run, daemon=True)
    process.start()
    process.join(20)
    ended = process.exitcode
    if ended is None:
        process.kill()
        process.join()
    assert ended == 0
