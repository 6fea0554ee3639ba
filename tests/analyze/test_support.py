"""P-values, corrections and outcomes against scipy, against what is written out, and against planted truth."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

import gradloc
from gradloc import errors
from gradloc.analyze.combine import NEARLY_ONE, combined
from gradloc.analyze.correction import CORRECTIONS, rejected
from gradloc.analyze.criteria import CRITERIA, score_statistic
from gradloc.analyze.nulls import against_normal, against_sample, empirical_scale
from gradloc.analyze.support import DependencyTests
from gradloc.core.artifact import save_artifact
from gradloc.core.layout import CellGrid
from gradloc.core.standard_layouts import plain_layout

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=40).map(np.array)


@settings(deadline=None, max_examples=80)
@given(P_VALUES, st.sampled_from([0.01, 0.05, 0.2]))
def test_corrections_by_their_definitions(p: np.ndarray, alpha: float) -> None:
    """Step-up and step-down one p-value at a time."""
    m, order = len(p), np.argsort(p, kind="stable")
    expected = {name: np.zeros(m, bool) for name in CORRECTIONS}
    expected["none"] = p <= alpha
    expected["bonferroni"] = p * m <= alpha
    going = True
    for rank, place in enumerate(order):
        going &= p[place] * (m - rank) <= alpha
        expected["holm"][place] = going
    shares = {"bh": 1.0, "by": sum(1 / k for k in range(1, m + 1)), "storey": min(1.0, (1 + (p > 0.5).sum()) / (m / 2))}
    for name, share in shares.items():
        passing = [rank for rank, place in enumerate(order) if p[place] * m * share / (rank + 1) <= alpha * (1 + 1e-12)]
        if passing:
            expected[name][order[: max(passing) + 1]] = True
    for name in CORRECTIONS:
        found = rejected(p, alpha, name)
        scaled = p[:, None] * m * shares.get(name, 1.0) / np.arange(1, m + 1)
        edge = np.abs(scaled / alpha - 1).min() < 1e-9  # rounding may decide
        if not edge:
            np.testing.assert_array_equal(found, expected[name], err_msg=name)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.integers(0, 1000))
def test_channels_are_tested_together(channels: int, seed: int) -> None:
    z = np.random.default_rng(seed).normal(size=(3, 4, channels)) * 2
    difference, equivalence = against_normal(z, 2.0)
    for o, i in np.ndindex(3, 4):
        q = sum((value / 2.0) ** 2 for value in z[o, i])
        assert difference[o, i] == pytest.approx(stats.chi2.sf(q, channels), rel=1e-9)
        if channels > 1:
            assert equivalence[o, i] == pytest.approx(stats.ncx2.cdf(q, channels, 9 * channels), rel=1e-6)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 30), st.integers(1, 200), st.integers(0, 1000))
def test_p_values_from_a_sample_count_it(size: int, drawn: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    z, null = random.normal(size=(size, 2, 1)), random.normal(size=(drawn, 1))
    difference = against_sample(z, null)
    for place in np.ndindex(size, 2):
        larger = sum(abs(value) >= abs(z[(*place, 0)]) for value in null[:, 0])
        assert difference[place] == pytest.approx((1 + larger) / (1 + drawn))


def test_the_empirical_scale_finds_each_rows_noise_under_signal() -> None:
    """Rows of unlike noise, a tenth of the statistics large: never too small, and close."""
    random = np.random.default_rng(0)
    noise = np.exp(random.normal(0, 0.7, (40, 1)))
    z = random.normal(size=(40, 400)) * noise
    signal = random.random(z.shape) < 0.1
    found = empirical_scale(np.where(signal, 50.0, z)[:, :, None])[:, 0, 0]
    ratio = found / noise[:, 0]
    assert 0.85 < ratio.min() < ratio.max() < 1.45
    assert 1.0 < np.median(ratio) < 1.25
    even = empirical_scale(random.normal(size=(40, 400, 1)))[:, 0, 0]
    assert even.max() / even.min() < 1.1  # rows alike are not told apart by their chance


@pytest.mark.parametrize("share", [0.1, 0.3, 0.45, 0.7, 0.95])
def test_weights_that_never_moved_leave_the_scale_of_the_others_alone(share: float) -> None:
    """Inputs that are always 0, in every row; and rows of units that never fired."""
    random = np.random.default_rng(0)
    z = random.normal(scale=3.0, size=(40, 400, 1))
    z[:, : int(400 * share)] = 0
    z[:7] = 0
    found = empirical_scale(z)[:, 0, 0]
    assert np.median(found) == pytest.approx(3.0, rel=0.06)
    assert found == pytest.approx(3.0, rel=0.25)
    difference, _ = against_normal(z, empirical_scale(z))
    assert (difference[z[:, :, 0] != 0] < 0.05).mean() == pytest.approx(0.05, abs=0.02)
    assert (difference[z[:, :, 0] == 0] == 1).all()


def test_a_scale_needs_statistics_that_moved() -> None:
    still = np.zeros((10, 20, 1))
    assert (empirical_scale(still) == 0).all()
    still[3, :10] = np.arange(1, 11)[:, None]
    assert np.isnan(empirical_scale(still)).all()


def test_pure_noise_with_dead_inputs_finds_nothing(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(64, 32, bias=False)
    start = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=20)
    for _ in range(100):
        x = torch.randn(64, 64)
        x[:, :20] = 0
        (model(x) - x @ start.T - torch.randn(64, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    support = gradloc.find_support(tmp_path / "r", null="init")
    assert (support.outcomes()["weight"] == 1).mean() < 0.002
    assert (support.at("row").outcomes()["weight"] == 1).mean() < 0.1


@pytest.mark.parametrize("ones", [1, 20])
def test_p_values_of_one_do_not_undo_a_finding(ones: int) -> None:
    """As weights of dead inputs have, which were 1 in exact arithmetic."""
    p = np.full(64, 1e-9)
    p[:ones] = 1.0
    assert combined(p) < 1e-8
    alone = np.random.default_rng(0).random(63)
    assert combined(np.append(alone, 1.0)) > combined(alone)
    assert combined(np.ones(64)) > 0.9
    assert combined(np.ones(1)) > 0.999999


def test_a_p_value_of_nearly_1_does_not_undo_the_others() -> None:
    """A weight that hardly moved, beside one that certainly did: its p-value of 1 - 1e-10 made that of the row 1."""
    random = np.random.default_rng(0)
    row = random.random(100)
    row[0] = 1e-6
    for near in (1e-7, 1e-10, 1e-13):
        row[1] = 1 - near
        assert combined(row) == pytest.approx(1e-4, rel=0.05)
    # The level is what it was.
    p = random.random((200_000, 8))
    assert (combined(p, axis=1) < 0.05).mean() == pytest.approx(0.05, abs=0.002)


@pytest.mark.parametrize("count", [2, 5])
def test_combining(count: int) -> None:
    random = np.random.default_rng(1)
    p = random.random((count, 20_000))
    for method in ("cauchy", "fisher"):
        assert (combined(p, method) < 0.05).mean() == pytest.approx(0.05, abs=0.006)
    # The same test several times over: Cauchy holds, Fisher doesn't.
    same = np.repeat(p[:1], count, axis=0)
    np.testing.assert_allclose(combined(same), np.minimum(same[0], 1 - NEARLY_ONE / count), rtol=1e-6)
    assert (combined(same, "fisher") < 0.05).mean() > 0.07
    assert combined(np.array([1e-200, 1.0, 0.5])) == pytest.approx(3e-200, rel=1e-6)


def planted(
    path, seed: int = 0, steps: int = 600, change: float = 1.0, **more: object
) -> tuple[gradloc.Run, np.ndarray]:
    """A linear student that begins where a tenth of its weights are wrong."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    student = nn.Linear(32, 24)
    truth = torch.rand(24, 32, generator=generator) < 0.1
    target = student.weight.detach() + change * truth
    optimizer = torch.optim.SGD(student.parameters(), lr=0.02, momentum=0.9)
    gradloc.wrap(
        optimizer,
        student,
        run=path,
        **({"every": 1, "update_every": 1, "granularity": "element", "flush_every": steps // 20} | more),
    )
    for step in range(steps):
        x = torch.randn(64, 32, generator=generator)
        y = x @ target.T + torch.randn(64, 24, generator=generator)
        (0.5 * (student(x) - y).square().sum(1).mean()).backward()
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    return gradloc.load_run(path), truth.numpy()


def test_planted_changes_are_found_and_others_reverted(tmp_path) -> None:
    run, truth = planted(tmp_path / "r")
    support = gradloc.find_support(run, null="init", include=["weight"])
    found = support.outcomes(0.05)["weight"]
    assert (found[truth] == 1).all()
    assert (found == 1)[~truth].sum() <= 0.1 * truth.sum()
    assert (found[~truth] == -1).mean() > 0.3
    assert not (found[truth] == -1).any()
    table = support.table(0.05).iloc[0]
    assert table["supported"] + table["unsupported"] + table["undecided"] == pytest.approx(1)


def test_nothing_planted_nothing_found(tmp_path) -> None:
    run, _truth = planted(tmp_path / "r", change=0.0)
    for criterion in ("wald", "score", "drift", "wald+score"):
        found = gradloc.find_support(run, criterion, "init", include=["weight"]).outcomes(0.05)["weight"]
        assert (found == 1).sum() <= 1, criterion


def test_wald_and_drift_statistics_written_out(tmp_path) -> None:
    run, _ = planted(tmp_path / "r", steps=80)
    first, last, evidence = run.weights("init")["weight"], run.weights("last")["weight"], run.evidence("weight")
    support = gradloc.find_support(run, "wald", "init", calibration="theory", samples_per_step=64, include=["weight"])
    wald = (last.astype(float) - first) * 64 * np.sqrt(evidence.grad_sumsq)
    np.testing.assert_allclose(support.tests["weight"].statistic, wald, rtol=1e-5)
    np.testing.assert_allclose(support.tests["weight"].difference, 2 * stats.norm.sf(np.abs(wald)), rtol=1e-3)
    drift = gradloc.find_support(run, "drift", "init", include=["weight"]).tests["weight"].statistic
    variance = np.zeros(wald.shape)
    for window, footer in run.store.windows().items():
        one = run.evidence("weight", (window, window + 1))
        steps = footer.last_step - footer.first_step + 1
        variance += 19 * np.pi / 2 * steps * (one.update_abs_sum / one.update_exposure) ** 2
    np.testing.assert_allclose(drift, (last.astype(float) - first) / np.sqrt(variance), rtol=1e-5)


def test_steps_without_a_gradient_are_no_steps_of_a_random_walk(tmp_path) -> None:
    """As for an expert that few tokens reach: between its steps others train, which changes nothing."""
    found = []
    for name, idle in (("alone", 0), ("in turn", 4)):
        torch.manual_seed(0)
        model = nn.ModuleDict({"own": nn.Linear(16, 8), "other": nn.Linear(16, 8)})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        gradloc.wrap(
            optimizer, model, run=tmp_path / name, every=1, flush_every=10 * (1 + idle), update_every=1, firings=False
        )
        random = torch.Generator().manual_seed(1)
        for _ in range(40):
            x = torch.randn(32, 16, generator=random)
            for part in ["own", *["other"] * idle]:
                optimizer.zero_grad()
                model[part](x).square().mean().backward()
                optimizer.step()
        gradloc.recorder_of(optimizer).close()
        tests = gradloc.find_support(gradloc.load_run(tmp_path / name), "drift", "init", include=["own.weight"]).tests
        found.append(tests["own.weight"].statistic)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3)


def test_score_and_events_statistics_written_out(tmp_path) -> None:
    run, _ = planted(tmp_path / "r", steps=80)
    windows = [run.evidence("weight", (w, w + 1)) for w in run.store.windows()]
    means = np.array([w.grad_sum / w.exposure for w in windows])
    t = stats.ttest_1samp(means, 0.0)
    found = gradloc.find_support(run, "score", "init", include=["weight"]).tests["weight"]
    np.testing.assert_allclose(found.difference, t.pvalue, rtol=1e-6)
    events = gradloc.find_support(run, "events", include=["weight"]).tests["weight"]
    counts = np.array([w.events for w in windows], float)
    rates = counts.mean(axis=(1, 2)) / windows[0].exposure
    expected = np.array([w.exposure * r for w, r in zip(windows, rates, strict=True)])[:, None, None] + 0 * counts
    spread = expected * (1 - rates)[:, None, None]
    phi = max(1.0, ((counts - expected) / np.sqrt(spread)).var(axis=0, ddof=1).mean())
    z = (counts - expected).sum(0) / np.sqrt(phi * spread.sum(0))
    np.testing.assert_allclose(events.statistic, z, rtol=1e-9)


def test_a_file_without_its_tests_is_no_support(tmp_path) -> None:
    layout = {"layout": plain_layout((2, 2)).to_dict(), "granularity": "element"}
    for tests in ({}, {"tests": {"w": {"w": layout}}, "description": {}, "chains": []}):
        path = save_artifact(tmp_path / "s", "support", {}, {"null": "zero", **tests})
        with pytest.raises(errors.StoreError, match="not a whole support file"):
            gradloc.Support.load(path)


def test_a_short_last_window_does_not_drown_the_others_in_the_score_test() -> None:
    """A run seldom ends with a full window; that of one step took a third of the power."""
    random = np.random.default_rng(0)

    def score(steps: list[int], pull: float) -> np.ndarray:
        sums = [pull * n + np.sqrt(n) * random.normal(size=(100, 100)) for n in steps]
        windows = [SimpleNamespace(grad_sum=one, exposure=n) for one, n in zip(sums, steps, strict=True)]
        return score_statistic(SimpleNamespace(by_window=lambda needed, name: windows))[:, :, 0]

    for steps in ([100] * 10, [100] * 10 + [1]):
        assert (np.abs(score(steps, 0.2)) > 1.96).mean() > 0.99
        assert (np.abs(score(steps, 0.0)) > 1.96).mean() == pytest.approx(0.05, abs=0.008)


def test_kernels_are_sequences_drawn_from_the_start_or_not(tmp_path) -> None:
    """KS of each kernel against scipy's; all taps of a kernel share an outcome."""
    torch.manual_seed(0)
    model = nn.Conv1d(4, 6, 5, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, firings=False, granularity="element")
    for _ in range(5):
        (model(torch.randn(8, 4, 9))[:, 0].square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        model.weight[2, 1] += 2.0
    gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "r")
    support = gradloc.find_support(run, "distribution", "init")
    found = support.tests["weight"].difference
    start, last = run.weights("init")["weight"].ravel(), run.weights("last")["weight"]
    empirical = stats.ecdf(start).cdf
    for o, i in np.ndindex(6, 4):
        inside = lambda x: (empirical.evaluate(x) + empirical.evaluate(np.nextafter(x, -9))) / 2  # noqa: E731
        assert found[o, i] == pytest.approx(stats.kstest(last[o, i], inside).pvalue, abs=1e-6)
    mask = support.masks(0.05, "aggressive").array("weight")
    assert mask[2, 1].all()
    assert all(len(set(taps)) == 1 for taps in mask.reshape(-1, 5).tolist())


def test_masks_that_take_back_much_evidence_together_are_warned_of(tmp_path) -> None:
    """Where training left evidence in a tenth of the weights, the tests bear the masks; where it is spread over all, they don't."""
    run, _ = planted(tmp_path / "few", steps=200)
    bearing = gradloc.find_masks(run, alpha=0.05, null="init", include=["weight"])
    assert bearing.description["parameters"]["weight"]["evidence_taken"] < 0.02
    assert "doubt" not in bearing.description

    torch.manual_seed(0)
    model = nn.Linear(32, 24)
    optimizer = gradloc.wrap(torch.optim.SGD(model.parameters(), lr=0.05), model, run=tmp_path / "all", every=1)
    dense = torch.randn(24, 32)
    for _ in range(45):
        x = torch.randn(64, 32)
        (model(x) - x @ dense.T).square().sum(1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    said = r"holds \d+% of the evidence in weight, and 10% or more in 1 of 1 parameters.*does not mean not needed"
    with pytest.warns(errors.WeakEvidenceWarning, match=said):
        spread = gradloc.find_masks(tmp_path / "all", alpha=0.05)
    assert spread.density < 0.5
    x = torch.randn(1000, 32)
    goal = x @ dense.T
    with torch.no_grad():
        before = float((model(x) - goal).square().sum())
        spread.apply(model)
        assert float((model(x) - goal).square().sum()) > before + 0.1 * float(goal.square().sum())


def test_evidence_taken_counts_every_dependency_of_a_coarser_decision() -> None:
    cells = CellGrid(plain_layout((2, 3)), "row")
    test = DependencyTests({"w": cells}, np.ones((2, 1)), np.ones((2, 1)), np.array([[3.0], [1.0]]))
    kept = np.array([[True] * 3, [False] * 3])
    assert test.share_taken(kept, "w") == pytest.approx(1 / 10)
    unknown = DependencyTests({"w": cells}, np.ones((2, 1)), np.ones((2, 1)), np.full((2, 1), np.nan))
    assert unknown.share_taken(kept, "w") == 0.0


def test_p_values_are_kept_and_explained(tmp_path) -> None:
    run, truth = planted(tmp_path / "r", steps=100)
    support = gradloc.find_support(run, null="init", include=["weight"])
    again = gradloc.Support.load(support.save(tmp_path / "p.safetensors"))
    for alpha in (0.01, 0.2):
        np.testing.assert_array_equal(again.masks(alpha).array("weight"), support.masks(alpha).array("weight"))
    place = tuple(int(i) for i in np.argwhere(truth)[0])
    told = again.explain("weight", place)
    assert told["outcome"] == "supported"
    assert told["p_difference"] == support.tests["weight"].difference[place]
    assert told["hypotheses"] == truth.size
    with pytest.raises(errors.ConfigError, match="no element"):
        again.explain("weight", (99, 0))
    with pytest.raises(KeyError, match="tested: weight"):
        again.explain("bias", (0,))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"criterion": "magnitude"}, "no p-values"),
        ({"criterion": "wald+magnitude"}, "no p-values"),
        ({"criterion": "nothing"}, "must be one of"),
        ({"criterion": "score"}, "null='init'"),
        ({"criterion": "score", "null": "init", "calibration": "init"}, "theory, empirical"),
        ({"calibration": "theory"}, "samples_per_step"),
        ({"calibration": "theory", "samples_per_step": -4}, "at least 1; got -4"),
        ({"calibration": "theory", "samples_per_step": "4"}, "at least 1; got '4'"),
        ({"combine": "sum"}, "combine='sum'"),
        ({"criterion": "wald+wald"}, "names wald twice"),
        ({"criterion": "distribution", "null": "init", "include": ["head.weight"]}, "it has one"),
        ({"criterion": "score", "null": "init", "windows": (0, 2)}, "needs 4"),
        (
            {"criterion": "drift", "null": "init", "windows": (1, 3)},
            "drift' compares how far a weight went in the whole run",
        ),
        ({"combine": "sum", "criterion": "wald+drift", "null": "init"}, "combine='sum'"),
    ],
)
def test_tests_that_cannot_be_made(recorded, settings: dict, message: str) -> None:
    *_, path = recorded(flush_every=2)
    with pytest.raises(errors.GradlocError, match=message):
        gradloc.find_support(path, **settings)


