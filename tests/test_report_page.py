"""The page of a run in a real browser: it draws, answers pointers and fingers, and asks the network for nothing."""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from browser import DESKTOP, PHONE, Browser, asked, browse, complaints, needs_browser, open_page, wait
from conftest import NORTH_UP, UTM
from numpy.typing import NDArray
from runs import build_run, fill_run, plan_scenes
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.actions.pointer_input import PointerInput
from selenium.webdriver.common.actions.wheel_input import ScrollOrigin

from seg_core.imagery.geotiff import write_geotiff
from seg_core.imagery.headers import read_scene
from seg_core.report.page import make_page
from seg_core.run.plan import Settings
from seg_core.run.tables import part_path

pytestmark = needs_browser

# Where a cell of the map is in the window, in px: its left, top, width and height.
CELL_BOX = """
const view = [...Bokeh.index].find((view) => view.model.name === "map");
view.el.scrollIntoView({ block: "center" });
const data = view.model.renderers.find((each) => each.name === "cells").data_source.data;
const at = data.name.indexOf(arguments[0]);
const canvas = view.canvas_view.el.getBoundingClientRect();
const [xs, ys] = [data.xs[at], data.ys[at]].map((each) => Array.from(each));
const x = [Math.min(...xs), Math.max(...xs)].map((each) => canvas.left + view.frame.x_scale.compute(each));
const y = [Math.max(...ys), Math.min(...ys)].map((each) => canvas.top + view.frame.y_scale.compute(each));
return [x[0], y[0], x[1] - x[0], y[1] - y[0]];
"""
# All text of the page, also within the library's own elements.
TEXT = r"""
const textOf = (node) => {
  if (node.nodeType === Node.TEXT_NODE) return node.textContent.trim();
  if (node.nodeName === "SCRIPT" || node.nodeName === "STYLE") return "";
  return [...(node.shadowRoot?.childNodes ?? []), ...node.childNodes].map(textOf).join("\n");
};
return textOf(document.body);
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of an unfinished run of two scenes without CRS: tiles are done, failed, missing and without data."""
    folder = tmp_path_factory.mktemp("page")
    run, plan = build_run(folder, crs=None, failed_parts=[1], missing=np.s_[0:32, 0:32])
    Path(part_path(run, list(plan.parts())[2].key)).unlink()
    (folder / "page.html").write_text(make_page(run).html, encoding="utf-8")
    return folder / "page.html"


