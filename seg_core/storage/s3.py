"""S3, and what speaks its language: boto3 lists and writes, pyarrow reads tables, GDAL reads windows of imagery.

boto3 finds out where it is (AWS_ENDPOINT_URL, AWS_REGION, a profile), the others are told. Each process finds
credentials by itself (keys and session token in the environment, AWS_PROFILE, AWS_SHARED_CREDENTIALS_FILE, a login by
SSO, a program, the machine's role). They never leave it, so they can't get into a file, a log or the arguments of a
task. Within it, GDAL and Arrow are given those that boto3 finds where they would not.

A URI is `s3://BUCKET/KEY`. Every function raises SegError, in one line, for what S3 refuses or does not answer.
"""

import io
import logging
import os
import posixpath
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from functools import cache, lru_cache
from operator import methodcaller
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from seg_core.errors import SegError
from seg_core.storage import retries
from seg_core.storage.store import PARTIAL, GdalSettings, Stat

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

T = TypeVar("T")

S3 = "s3://"
GDAL_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
UNKNOWN_TO_ARROW = {"assume-role", "login"}  # methods of boto3: a role of another profile, `aws login` (Arrow 26)
ANONYMOUS = "AWS_NO_SIGN_REQUEST"  # GDAL's name for it; set to YES, requests are not signed
# What a cluster's nodes are told of S3: where it is, never who asks. That they must know themselves.
SHARED = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", ANONYMOUS)

log = logging.getLogger(__name__)
_making_client = threading.Lock()


def gdal_path(uri: str) -> str:
    """The URI as GDAL names it."""
    return f"/vsis3/{uri.removeprefix(S3)}"


def gdal_settings(uri: str) -> GdalSettings:
    """Settings for GDAL to read imagery at a URI: the same in every process, but for its credentials."""
    endpoint, region, anonymous = _service(_split(uri)[0])
    settings: GdalSettings = {
        "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",  # no listing in search of files beside the image
        "GDAL_INGESTED_BYTES_AT_OPEN": 32768,  # the header of a COG in one request
        "CPL_VSIL_CURL_CHUNK_SIZE": 16384,  # what a read is rounded up to: little more than a block
        "CPL_VSIL_CURL_CACHE_SIZE": 16 * 2**20,  # bytes, in each process
        # Of what one read needs, so much is fetched in few requests; what is beyond it block by block.
        "GDAL_MAX_RAW_BLOCK_CACHE_SIZE": 64 * 2**20,
        "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": "YES",  # neighbouring blocks in one request
        "GDAL_HTTP_MULTIPLEX": "YES",  # many requests over one connection where the server speaks HTTP/2
        "GDAL_HTTP_MAX_RETRY": retries.GDAL_ATTEMPTS,
        "GDAL_HTTP_RETRY_DELAY": retries.GDAL_PAUSE,
        "GDAL_HTTP_RETRY_CODES": ",".join(map(str, retries.THROTTLED)),
        "GDAL_HTTP_CONNECTTIMEOUT": retries.CONNECT_TIMEOUT,
        "GDAL_HTTP_LOW_SPEED_TIME": retries.CONNECT_TIMEOUT,  # s below the next line's bytes a second
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
    # GDAL 3.10 knows no SSO, no program that gives keys, and another name than AWS_SHARED_CREDENTIALS_FILE.
    return settings | dict(zip(GDAL_KEYS, _keys(uri), strict=False))


def _keys(uri: str, methods: Collection[str] = ()) -> tuple[str, ...]:
    """Key, secret and session token of this moment; none if there are none. Those that expire are renewed in time.

    With `methods` of boto3, only if one of them has found the keys. Raises SegError if they can't be had.
    """

    def find(_: Any) -> tuple[str, ...]:
        credentials = _session().get_credentials()
        if credentials is None or (methods and credentials.method not in methods):
            return ()
        key, secret, token = credentials.get_frozen_credentials()[:3]
        return key, secret, token or ""

    return () if _anonymous() else _ask(uri, find) or ()


def arrow(uri: str) -> "tuple[FileSystem, str]":
    """The bucket's file system of pyarrow and the path in it."""
    return _arrow(_split(uri)[0], *_keys(uri, UNKNOWN_TO_ARROW)), uri.removeprefix(S3)


@lru_cache(maxsize=16)  # keys that are renewed make another one
def _arrow(bucket: str, *keys: str) -> "FileSystem":
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    endpoint, region, anonymous = _service(bucket)
    options: dict[str, Any] = {"region": region, "anonymous": anonymous}
    if endpoint:
        host = urlsplit(endpoint)
        options |= {"endpoint_override": host.netloc, "scheme": host.scheme}
    options |= dict(zip(("access_key", "secret_key", "session_token"), keys, strict=False))
    # Delayed: a file of a few MB is one put, not an upload in parts.
    return S3FileSystem(
        allow_delayed_open=True,
        connect_timeout=retries.CONNECT_TIMEOUT,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=retries.ATTEMPTS),
        **options,
    )


