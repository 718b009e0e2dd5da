"""Bundles: what is in them, that they come back as they were, and that no damage goes unnoticed."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from seg_core.errors import SegError
from seg_core.model.bundle import Bundle, Weights, read_bundle, read_weights, write_bundle

BUNDLE = Bundle(
    architecture={"name": "unet", "in_channels": 3, "classes": 1, "width": 4, "depth": 2},
    classes=("background", "building"),
    building=1,
    bands=3,
    dtype="uint8",
    mean=(120.25, 121.0, 1 / 3),
    std=(60.0, 61.5, 62.0),
    gsd_m=1.0,
    stride=4,
    context_px=12,
    halo=12,
    activation_bytes_per_px=100,
    threshold=0.5,
    metrics={"val_iou": 0.6, "f1": None},
    provenance={"epoch": 3, "settings": {"lr": 1e-3, "name": "größer"}},
)
# These are in model.json only where they are not their defaults.
OPTIONAL = {"min_chip", "levels", "spread", "confidence", "temperature", "int8_sha256"}
# Another value for each field; the hashes of files are not ours to choose.
OTHER: dict[str, Any] = {
    "architecture": {**BUNDLE.architecture, "width": 8},
    "classes": ("building", "background"),
    "building": 0,
    "bands": 4,
    "dtype": "uint16",
    "mean": (120.25, 121.0, 0.3334),
    "std": (60.0, 61.5, 62.1),
    "gsd_m": None,
    "stride": 8,
    "context_px": None,
    "halo": 16,
    "activation_bytes_per_px": 101,
    "min_chip": 204,
    "levels": ((0.25, 0.75), (1.0, 0.0), (0.5, 0.5)),
    "spread": 0.25,
    "confidence": (0.75, 0.25),
    "temperature": 1.5,
    "threshold": 0.25,
    "metrics": {"val_iou": 0.6},
    "provenance": {"epoch": 4},
}


def draw_weights(seed: int = 0) -> Weights:
    rng = np.random.default_rng(seed)
    return {
        "conv.weight": rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "norm.num_batches_tracked": np.array(7, np.int64),
        "head.bias": rng.normal(size=1).astype(np.float16),
    }


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A bundle, just written."""
    write_bundle(str(tmp_path / "bundle"), BUNDLE, draw_weights())
    return str(tmp_path / "bundle")


def header_of(path: str) -> dict[str, Any]:
    return dict(json.loads(Path(path, "model.json").read_text()))


def change_header(path: str, **changes: Any) -> None:
    """Alter fields of model.json; those changed to `...` are taken out."""
    header = {k: v for k, v in (header_of(path) | changes).items() if v is not ...}
    Path(path, "model.json").write_text(json.dumps(header, indent=2))


