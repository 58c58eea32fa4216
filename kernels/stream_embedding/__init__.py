"""The delayed sum of stream embeddings."""
