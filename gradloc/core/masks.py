"""Which dependencies stay, and what the others are taken back to.

Arrays are held as NumPy; torch is imported only where a mask meets a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from gradloc.core.artifact import load_artifact, reading_artifact, save_artifact
from gradloc.core.names import listed, meant
from gradloc.core.wrappers import is_a, plain_modules, plain_parameters
from gradloc.errors import ConfigError, ModelMismatchError, UnknownNameError, UnsupportedError

if TYPE_CHECKING:
    import pandas as pd
    import torch

Null = Literal["zero", "init", "given"]
NULLS: tuple[str, ...] = get_args(Null)


class MaskSet(Mapping[str, "torch.Tensor"]):
    """Boolean masks by parameter name, each of the parameter's shape, True where the dependency is kept.

    Args:
        masks: arrays or tensors of bool by parameter name.
        null: what an unsupported dependency goes back to: ``"zero"`` removes it, ``"init"`` reverts it, ``"given"`` sets it to
            `null_values`.
        null_values: with ``null="init"`` or ``"given"``, the values by parameter name.
        description: how the masks came about (criterion, thresholds, counts); kept with the file.

    Raises:
        ConfigError: a mask isn't boolean, `null` isn't known, or init values are missing.

    Examples:
        >>> masks = MaskSet({"weight": np.array([[True, False], [True, True]])})
        >>> masks.density
        0.75
    """

    def __init__(
        self,
        masks: Mapping[str, Any],
        *,
        null: Null = "zero",
        null_values: Mapping[str, Any] | None = None,
        description: Mapping[str, Any] | None = None,
    ) -> None:
        if null not in NULLS:
            raise ConfigError(f"null={null!r} must be one of {', '.join(NULLS)}{meant(null, NULLS)}.")
        self._arrays = {name: shareable(mask) for name, mask in masks.items()}
        wrong = [f"{name} ({array.dtype})" for name, array in self._arrays.items() if array.dtype != np.bool_]
        if wrong:
            raise ConfigError(f"masks must be boolean, True where kept; not so: {', '.join(wrong)}.")
        self.null: Null = null
        self.null_values = {
            name: shareable(values) for name, values in (null_values or {}).items() if name in self._arrays
        }
        if null != "zero":
            missing = [name for name in self._arrays if name not in self.null_values]
            if missing:
                raise ConfigError(
                    f"null={null!r} needs null_values for {', '.join(missing)}: the weights to go back to."
                )
        self.description = dict(description or {})

    def __getitem__(self, name: str) -> torch.Tensor:
        import torch

        return torch.from_numpy(self.array(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def array(self, name: str) -> NDArray[np.bool_]:
        """The mask of one parameter as a NumPy array.

        Raises:
            UnknownNameError: no mask has that name.
        """
        try:
            return self._arrays[name]
        except KeyError:
            raise UnknownNameError(f"no mask for {name!r}; masks: {listed(self._arrays, name)}") from None

    @property
    def density(self) -> float:
        """Kept share of all masked parameters."""
        total = sum(array.size for array in self._arrays.values())
        return sum(int(array.sum()) for array in self._arrays.values()) / total if total else 1.0

    # ---- sets of dependencies; a parameter without a mask counts as kept whole

    def __and__(self, other: MaskSet) -> MaskSet:
        """Keeps what both keep.

        Examples:
            >>> one = MaskSet({"w": np.array([True, True, False])})
            >>> (one & ~one).density
            0.0
        """
        return self._joined(other, np.logical_and, "&")

    def __or__(self, other: MaskSet) -> MaskSet:
        """Keeps what either keeps."""
        return self._joined(other, np.logical_or, "|")

    def __xor__(self, other: MaskSet) -> MaskSet:
        """Keeps what exactly one keeps."""
        return self._joined(other, np.logical_xor, "^")

    def __sub__(self, other: MaskSet) -> MaskSet:
        """Keeps what this keeps and the other doesn't."""
        return self._joined(other, lambda a, b: a & ~b, "-")

    def __invert__(self) -> MaskSet:
        """Keeps what this takes back."""
        inverse = {name: ~array for name, array in self._arrays.items()}
        return MaskSet(inverse, null=self.null, null_values=self.null_values, description={"from": "~"})

    def _joined(self, other: MaskSet, join: Callable[..., NDArray[Any]], sign: str) -> MaskSet:
        if not isinstance(other, MaskSet):
            return NotImplemented
        faults = []
        if other.null != self.null:
            faults.append(
                f"null={self.null!r} and null={other.null!r}: what isn't kept would go back to different values"
            )
        names = list(dict.fromkeys([*self._arrays, *other._arrays]))
        for name in names:
            a, b = self._arrays.get(name), other._arrays.get(name)
            if a is not None and b is not None and a.shape != b.shape:
                faults.append(f"{name}: shapes {a.shape} and {b.shape}")
            nulls = [masks.null_values[name] for masks in (self, other) if name in masks.null_values]
            if len(nulls) == 2 and not np.array_equal(nulls[0], nulls[1], equal_nan=True):
                faults.append(f"{name}: different null values")
        if faults:
            raise ConfigError(f"masks {sign} masks: " + "; ".join(faults) + ".")

        def mask(of: MaskSet, name: str) -> NDArray[np.bool_]:
            here = of._arrays.get(name)
            return here if here is not None else np.ones((self if of is other else other)._arrays[name].shape, np.bool_)

        return MaskSet(
            {name: np.asarray(join(mask(self, name), mask(other, name)), np.bool_) for name in names},
            null=self.null,
            null_values=other.null_values | self.null_values,
            description={"from": sign, "of": [self.description, other.description]},
        )

    def diff(self, other: MaskSet) -> pd.DataFrame:
        """Where two sets of masks differ: one row a parameter, and ``"all"``.

        Columns: ``weights``; shares ``both`` kept, ``only_this``, ``only_other`` and ``neither``; ``jaccard``, what both keep of what either
        keeps, beside ``jaccard_chance``, which masks of these densities would have at random.

        Raises:
            ConfigError: shapes differ.
        """
        import pandas as pd

        counts = {}
        for name in dict.fromkeys([*self._arrays, *other._arrays]):
            present = next(masks._arrays[name] for masks in (self, other) if name in masks._arrays)
            a, b = (masks._arrays.get(name, np.ones(present.shape, np.bool_)) for masks in (self, other))
            if a.shape != b.shape:
                raise ConfigError(f"{name}: the masks have shapes {a.shape} and {b.shape}, so they can't be compared.")
            counts[name] = np.array([(a & b).sum(), (a & ~b).sum(), (b & ~a).sum(), (~a & ~b).sum()], np.int64)
        counts["all"] = sum(counts.values(), np.zeros(4, np.int64))
        rows = []
        for name, found in counts.items():
            both, this, that, neither = (found / max(1, found.sum())).tolist()
            a, b = both + this, both + that
            rows.append(
                {
                    "parameter": name,
                    "weights": int(found.sum()),
                    "both": both,
                    "only_this": this,
                    "only_other": that,
                    "neither": neither,
                    "jaccard": both / (both + this + that) if both + this + that else float("nan"),
                    "jaccard_chance": a * b / (a + b - a * b) if a + b else float("nan"),
                }
            )
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        return f"MaskSet({len(self)} parameters, density={self.density:.3f}, null={self.null!r})"

    def check(self, model: torch.nn.Module) -> None:
        """Makes sure that every mask fits a parameter of `model`, and that names of one shared parameter agree.

        Raises:
            ConfigError: it is no model.
            ModelMismatchError: names or shapes differ, or masks of a shared parameter do; all differences are listed.
            UnsupportedError: a mask leaves nothing of a direction that a weight norm divides by its size.
        """
        if not callable(getattr(model, "named_parameters", None)):
            raise ConfigError(
                f"model is a {type(model).__name__}, not a torch.nn.Module; masks fit a model's parameters."
            )
        check_shapes({name: array.shape for name, array in self._arrays.items()}, model, "mask")
        parameters = plain_parameters(model)
        first: dict[int, str] = {}
        faults = []
        for name, array in self._arrays.items():
            known = first.setdefault(id(parameters[name]), name)
            if not np.array_equal(array, self._arrays[known]):
                faults.append(f"{known} and {name} are one shared parameter, and their masks differ")
        if faults:
            raise ModelMismatchError("; ".join(faults) + ". Give one mask, under either name.")
        if self.null == "zero":
            self._refuse_empty_directions(model)

    def _refuse_empty_directions(self, model: torch.nn.Module) -> None:
        for name, kept in _directions(model):
            array = self._arrays.get(name)
            if array is None:
                continue
            axes = tuple(axis for axis in range(array.ndim) if axis != kept % array.ndim) if kept is not None else None
            if not np.all(array.any(axis=axes)):
                raise UnsupportedError(
                    f"{name}: the mask leaves nothing of a direction that the layer's weight norm divides by its size, which gives NaN. Mask single "
                    "weights, or take the norm off first (torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.remove_weight_norm)."
                )

    def apply(self, model: torch.nn.Module) -> None:
        """Sets whatever isn't kept to its null value, in place.

        Raises:
            ModelMismatchError: a mask doesn't fit the model; nothing was changed.
        """
        import torch

        self.check(model)
        parameters = plain_parameters(model)
        with torch.no_grad():
            for name in self:
                weight = parameters[name]
                weight.copy_(torch.where(self[name].to(weight.device), weight, self.null_tensor(name, weight)))

    def null_tensor(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """The null value of one parameter, on the device and in the dtype of `like`."""
        import torch

        if self.null == "zero":
            return torch.zeros_like(like)
        return torch.from_numpy(self.null_values[name]).to(like)

    def save(self, path: str | Path) -> Path:
        """Writes the masks as safetensors with their description in its header.

        Raises:
            StoreError: the path can't be written.
        """
        arrays: dict[str, NDArray[Any]] = {f"keep:{name}": array for name, array in self._arrays.items()}
        arrays |= {f"null:{name}": values for name, values in self.null_values.items()}
        return save_artifact(path, "masks", arrays, {"null": self.null, "description": self.description})

    @classmethod
    def load(cls, path: str | Path) -> MaskSet:
        """Reads masks that `save` wrote.

        Raises:
            StoreError, ConfigError, SchemaVersionError: no such file, or not of this kind.
        """
        arrays, header = load_artifact(path, "masks")
        with reading_artifact(path, "masks"):
            return cls(
                {name[5:]: array for name, array in arrays.items() if name.startswith("keep:")},
                null=header["null"],
                null_values={name[5:]: array for name, array in arrays.items() if name.startswith("null:")},
                description=dict(header["description"]),
            )


def _directions(model: torch.nn.Module) -> Iterator[tuple[str, int | None]]:
    """What torch's weight norms, of both kinds, divide by its size along an axis, or as a whole (None)."""
    for name, module in plain_modules(model).items():
        stem = f"{name}." if name else ""
        if is_a(module, "ParametrizationList"):
            yield from ((f"{stem}original1", _axis(part.dim)) for part in module if is_a(part, "_WeightNorm"))
        hooks = getattr(module, "_forward_pre_hooks", {}).values()
        yield from ((f"{stem}{hook.name}_v", _axis(hook.dim)) for hook in hooks if is_a(hook, "WeightNorm"))


def _axis(dim: int | None) -> int | None:
    return None if dim in (None, -1) else dim


def shareable(values: Any) -> NDArray[Any]:
    """An array that torch can take over as it is: it must be writable, with no axis read backwards.

    Tensors of types that NumPy lacks, such as bfloat16, widen to float32, which holds them exactly.
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() and values.element_size() < 4 else values
    array = np.asarray(values)
    return array if array.flags.writeable and min(array.strides, default=0) >= 0 else array.copy()


def check_shapes(
    expected: Mapping[str, tuple[int, ...]], model: torch.nn.Module, what: str, most: int | None = None
) -> None:
    """Raises `ModelMismatchError` listing the parameters, or the first `most`, that `model` lacks or has in another shape."""
    parameters = {name: tuple(parameter.shape) for name, parameter in plain_parameters(model).items()}
    faults = [
        f"{name}: the {what} has shape {shape}, the model {parameters[name] if name in parameters else _absent(name, parameters)}"
        for name, shape in expected.items()
        if parameters.get(name) != shape
    ]
    if faults:
        more = [] if most is None or len(faults) <= most else [f"and {len(faults) - most} more"]
        raise ModelMismatchError(f"the {what} belongs to another model: " + "; ".join([*faults[:most], *more]) + ".")


def _absent(name: str, parameters: Mapping[str, Any]) -> str:
    """What a model has in place of a parameter that it lacks."""
    owner, _, own = name.rpartition(".")
    if f"{owner}.parametrizations.{own}.original".lstrip(".") in parameters:
        return "a parametrized one: torch.nn.utils.parametrize.remove_parametrizations makes it plain"
    if f"{name}_orig" in parameters:
        return "a pruned one: torch.nn.utils.prune.remove makes it plain"
    return "no such parameter"