def refusal(path: str) -> str:
    with pytest.raises(SegError) as refused:
        read_weights(path, read_bundle(path))
    line = str(refused.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    return line.removeprefix(f"{path}: ")


def test_a_bundle_comes_back_as_it_was_written(tmp_path: Path) -> None:
    weights = draw_weights()
    written = write_bundle(str(tmp_path / "bundle"), BUNDLE, weights)
    found = read_bundle(str(tmp_path / "bundle"))
    assert found == written == replace(BUNDLE, weights_sha256=written.weights_sha256)
    assert found.hash == written.hash
    back = read_weights(str(tmp_path / "bundle"), found)
    assert set(back) == set(weights)
    for name, array in weights.items():
        assert back[name].dtype == array.dtype
        assert back[name].shape == array.shape
        assert np.array_equal(back[name], array)


def test_weights_that_do_not_lie_in_order_come_back_the_same(tmp_path: Path) -> None:
    turned = np.arange(12, dtype=np.float32).reshape(3, 4).T
    bundle = write_bundle(str(tmp_path / "bundle"), BUNDLE, {"a": turned})
    assert np.array_equal(read_weights(str(tmp_path / "bundle"), bundle)["a"], turned)


def test_a_bundle_is_two_files(path: str) -> None:
    assert sorted(os.listdir(path)) == ["model.json", "weights.safetensors"]
    assert os.listdir(Path(path).parent) == ["bundle"]


def test_model_json_has_these_fields_and_no_others(path: str) -> None:
    header = header_of(path)
    assert list(header) == [
        "format",
        "version",
        "hash",
        "architecture",
        "classes",
        "building",
        "bands",
        "dtype",
        "mean",
        "std",
        "gsd_m",
        "stride",
        "context_px",
        "halo",
        "activation_bytes_per_px",
        "threshold",
        "weights_sha256",
        "metrics",
        "provenance",
    ]
    assert (header["format"], header["version"]) == ("aerial-seg bundle", 1)
    assert header["hash"] == read_bundle(path).hash
    described = {k: v for k, v in header.items() if k not in {"format", "version", "hash", "weights_sha256"}}
    left_out = {"weights_sha256", *OPTIONAL}
    assert described == json.loads(json.dumps({k: v for k, v in asdict(BUNDLE).items() if k not in left_out}))


def test_the_weights_are_plain_safetensors_with_the_stated_hash(path: str) -> None:
    file = Path(path, "weights.safetensors")
    assert header_of(path)["weights_sha256"] == sha256(file.read_bytes()).hexdigest()
    found = load_file(file)
    assert all(np.array_equal(found[name], array) for name, array in draw_weights().items())


def test_the_hash_is_32_hexadecimal_digits_and_the_same_each_time(tmp_path: Path) -> None:
    first = write_bundle(str(tmp_path / "a"), BUNDLE, draw_weights())
    second = write_bundle(str(tmp_path / "b"), BUNDLE, dict(reversed(draw_weights().items())))
    assert first.hash == second.hash == read_bundle(str(tmp_path / "b")).hash
    assert len(first.hash) == 32
    assert set(first.hash) <= set("0123456789abcdef")


def test_the_hash_changes_with_the_weights(tmp_path: Path) -> None:
    first = write_bundle(str(tmp_path / "a"), BUNDLE, draw_weights())
    changed = draw_weights()
    changed["conv.weight"].flat[0] += 1e-6
    renamed = {f"{name}s": array for name, array in draw_weights().items()}
    others = [write_bundle(str(tmp_path / f"b{i}"), BUNDLE, w).hash for i, w in enumerate((changed, renamed))]
    assert len({first.hash, *others}) == 3


@pytest.mark.parametrize("name", OTHER)
def test_the_hash_changes_with_any_field(name: str) -> None:
    assert replace(BUNDLE, **{name: OTHER[name]}).hash != BUNDLE.hash


def test_each_field_but_the_hashes_of_files_was_tried() -> None:
    hashes = {"weights_sha256", "int8_sha256"}
    assert set(OTHER) == {f.name for f in fields(Bundle)} - hashes
    assert all(replace(BUNDLE, **{name: "0" * 64}).hash != BUNDLE.hash for name in hashes)


def test_a_bundle_is_not_written_over_another_thing(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    before = read_bundle(path)
    for there in (path, str(tmp_path / "file"), str(tmp_path)):
        with pytest.raises(SegError, match=f"^{there}: already exists: choose another name"):
            write_bundle(there, BUNDLE, draw_weights(1))
    assert read_bundle(path) == before
    assert (tmp_path / "file").read_text() == "mine"


def test_a_bundle_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(SegError, match="can't be written to"):
        write_bundle("/proc/nowhere/bundle", BUNDLE, draw_weights())


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:  # the weights are there, the header is not
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_bundle(str(tmp_path / "bundle"), BUNDLE, draw_weights())
    assert os.listdir(tmp_path) == []


def test_a_path_where_nothing_is_is_refused(tmp_path: Path) -> None:
    assert refusal(str(tmp_path / "nowhere")) == "no such bundle"


def test_a_folder_and_a_file_that_are_no_bundle_are_refused(tmp_path: Path) -> None:
    assert refusal(str(tmp_path)) == "not a bundle: it holds no model.json"
    (tmp_path / "model.pt").write_bytes(b"")
    assert refusal(str(tmp_path / "model.pt")) == "not a bundle: it holds no model.json"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"not json"])
def test_a_model_json_that_is_none_is_refused(path: str, content: bytes) -> None:
    Path(path, "model.json").write_bytes(content)
    assert refusal(path).startswith("damaged: model.json is no JSON")


@pytest.mark.parametrize(
    "content", ["[]", "null", "{}", '{"format": "aerial-seg run", "version": 1}', '{"model_type": "bert"}']
)
def test_a_foreign_model_json_is_refused(path: str, content: str) -> None:
    Path(path, "model.json").write_text(content)
    assert refusal(path) == "not a bundle: model.json does not say format 'aerial-seg bundle'"


@pytest.mark.parametrize("version", [2, 0, "1", None, ...])
def test_another_version_is_refused_with_both_numbers(path: str, version: Any) -> None:
    change_header(path, version=version)
    shown = None if version is ... else version
    assert refusal(path) == f"of version {shown}, this program reads 1: upgrade aerial-seg"


@pytest.mark.parametrize("name", sorted(OPTIONAL & OTHER.keys()))
def test_a_field_that_older_bundles_lack_is_written_only_where_it_is_not_its_default(
    path: str, tmp_path: Path, name: str
) -> None:
    assert name not in header_of(path)
    assert getattr(read_bundle(path), name) == getattr(BUNDLE, name)
    write_bundle(str(tmp_path / "other"), replace(BUNDLE, **{name: OTHER[name]}), draw_weights())
    assert header_of(str(tmp_path / "other"))[name] == json.loads(json.dumps(OTHER[name]))
    assert getattr(read_bundle(str(tmp_path / "other")), name) == OTHER[name]


