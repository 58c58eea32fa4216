"""Codecs: waveform to codes and back, behind one protocol.

``spectral`` is fitted on the user's audio in seconds; Mimi, EnCodec, DAC and WavTokenizer are read as published.
"""

from megaspeech.codecs.protocol import Codec, StreamingDecoder, StreamingEncoder
from megaspeech.codecs.registry import codec_of, load_codec
from megaspeech.codecs.spectral import SpectralCodec, SpectralConfig

__all__ = ["Codec", "SpectralCodec", "SpectralConfig", "StreamingDecoder", "StreamingEncoder", "codec_of", "load_codec"]
