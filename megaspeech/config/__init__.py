"""What a run is: plain, frozen, checked data, read from TOML. Imports neither torch nor megatron."""

from megaspeech.config.presets import PRESETS
from megaspeech.config.reading import ConfigError, as_toml, changed, config_of, read_config, read_tables, write_config
from megaspeech.config.schema import Config

__all__ = [
    "PRESETS",
    "Config",
    "ConfigError",
    "as_toml",
    "changed",
    "config_of",
    "read_config",
    "read_tables",
    "write_config",
]
