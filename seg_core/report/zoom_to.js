// Shows the scene that was chosen, or all of them, at the map's own ratio of width to height.
const [left, bottom, right, top] = places[cb_obj.value];
const width = x_range.end - x_range.start;
const height = y_range.end - y_range.start;
const zoom = 1.1 * Math.max((right - left) / width, (top - bottom) / height);
const x = (left + right) / 2;
const y = (bottom + top) / 2;
// Otherwise Bokeh would fit the ranges to the data again.
x_range.have_updated_interactively = true;
y_range.have_updated_interactively = true;
x_range.setv({ start: x - (width * zoom) / 2, end: x + (width * zoom) / 2 });
y_range.setv({ start: y - (height * zoom) / 2, end: y + (height * zoom) / 2 });
