"""Files are there whole or not at all, on local disk and on a real S3 server."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import boto3
import pytest
from botocore.stub import Stubber
from conftest import forget_clients
from pyarrow.fs import FileSystem
from s3transfer.exceptions import RetriesExceededError
from weed import KEY, SECRET

from seg_core.errors import JobError, SegError
from seg_core.run.lease import acquire_lease
from seg_core.storage import files, retries
from seg_core.storage import s3 as store
from seg_core.storage.files import (
    absolute,
    check_writable,
    exists,
    expand,
    filesystem,
    is_remote,
    make_folder,
    publish,
    published,
    read_bytes,
    remove,
    stat,
    upload,
    walk,
)
from seg_core.storage.store import GdalSettings, Stat


def keys(uri: str) -> list[str]:
    """All objects below a prefix, relative to it."""
    from pyarrow.fs import FileSelector, FileType

    system, inside = filesystem(uri)
    found = system.get_file_info(FileSelector(inside, recursive=True, allow_not_found=True))
    return sorted(info.path.removeprefix(f"{inside}/") for info in found if info.type == FileType.File)


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder or prefix of one's own."""
    if request.param == "local":
        return str(tmp_path)
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


def test_what_is_published_can_be_read(place: str) -> None:
    assert read_bytes(f"{place}/a") is None
    for content in (b"", b"one", b"another"):
        publish(f"{place}/a", content)
        assert read_bytes(f"{place}/a") == content
    assert keys(place) == ["a"]


def test_a_folder_is_copied_with_what_is_below(place: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "below").mkdir(parents=True)
    (source / "a").write_bytes(b"a")
    (source / "below" / "b").write_bytes(b"b" * 100_000)
    upload(str(source), f"{place}/copy")
    assert keys(f"{place}/copy") == ["a", "below/b"]
    assert read_bytes(f"{place}/copy/below/b") == b"b" * 100_000


def test_trying_whether_a_place_can_be_written_leaves_nothing_there(place: str) -> None:
    check_writable(f"{place}/new/folder")
    make_folder(f"{place}/made")
    assert keys(place) == []


def test_a_bucket_that_is_not_there_is_refused(s3: str) -> None:
    with pytest.raises(SegError, match=r"^s3://nowhere-at-all/prefix: no such bucket$"):
        check_writable("s3://nowhere-at-all/prefix")
    with pytest.raises(SegError, match=r"^s3://nowhere-at-all: no such bucket$"):
        list(walk("s3://nowhere-at-all"))
    assert s3 == "s3://tests"


def walk_all(folder: str) -> None:
    list(walk(folder))


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": "guessed"}, "these credentials are not known to S3"),
        ({"AWS_ACCESS_KEY_ID": "guessed", "AWS_SECRET_ACCESS_KEY": SECRET}, "these credentials are not known to S3"),
        ({"AWS_NO_SIGN_REQUEST": "YES"}, "access denied"),
    ],
)
def test_who_may_not_is_refused(
    s3: str, other_environment: pytest.MonkeyPatch, variables: dict[str, str], reason: str
) -> None:
    for name, value in variables.items():
        other_environment.setenv(name, value)
    # To read begins with a look at the object, to which S3 answers no more than a number.
    attempts = {check_writable: reason, walk_all: reason, read_bytes: "access denied"}
    for attempt, why in attempts.items():
        with pytest.raises(SegError, match=f"^{s3}/prefix: {why}") as refusal:
            attempt(f"{s3}/prefix")
        assert "guessed" not in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_a_bucket_open_to_all_is_read_without_credentials(s3: str, other_environment: pytest.MonkeyPatch) -> None:
    import boto3

    publish(f"{s3}/open/a", b"a")
    everyone = {"Effect": "Allow", "Principal": "*", "Action": ["s3:GetObject", "s3:ListBucket"]}
    policy = {"Version": "2012-10-17", "Statement": [{**everyone, "Resource": ["arn:aws:s3:::tests/open/*"]}]}
    boto3.client("s3").put_bucket_policy(Bucket="tests", Policy=json.dumps(policy))
    try:
        other_environment.delenv("AWS_SHARED_CREDENTIALS_FILE")
        forget_clients()
        with pytest.raises(SegError, match=f"^{s3}/open/a: no credentials: .*--no-sign-request"):
            read_bytes(f"{s3}/open/a")
        other_environment.setenv("AWS_NO_SIGN_REQUEST", "YES")
        forget_clients()
        assert read_bytes(f"{s3}/open/a") == b"a"
        system, inside = filesystem(f"{s3}/open/a")
        assert system.open_input_file(inside).read() == b"a"
        closed = "access denied without credentials: the bucket is not public: leave out --no-sign-request"
        with pytest.raises(SegError, match=f"^{s3}/closed/a: {closed}$"):
            read_bytes(f"{s3}/closed/a")
    finally:
        other_environment.undo()
        boto3.client("s3").delete_bucket_policy(Bucket="tests")


