"""Reading TOML with `section.field=value` overrides into a checked Config, and writing the resolved one back."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from megaspeech.config.checks import cross_section_faults
from megaspeech.config.preparation import SourceSection
from megaspeech.config.presets import PRESETS
from megaspeech.config.schema import SECTIONS, Config
from megaspeech.config.section import Section

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class ConfigError(ValueError):
    """All faults of a config in one message, one line each."""

    def __init__(self, source: str, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        super().__init__("\n".join([f"{source}: {count}", *(f"  {fault}" for fault in faults)]))


def read_config(path: str | Path, overrides: Iterable[str] = (), *, world_size: int | None = None) -> Config:
    """The checked config of a TOML file and `section.field=value` overrides.

    Args:
        path: the TOML file.
        overrides: strings `section.field=value`, or `sources.NAME.field=value`; the value is TOML, or a plain string
            where TOML has no such value.
        world_size: number of ranks; the layout is checked against it when given.

    Raises:
        ConfigError: every fault found, of the file, the overrides, and between sections.
    """
    tables, faults = _tables(Path(path), overrides)
    return _build(tables, source=str(path), faults=faults, world_size=world_size)


def read_tables(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """What a TOML file and overrides say, by section, and no more: neither checked, nor laid over the preset.

    Raises:
        ConfigError: there is no such file, it is no TOML, or something is not an override.
    """
    tables, faults = _tables(Path(path), overrides)
    if faults:
        raise ConfigError(str(path), faults)
    return tables


def write_config(config: Config, path: str | Path) -> None:
    """Write the resolved config as TOML; `read_config` of the file gives an equal one."""
    Path(path).write_text(as_toml(config), encoding="utf-8")


def as_toml(config: Config) -> str:
    """The resolved config as TOML."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def config_of(tables: dict[str, Any], *, source: str) -> Config:
    """The checked config of tables as a TOML file holds them; `source` is named where they have faults.

    Raises:
        ConfigError: every fault found.
    """
    return _build(tables, source=source, faults=[], world_size=None)


def changed(config: Config, tables: dict[str, dict[str, Any]], *, source: str) -> Config:
    """The checked config with other values for some keys of some sections; None for a key that is left out.

    Raises:
        ConfigError: every fault found.
    """
    values = config.model_dump(mode="json")
    for name, table in tables.items():
        values[name] |= table
    for name in SECTIONS:
        values[name] = {key: value for key, value in values[name].items() if value is not None}
    return config_of(values, source=source)


def _tables(path: Path, overrides: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """(what the file says with the overrides, the faults of these)."""
    tables, faults = _read_toml(path), []
    for override in overrides:
        _apply_override(tables, override, faults)
    return tables, faults


def _read_toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(str(path), ["there is no such file; give the path of a run's TOML config first"])
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(str(path), [f"not valid TOML: {error}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), [f"not UTF-8: byte {error.start}; convert it with iconv"]) from error


def _apply_override(tables: dict[str, Any], override: str, faults: list[str]) -> None:
    key, equals, text = override.partition("=")
    section, dot, field = key.partition(".")
    if not (equals and dot and section and field):
        faults.append(f"{override!r}: overrides are written section.field=value, for example training.train_steps=100")
        return
    table: Any = None
    if section == "sources":
        name, _, field = field.rpartition(".")
        tables_of_sources = [table for table in tables.get("sources", []) if isinstance(table, dict)]
        table = next((table for table in tables_of_sources if table.get("name") == name), None)
        if table is None:
            faults.append(f"{key}: no [[sources]] of the name {name!r}; overrides of one are sources.NAME.field=value")
    elif "." in field:
        faults.append(
            f"{key}: overrides are section.field=value, with one dot; "
            f"a whole table is written {section}.{field.partition('.')[0]}={{key = value, ...}}"
        )
    else:
        table = tables.setdefault(section, {})
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word: a path, a name
    if isinstance(table, dict):  # else the file has a value where a section should be: `_build` says so
        table[field] = value


def _build(tables: dict[str, Any], *, source: str, faults: list[str], world_size: int | None) -> Config:
    for name in tables.keys() - SECTIONS.keys() - {"sources"}:
        faults.append(f"{name}: no such section{_nearest(name, [*SECTIONS, 'sources'])}")
    tables = _with_preset(tables, faults)
    sections: dict[str, Section] = {}
    for name, section in SECTIONS.items():
        table = tables.get(name, {})
        try:
            if not isinstance(table, dict):
                raise TypeError
            sections[name] = section.model_validate(table)
        except TypeError:
            faults.append(f"{name}: is a section, not a value; write [{name}] above its keys")
        except ValidationError as error:
            faults.extend(_fault_lines(name, section, error))
    sources = _sources(tables.get("sources", []), faults)
    faults.extend(cross_section_faults(sections, world_size=world_size))
    if faults:
        raise ConfigError(source, faults)
    return Config(**sections, sources=sources)


def _sources(tables: Any, faults: list[str]) -> tuple[SourceSection, ...]:
    """The `[[sources]]`, whose names must differ."""
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        faults.append("sources: is a list of tables; write [[sources]] above the keys of each")
        return ()
    sources = []
    for place, table in enumerate(tables):
        try:
            sources.append(SourceSection.model_validate(table))
        except ValidationError as error:
            faults.extend(_fault_lines(f"sources[{place}]", SourceSection, error))
    names = [source.name for source in sources]
    repeated = sorted({name for name in names if names.count(name) > 1})
    faults.extend(f"sources: {name!r} is the name of several; give each its own" for name in repeated)
    return tuple(sources)


def _with_preset(tables: dict[str, Any], faults: list[str]) -> dict[str, Any]:
    """The tables laid over those of the preset that `model.preset` names."""
    model = tables.get("model", {})
    name = model.get("preset", SECTIONS["model"].model_fields["preset"].default) if isinstance(model, dict) else None
    if name not in PRESETS:
        faults.append(f"model.preset: no preset {name!r}{_nearest(str(name), PRESETS)}")
        return tables
    merged = dict(tables)
    for section, values in PRESETS[name].items():
        own = tables.get(section, {})
        merged[section] = {**values, **own} if isinstance(own, dict) else own
    return merged


def _fault_lines(name: str, section: type[Section], error: ValidationError) -> list[str]:
    lines = []
    for fault in error.errors():
        key = ".".join([name, *map(str, fault["loc"])])
        if fault["type"] == "extra_forbidden":
            lines.append(f"{key}: no such key{_nearest(str(fault['loc'][-1]), section.model_fields)}")
        elif fault["type"] == "missing":
            lines.append(f"{key}: missing; it has no default and the preset does not give it")
        else:
            lines.append(f"{key}: {fault['input']!r}: {fault['msg']}")
    return lines


def _nearest(word: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(sorted(known))}"
