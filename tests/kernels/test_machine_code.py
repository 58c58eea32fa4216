"""What Triton makes for Hopper is what the committed table says: no spilled registers, wide loads, nothing grown."""

from __future__ import annotations

import os
import subprocess
import sys

from megaspeech.kernels.benchmarks.machine_code import faults

GOOD = {"operation": "o", "kernel": "k", "spilled_bytes": 0, "registers": 64, "loads": {"32": 1, "128": 4}}


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, where Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=900)


def test_every_kernel_compiles_for_hopper_to_the_committed_table() -> None:
    finished = run("-m", "megaspeech.kernels.benchmarks.machine_code")
    assert finished.returncode == 0, finished.stderr


def test_regressions_are_named() -> None:
    assert not list(faults([GOOD], committed=[GOOD]))
    more, spilled = {**GOOD, "registers": 65}, {**GOOD, "spilled_bytes": 8}
    narrow = {**GOOD, "loads": {"32": 16}}
    assert len(list(faults([more], committed=[GOOD]))) == 2  # here and no more, there and not here
    assert list(faults([spilled], committed=[spilled])) == ["o, k: spills 8 bytes"]
    assert list(faults([narrow], committed=[narrow])) == ["o, k: no loads of 128 bits, only {'32': 16}"]
    assert not list(faults([{**narrow, "kernel": "rows_kernel"}], committed=[{**narrow, "kernel": "rows_kernel"}]))


LOAD = "from megaspeech.kernels import load_kernels; load_kernels('triton')"


def test_triton_without_a_gpu_is_refused() -> None:
    last = run("-c", LOAD, CUDA_VISIBLE_DEVICES="").stderr.splitlines()[-1]
    assert last.startswith('ValueError: model.kernels: "triton" runs on a GPU, and here is none; take "reference"')


def test_triton_that_is_not_installed_is_named() -> None:
    last = run("-c", f"import sys; sys.modules['triton'] = None; {LOAD}").stderr.splitlines()[-1]
    assert last.startswith('ValueError: model.kernels: "triton" needs Triton, which is not installed')
