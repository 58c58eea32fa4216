"""What is learned: the stream embedding, the temporal and the depth transformer, the heads, and their losses.

Suffix letters of tensors: B microbatch, S streams, P predicted streams (text, then Q), Q predicted codebooks, T frames,
N frames of any samples in a row, H temporal width, D depth width, V vocabulary, R rows of a table.
"""
