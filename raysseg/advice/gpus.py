"""GPUs that jobs are rented: what their makers' data sheets promise, and about what an hour costs.

Rates are those of NVIDIA's data sheets without sparsity, for tensor cores with sums in float32, and of plain float32.
`memory` is what CUDA reports, in GiB. Prices are list prices by the hour, on demand and of one GPU, at large clouds in
the United States, as they were about the middle of 2025, rounded; RTX cards: on markets for GPUs. They move, and differ
by a factor of three between providers: `raysseg plan --price` takes your own.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from raysseg.config import Precision
from raysseg.schema import InputError

CONTEXT = 0.75 * 2**30  # bytes of a GPU that CUDA itself takes
WORKSPACE = 0.25 * 2**30  # of cuBLAS and cuDNN
SLACK = 0.05  # of what batches take: blocks of the allocator that are free, but too small

EFFICIENCY = (0.2, 0.55)  # of the rates of data sheets, at worst and at best
BANDWIDTH = (0.5, 0.8)


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: as it is ordered.
        memory: GiB.
        half: TFLOP/s in bf16, or in fp16 where it has no bf16.
        single: TFLOP/s in fp32.
        bandwidth: GB/s of its memory.
        price: US dollars an hour.
        has_bf16: whether it computes in bf16.
    """

    name: str
    memory: float
    half: float
    single: float
    bandwidth: float
    price: float
    has_bf16: bool = True

    def resolve(self, precision: Precision) -> Precision:
        """What `auto` is on it."""
        return ("bf16" if self.has_bf16 else "fp32") if precision == "auto" else precision


_TABLE = (
    #    name         GiB    half   single  GB/s   $/h
    Gpu("T4", 14.6, 65.0, 8.1, 300.0, 0.55, has_bf16=False),
    Gpu("V100", 15.8, 125.0, 15.7, 900.0, 3.00, has_bf16=False),
    Gpu("L4", 22.0, 121.0, 30.3, 300.0, 0.80),
    Gpu("A10G", 22.0, 70.0, 31.5, 600.0, 1.00),
    Gpu("A10", 22.0, 125.0, 31.2, 600.0, 0.75),
    Gpu("RTX3090", 23.6, 71.0, 35.6, 936.0, 0.30),
    Gpu("RTX4090", 23.5, 165.0, 82.6, 1008.0, 0.50),
    Gpu("L40S", 44.4, 362.0, 91.6, 864.0, 1.85),
    Gpu("A100-40GB", 39.4, 312.0, 19.5, 1555.0, 3.50),
    Gpu("A100-80GB", 79.2, 312.0, 19.5, 2039.0, 4.50),
    Gpu("H100", 79.1, 989.0, 67.0, 3350.0, 7.00),
    Gpu("H200", 139.8, 989.0, 67.0, 4800.0, 8.00),
)
GPUS: dict[str, Gpu] = {gpu.name: gpu for gpu in _TABLE}


def find_gpu(name: str) -> Gpu:
    """A GPU by its name, in any case and with or without the dashes.

    Raises:
        InputError: it is not in the table.
    """
    by_letters = {_letters(known): gpu for known, gpu in GPUS.items()}
    if gpu := by_letters.get(_letters(name)):
        return gpu
    near = difflib.get_close_matches(_letters(name), by_letters, n=2, cutoff=0.5)
    mean = f"; did you mean {' or '.join(by_letters[key].name for key in near)}?" if near else ""
    raise InputError(f"--gpu: received {name}; known: {', '.join(GPUS)}{mean}; for another one, give --memory")


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("nvidia", "")).removesuffix("gb")
