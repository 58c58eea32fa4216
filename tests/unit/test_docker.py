"""The image's pins: one file, in agreement with constraints.txt; the Dockerfile names no version of its own."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
APPTAINER = (ROOT / "docker/apptainer.def").read_text()


@pytest.fixture(scope="module")
def smoke() -> ModuleType:
    spec = importlib.util.spec_from_file_location("smoke", ROOT / "docker/smoke.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def versions(smoke: ModuleType) -> dict[str, str]:
    return smoke.read_versions()


def test_versions_are_those_of_the_constraints(smoke: ModuleType, versions: dict[str, str]) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    constraints = dict(line.split("==") for line in lines if "==" in line and ";" not in line)
    assert {name: versions[name] for name in smoke.PACKAGES} == {
        name: constraints[package] for name, package in smoke.PACKAGES.items()
    }


def test_what_pip_does_not_know_is_pinned(versions: dict[str, str]) -> None:
    assert re.fullmatch(r"[0-9a-f]{40}", versions["APEX_COMMIT"])
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-cudnn-devel-ubuntu\d\d\.04", versions["CUDA_IMAGE"])
    # Apex refuses another CUDA than torch's, and DALI's name says which it is for.
    assert versions["CUDA_IMAGE"].startswith("nvidia/cuda:13.0.") and "nvidia-dali-cuda130" in DOCKERFILE


def test_the_dockerfile_uses_every_pin_and_names_no_version(versions: dict[str, str]) -> None:
    instructions = "\n".join(line for line in DOCKERFILE.splitlines() if not line.startswith("#"))
    declared = {name for line in re.findall(r"^ARG (.*)$", instructions, re.MULTILINE) for name in line.split()}
    assert {name for name in declared if "=" not in name} == versions.keys()
    assert versions.keys() <= set(re.findall(r"\$\{(\w+)\}", instructions))
    assert not re.findall(r"\d+\.\d+|[0-9a-f]{40}", instructions)


def _steps(text: str) -> list[str]:
    """Lines that fetch and install, variables as `<NAME>`, continuations joined, Docker's way of chaining undone."""
    text = re.sub(r"\$\{(\w+)\}|\{\{ (\w+) \}\}", lambda found: f"<{found[1] or found[2]}>", text.replace("\\\n", " "))
    steps = [" ".join(part.removeprefix("RUN ").split()) for part in re.split(r"&&|\n", text)]
    return [step for step in steps if re.search(r"pip install|apt-get|git (init|fetch|checkout)|smoke", step)]


def test_apptainer_takes_the_same_steps_with_the_same_pins(versions: dict[str, str]) -> None:
    instructions = APPTAINER.split("%post")[1]
    assert _steps(instructions) == _steps("\n".join(x for x in DOCKERFILE.splitlines() if not x.startswith("#")))
    named = set(re.findall(r"\{\{ (\w+) \}\}", APPTAINER))
    assert named == versions.keys() | {"MAX_JOBS"}
    assert "From: {{ CUDA_IMAGE }}\n" in APPTAINER and not re.findall(r"\d+\.\d+\.\d+|[0-9a-f]{40}", APPTAINER)
    copied = re.findall(r"^    (\S+) /opt/megaspeech/$", APPTAINER, re.MULTILINE)
    assert all((ROOT / name).exists() for name in copied) and {"constraints.txt", "megaspeech", "kernels"} <= {*copied}


def test_packages_come_from_wherever_pip_takes_them() -> None:
    hosts = set(re.findall(r"(?:https?://)([\w.-]+)", DOCKERFILE))
    assert hosts == {"github.com"}  # Apex's sources
    assert not re.search(r"--(extra-)?index-url|--find-links", DOCKERFILE)


def test_every_package_is_held_to_the_constraints() -> None:
    installs = re.findall(r"pip install ([^\n]*)", DOCKERFILE)
    assert len(installs) == 7 and all("constraints.txt" in install for install in installs)


def test_smoke_finds_what_is_missing_or_another(smoke: ModuleType, versions: dict[str, str]) -> None:
    faults = smoke.version_faults({**versions, "MEGATRON_CORE": "9.9", "DALI": "9.9"})
    assert "megatron-core: 0.16.1, versions.env asks for MEGATRON_CORE=9.9" in faults
    assert any(fault.startswith("nvidia-dali-cuda130: ") for fault in faults)
    assert not [fault for fault in faults if fault.startswith("torch:")]  # 2.13.0+cpu is 2.13.0
    (fault,) = smoke.import_faults(("json", "no_such_module"))
    assert fault.startswith("import no_such_module: ")


def test_smoke_says_so_and_fails_here(
    smoke: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(smoke, "import_faults", lambda: ["import apex: no such thing"])
    assert smoke.main() == 1
    assert "import apex: no such thing" in capsys.readouterr().err
