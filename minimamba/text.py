"""Text to train on: files, or the source of Python's standard library, as one long row of bytes.

    0 first file 0 second file 0 third file ...        UTF-8; a byte 0 opens each file, and no text contains it

A file is held out, never trained on, if a hash of its name says so: the same files on every machine and, as far as
they exist there, for every version of Python. One in `HELD_OUT_SHARE` is.
"""

import sysconfig
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

SEPARATOR = b"\0"
HELD_OUT_SHARE = 20
# Tests, and what does not belong to the library's source: installed packages, files made when Python was built.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class Text(NamedTuple):
    """Bytes to learn from and bytes to be judged by: `train` and `held_out`, each (bytes,) uint8."""

    train: torch.Tensor
    held_out: torch.Tensor


def load(paths=None):
    """Return the `Text` of files and folders, by default of the running Python's standard library.

    Of a folder all UTF-8 files in it and below are read, hidden ones left out. Where no file is held out by its name
    (a single file, say), the last 1/20 of the bytes is. Raises FileNotFoundError or ValueError, which name the path.
    """
    files = standard_library() if paths is None else _read(paths)
    train, held_out = (
        b"".join(SEPARATOR + content for name, content in files if is_held_out(name) is wanted)
        for wanted in (False, True)
    )
    if not train:  # every name says "held out"
        train, held_out = held_out, b""
    if not held_out:
        border = len(train) - max(1, len(train) // HELD_OUT_SHARE)
        train, held_out = train[:border], train[border:]
    return Text(_tensor(train), _tensor(held_out))


def standard_library():
    """Return [(name, content), ...] of the running Python's own modules, sorted by name, tests left out.

    A name is the path in the library, such as "json/decoder.py"; the content is bytes.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        built = name.name.startswith("_sysconfigdata") or name.parts[0].startswith("config-")
        if not built and not LEFT_OUT.intersection(name.parts) and (content := path.read_bytes()):
            files.append((name.as_posix(), content))
    return sorted(files)


def is_held_out(name):
    """Whether the file of this name (str) is never trained on."""
    return zlib.crc32(name.encode()) % HELD_OUT_SHARE == 0


def draw_windows(data, size, length, seed, step):
    """Return `size` windows of `length` + 1 successive bytes of data (bytes,) uint8: (size, length + 1) int64.

    Where they start depends on nothing but data's size, `seed` and `step`: whoever resumes at a step, or takes only
    some rows, sees the windows that a run from the beginning in one process sees.
    """
    if len(data) <= length:
        raise ValueError(f"data: expected more than length = {length} bytes, got {len(data)}")
    starts = np.random.default_rng((seed, step)).integers(0, len(data) - length, size)
    starts = torch.from_numpy(starts)
    if data.is_cuda:  # from pinned memory, so that the copy does not wait for the GPU
        starts = starts.pin_memory().to(data.device, non_blocking=True)
    return data[starts[:, None] + torch.arange(length + 1, device=data.device)].long()


def _read(paths):
    """[(name, content), ...] of files and folders: a name is the path below the folder that was asked for."""
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            below = sorted(p for p in path.rglob("*") if p.is_file())
            names = [(p.relative_to(path), p) for p in below]
            names = [(name, p) for name, p in names if not any(part.startswith(".") for part in name.parts)]
            found = [(name.as_posix(), content) for name, p in names if _is_text(content := p.read_bytes())]
            if not found:
                raise ValueError(f"data: expected text files in {path}, found none")
            files += found
        elif path.is_file():
            content = path.read_bytes()
            if not _is_text(content):
                raise ValueError(f"data: expected UTF-8 text without zero bytes, got {path}")
            files.append((path.name, content))
        else:
            raise FileNotFoundError(f"data: no file or folder {path}")
    return files


def _is_text(content):
    try:
        return bool(content.decode()) and SEPARATOR not in content
    except UnicodeDecodeError:
        return False


def _tensor(content):
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
