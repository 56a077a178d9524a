"""The pin that exact CPU runs are held to. Its aim: bits that do not depend on the CPU, an x86-64 with AVX2.

Libraries choose their kernels by the CPU they find, and sums in another order give other bits. The pin
holds them all to one choice. It has to be set before numpy or torch is imported, which is why stages
enter this module first; it imports neither. Receipts (reports/receipts/) say on which CPUs that was tried.
What differs even so, and MKL's slow products, :mod:`~maskllm4v.utils.determinism.portable` replaces.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "COMPATIBLE",  # AVX2 is not enough: it is ignored on AMD
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OPENBLAS_CORETYPE": "Haswell",
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
}


def pin_kernels() -> None:
    """Set the environment; call before numpy and torch are imported.

    Raises:
        RuntimeError: torch or numpy is there already, so the pin would come too late.
    """
    early = [name for name in ("numpy", "torch") if name in sys.modules]
    if early and any(os.environ.get(key) != value for key, value in ENVIRONMENT.items()):
        raise RuntimeError(f"pin_kernels() has to come before the import of {' and '.join(early)}")
    os.environ.update(ENVIRONMENT)
    if not is_supported():
        print(
            "exact: bit-identical results are promised on x86-64 with AVX2 only, not on this machine", file=sys.stderr
        )


def pin_torch() -> None:
    """The part of the pin that torch keeps in its own state."""
    import torch

    from maskllm4v.utils.determinism import portable

    torch.set_num_threads(1)
    torch.set_deterministic_debug_mode("error")  # as use_deterministic_algorithms, which imports torch's compiler
    # Filling fresh memory only helps to find reads of it; it costs a tenth of a small model's step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_flush_denormal(True)
    portable.install()


def is_supported() -> bool:
    """Whether this machine is one for which exactness is claimed."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    cpuinfo = Path("/proc/cpuinfo")
    return not cpuinfo.exists() or " avx2 " in cpuinfo.read_text(errors="replace")
