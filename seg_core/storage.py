"""Where files are, on disk or in S3: paths, listings, and publishing a file so that it is there whole or not at all.

A path is a local one or `s3://BUCKET/KEY`. With S3 three clients speak: boto3 lists and writes, pyarrow reads tables,
GDAL reads windows of imagery. boto3 finds out where it is (AWS_ENDPOINT_URL, AWS_REGION, a profile), the others are
told. Each finds credentials by itself (keys and session token in the environment, AWS_PROFILE, the machine's role):
they are never handed around, and so can't get into a file, a log or the arguments of a task.
"""

import hashlib
import io
import os
import re
import sys
import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache
from operator import methodcaller
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from seg_core.errors import ReadError, SegError, UnansweredError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

T = TypeVar("T")

PARTIAL = ".partial-"  # files of this prefix are not there yet
S3 = "s3://"
ANONYMOUS = "AWS_NO_SIGN_REQUEST"  # GDAL's name for it; set to YES, requests are not signed
# What a cluster's nodes are told of S3: where it is, never who asks. That they must know themselves.
SHARED = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", ANONYMOUS)
THROTTLED = (429, 500, 502, 503, 504)  # answers of HTTP that are worth another try
ATTEMPTS = 16  # of a request that is throttled or not answered, at growing random intervals: for two minutes
TOLD = 4  # attempts, after a few seconds, of which a line says so
TIMEOUT = 10  # s to connect; and without a byte before a request is given up


class Stat(NamedTuple):
    """What tells one state of a file from another."""

    size: int  # bytes
    version: str  # S3: the etag; disk: size and time of the last change in ns


def is_remote(path: str | Path) -> bool:
    """Whether a path is the URI of an object store."""
    return str(path).startswith(S3)


def absolute(path: str, base: str | None = None) -> str:
    """An absolute form of a path, taken from the folder or prefix `base` (default: the current folder).

    Raises SegError for what can't be read or written.
    """
    if is_remote(path) and path.strip("/") != "s3:":
        return path.rstrip("/")
    if "://" in path:
        raise SegError(f"{path}: only local paths and s3:// URIs can be read and written")
    if base is not None and is_remote(base) and not os.path.isabs(path):
        return f"{base}/{path}"
    return os.path.normpath(os.path.join(base or os.getcwd(), os.path.expanduser(path)))


def folder_of(path: str) -> str:
    """The folder or prefix that a path is in."""
    return path.rpartition("/")[0] if is_remote(path) else os.path.dirname(path)


def gdal_path(path: str) -> str:
    """A path as GDAL names it."""
    return f"/vsis3/{path.removeprefix(S3)}" if is_remote(path) else path


def gdal_settings(path: str = "") -> dict[str, str | float]:
    """Settings for `rasterio.Env` to read imagery at a path, the same in every process."""
    # MB; by default GDAL's block cache takes 5 % of the machine in each process.
    settings: dict[str, str | float] = {"GDAL_CACHEMAX": 64}
    if is_remote(path):
        endpoint, region, anonymous = _service(_split(path)[0])
        settings |= {
            "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",  # no listing in search of files beside the image
            "GDAL_INGESTED_BYTES_AT_OPEN": 32768,  # the header of a COG in one request
            "CPL_VSIL_CURL_CHUNK_SIZE": 16384,  # what a read is rounded up to: little more than a block
            "CPL_VSIL_CURL_CACHE_SIZE": 16 * 2**20,  # bytes, in each process
            # Of what one read needs, so much is fetched in few requests; what is beyond it block by block.
            "GDAL_MAX_RAW_BLOCK_CACHE_SIZE": 64 * 2**20,
            "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": "YES",  # neighbouring blocks in one request
            "GDAL_HTTP_MULTIPLEX": "YES",  # many requests over one connection where the server speaks HTTP/2
            "GDAL_HTTP_MAX_RETRY": 6,  # half a minute in all
            "GDAL_HTTP_RETRY_DELAY": 0.5,  # s, doubled each time
            "GDAL_HTTP_RETRY_CODES": ",".join(map(str, THROTTLED)),
            "GDAL_HTTP_CONNECTTIMEOUT": TIMEOUT,
            "GDAL_HTTP_LOW_SPEED_TIME": TIMEOUT,  # s below the next line's bytes a second
            "GDAL_HTTP_LOW_SPEED_LIMIT": 1,
            "AWS_REGION": region,
            ANONYMOUS: "YES" if anonymous else "NO",
        }
        if endpoint:
            host = urlsplit(endpoint)
            settings |= {
                "AWS_S3_ENDPOINT": host.netloc,
                "AWS_HTTPS": "YES" if host.scheme == "https" else "NO",
                "AWS_VIRTUAL_HOSTING": "FALSE",  # of such a server, buckets are paths and not host names
            }
    return settings


