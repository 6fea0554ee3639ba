"""Readings of a parameter's shape as a grid of dependencies: layouts to register for modules of your own, or to test and mask by.

Each takes the parameter's shape.
"""

from __future__ import annotations

from gradloc.core.layout import DependencyLayout


def plain_layout(shape: tuple[int, ...]) -> DependencyLayout:
    """Axis 0 out units, axis 1 in units, the rest channels (linear, embedding, convolution kernels, vectors)."""
    return DependencyLayout(shape, shape, "oi"[: len(shape)] + "c" * (len(shape) - 2))


def turned_layout(shape: tuple[int, ...]) -> DependencyLayout:
    """Axis 0 in units, axis 1 out units, the rest channels: transposed convolutions, and the linear operators of GPT-2.

    Examples:
        >>> layout = turned_layout((4, 8))
        >>> layout.out_units, layout.in_units
        (8, 4)
    """
    return DependencyLayout(shape, shape, "io" + "c" * (len(shape) - 2))


def fused_heads(shape: tuple[int, ...], heads: int, parts: int = 3) -> DependencyLayout:
    """A projection that makes queries, keys and values at once: a dependency joins an input to a head, and the head's rows in all
    `parts` are its channels.

    Examples:
        >>> layout = fused_heads((3 * 8, 8), heads=2)
        >>> layout.out_units, layout.in_units, layout.channels
        (2, 8, 12)
    """
    return DependencyLayout(
        shape, (parts, heads, shape[0] // (parts * heads), *shape[1:]), "coc" + "i" * (len(shape) - 1)
    )


def head_inputs(shape: tuple[int, ...], heads: int) -> DependencyLayout:
    """An attention's output projection: its in units are heads, whose columns are channels.

    Examples:
        >>> head_inputs((8, 8), heads=2).in_units
        2
    """
    return DependencyLayout(shape, (shape[0], heads, shape[1] // heads), "oic")


def fused_gates(shape: tuple[int, ...], gates: int = 2) -> DependencyLayout:
    """Gates stacked on axis 0, as in a gated FFN's fused projection or a recurrent layer: one unit's gates are its channels.

    Examples:
        >>> fused_gates((32, 8)).channels
        2
    """
    return DependencyLayout(shape, (gates, shape[0] // gates, *shape[1:]), "co" + "i" * (len(shape) - 1))


def residual_edges(shape: tuple[int, ...], turned: bool = False) -> DependencyLayout:
    """One of an FFN's two weights as edges of the residual stream: with d features, W₁ of shape ``(c·d, d)`` and W₂ of shape
    ``(d, c·d)`` give each pair (i, j) of features c channels, so that the pair's edge has 2c in both together.

    A weight that is `turned` has its in units first.

    Source: arXiv 2601.15871, the multi-channel residual dependency.

    Examples:
        >>> up, down = residual_edges((32, 8)), residual_edges((8, 32))
        >>> (up.out_units, up.in_units, up.channels) == (down.out_units, down.in_units, down.channels) == (8, 8, 4)
        True
    """
    if turned:
        plain = residual_edges(shape[::-1])
        split, roles = (
            (plain.split[2:] + plain.split[:2], "ico")
            if plain.roles == "coi"
            else (plain.split[1:] + plain.split[:1], "cio")
        )
        return DependencyLayout(shape, split, roles)
    out, into = shape
    if out >= into:
        return DependencyLayout(shape, (out // into, into, into), "coi")
    return DependencyLayout(shape, (out, into // out, out), "oci")


def expert_stack(shape: tuple[int, ...], transposed: bool = False) -> DependencyLayout:
    """Experts stacked on axis 0, ``[experts, out, in]`` or transposed ``[experts, in, out]``: every expert's units are out units of
    their own.

    Examples:
        >>> expert_stack((4, 16, 8)).out_units
        64
    """
    roles = "oio" if transposed and len(shape) == 3 else "o" * (len(shape) - 1) + "i"
    return DependencyLayout(shape, shape, roles)
