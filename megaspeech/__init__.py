"""Megaspeech: training of speech-text language models, from codec tokens to a model that answers."""

import warnings

__version__ = "0.1.0"

# What is missing is said where it is asked for (parallel.requirements), not at every import of megatron-core.
warnings.filterwarnings("ignore", message=".*not installed. Falling back", module="megatron")
