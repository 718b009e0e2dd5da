// Shows the tile that was clicked beside the map: its pictures and its figures.
const at = source.selected.indices[0];
if (at !== undefined) {
  for (const name of ["name", "state", "coverage", "valid", "building", "crop"]) {
    document.getElementById(`tile-${name}`).textContent = source.data[name][at];
  }
  for (const name of ["image", "mask"]) {
    const picture = document.getElementById(`tile-${name}`);
    picture.src = source.data[name][at] || "data:,";
    picture.parentElement.hidden = !source.data[name][at];
  }
  document.getElementById("tile-no-picture").hidden = Boolean(source.data.mask[at]);
  document.getElementById("tile").scrollIntoView({ block: "nearest" });
}
