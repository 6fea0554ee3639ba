"""Which dependencies stay, and what the others are taken back to.

Arrays are held as NumPy; torch is imported only where a mask meets a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from gradloc.core.artifact import load_artifact, save_artifact
from gradloc.errors import ConfigError, ModelMismatchError

if TYPE_CHECKING:
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

    Example:
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
            raise ConfigError(f"null={null!r} must be one of {', '.join(NULLS)}.")
        self._arrays = {name: np.asarray(mask) for name, mask in masks.items()}
        wrong = [f"{name} ({array.dtype})" for name, array in self._arrays.items() if array.dtype != np.bool_]
        if wrong:
            raise ConfigError(f"masks must be boolean, True where kept; not so: {', '.join(wrong)}.")
        self.null: Null = null
        self.null_values = {
            name: np.asarray(values) for name, values in (null_values or {}).items() if name in self._arrays
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
            KeyError: no mask has that name.
        """
        try:
            return self._arrays[name]
        except KeyError:
            raise KeyError(f"no mask for {name!r}; masks: {', '.join(self._arrays) or 'none'}") from None

    @property
    def density(self) -> float:
        """Kept share of all masked parameters."""
        total = sum(array.size for array in self._arrays.values())
        return sum(int(array.sum()) for array in self._arrays.values()) / total if total else 1.0

    def __repr__(self) -> str:
        return f"MaskSet({len(self)} parameters, density={self.density:.3f}, null={self.null!r})"

    def check(self, model: torch.nn.Module) -> None:
        """Makes sure that every mask fits a parameter of `model`.

        Raises:
            ModelMismatchError: names or shapes differ; all differences are listed.
        """
        check_shapes({name: array.shape for name, array in self._arrays.items()}, model, "mask")

    def apply(self, model: torch.nn.Module) -> None:
        """Sets whatever isn't kept to its null value, in place.

        Raises:
            ModelMismatchError: a mask doesn't fit the model; nothing was changed.
        """
        import torch

        self.check(model)
        parameters = dict(model.named_parameters())
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
        return cls(
            {name[5:]: array for name, array in arrays.items() if name.startswith("keep:")},
            null=header["null"],
            null_values={name[5:]: array for name, array in arrays.items() if name.startswith("null:")},
            description=header["description"],
        )


def check_shapes(expected: Mapping[str, tuple[int, ...]], model: torch.nn.Module, what: str) -> None:
    """Raises `ModelMismatchError` listing each parameter that `model` lacks or has in another shape."""
    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    faults = [
        f"{name}: the {what} has shape {shape}, the model {parameters.get(name, 'no such parameter')}"
        for name, shape in expected.items()
        if parameters.get(name) != shape
    ]
    if faults:
        raise ModelMismatchError(f"the {what} belongs to another model: " + "; ".join(faults) + ".")
