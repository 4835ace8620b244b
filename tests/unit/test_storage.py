from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest

from jobs.s3_server import s3_server as running_s3_server
from raysseg import storage
from raysseg.storage import FileEntry, StorageError

MIB = 1 << 20


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder, on this machine and in object storage."""
    return str(tmp_path) if request.param == "local" else str(request.getfixturevalue("s3_bucket"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A local folder with three files, one of them in a folder of its own."""
    local = tmp_path / "local"
    (local / "sub").mkdir(parents=True)
    (local / "model.bin").write_bytes(os.urandom(7 * MIB))
    (local / "empty").write_bytes(b"")
    (local / "sub" / "a b#?%20é.txt").write_text("text")
    return local


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "raysseg"


def keys(bucket: str) -> list[str]:
    """All object names of a bucket, empty "folder" objects too, which pyarrow would hide."""
    s3 = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL_S3"], region_name="us-east-1")
    return [entry["Key"] for entry in s3.list_objects_v2(Bucket=bucket.removeprefix("s3://")).get("Contents", [])]


def fails(uri: str, action: Callable[[], object], *words: str, within_s: float = 15) -> StorageError:
    """The action raises a StorageError that names the URI, what is wrong and what to do, in one short line."""
    start = time.monotonic()
    with pytest.raises(StorageError) as caught:
        action()
    assert time.monotonic() - start < within_s
    error = caught.value
    message = str(error)
    assert message.startswith(f"{uri}: ")
    assert error.mend
    assert message.endswith(error.mend)
    assert "\n" not in message
    assert len(message) < 450
    for word in words:
        assert word in message
    return error


# ---- URIs


def test_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert storage.absolute("runs/x") == f"{tmp_path}/runs/x"
    assert storage.absolute("~/runs") == "/home/someone/runs"
    assert storage.absolute("file:///a/b/") == "/a/b"
    assert storage.absolute("s3://bucket/x/") == "s3://bucket/x/"
    assert storage.join("s3://bucket/runs/", "x", "/best.json") == "s3://bucket/runs/x/best.json"
    assert storage.join("/", "x") == "/x"
    assert [storage.is_remote(uri) for uri in ("s3://b/k", "gs://b/k", "file:///k", "k", "/k")] == [True, True] + 3 * [
        False
    ]
    assert storage.filesystem("runs")[1] == f"{tmp_path}/runs"


@pytest.mark.parametrize(
    ("uri", "word"), [("hdfs://h/x", "s3://"), ("s3://", "bucket"), ("s3:///", "bucket"), ("file://a/b", "file:///")]
)
def test_bad_uris(uri: str, word: str) -> None:
    fails(uri, lambda: storage.read_bytes(uri), word)


def test_errors_are_pickled() -> None:
    error = pickle.loads(pickle.dumps(StorageError("s3://b", "it is full", "Empty it.", is_transient=True)))
    assert str(error) == "s3://b: it is full. Empty it."
    assert error.is_transient


# ---- files


def test_files(root: str) -> None:
    uri = storage.join(root, "a", "b", "c d.json")
    assert not storage.exists(uri)
    assert not storage.exists(storage.join(root, "a"))
    storage.write_text(uri, "größer")
    assert storage.read_text(uri) == "größer"
    storage.write_bytes(uri, b"")
    assert storage.read_bytes(uri) == b""
    content = os.urandom(12 * MIB)  # more than one part
    storage.write_bytes(storage.join(root, "a", "large"), content)
    storage.write_bytes(storage.join(root, "z"), b"123")
    assert storage.read_bytes(storage.join(root, "a", "large")) == content
    assert storage.exists(uri)
    assert storage.exists(storage.join(root, "a"))
    everything = [FileEntry("a/b/c d.json", 0), FileEntry("a/large", 12 * MIB), FileEntry("z", 3)]
    assert storage.list_files(root) == everything
    assert storage.list_files(root + "/", recursive=False) == [FileEntry("z", 3)]
    assert storage.list_files(storage.join(root, "a")) == [FileEntry("b/c d.json", 0), FileEntry("large", 12 * MIB)]
    if storage.is_remote(root):
        assert keys(root) == [entry.path for entry in everything], "folders are no objects"
    storage.delete_folder(storage.join(root, "a"))
    storage.delete_folder(storage.join(root, "a"))
    assert storage.list_files(root) == [FileEntry("z", 3)]


