"""From judged places to building area with an interval, corrected for the errors of the run (Olofsson et al. 2014).

P. Olofsson et al., Good practices for estimating area and assessing accuracy of land change, Remote Sensing of
Environment 148, 2014: the share of each stratum that is wrong is estimated from its places, and what is wrong is taken
off or added by its area.

The interval there is that of a normal distribution. It is too short where few places of a large stratum are wrong: if
none is, it has no length at all. So each stratum's share gets Jeffreys' interval (Brown, Cai and DasGupta, Interval
Estimation for a Binomial Proportion, Statistical Science 16, 2001), and the strata's intervals are combined by their
distances from the estimate (Zou and Donner, Construction of confidence limits about effect measures, Statistics in
Medicine 27, 2008).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv

from seg_core.audit.strata import BUILDING, NAMES, is_building
from seg_core.errors import SegError

TAIL = 0.025  # on each side of the interval
JEFFREYS = 0.5  # as if half a place were wrong, and half a place right
AREA_PRIOR = 10.0  # places by which those outside an area weigh at most, in its shares
MIN_PLACES = 2  # judged places that a stratum must have
BUILT = np.array([is_building(stratum) for stratum in range(len(NAMES))])

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]  # places by stratum, `(..., 5)`


class Interval(NamedTuple):
    """An estimate, and what it lies within with a probability of 95 %: numbers, or arrays `(...)`."""

    estimate: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True)
class Judged:
    """Judged places by stratum, and how many of them the run has wrong, `(..., 5)` each."""

    places: Counts
    wrong: Counts


@dataclass(frozen=True)
class Estimate:
    """What judged places say of a run. An accuracy is NaN if there is nothing of which it is the share."""

    building_m2: Interval
    users_accuracy: Interval  # share of the mapped building that is building
    producers_accuracy: Interval  # share of the building that is mapped
    overall_accuracy: Interval
    shares: Floats  # of each stratum that is wrong, `(5,)`


def estimate_run(m2: Floats, judged: Judged, names: Sequence[str] = NAMES) -> Estimate:
    """Estimate building area and accuracies from the ground area by stratum, `(5,)`, and judged places.

    `names` are those of the strata. Raises SegError where a stratum has too few judged places.
    """
    if not judged.places.sum():
        words = f"{names[BUILDING]} or background"
        raise SegError(f"no place of the sample is judged: fill in its column truth with {words}")
    for name, area, number in zip(names, m2, judged.places, strict=True):
        if area and number < MIN_PLACES:
            raise SegError(f"{name}: {number} judged places: judge {MIN_PLACES} or more, or draw a larger sample")
    wrong = _share_wrong(judged.wrong, judged.places)
    right = _complement(wrong)
    found, missed = _sum(m2 * BUILT, right), _sum(m2 * ~BUILT, wrong)
    mapped, total = (m2 * BUILT).sum(), m2.sum()
    return Estimate(
        _add(found, missed),
        Interval(*(_divide(each, mapped) for each in found)),
        _share_of_sum(found, missed),
        Interval(*(each / total for each in _sum(m2, right))),
        wrong.estimate,
    )


def estimate_areas(m2: Floats, judged: Judged, run: Judged) -> Interval:
    """Estimate the building area within parts of the run, from ground area by stratum and the places within each.

    `m2` is `(areas, 5)`, and `judged` likewise. The result is `(areas,)`. There are few places within an area. So its
    shares are drawn towards those of the places outside of it, which weigh as much as AREA_PRIOR places at most.
    """
    outside = Judged(run.places - judged.places, run.wrong - judged.wrong)
    weight = np.minimum(outside.places, AREA_PRIOR)
    prior = weight * _divide(outside.wrong, outside.places, 0.0)
    wrong = _share_wrong(judged.wrong + prior, judged.places + weight)
    return _add(_sum(m2 * BUILT, _complement(wrong)), _sum(m2 * ~BUILT, wrong))


def _share_wrong(wrong: Floats | Counts, places: Floats | Counts) -> Interval:
    """Return the share that is wrong of each stratum with Jeffreys' interval."""
    right = places - wrong
    low, high = (betaincinv(wrong + JEFFREYS, right + JEFFREYS, tail) for tail in (TAIL, 1 - TAIL))
    return Interval(
        _divide(wrong, places, 0.0),
        np.where(wrong > 0, low, 0.0),
        np.where(right > 0, high, 1.0),
    )


def _complement(share: Interval) -> Interval:
    return Interval(1 - share.estimate, 1 - share.high, 1 - share.low)


def _sum(m2: Floats, shares: Interval) -> Interval:
    """Return the sum over strata of areas times shares."""
    estimate = (m2 * shares.estimate).sum(axis=-1)
    below = np.sqrt(((m2 * (shares.estimate - shares.low)) ** 2).sum(axis=-1))
    above = np.sqrt(((m2 * (shares.high - shares.estimate)) ** 2).sum(axis=-1))
    return Interval(estimate, estimate - below, estimate + above)


def _add(one: Interval, two: Interval) -> Interval:
    """Return the sum of two independent estimates."""
    estimate = one.estimate + two.estimate
    below = np.hypot(one.estimate - one.low, two.estimate - two.low)
    above = np.hypot(one.high - one.estimate, two.high - two.estimate)
    return Interval(estimate, np.maximum(estimate - below, 0.0), estimate + above)


def _share_of_sum(part: Interval, rest: Interval) -> Interval:
    """Return part / (part + rest) for independent estimates, from how far each one's bounds move it."""

    def share(one: Floats, two: Floats) -> Floats:
        return _divide(one, one + two)

    estimate = share(part.estimate, rest.estimate)
    below = np.hypot(estimate - share(part.low, rest.estimate), estimate - share(part.estimate, rest.high))
    above = np.hypot(share(part.high, rest.estimate) - estimate, share(part.estimate, rest.low) - estimate)
    return Interval(estimate, np.maximum(estimate - below, 0.0), np.minimum(estimate + above, 1.0))


def _divide(one: Floats | Counts, two: Floats | Counts, otherwise: float = np.nan) -> Floats:
    """Return one / two, and something else where two is 0."""
    one, two = np.broadcast_arrays(np.asarray(one, np.float64), np.asarray(two, np.float64))
    divided: Floats = np.divide(one, two, out=np.full(one.shape, otherwise), where=two > 0)
    return divided
