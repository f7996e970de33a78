"""GPUs, by their data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU, by its data sheet."""

    name: str
    flops_bf16: float
    """FLOP/s, dense: data sheets print twice that, with sparsity. fp8 has double."""
    bandwidth: float
    """Bytes/s of its memory."""
    memory: float
    """Bytes, as `torch.cuda.mem_get_info` reports the total: not the number on the box."""
    has_fp8: bool = True
    """Whether it computes in fp8; weights in fp8 save memory on any."""


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("H100", 989e12, 3.35e12, 85.03e9),
        Gpu("H200", 989e12, 4.8e12, 150.1e9),
        Gpu("A100", 312e12, 2.039e12, 85.1e9, has_fp8=False),
        Gpu("L40S", 362e12, 0.864e12, 47.7e9),
        Gpu("B200", 2250e12, 7.7e12, 191.5e9),
    )
}
"""By what `cluster.accelerator` says. FLOP/s and bandwidth: NVIDIA's data sheets of the H100 SXM
80 GB, H200 SXM, A100 SXM 80 GB, L40S, and HGX B200 (an eighth of the board; some print 8 TB/s, its
bus of 7,680 bits gives 7.7). Memory: as CUDA reports it (79.2, 139.8, 79.25, 44.4, 178.35 GiB)."""
