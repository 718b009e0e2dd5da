// Shows outlines where a pixel of the imagery is not much smaller than one of the screen. The colours over the imagery
// are faint meanwhile, so that roofs can be seen.
const width = plot.properties.inner_width.is_unset ? 0 : plot.inner_width;
const shown = width > 0 && (x_range.end - x_range.start) / width <= coarsest;
if (shown !== outlines.visible) {
  outlines.visible = shown;
  if (opacity !== null && shown) {
    opacity.tags = [opacity.value];
    opacity.value = Math.min(opacity.value, faint);
  } else if (opacity !== null && opacity.value <= faint) {
    opacity.value = opacity.tags[0];
  }
}
