"""The run that is planned for: a preset, or a config of one's own whose layout is looked for anew."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaspeech.config import PRESETS, Config, ConfigError, config_of, read_tables
from megaspeech.config.schema import SECTIONS
from megaspeech.planning.search import KEPT, Machine, Plan, valid_plan

DEFAULTS = {
    **{"data.num_frames": 4096, "training.global_batch_size": 512, "precision.recipe": "bf16"},
    **{"training.micro_batch_size": 1, "model.kernels": "triton"},
}
"""Of a preset, which is no whole run."""


@dataclass(frozen=True)
class Asked:
    """What the run's config says by section, in `tables`; and `base`, the config to plan for, without a layout.

    `rows` are those of a step of a run that packs, whose config counts samples; None of others.
    """

    source: str
    tables: dict[str, Any]
    rows: int | None
    base: Config

    @classmethod
    def read(cls, model: str, given: Mapping[str, Any], overrides: Sequence[str], *, name: str) -> Asked:
        """Read what is asked for.

        Args:
            model: a preset's name or a config's path.
            given: values of keys `section.field`, None for the config's own.
            overrides: `section.field=value`.
            name: of a preset's run.

        Raises:
            ValueError: there is no such preset or file, the config has faults apart from its layout, or it packs
                samples and the rows of a step are not given.
        """
        if model not in PRESETS and not Path(model).is_file():
            raise ValueError(f"--model: {model} is neither a config nor a preset; these are {', '.join(PRESETS)}")
        tables = _tables_of_preset(model, overrides) if model in PRESETS else read_tables(model, overrides)
        if not all(isinstance(tables.get(name, {}), dict) for name in SECTIONS):
            config_of(tables, source=model)  # says which is a value where a section should be
        sections = {name: tables.setdefault(name, {}) for name in ("run", "model", "data", "training", "precision")}
        rows = None
        for key, value in given.items():
            section, _, field = key.partition(".")
            if key == "training.global_batch_size" and sections["data"].get("pack"):
                rows = _rows(value or (DEFAULTS[key] if model in PRESETS else None), source=model)
            elif value is not None:
                sections[section][field] = value
        if model in PRESETS:
            for key, value in {**DEFAULTS, "run.name": name, "run.directory": f"runs/{name}"}.items():
                section, _, field = key.partition(".")
                sections[section].setdefault(field, value)
            sections["data"].setdefault("length_multiple", sections["data"]["num_frames"])
        kept = {key: value for key, value in tables.get("parallel", {}).items() if key in KEPT}
        return cls(model, tables, rows, _with_rows({**tables, "parallel": kept}, rows, source=model))

    def own_plan(self, machine: Machine) -> Plan | None:
        """What the layout that the config has takes; None where it is none for this machine and the overrides."""
        try:
            config = _with_rows(self.tables, self.rows, source=self.source)
        except ConfigError:
            return None
        return valid_plan(config, machine)


def _tables_of_preset(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "config.toml")
        path.write_text(f'[model]\npreset = "{name}"\n', encoding="utf-8")
        return read_tables(path, overrides)


def _rows(value: int | None, *, source: str) -> int:
    if value is None:
        raise ValueError(
            f"--global-batch: {source} packs its samples (data.pack); give the rows that a step comes to: "
            "training.global_batch_size x mean frames of a sample / data.num_frames"
        )
    return value


def _with_rows(tables: dict[str, Any], rows: int | None, *, source: str) -> Config:
    """The checked config, a step of it as many rows as are given."""
    config = config_of(tables, source=source)
    if rows is None:
        return config
    training = config.training.model_copy(update={"global_batch_size": rows})
    return config.model_copy(update={"training": training})
