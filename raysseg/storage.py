"""URIs in and out: open, list, put, publish atomically (local paths, s3://, gs://; any S3 endpoint).

A folder is published with a manifest: a JSON file, written last, that names every file with its size and SHA-256. A
folder without its manifest does not count, so a reader never sees half a checkpoint or half a bundle.

S3's options (``S3_ENVIRONMENT``) and credentials stand in the environment alone, which worker processes inherit.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache, wraps
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import IO, ParamSpec, TypeVar
from urllib.parse import urlsplit
from uuid import uuid4

import pyarrow as pa
import pyarrow.fs as pafs

from raysseg.schema import InputError

P = ParamSpec("P")
T = TypeVar("T")

# The variables with S3's options, none of them a secret; of two that mean the same the first one counts.
S3_ENVIRONMENT = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_NO_SIGN_REQUEST",
)
_OTHER_ENVIRONMENT = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_CA_BUNDLE",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "STORAGE_EMULATOR_HOST",
)
_PARTIAL = ".raysseg-"  # begins the names of local files that are still being written; listings leave them out
_CHUNK = 32 << 20  # bytes of a file in memory while it is copied
_THREADS = 4
_LISTERS = 16  # folders of object storage that are listed at a time
_MOST_FOLDERS = 1000  # of a folder; those of more are small, and cost fewer requests together
_PAUSES_S = (0.5, 1.5)  # between our attempts, give or take a half; in each, pyarrow's S3 client mostly makes three
_CONNECT_S = 3.0
_REQUEST_S = 20.0  # without a byte; a PUT that is not answered takes the client some seconds more


class StorageError(InputError):
    """A storage that does not do what was asked: where (``uri``), what is wrong (``reason``), what to do (``mend``)."""

    def __init__(self, uri: str, reason: str, mend: str, is_transient: bool = False) -> None:
        super().__init__(uri, reason, mend, is_transient)  # all of them: the error is pickled between processes
        self.uri, self.reason, self.mend, self.is_transient = uri, reason, mend, is_transient

    def __str__(self) -> str:
        return f"{self.uri}: {self.reason}. {self.mend}"


@dataclass(frozen=True, order=True, slots=True)
class FileEntry:
    """A file in a listing: its path below the listed folder, with forward slashes, and its size in bytes."""

    path: str
    size: int


# ---- URIs and file systems


def use_s3(endpoint: str | None = None, region: str | None = None, anonymous: bool | None = None) -> None:
    """Set S3's options for this process and those that it starts; None leaves an option as the environment has it."""
    unsigned = None if anonymous is None else "YES" if anonymous else "NO"
    options = {"AWS_ENDPOINT_URL_S3": endpoint, "AWS_REGION": region, "AWS_NO_SIGN_REQUEST": unsigned}
    os.environ.update({name: value for name, value in options.items() if value is not None})


def is_remote(uri: str) -> bool:
    """Whether a URI names object storage and not a local path."""
    return _split(uri)[0] != "file"


def absolute(uri: str) -> str:
    """The URI for any working directory: local paths become absolute, remote URIs stay as they are."""
    return uri if is_remote(uri) else _split(uri)[1]


def join(uri: str, *parts: str) -> str:
    """The URI of something below a folder."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """pyarrow's file system for a URI and the path in it; kept for as long as the environment stays the same."""
    scheme, path = _split(uri)
    with translated(uri):
        return _connect(scheme, tuple(os.environ.get(name) for name in S3_ENVIRONMENT + _OTHER_ENVIRONMENT)), path


