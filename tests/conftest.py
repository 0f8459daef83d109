"""One thread a worker, since pytest-xdist already fills the cores; GPU tests are skipped where there is none."""

import pytest
import torch

import minimamba  # noqa: F401  (before anything imports triton: it chooses the interpreter)

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
