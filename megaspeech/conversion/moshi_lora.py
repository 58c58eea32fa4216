"""Low-rank changes that moshi-finetune trained, folded into the weights they change: W + scaling * B A.

Its file holds `NAME.lora_A.weight` `[rank, in]` and `NAME.lora_B.weight` `[out, rank]` for matrices `NAME.weight`
(moshi/modules/lora.py), and, where embeddings were trained too, these as they are. The product is made in FP32 and
rounded once, to the precision of the weights.
"""

from __future__ import annotations

from megaspeech.conversion.deferred import Deferred, Weights

A, B, FROZEN = ".lora_A.weight", ".lora_B.weight", ".frozen_W.weight"


def folded(weights: Weights, changes: Weights, *, scaling: float, rank: int | None = None) -> dict[str, Deferred]:
    """The changed weights, unread.

    Args:
        weights: by the names of moshi's state dict.
        changes: of the low-rank file, by the same.
        scaling: `lora_scaling`.
        rank: `lora_rank`, to check against; None takes the tensors' own.

    Raises:
        ValueError: names the tensor that does not fit the model or its other half.
    """
    found = dict(weights)
    for name, change in changes.items():
        if name.endswith(B):
            if name.removesuffix(B) + A not in changes:
                raise ValueError(f"tensor {name.removesuffix(B) + A} is missing beside {name}")
            continue
        target = next((name.removesuffix(end) + ".weight" for end in (A, FROZEN) if name.endswith(end)), name)
        if target not in weights:
            raise ValueError(f"tensor {name} changes {target}, which the model does not have")
        if name.endswith(A):
            other = changes.get(name.removesuffix(A) + B)
            found[target] = _changed(name, weights[target], change, other, scaling=scaling, rank=rank)
        elif change.shape == weights[target].shape:
            found[target] = change.to(weights[target].dtype)
        else:
            raise ValueError(f"tensor {name} {list(change.shape)} is not of the model's {list(weights[target].shape)}")
    return found


def _changed(
    name: str, weight: Deferred, a: Deferred, b: Deferred | None, *, scaling: float, rank: int | None
) -> Deferred:
    if b is None:
        raise ValueError(f"tensor {name.removesuffix(A) + B} is missing beside {name}")
    rank = rank or a.shape[0]
    if a.shape != (rank, weight.shape[1]) or b.shape != (weight.shape[0], rank):
        shapes = f"{list(a.shape)} and {list(b.shape)}"
        raise ValueError(f"tensors {name} and its other half have shapes {shapes}, not of rank {rank} for the model's")
    return Deferred(
        weight.shape,
        weight.dtype,
        lambda: weight.read().float().addmm(b.read().float(), a.read().float(), alpha=scaling).to(weight.dtype),
    )
