"""The machine code that Triton makes for Hopper, read without a GPU: registers, spills, shared memory, load widths."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaspeech.kernels.launching import compiled_only, triton

TARGET = triton.backends.compiler.GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class MachineCode:
    """One compiled kernel, of such constants.

    `loads` counts the loads from global memory by their width in bits, `products` the instructions that multiply
    matrices on tensor cores by their kind: "wgmma", Hopper's own, or "mma", its predecessor for small tiles.
    """

    kernel: str
    constants: dict[str, int]
    registers: int
    spilled_bytes: int
    shared_bytes: int
    loads: dict[str, int]
    products: dict[str, int]


class _Hopper:
    """What Triton asks of a driver in order to compile; an H100's answers."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return TARGET


def compile_for_hopper(call: Callable[[], Any]) -> list[MachineCode]:
    """Machine code of every kernel that `call` launches (on meta tensors, say), in order."""
    triton.runtime.driver.set_active(_Hopper())
    with compiled_only() as compiled:
        call()
    return [_read(*each) for each in compiled]


def _read(name: str, constants: dict[str, int], kernel: Any) -> MachineCode:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    ptx = kernel.asm["ptx"]
    products = Counter(re.findall(r"(wgmma|\bmma)\.(?:mma_async\.)?sync", ptx))
    return MachineCode(
        name, constants, registers, stack + local, kernel.metadata.shared, _load_widths(ptx), dict(products)
    )


def _load_widths(ptx: str) -> dict[str, int]:
    """Direct loads, and copies to shared memory, which name their bytes."""
    direct = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[a-z](\d+) ", ptx)
    copies = re.findall(r"cp\.async\.\w+\.shared\.global\S* \[[^\]]+\], \[[^\]]+\], (\w+)", ptx)
    widths = Counter(int(vector or 1) * int(bits) for vector, bits in direct)
    widths.update(8 * int(size, 0) for size in copies)
    return {str(width): widths[width] for width in sorted(widths)}
