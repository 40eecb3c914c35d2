"""The tests of object stores against a local S3 server: moto's, through s3fs."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# `make s3` sets these variables in the environment of the tests.
PACKAGES = Path(sys.prefix) / "s3"
TESTS = ("test_places.py", "run/test_storage.py", "run/test_catalog.py")


@pytest.fixture
def server() -> Iterator[dict[str, str]]:
    """The environment in which s3:// is a server of this machine."""
    if not (PACKAGES / "s3fs").is_dir():
        pytest.skip("needs make s3")
    path = os.pathsep.join([str(PACKAGES), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    environment["PYTHONPATH"] = path.rstrip(os.pathsep)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until_open(port)
        yield {
            **environment,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "anyone",
            "AWS_SECRET_ACCESS_KEY": "anything",
            "AWS_DEFAULT_REGION": "us-east-1",
            "TORCHPRIME_TEST_STORE": "s3://tests/run",
        }
    finally:
        process.kill()
        process.wait()


def wait_until_open(port: int) -> None:
    until = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            assert time.monotonic() < until, "the server does not start"
            time.sleep(0.1)


@pytest.mark.slow
def test_checkpoints_and_exports_on_a_local_s3_server(server: dict[str, str]) -> None:
    make_bucket = "import fsspec; fsspec.filesystem('s3').mkdir('tests')"
    subprocess.run([sys.executable, "-c", make_bucket], env=server, check=True)
    here = Path(__file__).parent
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-k",
            "s3://",
            *(str(here / name) for name in TESTS),
        ],
        env=server,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 25 and "skipped" not in done.stdout, done.stdout
