"""Ray with TLS, by the certificates that cluster/make_certificates.sh makes."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import outside_environment

SCRIPT = Path(__file__).parents[1] / "cluster" / "make_certificates.sh"
TRY = """
import contextlib, ssl, sys
import ray
from aerial_seg.ray_session import ray_session
from socket import create_connection

folder = sys.argv[1]
context = ssl.create_default_context(cafile=f"{folder}/ca.crt")
known = ssl.create_default_context(cafile=f"{folder}/ca.crt")
known.load_cert_chain(f"{folder}/node.crt", f"{folder}/node.key")
for each in (context, known):
    each.set_alpn_protocols(["h2"])

def answer(context):  # to the first bytes of gRPC
    host, port = ray.get_runtime_context().gcs_address.split(":")
    with contextlib.suppress(ssl.SSLError, ConnectionError), create_connection((host, int(port)), 10) as plain:
        with context.wrap_socket(plain, server_hostname=host) if context else plain as connection:
            connection.sendall(b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
            return bool(connection.recv(9))
    return False

with ray_session(None):
    print("task", ray.get(ray.remote(ray.util.get_node_ip_address).remote()))
    print("answers", *[answer(each) for each in (known, context, None)])
"""


def make(folder: Path, *names: str) -> None:
    subprocess.run([SCRIPT, folder, *names], check=True, capture_output=True)


def test_ray_talks_to_none_but_who_has_a_certificate(tmp_path: Path) -> None:
    make(tmp_path, "localhost", "127.0.0.1")
    files = {"RAY_TLS_CA_CERT": "ca.crt", "RAY_TLS_SERVER_CERT": "node.crt", "RAY_TLS_SERVER_KEY": "node.key"}
    variables = {name: str(tmp_path / file) for name, file in files.items()}
    said = subprocess.check_output(
        [sys.executable, "-c", TRY, tmp_path],
        env=outside_environment(RAY_USE_TLS="1", **variables),
        text=True,
        timeout=120,
        stderr=subprocess.DEVNULL,
    )
    assert "task 127.0.0.1\n" in said
    assert "answers True False False\n" in said


def describe(path: Path) -> str:
    command = ["openssl", "x509", "-in", path, "-noout", "-ext", "subjectAltName,extendedKeyUsage", "-issuer"]
    return subprocess.check_output(command, text=True)


def test_nodes_have_certificates_of_one_authority_which_only_their_user_reads(tmp_path: Path) -> None:
    make(tmp_path, "head.example.com", "10.0.0.3", "fd00::3")
    first = (tmp_path / "node.crt").read_bytes()
    authority = (tmp_path / "ca.crt").read_bytes()
    said = describe(tmp_path / "node.crt")
    assert "DNS:head.example.com, IP Address:10.0.0.3, IP Address:FD00:0:0:0:0:0:0:3" in said
    assert "TLS Web Server Authentication, TLS Web Client Authentication" in said
    make(tmp_path, "worker.example.com")
    assert (tmp_path / "ca.crt").read_bytes() == authority
    assert (tmp_path / "node.crt").read_bytes() != first
    subprocess.check_call(["openssl", "verify", "-CAfile", tmp_path / "ca.crt", tmp_path / "node.crt"])
    assert {path.stat().st_mode & 0o077 for path in tmp_path.iterdir()} == {0}


@pytest.mark.parametrize("arguments", [[], ["folder"]])
def test_a_certificate_needs_a_name(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run([SCRIPT, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "usage: make_certificates.sh FOLDER NAME...\n")
    assert list(tmp_path.iterdir()) == []
