"""Firings without co-firing: what clusters of units capture where no two units have anything to do with each other.

Units fire at rates of their own, some tokens make more units fire than others, and both have sizes; clusters that are looked for find those, too. Whether
units fire *together* is what clusters capture beyond that.

Shape letters: `T` tokens, `U` units.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

TRADES = 5
"""Between two tokens, per token and draw: about as many mix a table well (Strona et al. 2014)."""
FIT_ROUNDS = 20


class IndependentFirings:
    r"""Firings as they were, but for who fires together.

    A draw keeps how often each unit fires and how many units each token makes fire, both exactly: two tokens at a time trade, at random, the units that
    one of them has. Energies are $m_t\,q$, with the token's size $m_t$ and the unit's own $q = e_{tu} / m_t$ in another order. A token's size is the mean of few
    energies and noisy: it is shrunk by the noise in it, down to none where tokens don't differ in size; and since each energy has a part in the mean that it was
    divided by, the $q$ of a unit are spread out by $\sqrt{n_t / (n_t - 1)}$ as far as that was done.

    Args:
        energy: per token and unit, 0 where it didn't fire, ``[T, U]``.
        random: of the draws, each of which goes on from the one before.

    Source:
        Strona, Nappo, Boccacci, Fattorini and San-Miguel-Ayanz, "A fast and unbiased procedure to randomize ecological binary matrices with fixed row
        and column totals" (2014).

    Examples:
        >>> energy = (np.random.default_rng(0).random((40, 30)) < np.linspace(0.1, 0.9, 30)).astype(float)
        >>> drawn = IndependentFirings(energy, np.random.default_rng(1)).draw() > 0
        >>> [bool((drawn.sum(axis) == energy.sum(axis)).all()) for axis in (0, 1)], bool((drawn == (energy > 0)).all())
        ([True, True], False)
    """

    def __init__(self, energy: NDArray[np.floating], random: np.random.Generator) -> None:
        values = np.asarray(energy, np.float64)
        fires = values > 0
        self._random, self._fires = random, fires.copy()
        self._sizes = token_sizes(values)
        counts = np.maximum(1, fires.sum(1))
        shrunk = self._sizes.shrunk
        own = values / shrunk[:, None]
        mean = own.sum(0) / np.maximum(1, fires.sum(0))
        spread = np.sqrt(counts / np.maximum(1.0, counts - self._sizes.share))[:, None]
        own = np.maximum(mean + (own - mean) * spread, 1e-3 * mean)
        unit = np.nonzero(fires)[1]
        self._own = own[fires][np.argsort(unit, kind="stable")]

    def draw(self) -> NDArray[np.float64]:
        """Firings of as many tokens, ``[T, U]``."""
        self._trade()
        token, unit = np.nonzero(self._fires)
        drawn = np.zeros(self._fires.shape)
        # Each unit's own energies, in an order of their own: sorted by unit, and at random within.
        order = np.lexsort((self._random.random(len(unit)), unit))
        drawn[token[order], unit[order]] = self._sizes.shrunk[token[order]] * self._own
        return drawn

    def _trade(self) -> None:
        half = len(self._fires) // 2
        for _ in range(2 * TRADES):  # each token once a round
            one, other = self._random.permutation(len(self._fires))[: 2 * half].reshape(2, half)
            first, second = self._fires[one], self._fires[other]
            differs = first != second
            # As many of the units that differ as the first had, at random: those with the lowest numbers.
            order = np.argsort(np.where(differs, self._random.random(differs.shape), 2.0), axis=1)
            had = (first & differs).sum(1)
            taken = np.zeros_like(differs)
            np.put_along_axis(taken, order, np.arange(differs.shape[1]) < had[:, None], axis=1)
            self._fires[one] = np.where(differs, taken, first)
            self._fires[other] = np.where(differs, ~taken, second)


class TokenSizes(NamedTuple):
    """Sizes of tokens, and the share of their variance that isn't noise."""

    shrunk: NDArray[np.float64]
    share: float


def token_sizes(values: NDArray[np.float64]) -> TokenSizes:
    r"""Fits $e_{tu} = m_t b_u \eta_{tu}$ over firings, by means in turn, and shrinks $\log m$ by its noise.

    Examples:
        >>> random = np.random.default_rng(0)
        >>> alike = random.exponential(size=(500, 20))
        >>> token_sizes(alike).share < 0.2 < 0.9 < token_sizes(alike * np.exp(2 * random.normal(size=(500, 1)))).share
        True
    """
    fires = values > 0
    of_token, of_unit = (np.maximum(1, fires.sum(axis)) for axis in (1, 0))
    sizes, units = np.ones(len(values)), np.ones(values.shape[1])
    for _ in range(FIT_ROUNDS):
        sizes = np.where(fires.any(1), (values / units).sum(1) / of_token, 1.0)
        units = np.where(fires.any(0), (values / sizes[:, None]).sum(0) / of_unit, 1.0)
    some = fires.any(1)
    if not some.any():
        return TokenSizes(sizes, 0.0)
    freedom = max(1, int(fires.sum() - some.sum() - fires.any(0).sum() + 1))
    variation = float((((values / sizes[:, None] / units) - 1)[fires] ** 2).sum()) / freedom
    logs = np.log(sizes)
    middle, found = logs[some].mean(), float(logs[some].var())
    relative = variation / of_token[some]
    # Of the logarithm of a mean of few: the first terms of the trigamma function, which it is for exponential energies.
    noise = float((relative + relative**2 / 2 + relative**3 / 6).mean())
    share = max(0.0, 1.0 - noise / found) if found > 0 else 0.0
    return TokenSizes(np.exp(middle + share * (logs - middle)), share)
