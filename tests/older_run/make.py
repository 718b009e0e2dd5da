"""Make the run in this folder, with the code of commit d9ab197: the last one in which seg_core was one flat package.

    git worktree add ../older d9ab197
    PYTHONPATH=../older:../older/tests python tests/older_run/make.py

The bundle, the region and the run appear beside this script, where none of them may be yet. The run names its scene at
/data/region and its model at /data/bundle: tests copy the folder, and relocate the run to the copy.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from conftest import NORTH_UP, UTM, write_untrained
from jobs.session import Speed

from jobs.segment import segment
from seg_core.bundle import read_bundle
from seg_core.plan import Settings, make_plan
from seg_core.raster import write_geotiff
from seg_core.region import read_region

HERE = Path(__file__).parent
PLACES = (("/data/region", str(HERE / "region")),)


def write_scene(path: Path) -> None:
    """Write 96 x 64 px of coloured blocks, which compress well, with a corner of nodata."""
    blocks = np.random.default_rng(0).integers(1, 250, (3, 12, 8)).astype(np.uint8)
    pixels = blocks.repeat(8, axis=1).repeat(8, axis=2)
    pixels[:, :24, :40] = 0
    path.parent.mkdir()
    write_geotiff(str(path), pixels, crs=UTM, transform=NORTH_UP, nodata=0)


def main() -> None:
    bundle, run = read_bundle(write_untrained(str(HERE / "bundle"), width=2, depth=1)), HERE / "run"
    write_scene(HERE / "region/a.tif")
    (scene,), _ = read_region([str(HERE / "region/a.tif")])
    settings = Settings(tile_size=32, part=64, halo=bundle.halo, threshold=bundle.threshold)
    plan, _ = make_plan([replace(scene, uri="/data/region/a.tif")], bundle, settings)
    segment(replace(plan, places=PLACES), str(HERE / "bundle"), str(run), Speed(device="cpu", actors=(1, 1)))
    record = json.loads((run / "run.json").read_text())
    record["model"]["uri"] = "/data/bundle"
    (run / "run.json").write_text(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
