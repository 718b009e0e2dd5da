"""The precision follows the processor, unless the user or the engine's switch says otherwise."""

from pathlib import Path

import pytest
import torch

from seg_core import processor
from seg_core.processor import choose_precision, computes_bfloat16


@pytest.fixture
def flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that stands for /proc/cpuinfo, on a machine where oneDNN may use all instructions."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    monkeypatch.setattr(processor, "CPU_FLAGS", tmp_path / "cpuinfo")
    return tmp_path / "cpuinfo"


def test_torch_finds_the_same_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    expected = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert computes_bfloat16() == expected


@pytest.mark.parametrize(
    ("line", "isa", "expected"),
    [
        ("flags : fpu avx512f avx512_bf16 avx512_vnni", None, True),
        ("flags : fpu amx_bf16 amx_tile", None, True),
        ("flags : fpu avx2 avx512f avx512_vnni", None, False),
        ("flags : fpu avx512_bf16", "AVX512_CORE_BF16", True),
        ("flags : fpu avx512_bf16", "avx512_core", False),
        (None, None, False),  # not Linux
    ],
)
def test_bfloat16_needs_instructions_that_the_engine_may_use(
    flags: Path, monkeypatch: pytest.MonkeyPatch, line: str | None, isa: str | None, expected: bool
) -> None:
    if line is not None:
        flags.write_text(f"processor : 0\n{line}\n")
    if isa is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    assert computes_bfloat16() is expected
    assert choose_precision("auto", on_gpu=False) == ("bfloat16" if expected else "float32")
    assert choose_precision("auto", on_gpu=True) == "bfloat16"
    assert choose_precision("float32", on_gpu=True) == "float32"