def test_paths_are_local_or_in_s3() -> None:
    assert absolute("s3://bucket/prefix/") == "s3://bucket/prefix"
    assert absolute("a/b.tif", "s3://bucket/prefix") == "s3://bucket/prefix/a/b.tif"
    assert absolute("./a/./b.tif", "s3://bucket/prefix") == "s3://bucket/prefix/a/b.tif"
    assert absolute("../a/c/../b.tif", "s3://bucket/pre//fix") == "s3://bucket/pre//a/b.tif"
    assert absolute("../../b.tif", "s3://bucket/prefix") == absolute("b.tif", "s3://bucket") == "s3://bucket/b.tif"
    assert absolute("/a/b.tif", "s3://bucket/prefix") == "/a/b.tif"
    assert is_remote("s3://bucket/prefix")
    assert not is_remote("/s3/bucket")
    for path in ("https://host/file", "s3://", "gs://bucket/a"):
        with pytest.raises(SegError, match="only local paths and s3"):
            absolute(path)


NAMES = ["a b.tif", "50%.tif", "x#1.tif", "über.tif", "two\nlines.tif", "q?.tif", "deep/er/c.tif", "d.txt"]


def test_names_of_all_kinds_are_listed_read_and_removed(place: str) -> None:
    for name in NAMES:
        if not is_remote(place):
            make_folder(Path(place, name).parent)
        publish(f"{place}/{name}", name.encode())
    assert sorted(walk(place)) == sorted(f"{place}/{name}" for name in NAMES)
    for name in NAMES:
        assert read_bytes(f"{place}/{name}") == name.encode()
        found = stat(f"{place}/{name}")
        assert found is not None
        assert found.size == len(name.encode())
    remove(f"{place}/d.txt")
    remove(f"{place}/d.txt")
    assert stat(f"{place}/d.txt") is None
    assert not exists(f"{place}/d.txt")
    assert exists(f"{place}/deep")
    assert stat(f"{place}/deep") is None


@pytest.mark.parametrize(
    ("pattern", "number"),
    [
        ("*.tif", 6),
        ("**/*.tif", 7),
        ("deep/**", 1),
        ("?????.tif", 0),
        ("deep/*", 0),
        ("*", 7),
        ("[aq]*.tif", 2),
        ("[!a-q]*.tif", 4),
        ("[z-a]*.tif", 0),
        ("q[?].tif", 1),
        ("deep/er[!a]c.tif", 0),
        ("deep/[d-f]r/[]c].tif", 1),
        ("[aq.tif", 0),
    ],
)
def test_a_glob_finds_the_same_in_s3_as_on_disk(place: str, pattern: str, number: int) -> None:
    for name in NAMES:
        if not is_remote(place):
            make_folder(Path(place, name).parent)
        publish(f"{place}/{name}", b"")
    found = [path for path in expand(f"{place}/{pattern}") if is_remote(place) or Path(path).is_file()]
    assert len(found) == number