def stat(uri: str) -> Stat | None:
    """Size and etag of an object, None where there is none."""
    bucket, key = _split(uri)
    answer = _ask(uri, methodcaller("head_object", Bucket=bucket, Key=key)) if key else None
    return Stat(answer["ContentLength"], answer["ETag"].strip('"')) if answer else None


def stat_beside(uri: str) -> tuple[Stat | None, list[str] | None]:
    """As `stat`, and the URIs of the objects beside it that have its stem; by one request.

    They are None where the bucket may not be listed, or there are more than can be listed at once.
    """
    listed = _list_beside(uri)
    if listed is None:
        return stat(uri), None
    return listed.pop(uri, None), sorted(listed)


def exists(uri: str) -> bool:
    """Whether there is an object, or any below a prefix."""
    return next(walk(uri), None) is not None or stat(uri) is not None


def _list_beside(uri: str) -> dict[str, Stat] | None:
    """Size and etag of an object and of those beside it with the same stem, by URI."""
    bucket, key = _split(uri)
    request = methodcaller("list_objects_v2", Bucket=bucket, Prefix=f"{posixpath.splitext(key)[0]}.")
    answer = _ask(uri, request, {"AccessDenied", "403"})
    if answer is None or answer.get("IsTruncated"):
        return None
    return {f"{S3}{bucket}/{o['Key']}": Stat(o["Size"], o["ETag"].strip('"')) for o in answer.get("Contents", ())}


def read(uri: str) -> bytes | None:
    """The content of an object, None where there is none."""
    bucket, key = _split(uri)
    return _ask(uri, lambda client: _download(client, bucket, key))


def _download(client: Any, bucket: str, key: str) -> bytes:
    from boto3.s3.transfer import TransferConfig
    from botocore.exceptions import FlexibleChecksumError
    from s3transfer.exceptions import RetriesExceededError

    # Not get_object: it gives up where the connection breaks after the answer has begun.
    config = TransferConfig(use_threads=False, num_download_attempts=retries.ATTEMPTS)
    for pause in (*retries.DAMAGE_PAUSES, None):
        content = io.BytesIO()
        try:
            client.download_fileobj(bucket, key, content, Config=config)
            break
        except (FlexibleChecksumError, RetriesExceededError):  # boto3 asks again at once, or not at all
            if pause is None:
                raise
            time.sleep(pause)
    return content.getvalue()


def publish(uri: str, content: bytes) -> None:
    """Write an object, at once or not at all."""
    bucket, key = _split(uri)
    _ask(uri, methodcaller("put_object", Bucket=bucket, Key=key, Body=content))


def upload_file(uri: str, local: str) -> None:
    """Write an object from a local file, at once or not at all. A large one is sent in parts of some MB."""
    from boto3.s3.transfer import TransferConfig

    bucket, key = _split(uri)
    config = TransferConfig(use_threads=False)
    with open(local, "rb") as file:
        _ask(uri, lambda client: client.upload_fileobj(file, bucket, key, Config=config), none=())


def create(uri: str, content: bytes) -> bool:
    """Write an object where there is none yet. Returns whether it was this call that did."""
    return _put_where(uri, content, IfNoneMatch="*")


def replace(uri: str, content: bytes, etag: str) -> bool:
    """Write an object in the place of the one with this etag. Returns False where that is no longer there."""
    return _put_where(uri, content, IfMatch=f'"{etag}"')


def _put_where(uri: str, content: bytes, **condition: str) -> bool:
    bucket, key = _split(uri)
    request = methodcaller("put_object", Bucket=bucket, Key=key, Body=content, **condition)
    return _ask(uri, request, _CONDITION_FAILED) is not None


def remove(uri: str) -> None:
    """Delete an object, if it is there."""
    bucket, key = _split(uri)
    _ask(uri, methodcaller("delete_object", Bucket=bucket, Key=key))


def walk(prefix: str) -> Iterator[str]:
    """All objects below a prefix, as they are found, a page of 1,000 at a time."""
    bucket, _ = _split(prefix)
    for key, _ in _list_objects(prefix):
        yield f"{S3}{bucket}/{key}"


def list_files(prefix: str) -> Iterator[tuple[str, Stat]]:
    """Names, sizes and etags of the objects of a prefix, without those of prefixes below it."""
    for key, state in _list_objects(prefix, Delimiter="/"):
        yield posixpath.basename(key), state


def _list_objects(prefix: str, **options: str) -> Iterator[tuple[str, Stat]]:
    bucket, key = _split(prefix)
    asked = {"Bucket": bucket, "Prefix": f"{key}/" if key else "", **options}
    while True:
        page: dict[str, Any] = _ask(prefix, methodcaller("list_objects_v2", **asked)) or {}
        for each in page.get("Contents", ()):
            if not each["Key"].endswith("/"):  # such a key is a folder, as web consoles make them
                yield each["Key"], Stat(each["Size"], each["ETag"].strip('"'))
        if not page.get("IsTruncated"):
            return
        asked["ContinuationToken"] = page["NextContinuationToken"]


