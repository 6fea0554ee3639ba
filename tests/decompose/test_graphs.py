"""Graphs agree with plain search, and a network's graph with what its outputs really depend on."""

from __future__ import annotations

import json
from pathlib import Path

import networkx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import gradloc
from gradloc.core.standard_layouts import fused_gates
from gradloc.decompose.dependency_graph import DependencyGraph, layered
from gradloc.decompose.directed import recurrent_graph, residual_graph
from gradloc.errors import ConfigError, ModelMismatchError, StoreError
from gradloc.route.wiring import wire_model
from tests.oracles import reach

EDGES = st.integers(1, 9).flatmap(
    lambda n: st.tuples(
        st.just(n), st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=14, unique=True)
    )
)


def as_sets(labels: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels) if label >= 0}


@settings(deadline=None, max_examples=150)
@given(EDGES)
def test_graphs_agree_with_plain_search(case: tuple[int, reach.Edges]) -> None:
    nodes, edges = case
    graph = DependencyGraph.from_edges([("all", nodes)], edges)
    assert as_sets(graph.components()) == reach.weak_components(nodes, edges)
    touched = {node for edge in edges for node in edge}
    assert set(graph.isolated().get("all", np.array([])).tolist()) == set(range(nodes)) - touched
    strong = reach.strong_components(nodes, edges)
    labels = graph.strong_components()
    assert as_sets(labels) == strong
    for number, layer in enumerate(graph.condensation_layers()):
        for component in layer:
            units = frozenset(np.flatnonzero(labels == component).tolist())
            assert reach.longest_path(units, strong, edges) == number
    closure = graph.transitive_closure()
    for a in range(nodes):
        assert {b for b in range(nodes) if closure[labels[a], labels[b]]} == reach.reached_from(a, edges)
    assert (labels[[a for a, _ in edges]] <= labels[[b for _, b in edges]]).all()  # numbered in topological order
    again = DependencyGraph.from_dict(json.loads(json.dumps(graph.to_dict())))
    assert again.to_dict() == graph.to_dict()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 9), st.floats(0, 0.6), st.integers(0, 1000))
def test_collapsed_branches_agree_with_plain_paths(width: int, hidden: int, density: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    up, down = random.random((hidden, width)) < density, random.random((width, hidden)) < density
    found = {tuple(edge) for edge in residual_graph([up, down]).to_dict()["edges"]}
    assert found == reach.residual_paths(up, down)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.sampled_from([1, 3, 4]), st.floats(0, 0.5), st.integers(0, 1000))
def test_recurrent_graphs_join_gates(units: int, gates: int, density: float, seed: int) -> None:
    mask = np.random.default_rng(seed).random((gates * units, units)) < density
    expected = {(j, i) for i in range(units) for j in range(units) if any(mask[g * units + i, j] for g in range(gates))}
    graph = recurrent_graph(mask, fused_gates(mask.shape, gates))
    assert {tuple(edge) for edge in graph.to_dict()["edges"]} == expected


def test_many_parallel_paths_are_still_a_path() -> None:
    """Counts of paths must not run over: 2^32 of them in a chain of four."""
    whole = np.ones((256, 256), bool)
    assert residual_graph([whole] * 5).edges == 256 * 256


