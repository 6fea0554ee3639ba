"""Runs work that never meets side by side: threads with pinned thread counts on CPU, streams on CUDA.

One job runs on the calling thread, so that two lanes cost one hand-over.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

T = TypeVar("T")
_POOLS: dict[tuple[int, int], ThreadPoolExecutor] = {}
_LOCK = threading.Lock()


def side_by_side(jobs: Sequence[Callable[[], T]], like: Tensor) -> list[T]:
    """Results of all jobs, in their order.

    On CPU every job gets its own thread and an equal share of the threads that torch may use now (at least one), and sees
    the caller's gradient, inference and autocast mode. Where something watches the calling thread, such as a trace, a transform of
    `torch.func` or hooks for saved tensors, jobs run there in turn: of other threads it would see nothing. On CUDA every job gets its own stream,
    which starts after the work that was queued before; the current stream waits for all of them.

    Args:
        jobs: independent of one another; each returns tensors.
        like: says on which device they run.

    Raises:
        Exception: what a job raised, after all have ended.

    Examples:
        >>> x = torch.ones(3)
        >>> [y.tolist() for y in side_by_side([lambda: x + 1, lambda: x * 3], x)]
        [[2.0, 2.0, 2.0], [3.0, 3.0, 3.0]]
    """
    if like.is_cuda:
        return _streams(jobs, like)
    return [job() for job in jobs] if _watched() else _threads(jobs)


def lanes_for(blocks: int, like: Tensor) -> int:
    """How many lanes independent blocks can use: no more than torch has threads; on CUDA one for each block."""
    return blocks if like.is_cuda else min(blocks, torch.get_num_threads())


def shares(sizes: Sequence[int], lanes: int) -> list[list[int]]:
    """Which blocks go to which lane: the largest first, each to the lane with the least work.

    Examples:
        >>> shares([1, 4, 2, 2], 2)
        [[1, 0], [2, 3]]
    """
    found: list[list[int]] = [[] for _ in range(lanes)]
    work = [0] * lanes
    for block in sorted(range(len(sizes)), key=lambda b: -sizes[b]):
        lane = work.index(min(work))
        found[lane].append(block)
        work[lane] += sizes[block]
    return [lane for lane in found if lane]


def in_lanes(jobs: Sequence[Callable[[], T]], sizes: Sequence[int], like: Tensor) -> list[T]:
    """Results of any number of jobs, in their order, shared out over as many lanes as can run.

    Args:
        jobs: independent of one another; each returns tensors.
        sizes: how much each has to do, in any unit.
        like: says on which device they run.

    Examples:
        >>> x = torch.ones(1)
        >>> in_lanes([lambda: x + 1, lambda: x + 2, lambda: x + 3], [1, 1, 2], x)
        [tensor([2.]), tensor([3.]), tensor([4.])]
    """
    lanes = shares(sizes, lanes_for(len(jobs), like))
    made = side_by_side([lambda own=own: [jobs[job]() for job in own] for own in lanes], like)
    found = {
        job: result
        for lane, results in zip(lanes, made, strict=True)
        for job, result in zip(lane, results, strict=True)
    }
    return [found[job] for job in range(len(jobs))]


def _watched() -> bool:
    """Whether what this thread does is traced, transformed or noted. Each of these is a state of the thread alone."""
    return (
        torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )


def _threads(jobs: Sequence[Callable[[], T]]) -> list[T]:
    total = torch.get_num_threads()
    share = max(1, total // len(jobs))
    pool = _pool(len(jobs) - 1, share)
    modes = _Modes()
    others = [pool.submit(modes.run, job) for job in jobs[1:]]
    first: list[T] = []
    try:
        with _pinned(share, total):
            first.append(jobs[0]())
    finally:
        # Waits for the rest even if the first failed: no job may outlive the call.
        failures = [error for error in (future.exception() for future in others) if error is not None]
    if failures:
        raise failures[0]
    return first + [future.result() for future in others]


class _Modes:
    """The calling thread's modes, which a worker doesn't inherit."""

    def __init__(self) -> None:
        self.gradient, self.inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self.autocast, self.dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def run(self, job: Callable[[], T]) -> T:
        with torch.inference_mode(self.inference), torch.set_grad_enabled(self.gradient):
            if not self.autocast:
                return job()
            with torch.autocast("cpu", self.dtype):
                return job()


@contextlib.contextmanager
def _pinned(share: int, total: int) -> Iterator[None]:
    torch.set_num_threads(share)
    try:
        yield
    finally:
        torch.set_num_threads(total)


def _pool(workers: int, share: int) -> ThreadPoolExecutor:
    with _LOCK:
        key = (workers, share)
        if key not in _POOLS:
            _POOLS[key] = ThreadPoolExecutor(
                max(1, workers), "gradloc-lane", initializer=torch.set_num_threads, initargs=(share,)
            )
        return _POOLS[key]


def _forked() -> None:
    """A fork has the pools without their threads: what it gave them would wait for ever."""
    global _LOCK
    _LOCK = threading.Lock()
    _POOLS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _streams(jobs: Sequence[Callable[[], T]], like: Tensor) -> list[T]:
    current = torch.cuda.current_stream(like.device)
    results: list[T] = []
    streams = [torch.cuda.Stream(like.device) for _ in jobs]
    for job, stream in zip(jobs, streams, strict=True):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            results.append(job())
    for stream, result in zip(streams, results, strict=True):
        current.wait_stream(stream)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                leaf.record_stream(current)
    return results
