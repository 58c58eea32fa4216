"""Named model shapes: the sections `streams`, `temporal` and `depth` of a config, which the file may then override."""

from __future__ import annotations

from typing import Any


def _transformer(
    num_layers: int,
    hidden_size: int,
    ffn_hidden_size: int,
    num_attention_heads: int,
    num_query_groups: int | None = None,
) -> dict[str, Any]:
    return {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "num_attention_heads": num_attention_heads,
        "num_query_groups": num_query_groups or num_attention_heads,
    }


def _streams(text_cardinality: int, num_codebooks: int, num_given_codebooks: int, cardinality: int, delay: int) -> dict:
    """Text and the first codebook of each speaker undelayed, the acoustic codebooks `delay` frames late."""
    own, given = ([0] + [delay] * (count - 1) if count else [] for count in (num_codebooks, num_given_codebooks))
    return {
        "text_cardinality": text_cardinality,
        "num_codebooks": num_codebooks,
        "num_given_codebooks": num_given_codebooks,
        "cardinality": cardinality,
        "delays": [0, *own, *given],
    }


def _japanese_english(temporal: dict[str, Any], *, depth: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A vocabulary of 48,000, 16 codebooks said and 16 heard, four minutes in sight."""
    return {"streams": _streams(48000, 16, 16, 2048, 1), "temporal": {**temporal, "context": 3000}, "depth": depth}


_MOSHI_DEPTH = _transformer(6, 1024, 2816, 16)
_WIDE_DEPTH = _transformer(6, 2048, 5632, 16)
"""As much wider as the temporal transformer's 8192 is than Moshi's 4096."""

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # For tests: every mechanism (GQA, delays, a window shorter than the sample), nothing to spare.
    "tiny": {
        "streams": _streams(48, 4, 4, 32, 1),
        "temporal": {**_transformer(4, 64, 176, 4, 2), "context": 12},
        "depth": _transformer(2, 32, 88, 4),
    },
    # `tiny` with a mixture of four experts, two for every frame.
    "tiny-moe": {
        "streams": _streams(48, 4, 4, 32, 1),
        "temporal": {
            **_transformer(4, 64, 176, 4, 2),
            "context": 12,
            "num_moe_experts": 4,
            "moe_ffn_hidden_size": 88,
        },
        "depth": _transformer(2, 32, 88, 4),
    },
    # The quickstart's: spoken digits on two CPU cores.
    "digits": {
        "streams": _streams(64, 8, 8, 256, 0),
        "temporal": {**_transformer(4, 192, 528, 4), "context": 250},
        "depth": _transformer(2, 96, 264, 4),
    },
    # Kyutai's Moshi 7B (arXiv 2410.00037), 7.688 billion parameters.
    "moshi-7b": {
        "streams": _streams(32000, 8, 8, 2048, 1),
        "temporal": {**_transformer(32, 4096, 11264, 32), "context": 3000},
        "depth": _MOSHI_DEPTH,
    },
    # Llama 3's shapes (arXiv 2407.21783, table 3) read and write 16 codebooks a speaker and a Japanese and English
    # vocabulary. 13b is Llama 2 13B's (arXiv 2307.09288) with grouped queries.
    "8b": _japanese_english(_transformer(32, 4096, 14336, 32, 8), depth=_MOSHI_DEPTH),
    "13b": _japanese_english(_transformer(40, 5120, 13824, 40, 8), depth=_MOSHI_DEPTH),
    "40b": _japanese_english(_transformer(44, 8192, 28672, 64, 8), depth=_WIDE_DEPTH),
    "70b": _japanese_english(_transformer(80, 8192, 28672, 64, 8), depth=_WIDE_DEPTH),
}
