"""Causal attention over the few codebooks of many frames."""
