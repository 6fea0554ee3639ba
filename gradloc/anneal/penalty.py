"""A group lasso on what lies outside blocks.

Shape letters: `O` out units, `I` in units, `C` channels.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gradloc.core.layout import DependencyLayout


def shrink_groups(
    weight: Tensor, away: Tensor, layout: DependencyLayout, role: Literal["o", "i"], amount: float
) -> Tensor:
    r"""One proximal step of the group lasso.

    With $w_g$ the elements outside blocks of unit g, $n_g$ of them, and $\tau$ = `amount`,

    $$\operatorname{prox}(w_g) = \max\left(0,\; 1 - \frac{\tau\sqrt{n_g}}{\lVert w_g\rVert_2}\right) w_g,$$

    the minimiser of $\frac12\lVert v - w_g\rVert^2 + \tau\sqrt{n_g}\,\lVert v\rVert$: the root mean square of every group falls by $\tau$, and a
    group below it is zero. What is inside blocks stays.

    Args:
        weight: of the parameter's shape.
        away: True outside blocks, of the same shape.
        layout: reads it as ``[O, I, C]``.
        role: ``"o"``: a group is all that an out unit reads; ``"i"``: all that an in unit feeds.
        amount: $\tau$, in the unit of weights.

    Returns:
        The new weight.

    Source:
        Yuan and Lin, "Model selection and estimation in regression with grouped variables" (2006); Parikh and Boyd, "Proximal
        algorithms" (2014), section 6.5.4, for the step.

    Examples:
        >>> from gradloc.core.standard_layouts import plain_layout
        >>> weight = torch.tensor([[7.0, 3.0, 4.0], [7.0, 0.1, 0.1]])
        >>> away = torch.tensor([[False, True, True]]).expand(2, 3)
        >>> shrink_groups(weight, away, plain_layout((2, 3)), "o", 5 / 2 / 2**0.5)
        tensor([[7.0000, 1.5000, 2.0000],
                [7.0000, 0.0000, 0.0000]])
    """
    axes = [axis for axis, letter in enumerate(layout.roles) if letter != role]
    values, outside = weight.reshape(layout.split), away.reshape(layout.split)
    # In single precision at least: a step is often smaller than what half precision can tell apart.
    wide = values.float() if values.element_size() < 4 else values
    off = torch.where(outside, wide, 0.0)
    if not axes:
        norm, count = off.abs(), outside.to(off.dtype)
    else:
        norm = off.square().sum(axes, keepdim=True).sqrt()
        count = outside.sum(axes, keepdim=True).to(off.dtype)
    tiny = torch.finfo(off.dtype).tiny
    scale = (1.0 - amount * count.sqrt() / norm.clamp(min=tiny)).clamp(min=0.0)
    return torch.where(outside, off * scale, wide).to(weight.dtype).reshape(weight.shape)
