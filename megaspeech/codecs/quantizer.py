"""Residual vector quantisation: faiss fits the codebooks, a beam search in double precision assigns the codes.

Shapes: R rows (frames), Q codebooks, K entries of a codebook, D width, W beam width.
"""

import numpy as np
import torch
from torch import Tensor

ROWS_AT_ONCE = 1024  # a block of distances then stays in the cache


def fit_codebooks(rows_RD: Tensor, *, num_codebooks: int, cardinality: int, iterations: int, seed: int) -> Tensor:
    """Codebooks ``[Q, K, D]`` (float64), each by k-means on what those before left over (faiss ``ResidualQuantizer``).

    Trained greedily on more rows instead of with a beam on fewer: the same time, and measured as good.

    Raises:
        ImportError: faiss is not installed; says how to.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError("fitting a codec needs faiss; pip install -c constraints.txt faiss-cpu") from error
    quantizer = faiss.ResidualQuantizer(rows_RD.shape[1], num_codebooks, cardinality.bit_length() - 1)
    quantizer.train_type = faiss.ResidualQuantizer.Train_default
    quantizer.max_beam_size = 1
    quantizer.cp.niter = iterations
    quantizer.cp.seed = seed
    quantizer.cp.min_points_per_centroid = 1  # only silences a warning
    quantizer.train(np.ascontiguousarray(rows_RD.numpy(), dtype=np.float32))
    flat = faiss.vector_to_array(quantizer.codebooks)
    return torch.from_numpy(flat.reshape(num_codebooks, cardinality, -1).astype(np.float64))


def quantize(rows_RD: Tensor, *, codebooks_QKD: Tensor, beam: int) -> Tensor:
    """Codes ``[R, Q]`` whose entries sum to about ``rows_RD`` (both float64).

    Double precision makes a row's codes independent of its neighbours: the order of summation inside a matrix product
    changes with its shape, and in single precision that would flip a near tie now and then.
    """
    parts = [_search(block, codebooks_QKD=codebooks_QKD, beam=beam) for block in rows_RD.split(ROWS_AT_ONCE)]
    return torch.cat(parts) if parts else rows_RD.new_zeros(0, len(codebooks_QKD), dtype=torch.long)


def _search(rows_RD: Tensor, *, codebooks_QKD: Tensor, beam: int) -> Tensor:
    """Beam search over the codebooks: keep the ``beam`` partial sums that are nearest to each row."""
    num_rows, dim = rows_RD.shape
    cardinality = codebooks_QKD.shape[1]
    residual_RWD = rows_RD[:, None, :]
    codes_RWQ = torch.zeros(num_rows, 1, 0, dtype=torch.long)
    for entries_KD in codebooks_QKD:
        cost_RWK = (
            residual_RWD.square().sum(-1, keepdim=True) - 2 * residual_RWD @ entries_KD.T + entries_KD.square().sum(-1)
        )
        width = min(beam, cost_RWK[0].numel()) if num_rows else beam
        best_RW = cost_RWK.flatten(1).topk(width, dim=1, largest=False).indices
        parent_RW, entry_RW = best_RW // cardinality, best_RW % cardinality
        residual_RWD = residual_RWD.gather(1, parent_RW[..., None].expand(-1, -1, dim)) - entries_KD[entry_RW]
        history = codes_RWQ.gather(1, parent_RW[..., None].expand(-1, -1, codes_RWQ.shape[-1]))
        codes_RWQ = torch.cat([history, entry_RW[..., None]], dim=-1)
    nearest_R = residual_RWD.square().sum(-1).argmin(1)
    return codes_RWQ[torch.arange(num_rows), nearest_R]


def dequantize(codes: Tensor, *, codebooks_QKD: Tensor) -> Tensor:
    """Codes ``[..., Q]`` to sums of entries ``[..., D]``."""
    books_Q = torch.arange(len(codebooks_QKD))
    return codebooks_QKD[books_Q, codes].sum(-2)
