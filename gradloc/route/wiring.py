"""Which units feed which in a whole model, read off one forward pass.

Each floating-point tensor of the pass is accompanied by a tensor of the same shape that says which unit each element is. A product
with a parameter is an operator: it reads units and makes new ones. Everything else only moves units about (views, copies) or makes
one of several (a sum, a product of activations): those become one node. So a residual stream is one layer, the rows of a
recurrent unit's gates are one unit, and the units of an attention head hang together through its scores.

Shape letters: `N` rows of a batch, `O` out units, `I` in units, `C` channels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from gradloc.core.wiring import WiredOperator, Wiring
from gradloc.route.aside import in_evaluation
from gradloc.route.unit_ids import NO_UNIT, UnitIds, first_known

_MOVING = {
    "alias", "cat", "clone", "constant_pad_nd", "contiguous", "detach", "expand_copy", "flip", "gather", "index", "index_select",
    "index_put", "lift_fresh", "permute_copy", "repeat", "roll", "select_scatter", "slice_scatter", "stack", "take_along_dim", "_to_copy", "_unsafe_view",
    "unfold_copy", "view_copy", "_reshape_copy", "narrow_copy", "split_with_sizes_copy", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk",
}  # fmt: skip
_NORMS = {"native_layer_norm", "native_group_norm", "_fused_rms_norm", "rms_norm"}
_BATCH_NORMS = {
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
}
_SHARES = {"_softmax", "_log_softmax", "_safe_softmax"}
_BY_INDEX = {"gather", "index", "index_put", "index_select", "take_along_dim"}
"""Of what moves, what moves by other tensors' numbers."""
_ALIKE = {
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "rand_like",
    "randn_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
}
"""These read a tensor's shape only."""
_REDUCTIONS = {
    "sum",
    "mean",
    "amax",
    "amin",
    "max",
    "min",
    "argmax",
    "argmin",
    "any",
    "all",
    "var",
    "std",
    "var_mean",
    "prod",
    "norm",
    "linalg_vector_norm",
    "logsumexp",
}


_COMPLEX = {
    "view_as_real",
    "view_as_complex",
    "_conj",
    "resolve_conj",
    "_neg_view",
    "resolve_neg",
    "_conj_physical",
    "conj_physical",
}


def _is_view(func: Any) -> bool:
    """Whether an operation gives another view of its input, or makes one of it."""
    return func.is_view or torch.Tag.inplace_view in func.tags


def wire_model(model: nn.Module, example: Any) -> Wiring:
    """Runs `model` once, in evaluation mode and without gradients, and reads off what feeds what.

    Normalisation and softmax over the units of a layer couple all of them through one or two numbers; units are still taken apart
    there, and ``notes`` says where. Embedding tables are look-ups: their features are units, their tokens are not. An operation that
    isn't known joins all units it reads, so that nothing is called independent that isn't.

    Args:
        model: stays as it is.
        example: its input: a tensor, a tuple of arguments, or a mapping of keyword arguments. Two samples of the smallest
            sequence that shows the model's work (longer than 1 for recurrent layers) are enough.

    Returns:
        Layers, operators, and what was left out.

    Examples:
        >>> wiring = wire_model(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(1, 2))
        >>> [(layer.name, layer.units) for layer in wiring.layers]
        [('input', 2), ('0.weight', 4), ('2.weight', 2)]
    """
    trace = _Trace(model)
    args, kwargs = _arguments(example)
    trace.feed(args, kwargs)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            warnings.catch_warnings(action="ignore", category=UserWarning),  # what torch says of switches it hasn't got
            in_evaluation(model),
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            torch.backends.mkldnn.flags(enabled=False),
            torch.backends.cudnn.flags(enabled=False),
            trace,
        ):
            model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return trace.wiring()


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}


def _laid_out_as(value: Tensor, units: Tensor) -> Tensor:
    """A copy of what accompanies a new tensor, in the same order in memory: what is a view of the one must be a view of the other."""
    if value.shape != units.shape:
        return units.clone()
    return torch.empty_like(value, dtype=units.dtype, device=units.device).copy_(units)