def make_folder(prefix: str) -> None:
    """Put an object below a prefix and delete it again: there are no folders, but the bucket may refuse."""
    bucket, key = _split(prefix)
    if key and {"", ".", ".."} & set(key.split("/")):  # Arrow does not take such a name
        raise SegError(f"{prefix}: a folder in this path is empty, `.` or `..`: remove it")
    # Some servers make a bucket of any name at the first put.
    below = {"Bucket": bucket, "Prefix": f"{key}/" if key else "", "MaxKeys": 1}
    if _ask(prefix, methodcaller("list_objects_v2", **below)) is None:
        raise SegError(f"{prefix}: no such bucket")
    trial = f"{prefix}/{PARTIAL}{uuid.uuid4().hex}"
    publish(trial, b"")
    remove(trial)


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix(S3).partition("/")
    return bucket, key


def _service(bucket: str) -> tuple[str | None, str, bool]:
    """Endpoint (None: Amazon's own), region of a bucket, and whether requests are not signed."""
    client: Any = _ask(f"{S3}{bucket}", lambda client: client)  # raises SegError if credentials can't be had
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
def _session() -> Any:
    """The session of boto3 of this process. It keeps the credentials that it has found, and renews them."""
    import boto3

    return boto3.Session()


@cache
def _client() -> Any:
    """The S3 client of this process, which threads may share. They may not share its session while it makes one."""
    from botocore import UNSIGNED
    from botocore.config import Config

    options: dict[str, Any] = {"signature_version": UNSIGNED} if _anonymous() else {}
    config = Config(
        retries={"mode": "standard", "total_max_attempts": 1},  # see _retry
        connect_timeout=retries.CONNECT_TIMEOUT,
        read_timeout=retries.READ_TIMEOUT,
        **options,
    )
    with _making_client:
        session = _session()
        client = session.client("s3", region_name=session.region_name or "us-east-1", config=config)
    client.meta.events.register("before-send.s3", _dont_expect)
    client.meta.events.register("needs-retry.s3", _retry)
    return client


def _dont_expect(request: Any, **_: Any) -> None:
    """Send a body without asking first: botocore waits for ever where the connection breaks within the answer.

    https://github.com/boto/botocore/issues/3613 and 3755 tell of more that goes wrong there.
    """
    request.headers.pop("Expect", None)


def _retry(response: Any, endpoint: Any, attempts: int, caught_exception: Exception | None, **_: Any) -> float | None:
    """Return the seconds until a request is sent again, None if it is not. After some attempts, say so.

    botocore's own retries share a quota among all requests of a client: after some 35 of them, while a store is away
    for seconds, they end at once (botocore 1.44). These do not.
    """
    from botocore.exceptions import ConnectionError as NoConnectionError
    from botocore.exceptions import HTTPClientError

    if response is None:
        transient = isinstance(caught_exception, NoConnectionError | HTTPClientError)
    else:
        code = response[1].get("Error", {}).get("Code")
        transient = response[0].status_code in retries.THROTTLED or code in retries.THROTTLED_CODES
    if not transient or attempts >= retries.ATTEMPTS:
        return None
    if attempts == retries.REPORTED_ATTEMPT:
        _warn_once(
            f"S3 at {endpoint.host} {'asks to slow down' if response else 'does not answer'}: trying for two minutes"
        )
    return retries.pause(attempts)


@cache
def _warn_once(line: str) -> None:
    log.warning(line)


def _ask(uri: str, request: Callable[[Any], T], none: Collection[str] = ("404", "NoSuchKey")) -> T | None:
    """The answer of S3, or None for an error of a code in `none`."""
    from botocore.exceptions import BotoCoreError, ClientError, FlexibleChecksumError, NoCredentialsError
    from s3transfer.exceptions import RetriesExceededError

    try:
        return request(_client())
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", "")) or "unknown"
        if code in none:
            return None
        reason = _REASONS.get(code, f"S3 answers {code}")
        raise SegError(f"{uri}: {_CLOSED if reason == _DENIED and _anonymous() else reason}") from error
    except NoCredentialsError as error:
        raise SegError(f"{uri}: {_NOBODY}") from error
    except FlexibleChecksumError as error:
        raise SegError(f"{uri}: what arrives does not match its checksum, in several attempts") from error
    except RetriesExceededError as error:
        raise SegError(f"{uri}: S3 breaks off again and again: {error.last_exception}") from error
    # An endpoint that is no URL is a ValueError to botocore, and keys that are new and have expired a RuntimeError.
    except (BotoCoreError, ValueError, RuntimeError) as error:
        raise SegError(f"{uri}: {' '.join(str(error).split()) or 'S3 does not answer'}") from error


_CONDITION_FAILED = {"PreconditionFailed", "412", "ConditionalRequestConflict", "NoSuchKey", "404"}
_DENIED = "access denied: these credentials are unknown or don't allow it (public buckets: --no-sign-request)"
_CLOSED = "access denied without credentials: the bucket is not public: leave out --no-sign-request"
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
    "QuotaExceeded": "the quota of the store is used up: free some of it",
}
