"""Styles for QGIS beside what is exported: colours and labels are those of the values that are there."""

from pathlib import Path
from xml.etree import ElementTree as ET

import matplotlib as mpl
import numpy as np
import pytest
import rasterio
from runs import build_run
from seg_command import seg

from seg_core.errors import SegError
from seg_core.imagery.qgis_style import (
    BUILDING,
    VIRIDIS,
    Entry,
    share_stops,
    style_path,
    write_class_style,
    write_ramp_style,
    write_vector_style,
)
from seg_core.run.compare import CLASSES, COLOURS

Capture = pytest.CaptureFixture[str]


def renderer_of(style: Path) -> ET.Element:
    """The renderer of a style; that it is well-formed is checked too."""
    root = ET.fromstring(style.read_text(encoding="utf-8"))  # noqa: S314
    assert root.tag == "qgis"
    assert root.attrib["version"].startswith("3.")
    (pipe,) = root
    (renderer,) = pipe
    assert (pipe.tag, renderer.tag, renderer.attrib["band"]) == ("pipe", "rasterrenderer", "1")
    return renderer


def palette_of(style: Path) -> dict[int, tuple[str, str, str]]:
    """Label, colour and alpha of each value of a style of classes."""
    renderer = renderer_of(style)
    assert renderer.attrib["type"] == "paletted"
    entries = [entry.attrib for entry in renderer.iter("paletteEntry")]
    return {int(each["value"]): (each["label"], each["color"], each["alpha"]) for each in entries}


def as_hex(colour: tuple[int, int, int]) -> str:
    return "#" + bytes(colour).hex()


def test_a_mask_shows_building_and_nothing_else(tmp_path: Path, capsys: Capture) -> None:
    run, _ = build_run(tmp_path)
    seg(capsys, "export", "masks", run, "--out", tmp_path / "masks")
    assert sorted(path.name for path in (tmp_path / "masks").rglob("*.*")) == ["a.qml", "a.tif", "b.qml", "b.tif"]
    with rasterio.open(tmp_path / "masks/north/a.tif") as file:
        values = set(np.unique(file.read(1))) - {int(file.nodata)}
    palette = palette_of(tmp_path / "masks/north/a.qml")
    assert set(palette) == values == {0, 1}
    assert palette[1] == ("building", as_hex(BUILDING), "255")
    assert palette[0][::2] == ("background", "0")


def test_a_raster_of_change_has_the_colours_of_its_table(tmp_path: Path, capsys: Capture) -> None:
    (before, _), (after, _) = (build_run(tmp_path / str(seed), seed=seed) for seed in range(2))
    seg(capsys, "compare", before, after, "--rasters", tmp_path / "change")
    palette = palette_of(tmp_path / "change/north/a.qml")
    with rasterio.open(tmp_path / "change/north/a.tif") as file:
        table, values = file.colormap(1), set(np.unique(file.read(1))) - {int(file.nodata)}
    assert set(palette) == values == set(COLOURS)
    assert {value: colour for value, (_, colour, _) in palette.items()} == {
        value: as_hex(table[value][:3]) for value in values
    }
    assert {label: value for value, (label, _, _) in palette.items()} == {"none": 0, **CLASSES}


def test_a_ramp_goes_from_the_least_to_the_largest_share(tmp_path: Path) -> None:
    write_ramp_style(str(tmp_path / "x.tif"), share_stops((0, 0.05, 0.1, 0.2, 0.4, 1)))
    renderer = renderer_of(tmp_path / "x.qml")
    assert (renderer.attrib["type"], renderer.attrib["alphaBand"]) == ("singlebandpseudocolor", "-1")
    (shader,) = renderer.iter("colorrampshader")
    items = [item.attrib for item in shader.iter("item")]
    assert (shader.attrib["minimumValue"], shader.attrib["maximumValue"]) == ("0", "1")
    assert [item["value"] for item in items] == ["0", "0.05", "0.1", "0.2", "0.4", "1"]
    assert [item["label"] for item in items] == ["0%", "5%", "10%", "20%", "40%", "100%"]
    assert [item["color"] for item in items] == [as_hex(colour) for colour in VIRIDIS]


def test_the_colours_of_shares_are_those_of_viridis() -> None:
    expected = mpl.colormaps["viridis"](np.linspace(0, 1, len(VIRIDIS)), bytes=True)[:, :3]
    assert np.abs(np.array(VIRIDIS) - expected.astype(int)).max() <= 1


def test_polygons_are_filled_so_that_imagery_shines_through(tmp_path: Path) -> None:
    write_vector_style(str(tmp_path / "x.gpkg"), opacity=0.4)
    root = ET.fromstring((tmp_path / "x.qml").read_text(encoding="utf-8"))  # noqa: S314
    (renderer,) = root
    assert (renderer.tag, renderer.attrib["type"]) == ("renderer-v2", "singleSymbol")
    (layer,) = renderer.iter("layer")
    options = {each.attrib["name"]: each.attrib["value"] for each in layer[0]}
    assert layer.attrib["class"] == "SimpleFill"
    assert (options["color"], options["outline_color"]) == ("213,94,0,102", "213,94,0,255")


@pytest.mark.parametrize(
    ("file", "style"), [("a.tif", "a.qml"), ("a.png.tif", "a.png.qml"), ("b.c/a.TIF", "b.c/a.qml")]
)
def test_a_style_is_where_qgis_looks_for_it(file: str, style: str) -> None:
    assert style_path(file) == style


def test_labels_may_hold_what_xml_reserves(tmp_path: Path) -> None:
    write_class_style(str(tmp_path / "x.tif"), [Entry(1, BUILDING, 'over <1> & "2"')])
    assert palette_of(tmp_path / "x.qml")[1][0] == 'over <1> & "2"'


def test_a_style_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(SegError, match=r"nowhere/x\.qml: can't be written: No such file or directory"):
        write_vector_style(str(tmp_path / "nowhere/x.gpkg"))
