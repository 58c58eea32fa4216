"""Makes `launching.py` and `one_rank.py`, shared by the tests, importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
