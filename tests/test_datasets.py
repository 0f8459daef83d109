"""The data sets: their sizes, their values found by other means, no test sequence among the training ones."""

import numpy as np
import pytest
import torch

from minimamba import datasets


def test_digits_are_the_images_row_by_row():
    from sklearn.datasets import load_digits

    train, test = datasets.digits()
    assert train.u.shape == (1347, 64, 1) and test.u.shape == (450, 64, 1)
    assert train.u.dtype == torch.float32 and train.labels.dtype == torch.int64
    assert train.lengths is None and test.lengths is None
    both = torch.cat([train.u, test.u])
    assert both.min() == 0 and both.max() == 1
    source = load_digits()
    images = {tuple(image.ravel()): label for image, label in zip(source.images, source.target, strict=True)}
    for row, label in zip(test.u[:20, :, 0] * 16, test.labels[:20], strict=True):
        assert images[tuple(row.tolist())] == label


def test_digits_are_split_by_seed_and_stratified():
    (train, test), (again, _), (other, _) = datasets.digits(), datasets.digits(), datasets.digits(seed=1)
    assert torch.equal(train.u, again.u) and not torch.equal(train.u, other.u)
    shares = [torch.bincount(split.labels) / len(split.labels) for split in (train, test)]
    assert (shares[0] - shares[1]).abs().max() < 0.01
    assert len(datasets.digits(test_fraction=0.5)[1].u) == 899


def test_digits_resized():
    small, large = datasets.digits()[1], datasets.digits(side=28)[1]
    assert large.u.shape == (450, 784, 1) and torch.equal(small.labels, large.labels)
    assert large.u.min() >= 0 and large.u.max() <= 1
    # Bilinear with pixels as areas: pixel i of 28 lies at (i + 1/2) 8/28 - 1/2 between the pixels of 8.
    at = np.clip((np.arange(28) + 0.5) * 8 / 28 - 0.5, 0, 7)
    low = np.minimum(at.astype(int), 6)
    weight = np.zeros((28, 8))
    weight[np.arange(28), low], weight[np.arange(28), low + 1] = 1 - (at - low), at - low
    expected = weight @ small.u[7].numpy().reshape(8, 8) @ weight.T
    assert np.abs(large.u[7].numpy().reshape(28, 28) - expected).max() < 1e-5
    with pytest.raises(ValueError, match=r"^side: expected at least 1, got 0"):
        datasets.digits(side=0)
    with pytest.raises(TypeError, match=r"^side: expected an int, got float"):
        datasets.digits(side=28.0)


def test_japanese_vowels_have_their_published_sizes():
    train, test = datasets.japanese_vowels()
    assert train.u.shape == (270, 29, 12) and test.u.shape == (370, 29, 12)
    assert train.u.dtype == torch.float32
    assert torch.bincount(train.labels).tolist() == [30] * 9
    assert torch.bincount(test.labels).tolist() == [31, 35, 88, 44, 29, 24, 40, 50, 29]
    for split in (train, test):
        assert split.lengths.dtype == split.labels.dtype == torch.int64
    assert min(train.lengths.min(), test.lengths.min()) == 7 and max(train.lengths.max(), test.lengths.max()) == 29


def test_sequences_are_float32_whatever_the_default_is():
    torch.set_default_dtype(torch.float64)
    try:
        for train, test in (datasets.japanese_vowels(), datasets.digits(side=9)):
            assert train.u.dtype == test.u.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_japanese_vowels_are_zero_after_their_end_and_not_before():
    for split in datasets.japanese_vowels():
        steps = torch.arange(29)
        real = steps < split.lengths[:, None]
        assert (split.u[~real] == 0).all()
        assert (split.u[real] != 0).any(-1).all()


def test_japanese_vowels_hold_the_first_numbers_of_the_file():
    train, _ = datasets.japanese_vowels()
    # Typed from the file: its first line starts 1.860936,1.891651 and its second channel -0.207383.
    assert train.lengths[0] == 20 and train.labels[0] == 0
    assert train.u[0, :2, 0].tolist() == pytest.approx([1.860936, 1.891651])
    assert train.u[0, 0, 1] == pytest.approx(-0.207383)
    # and its last line, of the ninth speaker, ends ...,0.227674,0.226729,0.214409,0.173642:9
    assert train.labels[-1] == 8
    last = train.lengths[-1]
    assert train.u[-1, last - 2 : last, 11].tolist() == pytest.approx([0.214409, 0.173642])


def test_no_sequence_is_in_both_parts():
    for train, test in (datasets.japanese_vowels(), datasets.digits()):
        seen = {row.numpy().tobytes() for row in train.u}
        assert sum(row.numpy().tobytes() in seen for row in test.u) == 0


@pytest.mark.parametrize(("name", "count", "first"), [("co2", 2284, 316.1), ("sunspots", 309, 5.0)])
def test_signals(name, count, first):
    signal = getattr(datasets, name)()
    assert signal.values.shape == signal.times.shape == (count,)
    assert signal.values.dtype == signal.times.dtype == np.float64
    assert signal.values[0] == pytest.approx(first)
    assert np.isfinite(signal.values).all() and (np.diff(signal.times) > 0).all()
    assert signal.title
