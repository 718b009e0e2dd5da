"""Styles for QGIS: `x.qml` beside `x.tif` or `x.gpkg`, which QGIS applies when it opens the file.

Only what a style says is written. QGIS takes everything else at its defaults.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple
from xml.etree import ElementTree as ET

from seg_core.errors import SegError
from seg_core.storage.disk import staged_file

Colour = tuple[int, int, int]  # red, green and blue, 0 to 255

VERSION = "3.22.0"  # the first version of QGIS that these styles were tried with
BUILDING: Colour = (213, 94, 0)  # vermilion, which people who are colour-blind tell from vegetation and from grey roofs
# Matplotlib's viridis, whose order of colours everybody sees, also in grey print.
VIRIDIS: tuple[Colour, ...] = (68, 1, 84), (65, 68, 135), (42, 120, 142), (34, 168, 132), (122, 209, 81), (253, 231, 37)
ALPHA_BAND = 2  # QGIS presents the internal mask of a raster with one band as a second band


class Entry(NamedTuple):
    """A value of a raster, and how it is shown and called in the legend."""

    value: float
    colour: Colour
    label: str
    is_shown: bool = True  # False: transparent


def share_stops(shares: Sequence[float]) -> list[Entry]:
    """Return stops of a ramp for shares from 0 to 1, as many as VIRIDIS has colours, with percentages as labels."""
    return [Entry(share, colour, f"{share:.0%}") for share, colour in zip(shares, VIRIDIS, strict=True)]


def style_path(path: str) -> str:
    """Return the path of the style that QGIS looks for beside a raster or vector file."""
    return os.path.splitext(path)[0] + ".qml"


def write_class_style(raster: str, classes: Sequence[Entry]) -> None:
    """Write the style of a raster whose first band holds classes: one colour and label for each value.

    Other values, and nodata, are transparent. Raises SegError if the style can't be written.
    """
    renderer = _renderer("paletted")
    palette = ET.SubElement(renderer, "colorPalette")
    for entry in classes:
        ET.SubElement(palette, "paletteEntry", _attributes(entry))
    _write_raster_style(raster, renderer)


def write_ramp_style(raster: str, stops: Sequence[Entry], is_masked: bool = False) -> None:
    """Write the style of a raster whose first band holds numbers: colours are interpolated between the stops.

    The stops are in ascending order. Nodata is transparent. `is_masked` says that an internal mask marks it, instead of
    a value. Raises SegError if the style can't be written.
    """
    least, most = f"{stops[0].value:g}", f"{stops[-1].value:g}"
    renderer = _renderer("singlebandpseudocolor", is_masked)
    renderer.attrib |= {"classificationMin": least, "classificationMax": most}
    shader = ET.SubElement(
        ET.SubElement(renderer, "rastershader"),
        "colorrampshader",
        {
            "colorRampType": "INTERPOLATED",
            "classificationMode": "1",  # as the stops say
            "minimumValue": least,
            "maximumValue": most,
            "clip": "0",
        },
    )
    for entry in stops:
        ET.SubElement(shader, "item", _attributes(entry))
    ET.SubElement(shader, "rampLegendSettings", useContinuousLegend="0")  # the legend shows the labels of the stops
    _write_raster_style(raster, renderer)


def _renderer(kind: str, is_masked: bool = False) -> ET.Element:
    alpha_band = str(ALPHA_BAND) if is_masked else "-1"
    return ET.Element("rasterrenderer", type=kind, band="1", opacity="1", alphaBand=alpha_band, nodataColor="")


def _attributes(entry: Entry) -> dict[str, str]:
    colour, alpha = "#{:02x}{:02x}{:02x}".format(*entry.colour), "255" if entry.is_shown else "0"
    return {"value": f"{entry.value:g}", "color": colour, "alpha": alpha, "label": entry.label}


def _write_raster_style(raster: str, renderer: ET.Element) -> None:
    root = ET.Element("qgis", version=VERSION)
    ET.SubElement(root, "pipe").append(renderer)
    _write(root, style_path(raster))


def write_vector_style(vectors: str, colour: Colour = BUILDING, opacity: float = 0.4, outline_mm: float = 0.3) -> None:
    """Write the style of a vector file of polygons: one fill of an opacity from 0 to 1, with an opaque outline.

    The outline's width is in millimetres on the screen or in print. Raises SegError if the style can't be written.
    """
    root = ET.Element("qgis", version=VERSION)
    renderer = ET.SubElement(root, "renderer-v2", type="singleSymbol")
    symbol = ET.SubElement(ET.SubElement(renderer, "symbols"), "symbol", type="fill", name="0", alpha="1")
    layer = ET.SubElement(symbol, "layer", {"class": "SimpleFill", "enabled": "1"})
    options = ET.SubElement(layer, "Option", type="Map")
    red_green_blue = ",".join(map(str, colour))
    for name, value in {
        "color": f"{red_green_blue},{round(255 * opacity)}",
        "outline_color": f"{red_green_blue},255",
        "outline_width": f"{outline_mm:g}",
        "outline_width_unit": "MM",
        "outline_style": "solid",
        "style": "solid",
    }.items():
        ET.SubElement(options, "Option", name=name, value=value, type="QString")
    _write(root, style_path(vectors))


def _write(root: ET.Element, path: str) -> None:
    """Write a style; an earlier one is replaced."""
    ET.indent(root)
    try:
        with staged_file(path) as draft:
            ET.ElementTree(root).write(draft, encoding="utf-8")
    except OSError as error:
        raise SegError(f"{path}: can't be written: {error.strerror}") from error