@pytest.fixture(scope="module", params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def browser(page: Path, request: pytest.FixtureRequest) -> Iterator[Browser]:
    with browse(request.param) as found:
        open_page(found, page.as_uri())
        yield found


def lines(browser: Browser) -> list[str]:
    """The texts of the page."""
    return str(browser.execute_script(TEXT)).splitlines()


def point(browser: Browser, name: str, *, click: bool) -> None:
    """Move to the middle of a cell, and click it or not; on a phone, tap it."""
    left, top, width, height = browser.execute_script(CELL_BOX, name)
    is_phone = browser.execute_script("return navigator.maxTouchPoints > 0")
    actions = ActionBuilder(browser, mouse=PointerInput("touch" if is_phone else "mouse", "pointer"))
    actions.pointer_action.move_to_location(round(left + width / 2), round(top + height / 2))
    if click or is_phone:
        actions.pointer_action.click()
    actions.perform()


def picture_of(browser: Browser, name: str) -> NDArray[np.int64]:
    """What is drawn within a cell, `(height, width, 3)`, BGR."""
    left, top, width, height = (round(each) for each in browser.execute_script(CELL_BOX, name))
    shot = cv2.imdecode(np.frombuffer(browser.get_screenshot_as_png(), np.uint8), cv2.IMREAD_COLOR)
    assert shot is not None
    return np.asarray(shot[top + 4 : top + height - 4, left + 4 : left + width - 4], np.int64)


def test_it_draws_without_an_error(browser: Browser) -> None:
    wait(browser, lambda: picture_of(browser, "north/a.tif, tile 0, 1").std() > 5)
    assert not complaints(browser)


def test_it_asks_the_network_for_nothing(page: Path) -> None:
    with browse(DESKTOP) as browser:
        open_page(browser, page.as_uri())
        assert asked(browser) == {page.as_uri()}


def test_it_fits_the_width_of_the_window(browser: Browser) -> None:
    wide, window = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert wide <= window
    left, _, width, _ = browser.execute_script(CELL_BOX, "south/b.tif, tile 0, 0")
    assert 0 < left < left + width < window


def test_states_of_tiles_look_different(browser: Browser) -> None:
    names = {"done": "0, 1", "failed": "0, 2", "missing": "2, 0", "without data": "0, 0"}
    found = {state: picture_of(browser, f"north/a.tif, tile {name}") for state, name in names.items()}
    red = {
        state: ((cells[..., 2] > 150) & (cells[..., 2] > cells[..., :2].max(axis=-1) + 60)).mean()
        for state, cells in found.items()
    }
    assert red["failed"] > 0.05
    assert max(red["done"], red["missing"], red["without data"]) < 0.01
    dark = {state: (cells.max(axis=-1) < 90).mean() for state, cells in found.items()}
    assert dark["missing"] > 0.05 > dark["without data"]
    assert (found["without data"].min(axis=-1) > 200).mean() > 0.6


def test_degrees_are_drawn_as_long_as_the_ground_is(tmp_path: Path) -> None:
    degree = 9e-6  # of latitude: a metre
    place = {"crs": "EPSG:4326", "transform": (2 * degree, 0.0, 10.0, 0.0, -degree, 60.0)}
    write_geotiff(str(tmp_path / "a.tif"), np.full((3, 64, 64), 100, np.uint8), **place)
    run, _ = plan_scenes(tmp_path, [read_scene(str(tmp_path / "a.tif"), "a.tif")])
    (tmp_path / "page.html").write_text(make_page(run).html, encoding="utf-8")
    with browse(DESKTOP) as browser:
        open_page(browser, (tmp_path / "page.html").as_uri())
        _, _, width, height = browser.execute_script(CELL_BOX, "a.tif, tile 1, 1")
        assert width == pytest.approx(height, rel=0.02)  # at 60 degrees, two degrees of longitude are one of latitude


def test_hovering_shows_the_figures_of_a_tile(browser: Browser) -> None:
    assert "north/a.tif, tile 1, 1" not in lines(browser)
    point(browser, "north/a.tif, tile 1, 1", click=False)
    wait(browser, lambda: {"north/a.tif, tile 1, 1", "1,024 px"} <= set(lines(browser)))


def test_a_click_shows_image_mask_and_figures(browser: Browser) -> None:
    shown = "return document.getElementById(`tile-${arguments[0]}`)"
    for name in ("north/a.tif, tile 1, 0", "south/b.tif, tile 1, 0"):
        point(browser, name, click=True)
        wait(browser, lambda name=name: browser.execute_script(f"{shown}.textContent", "name") == name)
        for picture in ("image", "mask"):
            wait(browser, lambda picture=picture: browser.execute_script(f"{shown}.naturalWidth", picture) > 0)
            assert browser.execute_script(f"{shown}.checkVisibility()", picture)
        assert browser.execute_script(f"{shown}.textContent", "coverage").endswith(" %")


def test_a_click_on_a_failed_tile_says_so_and_shows_no_picture(browser: Browser) -> None:
    point(browser, "north/a.tif, tile 0, 3", click=True)
    shown = "return document.getElementById(`tile-${arguments[0]}`)"
    wait(browser, lambda: browser.execute_script(f"{shown}.textContent", "state") == "failed")
    assert not browser.execute_script(f"{shown}.checkVisibility()", "image")
    assert browser.execute_script(f"{shown}.checkVisibility()", "no-picture")


def test_a_scene_can_be_zoomed_to_and_all_be_seen_again(browser: Browser) -> None:
    model = "const map = [...Bokeh.index].find((view) => view.model.name === 'map').model;"
    extent = f"{model} return [map.x_range.start, map.x_range.end, map.y_range.start, map.y_range.end]"
    before = browser.execute_script(extent)
    choose = "[...Bokeh.documents[0].roots()].find((each) => each.options).value = arguments[0]"
    browser.execute_script(choose, "south/b.tif")
    wait(browser, lambda: browser.execute_script(extent) != before)
    left, right, bottom, top = browser.execute_script(extent)
    assert left < 126
    assert right > 156
    assert bottom < -40
    assert top > 0
    assert right - left < (before[1] - before[0]) / 2
    browser.execute_script(choose, "")
    wait(browser, lambda: browser.execute_script(extent)[0] < 0)
    left, right, bottom, top = browser.execute_script(extent)
    assert right > 156
    assert bottom < -100
    assert top > 0
    assert (right - left) / (top - bottom) == pytest.approx((before[1] - before[0]) / (before[3] - before[2]))


# Whether outlines are visible, and how strong colours over imagery are.
OUTLINED = """
const models = [...Bokeh.documents[0].roots()];
const outlines = models.find((each) => each.name === "map").renderers.find((each) => each.name === "outlines");
return [outlines.visible, models.find((each) => each.title?.startsWith?.("Colours")).value];
"""


def turn_wheel(browser: Browser, name: str, up: bool) -> None:
    """Turn the wheel by a notch over a cell that is in view."""
    left, top, width, height = browser.execute_script(CELL_BOX, name)
    origin = ScrollOrigin.from_viewport(round(left + width / 2), round(top + height / 2))
    ActionChains(browser).scroll_from_origin(origin, 0, -240 if up else 240).perform()


def pink(browser: Browser) -> int:
    """How many pixels of the window have the colour of outlines."""
    shot = cv2.imdecode(np.frombuffer(browser.get_screenshot_as_png(), np.uint8), cv2.IMREAD_COLOR)
    assert shot is not None
    blue, green, red = np.moveaxis(shot.astype(int), -1, 0)
    return int(((red > 200) & (green < 130) & (blue > 160)).sum())


def test_outlines_are_drawn_when_the_map_is_zoomed_in(tmp_path: Path) -> None:
    write_geotiff(str(tmp_path / "a.tif"), np.full((3, 2400, 2400), 100, np.uint8), crs=UTM, transform=NORTH_UP)
    settings = Settings(tile_size=800, part=2400, halo=16, threshold=0.5)
    run, plan = plan_scenes(tmp_path, [read_scene(str(tmp_path / "a.tif"), "a.tif")], settings)
    rows, cols = np.mgrid[:800, :800]
    fill_run(run, plan, lambda _: (rows % 40 < 20) & (cols % 40 < 20))
    (tmp_path / "page.html").write_text(make_page(run).html, encoding="utf-8")
    with browse(DESKTOP) as browser:
        open_page(browser, (tmp_path / "page.html").as_uri())
        middle = "a.tif, tile 1, 1"
        before = picture_of(browser, middle)
        assert browser.execute_script(OUTLINED) == [False, 0.65]
        assert pink(browser) == 0
        wait(browser, lambda: turn_wheel(browser, middle, up=True) or browser.execute_script(OUTLINED)[0])
        assert browser.execute_script(OUTLINED) == [True, 0.15]
        wait(browser, lambda: pink(browser) > 1000)
        wait(browser, lambda: np.abs(np.median(picture_of(browser, middle), axis=(0, 1)) - 100).max() < 40)
        assert np.abs(np.median(before, axis=(0, 1)) - 100).max() > 40  # the imagery is under strong colours
        wait(browser, lambda: turn_wheel(browser, middle, up=False) or not browser.execute_script(OUTLINED)[0])
        assert browser.execute_script(OUTLINED) == [False, 0.65]
        wait(browser, lambda: pink(browser) == 0)
        assert not complaints(browser)
