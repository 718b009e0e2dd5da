"""A run as a picture: image, truth, prediction and the coverage of each tile, side by side."""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from seg_core.run.rows import Row, decode_mask, encode_png

Rgb = NDArray[np.uint8]

ORANGE, WHITE, GREEN, RED = (255, 140, 0), (255, 255, 255), (0, 200, 0), (255, 40, 40)
MISSING_GREY = 128
PANEL = 640  # px


def assemble_mask(rows: Sequence[Row], height: int, width: int) -> NDArray[np.bool_]:
    """The masks of one scene's tiles, put together."""
    mask = np.zeros((height, width), np.bool_)
    for row in rows:
        at = np.s_[row["row_off"] : row["row_off"] + row["height"], row["col_off"] : row["col_off"] + row["width"]]
        mask[at] = decode_mask(row["mask"], row["height"], row["width"])
    return mask


def paint_mask(image: Rgb, mask: NDArray[np.bool_]) -> Rgb:
    """The image with the mask in orange over it."""
    painted = image.copy()
    painted[mask] = (0.35 * image[mask] + 0.65 * np.array(ORANGE)).astype(np.uint8)
    return painted


def paint_coverage(rows: Sequence[Row], height: int, width: int) -> Rgb:
    """Each tile in the colour of its coverage, with the figure in it; grey where nothing is valid."""
    picture = np.full((height, width, 3), MISSING_GREY, np.uint8)
    highest = max((row["coverage"] or 0.0 for row in rows), default=0.0) or 1.0
    for row in rows:
        top, left, bottom, right = (
            row["row_off"],
            row["col_off"],
            row["row_off"] + row["height"],
            row["col_off"] + row["width"],
        )
        if row["coverage"] is not None:
            level = np.array([[round(255 * row["coverage"] / highest)]], np.uint8)
            picture[top:bottom, left:right] = cv2.applyColorMap(level, cv2.COLORMAP_VIRIDIS)[0, 0, ::-1]
            text = f"{100 * row['coverage']:.0f} %"
            at = (left + row["width"] // 8, top + row["height"] // 2)
            cv2.putText(picture, text, at, cv2.FONT_HERSHEY_SIMPLEX, row["width"] / 200, (255, 255, 255), 3)
        cv2.rectangle(picture, (left, top), (right - 1, bottom - 1), (255, 255, 255), 2)
    return picture


def paint_errors(image: Rgb, predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> Rgb:
    """The image in grey, with found buildings in white, false ones in green and missed ones in red."""
    painted = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None] // 2, 3, axis=2)
    for cells, colour in ((predicted & truth, WHITE), (predicted & ~truth, GREEN), (truth & ~predicted, RED)):
        painted[cells] = (0.35 * painted[cells] + 0.65 * np.array(colour)).astype(np.uint8)
    return np.asarray(painted, np.uint8)


def assemble_panels(panels: Sequence[tuple[str, Rgb]], columns: int = 2) -> bytes:
    """Pictures with their titles above them, so many in a row, as a PNG."""
    titled = [_titled(title, picture) for title, picture in panels]
    lines = [np.concatenate(titled[i : i + columns], axis=1) for i in range(0, len(titled), columns)]
    return encode_png(np.ascontiguousarray(np.concatenate(lines)[..., ::-1]))


def _titled(title: str, picture: Rgb) -> Rgb:
    small = cv2.resize(picture, (PANEL, PANEL), interpolation=cv2.INTER_AREA)
    framed = cv2.copyMakeBorder(small, 40, 10, 10, 10, cv2.BORDER_CONSTANT, value=(255, 255, 255))
    cv2.putText(framed, title, (12, 28), cv2.FONT_HERSHEY_SIMPLEX, 0.8, (0, 0, 0), 2)
    return np.asarray(framed, np.uint8)