def test_a_file_that_changes_has_another_version(place: str) -> None:
    make_folder(place)
    publish(f"{place}/a", b"one")
    before = stat(f"{place}/a")
    publish(f"{place}/a", b"two")
    assert stat(f"{place}/a") != before
    publish(f"{place}/b", b"one")


def test_a_long_listing_comes_in_pages(s3: str) -> None:
    import boto3

    client = boto3.client("s3")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: client.put_object(Bucket="tests", Key=f"many/{i:04d}", Body=b""), range(1205)))
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        ask = store._ask
        patch.setattr(store, "_ask", lambda path, request: seen.append(path) or ask(path, request))
        found = walk(f"{s3}/many")
        next(found)
        assert len(seen) == 1  # the rest has not been asked for
        assert len(list(found)) == 1204
    assert len(seen) == 2


def test_a_folder_without_a_name_is_refused_in_s3(s3: str) -> None:
    with pytest.raises(SegError, match=r"a//b: a folder in this path is empty"):
        make_folder(f"{s3}/a//b")


def test_a_bucket_says_where_it_is_even_to_those_it_keeps_out(monkeypatch: pytest.MonkeyPatch) -> None:
    client = boto3.client("s3", region_name="us-east-1", endpoint_url="https://s3.us-east-1.amazonaws.com")
    here, there = ({"HTTPHeaders": {"x-amz-bucket-region": region}} for region in ("eu-west-1", "ap-south-2"))
    with Stubber(client) as stubber:
        stubber.add_response("head_bucket", {"ResponseMetadata": here}, {"Bucket": "open"})
        stubber.add_client_error("head_bucket", "403", http_status_code=403, response_meta=there)
        stubber.add_client_error("head_bucket", "404", http_status_code=404)
        monkeypatch.setattr(store, "_client", lambda: client)
        ask = store._region.__wrapped__
        assert [ask(bucket) for bucket in ("open", "closed", "absent")] == ["eu-west-1", "ap-south-2", "us-east-1"]


def test_a_store_that_breaks_off_for_good_is_named() -> None:
    def request(_: object) -> None:
        raise RetriesExceededError(OSError("the line is dead"))

    with pytest.raises(SegError, match=r"^s3://b/k: S3 breaks off again and again: the line is dead$"):
        store._ask("s3://b/k", request)


