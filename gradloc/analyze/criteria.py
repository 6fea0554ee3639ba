"""Scores of single dependencies: how much training supports keeping each one, and what tests that against chance.

Shape letters: `O` out units, `I` in units, `C` channels; `R`, `K` rows and columns of cells; `W` windows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import NDArray

from gradloc.analyze.subject import Subject
from gradloc.core.masks import Null
from gradloc.core.names import meant
from gradloc.errors import ConfigError

Floats = NDArray[np.float64]
LEAST_WINDOWS = 4
"""Batch means of fewer windows say too little of a variance."""


@dataclass(frozen=True)
class Criterion:
    """A named score, and the test that goes with it.

    Args:
        name: what `find_masks` calls it.
        score: what ranks dependencies, in the parameter's shape; higher stays.
        statistic: a statistic that is standard normal under the null if the theory holds, ``[O, I, C]``, or ``[R, K, 1]`` for
            criteria that know cells only. None for baselines.
        nulls: nulls it can test.
        calibrations: scales on which its p-values can be read; the first is the default.
        phantom: the statistic against phantom gradients, for ``calibration="phantom"``.
        one_sided: whether only large values speak against the null.
        needs_samples: whether its theoretical scale depends on the number of samples a step follows.
        by_window: whether it looks at each window.
    """

    name: str
    score: Callable[[Subject], Floats]
    statistic: Callable[[Subject], Floats] | None = None
    nulls: tuple[Null, ...] = ("zero", "init", "given")
    calibrations: tuple[str, ...] = ()
    phantom: Callable[[Subject], Floats] | None = None
    one_sided: bool = False
    needs_samples: bool = False
    by_window: bool = False


# ---- tests


def wald_statistic(subject: Subject) -> Floats:
    r"""Signed root of the Wald statistic, $(w - w_\text{null})\sqrt{\Sigma g^2}$, ``[O, I, C]``.

    H₀: $w = w_\text{null}$. $\Sigma g^2$ over the observed steps estimates the diagonal Fisher information up to the factor
    $B^2$ ($B$ samples a step with a mean loss): for a negative log-likelihood and samples that are seen once,
    $(w - w_\text{null})\,B\sqrt{\Sigma g^2}$ is standard normal under H₀. That is ``calibration="theory"``, and it asks for
    `samples_per_step`. With another loss, repeated samples, weight decay or before convergence the scale is different, and
    ``"empirical"`` finds it from the bulk of each unit's own statistics. On planted teachers (``benchmarks/planted.py``, 20 seeds, SGD
    with momentum and AdamW with decay 0, .1 and 1, Benjamini–Hochberg) at most .03 of the findings are false at alpha .05 and .06 at
    alpha .1 for inputs that don't correlate, 0 to 2 of 20 trainings on pure noise find anything at alpha .05, and of what an
    equivalence test calls negligible at most .04 isn't. **Not** for the readout of a frozen ReLU layer, whose inputs are correlated and have a mean: there
    .06 of the findings are false at alpha .05 with SGD and .15 with Adam; Benjamini–Yekutieli has .01 and .07. The theoretical
    scale is far too small (.3 to .9 false), and ``"init"`` holds in some settings only.

    Assumes a diagonal Fisher: dependencies that stand in for each other are each tested as if the others stayed. With
    ``null="zero"`` its square is, to second order, the loss lost by removing the dependency; with ``"init"``, by reverting it.

    Source:
        Wald (1943); for what the empirical Fisher is not, Kunstner et al., "Limitations of the empirical Fisher approximation
        for natural gradient descent" (2019).
    """
    return np.asarray(subject.displacement * np.sqrt(subject.information))


def score_statistic(subject: Subject) -> Floats:
    r"""Is there a systematic gradient? $\bar G/\sqrt{s^2/E}$ over the windows' means $G_w$ of a cell's gradient, ``[R, K, 1]``.

    Windows count by their observed steps: $\bar G = \sum_w E_w G_w/E$ and $s^2 = \sum_w E_w (G_w - \bar G)^2/(W - 1)$, $E = \sum_w E_w$. With
    windows of equal length that is the usual t statistic; the last window of a run may have a single step, whose noise counts no more than that.

    H₀: the expected gradient of the cell is 0 throughout, so that it never was pushed in one direction. The variance is that of
    batch means over windows, so that correlation within a window doesn't inflate it; the t statistic with $W - 1$ degrees is
    taken to the normal scale. It sees what pulled *during* training; a weight that was pulled quickly and then held is pulled
    both ways, and a cell of many parameters loses pulls of opposite sign. Tests ``null="init"``.

    On planted teachers it claims next to nothing, and nothing false, except under weight decay that the loss has to
    hold against: that is a systematic gradient without a change (false findings .85 with a decay of 1 in AdamW).

    Source:
        Rao's score test (1948) with batch-means variance (Conway 1963; Glynn and Whitt 1991).
    """
    windows = subject.by_window(LEAST_WINDOWS, "score")
    steps = np.array([evidence.exposure for evidence in windows], np.float64)
    means = np.stack([evidence.grad_sum / evidence.exposure for evidence in windows])
    mean = np.average(means, axis=0, weights=steps)
    error = np.sqrt(np.average((means - mean) ** 2, axis=0, weights=steps) / (len(means) - 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(error > 0, mean / error, 0.0)
    # To the normal scale by the smaller tail, which keeps its digits.
    return np.asarray(
        -np.sign(t) * scipy.stats.norm.ppf(np.maximum(scipy.stats.t.sf(np.abs(t), len(means) - 1), 1e-300))
    )[:, :, None]


def score_against_phantoms(subject: Subject) -> Floats:
    r"""Is the gradient more systematic than randomly paired activations and errors make it? ``[R, K, 1]``.

    $(\bar G - \bar{\tilde G}) / \sqrt{\tilde v(1/E + 1/\tilde E)}$: mean gradient of a cell over $E$ observed steps, that of its phantom
    over $\tilde E$ sampled ones, and the variance $\tilde v$ of the phantom's cell sum from step to step. H₀: input and output have
    nothing to do with each other beyond their means, such as those that ReLU inputs have.

    Unlike batch means, it doesn't know that gradients of successive steps correlate, which they do while a weight follows a
    slow change. On planted teachers it finds more than batch means do (.45 to .69 of the true changes with Adam, where these find
    none) and at most .022 of it is false up to a decay of .1; up to 2 of 20 trainings on pure noise find something. With a decay of 1 in AdamW
    .37 is false.

    The variance is taken for known, so that few phantom samples make it liberal: at a level of .05 noise is claimed in .06 of the cells with 30
    samples, in .10 with 10 and in .15 with 5.

    Raises:
        EmptyRunError: no phantom gradients were recorded.
    """
    phantom, evidence = subject.phantom, subject.evidence
    mean = phantom.grad_sum / phantom.exposure
    variance = np.maximum(phantom.sum_squares / phantom.exposure - mean**2, 0.0)
    error = np.sqrt(variance * (1 / evidence.exposure + 1 / phantom.exposure))
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(error > 0, (evidence.grad_sum / evidence.exposure - mean) / error, 0.0)
    return np.asarray(z)[:, :, None]


def events_against_phantoms(subject: Subject) -> Floats:
    r"""Do more events fall into a cell than randomly paired activations and errors cause there? ``[R, K, 1]``.

    $(n - E\tilde\rho)/\sqrt{\phi\,E\tilde\rho(1-\tilde\rho)(1 + E/\tilde E)}$ with $\tilde\rho$ the phantom's event rate in the cell, towards the
    parameter's by one chance, and the over-dispersion $\phi$ of `events_statistic`. So a unit that has large gradients with every
    input has no large statistic. One-sided. It claims fewer false dependencies than the parameter's own rate as a yardstick
    does, and still no error rate: concentration isn't need.

    Raises:
        EmptyRunError: no phantom gradients, or fewer than two windows.
    """
    phantom, sizes = subject.phantom, subject.cells.cell_sizes().astype(np.float64)
    chances, seen = phantom.exposure * sizes, subject.evidence.exposure * sizes
    overall = phantom.events.sum() / chances.sum()
    rate = (phantom.events + overall) / (chances + 1.0)
    spread = rate * (1 - rate) * seen * (1 + seen / chances) * _over_dispersion(subject)
    return np.asarray((subject.evidence.events - seen * rate) / np.sqrt(np.where(spread > 0, spread, np.inf)))[
        :, :, None
    ]


def drift_statistic(subject: Subject) -> Floats:
    r"""Is the displacement more than a random walk? $(w_T - d_{0,T}\,w_0)/\text{s.e.}$, ``[O, I, C]``.

    H₀: each update is a step of random sign, of the cell's own size, and weight decay takes its share: then
    $\text{s.e.}^2 = \frac{1+\beta}{1-\beta}\,\frac{\pi}{2}\sum_t d_{t,T}^2\,\overline{|\Delta w_t|}^2$, where $\beta$ is the
    optimizer's momentum, $d_{t,T}$ what decoupled decay leaves from step $t$ to the end, and the mean size $|\Delta w|$ of a
    step is that of the cell and window, over the steps in which the parameter had a gradient (normal steps:
    $\mathrm{E}|\Delta|^2 = \frac{\pi}{2}(\mathrm{E}|\Delta|)^2$). A weight that is held in place by the loss walks
    less than that, so that the test is conservative there; steps that correlate beyond momentum make it liberal. Decay that is
    coupled into the gradient isn't taken off. Tests ``null="init"``.

    On planted teachers the theoretical scale claims nothing false, and little at all, up to a decay of .1 in AdamW; with a
    decay of 1, which the loss holds against, a third of the findings are false. The empirical scale has full power there, but
    finds something in a fifth of pure-noise trainings under that decay.

    Raises:
        ConfigError: some windows only, though the displacement is that of all; the run has no initial weights or doesn't know the
            optimizer's momentum.
    """
    if not subject.reading.whole_run:
        raise ConfigError(
            "criterion='drift' compares how far a weight went in the whole run with the steps it took; leave windows= out, or use "
            "criterion='score' for a part of the training."
        )
    started = subject.started("criterion='drift'")
    rows = subject.window_rows
    if rows[["decay", "momentum"]].isna().to_numpy().any():
        raise ConfigError(
            f"{subject.name}: criterion='drift' needs the optimizer's momentum and decay, which this run was recorded without."
        )
    sizes, windows = subject.cells.cell_sizes(), subject.by_window(1, "drift")
    # The path is the mean step times the number of steps that moved the parameter, which may not be all of the window's.
    means = np.array([e.update_abs_sum.sum() / sizes.sum() / max(e.update_exposure, 1) for e in windows])
    steps = (rows["last_step"] - rows["first_step"] + 1).to_numpy(float)
    np.divide(rows["path"].to_numpy(float), means, out=steps, where=means > 0)
    kept = (1.0 - rows["decay"].to_numpy(float)) ** steps
    after = np.append(np.cumprod(kept[::-1])[::-1][1:], 1.0)  # from each window's end to the last
    variance = np.zeros(sizes.shape)
    for evidence, count, left, beta in zip(windows, steps, after, rows["momentum"].to_numpy(float), strict=True):
        if evidence.update_exposure:
            mean = evidence.update_abs_sum / sizes / evidence.update_exposure
            variance += (1 + beta) / (1 - beta) * np.pi / 2 * count * (left * mean) ** 2
    error = np.sqrt(subject.cells.expand(variance))[:, :, None]
    moved = subject.grid(subject.weight) - started * kept.prod()
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(error > 0, moved / error, 0.0))


def events_statistic(subject: Subject) -> Floats:
    r"""Do more events fall into a cell than into its parameter on average? $(n - E\rho)/\sqrt{\phi\,E\rho(1-\rho)}$, ``[R, K, 1]``.

    H₀: events fall at the parameter's own rate $\rho$ into each of the cell's $E$ chances (parameters × observed steps). The
    over-dispersion $\phi \ge 1$ is the cell's variance over windows, relative to the binomial, averaged over the cells. One-sided.
    It says where training is concentrated, not what a network needs: a dependency may have large gradients and be needed by nothing.

    Source:
        McCullagh and Nelder, "Generalized Linear Models" (1989), §4.5, for over-dispersion.
    """
    counts, expected, spread = _event_counts(subject)
    total = spread.sum(axis=0) * _over_dispersion(subject)
    return np.asarray((counts - expected).sum(axis=0) / np.sqrt(np.where(total > 0, total, np.inf)))[:, :, None]


def _event_counts(subject: Subject) -> tuple[Floats, Floats, Floats]:
    """Events of each window and cell, how many the window's own rate makes expect, and their binomial variance, ``[W, R, K]``."""
    windows = subject.by_window(2, "events")
    sizes = subject.cells.cell_sizes().astype(np.float64)
    counts = np.stack([evidence.events for evidence in windows]).astype(np.float64)
    chances = np.stack([evidence.exposure * sizes for evidence in windows])
    rates = counts.sum(axis=(1, 2)) / chances.sum(axis=(1, 2))
    expected = chances * rates[:, None, None]
    return counts, expected, expected * (1 - rates)[:, None, None]


