"""Matrix products and rounding inside kernels, the same on a GPU and in Triton's interpreter.

The interpreter (of Triton 3.7 to 3.9) multiplies the bit patterns of BF16 numbers, and cuts FP32 off where a GPU rounds
it to BF16.
"""

from __future__ import annotations

from megaspeech.kernels.launching import tl, triton

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, total):
    """`total + a @ b`, summed in FP32; FP32 factors are not cut to TF32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)  # FP32 holds products of BF16 numbers exactly
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """FP32 `x` in `dtype` (BF16 or FP32), to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)