# ---- whole networks


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Residual(nn.Module):
    """Without normalisation, so that what depends on what is exactly what the graph says."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, 3)
        self.attention = Attention(width, 3)
        self.ffn = nn.Sequential(nn.Linear(width, 9), nn.GELU(), nn.Linear(9, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.attention(x)
        x = x + self.ffn(x)
        return self.last(x)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=3)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.silu(self.norm(self.one(x))), 2)
        return self.head((x + self.two(x)).flatten(1))


class ChannelsLast(nn.Module):
    """As ConvNeXt: what accompanies a tensor must lie in memory as the tensor does, or it can't be viewed as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Conv2d(4, 6, 3, padding=1), nn.LayerNorm(6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.first(x).permute(0, 2, 3, 1)))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.head = kind(4, 5, num_layers=2, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class InPlace(nn.Module):
    """Halves go different ways and are written into slices of one buffer; a weight is used both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(6, 8), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.up(x), inplace=True)
        out = torch.zeros(len(x), 8, dtype=x.dtype)
        out[:, :4] = h[:, 4:]
        out[:, 4:] += h[:, :4] * self.gate(x[:, :3])
        return torch.cat([out, out[:, 4:] @ self.gate.weight], dim=1)


class TorchAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 3, batch_first=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.attention(x, x, x)[0])


NETWORKS = {
    "residual": (Residual, (2, 5, 6), 2, 2),
    "convolutions": (Convolutions, (2, 4, 4, 4), 1, 1),
    "lstm": (lambda: Recurrent(nn.LSTM), (2, 6, 4), 2, 2),
    "gru": (lambda: Recurrent(nn.GRU), (2, 6, 4), 2, 2),
    "in place": (InPlace, (3, 6), 1, 1),
    "torch attention": (TorchAttention, (2, 4, 6), 2, 2),
}


def masked(name: str, seed: int, density: float) -> tuple[nn.Module, gradloc.MaskSet, Tensor]:
    build, shape, _, _ = NETWORKS[name]
    torch.manual_seed(seed)
    model = build().double().eval()
    random = np.random.default_rng(seed)
    masks = gradloc.MaskSet(
        {n: random.random(tuple(p.shape)) < density for n, p in model.named_parameters() if p.ndim > 1}
    )
    masks.apply(model)
    return model, masks, torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("name", NETWORKS)
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 10_000), density=st.floats(0.1, 0.5))
def test_outputs_depend_on_what_the_graph_says(name: str, seed: int, density: float) -> None:
    """The graph never calls independent what isn't; where only products and pointwise functions are met, it says no more either."""
    model, masks, x = masked(name, seed, density)
    _, _, axis, out_axis = NETWORKS[name]
    graph = gradloc.dependency_graph(model, masks, x)
    assert graph.left_out == ()
    depends = reach.influence(model, x, axis, out_axis)
    wiring = wire_model(model, x)
    inputs = next(layer for layer in graph.layers if layer.name == "input")
    feature = _features(name, inputs.units, x)
    labels, closure = graph.strong_components(), graph.transitive_closure()
    outputs = _outputs(name, wiring, depends.shape[1])
    for i in range(x.shape[axis]):
        said = np.zeros(depends.shape[1], bool)
        for node in feature[i]:
            for o, unit in enumerate(outputs):
                said[o] |= any(
                    closure[labels[inputs.first + node], labels[u]] or inputs.first + node == u for u in unit
                )
        assert not (depends[i] & ~said).any()
        if name == "in place":  # no head or state, whose units hang together in the graph whatever the masks
            assert (depends[i] == said).all()


def _features(name: str, units: int, x: Tensor) -> list[list[int]]:
    """Input nodes of each feature."""
    width = x.shape[NETWORKS[name][2]]
    return [list(range(f, units, width)) if units == width else [f] for f in range(width)]


def _outputs(name: str, wiring: object, count: int) -> list[list[int]]:
    """Nodes of each output of the model."""
    by = {o.parameter: o for o in wiring.operators}  # type: ignore[attr-defined]
    if name == "in place":
        up = by["up.weight"].outputs
        back = [o for o in wiring.operators if o.parameter == "gate.weight"][-1].outputs  # type: ignore[attr-defined]
        return [[int(n)] for n in (*up[4:], *up[:4], *back)]
    last = "last.weight" if name == "residual" else "head.weight"
    assert len(by[last].outputs) == count
    return [[int(n)] for n in by[last].outputs]


def test_a_residual_stream_is_one_layer() -> None:
    model = Residual()
    wiring = wire_model(model, torch.zeros(1, 3, 6))
    assert [(layer.name, layer.units) for layer in wiring.layers] == [
        ("input", 6), ("first.weight", 6), ("attention.qkv.weight", 3), ("ffn.0.weight", 9), ("last.weight", 3),
    ]  # fmt: skip
    by = {operator.parameter: operator for operator in wiring.operators}
    stream = by["first.weight"].outputs.tolist()
    for reader in ("attention.qkv.weight", "ffn.0.weight", "last.weight"):
        assert by[reader].inputs.tolist() == stream
    for writer in ("attention.out.weight", "ffn.2.weight"):
        assert by[writer].outputs.tolist() == stream
    heads = by["attention.qkv.weight"].outputs.reshape(3, 3, 2)  # parts, heads, units
    assert (heads == heads[:1, :, :1]).all()
    assert len(np.unique(heads)) == 3


def test_channels_that_move_to_the_last_axis_are_followed() -> None:
    wiring = wire_model(ChannelsLast(), torch.randn(2, 4, 4, 4))
    first, head = wiring.operators
    assert [layer.units for layer in wiring.layers] == [4, 6, 5]
    assert np.array_equal(head.inputs, first.outputs)


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.random.get_rng_state()
    wire_model(model, torch.randn(3, 4, generator=torch.Generator()))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.random.get_rng_state())


