"""Head and cross entropy of all codebooks."""
