"""How the imagery of a region compares with what the model was trained on."""

from dataclasses import dataclass
from operator import mul
from typing import TYPE_CHECKING, Any

from seg_core.grey_levels import (
    Levels,
    Normalization,
    distance,
    normalization_of,
    normalization_of_shares,
    shares_of,
)

if TYPE_CHECKING:
    from seg_core.model.bundle import Bundle

# Distance from the training imagery up to which a region is like it. Of the built-in model's 106 training images the
# furthest lies at 0.51. Imagery of other places and seasons lay beyond 1: see seg_core/imagery/README.md.
LIKE = 0.6
FAR_RATIO = 10  # of mean probabilities: where buildings are a tenth of what they are in towns, it may be right
SAME = 0.1  # deviations: bins of a histogram tell no finer difference between two normalizations
MIN_PIXELS = 2**16  # a smaller sample says too little of a region: a single roof may fill it


@dataclass(frozen=True, kw_only=True)
class ImageryFit:
    """A sample of a region's imagery beside that of the training. It is kept in `run.json`."""

    sampled_px: int  # valid pixels of the sample
    distance: float | None  # see seg_core.grey_levels; None if no pixel of the sample is valid
    limit: float  # distance from which on the imagery is unlike
    mean: tuple[float, ...] | None  # of each band, in grey levels
    std: tuple[float, ...] | None
    trained_mean: tuple[float, ...]
    trained_std: tuple[float, ...]
    validated_probability: float | None = None  # mean over the validation pixels; None if the bundle does not say

    @property
    def is_unlike(self) -> bool:
        """Whether the imagery looks unlike that of the training, by a sample that is large enough to say so."""
        return self.distance is not None and self.distance >= self.limit and self.sampled_px >= MIN_PIXELS

    def figures(self) -> dict[str, Any]:
        """Return what commands print of it."""
        return {"imagery_distance": self.distance, "imagery_is_unlike": self.is_unlike}

    def describe_difference(self, normalize: str) -> str | None:
        """Return in what the imagery looks unlike that of the training, and what is done; None if it is alike."""
        if not self.is_unlike or self.mean is None or self.std is None:
            return None
        if normalize == "model":
            done = "it is not adapted: try --normalize region"
        else:
            done = f"its brightness and contrast are adapted (--normalize {normalize}), but nothing else"
        return (
            f"the imagery looks unlike what the model was trained on: distance {self.distance:.2f} (limit "
            f"{self.limit:.2f}), mean {_text(self.mean)} instead of {_text(self.trained_mean)}, deviation "
            f"{_text(self.std)} instead of {_text(self.trained_std)}: {done}"
        )

    def describe(self, normalize: str) -> str | None:
        """Return a line that warns of unlike imagery and says what to do; None if it is alike."""
        difference = self.describe_difference(normalize)
        return difference and f"{difference}: check a labelled part with seg evaluate, or train on such imagery"

    def describe_probability(self, mean_probability: float | None) -> str | None:
        """Return a line if the mean probability over a run is far from that on validation; None if not."""
        if mean_probability is None or not self.validated_probability:
            return None
        ratio = mean_probability / self.validated_probability
        if 1 / FAR_RATIO < ratio < FAR_RATIO:
            return None
        much, usual = "few" if ratio < 1 else "many", self.validated_probability
        return (
            f"the mean probability is {mean_probability:.4f}, on the validation images {usual:.4f}: "
            f"either there are {much} buildings, or the model does not know this imagery: look at some masks"
        )


def compare(levels: Levels, bundle: "Bundle") -> ImageryFit:
    """Compare a sample, `int64 (bands, 256)`, with the imagery that a model was trained on."""
    sampled_px = int(levels[0].sum())
    found = normalization_of(levels) if sampled_px else None
    apart = distance(shares_of(levels), bundle.reference, bundle.std) if sampled_px else None
    return ImageryFit(
        sampled_px=sampled_px,
        distance=None if apart is None else round(apart, 4),
        limit=max(LIKE, bundle.spread or 0.0),
        mean=found and found.mean,
        std=found and found.std,
        trained_mean=bundle.mean,
        trained_std=bundle.std,
        validated_probability=_mean(bundle.confidence),
    )


def choose_normalization(mode: str, levels: Levels, bundle: "Bundle") -> Normalization | None:
    """Return the normalization of imagery with these levels, `int64 (bands, 256)`; None for the model's own.

    `mode` is `model`; `auto`, which normalizes only unlike imagery; or another, which always normalizes if there is a
    valid pixel.
    """
    fit = compare(levels, bundle)
    wanted = fit.is_unlike if mode == "auto" else mode != "model"
    return carry_over(normalization_of(levels), bundle) if wanted and fit.sampled_px else None


def decide_mode(mode: str, found: Normalization | None) -> str:
    """Return what `auto` has become by the normalization of a region; another mode stays."""
    if mode != "auto":
        return mode
    return "model" if found is None else "region"


def carry_over(found: Normalization, bundle: "Bundle") -> Normalization:
    """Return the normalization by which imagery with that mean and deviation reaches the network like its training.

    Mostly that is `found` itself, as the training images became 0 and 1. Those of a network that began from another
    one, or from a pretrained encoder, were normalized by values of an earlier training.
    """
    trained = normalization_of_shares(bundle.reference)
    offsets = [(mean - own) / own_std for mean, own, own_std in zip(trained.mean, bundle.mean, bundle.std, strict=True)]
    spreads = [std / own_std for std, own_std in zip(trained.std, bundle.std, strict=True)]
    if all(abs(offset) < SAME and abs(spread - 1) < SAME for offset, spread in zip(offsets, spreads, strict=True)):
        return found
    std = [each / spread for each, spread in zip(found.std, spreads, strict=True)]
    mean = [each - offset * own for each, offset, own in zip(found.mean, offsets, std, strict=True)]
    return Normalization(tuple(round(each, 4) for each in mean), tuple(round(each, 4) for each in std))


def _mean(confidence: tuple[float, ...]) -> float | None:
    """Return the mean probability of pixels whose shares in equal bins of probability are given; None without any."""
    middles = [(number + 0.5) / len(confidence) for number in range(len(confidence))]
    return round(sum(map(mul, confidence, middles)), 4) if confidence else None


def _text(values: tuple[float, ...]) -> str:
    return "/".join(f"{value:.0f}" for value in values)