def test_what_is_not_read_is_said() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.solved, self.unused = nn.Linear(3, 3), nn.Parameter(torch.eye(3)), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.solve(self.solved, self.used(x).T)

    model = Odd()
    eye = gradloc.MaskSet({"used.weight": np.eye(3, dtype=bool)})
    graph = gradloc.dependency_graph(model, eye, torch.randn(2, 3))
    assert any("unused.weight: not used" in said for said in graph.left_out)
    assert any("solved" in said and "isn't read" in said for said in graph.left_out)
    # What isn't known joins all that it reads, so that no independence is claimed.
    assert len(np.unique(graph.components())) == 1
    assert any("hang together" in note for note in graph.notes)


def test_without_an_example_chains_stay_apart() -> None:
    model = nn.ModuleDict({"ffn": nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)), "head": nn.Linear(2, 2)})
    up = np.kron(np.eye(2), np.ones((2, 1))).astype(bool)
    masks = gradloc.MaskSet({"ffn.0.weight": up, "ffn.2.weight": up.T})
    graph = gradloc.dependency_graph(model, masks)
    assert graph.left_out == ("head.weight: in no chain of linear operators; give example=",)
    assert graph.components().tolist() == [0, 1, 0, 0, 1, 1, 0, 1]
    collapsed = gradloc.dependency_graph(model, masks, of="ffn", form="collapsed")
    assert collapsed.to_dict()["edges"] == [[0, 0], [1, 1]]
    assert gradloc.dependency_graph(model, masks, of="ffn").components().tolist() == [0, 1, 0, 0, 1, 1, 0, 1]


@pytest.mark.parametrize("given", [{}, {"example": torch.zeros(1, 4)}, {"of": "ffn"}, {"of": "ffn.0.weight"}])
def test_a_weight_with_its_in_units_first_is_read_so(given: dict[str, object]) -> None:
    first = nn.ModuleDict({"ffn": nn.Sequential(Conv1D(6, 4), nn.ReLU(), Conv1D(4, 6))})
    plain = nn.ModuleDict({"ffn": nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))})
    for model in (first, plain):
        model.forward = lambda x, model=model: model["ffn"](x)
    random = np.random.default_rng(0)
    kept = {"ffn.0.weight": random.random((6, 4)) < 0.4, "ffn.2.weight": random.random((4, 6)) < 0.4}
    turned = {name: np.ascontiguousarray(mask.T) for name, mask in kept.items()}
    found, expected = (
        gradloc.dependency_graph(model, gradloc.MaskSet(masks), **given).to_dict()
        for model, masks in ((first, turned), (plain, kept))
    )
    assert sorted(map(tuple, found["edges"])) == sorted(map(tuple, expected["edges"]))


def test_an_operator_kept_whole_is_one_node_between() -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))
    only = gradloc.MaskSet({"0.weight": np.eye(4, 3, dtype=bool)})
    graph = gradloc.dependency_graph(model, only, torch.zeros(1, 3))
    assert [layer.name for layer in graph.layers] == ["input", "0.weight", "1.weight", "all of 1.weight"]
    assert graph.edges == 3 + 4 + 2
    assert (graph.components() == 0).all()
    part = gradloc.dependency_graph(model, only, torch.zeros(1, 3), include="0.*")
    assert part.components().tolist() == [0, 1, 2, 0, 1, 2, -1, -1, -1]
    assert part.left_out == ("1.weight: not among include=",)


def test_include_takes_names_as_they_are_and_refuses_each_that_matches_nothing() -> None:
    inner = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model = nn.Sequential(nn.ModuleDict({"a[0]": inner}))
    model.forward = lambda x: inner(x)
    name = "0.a[0].0.weight"
    masks = gradloc.MaskSet({name: np.eye(4, 3, dtype=bool)})
    graph = gradloc.dependency_graph(model, masks, torch.zeros(1, 3), include=name)
    assert graph.left_out == ("0.a[0].2.weight: not among include=",)
    with pytest.raises(ConfigError, match=r"'typo\.\*' matches no operator; operators: 0\.a"):
        gradloc.dependency_graph(model, masks, torch.zeros(1, 3), include=[name, "typo.*"])
    with pytest.raises(ConfigError, match="no operator that joins units"):
        gradloc.dependency_graph(nn.ReLU(), gradloc.MaskSet({}), torch.zeros(1, 3))


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_a_model_inside_a_wrapper_is_the_same(wrap) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    masks = gradloc.MaskSet({"0.weight": np.eye(4, 3, dtype=bool)})
    expected = gradloc.dependency_graph(model, masks, torch.zeros(1, 3)).to_dict()
    assert gradloc.dependency_graph(wrap(model), masks, torch.zeros(1, 3)).to_dict() == expected


