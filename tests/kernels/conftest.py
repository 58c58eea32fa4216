"""Memory that nobody wrote holds NaN; kernels run in Triton's interpreter (see `tests/conftest.py`)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch's deterministic mode fills `torch.empty` and its kin with NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
