"""Text as bytes: which files, in what order, held out or not, and the windows drawn from them."""

import sysconfig
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimamba import text

LIBRARY = text.standard_library()
NAMES = [name for name, _ in LIBRARY]


def as_bytes(tensor):
    assert tensor.dtype == torch.uint8 and tensor.ndim == 1
    return tensor.numpy().tobytes()


def test_the_standard_library_is_there_without_its_tests():
    root = Path(sysconfig.get_path("stdlib"))
    assert sorted(set(NAMES)) == NAMES and len(NAMES) > 400
    assert {"json/decoder.py", "argparse.py", "asyncio/base_events.py"} <= set(NAMES)
    parts = {part for name in NAMES for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert not [name for name in NAMES if "sysconfigdata" in name or name.startswith("config-")]
    assert all(content == (root / name).read_bytes() != b"" for name, content in LIBRARY[::50])
    assert 5e6 < sum(len(content) for _, content in LIBRARY) < 3e7


def test_names_alone_decide_what_is_held_out():
    """These names, on every machine: a checkpoint's score means something only if they never change."""
    held_out = ["argparse.py", "json/decoder.py", "doctest.py", "site.py", "shutil.py", "ssl.py", "http/server.py"]
    assert [name for name in held_out if text.is_held_out(name)] == held_out[2:]
    assert all(text.is_held_out(name) == (zlib.crc32(name.encode()) % 20 == 0) for name in NAMES)
    assert 0.02 < sum(map(text.is_held_out, NAMES)) / len(NAMES) < 0.1


def test_each_file_is_opened_by_a_zero_and_is_in_one_part_only():
    parts = text.load()
    for part, wanted in zip(parts, (False, True), strict=True):
        expected = [content for name, content in LIBRARY if text.is_held_out(name) == wanted]
        assert as_bytes(part).split(b"\0") == [b""] + expected


def test_files_and_folders(tmp_path):
    (tmp_path / "below" / ".git").mkdir(parents=True)
    for name, content in {
        "b.txt": "zwei ü", "below/a.txt": "one", "below/.git/c": "hidden", "empty": "", "doctest.py": "held out",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "image").write_bytes(b"\xff\xfe")
    (tmp_path / "zeros").write_bytes(b"a\0b")
    train, held_out = text.load([tmp_path])
    assert as_bytes(train) == b"\0zwei \xc3\xbc\0one"
    assert as_bytes(held_out) == b"\0held out"
    one = text.load([tmp_path / "below" / "a.txt", str(tmp_path / "b.txt")])
    assert as_bytes(one.train) + as_bytes(one.held_out) == b"\0one\0zwei \xc3\xbc"


@pytest.mark.parametrize("name", ["some.txt", "doctest.py"])  # the second is held out by name: nothing else is left
def test_of_a_single_file_the_end_is_held_out(tmp_path, name):
    (tmp_path / name).write_bytes(bytes(range(1, 100)))
    train, held_out = text.load([tmp_path / name])
    assert as_bytes(train) == bytes(range(95)) and as_bytes(held_out) == bytes(range(95, 100))


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^data: no file or folder .*nowhere"):
        text.load([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=r"^data: expected text files in .*, found none"):
        text.load([tmp_path])
    for name, content in (("latin", b"\xe4"), ("zeros", b"a\0"), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"^data: expected UTF-8 text without zero bytes, got .*{name}"):
            text.load([tmp_path / name])


@settings(max_examples=50, deadline=None)
@given(
    bytes_=st.integers(2, 300), length=st.integers(1, 299), size=st.integers(1, 20),
    seed=st.integers(0, 2**40), step=st.integers(0, 10**6),
)  # fmt: skip
def test_windows_are_pieces_of_the_data(bytes_, length, size, seed, step):
    data = torch.arange(bytes_, dtype=torch.int64).to(torch.uint8)
    if bytes_ <= length:
        with pytest.raises(ValueError, match=rf"^data: expected more than length = {length} bytes, got {bytes_}"):
            text.draw_windows(data, size, length, seed, step)
        return
    windows = text.draw_windows(data, size, length, seed, step)
    assert windows.shape == (size, length + 1) and windows.dtype == torch.int64
    assert torch.equal((windows - windows[:, :1]) % 256, torch.arange(length + 1).expand(size, -1) % 256)
    assert bytes_ > 256 or torch.all(windows == windows[:, :1] + torch.arange(length + 1))
    assert torch.equal(windows, text.draw_windows(data, size, length, seed, step))


def test_every_window_is_drawn_and_steps_and_seeds_differ():
    data = torch.arange(10, dtype=torch.uint8)
    starts = text.draw_windows(data, 500, 6, 0, 0)[:, 0]
    assert starts.unique().tolist() == [0, 1, 2, 3]  # the first and the last that fit
    assert starts.bincount().min() > 80
    draws = [tuple(text.draw_windows(data, 50, 6, seed, step)[:, 0].tolist()) for seed in (0, 1) for step in (0, 1, 2)]
    assert len(set(draws)) == 6
    expected = np.random.default_rng((1, 2)).integers(0, 4, 50)
    assert draws[-1] == tuple(expected.tolist())