def test_operators_between_the_same_layers_share_edges() -> None:
    both = np.array([[True, False], [False, True]])
    assert layered([both, np.ones((2, 2), bool)], edges=[(0, 1), (0, 1)]).edges == 4
    assert layered([both, both], edges=[(0, 0), (0, 0)]).edges == 2


def test_a_shared_weight_goes_by_its_first_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    graph = gradloc.dependency_graph(model, gradloc.MaskSet({"2.weight": np.eye(3, dtype=bool)}), torch.zeros(1, 3))
    assert not any(note.startswith("kept whole") for note in graph.notes)
    assert len(np.unique(graph.components())) == 3


def test_graphml_is_read_by_others(tmp_path: Path) -> None:
    graph = DependencyGraph.from_edges([("<in>", 2), ("out & more", 2)], [(0, 2), (0, 3)])
    found = networkx.read_graphml(graph.save_graphml(tmp_path / "g.graphml"))
    assert sorted(found.edges) == [("n0", "n2"), ("n0", "n3")]
    assert found.nodes["n3"] == {"layer": "out & more", "unit": 1, "component": 0}
    assert found.nodes["n1"]["component"] == -1
    with pytest.raises(StoreError, match="writable"):
        graph.save_graphml(tmp_path / "absent" / "g.graphml")


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="masks is empty"):
        layered([])
    with pytest.raises(ConfigError, match=r"mask 0 is int64.*mask 1 is bool of shape \(2,\)"):
        layered([np.ones((2, 2), int), np.ones(2, bool)])
    with pytest.raises(ConfigError, match="don't follow"):
        layered([np.ones((3, 2), bool), np.ones((2, 4), bool)])
    with pytest.raises(ConfigError, match="as many units as it begins with"):
        residual_graph([np.ones((3, 2), bool)])
    with pytest.raises(ConfigError, match=r"must be bool of shape \(8, 2\)"):
        recurrent_graph(np.ones((6, 2), bool), fused_gates((8, 2), 4))
    with pytest.raises(ConfigError, match="3 and 2"):
        recurrent_graph(np.ones((3, 2), bool), fused_gates((3, 2), 1))
    with pytest.raises(ConfigError, match="edges name units 0 to 5; there are 0 to 1"):
        DependencyGraph.from_edges([("a", 2)], [(0, 5)])
    with pytest.raises(ConfigError, match="names of their own"):
        DependencyGraph.from_edges([("a", 2), ("a", 1)], [])
    with pytest.raises(ConfigError, match=r"5 strong components.*most=4"):
        DependencyGraph.from_edges([("a", 5)], []).transitive_closure(most=4)
    model = nn.Sequential(nn.Linear(2, 2))
    masks = gradloc.MaskSet({"0.weight": np.eye(2, dtype=bool)})
    with pytest.raises(ConfigError, match=r"no weight and no chain; weights: 0\.weight"):
        gradloc.dependency_graph(model, masks, of="1.weight")
    with pytest.raises(ConfigError, match="of="):
        gradloc.dependency_graph(model, masks, torch.zeros(1, 2), form="collapsed")
    with pytest.raises(ConfigError, match=r"matches no operator; operators: 0\.weight"):
        gradloc.dependency_graph(model, masks, torch.zeros(1, 2), include="1.*")
    with pytest.raises(ModelMismatchError):
        gradloc.dependency_graph(model, gradloc.MaskSet({"0.weight": np.eye(3, dtype=bool)}), torch.zeros(1, 2))


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrences_are_the_same_with_the_batch_first(kind: type[nn.RNNBase]) -> None:
    """torch turns axes in place there, after which all units were one."""
    found = []
    for batch_first in (False, True):
        torch.manual_seed(0)
        model = kind(4, 8, batch_first=batch_first)
        halves = np.arange(8) // 4
        gates = len(model.weight_hh_l0) // 8
        masks = gradloc.MaskSet(
            {
                "weight_ih_l0": np.tile(halves[:, None] == np.arange(4) // 2, (gates, 1)),
                "weight_hh_l0": np.tile(halves[:, None] == halves, (gates, 1)),
            }
        )
        graph = gradloc.dependency_graph(model, masks, torch.zeros(2, 3, 4))
        assert not any("transpose" in note for note in graph.notes)
        found.append(sorted(map(len, np.unique(graph.components(), return_counts=True)[1:])))
        assert len(np.unique(graph.components())) == 2
    assert found[0] == found[1]
