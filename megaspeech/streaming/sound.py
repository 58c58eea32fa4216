"""Sound in and out of a live session, frame by frame: files of any rate and channels, the microphone, the speakers.

Shapes: N samples, C channels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np

from megaspeech.preparation.audio_checks import Limits
from megaspeech.preparation.other_formats import StretchReader
from megaspeech.preparation.recording import Recording