class Memory:
    """A store of objects in memory: all that a further store must be."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, str]] = {}  # content and version
        self.versions = map(str, count())

    def stat(self, path: str) -> Stat | None:
        return Stat(len(self.objects[path][0]), self.objects[path][1]) if path in self.objects else None

    def stat_beside(self, path: str) -> tuple[Stat | None, list[str] | None]:
        return self.stat(path), None

    def exists(self, path: str) -> bool:
        return path in self.objects or any(self.walk(path))

    def read(self, path: str) -> bytes | None:
        return self.objects[path][0] if path in self.objects else None

    def publish(self, path: str, content: bytes) -> None:
        self.objects[path] = content, next(self.versions)

    def create(self, path: str, content: bytes) -> bool:
        return path not in self.objects and self.publish(path, content) is None

    def replace(self, path: str, content: bytes, version: str) -> bool:
        found = self.objects.get(path)
        return found is not None and found[1] == version and self.publish(path, content) is None

    def remove(self, path: str) -> None:
        self.objects.pop(path, None)

    def walk(self, folder: str) -> Iterator[str]:
        return (path for path in list(self.objects) if path.startswith(f"{folder}/"))

    def list_files(self, folder: str) -> Iterator[tuple[str, Stat]]:
        found = ((path.removeprefix(f"{folder}/"), path) for path in self.walk(folder))
        return (
            (name, Stat(len(self.objects[path][0]), self.objects[path][1])) for name, path in found if "/" not in name
        )

    def make_folder(self, folder: str) -> None:
        pass

    def arrow(self, path: str) -> tuple[FileSystem, str]:
        raise NotImplementedError

    def gdal_path(self, path: str) -> str:
        return f"/vsimem/{path.removeprefix('memory://')}"

    def gdal_settings(self, path: str) -> GdalSettings:
        return {"PLACE": path}


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    found = Memory()
    monkeypatch.setitem(files.REMOTE, "memory", found)
    return found


def test_a_further_store_is_one_class_or_module_and_its_scheme(memory: Memory) -> None:
    assert absolute("memory://a/b/") == "memory://a/b"
    assert absolute("c.tif", "memory://a/b") == "memory://a/b/c.tif"
    publish("memory://a/b/c.tif", b"c")
    publish("memory://a/b/deep/d.tif", b"d")
    assert list(memory.objects) == ["memory://a/b/c.tif", "memory://a/b/deep/d.tif"]
    assert read_bytes("memory://a/b/c.tif") == b"c"
    assert stat("memory://a/b/c.tif") == Stat(1, "0")
    assert exists("memory://a/b")
    assert expand("memory://a/**.tif") == list(memory.objects)
    assert published("memory://a/b", ".tif") == ["memory://a/b/c.tif"]
    assert list(files.list_files("memory://a/b")) == [("c.tif", Stat(1, "0"))]
    assert files.gdal_path("memory://a/b/c.tif") == "/vsimem/a/b/c.tif"
    assert files.gdal_settings("memory://a")["PLACE"] == "memory://a"
    remove("memory://a/b/c.tif")
    assert not exists("memory://a/b/c.tif")
    with pytest.raises(SegError, match=r"gs://a/b: only local paths and s3:// and memory:// URIs"):
        absolute("gs://a/b")


def test_a_lease_fences_a_further_store(memory: Memory) -> None:
    with acquire_lease("memory://runs/a") as lease:
        lease.publish("memory://runs/a/b", b"one")
        lease.publish("memory://runs/a/b", b"two")
        held = memory.objects.pop(lease.path)
        with pytest.raises(JobError, match="another driver has taken this run over"):
            lease.publish("memory://runs/a/b", b"three")
        memory.objects[lease.path] = held
    assert memory.objects == {"memory://runs/a/b": (b"two", memory.objects["memory://runs/a/b"][1])}


def test_a_write_that_depends_on_a_state_changes_no_other(place: str) -> None:
    if not is_remote(place):
        with pytest.raises(AssertionError, match="on disk there is no such write"):
            files.replace(f"{place}/a", b"new", "1")
        return
    publish(f"{place}/state", b"one")
    found = stat(f"{place}/state")
    assert found is not None
    assert files.replace(f"{place}/state", b"two", found.version)
    assert not files.replace(f"{place}/state", b"three", found.version)
    assert read_bytes(f"{place}/state") == b"two"


def test_a_listing_says_of_each_file_what_a_look_at_it_says(place: str) -> None:
    assert list(files.list_files(f"{place}/listed")) == []
    for name in ("b.t", "a.t", "deep/c.t", ".partial-d.t"):
        files.make_folder(files.folder_of(f"{place}/listed/{name}"))
        publish(f"{place}/listed/{name}", name.encode())
    names = ("a.t", "b.t", ".partial-d.t")
    assert dict(files.list_files(f"{place}/listed")) == {name: stat(f"{place}/listed/{name}") for name in names}
    assert published(f"{place}/listed", ".t") == [f"{place}/listed/a.t", f"{place}/listed/b.t"]


def test_gdal_is_told_the_retry_policy(s3: str) -> None:
    settings = files.gdal_settings(f"{s3}/a.tif")
    assert settings["GDAL_HTTP_MAX_RETRY"] == retries.GDAL_ATTEMPTS
    assert settings["GDAL_HTTP_RETRY_CODES"] == "429,500,502,503,504"
    assert not any("RETRY" in name for name in files.gdal_settings("/a.tif"))
