#!/usr/bin/env bash
# duckdb 2.0.1, geopandas 1.2.0: GeoParquet 2.0 in longitude and latitude loses its CRS, and with it the guard against
# mixing coordinate systems.
#
# Expected: DuckDB refuses to put degrees and metres into one column, whatever version of GeoParquet the files are.
# Seen: for version 1.1 it does. For version 2.0 it does not. There longitude and latitude is the default CRS of
# Parquet's type GEOMETRY, so the type names none, and DuckDB takes the column for one without a CRS, although the
# metadata `geo` names EPSG:4326. Degrees then mix with metres of UTM, both with UNION ALL and in a list of files. If
# the file in UTM comes first, the degrees are even labelled as metres of UTM.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q duckdb==2.0.1 geopandas==1.2.0 pyarrow==26.0.1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import duckdb
import geopandas
import shapely

degrees = geopandas.GeoDataFrame(geometry=[shapely.box(2, 0, 4, 1)], crs=4326)
for version in ("1.1.0", "2.0.0"):
    degrees.to_parquet(f"degrees-{version}.parquet", schema_version=version)
    degrees.to_crs(32631).to_parquet(f"metres-{version}.parquet", schema_version=version)

SOURCES = {
    "union": "SELECT geometry FROM '{}' UNION ALL SELECT geometry FROM '{}'",
    "list": "SELECT geometry FROM read_parquet(['{}', '{}'])",
}
seen = {}
for version in ("1.1.0", "2.0.0"):
    for first, second in (("degrees", "metres"), ("metres", "degrees")):
        for kind, source in SOURCES.items():
            sql = source.format(f"{first}-{version}.parquet", f"{second}-{version}.parquet")
            try:
                rows = duckdb.sql(f"SELECT st_crs(geometry) LIKE '%UTM zone 31N%', st_astext(geometry) FROM ({sql})")
                labels = [(label, text.startswith("POLYGON ((4 0,")) for label, text in rows.fetchall()]
            except duckdb.BinderException as error:
                labels = "different CRS" if "different CRS" in str(error) else str(error)
            print(version, first, "first,", kind, "->", labels)
            seen[version, first, kind] = labels

for kind in SOURCES:
    for first in ("degrees", "metres"):
        assert seen["1.1.0", first, kind] == "different CRS"
    # each row: whether it is labelled UTM, and whether its coordinates are degrees
    assert seen["2.0.0", "degrees", kind] == [(None, True), (None, False)]
    assert seen["2.0.0", "metres", kind] == [(True, False), (True, True)]
PYTHON