@lru_cache(maxsize=16)
def _connect(scheme: str, environment: tuple[str | None, ...]) -> pafs.FileSystem:
    if scheme == "file":
        return pafs.LocalFileSystem()
    if scheme == "gs":
        emulator = urlsplit(_variable("STORAGE_EMULATOR_HOST"))
        return pafs.GcsFileSystem(
            anonymous=bool(emulator.netloc),
            endpoint_override=emulator.netloc or None,
            scheme=emulator.scheme or None,
            retry_time_limit=timedelta(seconds=5),
        )
    endpoint = urlsplit(_s3_endpoint())
    certificates = os.environ.get("AWS_CA_BUNDLE")
    return pafs.S3FileSystem(
        endpoint_override=endpoint.netloc or None,  # with one, buckets stand in the path and not in the host's name
        scheme=endpoint.scheme or None,
        region=_variable("AWS_REGION", "AWS_DEFAULT_REGION") or ("us-east-1" if endpoint.netloc else None),
        anonymous=_variable("AWS_NO_SIGN_REQUEST").lower() in {"yes", "true", "1"},
        connect_timeout=_CONNECT_S,
        request_timeout=_REQUEST_S,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=3),
        allow_delayed_open=True,  # a small object is one PUT
        **({"tls_ca_file_path": certificates} if certificates else {}),
    )


def _split(uri: str) -> tuple[str, str]:
    """The scheme (file, s3 or gs) and the path as pyarrow takes it: absolute, or bucket/key."""
    scheme, separator, path = uri.partition("://")
    if not separator:
        return "file", str(Path(uri).expanduser().absolute())
    if scheme not in {"file", "s3", "gs"}:
        raise StorageError(uri, f"unknown scheme {scheme!r}", "Use s3://, gs://, file:// or a local path.")
    if scheme == "file":
        if not path.startswith("/"):
            raise StorageError(uri, "no absolute path follows file://", "Write file:///folder, or the path alone.")
        return scheme, str(Path(path))
    if not path.strip("/"):
        raise StorageError(uri, "it names no bucket", f"Write {scheme}://bucket/folder.")
    return scheme, path.strip("/")


