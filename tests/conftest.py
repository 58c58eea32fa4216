"""Makes `launching.py`, `one_rank.py` and `exactness.py`, shared by the tests, importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
