"""How much memory a call needs beside what it is given."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Held(TorchDispatchMode):
    """Adds up the storages that operations make, and takes off those that are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given | self._known:
                self._hold(leaf.untyped_storage())
        return made

    def _hold(self, storage: torch.UntypedStorage) -> None:
        self._known.add(storage._cdata)
        self.held += storage.nbytes()
        self.most = max(self.most, self.held)
        weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size


@torch.no_grad()
def peak_bytes(run: Callable[[], Any], like: Tensor) -> int:
    """The most memory that tensors made by a call held at one time, its result included, in bytes.

    On CUDA from the allocator's own statistics; on the CPU by following the storages, which leaves out what an operation uses inside.

    Args:
        run: is called once to warm up, and once to be measured.
        like: says on which device.

    Examples:
        >>> x = torch.ones(1024)
        >>> peak_bytes(lambda: ((x + 1) * 2).sum(), x)
        8192
    """
    run()
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
        before = torch.cuda.memory_allocated(like.device)
        torch.cuda.reset_peak_memory_stats(like.device)
        run()
        torch.cuda.synchronize(like.device)
        return torch.cuda.max_memory_allocated(like.device) - before
    with _Held() as record:
        result = run()
    del result
    return record.most


def stored_bytes(module: nn.Module) -> int:
    """Parameters and buffers, in bytes."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
