"""float32 as it is written, for checks that compare two ways to compute one thing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def full_precision(device: torch.device | str) -> Iterator[None]:
    """Turns off what rounds the factors of float32 products on a device: TF32 (convolutions have it by default) and bfloat16.

    With them, two orders of summation differ by a thousandth, which would hide what a certificate looks for. What was set before is set
    again afterwards, part by part.

    Examples:
        >>> torch.set_float32_matmul_precision("high")
        >>> with full_precision("cuda"):
        ...     torch.backends.cuda.matmul.fp32_precision
        'ieee'
        >>> torch.get_float32_matmul_precision()
        'high'
        >>> torch.set_float32_matmul_precision("highest")
    """
    backends = torch.backends
    if not hasattr(backends.cuda.matmul, "fp32_precision"):  # torch before 2.9
        held, convolutions = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(held)
            backends.cudnn.allow_tf32 = convolutions
        return
    cuda = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    cpu = (backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn)
    every: tuple[Any, ...] = cuda if torch.device(device).type == "cuda" else cpu
    # Those that are as wanted stay untouched: writing a part's precision, be it the one it has, takes it from under the global one.
    parts = [part for part in every if part.fp32_precision not in ("ieee", "none")]
    before = [part.fp32_precision for part in parts]
    try:
        for part in parts:
            part.fp32_precision = "ieee"
        yield
    finally:
        for part, kind in zip(parts, before, strict=True):
            part.fp32_precision = kind
