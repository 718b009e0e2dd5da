"""A real S3 server (SeaweedFS) on ports of its own, that can be stopped and started again."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from conftest import free_port, outside_environment

BUCKET = "tests"
KEY, SECRET = "key", "secret"
FINDABLE = "made/up+for+a+search/0123456789abcdefgh"  # a secret that nothing else looks like
IDENTITY = {
    "name": "tests",
    "credentials": [{"accessKey": KEY, "secretKey": SECRET}, {"accessKey": "another", "secretKey": FINDABLE}],
    "actions": ["Admin", "Read", "Write", "List", "Tagging"],
}


class Weed:
    """A server that keeps what it is given in `folder`; `environment` leads to it.

    The keys are in a file: where they are in the environment, rasterio makes a session of boto3 in each of many calls.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "s3.json").write_text(json.dumps({"identities": [IDENTITY]}))
        (folder / "keys").write_text(f"[default]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n")
        ports = {name: free_port() for name in ("master", "volume", "filer", "s3")}
        options = [f"-{name}.port={port}" for name, port in ports.items()]
        options += [f"-{name}.port.grpc={free_port()}" for name in ports]
        options += ["-s3.port.iceberg=0", "-s3.port.lance=0"]  # whose ports may be another server's
        self.command = [
            "weed", "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder}", "-s3",
            f"-s3.config={folder}/s3.json", "-volume.max=50", "-master.volumeSizeLimitMB=64", *options,
        ]  # fmt: skip
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3']}",
            "AWS_SHARED_CREDENTIALS_FILE": f"{folder}/keys",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Start it, and wait until it answers and the bucket is there."""
        with (self.folder / "log").open("ab") as log:
            self.server = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=outside_environment(), cwd=self.folder
            )
        client, deadline = self.client(), time.monotonic() + 60
        while True:
            try:
                client.create_bucket(Bucket=BUCKET)
            except (client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
                return
            except (BotoCoreError, ClientError):
                if self.server.poll() is not None or time.monotonic() > deadline:
                    pytest.fail((self.folder / "log").read_text()[-2000:])
                time.sleep(0.3)
            else:
                return

    def stop(self) -> None:
        """End it at once: it would take half a minute to say goodbye to its own parts."""
        self.server.kill()
        self.server.wait()

    def client(self) -> Any:
        """A client of it, whatever this process's environment says."""
        return boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name=self.environment["AWS_REGION"],
            config=Config(retries={"total_max_attempts": 1}),
        )


def put(path: str, uri: str) -> str:
    """Upload a file to where the AWS environment leads; its URI."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    boto3.client("s3").upload_file(path, bucket, key)
    return uri
