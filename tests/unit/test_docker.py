"""The images' pins: one file, in agreement with constraints.txt; the Dockerfiles name no version of their own."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
GPU, CPU = ((ROOT / "docker" / name).read_text() for name in ("Dockerfile", "Dockerfile.cpu"))
GPU_PINS = {"CUDA_IMAGE", "CUDA_ARCHS", "TORCH", "TRANSFORMER_ENGINE", "APEX_COMMIT", "MEGATRON_CORE", "DALI", "MOSHI"}
CPU_PINS = {"CPU_IMAGE", "TORCH"}
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
    packages = smoke.PACKAGES | smoke.GPU_PACKAGES
    assert {name: versions[name] for name in packages} == {
        name: constraints[package] for name, package in packages.items()
    }


def test_what_pip_does_not_know_is_pinned(versions: dict[str, str]) -> None:
    assert re.fullmatch(r"[0-9a-f]{40}", versions["APEX_COMMIT"])
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-cudnn-devel-ubuntu\d\d\.04", versions["CUDA_IMAGE"])
    assert re.fullmatch(r"debian:[a-z]+-\d{8}-slim", versions["CPU_IMAGE"])
    # Apex refuses another CUDA than torch's, and DALI's name says which it is for.
    assert versions["CUDA_IMAGE"].startswith("nvidia/cuda:13.0.") and "nvidia-dali-cuda130" in GPU


@pytest.mark.parametrize("text, pins", [(GPU, GPU_PINS), (CPU, CPU_PINS)], ids=["gpu", "cpu"])
def test_a_dockerfile_uses_its_pins_and_names_no_version(text: str, pins: set[str]) -> None:
    instructions = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    declared = {name for line in re.findall(r"^ARG (.*)$", instructions, re.MULTILINE) for name in line.split()}
    assert {name for name in declared if "=" not in name} - {"PIP_EXTRA_INDEX_URL"} == pins
    assert pins <= set(re.findall(r"\$\{(\w+)\}", instructions))
    assert not re.findall(r"\d+\.\d+|[0-9a-f]{40}", instructions)


@pytest.mark.parametrize("target, pins", [("image", GPU_PINS), ("sif", GPU_PINS), ("image-cpu", CPU_PINS)])
def test_make_hands_over_the_pins_that_are_used(target: str, pins: set[str], versions: dict[str, str]) -> None:
    said = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert dict(re.findall(r"--build-arg (\w+)=(\S+)", said)) == {name: versions[name] for name in pins}
    assert versions.keys() == GPU_PINS | CPU_PINS


def test_no_image_takes_what_git_ignores() -> None:
    ignored = {f"**/{line.rstrip('/')}" for line in (ROOT / ".gitignore").read_text().split()}
    assert {*(ROOT / ".dockerignore").read_text().split()} == ignored | {".git"}


def _steps(text: str) -> list[str]:
    """Lines that fetch and install, variables as `<NAME>`, continuations joined, Docker's way of chaining undone."""
    text = re.sub(r"\$\{(\w+)\}|\{\{ (\w+) \}\}", lambda found: f"<{found[1] or found[2]}>", text.replace("\\\n", " "))
    steps = [" ".join(part.removeprefix("RUN ").split()) for part in re.split(r"&&|\n", text)]
    return [step for step in steps if re.search(r"pip install|apt-get|git (init|fetch|checkout)|smoke", step)]


def test_apptainer_takes_the_same_steps_with_the_same_pins() -> None:
    instructions = APPTAINER.split("%post")[1]
    assert _steps(instructions) == _steps("\n".join(x for x in GPU.splitlines() if not x.startswith("#")))
    named = set(re.findall(r"\{\{ (\w+) \}\}", APPTAINER))
    assert named == GPU_PINS | {"MAX_JOBS"}
    assert "From: {{ CUDA_IMAGE }}\n" in APPTAINER and not re.findall(r"\d+\.\d+\.\d+|[0-9a-f]{40}", APPTAINER)
    copied = re.findall(r"^    (\S+) /opt/megaspeech/$", APPTAINER, re.MULTILINE)
    assert all((ROOT / name).exists() for name in copied) and {"constraints.txt", "megaspeech", "kernels"} <= {*copied}


def test_packages_come_from_wherever_pip_takes_them() -> None:
    assert set(re.findall(r"(?:https?://)([\w.-]+)", GPU + CPU)) == {"github.com"}  # Apex's sources
    assert not re.search(r"--(extra-)?index-url|--find-links", GPU + CPU)


def test_every_package_is_held_to_the_constraints() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for text, count in ((GPU, 7), (CPU, 2), (makefile, 2)):
        installs = re.findall(r"pip install ([^\n]*)", text)
        assert len(installs) == count and all("constraints.txt" in install for install in installs)
    assert "\nRUN make venv" in CPU


def test_smoke_finds_what_is_missing_or_another(smoke: ModuleType, versions: dict[str, str]) -> None:
    faults = smoke.version_faults(smoke.PACKAGES, versions={**versions, "MEGATRON_CORE": "9.9", "DALI": "9.9"})
    assert "megatron-core: 0.16.1, versions.env asks for MEGATRON_CORE=9.9" in faults
    assert any(fault.startswith("nvidia-dali-cuda130: ") for fault in faults)
    assert not [fault for fault in faults if fault.startswith("torch:")]  # 2.13.0+cpu is 2.13.0
    (fault,) = smoke.import_faults(("json", "no_such_module"))
    assert fault.startswith("import no_such_module: ")


def test_smoke_asks_of_an_image_what_it_is_for(
    smoke: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(smoke, "version_faults", lambda packages, **_: [*packages])
    monkeypatch.setattr(smoke, "import_faults", lambda modules: [*modules])
    asked = []
    for arguments in ([], ["--cpu"]):
        assert smoke.main(arguments) == 1
        asked.append({*capsys.readouterr().err.split()})
    assert asked[0] - asked[1] == {*smoke.GPU_PACKAGES, *smoke.GPU_MODULES} - {*smoke.MODULES}
    assert asked[1] == {*smoke.PACKAGES, *smoke.MODULES}