def test_random_access(root: str) -> None:
    uri = storage.join(root, "x")
    storage.write_bytes(uri, bytes(range(256)))
    with storage.open_input(uri) as file:
        assert file.size() == 256
        assert file.read_at(3, 250) == bytes([250, 251, 252])
        file.seek(7)
        assert file.read(1) == b"\x07"


def test_missing_file(root: str) -> None:
    uri = storage.join(root, "no.json")
    fails(uri, lambda: storage.read_bytes(uri), "no such file", "Check the path")
    fails(uri, lambda: storage.open_input(uri).__enter__(), "no such file", "Check the path")


def test_missing_folder(s3_bucket: str, tmp_path: Path) -> None:
    assert storage.list_files(s3_bucket) == storage.list_files(f"{s3_bucket}/no") == []
    missing = str(tmp_path / "no")
    fails(missing, lambda: storage.list_files(missing), "no such file or folder", "Check the path")
    file = tmp_path / "file"
    file.write_bytes(b"\xff")
    fails(str(file), lambda: storage.list_files(str(file)), "no folder")
    fails(f"{file}/x", lambda: storage.write_bytes(f"{file}/x", b""), "no folder")
    fails(str(file), lambda: storage.read_text(str(file)), "UTF-8")
    fails(str(tmp_path), lambda: storage.write_bytes(str(tmp_path), b""), "this is a folder")