def _over_dispersion(subject: Subject) -> float:
    """Variance of events over windows relative to the binomial, averaged over cells; at least 1."""
    counts, expected, spread = _event_counts(subject)
    residual = np.where(spread > 0, (counts - expected) / np.sqrt(np.where(spread > 0, spread, 1.0)), 0.0)
    return max(1.0, float(residual.var(axis=0, ddof=1).mean()))


def distribution_statistic(subject: Subject) -> Floats:
    r"""Are a dependency's channels still drawn from the initial distribution? Kolmogorov–Smirnov, one-sided normal scale, ``[O, I, 1]``.

    H₀: the dependency's $C$ values are independent draws from the distribution of the parameter's initial values.
    $D = \sup_x |F_C(x) - F_0(x)|$ with the exact distribution of $D$ for $C$ draws. Meant for kernels, gates, heads and residual edges,
    whose dependencies are sequences; a dependency that training left alone passes, one that has moved within the
    distribution does, too. Tests ``null="init"``.

    Raises:
        ConfigError: a parameter without channels, or whose initial values are all alike.

    Source:
        arXiv 2601.15871 ("indistinguishable from initialisation"); Simard and L'Ecuyer (2011) for the distribution.
    """
    if subject.layout.channels < 2:
        raise ConfigError(
            f"{subject.name}: criterion='distribution' compares a dependency's channels, and it has one. "
            "Use criterion='wald', or include= only kernels, gates, heads or residual edges."
        )
    start = np.sort(subject.started("criterion='distribution'").ravel())
    if start[0] == start[-1]:
        raise ConfigError(
            f"{subject.name}: all initial values are {start[0]:g}; there is no distribution to compare with."
        )
    values = np.sort(subject.grid(subject.weight), axis=2)
    channels = values.shape[2]
    # Between the two one-sided ranks, so that a value of the sample itself counts half.
    rank = (np.searchsorted(start, values, "left") + np.searchsorted(start, values, "right")) / (2 * start.size)
    steps = np.arange(channels)
    distance = np.maximum((steps + 1) / channels - rank, rank - steps / channels).max(axis=2)
    return np.asarray(scipy.stats.norm.isf(np.maximum(scipy.stats.kstwo.sf(distance, channels), 1e-300)))[:, :, None]


