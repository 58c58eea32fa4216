"""GPUs by the name that their driver gives, with the figures of their data sheets.

Rates are of dense matrix products, without the sparsity that data sheets print first (and which doubles them).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    `device_name` is what torch reports of it. Rates are in TFLOP/s, bandwidth in GB/s and memory in GB of 10^9 bytes;
    None where the chip has no such products, or no source was found. `key` is what commands call it; `nvlink` is in
    GB/s in each direction, all links together, and `watts` the most that the board takes, both of the same data sheets.
    Drivers report some 7% more memory than these GB (an H200's 141 are 139 GiB): a margin, until it is measured.
    """

    name: str
    device_name: str
    bf16_tflops: float
    fp8_tflops: float | None
    bandwidth: float | None
    memory_gb: float
    source: str
    key: str = ""
    nvlink: float = 0.0
    watts: float = 0.0
    has_mxfp8: bool = False

    def has(self, fp8_recipe: str | None) -> bool:
        """Whether it multiplies as the recipe wants (`config.precision.fp8_recipe`; None: BF16)."""
        return not fp8_recipe or (self.has_mxfp8 if fp8_recipe == "mxfp8" else self.fp8_tflops is not None)


GPUS = (
    Gpu(
        "A100 SXM 80 GB",
        "NVIDIA A100-SXM4-80GB",
        312.0,
        None,
        2039.0,
        80.0,
        "NVIDIA A100 data sheet, 2021",
        "a100",
        300,
        400,
    ),
    Gpu(
        *("H100 SXM 80 GB", "NVIDIA H100 80GB HBM3", 989.4, 1978.9, 3350.0, 80.0),
        *("NVIDIA H100 white paper, 2022, table 2", "h100-80gb", 450, 700),
    ),
    # The chip of the H100 SXM with other memory, as TSUBAME4.0 has it; no source gave its bandwidth. Its name is as
    # users report it: not seen here.
    Gpu(
        *("H100 SXM 94 GB", "NVIDIA H100", 989.4, 1978.9, None, 94.0),
        *("TSUBAME4.0 hardware: 952.4 PFLOPS FP16 of 960", "h100-96gb", 450, 700),
    ),
    Gpu("H200 SXM", "NVIDIA H200", 989.4, 1978.9, 4800.0, 141.0, "NVIDIA H200 data sheet, 2024", "h200", 450, 700),
    Gpu(
        *("B200", "NVIDIA B200", 2250.0, 4500.0, 8000.0, 180.0),
        *("NVIDIA DGX B200 data sheet, 2024: an eighth of it", "b200", 900, 1000, True),
    ),
)


def find_gpu(device_name: str) -> Gpu | None:
    """The GPU of that name; None of another one (a PCIe card shares the chip, not the rates)."""
    return next((gpu for gpu in GPUS if gpu.device_name == device_name), None)
