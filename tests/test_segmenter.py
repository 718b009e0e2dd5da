"""With test-time augmentation a probability is the mean over the eight symmetries of a square."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeBundle, window_figures, write_untrained
from numpy.typing import NDArray

from seg_core.chips import WindowFigures
from seg_core.errors import JobError, SegError
from seg_core.grey_levels import Normalization
from seg_core.grid import Window, chip_window, reflect, split
from seg_core.model.batch_size import find_batch
from seg_core.model.bundle import read_bundle
from seg_core.model.device_chips import DeviceChip
from seg_core.model.loading import choose_device
from seg_core.model.segmenter import VIEWS, Segmenter
from seg_core.model.window_results import SUM_UNIT, WindowResult, WindowSpec, pack, sum_tiles, to_units
from seg_core.run.plan import Settings
from seg_core.run.sizing import fit_window, gpu_share

pytestmark = pytest.mark.usefixtures("one_thread")

HALO = 24
Image = NDArray[Any]

# Written out, so that nothing of how the segmenter makes its views is taken over.
SYMMETRIES: dict[str, tuple[Callable[[Image], Image], Callable[[Image], Image]]] = {
    "as it is": (lambda a: a, lambda a: a),
    "left to right": (lambda a: a[..., ::-1], lambda a: a[..., ::-1]),
    "top to bottom": (lambda a: a[..., ::-1, :], lambda a: a[..., ::-1, :]),
    "half turn": (lambda a: a[..., ::-1, ::-1], lambda a: a[..., ::-1, ::-1]),
    "transposed": (lambda a: a.swapaxes(-1, -2), lambda a: a.swapaxes(-1, -2)),
    "over the other diagonal": (
        lambda a: a[..., ::-1, ::-1].swapaxes(-1, -2),
        lambda a: a[..., ::-1, ::-1].swapaxes(-1, -2),
    ),
    "quarter turn": (lambda a: a.swapaxes(-1, -2)[..., ::-1], lambda a: a[..., ::-1].swapaxes(-1, -2)),
    "quarter turn back": (lambda a: a.swapaxes(-1, -2)[..., ::-1, :], lambda a: a[..., ::-1, :].swapaxes(-1, -2)),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_untrained(str(tmp_path_factory.mktemp("bundles") / "bundle"), width=4, depth=2)


@pytest.fixture(scope="module")
def plain(bundle: str) -> Segmenter:
    return Segmenter(bundle, "cpu")


@pytest.fixture(scope="module")
def augmented(bundle: str) -> Segmenter:
    return Segmenter(bundle, "cpu", tta=True)


def random_chip(height: int = 64, width: int = 96, seed: int = 0) -> tuple[Image, Image]:
    """Pixels and where they are valid, with a missing corner."""
    pixels = np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8)
    valid = np.ones((height, width), np.bool_)
    valid[:20, :30] = False
    return pixels, valid


def random_chips(number: int) -> list[tuple[Image, Image]]:
    return [random_chip(seed=seed) for seed in range(number)]


def infer(segmenter: Segmenter, pixels: Image, valid: Image) -> Image:
    """Probability of the whole chip."""
    return segmenter(np.ascontiguousarray(pixels), np.ascontiguousarray(valid), 0, *valid.shape)


def test_there_are_eight_views_and_the_first_is_the_image_as_it_is(plain: Segmenter, augmented: Segmenter) -> None:
    assert plain.views == [(0, False)] == augmented.views[:1]
    assert len(set(augmented.views)) == len(VIEWS) == 8
    marked = np.arange(6).reshape(2, 3)
    assert len({there(marked).tobytes() + bytes(there(marked).shape) for there, _ in SYMMETRIES.values()}) == 8
    assert all(np.array_equal(back(there(marked)), marked) for there, back in SYMMETRIES.values())


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 96), (96, 32)])
def test_the_augmented_probability_is_the_mean_over_all_symmetries(
    plain: Segmenter, augmented: Segmenter, height: int, width: int
) -> None:
    pixels, valid = random_chip(height, width)
    each = [back(infer(plain, there(pixels), there(valid))) for there, back in SYMMETRIES.values()]
    found = infer(augmented, pixels, valid)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.mean(each, axis=0), rtol=0, atol=1e-6, strict=True)
    assert np.abs(found - each[0]).max() > 1e-3


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_a_turned_or_flipped_image_gets_the_same_answer_turned_or_flipped(
    augmented: Segmenter, plain: Segmenter, symmetry: str
) -> None:
    there, back = SYMMETRIES[symmetry]
    pixels, valid = random_chip()
    expected = infer(augmented, pixels, valid)
    np.testing.assert_allclose(back(infer(augmented, there(pixels), there(valid))), expected, rtol=0, atol=1e-6)
    if symmetry != "as it is":
        assert np.abs(back(infer(plain, there(pixels), there(valid))) - infer(plain, pixels, valid)).max() > 1e-3


def test_the_answer_to_a_symmetric_image_is_symmetric(augmented: Segmenter, plain: Segmenter) -> None:
    quarter, _ = random_chip(32, 32, seed=1)
    half = np.maximum(quarter, quarter.swapaxes(-1, -2))
    pixels = np.concatenate([half, half[..., ::-1]], axis=-1)
    pixels = np.concatenate([pixels, pixels[..., ::-1, :]], axis=-2)
    every = np.ones(pixels.shape[1:], np.bool_)
    found = infer(augmented, pixels, every)
    for there, _ in SYMMETRIES.values():
        np.testing.assert_allclose(there(found), found, rtol=0, atol=1e-6)
    lone = infer(plain, pixels, every)
    assert np.abs(lone[:, ::-1] - lone).max() > 1e-3
    assert found.std() > 1e-3


def test_the_window_is_cut_out_of_the_mean(augmented: Segmenter) -> None:
    pixels, valid = random_chip()
    found = augmented(pixels, valid, 16, 30, 20)
    assert np.array_equal(found, infer(augmented, pixels, valid)[16:46, 16:36])


def test_tiles_augmented_each_agree_with_the_whole_augmented(augmented: Segmenter) -> None:
    rng = np.random.default_rng(2)
    scene = rng.integers(0, 256, (3, 70, 90), dtype=np.uint8)
    assert (augmented.bundle.halo, augmented.bundle.stride) == (HALO, 4)

    def segment(window: int) -> Image:
        result = np.full(scene.shape[1:], np.nan, np.float32)
        for at in split(Window(0, 0, 70, 90), window):
            chip = chip_window(at, HALO, 4)
            rows = reflect(chip.row_off, chip.row_off + chip.height, 70)
            cols = reflect(chip.col_off, chip.col_off + chip.width, 90)
            pixels = np.ascontiguousarray(scene[:, rows[:, None], cols])
            inside = np.s_[at.row_off : at.row_off + at.height, at.col_off : at.col_off + at.width]
            valid = np.ones(pixels.shape[1:], np.bool_)
            result[inside] = augmented(pixels, valid, HALO, at.height, at.width)
        return result

    np.testing.assert_allclose(segment(64), segment(128), rtol=0, atol=1e-6)


def test_a_chip_without_valid_pixels_holds_no_building_in_any_view(augmented: Segmenter) -> None:
    pixels, valid = random_chip()
    assert not augmented(pixels, np.zeros_like(valid), 16, 30, 20).any()


def test_the_probability_is_that_of_the_building_class(make_bundle: MakeBundle) -> None:
    one, other = (
        Segmenter(make_bundle(f"bundle {building}", building=building), "cpu", tta=True) for building in (1, 0)
    )
    pixels, valid = random_chip()
    np.testing.assert_allclose(infer(one, pixels, valid), 1 - infer(other, pixels, valid), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "message"), [("nonsense", "not a device"), ("cpu:x", "not a device")])
def test_a_device_that_is_none_is_refused(name: str, message: str) -> None:
    with pytest.raises(SegError, match=rf"^--device {name}: {message}"):
        choose_device(name)


def test_bfloat16_is_near_float32_and_does_not_claim_to_be_exact(bundle: str, plain: Segmenter) -> None:
    rough = Segmenter(bundle, "cpu", precision="bfloat16")
    pixels, valid = random_chip()
    found, expected = infer(rough, pixels, valid), infer(plain, pixels, valid)
    assert found.dtype == np.float32
    assert 0 < np.abs(found - expected).max() < 0.05
    assert (plain.exact, rough.exact) == (True, False)
    assert not Segmenter(bundle, "cpu", precision="float32").exact


CUT = WindowSpec(16, 40, 61, 32, 0.5, keep_probability=True)


def staged(segmenter: Segmenter, number: int) -> list[DeviceChip]:
    """Random chips, of which the third holds nothing valid."""
    chips = [random_chip(seed=seed) for seed in range(number)]
    return [segmenter.stage(pixels, valid & (seed != 2)) for seed, (pixels, valid) in enumerate(chips)]


def assert_same(one: WindowResult, other: WindowResult) -> None:
    assert np.array_equal(one.valid, other.valid)
    assert all(np.array_equal(array, vars(other.figures)[name]) for name, array in vars(one.figures).items())


def test_a_result_is_what_rows_are_made_of(plain: Segmenter) -> None:
    for result, chip in zip(plain.start(chips := staged(plain, 4), CUT).result(), chips, strict=True):
        probability = plain(chip.image.numpy(), chip.valid, 16, 40, 61)
        expected = window_figures(probability, chip.valid[16:56, 16:77], 32, keep=True)
        assert np.array_equal(result.valid, chip.valid[16:56, 16:77])
        for name, wanted in vars(expected).items():
            found = getattr(result.figures, name)
            if wanted is None:  # all pixels are valid, or none
                assert found is None
                continue
            assert found.dtype == wanted.dtype
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4, strict=True)
        assert np.array_equal(result.building(32), (probability >= 0.5) & result.valid)


def test_chips_segmented_together_get_the_bits_that_each_gets_alone(plain: Segmenter) -> None:
    chips = staged(plain, 5)
    together = plain.start(chips, CUT).result()
    for chip, result in zip(chips, together, strict=True):
        (alone,) = plain.start([chip], CUT).result()
        assert_same(alone, result)


def test_chips_of_a_batch_may_differ_in_their_normalization(plain: Segmenter) -> None:
    """A chip that is brighter and of less contrast gives what it would have given, if that is taken into account."""
    own, dark = plain.bundle.normalization, [(pixels // 4 * 2, valid) for pixels, valid in random_chips(3)]
    bright = [(pixels // 2 + 30, valid) for pixels, valid in dark]
    other = Normalization(tuple(mean / 2 + 30 for mean in own.mean), tuple(std / 2 for std in own.std))
    expected = plain.start([plain.stage(*chip) for chip in dark], CUT).result()
    mixed = [plain.stage(*bright[0], other), plain.stage(*dark[1]), plain.stage(*bright[2], other)]
    for one, result in zip(expected, plain.start(mixed, CUT).result(), strict=True):
        np.testing.assert_allclose(result.figures.probability_sums, one.figures.probability_sums, rtol=1e-5)
    np.testing.assert_allclose(plain(*bright[0], 16, 40, 61, other), plain(*dark[0], 16, 40, 61), rtol=1e-5)
    unadapted = plain.start([plain.stage(*chip) for chip in bright], CUT).result()
    assert not np.allclose(unadapted[0].figures.probability_sums, expected[0].figures.probability_sums, rtol=1e-4)


@pytest.mark.parametrize("tile_size", [1, 7, 8, 20, 61])
@pytest.mark.parametrize("width", [1, 7, 8, 61])
def test_the_lines_of_tiles_are_packed_as_numpy_packs_them(width: int, tile_size: int) -> None:
    pixels = np.random.default_rng(0).random((2, 5, width)) > 0.5
    packed = pack(torch.from_numpy(pixels), tile_size).numpy()
    for number, col in enumerate(range(0, width, tile_size)):
        line = np.packbits(pixels[:, :, col : col + tile_size], axis=-1)
        assert np.array_equal(packed[:, :, number, : line.shape[-1]], line)
        assert not packed[:, :, number, line.shape[-1] :].any()
    none = np.zeros((1, 1), np.int64)
    result = WindowResult(WindowFigures(packed[0], none, np.zeros((1, 1)), none), pixels[0])
    assert np.array_equal(result.building(tile_size), pixels[0])


@pytest.mark.parametrize("tile_size", [1, 20, 32, 100])
def test_sums_over_tiles_count_valid_pixels_and_do_not_depend_on_their_order(tile_size: int) -> None:
    rng = np.random.default_rng(1)
    probability, valid = rng.random((1, 60, 75), dtype=np.float32), rng.random((1, 60, 75)) > 0.3
    probability[~valid] = np.nan
    units = to_units(torch.from_numpy(probability), torch.from_numpy(valid))
    sums = sum_tiles(units, tile_size)[0].numpy()
    expected = window_figures(probability[0], valid[0], tile_size).probability_sums
    np.testing.assert_allclose(sums * SUM_UNIT, expected, rtol=0, atol=1e-4, strict=True)
    corner = probability[:, :20, :20], valid[:, :20, :20]
    first, again = (
        sum_tiles(to_units(*(torch.from_numpy(np.ascontiguousarray(each[order])) for each in corner)), 20)
        for order in (np.s_[:, :, :], np.s_[:, ::-1, ::-1])
    )
    assert torch.equal(first, again)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_a_probability_at_the_threshold_is_building(
    plain: Segmenter, threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = np.float32(threshold)
    three = np.array([[[np.nextafter(at, np.float32(0)), at, np.nextafter(at, np.float32(1))]]], np.float32)
    monkeypatch.setattr(Segmenter, "_probability", lambda *_: torch.from_numpy(three))
    chip = plain.stage(np.zeros((3, 1, 3), np.uint8), np.ones((1, 3), np.bool_))
    (result,) = plain.start([chip], WindowSpec(0, 1, 3, 32, threshold)).result()
    assert result.building(32).tolist() == [[False, True, True]]
    assert result.figures.num_building.tolist() == [[2]]


def test_a_batch_grows_as_long_as_it_pays_and_fits() -> None:
    freed: list[bool] = []

    def found(seconds: dict[int, float]) -> int:
        def time_batch(number: int) -> float:
            if number not in seconds:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return seconds[number]

        return find_batch(time_batch, lambda: freed.append(True), most=8)

    assert found({1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0, 16: 1.0}) == 8  # the most
    assert found({1: 1.0, 2: 2.0, 4: 4.0, 8: 7.9}) == 4  # so few that they need not be faster
    assert found({1: 1.0, 2: 2.0, 4: 4.5, 8: 4.6}) == 2  # but not slower
    assert found({1: 1.0, 2: 2.2, 4: 2.3}) == 1
    assert found({1: 1.0, 2: 1.0}) == 2
    assert found({}) == 1
    assert len(freed) == 6  # what the probe has taken is given back


@pytest.mark.parametrize("which", [np.s_[39, 60], np.s_[:32, :32], np.s_[:]])
@pytest.mark.parametrize("where", ["valid", "missing"])
def test_an_answer_that_is_no_number_is_an_error_where_it_counts(
    plain: Segmenter, where: str, which: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    probability = torch.full((1, 40, 61), 0.25)
    probability[0][which] = torch.nan
    monkeypatch.setattr(Segmenter, "_probability", lambda *_: probability)
    valid = np.ones((40, 61), np.bool_)
    valid[which] = where == "valid"
    valid[20, 40] = True  # else nothing would be inferred
    probability[0, 20, 40] = 0.25
    pending = plain.start([plain.stage(np.zeros((3, 40, 61), np.uint8), valid)], WindowSpec(0, 40, 61, 32, 0.5))
    if where == "valid":
        with pytest.raises(RuntimeError, match="the network's output is not finite"):
            pending.result()
    else:
        assert pending.result()[0].figures.probability_sums.sum() == pytest.approx(0.25 * valid.sum())


def test_a_large_tile_without_a_number_is_an_error(plain: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    side = 512
    monkeypatch.setattr(Segmenter, "_probability", lambda *_: torch.full((1, side, side), torch.nan))
    chip = plain.stage(np.zeros((3, side, side), np.uint8), np.ones((side, side), np.bool_))
    with pytest.raises(RuntimeError, match="the network's output is not finite"):
        plain.start([chip], WindowSpec(0, side, side, side, 0.5)).result()
    with pytest.raises(JobError, match="the network's output is not finite"):
        plain(np.zeros((3, side, side), np.uint8), np.ones((side, side), np.bool_), 0, side, side)


def compiling(bundle: str, how: str) -> Segmenter:
    """A segmenter that computes in torch, and compiles or not."""
    segmenter = Segmenter(bundle, "cpu", precision="bfloat16", compiling="yes")
    segmenter.compiled.compile_after = {"yes": 0.0, "no": None}[how]
    return segmenter


def test_a_compiled_network_gives_the_results_of_the_network(bundle: str, caplog: pytest.LogCaptureFixture) -> None:
    plain, compiled = compiling(bundle, "no"), compiling(bundle, "yes")
    chips = staged(plain, 3)  # of which two hold something valid
    began = time.perf_counter()
    first = compiled.start(chips, CUT)
    assert first.seconds < (time.perf_counter() - began) / 10  # to compile is not counted
    for _ in range(2):
        for one, other in zip(plain.start(chips, CUT).result(), compiled.start(chips, CUT).result(), strict=True):
            assert (one.building(32) == other.building(32)).mean() > 0.99
            np.testing.assert_allclose(one.figures.probability_sums, other.figures.probability_sums, rtol=0.01)
    assert [size[0] for size in compiled.compiled.sizes] == [2]
    assert "uncompiled" not in caplog.text


def test_a_compiled_network_takes_each_chip_with_its_normalization(bundle: str) -> None:
    plain, compiled = compiling(bundle, "no"), compiling(bundle, "yes")
    own, chips = plain.bundle.normalization, random_chips(2)
    steep = Normalization(own.mean, tuple(std / 20 for std in own.std))
    apart = [plain.start([plain.stage(*chips[0], each)], CUT).result()[0].figures for each in (own, steep)]
    assert not np.allclose(apart[0].probability_sums, apart[1].probability_sums, rtol=0.05)
    for pair in ((own, steep), (steep, own)):
        one, other = (
            segmenter.start([segmenter.stage(*chip, each) for chip, each in zip(chips, pair, strict=True)], CUT)
            for segmenter in (plain, compiled)
        )
        for expected, found in zip(one.result(), other.result(), strict=True):
            np.testing.assert_allclose(found.figures.probability_sums, expected.figures.probability_sums, rtol=0.02)
    assert len(compiled.compiled.sizes) == 1


def test_a_network_that_can_not_be_compiled_runs_as_it_is_and_a_line_says_so(
    bundle: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Callable[..., Any]:
        def fail(*_: Any) -> None:
            raise RuntimeError("no C++ compiler\nsecond line")

        return fail

    plain, compiled = compiling(bundle, "no"), compiling(bundle, "yes")
    monkeypatch.setattr(torch, "compile", broken)
    chips = staged(plain, 2)
    for _ in range(2):
        for one, other in zip(plain.start(chips, CUT).result(), compiled.start(chips, CUT).result(), strict=True):
            assert_same(one, other)
    assert caplog.messages == ["the network runs uncompiled: torch.compile: no C++ compiler"]


def test_a_network_for_which_compiling_takes_too_much_memory_runs_as_it_is(
    bundle: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []

    def full(*_: Any) -> None:
        asked.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    plain, compiled = compiling(bundle, "no"), compiling(bundle, "yes")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: full)
    chips = staged(plain, 2)
    for _ in range(2):
        for one, other in zip(plain.start(chips, CUT).result(), compiled.start(chips, CUT).result(), strict=True):
            assert_same(one, other)
    assert asked == [1]  # of that size
    compiled.start(chips, CUT._replace(width=60)).result()
    assert asked == [1, 1]
    assert caplog.messages == []


def test_only_sizes_that_have_taken_long_are_compiled_and_never_what_is_exact(
    bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def note(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        asked.append(1)
        return function

    monkeypatch.setattr(torch, "compile", note)
    assert Segmenter(bundle, "cpu", precision="bfloat16", compiling="auto").compiled.compile_after is None
    segmenter = compiling(bundle, "yes")
    segmenter.compiled.compile_after = 1.0
    chips = staged(segmenter, 2)
    segmenter.start(chips, CUT).result()
    for size in segmenter.compiled.seconds_spent:
        segmenter.compiled.seconds_spent[size] = 1.0
    segmenter.start(chips, CUT._replace(width=60)).result()
    assert asked == []
    for _ in range(2):
        segmenter.start(chips, CUT).result()
    assert asked == [1]
    exact = Segmenter(bundle, "cpu", precision="exact", compiling="yes")
    exact.start(chips, CUT).result()
    assert (exact.exact, asked) == (True, [1])


def test_for_a_rare_size_of_chips_nothing_is_compiled(bundle: str) -> None:
    segmenter = compiling(bundle, "yes")
    segmenter.start(staged(segmenter, 2), CUT, may_compile=False).result()
    assert (segmenter.compiled.sizes, dict(segmenter.compiled.seconds_spent)) == ({}, {})


@pytest.mark.parametrize(
    ("memory", "wanted", "gpus", "expected"),
    [
        (None, None, 1.0, 256),  # on a CPU as planned, by the memory of the node
        (2**40, None, 1.0, 256),
        (2**40, None, 2.0, 256),
        (2 * (128 + 32) ** 2 * 100, None, 1.0, 128),  # window and halo, 100 bytes a pixel, in half of the GPU's memory
        (4 * (128 + 32) ** 2 * 100, None, 0.5, 128),  # of the actor's share of it
        (2 * (128 + 32) ** 2 * 100, 256, 1.0, 256),  # as asked for
    ],
)
def test_windows_fit_the_memory_of_the_gpu(
    bundle: str, memory: int | None, wanted: int | None, gpus: float, expected: int
) -> None:
    model = replace(read_bundle(bundle), activation_bytes_per_px=100)
    settings = Settings(tile_size=64, part=512, halo=16, threshold=0.5)
    assert fit_window(256, wanted, settings, model, gpu_share(memory, gpus)) == expected


@pytest.mark.parametrize("threshold", [0.5, 0.3984375])
def test_the_probability_that_is_kept_is_in_255ths_and_the_mask_is_made_of_what_is_not_rounded(
    make_bundle: MakeBundle, threshold: float
) -> None:
    segmenter = Segmenter(make_bundle(), "cpu")
    rng = np.random.default_rng(0)
    pixels, valid = rng.integers(0, 250, (3, 96, 96)).astype(np.uint8), rng.random((96, 96)) > 0.1
    probability = segmenter(pixels, valid, 16, 64, 64)
    (result,) = segmenter.start([segmenter.stage(pixels, valid)], WindowSpec(16, 64, 64, 64, threshold, True)).result()
    inside = valid[16:80, 16:80]
    assert np.array_equal(result.figures.levels, np.where(inside, np.round(probability * 255), 0))
    assert np.array_equal(result.building(64), (probability >= threshold) & inside)
    if threshold == 0.5:
        assert np.array_equal(result.building(64), result.figures.levels >= 128)
    half = np.nextafter(np.float32(0.5), np.float32([0, 0.5, 1]), dtype=np.float32)  # just below, at and just above
    assert (np.round(half * 255) >= 128).tolist() == (half >= 0.5).tolist()
