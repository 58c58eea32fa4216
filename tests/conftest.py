"""Makes what tests share importable, and has Triton interpret kernels, unless it is the GPU's turn (`make gpu`)."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module is imported: Triton reads the variable once, and torch may import Triton."""
    if config.option.markexpr != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"
