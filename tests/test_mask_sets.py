"""Masks as sets, as PyTorch's own forms, as deltas; and why a dependency stayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize, prune

import gradloc
from gradloc import errors
from gradloc.store.delta import RawTensor, SparseDelta

# These runs are too short for their tests to bear masks; what is decided is looked at here, not whether it is right.
pytestmark = pytest.mark.filterwarnings("ignore::gradloc.errors.WeakEvidenceWarning")

UP = "ffn.up.weight"
BOOLEANS = st.lists(st.booleans(), min_size=6, max_size=6).map(np.array)


@given(BOOLEANS, BOOLEANS)
def test_set_operations_element_by_element(a: np.ndarray, b: np.ndarray) -> None:
    """`only` has no mask in the second set: it counts as kept whole there."""
    one, other = gradloc.MaskSet({"w": a, "only": a}), gradloc.MaskSet({"w": b})
    for found, rule in (
        (one & other, lambda x, y: x and y),
        (one | other, lambda x, y: x or y),
        (one - other, lambda x, y: x and not y),
        (one ^ other, lambda x, y: x != y),
    ):
        assert found.array("w").tolist() == [rule(x, y) for x, y in zip(a, b, strict=True)]
        assert found.array("only").tolist() == [rule(x, True) for x in a]
    assert (~one).array("w").tolist() == [not x for x in a]


@given(BOOLEANS, BOOLEANS)
def test_the_difference_of_two_masks(a: np.ndarray, b: np.ndarray) -> None:
    table = gradloc.MaskSet({"w": a}).diff(gradloc.MaskSet({"w": b})).set_index("parameter")
    for name in ("w", "all"):
        row = table.loc[name]
        assert row["weights"] == 6
        assert row["both"] == pytest.approx(np.mean(a & b))
        assert row["only_this"] == pytest.approx(np.mean(a & ~b))
        assert row["only_other"] == pytest.approx(np.mean(b & ~a))
        assert row["neither"] == pytest.approx(np.mean(~a & ~b))
        if (a | b).any():
            assert row["jaccard"] == pytest.approx((a & b).sum() / (a | b).sum())
        else:
            assert np.isnan(row["jaccard"])


def test_sets_that_do_not_fit_are_refused() -> None:
    one = gradloc.MaskSet({"w": np.array([True])})
    other = gradloc.MaskSet({"w": np.array([True])}, null="init", null_values={"w": np.zeros(1)})
    with pytest.raises(errors.ConfigError, match="would go back to different values"):
        one & other
    with pytest.raises(errors.ConfigError, match="different null values"):
        other & gradloc.MaskSet({"w": np.array([True])}, null="init", null_values={"w": np.ones(1)})
    with pytest.raises(errors.ConfigError, match="shapes"):
        one | gradloc.MaskSet({"w": np.array([True, False])})
    with pytest.raises(TypeError):
        one & 3


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(x))


def test_a_shared_weight_is_masked_once_under_either_name() -> None:
    keep = torch.rand(5, 4) > 0.5
    for name in ("table.weight", "head.weight"):
        model = Tied()
        gradloc.MaskSet({name: keep}).apply(model)
        assert (model.head.weight[~keep] == 0).all()
        model = gradloc.parametrize_model(Tied(), gradloc.MaskSet({name: keep}))
        assert (model.head.weight[~keep] == 0).all()
        assert (model.table.weight[~keep] == 0).all()
    gradloc.MaskSet({"table.weight": keep, "head.weight": keep}).apply(Tied())
    with pytest.raises(errors.ModelMismatchError, match="are one shared parameter, and their masks differ"):
        gradloc.MaskSet({"table.weight": keep, "head.weight": ~keep}).apply(Tied())


@pytest.mark.parametrize("null", ["zero", "init"])
def test_a_parametrized_model_computes_what_the_masked_one_does_and_stays_so(recorded, null: str) -> None:
    model, _, path = recorded()
    masks = gradloc.find_masks(path, null=null, density=0.4, include=[UP, "conv.weight"])
    tokens = torch.randint(11, (3, 6))
    gradloc.parametrize_model(model, masks)
    with torch.no_grad():
        outputs = model(tokens)
    start = gradloc.load_run(path).weights("init")[UP]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens).square().mean().backward()
        optimizer.step()
    away = ~masks[UP]
    goal = torch.zeros(masks[UP].shape) if null == "zero" else torch.from_numpy(start)
    assert torch.equal(model.ffn.up.weight.detach()[away], goal[away])
    parametrize.remove_parametrizations(model.ffn.up, "weight")
    parametrize.remove_parametrizations(model.conv, "weight")
    plain, _, _ = model, None, None
    assert "ffn.up.weight" in dict(plain.named_parameters())
    fresh = type(model)()
    fresh.load_state_dict({n: torch.from_numpy(w) for n, w in gradloc.load_run(path).weights("last").items()})
    masks.apply(fresh)
    with torch.no_grad():
        torch.testing.assert_close(fresh(tokens), outputs)


def test_a_pruned_model_is_one_for_torch(recorded) -> None:
    model, _, path = recorded()
    masks = gradloc.find_masks(path, density=0.4, include=[UP])
    gradloc.prune_model(model, masks)
    assert prune.is_pruned(model)
    assert torch.equal(model.ffn.up.weight_mask.bool(), masks[UP])
    prune.remove(model.ffn.up, "weight")
    assert (model.ffn.up.weight[~masks[UP]] == 0).all()
    with pytest.raises(errors.ConfigError, match="parametrize_model"):
        gradloc.prune_model(model, gradloc.find_masks(path, null="init", density=0.4, include=[UP]))


def test_a_pruning_mask_lies_where_its_parameter_does() -> None:
    model = gradloc.prune_model(nn.Linear(2, 2, device="meta"), gradloc.MaskSet({"weight": np.eye(2, dtype=bool)}))
    assert model.weight_mask.device.type == "meta"


@pytest.mark.parametrize("way", ["parametrize_model", "prune_model"])
def test_masking_what_is_masked_already_says_how_to_undo_it(way: str) -> None:
    masks = gradloc.MaskSet({"0.weight": np.eye(2, dtype=bool)})
    model = getattr(gradloc, way)(nn.Sequential(nn.Linear(2, 2)), masks)
    expected = {
        "parametrize_model": "parametrized one: torch.nn.utils.parametrize.remove_parametrizations",
        "prune_model": "pruned one: torch.nn.utils.prune.remove",
    }
    for again in (gradloc.parametrize_model, gradloc.prune_model, lambda m, k: k.apply(m)):
        with pytest.raises(errors.ModelMismatchError, match=expected[way]):
            again(model, masks)
    own = gradloc.MaskSet({"weight": np.eye(2, dtype=bool)})
    with pytest.raises(errors.ModelMismatchError, match=expected[way]):
        gradloc.parametrize_model(model[0], own)


def test_arrays_that_torch_cannot_share_are_copied() -> None:
    """Read-only and backwards ones; torch warns of the first and refuses the second."""
    backwards = np.array([True, False, False])[::-1]
    wide = np.broadcast_to(np.array([True, False]), (3, 2))
    masks = gradloc.MaskSet(
        {"a": backwards, "b": wide}, null="given", null_values={"a": np.arange(3.0)[::-1], "b": np.ones(2) * wide}
    )
    assert masks["a"].tolist() == [False, False, True]
    assert masks["b"].tolist() == [[True, False]] * 3
    assert masks.null_tensor("a", torch.zeros(3)).tolist() == [2, 1, 0]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 40), st.sampled_from([1, 2, 4, 8]), st.floats(0, 1), st.integers(0, 99))
def test_a_delta_is_exact_for_any_bytes(count: int, width: int, share: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    base = random.integers(0, 256, (count, width), np.uint8)
    tuned = np.where(random.random((count, 1)) < share, random.integers(0, 256, (count, width), np.uint8), base)
    tensors = [{"w": RawTensor("any", (count,), data)} for data in (base, tuned)]
    delta = SparseDelta.between(*tensors)
    np.testing.assert_array_equal(delta.apply(tensors[0])["w"].data, tuned)
    assert delta.tensors["w"]["changed"] == (base != tuned).any(axis=1).sum()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_delta_of_reverted_fine_tuning(tmp_path: Path, kind: torch.dtype) -> None:
    """Recorded from the base; what the masks don't support is the base again, to the bit, and the file is small."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).to(kind)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, granularity="element")
    for _ in range(5):
        model(torch.randn(4, 64, dtype=kind)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    masks = gradloc.find_masks(tmp_path / "r", null="init", density=0.1)
    delta = gradloc.sparse_delta(base, model, masks)
    file = delta.save(tmp_path / "d.safetensors")
    again = gradloc.apply_delta(base, file)
    for name, tensor in model.state_dict().items():
        expected = torch.where(masks[name], tensor, base[name]) if name in masks else tensor
        assert again[name].dtype is kind
        assert torch.equal(again[name], expected)
    assert file.stat().st_size < 0.35 * delta.full_nbytes + 2000
    assert delta.density < 0.2
    model.load_state_dict(again)


def test_a_delta_of_another_base_is_refused(tmp_path: Path) -> None:
    base = {"w": torch.zeros(3), "v": torch.ones(2)}
    delta = gradloc.sparse_delta(base, {"w": torch.tensor([0.0, 1.0, 0.0])})
    with pytest.raises(errors.ModelMismatchError, match="isn't the checkpoint"):
        gradloc.apply_delta({"w": torch.tensor([0.0, 0.0, 5.0])}, delta)
    with pytest.raises(errors.ModelMismatchError, match="w is missing"):
        gradloc.apply_delta({"v": torch.ones(2)}, delta)
    with pytest.raises(errors.ModelMismatchError, match=r"float32 \(4,\) in the base"):
        gradloc.apply_delta({"w": torch.zeros(4)}, delta)
    with pytest.raises(errors.ConfigError, match="find them with null"):
        gradloc.sparse_delta(base, base, gradloc.MaskSet({"w": np.array([True, False, True])}))
    other = gradloc.MaskSet(
        {"w": np.array([True, False, True])}, null="init", null_values={"w": np.ones(3, np.float32)}
    )
    with pytest.raises(errors.ModelMismatchError, match="didn't begin at this checkpoint"):
        gradloc.sparse_delta(base, base, other)
    path = delta.save(tmp_path / "d.safetensors")
    with pytest.raises(errors.ConfigError, match="expected a gradloc masks file, found delta"):
        gradloc.MaskSet.load(path)


def test_a_delta_of_tied_weights_reverts_them_at_both_names() -> None:
    model = Tied()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.table.weight += 1
    keep = torch.rand(5, 4) > 0.5
    masks = gradloc.MaskSet({"table.weight": keep}, null="init", null_values={"table.weight": base["table.weight"]})
    again = gradloc.apply_delta(base, gradloc.sparse_delta(base, model, masks))
    for name in ("table.weight", "head.weight"):
        assert torch.equal(again[name], torch.where(keep, base[name] + 1, base[name]))


def test_why_a_dependency_was_kept(recorded) -> None:
    *_, path = recorded()
    run = gradloc.load_run(path)
    masks = gradloc.find_masks(run, density=0.4)
    last, evidence = run.weights("last")[UP], run.evidence(UP)
    sizes = evidence.cells.cell_sizes()
    for place in [(0, 0), (5, 19), (30, 7)]:
        said = gradloc.explain(run, masks, UP, place)
        cell = place[0] // 16, place[1] // 16
        rms = np.sqrt(evidence.grad_sumsq[cell] / sizes[cell] / evidence.exposure)
        assert said["kept"] == masks.array(UP)[place] == (said["score"] >= said["threshold"])
        assert said["rms_gradient"] == pytest.approx(rms)
        assert said["score"] == pytest.approx(last[place].astype(float) ** 2 * rms, rel=1e-5)
        assert said["events"] == evidence.events[cell]
        assert 0 <= said["smaller_scores"] <= 1
    unit = gradloc.find_masks(run, density=0.4, granularity="unit")
    assert gradloc.explain(run, unit, UP, (3, 3))["decided_with"] == ["ffn.up.bias", "ffn.down.weight"]
    tested = gradloc.find_masks(run, alpha=0.1, null="init", policy="aggressive")
    said = gradloc.explain(run, tested, UP, (3, 3))
    assert said["kept"] == tested.array(UP)[3, 3] == (said["outcome"] == "supported")
    with pytest.raises(errors.ConfigError, match="is no element"):
        gradloc.explain(run, masks, UP, (1000, 0))
    with pytest.raises(errors.ConfigError, match="not from"):
        gradloc.explain(run, gradloc.MaskSet({UP: masks.array(UP)}), UP, (0, 0))
    with pytest.raises(KeyError, match="no mask for 'nowhere'"):
        gradloc.explain(run, masks, "nowhere", (0, 0))


def test_one_flipped_bit_of_a_file_is_noticed(tmp_path: Path) -> None:
    """Wherever it is: arrays or description. Most would change a weight without a word."""
    torch.manual_seed(0)
    base = {"w": torch.randn(60, 40)}
    tuned = {"w": base["w"] + 1e-3 * torch.randn(60, 40) * (torch.rand(60, 40) < 0.1)}
    whole = gradloc.sparse_delta(base, tuned).save(tmp_path / "d").read_bytes()
    random = np.random.default_rng(0)
    for place in random.integers(0, len(whole), 200):
        content = bytearray(whole)
        content[place] ^= 1 << int(random.integers(8))
        (tmp_path / "harmed").write_bytes(content)
        try:
            found = gradloc.apply_delta(base, tmp_path / "harmed")
        except errors.GradlocError:
            continue
        assert torch.equal(found["w"], tuned["w"])  # spaces between the header and the arrays
    assert torch.equal(gradloc.apply_delta(base, tmp_path / "d")["w"], tuned["w"])


def test_numbers_of_numpy_are_described_as_numbers(recorded, tmp_path: Path) -> None:
    *_, path = recorded()
    for settings_ in ({"density": np.float32(0.5), "windows": (np.int64(0), np.int64(2))}, {"budget": np.int64(30)}):
        masks = gradloc.find_masks(path, include=[UP], **settings_)
        again = gradloc.MaskSet.load(masks.save(tmp_path / "m"))
        assert np.array_equal(again.array(UP), masks.array(UP))
        assert gradloc.explain(path, again, UP, (0, 0))["kept"] == bool(masks.array(UP)[0, 0])


def test_null_values_of_half_precision(recorded) -> None:
    model, _, path = recorded()
    half = {name: p.detach().bfloat16() for name, p in model.named_parameters()}
    masks = gradloc.find_masks(path, null=half, density=0.5, include=[UP])
    own = gradloc.MaskSet({UP: masks[UP]}, null="given", null_values={UP: half[UP]})
    for one in (masks, own):
        assert torch.equal(one.null_tensor(UP, half[UP]), half[UP])


def test_a_compiled_model_gives_its_weights(recorded) -> None:
    model, _, path = recorded()
    plain = gradloc.find_masks(path, density=0.5, model=model)
    compiled = gradloc.find_masks(path, density=0.5, model=torch.compile(model, backend="eager"))
    assert (plain ^ compiled).density == 0


def test_a_delta_from_a_base_with_nan_and_of_what_is_no_tensor() -> None:
    base, tuned = {"w": torch.tensor([float("nan"), 1.0])}, {"w": torch.tensor([2.0, 3.0])}
    masks = gradloc.MaskSet({"w": np.array([False, True])}, null="init", null_values={"w": base["w"].numpy()})
    found = gradloc.apply_delta(base, gradloc.sparse_delta(base, tuned, masks))["w"]
    assert torch.isnan(found[0])
    assert found[1] == 3.0
    with pytest.raises(errors.ConfigError, match="_extra_state are no tensors"):
        gradloc.sparse_delta(base | {"_extra_state": 3}, tuned | {"_extra_state": 4})


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_a_direction_that_a_norm_divides_by_is_not_emptied(norm: Any) -> None:
    """A row of zeros is 0 / 0 there, and the model gave NaN."""
    model = nn.Sequential(norm(nn.Linear(4, 6)))
    (name,) = [name for name, _ in model.named_parameters() if name.endswith(("original1", "weight_v"))]
    some, row = np.ones((6, 4), bool), np.ones((6, 4), bool)
    some[0, 1:] = False
    row[0] = False
    gradloc.MaskSet({name: some}).apply(model)
    assert torch.isfinite(model(torch.ones(1, 4))).all()
    with pytest.raises(errors.UnsupportedError, match="leaves nothing of a direction"):
        gradloc.MaskSet({name: row}).apply(model)
    with pytest.raises(errors.UnsupportedError, match="leaves nothing of a direction"):
        gradloc.Annealer(model, torch.optim.SGD(model.parameters()), gradloc.MaskSet({name: row}))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_only_directions_of_weight_norms_are_held_to_that() -> None:
    class LowRank(nn.Module):
        def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            return one @ other

        def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return weight[:, :2], weight[:2]

    for make in (nn.utils.weight_norm, nn.utils.parametrizations.weight_norm):
        model = make(nn.Linear(4, 4), dim=None)
        name = next(name for name, _ in model.named_parameters() if name.endswith(("original1", "weight_v")))
        row = np.ones((4, 4), bool)
        row[0] = False
        gradloc.MaskSet({name: row}).check(model)
        with pytest.raises(errors.UnsupportedError, match="leaves nothing of a direction"):
            gradloc.MaskSet({name: np.zeros((4, 4), bool)}).check(model)
    other = nn.Linear(4, 4)
    parametrize.register_parametrization(other, "weight", LowRank(), unsafe=True)
    gradloc.MaskSet({"parametrizations.weight.original1": np.arange(8).reshape(2, 4) > 3}).check(other)
