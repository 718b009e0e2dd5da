"""The dashboard of a Ray cluster, through which jobs are submitted and managed."""

import http.client
import logging
import os
import ssl
import urllib.error
import urllib.request
from contextlib import suppress

import ray
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from seg_core.environment import environment
from seg_core.errors import SegError

from ..ray_session import AUTHENTICATION_ADVICE

ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ANSWER_TIMEOUT = 5.0  # s that a dashboard is given to answer
MIN_PYTHON = (3, 11)  # as pyproject.toml says
START_ADVICE = "name the one that Ray names when a cluster starts (ray start --head starts one)"
UPLOAD_LOGGERS = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")


def connect(address: str | None) -> JobSubmissionClient:
    """Return a client of the dashboard at `address`, by default $RAY_API_SERVER_ADDRESS, $RAY_ADDRESS or local.

    It does not log each upload. Raises SegError if no dashboard answers at the address, or if it asks for a token.
    """
    ray_address = os.environ.get("RAY_ADDRESS", "")  # of a cluster itself, unless it begins with http
    of_dashboard = os.environ.get("RAY_API_SERVER_ADDRESS") or (ray_address if ray_address.startswith("http") else None)
    address = address or of_dashboard or DEFAULT_ADDRESS
    url = _make_url(address)
    try:
        _await_answer(url)
        with environment(dict.fromkeys(ADDRESS_VARIABLES)):  # they would override the given address
            client = JobSubmissionClient(url)
    except AuthenticationError as error:
        raise SegError(f"--address {address}: {AUTHENTICATION_ADVICE}") from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise SegError(f"--address {address}: no Ray dashboard answers there: {START_ADVICE}") from error
    for name in UPLOAD_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    return client


def _make_url(address: str) -> str:
    """Return the URL of a dashboard whose scheme may be left out: Ray would try other protocols for half a minute."""
    scheme, colon, _ = address.partition("://")
    if not colon:
        return f"http://{address}"
    if scheme not in {"http", "https"}:
        raise SegError(
            f"--address {address}: not a Ray dashboard: use http://HOST:8265, which Ray names when it starts"
        )
    return address


def _await_answer(url: str) -> None:
    """Raise ConnectionError if nothing answers at a URL in time: Ray's client would wait for ever."""
    try:
        urllib.request.urlopen(f"{url}/api/version", timeout=ANSWER_TIMEOUT).close()  # noqa: S310 - it is http or https
    except urllib.error.HTTPError:  # an answer, of which Ray's client makes sense
        return
    except (OSError, http.client.HTTPException) as error:
        if not isinstance(getattr(error, "reason", None), ssl.SSLError):
            raise ConnectionError(str(error)) from error


def check_version(client: JobSubmissionClient) -> None:
    """Raise SegError if the cluster's Ray is of another release than the one here, or its Python can't run the code.

    Another Python is no obstacle in itself: what is sent is a command, code as text and weights.
    """
    there, here = str(client._server_ray_version), str(ray.__version__)  # noqa: SLF001 - it has no public name
    if there.split(".")[:2] != here.split(".")[:2]:
        raise SegError(
            f"the cluster runs Ray {there}, this machine has Ray {here}: install the same release on both, such as "
            f"with pip install ray=={there}"
        )
    python = find_python(client)
    if python is not None and python < MIN_PYTHON:
        found, least = (".".join(map(str, version)) for version in (python, MIN_PYTHON))
        raise SegError(f"the cluster runs Python {found}: this program needs {least} or later on each node")


def find_python(client: JobSubmissionClient) -> tuple[int, int] | None:
    """Return the version of the Python that a cluster runs, such as (3, 11); None if its dashboard does not tell."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        answer = client._do_request("GET", "/api/v0/cluster_metadata")  # noqa: SLF001 - no public method sends it
        major, minor = answer.json()["data"]["pythonVersion"].split(".")[:2]
        return int(major), int(minor)
    return None
