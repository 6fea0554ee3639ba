"""Windows as Arrow tables, and back."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from gradloc.core.moment_sums import RESIDUAL
from gradloc.core.moments import Moments
from gradloc.core.window import FiringSample, ParameterWindow, PhantomWindow, WindowRecord
from gradloc.store.schema import FIRINGS_SCHEMA, PHANTOMS_SCHEMA, WINDOWS_SCHEMA, cells_schema, event_columns

MANTISSA_BITS = 13
"""Of the 23 that a float32 has."""


def cells_table(window: WindowRecord, rules: tuple[str, ...]) -> pa.Table:
    """Rows of the cells that had an event under any rule, and one residual row a parameter for the rest."""
    schema = cells_schema(rules)
    parts = [_cells_of(window.index, item, rules) for item in window.parameters if item.moments.exposure]
    names = [item.name for item in window.parameters if item.moments.exposure]
    columns: dict[str, Any] = {}
    for field in schema:
        if field.name == "parameter":
            codes = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part["window"]) for part in parts])
            columns["parameter"] = pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(names, pa.string()))
        else:
            joined = np.concatenate([part[field.name] for part in parts]) if parts else np.zeros(0)
            if pa.types.is_floating(field.type):
                joined = rounded(joined.astype(np.float32))
            columns[field.name] = pa.array(joined, field.type, from_pandas=False)
    return pa.table(columns, schema=schema)


def _cells_of(index: int, item: ParameterWindow, rules: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    moments = item.moments
    active = _active(moments)
    rows, columns = np.nonzero(active)
    rest = ~active
    residual = bool(rest.any())

    def gathered(values: NDArray[Any]) -> NDArray[Any]:
        return np.append(values[active], values[rest].sum()) if residual else values[active]

    def place(values: NDArray[Any]) -> NDArray[Any]:
        return np.append(values, RESIDUAL) if residual else values

    last = moments.last_step[active]
    return {
        "window": np.full(len(rows) + residual, index),
        "cell_row": place(rows),
        "cell_column": place(columns),
        **{column: gathered(moments.events[rule]) for rule, column in event_columns(rules).items()},
        "last_step": np.append(last, -1) if residual else last,
        "grad_sum": gathered(moments.grad_sum),
        "grad_sumsq": gathered(moments.grad_sumsq),
        "update_abs_sum": gathered(moments.update_abs_sum),
    }


def _active(moments: Moments) -> NDArray[np.bool_]:
    """Cells that have a row of their own: those with an event under any rule. What another process holds has none here."""
    active = np.zeros(moments.grad_sum.shape, np.bool_)
    for counts in moments.events.values():
        active |= counts > 0
    return active


def rounded(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Values to `MANTISSA_BITS` bits of mantissa, to nearest and ties to even: a relative error of at most 2⁻¹⁴.

    What is cut off is noise that no compression can shrink; a sum of so few samples is uncertain by far more.

    Examples:
        >>> rounded(np.array([1.0, 1.00001, -0.1], np.float32))
        array([ 1.        ,  1.        , -0.09999847], dtype=float32)
    """
    cut = 23 - MANTISSA_BITS
    bits = values.view(np.uint32)
    bits = bits + np.uint32((1 << (cut - 1)) - 1) + (bits >> np.uint32(cut) & np.uint32(1))
    return (bits & ~np.uint32((1 << cut) - 1)).view(np.float32)


def windows_table(window: WindowRecord, source: str) -> pa.Table:
    """One row per parameter, also for parameters that were never observed in the window (exposure 0)."""
    rows = [
        {
            "window": window.index,
            "first_step": window.first_step,
            "last_step": window.last_step,
            "parameter": item.name,
            "source": source,
            "exposure": item.moments.exposure,
            "update_exposure": item.moments.update_exposure,
            "nonfinite_steps": item.nonfinite_steps,
            "cell_rows": int(_active(item.moments).sum()),
            "histogram_log2_bin": list(item.histogram),
            "histogram_count": list(item.histogram.values()),
            "displacement": item.displacement,
            "path": item.path,
            "weight_norm": item.weight_norm,
            "learning_rate": item.learning_rate,
            "weight_decay": item.weight_decay,
            "decay": item.decay,
            "momentum": item.momentum,
            "flowing": item.flowing,
            "absorbed": item.absorbed,
            "part_offset": list(item.part_offset),
            "part_shape": list(item.part_shape),
        }
        for item in window.parameters
    ]
    return pa.Table.from_pylist(rows, schema=WINDOWS_SCHEMA)


def firings_table(window: WindowRecord) -> pa.Table:
    """One row per sampled token and module: the units that fired, and their energy."""
    parts = [_firings_of(window.index, sample) for sample in window.firings]
    return concat(parts, FIRINGS_SCHEMA) if parts else FIRINGS_SCHEMA.empty_table()