def test_a_replaced_file_is_old_or_new(root: str) -> None:
    """Sizes differ too: a reader that asks for the size and then for the bytes would cut off or overrun the other."""
    uri = storage.join(root, "best.json")
    versions = [bytes([number]) * (5 * MIB + number % 2 * (MIB + 1)) for number in range(12)]
    storage.write_bytes(uri, versions[0])

    def replace() -> None:
        for version in versions[1:]:
            storage.write_bytes(uri, version)

    writer = threading.Thread(target=replace)
    writer.start()
    seen = []
    try:
        while writer.is_alive():
            content = storage.read_bytes(uri)
            seen.append(content[0])
            is_whole = content == versions[content[0]]  # a name: pytest would print the megabytes
            assert is_whole
    finally:
        writer.join()
    assert seen == sorted(seen), "never an older one again"
    assert len(set(seen)) > 1, "too fast to see a replacement"


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    """SIGKILL in the middle of a write: the old content stays, and no listing shows what was left behind."""
    uri = str(tmp_path / "f")
    storage.write_bytes(uri, b"old")
    code = f"""
        from raysseg import storage
        with storage.open_output({uri!r}) as stream:
            stream.write(b"new")
            stream.flush()
            print("written", flush=True)
            input()
        """
    command = [sys.executable, "-c", "if True:" + code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "written\n"
        writer.kill()
    assert len(list(tmp_path.iterdir())) == 2
    assert storage.list_files(str(tmp_path)) == [FileEntry("f", 3)]
    assert storage.read_bytes(uri) == b"old"


# ---- published folders


def test_publish_and_fetch(root: str, folder: Path, cache: Path, tmp_path: Path) -> None:
    uri = storage.join(root, "bundles", "12")
    storage.publish_folder(folder, uri, "bundle.json", {"task": "semantic"})
    manifest = storage.read_manifest(uri, "bundle.json")
    assert manifest["task"] == "semantic"
    assert manifest["files"] == json.loads(storage.read_text(f"{uri}/bundle.json"))["files"]
    fetched = storage.fetch_folder(uri, "bundle.json")
    names = ["empty", "model.bin", "sub/a b#?%20é.txt"]
    assert [entry.path for entry in storage.list_files(str(fetched))] == ["bundle.json", *names]
    assert all((fetched / name).read_bytes() == (folder / name).read_bytes() for name in names)
    assert storage.read_manifest(str(fetched), "bundle.json") == manifest
    if not storage.is_remote(root):
        assert str(fetched) == uri
        return
    assert fetched.parent == cache
    assert keys(root) == [f"bundles/12/{name}" for name in sorted(["bundle.json", *names])]
    inode = (fetched / "model.bin").stat().st_ino
    (fetched / "empty").write_text("damaged")
    assert storage.fetch_folder(uri, "bundle.json") == fetched
    assert (fetched / "model.bin").stat().st_ino == inode, "it is not fetched twice"
    assert (fetched / "empty").read_bytes() == b"", "what was damaged in the cache is"
    assert storage.fetch_folder(uri, "bundle.json", into=tmp_path / "here") == tmp_path / "here"
    assert (tmp_path / "here" / "model.bin").read_bytes() == (folder / "model.bin").read_bytes()


def test_publish_again(root: str, folder: Path, cache: Path) -> None:
    uri = storage.join(root, "bundle")
    storage.publish_folder(folder, uri, "bundle.json", {"step": 1})
    (folder / "model.bin").write_bytes(b"better")
    storage.publish_folder(folder, uri, "bundle.json", {"step": 2})
    assert storage.read_manifest(uri, "bundle.json")["step"] == 2
    assert (storage.fetch_folder(uri, "bundle.json") / "model.bin").read_bytes() == b"better"
    storage.delete_folder(uri, "bundle.json")
    assert not storage.exists(uri)
    if storage.is_remote(root):
        assert keys(root) == []


def test_an_unfinished_folder_does_not_count(root: str, folder: Path, cache: Path) -> None:
    """The second publication breaks off: neither it nor the first one, half overwritten, can be read."""
    uri = storage.join(root, "bundle")
    storage.publish_folder(folder, uri, "bundle.json", {})
    (folder / "model.bin").write_bytes(b"other")
    (folder / "sub" / "a b#?%20é.txt").unlink()
    (folder / "zz").symlink_to("/proc/self/mem")  # a file that fails when it is read
    fails(str(folder / "zz"), lambda: storage.publish_folder(folder, uri, "bundle.json", {}))
    assert not storage.exists(storage.join(uri, "bundle.json"))
    manifest_uri = storage.join(uri, "bundle.json")
    fails(manifest_uri, lambda: storage.read_manifest(uri, "bundle.json"), "no such file")
    fails(manifest_uri, lambda: storage.fetch_folder(uri, "bundle.json"), "no such file")


def test_damage_is_found(root: str, folder: Path, cache: Path) -> None:
    uri = storage.join(root, "bundle")
    storage.publish_folder(folder, uri, "bundle.json", {})
    model = storage.join(uri, "model.bin")
    content = storage.read_bytes(model)

    storage.write_bytes(model, content[:-1] + bytes([content[-1] ^ 1]))  # one bit
    storage.read_manifest(uri, "bundle.json")
    fails(model, lambda: storage.fetch_folder(uri, "bundle.json"), "damaged", "Publish")

    storage.write_bytes(model, content[:-1])
    fails(model, lambda: storage.read_manifest(uri, "bundle.json"), "damaged", f"{len(content) - 1} bytes, not")

    storage.write_bytes(model, content)
    storage.fetch_folder(uri, "bundle.json")
    storage.delete_folder(storage.join(uri, "sub"))
    missing = storage.join(uri, "sub/a b#?%20é.txt")
    fails(missing, lambda: storage.read_manifest(uri, "bundle.json"), "damaged", "missing")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"task": "semantic"}',
        '{"files": {"a": 1}}',
        '{"files": {"../a": {"size": 1, "sha256": ""}}}',
        '{"files": {"/a": {"size": 1, "sha256": ""}}}',
    ],
)
def test_a_damaged_manifest(text: str, tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_text(text)
    fails(f"{tmp_path}/bundle.json", lambda: storage.fetch_folder(str(tmp_path), "bundle.json"), "no manifest")


# ---- storages that refuse


def test_missing_bucket(s3_server: str, tmp_path: Path) -> None:
    bucket = "s3://no-such-bucket-here"
    uri = f"{bucket}/folder/x"
    words = ("the bucket no-such-bucket-here does not exist", "Create it")
    fails(uri, lambda: storage.read_bytes(uri), *words)
    fails(uri, lambda: storage.exists(uri), *words)
    fails(uri, lambda: storage.list_files(uri), *words)
    fails(bucket, lambda: storage.list_files(bucket), *words)
    fails(uri, lambda: storage.write_bytes(uri, b""), "bucket does not exist", "Create it")
    fails(uri, lambda: storage.delete_folder(uri), *words)
    fails(f"{uri}/m.json", lambda: storage.publish_folder(tmp_path, uri, "m.json", {}), *words)


def test_wrong_credentials(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a server that checks signatures once a bucket and a user are made."""
    with running_s3_server({"INITIAL_NO_AUTH_ACTION_COUNT": "4"}) as endpoint:
        options = {"endpoint_url": endpoint, "region_name": "us-east-1"}
        boto3.client("s3", **options).create_bucket(Bucket="bucket")
        iam = boto3.client("iam", **options)
        iam.create_user(UserName="someone")
        key = iam.create_access_key(UserName="someone")["AccessKey"]
        policy = {"Effect": "Allow", "Action": ["s3:PutObject", "s3:GetObject"], "Resource": "arn:aws:s3:::bucket/*"}
        document = json.dumps({"Version": "2012-10-17", "Statement": [policy]})
        iam.put_user_policy(UserName="someone", PolicyName="files", PolicyDocument=document)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        uri = "s3://bucket/x"

        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAWRONGWRONGWRONG0")
        for action in (
            storage.read_bytes,
            storage.list_files,
            storage.exists,
            lambda uri: storage.write_bytes(uri, b""),
        ):
            fails(uri, lambda action=action: action(uri), "does not know the access key", "AWS_ACCESS_KEY_ID")

        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        for action in (
            storage.read_bytes,
            storage.list_files,
            storage.exists,
            lambda uri: storage.write_bytes(uri, b""),
        ):
            fails(uri, lambda action=action: action(uri), "secret key", "AWS_SECRET_ACCESS_KEY")

        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        storage.write_bytes(uri, b"content")
        assert storage.read_bytes(uri) == b"content"
        fails("s3://bucket", lambda: storage.list_files("s3://bucket"), "access is denied (ListObjectsV2)", "Allow it")


def test_refused_endpoint(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In time even where it is tried again and again."""
    with socket.socket() as closed:  # bound, and nobody listens
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        words = (f"{endpoint} refuses the connection", "AWS_ENDPOINT_URL_S3")
        assert fails("s3://bucket/x", lambda: storage.write_bytes("s3://bucket/x", b""), *words).is_transient


@pytest.mark.parametrize("endpoint", ["localhost:9000", "http://", "http://host:99999", "ftp://host", "http://h/path"])
def test_bad_endpoint(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    fails(endpoint, lambda: storage.read_bytes("s3://bucket/x"), "no S3 endpoint", "http(s)://host[:port]")


def test_unknown_host(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://no-such-host.invalid")
    fails("s3://bucket/x", lambda: storage.exists("s3://bucket/x"), "can't be found", "AWS_ENDPOINT_URL_S3")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mount.returncode != 0:
        pytest.skip(f"needs the right to mount a tmpfs: {mount.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_and_read_only_disk(small_disk: Path, folder: Path, s3_bucket: str) -> None:
    uri = f"{small_disk}/x"
    storage.write_bytes(uri, b"old")
    fails(uri, lambda: storage.write_bytes(uri, bytes(2 * MIB)), "full", "Free some space")
    assert storage.read_bytes(uri) == b"old"
    assert list(small_disk.iterdir()) == [small_disk / "x"], "nothing is left behind"

    bundle = f"{small_disk}/bundle"
    fails(f"{bundle}/model.bin", lambda: storage.publish_folder(folder, bundle, "m.json", {}), "full")
    assert not storage.exists(f"{bundle}/m.json")

    storage.publish_folder(folder, s3_bucket, "m.json", {})
    copy = small_disk / "copy"
    fails(f"{copy}/model.bin", lambda: storage.fetch_folder(s3_bucket, "m.json", into=copy), "full")

    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    fails(uri, lambda: storage.write_bytes(uri, b"new"), "read-only", "writable")


def test_file_size_limit(tmp_path: Path) -> None:
    """A limit on the size of files stands for a quota where nothing can be mounted."""
    code = "from raysseg import storage; storage.write_bytes('limited', bytes(2_000_000))"
    command = [sys.executable, "-c", code]
    limit = (resource.RLIMIT_FSIZE, (MIB, MIB))
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(*limit)
    )
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("raysseg.storage.StorageError: limited: the storage is full")
    assert "Free some space" in message
    assert list(tmp_path.iterdir()) == []


# ---- S3's options, as a server sees them


@dataclass
class Recorder:
    """What a server was asked, and what it answers."""

    server: ThreadingHTTPServer
    endpoint: str
    status: int = 404
    code: str = "NoSuchKey"
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Authorization


@pytest.fixture
def recorder(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """A server that answers every request with one S3 error, and S3's options pointing there."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            record.requests.append((self.command, self.path, self.headers.get("Authorization", "")))
            body = f"<Error><Code>{record.code}</Code><Message>No.</Message></Error>".encode()
            self.send_response(record.status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_POST = answer  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        record = Recorder(server, f"http://127.0.0.1:{server.server_port}/")
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        for name in storage.S3_ENVIRONMENT:
            monkeypatch.setenv(name, "")
        storage.use_s3(endpoint=record.endpoint)
        yield record
        server.shutdown()


def test_s3_options(recorder: Recorder) -> None:
    def asked() -> tuple[str, str, str]:
        with pytest.raises(StorageError):
            storage.read_bytes("s3://bucket/a/b")
        first = recorder.requests[0]
        recorder.requests.clear()
        return first

    method, path, authorization = asked()
    assert (method, path) == ("HEAD", "/bucket/a/b"), "the bucket stands in the path"
    assert "/us-east-1/s3/" in authorization
    os.environ["AWS_DEFAULT_REGION"] = "eu-central-1"
    assert "/eu-central-1/s3/" in asked()[2]
    storage.use_s3(region="eu-west-1")
    assert "/eu-west-1/s3/" in asked()[2]
    assert os.environ["AWS_REGION"] == "eu-west-1"
    storage.use_s3(anonymous=True)
    assert asked()[2] == ""
    storage.use_s3(anonymous=False)
    assert asked()[2] != ""
    for value, is_anonymous in (("1", True), ("true", True), ("YES", True), ("no", False), ("", False)):
        os.environ["AWS_NO_SIGN_REQUEST"] = value
        assert (asked()[2] == "") is is_anonymous
    assert set(storage.S3_ENVIRONMENT) >= {"AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_NO_SIGN_REQUEST"}


def test_file_systems_are_kept(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = storage.filesystem(f"{s3_bucket}/a")[0]
    assert storage.filesystem("s3://other/b")[0] is first
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    assert storage.filesystem(s3_bucket)[0] is not first


@pytest.mark.parametrize(
    ("status", "code", "reason", "mend"),
    [
        (507, "XMinioStorageFull", "the storage is full", "Free some space"),
        (403, "QuotaExceeded", "the storage is full", "Free some space"),
        (301, "PermanentRedirect", "another region", "AWS_REGION"),
        (400, "AuthorizationHeaderMalformed", "another region", "AWS_REGION"),
        (400, "ExpiredToken", "session token", "AWS_ACCESS_KEY_ID"),
        (403, "AccessDenied", "access is denied", "Allow it"),
        (403, "AllAccessDisabled", "access is denied", "Allow it"),
        (405, "MethodNotAllowed", "does not allow this", "another storage"),
        (400, "InvalidBucketName", "InvalidBucketName", "Check the URI"),
    ],
)
def test_answers(recorder: Recorder, status: int, code: str, reason: str, mend: str) -> None:
    """One request to write is enough; one to read asks again where the first answer names no cause."""
    recorder.status, recorder.code = status, code
    uri = "s3://bucket/slow_down/no_such_bucket"  # a name is no cause
    assert not fails(uri, lambda: storage.write_bytes(uri, b""), reason, mend).is_transient
    assert [method for method, *_ in recorder.requests] == ["PUT"]
    fails(uri, lambda: storage.read_bytes(uri), reason, mend)


def test_what_may_pass_is_tried_again(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_PAUSES_S", (0,))
    recorder.status, recorder.code = 503, "SlowDown"
    uri = "s3://bucket/x"
    assert fails(uri, lambda: storage.write_bytes(uri, b""), "too much to do (PutObject)", "later").is_transient
    assert len(recorder.requests) == 6, "twice the client's three attempts"


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (400, "RequestTimeout", "does not answer in time"),
        (404, "NoSuchUpload", "the upload broke off"),
        (409, "OperationAborted", "fails"),
        (429, "TooManyRequests", "too much to do"),
        (500, "InternalError", "fails"),
        (503, "ServiceUnavailable", "fails"),
    ],
)
def test_what_may_pass(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, status: int, code: str, reason: str
) -> None:
    monkeypatch.setattr(storage, "_PAUSES_S", ())
    recorder.status, recorder.code = status, code
    assert fails("s3://bucket/x", lambda: storage.write_bytes("s3://bucket/x", b""), reason).is_transient


def test_private_certificate(recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=here -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    recorder.server.socket = context.wrap_socket(recorder.server.socket, server_side=True)
    storage.use_s3(endpoint=recorder.endpoint.replace("http://", "https://"))
    uri = "s3://bucket/x"
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    fails(uri, lambda: storage.read_bytes(uri), "certificate", "is not trusted", "Set AWS_CA_BUNDLE")
    assert recorder.requests == []
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    fails(uri, lambda: storage.read_bytes(uri), "the bucket bucket does not exist")
    assert recorder.requests
