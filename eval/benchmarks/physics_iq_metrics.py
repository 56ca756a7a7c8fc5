"""The numbers of Physics-IQ, from clips and their motion masks: numpy alone, no files.

A generated clip is compared with what really happened (take 1), and the same experiment filmed again (take 2) with
take 1: the second is the physical variance, the best that can be asked for. From arXiv 2501.09038 and, where text and
code differ, the code of google-deepmind/physics-IQ-benchmark; the verified score from arXiv 2606.18943 and its code.
Shapes: T frames of 5 seconds, h and w a quarter of the real video's rows and columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

METRICS = ("spatial_iou", "weighted_spatial_iou", "spatiotemporal_iou", "mse")
FRAME_DIGITS = 4  # per-frame numbers are rounded to this before they are averaged
VARIANCE_DIGITS = {"spatial_iou": 5, "weighted_spatial_iou": 4, "spatiotemporal_iou": 4, "mse": 4}
RATIO_EPSILON = 1e-8  # of the verified score


@dataclass(frozen=True)
class Observed:
    """A clip as it is compared: frames (T,h,w,3) uint8 and where something moves (T,h,w) bool."""

    frames: np.ndarray
    masks: np.ndarray


@dataclass(frozen=True)
class Agreement:
    """Two clips of one experiment, compared."""

    spatial_iou: float  # where anything moved at any time
    weighted_spatial_iou: float  # how long it moved where
    spatiotemporal_iou: np.ndarray  # (T,) where and when
    mse: np.ndarray  # (T,) of pixels in [0, 1]

    def means(self) -> dict[str, float]:
        """One number a metric; per-frame ones rounded first, as the official score reads them from its CSV."""
        values = {"spatial_iou": self.spatial_iou, "weighted_spatial_iou": self.weighted_spatial_iou}
        for name in ("spatiotemporal_iou", "mse"):
            values[name] = float(np.mean([round(float(value), FRAME_DIGITS) for value in getattr(self, name)]))
        return values


def compare(a: Observed, b: Observed) -> Agreement:
    """All four metrics. The two have the same shapes: what brought the files to one size and length saw to that."""
    assert a.frames.shape == b.frames.shape and a.masks.shape == b.masks.shape, (a.frames.shape, b.frames.shape)
    durations = [np.sum(clip.masks, axis=0, dtype=np.uint16) for clip in (a, b)]  # (h,w) frames in motion
    return Agreement(
        spatial_iou=mask_iou(durations[0] > 0, durations[1] > 0),
        weighted_spatial_iou=_ratio(np.minimum(*durations).sum(), np.maximum(*durations).sum()),
        spatiotemporal_iou=np.array([mask_iou(first, second) for first, second in zip(a.masks, b.masks, strict=True)]),
        mse=frame_mse(a.frames, b.frames),
    )


def mask_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two masks of one shape, 1 where both are empty."""
    both = np.count_nonzero(a & b)
    return _ratio(both, np.count_nonzero(a) + np.count_nonzero(b) - both)


def _ratio(intersection: int, union: int) -> float:
    return float(intersection / union) if union else 1.0


def frame_mse(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean squared difference of each pair of frames (T,h,w,3) uint8, as pixels in [0, 1]: (T,) float32.

    Everything in float32, sum included, as the official code: in another precision the fourth digit can differ.
    """
    scale = np.float32(255)  # the quotient equals the official one, which divides in float64 and then casts
    return np.array(
        [
            np.mean(np.square(np.divide(x, scale, dtype=np.float32) - np.divide(y, scale, dtype=np.float32)))
            for x, y in zip(a, b, strict=True)
        ]
    )


def row_values(generated: Agreement, variance: Agreement) -> dict[str, float]:
    """A clip's columns: its metrics against take 1, those of take 2 (`variance_…`), and its verified scores.

    Verified: each metric by its variance (the MSE the other way round), cut at 1, and the mean of the four.
    """
    values, limits = generated.means(), variance.means()
    verified = {}
    for name in METRICS:
        ratio = values[name] / (limits[name] + RATIO_EPSILON)
        if name == "mse":
            ratio = 1 / ratio if ratio else np.inf
        verified[f"verified_{name}"] = float(np.clip(ratio, 0, 1))
    return {
        **values,
        **{f"variance_{name}": value for name, value in limits.items()},
        **verified,
        "verified": float(np.mean(list(verified.values()))),
    }


def physics_iq(means: Mapping[str, np.ndarray]) -> np.ndarray:
    """The Physics-IQ score in percent from means over all clips, (R,) each: one a replicate.

    100 clip((ST / ST_v + S / S_v + WS / WS_v) / 3 - (MSE - MSE_v)) with the variances rounded as the official
    `calculate_iq_score` does; the score itself is left unrounded (it is printed with two digits). The newer official
    `IQTable` leaves the variances unrounded, which moves the score by about 0.01. Where the two takes never overlap
    there is no scale: then 100 as the official code has it, or NaN where the clips do not overlap either.
    """
    limits = {name: np.round(means[f"variance_{name}"], digits) for name, digits in VARIANCE_DIGITS.items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = sum(means[name] / limits[name] for name in METRICS if name != "mse") / 3
    return 100 * np.clip(ratios - (means["mse"] - limits["mse"]), 0, 1)
