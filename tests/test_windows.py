"""Windows of a part that are read at once: the chips are those of windows that are read alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from conftest import MakeBundle
from rasters import write_jpeg

from seg_core.errors import ReadError
from seg_core.grid import split
from seg_core.imagery.scene import Scene
from seg_core.inference.windows import stage_windows
from seg_core.model.segmenter import Segmenter
from seg_core.run.plan import Part, ReadBlock, Settings

SETTINGS = Settings(tile_size=64, part=256, halo=24, threshold=0.5)
SIDE = 1100


def block_of(scene: Scene) -> ReadBlock:
    """All of a scene, by four windows."""
    return ReadBlock(Part("a", scene, scene.window), tuple(split(scene.window, SIDE // 2)))


@pytest.fixture
def segmenter(make_bundle: MakeBundle) -> Segmenter:
    return Segmenter(make_bundle(), "cpu")


@pytest.mark.parametrize("decode", ["cpu", "device"])
def test_chips_that_are_read_at_once_are_those_read_alone(tmp_path: Path, segmenter: Segmenter, decode: str) -> None:
    valid = np.ones((SIDE, SIDE), np.bool_)
    valid[:, 535:] = False
    block = block_of(write_jpeg(tmp_path / "a.tif", valid=valid, height=SIDE, width=SIDE))
    for halo, holds in ((24, [True] * 4), (0, [True, False, True, False])):
        settings = replace(SETTINGS, halo=halo, decode=decode)
        together = stage_windows(block, settings, segmenter)
        assert len({chip.image.untyped_storage().data_ptr() for chip in together}) == 1
        assert [chip.any_valid for chip in together] == holds
        for window, chip in zip(block.windows, together, strict=True):
            (alone,) = stage_windows(ReadBlock(block.part, (window,)), settings, segmenter)
            assert np.array_equal(chip.valid, alone.valid)
            assert torch.equal(chip.mask, alone.mask)
            assert torch.equal(chip.image[:, chip.mask], alone.image[:, alone.mask])
            assert chip.decoded == (decode == "device")


def test_who_decodes_a_window_does_not_depend_on_a_damaged_one_beside_it(tmp_path: Path, segmenter: Segmenter) -> None:
    scene = write_jpeg(tmp_path / "a.tif", height=SIDE, width=SIDE)
    content = bytearray(Path(scene.uri).read_bytes())
    with rasterio.open(scene.uri) as dataset:
        offset, size = (int(dataset.get_tag_item(f"BLOCK_{name}_8_16", "TIFF", bidx=1)) for name in ("OFFSET", "SIZE"))
    content[offset + 2 : offset + size] = bytes(size - 2)
    Path(scene.uri).write_bytes(content)
    block, settings = block_of(scene), replace(SETTINGS, halo=0, decode="device")
    with pytest.raises(ReadError, match="a block can't be decoded"):
        stage_windows(block, settings, segmenter)
    *whole, damaged = (replace(block, windows=(window,)) for window in block.windows)
    assert all(stage_windows(each, settings, segmenter)[0].decoded for each in whole)
    with pytest.raises(ReadError, match=r"a\.tif"):  # GDAL's words for it
        stage_windows(damaged, settings, segmenter)
