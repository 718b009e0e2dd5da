#!/usr/bin/env bash
# Ray 2.60.0: Dataset.map and Dataset.filter change the types of columns that their function doesn't touch.
#
# Expected: map(lambda row: row) and filter(lambda row: True) give the dataset that they were given. Seen: each row passes
# through Python's numbers, and the types are guessed anew. uint8 and int32 become int64, float16 and float32 become
# float64, so that float32 0.1 is 0.10000000149011612 from then on, and pixels take eight times the space. flat_map does
# the same; filter(expr="...") does not. map_batches in its default format (numpy) keeps these types, but makes float64
# of int64 where one value is missing: an id of 2**53 + 1, in a column that the function never reads, is changed. In the
# formats pandas and pyarrow it keeps both, types and ids.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "ray[data]==2.60.0" pyarrow==26.0.1 pandas==3.1.1 numpy==2.4.6
cd "$folder"
RAY_USAGE_STATS_ENABLED=0 "$folder/venv/bin/python" -W ignore - 2>"$folder/log" <<'PYTHON' || { cat "$folder/log" >&2; exit 1; }
import pyarrow
import ray

ID = 2**53 + 1
TYPES = {"class": "uint8", "count": "int32", "score": "float", "half": "halffloat", "id": "int64"}
table = pyarrow.table(
    {
        "class": pyarrow.array([1, 2], pyarrow.uint8()),
        "count": pyarrow.array([1, 2], pyarrow.int32()),
        "score": pyarrow.array([0.1, 0.2], pyarrow.float32()),
        "half": pyarrow.array([0.5, 0.25], pyarrow.float16()),
        "id": pyarrow.array([ID, None], pyarrow.int64()),
    }
)
assert {field.name: str(field.type) for field in table.schema} == TYPES
ray.init("local", include_dashboard=False, num_cpus=1, logging_level="ERROR")
ray.data.DataContext.get_current().enable_progress_bars = False
data = ray.data.from_arrow(table)
ways = {
    "map": data.map(lambda row: row),
    "flat_map": data.flat_map(lambda row: [row]),
    "filter": data.filter(lambda row: True),
    "filter, expression": data.filter(expr="count > 0"),
    "map_batches": data.map_batches(lambda batch: batch),
    "map_batches, pandas": data.map_batches(lambda batch: batch, batch_format="pandas"),
    "map_batches, pyarrow": data.map_batches(lambda batch: batch, batch_format="pyarrow"),
}
seen = {}
for name, way in ways.items():
    (part,) = ray.get(way.materialize().to_arrow_refs())
    types = {field.name: str(field.type) for field in part.schema}
    seen[name] = types, int(part["id"][0].as_py()), part["score"][0].as_py()
    print(f"{name}: {', '.join(types.values())}; id {'kept' if seen[name][1] == ID else seen[name][1]}", flush=True)
ray.shutdown()
wide = {"class": "int64", "count": "int64", "score": "double", "half": "double", "id": "int64"}
for name in ("map", "flat_map", "filter"):
    assert seen[name][:2] == (wide, ID) and seen[name][2] == 0.10000000149011612
for name in ("filter, expression", "map_batches, pandas", "map_batches, pyarrow"):
    assert seen[name][:2] == (TYPES, ID)
assert seen["map_batches"][:2] == (TYPES | {"id": "double"}, 2**53)
PYTHON
