"""Megaspeech: training of speech-text language models, from codec tokens to a model that answers."""

__version__ = "0.1.0"
