"""Jobs side by side: the same results, modes and errors as one after the other."""

from __future__ import annotations

import threading

import pytest
import torch

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
