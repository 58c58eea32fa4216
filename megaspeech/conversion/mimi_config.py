"""The config of a Mimi as the moshi runtime has it (`mimi_config_name`) and as transformers has it, both ways.

Kyutai's file of weights knows no config: without one the runtime takes it to be the published Mimi.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megaspeech.codecs.neural import import_transformers

if TYPE_CHECKING:
    from transformers import MimiConfig

SIZES = {
    "sampling_rate": ("sample_rate",),
    "audio_channels": ("channels",),
    "frame_rate": ("frame_rate",),
    "hidden_size": ("seanet", "dimension"),
    "num_filters": ("seanet", "n_filters"),
    "num_residual_layers": ("seanet", "n_residual_layers"),
    "upsampling_ratios": ("seanet", "ratios"),
    "kernel_size": ("seanet", "kernel_size"),
    "last_kernel_size": ("seanet", "last_kernel_size"),
    "residual_kernel_size": ("seanet", "residual_kernel_size"),
    "dilation_growth_rate": ("seanet", "dilation_base"),
    "compress": ("seanet", "compress"),
    "pad_mode": ("seanet", "pad_mode"),
    "codebook_size": ("quantizer", "bins"),
    "codebook_dim": ("quantizer", "dimension"),
    "num_quantizers": ("quantizer", "n_q"),
    "num_attention_heads": ("transformer", "num_heads"),
    "num_hidden_layers": ("transformer", "num_layers"),
    "intermediate_size": ("transformer", "dim_feedforward"),
    "sliding_window": ("transformer", "context"),
    "layer_scale_initial_scale": ("transformer", "layer_scale"),
}
"""Keys of transformers' `MimiConfig`, and where the same stands in the runtime's config."""
REPEATED = (
    ("quantizer", "input_dimension"),
    ("quantizer", "output_dimension"),
    ("transformer", "d_model"),
    ("transformer", "input_dimension"),
)
"""Where the runtime's config says `seanet.dimension` again."""
FIXED = {
    ("seanet", "causal"): True,
    ("seanet", "activation"): "ELU",
    ("seanet", "disable_norm_outer_blocks"): 0,
    ("seanet", "norm"): "none",
    ("seanet", "true_skip"): True,
    ("transformer", "causal"): True,
    ("transformer", "conv_layout"): True,
    ("transformer", "gating"): "none",
    ("transformer", "norm"): "layer_norm",
    ("transformer", "positional_embedding"): "rope",
}
"""What transformers' Mimi can only do in one way, as the runtime's config says it."""
RUNTIME_LACKS = {
    "use_causal_conv": True,
    "trim_right_ratio": 1.0,
    "use_conv_shortcut": False,
    "num_semantic_quantizers": 1,
    "hidden_act": "gelu",
    "norm_eps": 1e-5,
    "attention_bias": False,
}
"""What the runtime's Mimi can only do in one way, as transformers' config says it."""


def to_runtime_config(config: MimiConfig) -> dict[str, Any]:
    """The moshi runtime's config of a Mimi, which it needs where the sizes are not the published ones.

    Raises:
        ValueError: the Mimi has what the runtime's has not.
    """
    lacks = RUNTIME_LACKS | {
        "num_key_value_heads": config.num_attention_heads,
        "upsample_groups": config.hidden_size,
        "vector_quantization_hidden_dimension": config.codebook_dim,
        "head_dim": config.hidden_size // config.num_attention_heads,
    }
    for key, value in lacks.items():
        if (found := getattr(config, key)) != value:
            raise ValueError(
                f"Mimi: {key} = {found!r}, but the moshi runtime only has {value!r}; use transformers' Mimi"
            )
    values: dict[str, Any] = {"seanet": {}, "quantizer": {}, "transformer": {}}
    places = {place: getattr(config, key) for key, place in SIZES.items()}
    places |= dict.fromkeys(REPEATED, config.hidden_size) | FIXED
    places |= {
        ("transformer", "max_period"): config.rope_parameters["rope_theta"],
        ("transformer", "output_dimensions"): [config.hidden_size],
    }
    for (*section, key), value in places.items():
        (values[section[0]] if section else values)[key] = value
    return values


def from_runtime_config(values: dict[str, Any] | None, *, name: str = "the runtime's config") -> MimiConfig:
    """transformers' config of a Mimi that the runtime's describes; None describes the published one.

    Raises:
        ValueError: the runtime's has what transformers' has not; names the key.
    """
    kind = import_transformers().MimiConfig
    if values is None:
        return kind()
    flat = dict(_flat(values))
    found = {key: flat.pop(place) for key, place in SIZES.items() if place in flat}
    width = found["hidden_size"]
    expected = FIXED | dict.fromkeys(REPEATED, width) | {("transformer", "output_dimensions"): [width]}
    for place, value in expected.items():
        if (given := flat.pop(place, value)) != value:
            raise ValueError(f"{name}: {'.'.join(place)} = {given!r}, but transformers' Mimi only has {value!r}")
    theta = flat.pop(("transformer", "max_period"), 10000)
    if flat:
        raise ValueError(f"{name}: transformers' Mimi knows no {'.'.join(next(iter(flat)))}; leave it out")
    return kind(
        **found,
        num_key_value_heads=found["num_attention_heads"],
        upsample_groups=width,
        vector_quantization_hidden_dimension=found["codebook_dim"],
        rope_parameters={"rope_type": "default", "rope_theta": float(theta)},
    )


def _flat(values: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(place, value) of a config with sections."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from (((key, inner), one) for inner, one in value.items())
        else:
            yield (key,), value