def test_a_bundle_without_histogram_is_compared_as_if_its_imagery_were_normal() -> None:
    assert np.sum(BUNDLE.reference, axis=1) == pytest.approx(np.ones(3))
    levels = OTHER["levels"]
    assert replace(BUNDLE, levels=levels).reference == levels


@pytest.mark.parametrize("name", [f.name for f in fields(Bundle) if f.name not in OPTIONAL])
def test_a_field_that_is_missing_is_named(path: str, name: str) -> None:
    change_header(path, **{name: ...})
    assert refusal(path) == f"damaged: model.json lacks fields ({name})"


def test_a_foreign_field_is_named(path: str) -> None:
    change_header(path, activation="relu", code="import os")
    reason = "of a newer version, or damaged: upgrade aerial-seg"
    assert refusal(path) == f"model.json has unknown fields (activation, code): {reason}"


@pytest.mark.parametrize("name", OTHER)
def test_a_field_that_was_altered_is_noticed(path: str, name: str) -> None:
    change_header(path, **{name: OTHER[name]})
    assert refusal(path).startswith("damaged: model.json was changed after it was written")


@pytest.mark.parametrize("dtype", ["uint16", "float32", ""])
def test_a_model_of_other_pixels_than_it_would_be_given_is_refused(path: str, dtype: str) -> None:
    change_header(path, dtype=dtype, hash=replace(read_bundle(path), dtype=dtype).hash)
    assert refusal(path).startswith(f"its model takes pixels of {dtype}, this program gives it uint8: ")


def test_the_positive_class_is_named_by_its_index() -> None:
    assert BUNDLE.class_name == "building"
    assert replace(BUNDLE, classes=("road", "water", "background"), building=1).class_name == "water"


@pytest.mark.parametrize("name", [f.name for f in fields(Bundle) if f.name not in {"gsd_m", "context_px", "spread"}])
@pytest.mark.parametrize("value", [None, 5, "text", {}])
def test_a_field_of_another_kind_is_noticed(path: str, name: str, value: Any) -> None:
    change_header(path, **{name: value})
    assert refusal(path).startswith("damaged: model.json")


@pytest.mark.parametrize("value", ["0" * 32, None, ..., 5])
def test_another_stated_hash_is_noticed(path: str, value: Any) -> None:
    change_header(path, hash=value)
    assert refusal(path).startswith("damaged: model.json was changed after it was written")


def test_the_layout_of_model_json_is_nobodys_business(path: str) -> None:
    before = read_bundle(path)
    header = dict(reversed(header_of(path).items()))
    Path(path, "model.json").write_text(json.dumps(header))
    assert read_bundle(path) == before


def flip_a_bit(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("damage", [flip_a_bit, lambda c: c[:-1], lambda c: c + b"\0", lambda _: b""])
def test_damaged_weights_are_noticed(path: str, damage: Callable[[bytes], bytes]) -> None:
    file = Path(path, "weights.safetensors")
    file.write_bytes(damage(file.read_bytes()))
    assert refusal(path) == "damaged: weights.safetensors is not what model.json was written with"


def test_weights_of_another_bundle_are_noticed(path: str, tmp_path: Path) -> None:
    write_bundle(str(tmp_path / "other"), BUNDLE, draw_weights(1))
    Path(tmp_path / "other/weights.safetensors").replace(Path(path, "weights.safetensors"))
    assert refusal(path) == "damaged: weights.safetensors is not what model.json was written with"


def test_weights_that_are_gone_are_named(path: str) -> None:
    Path(path, "weights.safetensors").unlink()
    assert refusal(path) == "damaged: it holds no weights.safetensors"


@pytest.mark.parametrize(
    "content", [b"", b"no tensors", b"\x80\x04\x95 a pickle", (2**40).to_bytes(8, "little") + b"{}"]
)
def test_weights_with_the_right_hash_that_are_no_tensors_are_refused(path: str, content: bytes) -> None:
    Path(path, "weights.safetensors").write_bytes(content)
    forged = replace(BUNDLE, weights_sha256=sha256(content).hexdigest())
    change_header(path, hash=forged.hash, weights_sha256=forged.weights_sha256)
    assert read_bundle(path) == forged
    assert refusal(path).startswith("damaged: weights.safetensors: ")


def test_loading_a_bundle_runs_no_code(path: str) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (f"{path}/sprung",)

    import pickle

    Path(path, "weights.safetensors").write_bytes(pickle.dumps(Trap()))
    refusal(path)
    assert not Path(path, "sprung").exists()
