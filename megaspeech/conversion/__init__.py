"""Checkpoints in and out, tensor by tensor: native ones, the moshi runtime's, those of transformers, text models."""
