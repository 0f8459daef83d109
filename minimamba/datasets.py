"""Real data that needs no download: two measured signals and the handwritten digits."""

from typing import NamedTuple

import numpy as np
import torch


class Signal(NamedTuple):
    """A measured series: `values` (L,) float64 at `times` (L,) in years, with a `title` that names the unit."""

    times: np.ndarray
    values: np.ndarray
    title: str


def co2():
    """Weekly carbon dioxide at Mauna Loa, 1958 to 2001 (statsmodels' `co2`), gaps filled linearly. -> Signal, ppm"""
    from statsmodels.datasets import co2 as source

    series = source.load_pandas().data["co2"].interpolate()
    times = series.index.year + (series.index.day_of_year - 1) / 365.25
    return Signal(times.to_numpy(float), series.to_numpy(float, copy=True), "CO2 at Mauna Loa (ppm)")


def sunspots():
    """Yearly sunspot number, 1700 to 2008 (statsmodels' `sunspots`). -> Signal, count"""
    from statsmodels.datasets import sunspots as source

    table = source.load_pandas().data
    return Signal(
        table["YEAR"].to_numpy(float, copy=True),
        table["SUNACTIVITY"].to_numpy(float, copy=True),
        "Sunspot number (yearly)",
    )


class Split(NamedTuple):
    """Sequences `u` (images, L, 1) float32 in [0, 1] and their `labels` (images,) int64."""

    u: torch.Tensor
    labels: torch.Tensor


def digits(test_fraction=0.25, seed=0):
    """scikit-learn's 1797 handwritten digits as sequences of 64 pixels, row by row.

    Returns (train, test), two Splits drawn with `seed` and stratified by label.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()
    pixels = (source.data / source.data.max()).astype(np.float32)
    parts = train_test_split(pixels, source.target, test_size=test_fraction, random_state=seed, stratify=source.target)
    u_train, u_test, labels_train, labels_test = map(torch.from_numpy, parts)
    return Split(u_train[..., None], labels_train), Split(u_test[..., None], labels_test)
