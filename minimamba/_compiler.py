"""Build a C file of kernels/ with the system's compiler, on first use, and keep the result in the user's cache."""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path

FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-fPIC", "-shared")
THREADS = "-fopenmp"  # not with every compiler (Apple's has none): the C files do without it
NATIVE = ("-march=native", "-mcpu=native")  # all that this processor can do; which of the two depends on the kind


@functools.cache
def load(name, *defines):
    """Return kernels/`name` as a ctypes library, compiled with `defines` such as "REAL=float"; None if it cannot be.

    A built library is kept under a name made from the source, the flags and all that the compiler predefines: its
    version and the processor's features. So a home directory that several machines share holds one for each.
    Where there is no compiler, one warning says how to get the fast scan.
    """
    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or "clang"]
    source = Path(find_spec("minimamba.kernels").submodule_search_locations[0]) / name
    try:
        native, features = _features(compiler)
        command = [*compiler, *FLAGS, *native, *(f"-D{define}" for define in defines)]
        key = hashlib.sha256("\0".join([*command, THREADS, features, source.read_text()]).encode()).hexdigest()[:20]
        library = _cache() / f"{source.stem}-{key}.so"
        if not library.exists():
            try:
                _build([*command, THREADS], source, library)
            except subprocess.CalledProcessError:
                _build(command, source, library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        warnings.warn(
            f"minimamba: the fast CPU scan could not be built ({reason}), so a slower one in PyTorch runs instead. "
            "Install a C compiler (Debian: apt install gcc; macOS: xcode-select --install) or set CC to one.",
            stacklevel=2,
        )
        return None


def _features(compiler):
    """Return the flags for this very processor and all macros that the compiler predefines with them."""
    macros = ("-dM", "-E", "-x", "c", os.devnull)
    for flag in NATIVE:
        run = _run([*compiler, flag, *macros], check=False)
        if run.returncode == 0:
            return [flag], run.stdout
    return [], _run([*compiler, *macros]).stdout


def _build(command, source, library):
    """Compile to a temporary name and rename: two processes may build at once, and nobody loads half a file."""
    handle, temporary = tempfile.mkstemp(dir=library.parent, suffix=".part")
    os.close(handle)
    try:
        _run([*command, str(source), "-o", temporary])
        os.replace(temporary, library)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _run(command, check=True):
    return subprocess.run(command, check=check, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def _cache():
    """The folder of built libraries: for this user alone, since what lies in it is run."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        (base / "minimamba").mkdir(parents=True, exist_ok=True, mode=0o700)
        folder = base / "minimamba"
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass  # a home that cannot be written to
    return _temporary_folder()


@functools.cache
def _temporary_folder():
    return Path(tempfile.mkdtemp(prefix="minimamba-"))