# ---- scores


def saliency(subject: Subject) -> Floats:
    r"""Estimated loss of taking a dependency back: $(w - w_\text{null})^2\sqrt{\overline{g^2}}$, the root mean square gradient as curvature.

    To second order the loss grows by $\frac12 H (w - w_\text{null})^2$. The empirical Fisher $\overline{g^2}$ in place of $H$ (the Wald
    score) is right at a minimum of a likelihood. A training that ends earlier, or removes half of all weights at once, is
    neither there nor that close, and $\overline{g^2}$ then spreads more than curvatures do: the square root is what Adam takes for
    the curvature. In ``benchmarks/masks.py`` it costs 0 to 10 % less than
    the Wald score on nets that were trained for long, and a third to two thirds less on barely trained ones.
    It has no p-values: use it with a density.

    Source:
        LeCun, Denker and Solla, "Optimal Brain Damage" (1989); Kingma and Ba, "Adam" (2015), for the root.
    """
    curvature = np.sqrt(subject.information / subject.evidence.exposure)
    return np.asarray(subject.layout.ungrid(subject.displacement**2 * curvature))


def _squared(statistic: Callable[[Subject], Floats]) -> Callable[[Subject], Floats]:
    """Score of a whole dependency: the mean of its channels' squares."""

    def score(subject: Subject) -> Floats:
        return np.asarray(subject.cells.spread((statistic(subject) ** 2).mean(axis=2)))

    return score


