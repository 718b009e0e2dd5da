"""The tables of a page as text: scenes, failures, and how the run was made."""

import posixpath
from typing import Any

from seg_core.errors import SegError
from seg_core.model.bundle import Bundle, find_bundle, read_bundle
from seg_core.report.texts import area_text, count_text, duration_text, moment_text, share_text, tile_text
from seg_core.report.tiles import Tally, figures_of
from seg_core.run.parquet import read_file, read_table
from seg_core.run.plan import Plan
from seg_core.run.record import RunRecord
from seg_core.run.schema import SCENES
from seg_core.run.tables import scenes_path

MAX_SCENES, MAX_REASONS = 200, 50  # rows of a table
OWN_PLACE = {"threshold", "normalize", "normalize_mean", "normalize_std"}  # settings that have a line of their own

Facts = dict[str, str]


def list_scenes(tally: Tally) -> list[dict[str, Any]]:
    """Return a row for each image, those with failed or missing tiles first, then those with the most building."""
    rows = []
    for number, (image, sums) in enumerate(zip(tally.plan.images, tally.by_image, strict=True)):
        figures = figures_of(sums, int(tally.planned[number]))
        rows.append({"scene": image.scene_id, "number": number, **figures})
    rows.sort(key=lambda row: (-row["failed"], -row["missing"], -(row["building_px"] or 0), row["number"]))
    return rows


def scene_texts(row: dict[str, Any]) -> dict[str, str]:
    """Return a row of `list_scenes` as text."""
    return {
        "scene": row["scene"],
        "coverage": share_text(row["coverage"]),
        "building": area_text(row["building_km2"], row["building_px"]),
        "valid": area_text(row["area_km2"], row["valid_px"]),
        "tiles": count_text(row["planned"]),
        "failed": count_text(row["failed"]),
        "missing": count_text(row["missing"]),
    }


def list_failures(tally: Tally) -> list[dict[str, str]]:
    """Return a row for each reason why tiles failed, the most frequent first."""
    return [
        {
            "tiles": count_text(number),
            "reason": f"{reason.error_class}: {reason.error}" if reason.error_class else reason.error,
            "first": tally.first_failed[reason],
        }
        for reason, number in tally.reasons.most_common(MAX_REASONS)
    ]


def list_worst_seams(record: RunRecord, plan: Plan) -> list[dict[str, str]]:
    """Return a row for each of the borders at which neighbouring windows disagree most, the worst first."""
    worst, side = record.seams.worst if record.seams else {}, record.settings.tile_size
    places = {
        part.key: tile_text(part.scene.scene_id, part.window.row_off // side, part.window.col_off // side)
        for part in (plan.parts() if worst else ())
        if part.key in worst
    }
    return [{"share": share_text(share), "place": places[key]} for key, share in worst.items() if key in places]


def describe_run(run: str, record: RunRecord, tally: Tally) -> Facts:
    """Return how the run was made: label and text of each fact."""
    settings = record.settings
    normalization = settings.normalization
    others = {k: v for k, v in settings.named().items() if k not in OWN_PLACE}
    facts = {
        "Threshold": f"{settings.threshold:g}",
        "Normalized by": settings.normalize + (f", mean {_levels(normalization.mean)}" if normalization else ""),
        "Settings": ", ".join(f"{name} {_setting_text(value)}" for name, value in others.items()),
        "Begun": moment_text(record.created),
        "Finished": moment_text(record.finished) if record.finished else "not yet",
        "Duration": duration_text(record.seconds),
        **_speed(record, tally),
        "Results": "exact" if record.exact else "the same within rounding" if record.exact is not None else "",
        "Borders of windows": _seams(record),
        "Decoded and computed by": ", ".join(f"{name} {value}" for name, value in (record.software or {}).items()),
        "Version": f"aerial-seg {record.code_version}",
        **_versions(run),
        "Plan": record.plan.fingerprint,
    }
    return {label: text for label, text in facts.items() if text}


def describe_model(record: RunRecord) -> Facts:
    """Return what is known of the model: by its own folder, if that is still there and holds the same model."""
    facts = {"Name": posixpath.basename(record.model.uri.rstrip("/")), "Hash": record.model.hash}
    facts["Finds"] = record.class_name or ""
    try:
        bundle = read_bundle(find_bundle(record.model.uri))
    except SegError:
        bundle = None
    if bundle is not None and bundle.hash == record.model.hash:
        facts |= _bundle_facts(bundle)
    if record.fit is not None:
        text = "no valid pixel was sampled" if record.fit.distance is None else f"{record.fit.distance:.2f}"
        facts["Distance of the imagery"] = f"{text} (unlike from {record.fit.limit:.2f} on)"
    return {label: text for label, text in facts.items() if text}


def _bundle_facts(bundle: Bundle) -> Facts:
    provenance, iou = bundle.provenance, bundle.metrics.get("val_iou")
    shape = ", ".join(f"{name} {value}" for name, value in bundle.architecture.items() if name != "name")
    return {
        "Architecture": f"{bundle.architecture.get('name', '')} ({shape})",
        "Trained at": "" if bundle.gsd_m is None else f"{bundle.gsd_m:g} m per pixel",
        "Trained on": _trained_on(provenance),
        "Trained from": provenance.get("from", ""),
        "IoU on validation": "" if iou is None else f"{iou:.3f}",
    }


def _trained_on(provenance: dict[str, Any]) -> str:
    images = provenance.get("images") or {}
    numbers = ", ".join(f"{number} images of {split}" for split, number in images.items())
    data = provenance.get("data_fingerprint")
    return numbers + (f" (data {data[:16]})" if data else "")


def _speed(record: RunRecord, tally: Tally) -> Facts:
    """Return the throughput of a finished run, and what limited its latest job."""
    facts = {}
    if record.finished and record.seconds and not tally.figures()["missing"]:
        facts["Throughput"] = f"{record.plan.pixels / record.seconds / 1e6:.2f} Mpx/s, with the time to start"
    if record.bottleneck and record.bottleneck.get("advice"):
        facts["Limited by"] = str(record.bottleneck["advice"])
    return facts


def _seams(record: RunRecord) -> str:
    if record.seams is None or not record.seams.pixels:
        return ""
    return f"neighbouring windows disagree on {record.seams.differing:,} of {record.seams.pixels:,} pixels"


def _versions(run: str) -> Facts:
    """Return the versions of what read the pixels, as the scenes table names them."""
    names = ["gdal_version", "decoder_version"]
    rows = read_file(scenes_path(run), lambda file: read_table(file, SCENES, names)).to_pylist()
    found = {row[name] for row in rows for name in names if row[name]}
    return {"Pixels read by": ", ".join(f"GDAL {each}" if each[0].isdigit() else each for each in sorted(found))}


def _setting_text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_setting_text(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return ",".join(map(_setting_text, value))
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _levels(values: tuple[float, ...]) -> str:
    return "/".join(f"{value:.0f}" for value in values)
