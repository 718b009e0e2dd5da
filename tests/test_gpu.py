"""What a GPU does is what the CPU does, but for rounding. For machines that have one."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import UTM
from numpy.typing import NDArray
from rasters import WINDOWS, decode, write_jpeg
from runs import read_part

from aerial_seg.resources import ActorResources, ExecutionOptions
from aerial_seg.segmenting.actor import PartSegmenter
from seg_core.grid import expand_reflection, reflect_window
from seg_core.imagery.geotiff import write_geotiff
from seg_core.imagery.raster import read_chip
from seg_core.imagery.region import read_region
from seg_core.model.bundle import BUILT_IN, read_bundle
from seg_core.model.device_chips import DeviceChip
from seg_core.model.segmenter import Segmenter
from seg_core.model.window_results import WindowResult, WindowSpec, pack, sum_tiles, to_units
from seg_core.run.plan import Settings, make_plan
from seg_core.run.resume import open_run
from seg_core.run.rows import Row
from seg_core.run.tables import part_path
from seg_core.synthetic import draw_town

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use")

HALO, SIDE = 96, 704
CUT = WindowSpec(HALO, SIDE - 2 * HALO, SIDE - 2 * HALO, 256, 0.5)
Chip = tuple[NDArray[np.uint8], NDArray[np.bool_]]


@pytest.fixture(scope="module")
def chips() -> list[Chip]:
    """Three chips of a town, each with a missing corner."""
    chips = []
    for seed in range(3):
        image, _, valid = draw_town(SIDE, SIDE, seed)
        chips.append((np.ascontiguousarray(np.moveaxis(image, -1, 0)), valid))
    return chips


def staged(segmenter: Segmenter, chips: Sequence[Chip]) -> list[DeviceChip]:
    return [segmenter.stage(*chip) for chip in chips]


def share_that_differs(ones: Sequence[WindowResult], others: Sequence[WindowResult]) -> float:
    """Of all pixels; what is valid must be the same."""
    assert all(np.array_equal(one.valid, other.valid) for one, other in zip(ones, others, strict=True))
    differing = [
        one.building(CUT.tile_size) != other.building(CUT.tile_size) for one, other in zip(ones, others, strict=True)
    ]
    assert 0.01 < np.mean([one.building(CUT.tile_size) for one in ones]) < 0.9
    return float(np.mean(differing))


def test_probabilities_are_those_of_the_cpu(chips: list[Chip]) -> None:
    found, expected = (Segmenter(BUILT_IN, device, precision="float32") for device in (DEVICE, "cpu"))
    for pixels, valid in chips:
        np.testing.assert_allclose(found(pixels, valid, *CUT[:3]), expected(pixels, valid, *CUT[:3]), rtol=0, atol=0.01)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_several_batches_under_way_at_once_have_the_masks_and_sums_of_the_cpu(
    chips: list[Chip], precision: str
) -> None:
    segmenter, cpu = Segmenter(BUILT_IN, DEVICE, precision=precision), Segmenter(BUILT_IN, "cpu")
    batches = [chips, chips[::-1], chips[1:] + chips[:1]]
    pending = [segmenter.start(staged(segmenter, batch), CUT) for batch in batches]
    for batch, each in zip(batches, pending, strict=True):
        found, expected = each.result(), cpu.start(staged(cpu, batch), CUT).result()
        assert share_that_differs(found, expected) < (0.001 if precision == "float32" else 0.005)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one.figures.probability_sums, other.figures.probability_sums, rtol=0.02)


def test_a_compiled_network_answers_each_batch_as_the_network_does(chips: list[Chip]) -> None:
    plain, compiled = (
        Segmenter(BUILT_IN, DEVICE, precision="bfloat16", compiling=compiling) for compiling in ("no", "yes")
    )
    for batch in (chips[:1], chips[1:2], chips[2:]):
        found = compiled.start(staged(compiled, batch), CUT).result()
        assert share_that_differs(found, plain.start(staged(plain, batch), CUT).result()) < 0.002
    assert len(compiled.compiled.sizes) == 1


@pytest.mark.parametrize("compiling", ["no", "yes"])
def test_pieces_of_a_larger_chip_are_answered_as_chips_of_their_own(chips: list[Chip], compiling: str) -> None:
    pixels, valid = (np.concatenate([np.concatenate(part, -1)] * 2, -2) for part in zip(*chips[:2], strict=True))
    segmenter = Segmenter(BUILT_IN, DEVICE, precision="bfloat16", compiling=compiling)
    whole = segmenter.stage(pixels, valid)
    places = [np.s_[top : top + SIDE, left : left + SIDE] for top in (0, 300, SIDE) for left in (0, 400, SIDE)]
    pending = [segmenter.start([whole.cut(at)], CUT) for at in places]  # under way at once, of memory that they share
    found = [each.result()[0] for each in pending]
    alone = [(np.ascontiguousarray(pixels[:, *at]), np.ascontiguousarray(valid[at])) for at in places]
    expected = [segmenter.start(staged(segmenter, [chip]), CUT).result()[0] for chip in alone]
    assert share_that_differs(found, expected) < 0.002
    assert len(segmenter.compiled.sizes) == (compiling == "yes")


def test_a_batch_is_found() -> None:
    found = Segmenter(BUILT_IN, DEVICE).find_batch(3, 512, 512)
    assert found > 0
    assert found & (found - 1) == 0  # a power of two


def test_chips_decoded_by_its_jpeg_engine_are_what_gdal_reads(tmp_path: Path) -> None:
    segmenter, scene = Segmenter(BUILT_IN, DEVICE), write_jpeg(tmp_path / "a.tif")
    whole, _ = decode(segmenter, scene, scene.window)
    assert np.abs(whole.astype(int) - read_chip(scene, scene.window)[0]).mean() < 1.5
    windows = WINDOWS * 8
    with ThreadPoolExecutor(8) as pool:  # so that several are decoded together
        found = list(pool.map(lambda window: decode(segmenter, scene, window), windows))
    for window, (chip, _) in zip(windows, found, strict=True):
        box, rows, cols = reflect_window(window, scene.height, scene.width)
        assert np.array_equal(chip, expand_reflection(whole[:, *box.slices(scene.window)], rows, cols))


def test_chips_are_read_into_memory_that_it_fetches_itself_and_is_not_given_away_before(chips: list[Chip]) -> None:
    segmenter, found = Segmenter(BUILT_IN, DEVICE), []
    for number in range(64):
        pixels, valid = chips[number % 3]
        memory = segmenter.allocate_pixels(pixels.shape)
        assert torch.from_numpy(memory).is_pinned()
        memory[...] = pixels
        if segmenter.uploader.stream is not None:  # else it would be done before the host could be
            with torch.cuda.stream(segmenter.uploader.stream):
                torch.cuda._sleep(10**7)
        found.append(segmenter.stage(memory, valid))
        del memory  # the next one may be in its place
    torch.cuda.synchronize()
    for number, chip in enumerate(found):
        assert np.array_equal(chip.image.cpu().numpy(), chips[number % 3][0])


@pytest.mark.parametrize("tile_size", [1, 7, 20, 61, 256])
def test_figures_and_bits_of_tiles_are_those_of_the_cpu(tile_size: int) -> None:
    rng = np.random.default_rng(tile_size)
    probability, valid = rng.random((2, 300, 333), dtype=np.float32), rng.random((2, 300, 333)) > 0.3
    probability[~valid] = np.nan

    def found(device: str) -> list[NDArray[np.generic]]:
        levels, known = torch.from_numpy(probability).to(device), torch.from_numpy(valid).to(device)
        building = levels >= 0.5
        sums = [sum_tiles(each, tile_size) for each in (building, to_units(levels, known), levels.isnan())]
        return [each.cpu().numpy() for each in (pack(building, tile_size), *sums)]

    for one, other in zip(found(DEVICE), found("cpu"), strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


@pytest.mark.parametrize("compiling", ["no", "yes"])
@pytest.mark.parametrize("decoder", ["cpu", "device"])
def test_a_run_has_the_rows_of_one_on_a_cpu(tmp_path: Path, decoder: str, compiling: str) -> None:
    jpeg, plain = tmp_path / "jpeg", tmp_path / "plain"
    for folder in (jpeg, plain):
        folder.mkdir()
    scene = write_jpeg(jpeg / "a.tif")
    on_cpu = decoder == "cpu"
    pixels, _ = read_chip(scene, scene.window) if on_cpu else decode(Segmenter(BUILT_IN, DEVICE), scene, scene.window)
    write_geotiff(str(plain / "a.tif"), pixels, crs=UTM, transform=scene.transform)
    settings = Settings(tile_size=64, part=128, halo=HALO, threshold=0.5)
    found = segment(
        jpeg, ExecutionOptions(device=DEVICE, compiling=compiling, batch=2), replace(settings, decode=decoder)
    )
    expected = segment(plain, ExecutionOptions(device="cpu"), settings)
    assert [row["valid_px"] for row in found] == [row["valid_px"] for row in expected]
    off = sum(abs(one["building_px"] - other["building_px"]) for one, other in zip(found, expected, strict=True))
    building = sum(row["building_px"] for row in expected)
    assert building > 0
    assert off < 0.05 * building


def segment(folder: Path, execution: ExecutionOptions, settings: Settings) -> list[Row]:
    """Segment the scenes of a folder in this process; the rows, all of which are done."""
    plan, refused = make_plan(read_region([str(folder)])[0], read_bundle(BUILT_IN), settings)
    assert not refused
    out = f"{folder}-run"
    open_run(out, plan, BUILT_IN)
    gpus = int(execution.device == DEVICE)
    # So few readers that there are squares enough for them, of four windows each.
    resources = ActorResources(
        min_actors=1, max_actors=1, num_cpus=2, num_gpus=gpus, threads=2, readers=1, memory=2**32
    )
    parts = list(plan.parts())
    watched = frozenset(part.key for part in parts)
    actor = PartSegmenter(BUILT_IN, out, settings, 64, resources, execution, "s", watched)
    receipts = list(actor.segment_parts(parts))
    assert [receipt.failed for receipt in receipts] == [0] * len(parts)
    compared = sum(receipt.seam_pixels for receipt in receipts)
    assert compared > 0
    assert sum(receipt.seam_differing for receipt in receipts) < 0.01 * compared
    return [row for part in parts for row in read_part(part_path(out, part.key))]
