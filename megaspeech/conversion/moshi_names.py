"""The names that a moshi model's tensors may have in files, brought to those of its state dict, unread.

Released files hold all sets of an attention's weights in one tensor, which moshi splits when it loads them
(`_load_hook` in moshi/modules/transformer.py); models saved by moshi itself, or by moshi-finetune, have them split.
"""

from __future__ import annotations

import re

from megaspeech.conversion.deferred import Deferred, Weights
from megaspeech.conversion.layouts import Joined
from megaspeech.conversion.rules import Rule, to_native

PACKED = re.compile(r"(.*self_attn\.(?:in|out)_proj)(?:_weight|\.((?:lora_[AB]\.)?weight))")
SHARED = re.compile(r"(depformer\.layers\.\d+\.)(gating|self_attn\.(?:in|out)_projs\.0)\.(.*)")


def split(weights: Weights, *, num_sets: int) -> dict[str, Deferred]:
    """Every set by itself: `in_projs.0.weight` and so on, `num_sets` of them in the depth transformer."""
    found: dict[str, Deferred] = {}
    for name, one in weights.items():
        match = PACKED.fullmatch(name)
        if match is None:
            found[name] = one
            continue
        count = num_sets if name.startswith("depformer.") else 1
        if one.shape[0] % count:
            raise ValueError(f"tensor {name} {list(one.shape)} does not hold {count} sets of weights")
        names = tuple(f"{match[1]}s.{index}.{match[2] or 'weight'}" for index in range(count))
        found |= to_native(weights, [Rule(names, (name,), Joined((one.shape[0] // count,) * count))])
    return found


def copied(weights: Weights, *, num_copies: int) -> dict[str, Deferred]:
    """The depth transformer's one set of weights under the names of so many sets."""
    found: dict[str, Deferred] = {}
    for name, one in weights.items():
        match = SHARED.fullmatch(name)
        if match is None:
            found[name] = one
            continue
        layer, module, rest = match.groups()
        stem = module if module == "gating" else module.removesuffix(".0")
        found |= {f"{layer}{stem}.{index}.{rest}": one for index in range(num_copies)}
    return found
