"""Real data that needs no download: two measured signals, handwritten digits and spoken vowels."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from minimamba._validation import check_counts


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
    """Sequences `u` (sequences, L, D) float32, their `labels` (sequences,) int64, and their `lengths` if they vary.

    `lengths` (sequences,) int64 counts the steps of each that are real: zeros follow. None: all have L.
    """

    u: torch.Tensor
    labels: torch.Tensor
    lengths: torch.Tensor | None = None


def digits(test_fraction=0.25, seed=0, side=8):
    """scikit-learn's 1797 handwritten digits as sequences of 64 pixels in [0, 1], row by row: u (images, 64, 1).

    Returns (train, test), two Splits drawn with `seed` and stratified by label. With `side` other than 8 the images are
    first resized to side x side (bilinear); side=28 gives 784 steps, the length of MNIST's images.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    check_counts(side=side)
    source = load_digits()
    pixels = (source.data / source.data.max()).astype(np.float32)
    parts = train_test_split(pixels, source.target, test_size=test_fraction, random_state=seed, stratify=source.target)
    u_train, u_test, labels_train, labels_test = map(torch.from_numpy, parts)
    return Split(_resize(u_train, side), labels_train), Split(_resize(u_test, side), labels_test)


def japanese_vowels():
    """Nine speakers, 640 utterances of two vowels: (train, test), 270 and 370 sequences of 7 to 29 steps, 12 channels.

    Returns two Splits: u (sequences, 29, 12), zero after the end of each, labels 0 .. 8 for the speaker, and lengths.
    Source: Kudo, Toyama and Shimbo, 1999; see data/README.md.
    """
    folder = Path(__file__).with_name("data")
    parts = [_read_ts(folder / f"JapaneseVowels_{part}.ts") for part in ("TRAIN", "TEST")]
    longest = max(len(values) for part in parts for values, _ in part)
    return tuple(_pad(part, longest) for part in parts)


def _resize(pixels, side):
    """Images (images, 64) of 8 x 8 pixels -> sequences (images, side², 1)."""
    if side != 8:
        images = pixels.reshape(-1, 1, 8, 8)
        pixels = torch.nn.functional.interpolate(images, (side, side), mode="bilinear").flatten(1)
    return pixels[..., None]


def _read_ts(path):
    """Read a .ts file: [(values (L, D) float32, label), ...].

    After "@data" each line is a sequence: its channels between colons, a channel's values between commas, and last
    its class, here a number from 1 on.
    """
    _, data = path.read_text().split("@data\n")
    sequences = []
    for line in data.splitlines():
        *channels, label = line.split(":")
        values = np.array([channel.split(",") for channel in channels], dtype=np.float32).T
        sequences.append((values, int(label) - 1))
    return sequences


def _pad(sequences, length):
    u = torch.zeros(len(sequences), length, sequences[0][0].shape[1], dtype=torch.float32)
    for row, (values, _) in zip(u, sequences, strict=True):
        row[: len(values)] = torch.from_numpy(values)
    lengths = torch.tensor([len(values) for values, _ in sequences])
    return Split(u, torch.tensor([label for _, label in sequences]), lengths)
