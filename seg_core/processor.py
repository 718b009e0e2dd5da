"""What the processor of this machine computes natively."""

import os
from pathlib import Path

from seg_core.errors import SegError

PRECISIONS = ("auto", "exact", "float32", "bfloat16", "int8")  # see seg_core.model.segmenter.Segmenter
CPU_PRECISIONS = {"exact", "int8"}
CPU_FLAGS = Path("/proc/cpuinfo")
# The switch of oneDNN, which computes convolutions in torch, and its values that leave out bfloat16.
MAX_ISA = "ONEDNN_MAX_CPU_ISA"
ISAS_WITHOUT_BFLOAT16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}


def computes_bfloat16() -> bool:
    """Return whether torch finds instructions for bfloat16 in this processor: AVX-512 BF16 or AMX.

    Without them, bfloat16 works, but it is slower than float32. Only Linux tells; elsewhere this is False.
    """
    if os.environ.get(MAX_ISA, "").upper() in ISAS_WITHOUT_BFLOAT16:
        return False
    try:
        flags = CPU_FLAGS.read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags.split())


def choose_precision(precision: str, on_gpu: bool) -> str:
    """Return the precision to compute in. `auto` is bfloat16 on a GPU, and on a processor that computes it natively.

    Otherwise `auto` is float32. Raises SegError for what is none of PRECISIONS, and for a precision that only CPUs
    compute in, on a GPU.
    """
    if precision not in PRECISIONS:
        raise SegError(f"--precision {precision}: say one of {', '.join(PRECISIONS)}")
    if on_gpu and precision in CPU_PRECISIONS:
        raise SegError(f"--precision {precision}: is for CPUs: add --device cpu, or use float32 or bfloat16 on the GPU")
    if precision != "auto":
        return precision
    return "bfloat16" if on_gpu or computes_bfloat16() else "float32"