def _as_it_is(statistic: Callable[[Subject], Floats]) -> Callable[[Subject], Floats]:
    return lambda subject: np.asarray(subject.cells.spread(statistic(subject)[:, :, 0]))


def magnitude(subject: Subject) -> Floats:
    r"""Baseline: $|w - w_\text{null}|$. It knows nothing of the loss."""
    return np.abs(subject.weight - subject.null_value)


def magnitude_increase(subject: Subject) -> Floats:
    """Baseline: $|w_T| - |w_0|$."""
    return np.abs(subject.weight) - np.abs(subject.initial("criterion='magnitude_increase'"))


def movement(subject: Subject) -> Floats:
    r"""Baseline: movement away from zero, $w_T^2 - w_0^2$.

    Movement pruning accumulates $-\sum_t g_t w_t$; along gradient descent $-g_t \propto \dot w$, and the sum is
    $\int w\,dw = \frac12(w_T^2 - w_0^2)$ up to the learning rate. It needs no gradients that way, and none per element.

    Source:
        Sanh, Wolf and Rush, "Movement Pruning" (2020).
    """
    return subject.weight**2 - subject.initial("criterion='movement'") ** 2


def wanda(subject: Subject) -> Floats:
    r"""Baseline: $|w_{ij}|\,\lVert x_j\rVert$ with the norm of input $j$ over calibration data.

    Raises:
        ConfigError: no `inputs` were given for the parameter.

    Source:
        Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (2023).
    """
    if subject.inputs is None:
        raise ConfigError(
            f"{subject.name}: criterion='wanda' needs calibration data: inputs=gradloc.input_norms(model, batches)."
        )
    every_row = np.broadcast_to(subject.inputs, (subject.layout.out_units, subject.layout.in_units))
    return np.asarray(np.abs(subject.weight) * subject.cells.spread(every_row))