def _s3_endpoint() -> str:
    """The endpoint's URL; empty for AWS."""
    endpoint = _variable("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    try:
        url = urlsplit(endpoint)
        is_valid = url.scheme in {"http", "https"} and bool(url.hostname) and url.path in {"", "/"} and url.port != 0
    except ValueError:  # the port is no number, or none that there is
        is_valid = False
    if endpoint and not is_valid:
        raise StorageError(endpoint, "this is no S3 endpoint", "Set AWS_ENDPOINT_URL_S3 to http(s)://host[:port].")
    return endpoint


def _variable(*names: str) -> str:
    return next((value for name in names if (value := os.environ.get(name))), "")


# ---- what may pass is tried again


def persistent(act: Callable[P, T]) -> Callable[P, T]:
    """Try again what fails for reasons that may pass; for what can be done twice. Nested, attempts would multiply."""

    @wraps(act)
    def attempts(*args: P.args, **kwargs: P.kwargs) -> T:
        for pause in _PAUSES_S:
            try:
                return act(*args, **kwargs)
            except StorageError as error:
                if not error.is_transient:
                    raise
            # Not all at once; and the draws of training are not touched.
            time.sleep(pause * random.SystemRandom().uniform(0.5, 1.5))
        return act(*args, **kwargs)

    return attempts


# ---- reading


@contextmanager
def open_input(uri: str) -> Iterator[pa.NativeFile]:
    """A file for random access, as Parquet readers want it; an error of reading it, in the block, is a StorageError."""
    system, path = filesystem(uri)
    with translated(uri), system.open_input_file(path) as stream:
        yield stream


@persistent
def read_bytes(uri: str, *, may_change: bool = True) -> bytes:
    """The content of a file: of one version, whole, even while another one replaces it.

    Args:
        uri: of the file.
        may_change: False for files that nobody replaces: two requests to remote storage instead of three.
    """
    if not is_remote(uri):
        with translated(uri):
            return Path(absolute(uri)).read_bytes()
    for _ in range(10):
        try:
            with open_input(uri) as stream:
                content: bytes = stream.read()
                if not may_change:
                    return content
                # pyarrow asks for the size and then for that many bytes, which may be another version's by now.
                with open_input(uri) as again:
                    if again.metadata() == stream.metadata():
                        return content
        except StorageError as error:
            if error.reason != _REPLACED:
                raise
    raise StorageError(uri, _REPLACED, _LATER, is_transient=True)


def read_text(uri: str) -> str:
    """The content of a UTF-8 text file."""
    try:
        return read_bytes(uri).decode()
    except UnicodeDecodeError as error:
        raise StorageError(uri, "this is no UTF-8 text", "Check that it is the right file.") from error


@persistent
def exists(uri: str) -> bool:
    """Whether there is such a file or folder; in object storage, a folder exists while it holds something."""
    return _exists(uri)


def _exists(uri: str) -> bool:
    system, path = filesystem(uri)
    with translated(uri):
        if system.get_file_info(path).type != pafs.FileType.NotFound:
            return True
    _require_bucket(uri)
    return False


def list_files(uri: str, recursive: bool = True) -> list[FileEntry]:
    """The files below a folder, sorted by path; a missing folder is empty in object storage and an error elsewhere."""
    return sorted(_entries(uri, _list(uri, recursive)))


def list_tree(uri: str) -> list[FileEntry]:
    """As ``list_files``, for millions of files in object storage: the folder's own folders are listed side by side.

    A request lists a thousand files and tells where the next one begins, so that one folder is listed in turn.
    """
    if not is_remote(uri):
        return list_files(uri)
    top = _list(uri, recursive=False)
    folders = [join(uri, info.base_name) for info in top if not info.is_file]
    if len(folders) > _MOST_FOLDERS:
        return list_files(uri)
    with ThreadPoolExecutor(_LISTERS) as pool:
        return sorted(_entries(uri, chain(top, *pool.map(_list, folders))))


@persistent
def _list(uri: str, recursive: bool = True) -> list[pafs.FileInfo]:
    system, path = filesystem(uri)
    with translated(uri):
        found: list[pafs.FileInfo] = system.get_file_info(
            pafs.FileSelector(path, recursive=recursive, allow_not_found=is_remote(uri))
        )
    if not found:
        _require_bucket(uri)
    return found


def _entries(uri: str, found: Iterable[pafs.FileInfo]) -> Iterator[FileEntry]:
    path = filesystem(uri)[1]
    for info in found:
        if info.is_file and not info.base_name.startswith(_PARTIAL):
            yield FileEntry(info.path.removeprefix(path).lstrip("/"), info.size)


def _chunks(uri: str) -> Iterator[bytes]:
    with open_input(uri) as stream:
        while chunk := stream.read(_CHUNK):
            yield chunk


def _sha256(uri: str) -> str:
    digest = hashlib.sha256()
    for chunk in _chunks(uri):
        digest.update(chunk)
    return digest.hexdigest()


# ---- writing


@persistent
def write_bytes(uri: str, data: bytes) -> None:
    """Write a file in one step: readers see the old content or the new one, whole. Local parent folders are made."""
    with open_output(uri) as stream:
        stream.write(data)


def write_text(uri: str, text: str) -> None:
    """Write a UTF-8 text file in one step, as ``write_bytes`` does."""
    write_bytes(uri, text.encode())


def delete_folder(uri: str, manifest_name: str | None = None) -> None:
    """Delete a folder and all below it, its manifest first; a missing folder is no error.

    On S3, pyarrow leaves an empty object in place of the parent folder; listings leave it out.
    """
    assert len(PurePosixPath(_split(uri)[1]).parts) > 1, f"{uri} is a whole storage"
    if manifest_name is not None:
        _delete_file(join(uri, manifest_name))
    _delete_all(uri)


@persistent
def _delete_all(uri: str) -> None:
    system, path = filesystem(uri)
    if _exists(uri):
        with translated(uri), suppress(FileNotFoundError):
            system.delete_dir(path)


@persistent
def _delete_file(uri: str) -> None:
    system, path = filesystem(uri)
    if _exists(uri):
        with translated(uri), suppress(FileNotFoundError):
            system.delete_file(path)


@contextmanager
def open_output(uri: str) -> Iterator[IO[bytes]]:
    """A file to write in order; it appears when the block ends."""
    system, path = filesystem(uri)
    with translated(uri):
        if is_remote(uri):
            # pyarrow can't abort: an error of the block's own leaves a short object, which no manifest lists.
            with system.open_output_stream(path) as stream:
                yield stream
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(_PARTIAL + uuid4().hex)
        try:
            with unfinished.open("xb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)


@persistent
def _copy(source: str, target: str) -> tuple[int, str]:
    """Copy a file between any two storages; returns its size and SHA-256."""
    digest, size = hashlib.sha256(), 0
    with open_output(target) as stream:
        for chunk in _chunks(source):
            digest.update(chunk)
            size += len(chunk)
            stream.write(chunk)
            stream.flush()  # waits for the parts under way, which would pile up in memory
    return size, digest.hexdigest()


# ---- published folders


def publish_folder(local: Path, uri: str, manifest_name: str, manifest: Mapping[str, object]) -> None:
    """Copy a local folder to a URI and then write its manifest, which makes it count.

    The manifest is the mapping given and, under "files", the size and SHA-256 of each file. Where files of an older
    folder are replaced, its manifest is taken away first, else it counts until the new one stands; the older folder's
    files that this one lacks stay there, unlisted.
    """
    assert "files" not in manifest
    names = sorted(path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file())
    names = [name for name in names if name != manifest_name]
    manifest_uri = join(uri, manifest_name)
    if exists(manifest_uri) and not {entry.path for entry in list_files(uri)}.isdisjoint(names):
        _delete_file(manifest_uri)
    with ThreadPoolExecutor(_THREADS) as pool:
        copies = list(pool.map(lambda name: _copy(str(local / name), join(uri, name)), names))
    files = {name: {"size": size, "sha256": sha256} for name, (size, sha256) in zip(names, copies, strict=True)}
    write_text(manifest_uri, _to_json({**manifest, "files": files}))


def read_manifest(uri: str, manifest_name: str) -> dict[str, object]:
    """The manifest of a published folder, whose files are there and have the right sizes.

    Raises:
        StorageError: the folder is not published, or a file is missing or damaged; the message names it.
    """
    text = read_text(join(uri, manifest_name))
    try:
        manifest: dict[str, object] = json.loads(text)
        files = _listed_files(manifest)
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(join(uri, manifest_name), "it is no manifest") from error
    sizes = {entry.path: entry.size for entry in list_files(uri)}
    for name, (size, _) in files.items():
        if sizes.get(name) != size:
            raise _damaged(join(uri, name), f"{sizes[name]} bytes, not {size}" if name in sizes else "it is missing")
    return manifest


def fetch_folder(uri: str, manifest_name: str, verify: bool = True, into: Path | None = None) -> Path:
    """A published folder as a local one: itself if it is local, else a copy in ``into``, or in the user's cache.

    The cache, ``$XDG_CACHE_HOME/raysseg`` or ``~/.cache/raysseg``, can be deleted at any time. ``verify`` holds files
    that are local already to their SHA-256; what is downloaded always is.

    Raises:
        StorageError: as ``read_manifest``, and where a file's SHA-256 is another one.
    """
    manifest = read_manifest(uri, manifest_name)
    files = _listed_files(manifest)
    cache = _cache(_to_json(manifest))  # the manifest holds the hashes of all files
    folder = (into or cache) if is_remote(uri) else Path(absolute(uri))

    def fetch(name: str) -> None:
        local, (size, sha256) = folder / name, files[name]
        if local.is_file() and local.stat().st_size == size and (not verify or _sha256(str(local)) == sha256):
            return
        # Once more where it came otherwise than it was published: the damage may have been done on the way here.
        if not is_remote(uri) or all(_copy(join(uri, name), str(local)) != (size, sha256) for _ in range(2)):
            raise _damaged(join(uri, name), "not the content that was published")

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(fetch, files))
    if is_remote(uri):
        write_text(str(folder / manifest_name), _to_json(manifest))
    return folder


def fetch_files(uri: str) -> Path:
    """Any folder as a local one: itself if it is local, else a copy in the user's cache, known by names and sizes.

    Raises:
        StorageError: there is no file in it.
    """
    if not is_remote(uri):
        return Path(absolute(uri))
    entries = list_files(uri)
    if not entries:
        raise StorageError(uri, "the folder is empty or missing", "Correct its name.")
    folder = _cache(f"{uri} {entries}")
    for entry in entries:
        local = folder / entry.path
        if not (local.is_file() and local.stat().st_size == entry.size):
            _copy(join(uri, entry.path), str(local))
    return folder


def _cache(content: str) -> Path:
    """The cache's folder for some content; it can be deleted at any time."""
    key = hashlib.sha256(content.encode()).hexdigest()[:32]
    return Path(_variable("XDG_CACHE_HOME") or "~/.cache").expanduser() / "raysseg" / key


def _listed_files(manifest: Mapping[str, object]) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 by file name; raises ValueError, TypeError or KeyError where the manifest is no manifest."""
    files = manifest["files"]
    if not isinstance(files, dict):
        raise TypeError("files is no mapping")
    if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in files):
        raise ValueError("a name leads out of the folder")
    return {name: (int(file["size"]), str(file["sha256"])) for name, file in files.items()}


def _to_json(manifest: Mapping[str, object]) -> str:
    return json.dumps(manifest, indent=2) + "\n"


def _damaged(uri: str, reason: str) -> StorageError:
    return StorageError(uri, f"damaged: {reason}", "Publish the folder again, or use another one.")


# ---- errors

_BUCKET = "Create it, or correct its name."
_KEYS = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE) to credentials of this storage."
_ALLOW = f"Allow it there, or change the credentials. {_KEYS} AWS_NO_SIGN_REQUEST makes requests anonymous."
_ROOM = "Free some space or use another storage, then run the same command again."
_ENDPOINT = "Check that it runs and can be reached from here; for S3, that AWS_ENDPOINT_URL_S3 is right."
_CERTIFICATE = "Set AWS_CA_BUNDLE to a file that holds the certificate of its authority."
_REPLACED = "it was replaced while it was read"
_LATER = "Run the same command again later."
_ELSEWHERE = "Use another storage, or make this one writable."

_ERRNO = {
    errno.ENOENT: ("there is no such file or folder", "Check the path."),
    errno.ENOTDIR: ("a part of the path is a file and no folder", "Check the path."),
    errno.EEXIST: ("a part of the path is a file and no folder", "Check the path."),
    errno.EISDIR: ("this is a folder and no file", "Check the path."),
    errno.ENOSPC: ("the storage is full", _ROOM),
    errno.EDQUOT: ("the storage is full: the quota is used up", _ROOM),
    errno.EFBIG: ("the storage is full: it takes no file of this size", _ROOM),
    errno.EROFS: ("the storage is read-only", _ELSEWHERE),
    errno.EACCES: ("permission denied", "Give this user access, or use another path."),
    errno.EPERM: ("permission denied", "Give this user access, or use another path."),
}

# What pyarrow's texts hold, the reason, the mend; the first that fits counts.
_TEXTS = (
    (r"NO_SUCH_BUCKET", "the bucket does not exist", _BUCKET),
    (r"INVALID_ACCESS_KEY_ID|INVALID_CLIENT_TOKEN", "the storage does not know the access key", _KEYS),
    (r"SIGNATURE_DOES_NOT_MATCH", "the secret key does not belong to the access key", _KEYS),
    (r"EXPIRED_?TOKEN|INVALID_?TOKEN", "the session token is not valid, or no longer", _KEYS),
    (r"TIME_TOO_SKEWED", "this machine's clock is wrong", "Set the clock."),
    (r"OAuth2 access token", "no credentials were found", "Set GOOGLE_APPLICATION_CREDENTIALS."),
    (r"QUOTA_?EXCEEDED|STORAGE_?FULL|status 507", "the storage is full", _ROOM),
    (r"PERMANENT_?REDIRECT|status 301|HeaderMalformed", "the bucket is in another region", "Set AWS_REGION to it."),
    (r"ACCESS_?DENIED|status 40[13]|PERMISSION_DENIED|UNAUTHENTICATED", "access is denied{operation}", _ALLOW),
    (r"METHOD_?NOT_?ALLOWED|status 405", "the storage does not allow this{operation}", _ELSEWHERE),
    (r"curl\D*(35|60|77)\b", "the certificate of {endpoint} is not trusted", _CERTIFICATE),
)
_TRANSIENT_TEXTS = (
    (r"status 416", _REPLACED, _LATER),  # there are fewer bytes than a moment ago
    (r"curl\D*6\b", "the host of {endpoint} can't be found", _ENDPOINT),
    (r"curl\D*7\b", "{endpoint} refuses the connection", _ENDPOINT),
    (r"curl\D*28\b", "{endpoint} does not answer in time", _ENDPOINT),
    (r"NETWORK_CONNECTION", "the connection to {endpoint} broke", _ENDPOINT),
    (r"REQUEST_?TIMEOUT|DEADLINE_EXCEEDED", "{endpoint} does not answer in time", _ENDPOINT),
    (r"NO_SUCH_UPLOAD", "the upload broke off", _LATER),  # or it was done, and the answer was lost
    (r"SLOW_?DOWN|THROTTL|TOO_?MANY_?REQUESTS|status 429", "{endpoint} has too much to do{operation}", _LATER),
    (r"INTERNAL_?(FAILURE|ERROR)|status 5\d\d|UNAVAILABLE|OPERATION_?ABORTED", "{endpoint} fails{operation}", _LATER),
)


@contextmanager
def translated(uri: str) -> Iterator[None]:
    """Turn the errors of file systems into a StorageError that says what is wrong with this URI and how to mend it."""
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        if isinstance(error, FileNotFoundError):
            _require_bucket(uri)
        raise _explained(uri, error) from error


def _require_bucket(uri: str) -> None:
    """Raise a StorageError if the bucket is missing, which pyarrow takes for an empty one, or for a missing file."""
    system, path = filesystem(uri)
    bucket = path.partition("/")[0]
    with suppress(OSError):  # not everyone may ask
        if is_remote(uri) and system.get_file_info(bucket).type == pafs.FileType.NotFound:
            raise StorageError(uri, f"the bucket {bucket} does not exist", _BUCKET)


def _explained(uri: str, error: Exception) -> StorageError:
    if isinstance(error, OSError) and error.errno in _ERRNO:
        return StorageError(uri, *_ERRNO[error.errno])
    text = _text(uri, error)
    operation = re.search(r"during (\w+) operation", text)
    facts = {
        "endpoint": (_s3_endpoint() or "AWS") if uri.startswith("s3:") else "the storage",
        "operation": f" ({operation[1]})" if operation else "",
    }
    for texts in (_TEXTS, _TRANSIENT_TEXTS):
        for pattern, reason, mend in texts:
            if re.search(pattern, text, re.IGNORECASE):
                return StorageError(uri, reason.format(**facts), mend, is_transient=texts is _TRANSIENT_TEXTS)
    return StorageError(uri, text.rstrip("."), "Check the URI, and the storage's own log.")


def _text(uri: str, error: Exception) -> str:
    """What the storage says; where a HEAD request failed, which names no cause, what it says to a listing."""
    if "No response body" in str(error):
        system, path = filesystem(uri)
        try:
            system.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        except OSError as explicit:
            error = explicit
    return str(error).rpartition("AWS Error ")[2]