def filesystem(path: str) -> "tuple[FileSystem, str]":
    """A pyarrow file system and the path in it."""
    from pyarrow.fs import LocalFileSystem

    if not is_remote(path):
        return LocalFileSystem(), path
    return _s3_filesystem(_split(path)[0]), path.removeprefix(S3)


@cache
def _s3_filesystem(bucket: str) -> "FileSystem":
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    endpoint, region, anonymous = _service(bucket)
    options: dict[str, Any] = {"region": region, "anonymous": anonymous}
    if endpoint:
        host = urlsplit(endpoint)
        options |= {"endpoint_override": host.netloc, "scheme": host.scheme}
    # Delayed: a file of a few MB is one put, not an upload in parts.
    return S3FileSystem(
        allow_delayed_open=True,
        connect_timeout=TIMEOUT,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        **options,
    )


def _service(bucket: str) -> tuple[str | None, str, bool]:
    """Endpoint (None: Amazon's own), region of a bucket, and whether requests are not signed."""
    client = _client()
    endpoint = str(client.meta.endpoint_url)
    own = not str(urlsplit(endpoint).hostname).endswith((".amazonaws.com", ".amazonaws.com.cn"))
    return (endpoint, str(client.meta.region_name), _anonymous()) if own else (None, _region(bucket), _anonymous())


@cache
def _region(bucket: str) -> str:
    """Where a bucket of Amazon's is, which it says even to those who may not look into it; else as configured.

    botocore goes there by itself, others don't (https://docs.aws.amazon.com/AmazonS3/latest/API/API_HeadBucket.html).
    """
    from botocore.exceptions import BotoCoreError, ClientError

    client, answer = _client(), {}
    try:
        answer = client.head_bucket(Bucket=bucket)
    except ClientError as error:
        answer = error.response
    except BotoCoreError:
        pass  # as configured
    headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return str(headers.get("x-amz-bucket-region", client.meta.region_name))


def _anonymous() -> bool:
    return os.environ.get(ANONYMOUS, "").upper() in {"YES", "TRUE", "1"}


@cache
def _client() -> Any:
    """The S3 client of this process; threads may share it. It finds credentials by itself and hands them to nobody."""
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    options: dict[str, Any] = {"signature_version": UNSIGNED} if _anonymous() else {}
    config = Config(
        retries={"mode": "standard", "max_attempts": ATTEMPTS}, connect_timeout=TIMEOUT, read_timeout=60, **options
    )
    session = boto3.Session()
    client = session.client("s3", region_name=session.region_name or "us-east-1", config=config)
    client.meta.events.register("before-send.s3", _dont_expect)
    client.meta.events.register("needs-retry.s3", _say_so)
    return client


def _dont_expect(request: Any, **_: Any) -> None:
    """Send a body without asking first: botocore waits for ever where the connection breaks within the answer.

    https://github.com/boto/botocore/issues/3613 and 3755 tell of more that goes wrong there.
    """
    request.headers.pop("Expect", None)


def _say_so(response: Any, endpoint: Any, attempts: int, **_: Any) -> None:
    """Tell whoever waits, after some attempts of a request that is not answered or throttled."""
    if attempts == TOLD and (response is None or response[0].status_code in THROTTLED):
        _say_once(
            f"S3 at {endpoint.host} {'asks to slow down' if response else 'does not answer'}: trying for two minutes"
        )


@cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _ask(path: str, request: Callable[[Any], T], none: Collection[str] = ("404", "NoSuchKey")) -> T | None:
    """The answer of S3, or None for an error of a code in `none`. Raises SegError, in one line, for all others."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
    from s3transfer.exceptions import RetriesExceededError

    try:
        return request(_client())
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", "")) or "unknown"
        if code in none:
            return None
        raise SegError(f"{path}: {_REASONS.get(code, f'S3 answers {code}')}") from error
    except NoCredentialsError as error:
        raise SegError(f"{path}: {_NOBODY}") from error
    except RetriesExceededError as error:
        raise SegError(f"{path}: S3 breaks off again and again: {error.last_exception}") from error
    except (BotoCoreError, ValueError) as error:  # an endpoint that is no URL is a ValueError to botocore
        raise SegError(f"{path}: {' '.join(str(error).split()) or 'S3 does not answer'}") from error


_DENIED = "access denied: these credentials are unknown or don't allow it (public buckets: --no-sign-request)"
_NOBODY = "no credentials: see AWS_ACCESS_KEY_ID or AWS_PROFILE (public buckets: --no-sign-request)"
_UNKNOWN = "these credentials are not known to S3: see AWS_ACCESS_KEY_ID or AWS_PROFILE"
_EXPIRED = "the credentials have expired: log in again"
_REASONS = {
    "400": f"S3 refuses the request without a reason: mostly {_EXPIRED}, or see AWS_REGION",  # to a look at an object
    "403": _DENIED,
    "AccessDenied": _DENIED,
    "InvalidAccessKeyId": _UNKNOWN,
    "SignatureDoesNotMatch": _UNKNOWN,
    "ExpiredToken": _EXPIRED,
    "NoSuchBucket": "no such bucket",
}


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix(S3).partition("/")
    return bucket, key


def stat(path: str) -> Stat | None:
    """Size and version of a file; None where there is no such file. Raises SegError where it may not be looked at."""
    if is_remote(path):
        bucket, key = _split(path)
        head = _ask(path, methodcaller("head_object", Bucket=bucket, Key=key)) if key else None
        return Stat(head["ContentLength"], head["ETag"].strip('"')) if head else None
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise SegError(f"{path}: {error.strerror}") from error
    if not S_ISREG(found.st_mode):  # a folder; or a pipe, which one would wait at for ever
        return None
    return Stat(found.st_size, f"{found.st_size}-{found.st_mtime_ns}")


def exists(path: str) -> bool:
    """Whether there is a file or a folder, or anything below a prefix."""
    if not is_remote(path):
        return os.path.exists(path)
    return next(walk(path), None) is not None or stat(path) is not None


def read_bytes(path: str) -> bytes | None:
    """The content of a file, or None where there is none. Raises SegError where it can't be read."""
    if is_remote(path):
        bucket, key = _split(path)
        return _ask(path, lambda client: _download(client, bucket, key))
    try:
        return Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise SegError(f"{path}: can't be read: {error.strerror}") from error


def _download(client: Any, bucket: str, key: str) -> bytes:
    from boto3.s3.transfer import TransferConfig

    content = io.BytesIO()
    # Not get_object: it gives up where the connection breaks after the answer has begun.
    config = TransferConfig(use_threads=False, num_download_attempts=ATTEMPTS)
    client.download_fileobj(bucket, key, content, Config=config)
    return content.getvalue()


def read_ranges(path: str, ranges: Sequence[tuple[int, int]], near: int) -> list[bytes]:
    """Pieces of a file, each by its offset and size; those with less than `near` bytes between are fetched at once.

    Raises ReadError where they can't be read, UnansweredError where an object store does not give them.
    """
    system, inside = filesystem(path)
    found: dict[tuple[int, int], bytes] = {}
    try:
        with system.open_input_file(inside) as file:
            if any(offset + size > file.size() for offset, size in ranges):
                raise ReadError(f"{path}: ends before its data does")
            for group in _neighbours(ranges, near):
                first, last = group[0][0], max(offset + size for offset, size in group)
                content = memoryview(file.read_at(last - first, first))
                found |= {(offset, size): bytes(content[offset - first :][:size]) for offset, size in group}
    except (FileNotFoundError, PermissionError) as error:
        raise ReadError(f"{path}: can't be read: {error}") from error
    except OSError as error:
        kind = UnansweredError if is_remote(path) else ReadError
        raise kind(f"{path}: can't be read: {error}") from error
    return [found[at] for at in ranges]


def _neighbours(ranges: Sequence[tuple[int, int]], near: int) -> Iterator[list[tuple[int, int]]]:
    """Ranges by their offset, in groups whose members are near each other."""
    group: list[tuple[int, int]] = []
    for offset, size in sorted(ranges):
        if group and offset - max(start + length for start, length in group) > near:
            yield group
            group = []
        group.append((offset, size))
    if group:
        yield group


