"""Data: manifests, decoding, text alignment, tasks, shards, mixing, loading."""
