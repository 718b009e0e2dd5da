#!/usr/bin/env bash
# Ray 2.60.0: one NaN in a column makes its sum and its mean None, while its minimum and its maximum pass over it.
#
# Expected: the sum of the rest, as in pandas and as Ray's pull request 20787 says of ignore_nulls=True, the default, or
# else NaN, as in NumPy and Arrow; and the same rule for all aggregates. Seen: sum, mean and std are None, as if nothing
# could be added up. min, max and the median are those of the other rows. Count counts the row, and
# MissingValuePercentage calls it missing. Where the value is null instead of NaN, all of them leave the row out. With
# ignore_nulls=False the sum is NaN, so the stricter choice gives the better answer. Rates such as an IoU are NaN where
# a tile holds neither prediction nor label.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "ray[data]==2.60.0" pyarrow==26.0.1 pandas==3.1.1 numpy==2.4.6
cd "$folder"
RAY_USAGE_STATS_ENABLED=0 "$folder/venv/bin/python" -W ignore - 2>"$folder/log" <<'PYTHON' || { cat "$folder/log" >&2; exit 1; }
import math

import pyarrow
import ray
from ray.data.aggregate import Count, Max, Mean, Min, MissingValuePercentage, Quantile, Std, Sum

ray.init("local", include_dashboard=False, num_cpus=1, logging_level="ERROR")
ray.data.DataContext.get_current().enable_progress_bars = False
columns = {"nan": [1.0, math.nan, 3.0], "null": [1.0, None, 3.0]}
data = ray.data.from_arrow(pyarrow.table(columns))
asked = {}
for column in columns:
    for kind in (Sum, Mean, Std, Min, Max, Quantile, MissingValuePercentage):
        asked[column, kind.__name__] = kind(column, alias_name=f"{kind.__name__} {column}")
    asked[column, "Count"] = Count(column, ignore_nulls=True, alias_name=f"Count {column}")
    asked[column, "strict Sum"] = Sum(column, ignore_nulls=False, alias_name=f"strict Sum {column}")
answers = data.aggregate(*asked.values())
ray.shutdown()
seen = {column: {name: answers[f"{name} {column}"] for other, name in asked if other == column} for column in columns}
for column, found in seen.items():
    print(f"1, {column}, 3:", ", ".join(f"{name} {value}" for name, value in found.items()))
nan, null = seen["nan"], seen["null"]
assert [nan[name] for name in ("Sum", "Mean", "Std")] == [None, None, None]
assert [nan[name] for name in ("Min", "Max", "Quantile", "Count")] == [1, 3, 2, 3]
assert math.isclose(nan["MissingValuePercentage"], 100 / 3) and math.isnan(nan["strict Sum"])
assert [null[name] for name in ("Sum", "Mean", "Min", "Max", "Quantile", "Count")] == [4, 2, 1, 3, 2, 2]
assert null["strict Sum"] is None
PYTHON