def _firings_of(index: int, sample: FiringSample) -> pa.Table:
    tokens = len(sample.positions)
    columns = {
        "window": pa.array(np.full(tokens, index, np.int32)),
        "step": pa.array(np.full(tokens, sample.step, np.int64)),
        "position": pa.array(sample.positions),
        "module": pa.DictionaryArray.from_arrays(pa.array(np.zeros(tokens, np.int32)), pa.array([sample.module])),
        "units": pa.ListArray.from_arrays(pa.array(sample.offsets), pa.array(sample.units)),
        "energy": pa.ListArray.from_arrays(pa.array(sample.offsets), pa.array(sample.energy)),
        "width": pa.array(np.full(tokens, sample.width, np.int32)),
    }
    return pa.table(columns, schema=FIRINGS_SCHEMA)


def phantoms_table(window: WindowRecord) -> pa.Table:
    """One row per cell of every weight whose phantom gradients were sampled."""
    parts = []
    for item in window.phantoms or ():
        rows, columns = np.indices(item.grad_sum.shape)
        count = rows.size
        floats = {
            name: rounded(getattr(item, name).astype(np.float32).reshape(-1))
            for name in ("grad_sum", "grad_sumsq", "sum_squares")
        }
        values = {
            "window": np.full(count, window.index, np.int32),
            "parameter": pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([item.name])),
            "exposure": np.full(count, item.exposure),
            "cell_row": rows.reshape(-1).astype(np.int32),
            "cell_column": columns.reshape(-1).astype(np.int32),
            "events": item.events.reshape(-1),
            **floats,
        }
        parts.append(pa.table(values, schema=PHANTOMS_SCHEMA))
    return concat(parts, PHANTOMS_SCHEMA)


def phantom_windows(table: pa.Table, shapes: Mapping[str, tuple[int, int]]) -> Iterator[PhantomWindow]:
    """What `phantoms_table` wrote of the weights that `shapes` names, of those that were sampled.

    Args:
        table: rows of a window, with all rows of each of these weights behind one another.
        shapes: cells of each weight.
    """
    if not table.num_rows:
        return
    parameter = table["parameter"].unify_dictionaries().combine_chunks()
    names, codes = parameter.dictionary.to_pylist(), parameter.indices.to_numpy()
    kinds = {"events": np.int64, "grad_sum": np.float64, "grad_sumsq": np.float64, "sum_squares": np.float64}
    columns = {column: table[column].to_numpy() for column in (*kinds, "exposure")}
    for begin, end in itertools.pairwise([0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)]):
        name = names[codes[begin]]
        if name in shapes:
            yield PhantomWindow(
                name=name,
                exposure=int(columns["exposure"][begin]),
                **{
                    column: columns[column][begin:end].astype(kind).reshape(shapes[name])
                    for column, kind in kinds.items()
                },
            )


def firing_matrix(table: pa.Table) -> NDArray[np.float32]:
    """Energies ``[T, U]`` from rows of ``firings`` of one module."""
    table = table.combine_chunks()
    if table.num_rows == 0:
        return np.zeros((0, 0), np.float32)
    lengths = pc.list_value_length(table["units"]).to_numpy()
    energy = np.zeros((table.num_rows, int(table["width"][0].as_py())), np.float32)
    tokens = np.repeat(np.arange(table.num_rows), lengths)
    energy[tokens, pc.list_flatten(table["units"]).to_numpy()] = pc.list_flatten(table["energy"]).to_numpy()
    return energy


def rows_of(table: pa.Table, column: str, name: str) -> pa.Table:
    """The rows whose dictionary column has that value."""
    return table.filter(pc.equal(table[column], name))


def concat(tables: Iterable[pa.Table], schema: pa.Schema) -> pa.Table:
    """All rows in one table; dictionaries are unified."""
    found = list(tables)
    return pa.concat_tables(found).unify_dictionaries() if found else schema.empty_table()


def join_window_rows(tables: list[pa.Table]) -> pd.DataFrame:
    """Rows of the ``windows`` table of one window, one per parameter, from those of every process.

    A parameter that was held in parts has a row per part. Counts and histograms add; means over elements are weighted by the
    part's size; norms add in squares; exposure is the largest, as in `Moments.join`.
    """
    frame: pd.DataFrame = concat(tables, WINDOWS_SCHEMA).to_pandas()
    frame = frame.astype({"parameter": "object", "source": "object"})
    if not frame["parameter"].duplicated().any():
        return frame
    return pd.DataFrame([_joined(parts) for _, parts in frame.groupby("parameter", sort=False)])


def _joined(parts: pd.DataFrame) -> pd.Series[Any]:
    row = parts.iloc[0].copy()
    if len(parts) == 1:
        return row
    sizes = parts["part_shape"].map(np.prod).to_numpy(float)
    histogram: Counter[int] = Counter()
    for bins, counts in zip(parts["histogram_log2_bin"], parts["histogram_count"], strict=True):
        histogram.update(dict(zip(bins, counts, strict=True)))
    row["histogram_log2_bin"], row["histogram_count"] = np.array(list(histogram)), np.array(list(histogram.values()))
    row["cell_rows"] = parts["cell_rows"].sum()
    for name in ("exposure", "update_exposure", "nonfinite_steps"):
        row[name] = parts[name].max()
    for name in ("flowing", "absorbed"):
        row[name] = parts[name].sum()
    for name in ("displacement", "path"):
        row[name] = np.average(parts[name], weights=sizes)
    row["weight_norm"] = float(np.sqrt((parts["weight_norm"] ** 2).sum()))
    return row
