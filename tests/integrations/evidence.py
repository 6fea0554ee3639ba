"""What a run must hold of the gradients that an oracle kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

import gradloc


def assert_sums(run: gradloc.Run, seen: Sequence[Mapping[str, np.ndarray]], steps: int) -> None:
    """Every parameter's Σg² is that of the whole gradients, of so many steps."""
    assert len(seen) == steps
    for name in seen[0]:
        grads = np.stack([step[name] for step in seen])
        found = run.evidence(name)
        assert found.exposure == steps
        np.testing.assert_allclose(found.grad_sumsq.reshape(-1), (grads**2).sum(0).reshape(-1), rtol=1e-3, atol=1e-12)