def publish(path: str | Path, content: bytes) -> None:
    """Write a file atomically: by one put to an object store, on disk under a temporary name, flushed, then renamed.

    A process killed at any moment leaves the old file, the new file, or none; never a part of one.
    """
    if is_remote(path):
        bucket, key = _split(str(path))
        _ask(str(path), methodcaller("put_object", Bucket=bucket, Key=key, Body=content))
        return
    path = Path(path)
    partial = path.with_name(f"{PARTIAL}{uuid.uuid4().hex}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def create(path: str, content: bytes) -> bool:
    """Write a small file where there is none yet, atomically. Returns whether it was this call that did."""
    if is_remote(path):
        bucket, key = _split(path)
        put = methodcaller("put_object", Bucket=bucket, Key=key, Body=content, IfNoneMatch="*")
        return _ask(path, put, {"PreconditionFailed", "412", "ConditionalRequestConflict"}) is not None
    partial = Path(path).with_name(f"{PARTIAL}{uuid.uuid4().hex}")
    partial.write_bytes(content)
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links, such as exFAT: for a moment it is there, and empty
        try:
            with open(path, "xb") as file:
                file.write(content)
        except FileExistsError:
            return False
    finally:
        partial.unlink()
    return True


def remove(path: str) -> None:
    """Delete a file, if it is there."""
    if is_remote(path):
        bucket, key = _split(path)
        _ask(path, methodcaller("delete_object", Bucket=bucket, Key=key))
        return
    Path(path).unlink(missing_ok=True)


def upload(folder: str, target: str) -> None:
    """Copy the files of a local folder to a local or remote one."""
    from pyarrow.fs import LocalFileSystem, copy_files

    system, inside = filesystem(target)
    copy_files(folder, inside, source_filesystem=LocalFileSystem(), destination_filesystem=system)


def walk(folder: str) -> Iterator[str]:
    """All files below a folder or prefix, as they are found; in S3 a page of 1,000 names at a time."""
    if not is_remote(folder):
        yield from _walk_disk(folder)
        return
    bucket, key = _split(folder)
    asked = {"Bucket": bucket, "Prefix": f"{key}/" if key else ""}
    while True:
        page: dict[str, Any] = _ask(folder, methodcaller("list_objects_v2", **asked)) or {}
        # A key that ends so is a folder, as web consoles make them.
        yield from (f"{S3}{bucket}/{o['Key']}" for o in page.get("Contents", ()) if not o["Key"].endswith("/"))
        if not page.get("IsTruncated"):
            return
        asked["ContinuationToken"] = page["NextContinuationToken"]


def _walk_disk(folder: str) -> Iterator[str]:
    """All files below a folder. Links to folders are followed last, and no folder is looked into twice."""
    waiting, seen = deque([folder]), set()
    while waiting:
        for parent, folders, names in os.walk(waiting.popleft(), onerror=_refuse_closed):
            if (real := os.path.realpath(parent)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            waiting.extend(path for name in folders if os.path.islink(path := os.path.join(parent, name)))
            yield from (os.path.join(parent, name) for name in names)


def _refuse_closed(error: OSError) -> None:
    """Raise SegError for a folder that can't be looked into: what is in it would be missing, and nobody would know."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise SegError(f"{error.filename}: this folder can't be looked into: {error.strerror}") from error


def expand(pattern: str) -> list[str]:
    """The files that a glob names: `*` and `?` within a name, `**` across folders."""
    if not is_remote(pattern):
        import glob

        return sorted(glob.glob(pattern, recursive=True))
    fixed = re.split(r"[*?\[]", pattern)[0].rpartition("/")[0]
    if fixed == "s3:/":
        raise SegError(f"{pattern}: name the bucket")
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    wanted = "".join(parts.get(token, re.escape(token)) for token in re.split(r"(\*\*/|\*\*|\*|\?)", pattern))
    return [path for path in walk(fixed) if re.fullmatch(wanted, path)]


def published(folder: str, suffix: str) -> list[str]:
    """Paths of the published files of a folder with that suffix, by name."""
    if is_remote(folder):
        depth = folder.count("/") + 1
        found = [path for path in walk(folder) if path.endswith(suffix) and path.count("/") == depth]
        return sorted(found)
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.name.endswith(suffix) and not e.name.startswith(PARTIAL)]
    return [os.path.join(folder, name) for name in sorted(names)]


def make_folder(folder: str | Path) -> None:
    """Create a folder that can be written to. Raises SegError where that can't be done."""
    if is_remote(folder):
        _try_prefix(str(folder))
        return
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f"{PARTIAL}{uuid.uuid4().hex}"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise SegError(f"{folder}: can't be written to ({error.strerror}): choose another folder") from error


def check_writable(folder: str | Path) -> None:
    """Raise SegError where a folder could not be made; leaves no trace of the attempt."""
    if is_remote(folder):
        make_folder(folder)
        return
    folder = Path(folder)
    absent = [each for each in (folder, *folder.parents) if not each.exists()]
    make_folder(folder)
    for each in absent:
        each.rmdir()


def _try_prefix(uri: str) -> None:
    """Put an object and delete it again. Raises SegError where either fails."""
    bucket, key = _split(uri)
    if key and {"", ".", ".."} & set(key.split("/")):  # Arrow does not take such a name
        raise SegError(f"{uri}: a folder in it has no name, or that of a way: leave it out")
    # Some servers make a bucket of any name at the first put.
    below = {"Bucket": bucket, "Prefix": f"{key}/" if key else "", "MaxKeys": 1}
    if _ask(uri, methodcaller("list_objects_v2", **below)) is None:
        raise SegError(f"{uri}: no such bucket")
    probe = f"{uri}/{PARTIAL}{uuid.uuid4().hex}"
    publish(probe, b"")
    remove(probe)


def sha256(content: bytes) -> str:
    """Hexadecimal SHA-256 of some bytes."""
    return hashlib.sha256(content).hexdigest()