def random_score(subject: Subject) -> Floats:
    """Baseline: uniform noise, the same on each call for the same parameter."""
    seed = list(subject.name.encode())
    return np.random.default_rng(seed).random(subject.weight.shape)


CRITERIA = {
    criterion.name: criterion
    for criterion in (
        Criterion("wald", _squared(wald_statistic), wald_statistic, calibrations=("empirical", "init", "theory"), needs_samples=True),
        Criterion("score", _squared(score_statistic), score_statistic, ("init",), ("theory", "empirical", "phantom"), score_against_phantoms, by_window=True),
        Criterion("drift", _squared(drift_statistic), drift_statistic, ("init",), ("theory", "empirical"), by_window=True),
        Criterion("events", _as_it_is(events_statistic), events_statistic, calibrations=("theory", "phantom"), phantom=events_against_phantoms, one_sided=True, by_window=True),
        Criterion("distribution", _as_it_is(distribution_statistic), distribution_statistic, ("init",), ("theory",), one_sided=True),
        Criterion("saliency", saliency),
        Criterion("magnitude", magnitude),
        Criterion("magnitude_increase", magnitude_increase),
        Criterion("movement", movement),
        Criterion("wanda", wanda),
        Criterion("random", random_score),
    )
}  # fmt: skip


def find_criterion(name: str) -> Criterion:
    """The criterion of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in CRITERIA:
        raise ConfigError(f"criterion={name!r} must be one of {', '.join(CRITERIA)}{meant(name, CRITERIA)}.")
    return CRITERIA[name]