def test_too_few_statistics_claim_nothing(recorded) -> None:
    """The bulk of nine tiles can't be known: nothing is decided, and the statistic is unknown."""
    *_, path = recorded(flush_every=2)
    support = gradloc.find_support(path, "score", "init", calibration="empirical", include=["ffn.up.weight"])
    found = support.tests["ffn.up.weight"]
    assert (found.difference == 1).all()
    assert np.isnan(found.statistic).all()
    assert support.table()["undecided"].tolist() == [1.0]


def test_input_norms_leave_a_model_in_training_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradloc.input_norms(model, [torch.randn(16, 4)])
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_input_norms_of_a_layer_that_is_called_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(input=x)

    norms = gradloc.input_norms(Named(), [torch.tensor([[3.0, 0.0], [4.0, 0.0]])])
    np.testing.assert_array_equal(norms["layer.weight"], [5.0, 0.0])


def test_every_baseline_ranks(recorded) -> None:
    model, _, path = recorded()
    names = ["ffn.up.weight", "ffn.down.weight"]
    batches = [torch.randint(11, (4, 9))]
    inputs = gradloc.input_norms(model, batches)
    run = gradloc.load_run(path)
    first, last = run.weights("init"), run.weights("last")
    expected = {
        "magnitude": lambda n: np.abs(last[n]),
        "magnitude_increase": lambda n: np.abs(last[n]) - np.abs(first[n]),
        "movement": lambda n: last[n].astype(float) ** 2 - first[n].astype(float) ** 2,
        "wanda": lambda n: np.abs(last[n]) * inputs[n][None, :],
    }
    expected["saliency"] = lambda n: (
        last[n].astype(float) ** 2 * np.sqrt(run.evidence(n).mean_grad_sumsq() / run.evidence(n).exposure)
    )
    assert set(expected) | {"random", "wald", "score", "drift", "events", "distribution"} == set(CRITERIA)
    for criterion, score in expected.items():
        for scope in ("global", "layer", "unit"):
            masks = gradloc.find_masks(run, criterion, density=0.25, scope=scope, include=names, inputs=inputs)
            for name in names:
                kept, values = masks.array(name), score(name)
                groups = [(kept, values)] if scope != "unit" else list(zip(kept, values, strict=True))
                for mask, value in groups:
                    assert value[mask].min() >= value[~mask].max() - 1e-6
                    if scope != "global":
                        assert mask.sum() == round(0.25 * mask.size)
    with pytest.raises(errors.ConfigError, match="calibration data"):
        gradloc.find_masks(run, "wanda", density=0.5, include=names)
    budget = gradloc.find_masks(run, budget=123, include=names)
    assert sum(int(budget.array(name).sum()) for name in names) == 123