class _Trace(TorchDispatchMode):
    """Follows units through one forward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.ids = UnitIds()
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        # By id of a tensor: which unit each element is; or, of a parameter and its views, which element of the parameter.
        self.units: dict[int, Tensor] = {}
        self.places: dict[int, tuple[str, Tensor]] = {}
        self.alive: list[Any] = []  # ids are only good while their tensors live
        self.pieces: dict[tuple[str, bytes, bytes, bytes], tuple[Tensor, Tensor]] = {}
        self.tables: set[str] = set()
        self.used_otherwise: dict[str, str] = {}
        self.notes: dict[str, None] = {}

    def feed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Makes units of the model's inputs: every feature of a sample is one."""
        for number, value in enumerate(tree_flatten((args, kwargs))[0]):
            if isinstance(value, Tensor) and value.is_floating_point() and value.ndim:
                shape = value.shape[1:] if value.ndim > 1 else value.shape
                fresh = self.ids.fresh("input" if number == 0 else f"input {number}", prod(shape)).view(shape)
                self._tag(value, fresh.expand(value.shape).clone())

    # ---- what accompanies a tensor

    def _tag(self, value: Tensor, units: Tensor) -> None:
        self.alive.append(value)
        self.units[id(value)] = units

    def _units(self, value: Tensor) -> Tensor:
        known = self.units.get(id(value))
        return known if known is not None else torch.full(value.shape, NO_UNIT)

    def _place(self, value: Any) -> tuple[str, Tensor] | None:
        if id(value) in self.names and id(value) not in self.places:
            name = self.names[id(value)]
            kind = torch.int32 if value.numel() < 2**31 else torch.int64
            self.alive.append(value)
            self.places[id(value)] = (name, torch.arange(value.numel(), dtype=kind).view(value.shape))
        return self.places.get(id(value))

    # ---- operations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        with torch.utils._python_dispatch._disable_current_modes():
            self._follow(func, args, kwargs, result)
        return result

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        name = func._schema.name.split("::")[1]
        plain = name.rstrip("_") if not name.startswith("_") else name
        named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        flat = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        floats = [value for value in flat if self._carries(value)]
        if plain == "_local_scalar_dense" and any((self._units(value) != NO_UNIT).any() for value in floats):
            self.notes["a number is taken out of the pass (item()), and what depends on it isn't followed"] = None
        results = [r for r in tree_flatten(result)[0] if isinstance(r, Tensor) and (floats or r.is_floating_point())]
        if not results:
            return
        if not floats or plain in _ALIKE:  # made of counts and positions
            for made in results:
                self._tag(made, torch.full(made.shape, NO_UNIT))
            return
        if plain in _COMPLEX:
            self._tag(results[0], self._as_complex(args[0], plain, results[0]))
            return
        if plain in _BY_INDEX and any(self._chooses(value) for value in flat):
            self.notes["what is taken by an index that is made of units is followed, the choice isn't"] = None
        if _is_view(func) or plain in _MOVING:
            self._move(func, plain, args, kwargs, result)
            return
        handler: Callable[..., Tensor] | None = getattr(self, f"_on_{plain}", None)
        if handler is not None:
            found = handler(named, results[0])
        elif plain in _NORMS | _BATCH_NORMS:
            found = self._normed(named["input"], plain)
        elif plain in _SHARES:
            found = self._shared(named["self"], named["dim"], plain)
        elif plain in _REDUCTIONS:
            found = self._reduced(named, results[0])
        elif plain == "copy":
            found = self._units(named["src"]).expand(results[0].shape)
        elif torch.Tag.pointwise in func.tags:
            found = self._joined([self._units(value) for value in floats], results[0].shape)
        elif "pool" in plain or "upsample" in plain:
            found = self._pooled(named["self"], results[0])
        else:
            found = self._unknown(func, floats, results[0])
        for number, made in enumerate(results):
            # In place: the tensor's units, and those of what it is a view of, change.
            known = self.units.get(id(made))
            if func._schema.is_mutable and known is not None and known.shape == found.shape:
                known.copy_(found)
            elif made.shape == found.shape:
                self._tag(made, _laid_out_as(made, found))
            else:
                self._tag(made, torch.full(made.shape, NO_UNIT) if number else _laid_out_as(made, found))

    def _move(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """The same operation on what accompanies its inputs; views stay views, so that writing into them is seen."""

        def moves(value: Any) -> bool:
            index = name in _BY_INDEX and value is not args[0] and not value.is_floating_point()
            return self._carries(value) and not index

        tensors = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, Tensor) and moves(v)]
        place = self._place(tensors[0]) if len(tensors) == 1 else None

        def accompanying(value: Any) -> Any:
            if not isinstance(value, Tensor) or not moves(value):
                return value
            return place[1] if place is not None else self._accompany(value)

        options = {k: v for k, v in kwargs.items() if k not in ("dtype", "device", "layout", "pin_memory")}
        if name == "constant_pad_nd":
            moved = func(accompanying(args[0]), args[1], NO_UNIT)
        else:
            moved = func(*tree_map(accompanying, args), **tree_map(accompanying, options))
        for made, found in zip(tree_flatten(result)[0], tree_flatten(moved)[0], strict=True):
            if place is not None:
                self.alive.append(made)
                self.places[id(made)] = (place[0], found)
            else:
                self._tag(made, found if _is_view(func) else _laid_out_as(made, found))

    def _carries(self, value: Tensor) -> bool:
        """Whether a tensor may hold units: numbers do, and so does whatever was made of those, such as the sign of one."""
        return value.is_floating_point() or value.is_complex() or id(value) in self.units

    def _chooses(self, value: Tensor) -> bool:
        """Whether positions depend on units."""
        return not value.is_floating_point() and bool((self._units(value) != NO_UNIT).any())

    def _as_complex(self, value: Tensor, name: str, result: Tensor) -> Tensor:
        """The two parts of a complex number are one unit."""
        units = self._units(value)
        if name == "view_as_real":
            return units.unsqueeze(-1).expand(result.shape).clone()
        if name == "view_as_complex":
            self.ids.join(units[..., 0].clone(), units[..., 1].clone())
            first = units[..., 0]
            return torch.where(first == NO_UNIT, units[..., 1], first)
        return units.clone()

    def _accompany(self, value: Tensor) -> Tensor:
        if id(value) not in self.units:
            self._tag(value, torch.full(value.shape, NO_UNIT))
        return self.units[id(value)]

    def _joined(self, parts: list[Tensor], shape: torch.Size) -> Tensor:
        """Elements that are computed from one another become one unit each."""
        found = torch.full(shape, NO_UNIT)
        for part in parts:
            if (part == NO_UNIT).all():
                continue
            spread = part.expand(shape) if part.ndim <= len(shape) else part.view(shape)
            self.ids.join(found, spread)
            found = torch.where(found == NO_UNIT, spread, found)
        return found

    def _normed(self, value: Tensor, name: str) -> Tensor:
        if name in _NORMS:
            self.notes[f"{name}: units of a layer are coupled by mean and variance, and taken apart"] = None
        return self._units(value)

    def _shared(self, value: Tensor, dim: int, name: str) -> Tensor:
        units = self._units(value)
        first = first_known(units, dim)
        if not ((units == first) | (units == NO_UNIT)).all():
            self.notes[f"{name.strip('_')}: units are coupled by what they share, and taken apart"] = None
        return units

    def _reduced(self, named: Mapping[str, Any], result: Tensor) -> Tensor:
        """Over tokens or places a unit stays; over units it is one number of all of them: with ``keepdim`` a statistic of a
        normalisation, else an output that hangs together with all of them."""
        units = self._units(named["self"])
        dims = named.get("dim")
        dims = list(range(units.ndim)) if dims in (None, []) else [dims] if isinstance(dims, int) else list(dims)
        keep = bool(named.get("keepdim", False))
        found, same = units, True
        for dim in sorted((d % max(1, units.ndim) for d in dims), reverse=True):
            first = first_known(found, dim)
            same &= bool(((found == first) | (found == NO_UNIT)).all())
            if not keep:
                self.ids.join(first.expand(found.shape), found)
            found = first
        if keep and not same:
            self.notes[
                "a mean or sum over units with keepdim=True is taken as a normalisation, which couples no units"
            ] = None
            found = torch.full_like(found, NO_UNIT)
        return found.reshape(result.shape)

    def _pooled(self, value: Tensor, result: Tensor) -> Tensor:
        return self._per_channel(value).view(result.shape[:2] + (1,) * (result.ndim - 2)).expand(result.shape)

    def _per_channel(self, value: Tensor) -> Tensor:
        """One unit per sample and channel of ``[N, C, …]``."""
        flat = self._units(value).flatten(2)
        first = first_known(flat, 2)
        self.ids.join(first.expand(flat.shape), flat)
        return first[..., 0]

    def _unknown(self, func: Any, floats: list[Tensor], result: Tensor) -> Tensor:
        read = [self._units(value).flatten() for value in floats if id(value) in self.units]
        for value in floats:
            if (place := self._place(value)) is not None:
                self.used_otherwise[place[0]] = f"{func}"
        units = torch.cat(read) if read else torch.zeros(0, dtype=torch.int64)
        units = units[units != NO_UNIT]
        if not len(units):
            return torch.full(result.shape, NO_UNIT)
        self.ids.join(units[:1].expand(len(units)), units)
        self.notes[f"{func}: what it does to units isn't known, so all that it reads hang together"] = None
        return units[0].expand(result.shape)

    def _on_cumsum(self, named: Mapping[str, Any], result: Tensor) -> Tensor:
        """Over tokens a unit stays; over units each hangs together with those before it."""
        units = self._units(named["self"])
        first = first_known(units, named["dim"])
        if ((units == first) | (units == NO_UNIT)).all():
            return units
        return self._unknown("a cumulative sum over units", [named["self"]], result)

    _on_logcumsumexp = _on_cumsum

    def _on_glu(self, named: Mapping[str, Any], result: Tensor) -> Tensor:
        return self._joined(list(self._units(named["self"]).chunk(2, named.get("dim", -1))), result.shape)

    def _on__prelu_kernel(self, named: Mapping[str, Any], result: Tensor) -> Tensor:
        return self._units(named["self"])

    # ---- products

    def _on_mm(self, named: Mapping[str, Any], result: Tensor) -> Tensor:
        return self._product(named["self"], named["mat2"], result)

    def _on_addmm(self, named: Mapping[str, Any], result: Tensor) -> Tensor:
        return self._added(named["self"], self._product(named["mat1"], named["mat2"], result))

    def _on_bmm(self, named: Mapping[str, Any], result: Tensor) -> Tensor:
        return self._product(named["self"], named["mat2"], result)

    def _on_baddbmm(self, named: Mapping[str, Any], result: Tensor) -> Tensor:
        return self._added(named["self"], self._product(named["batch1"], named["batch2"], result))

    def _on__grouped_mm(self, named: Mapping[str, Any], result: Tensor) -> Tensor:
        return self._grouped(named["self"], named["mat2"], named.get("offs"), named.get("bias"), result)

    def _on_grouped_mm_fallback(self, named: Mapping[str, Any], result: Tensor) -> Tensor:
        """The same in transformers, where torch can't."""
        return self._grouped(named["input"], named["weight"], named["offs"], None, result)

    def _grouped(
        self, data: Tensor, weight: Tensor, ends: Tensor | None, bias: Tensor | None, result: Tensor
    ) -> Tensor:
        """``[N, I] @ [G, I, O]``: the rows up to each end by one operator of a stack, such as an expert."""
        place = self._place(weight)
        if place is None or data.ndim != 2 or ends is None or bias is not None:
            read = [value for value in (data, weight, bias) if value is not None]
            return self._unknown("a grouped product of other form than rows by a stack of weights", read, result)
        name, places = place
        units, found, begin = self._units(data), torch.full(result.shape, NO_UNIT), 0
        for part, end in zip(places, ends.tolist(), strict=True):
            if end > begin:  # an operator without rows isn't met, as in a loop over those that have some
                found[begin:end] = self._operator(name, part.T, units[begin:end])
            begin = end
        return found

    def _added(self, bias: Tensor, found: Tensor) -> Tensor:
        return self._joined([found, self._units(bias)], found.shape) if id(bias) in self.units else found

    def _product(self, left: Tensor, right: Tensor, result: Tensor) -> Tensor:
        """``[…, N, I] @ […, I, O]``, either of which may be a parameter."""
        weight, data, flipped = self._place(right), left, False
        if weight is None and self._place(left) is not None:
            weight, data, flipped = self._place(left), right, True
        if weight is None:
            return self._contracted(self._units(left), self._units(right))
        name, places = weight
        units = self._units(data)
        if flipped:
            places, units = places.mT, units.mT
        if places.ndim == 2:
            found = self._operator(name, places.T, units)
        else:
            found = torch.stack([self._operator(name, p.T, u) for p, u in zip(places, units, strict=True)])
        return found.mT if flipped else found

    def _operator(self, name: str, places: Tensor, units: Tensor) -> Tensor:
        """A weight ``[O, I]`` of places in its parameter that reads ``[N, I]`` units; units of ``[N, O]``."""
        return self._read(name, places[:, :, None], first_known(units, 0)[0], units).expand(len(units), -1)

    def _read(self, name: str, places: Tensor, inputs: Tensor, units: Tensor) -> Tensor:
        """Notes an operator with places ``[O, I, C]``; the units it makes, ``[O]``."""
        self.ids.join(inputs.expand(units.shape), units)
        wide = places.to(torch.int64)
        start = wide[0, 0, 0]
        out, into, channels = wide[:, 0, 0], wide[0, :, 0] - start, wide[0, 0, :] - start
        assert torch.equal(out[:, None, None] + into[None, :, None] + channels, wide), name
        stride = int(into[1]) if len(into) > 1 else 0
        made = self.ids.named(name, [(stride, place) for place in out.tolist()])
        key = (name, *(part.numpy().tobytes() for part in (out, into, channels)))
        if key in self.pieces:  # met again: the same operator, whatever it reads
            before, _ = self.pieces[key]
            self.ids.join(before, inputs)
            inputs = torch.where(before == NO_UNIT, inputs, before)
        self.pieces[key] = (inputs, made)
        return made

    def _contracted(self, left: Tensor, right: Tensor) -> Tensor:
        """Units of a product of activations: each element hangs together with all that it is a sum over."""
        rows, columns = first_known(left, -1), first_known(right, -2)
        self.ids.join(rows.expand(left.shape), left)
        self.ids.join(columns.expand(right.shape), right)
        shape = torch.broadcast_shapes(rows.shape, columns.shape)
        return self._joined([rows, columns], shape)

    def _on_convolution(self, named: Mapping[str, Any], result: Tensor) -> Tensor:
        weight = self._place(named["weight"])
        if weight is None or named["transposed"]:
            return self._unknown(
                "convolution, transposed or of computed kernels", [named["input"], named["weight"]], result
            )
        name, places = weight
        units = self._per_channel(named["input"])  # [N, I]
        out, groups = len(places), named["groups"]
        made = []
        for part, read in zip(places.flatten(2).split(out // groups), units.chunk(groups, dim=1), strict=True):
            made.append(self._read(name, part, first_known(read, 0)[0], read))
        return torch.cat(made).view(-1, *(1,) * (result.ndim - 2)).expand(result.shape)

    def _on_embedding(self, named: Mapping[str, Any], result: Tensor) -> Tensor:
        weight = self._place(named["weight"])
        if weight is None:
            return self._unknown("embedding of a computed table", [named["weight"]], result)
        self.tables.add(weight[0])
        features = result.shape[-1]
        found = self.ids.named(weight[0], [("feature", feature) for feature in range(features)]).expand(result.shape)
        chosen = self._units(named["indices"])
        return (
            found
            if (chosen == NO_UNIT).all()
            else self._joined([found, chosen.unsqueeze(-1).expand(result.shape)], result.shape)
        )

    # ---- the result

    def wiring(self) -> Wiring:
        for (name, *_), (inputs, _) in self.pieces.items():
            bare = inputs == NO_UNIT
            if bare.any():
                inputs[bare] = self.ids.fresh(f"constants read by {name}", int(bare.sum()))
        number, layers = self.ids.settle()
        operators = []
        for (name, out, into, channels), (inputs, outputs) in self.pieces.items():
            place_out, place_in, place_channel = (np.frombuffer(p, np.int64) for p in (out, into, channels))
            operators.append(
                WiredOperator(name, number[inputs.numpy()], number[outputs.numpy()], place_in, place_out, place_channel)
            )
        met = {name for name, *_ in self.pieces} | self.tables
        left_out = [
            f"{name}: used by {self.used_otherwise[name]}, which isn't read"
            if name in self.used_otherwise
            else f"{name}: not used as an operator in this pass"
            for name, shape in self.shapes.items()
            if name not in met and len(shape) > 1
        ]
        if self.tables:
            self.notes[f"look-ups, whose tokens are no units: {', '.join(sorted(self.tables))}"] = None
        return Wiring(layers, tuple(operators), tuple(left_out), tuple(self.notes))
