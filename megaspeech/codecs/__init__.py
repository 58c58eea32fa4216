"""Codecs: waveform to codes and back, behind one protocol; ``spectral`` is fitted on the user's audio in seconds."""

from megaspeech.codecs.protocol import Codec, StreamingDecoder, StreamingEncoder
from megaspeech.codecs.registry import load_codec
from megaspeech.codecs.spectral import SpectralCodec, SpectralConfig

__all__ = ["Codec", "SpectralCodec", "SpectralConfig", "StreamingDecoder", "StreamingEncoder", "load_codec"]
