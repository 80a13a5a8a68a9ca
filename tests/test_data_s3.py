"""Shards in an object store: a real S3 server on this machine, read through fsspec's driver."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs
from moto.server import ThreadedMotoServer

from data.config import FetchConfig
from data.dataset import Shards, open_shards
from tests.support.data_streams import epoch, fails

BUCKET = "s3://images"


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadedMotoServer]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def bucket(
    server: ThreadedMotoServer, whole: Shards, monkeypatch: pytest.MonkeyPatch
) -> Iterator[s3fs.S3FileSystem]:
    """The dataset in a bucket, which is found as in production: by the environment."""
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)  # the user's own say something else
    for name in list(os.environ):
        if name.lower() in ("http_proxy", "https_proxy", "all_proxy", "aws_profile"):
            monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    files.mkdir(BUCKET)
    for path in Path(whole.root).iterdir():
        if path.is_file():
            files.put_file(str(path), f"{BUCKET}/set/{path.name}")
    yield files
    files.rm(BUCKET, recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bucket_serves_the_same(
    whole: Shards, tmp_path: Path, workers: int, cached: bool
) -> None:
    cache = str(tmp_path) if cached else None
    assert epoch(f"{BUCKET}/set", workers=workers, cache=cache) == epoch(whole.root)


def test_what_is_missing_in_a_bucket_is_named(bucket: s3fs.S3FileSystem) -> None:
    with pytest.raises(ValueError, match=r"no dataset at s3://images/elsewhere: manifest"):
        open_shards(f"{BUCKET}/elsewhere")
    opened = open_shards(f"{BUCKET}/set")
    bucket.rm(f"{BUCKET}/set/00004.tar")
    with pytest.raises(ValueError, match=r"00004\.tar is missing"):
        open_shards(f"{BUCKET}/set")
    fails(opened, OSError, r"00004\.tar.* while reading image \d", workers=1)


def test_an_object_that_was_replaced_stops_the_run(bucket: s3fs.S3FileSystem) -> None:
    opened, path = open_shards(f"{BUCKET}/set"), f"{BUCKET}/set/00004.tar"
    content = bucket.cat_file(path)
    bucket.pipe_file(path, content[:-512])
    with pytest.raises(ValueError, match=r"00004\.tar has \d+ bytes, the manifest says"):
        open_shards(f"{BUCKET}/set")
    bucket.pipe_file(path, content[::-1])
    fails(opened, ValueError, r"00004\.tar: no tar header of image \d")


@pytest.mark.slow
@pytest.mark.usefixtures("bucket")
def test_a_server_that_does_not_answer_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_shards(f"{BUCKET}/set")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it accepts, and says nothing
        port = silent.getsockname()[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        s3fs.S3FileSystem.clear_instance_cache()
        fails(opened, OSError, r"at byte 0 after 2 attempts: FSTimeoutError", timeout_s=0.5)
        with pytest.raises(OSError, match=r"manifest\.json cannot be read"):
            open_shards(f"{BUCKET}/set", fetch=FetchConfig(retries=1, timeout_s=0.5))
