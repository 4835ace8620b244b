"""Any job file as a job of a Ray cluster: packed, sent, followed to its own result and exit code.

The driver runs on the head node, holds no resources and sees no GPU. What it is sent is the job's files and the values
of the environment variables that they name; secrets stay where they are, on the cluster.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysseg import config, storage
from raysseg.config import Job, TuneJob
from raysseg.schema import InputError, JobEnded

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

_STOP_S = 300  # for a checkpoint, after which Ray ends a job that is to stop
_SILENT_S = 300.0  # for which a cluster may not answer
_AGAIN_S = 2.0
_STOPPED = 128 + 15


@dataclass(frozen=True)
class Submission:
    """What is sent to a cluster.

    Attributes:
        path: of the job file: in the folder that goes along, or a remote URI.
        overrides: `dotted.key=value`.
        variables: environment variables that go along with their values, which whoever reaches the cluster can read.
        secrets: names of those that the machine of the driver must have by itself.
        code: whether this installation's raysseg goes along, in place of the cluster's.
    """

    path: str
    overrides: Sequence[str] = ()
    variables: Sequence[str] = ()
    secrets: Sequence[str] = ()
    code: bool = False


@dataclass(frozen=True)
class Ended:
    """A job that has come to its end.

    Attributes:
        job_id: Ray's.
        status: SUCCEEDED, FAILED or STOPPED.
        result: what the verb prints with --json; null: it printed none.
    """

    job_id: str
    status: str
    result: dict[str, Any] | None


class Cluster:
    """A Ray cluster, by its dashboard.

    Args:
        address: such as http://head:8265; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or this machine's.

    Raises:
        InputError: nothing answers there, or it lets nobody in without its token.
    """

    def __init__(self, address: str | None = None) -> None:
        if _has_token():
            os.environ.setdefault("RAY_AUTH_MODE", "token")  # before Ray is loaded, which else asks without it
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        try:
            self._client: JobSubmissionClient = JobSubmissionClient(address)
        except AuthenticationError as error:
            raise InputError(
                "the cluster wants its token, as `ray get-auth-token` prints it on the head: set RAY_AUTH_TOKEN, or "
                f"write it to ~/.ray/auth_token; it answers: {str(error).splitlines()[0]}"
            ) from error
        except (ConnectionError, RuntimeError, ValueError) as error:
            named = (os.environ.get(name) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"))
            where = address or next(filter(None, named), "this machine")
            raise InputError(
                f"--address: no Ray dashboard answers at {where}: {error}; give the head's, such as http://head:8265, "
                "or forward its port 8265 to here"
            ) from error

    def submit(self, submission: Submission) -> str:
        """Sends a job; returns its id.

        Raises:
            InputError: the job is at fault, or can't run on a cluster as it is.
        """
        with pack(submission) as packed:
            job = packed.job
            environment: dict[str, Any] = {"env_vars": packed.variables}
            if any(packed.folder.iterdir()):
                environment["working_dir"] = str(packed.folder)
            if submission.code:
                environment |= {"py_modules": [str(Path(__file__).parent)], "excludes": ["__pycache__"]}
            job_id: str = self._client.submit_job(
                entrypoint=to_entrypoint(job.kind, packed.entry, submission.overrides, submission.secrets),
                submission_id=f"{job.name}-{secrets.token_hex(3)}",
                runtime_env=environment,
                metadata={"raysseg": f"{job.kind} {job.name}"},
            )
        return job_id

    def follow(self, job_id: str, write: Callable[[str], object]) -> Ended:
        """Hands on a job's log until the job ends, and keeps the result back that the log ends with.

        Raises:
            JobEnded: it failed or was stopped; with its own exit code.
            InputError: there is no such job, or the cluster has not answered for minutes.
        """
        self._details(job_id)
        log = Log(write)
        details = asyncio.run(self._followed(job_id, log))
        if details.status == "SUCCEEDED":
            return Ended(job_id, "SUCCEEDED", log.result())
        log.release()
        if details.status == "STOPPED":
            raise JobEnded(f"{job_id} was stopped; submitted again, it goes on from its last checkpoint", _STOPPED)
        code = details.driver_exit_code
        raise JobEnded(f"{job_id} failed{'' if code else f': {details.message}'}", code if code and code > 0 else 1)

    def stop(self, job_id: str) -> None:
        """Asks a job to save and end; see follow for when it has.

        Raises:
            InputError: there is no such job.
        """
        self._details(job_id)
        self._client.stop_job(job_id)

    def jobs(self) -> list[dict[str, Any]]:
        """The cluster's submitted jobs, the newest first: id, job, status, started (seconds since 1970), seconds."""
        details = [one for one in self._client.list_jobs() if one.submission_id is not None]
        return [_row(one) for one in sorted(details, key=lambda one: -(one.start_time or 0))]

    def _details(self, job_id: str) -> JobDetails:
        try:
            return self._client.get_job_info(job_id)
        except RuntimeError as error:
            if "404" not in str(error):
                raise
            raise InputError(f"{job_id}: the cluster knows no such job; `raysseg submit --list` names them") from error

    async def _followed(self, job_id: str, log: Log) -> JobDetails:
        import aiohttp

        silent_since: float | None = None
        while True:
            try:
                log.rewind()
                async for text in self._client.tail_job_logs(job_id):
                    log.take(text)
                    silent_since = None
                details = await asyncio.to_thread(self._client.get_job_info, job_id)
                if details.status.is_terminal():
                    return details
                silent_since = None
            except (RuntimeError, ConnectionError, aiohttp.ClientError) as error:
                silent_since = silent_since or time.monotonic()
                if time.monotonic() - silent_since > _SILENT_S:
                    raise InputError(
                        f"the cluster has not answered for {_SILENT_S:.0f} s: {error}; the job may be running all the "
                        f"same: `raysseg submit --follow {job_id}`"
                    ) from error
            await asyncio.sleep(_AGAIN_S)


def _has_token() -> bool:
    """Whether Ray would find a token to give to a cluster."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")
    return "RAY_AUTH_TOKEN" in os.environ or Path(path).expanduser().is_file()


def to_entrypoint(kind: str, entry: str, overrides: Sequence[str], needed: Sequence[str]) -> str:
    """The shell's line that runs a job: it asks for the secrets first, and sees no GPU."""
    missing = "is a secret of the cluster, and not set where the driver runs"
    asks = [f': "${{{name}:?{missing}}}" && ' for name in needed]
    command = shlex.join(["python", "-m", "raysseg.cli", kind, entry, *overrides, "--json"])
    return f"{''.join(asks)}CUDA_VISIBLE_DEVICES= exec {command}"


# --- what goes along ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """A job that can be sent.

    Attributes:
        folder: with the files that it is read from; empty where those are remote.
        entry: the job file: its path in there, or its URI.
        job: as its driver will read it.
        variables: the environment that goes along.
    """

    folder: Path
    entry: str
    job: Job
    variables: dict[str, str]


@contextmanager
def pack(submission: Submission) -> Iterator[Packed]:
    """Gathers what goes along with a job, for as long as the block lasts.

    Raises:
        InputError: the job is at fault, or can't run on a cluster as it is.
    """
    with tempfile.TemporaryDirectory(prefix="raysseg-submit-") as temporary:
        folder = Path(temporary).resolve()
        files = config.files(submission.path, submission.overrides)
        local = [Path(os.path.normpath(storage.absolute(file))) for file in files if not storage.is_remote(file)]
        above = Path(os.path.commonpath([file.parent for file in local])) if local else Path()
        for file in local:
            copy = folder / file.relative_to(above)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        is_remote = storage.is_remote(submission.path)
        entry = submission.path if is_remote else str(local[0].relative_to(above))
        yield Packed(folder, entry, _checked(folder, entry, submission.overrides), _variables(files, submission))


def _checked(folder: Path, entry: str, overrides: Sequence[str]) -> Job:
    """The job as its driver will read it, in that folder: what it names by a relative path would not be there."""
    with chdir(folder):
        job = config.load(entry, overrides)
        looked_at: list[tuple[str, Any]] = [("", job.model_dump(mode="json"))]
        if isinstance(job, TuneJob):
            train = {"kind": "train", "name": job.name, "storage": job.storage, **job.train}
            looked_at.append(("train.", config.parse(train, entry).model_dump(mode="json")))
    strays = [(f"{top}{key}", value) for top, dump in looked_at for key, value in _strings(dump)]
    lines = [
        f"{entry}: {key}: {Path(value).relative_to(folder)} is a path of this machine; the cluster reads s3:// and "
        "gs:// URIs, and absolute paths that all of its machines share"
        for key, value in dict(strays).items()
        if value.startswith(f"{folder}/")
    ]
    if getattr(getattr(job, "scaling", None), "in_process", False):
        lines.append(f"{entry}: scaling.workers: received 0, which runs the job within its driver; give 1 or more")
    if getattr(job, "local", False):
        lines.append(f"{entry}: local: received true, which serves from the driver; leave it out")
    if lines:
        raise InputError("\n".join(lines))
    return job


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text below a value, with its dotted key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping | list):
        parts = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, part in parts:
            yield from _strings(part, f"{key}.{name}".lstrip("."))


def _variables(files: Sequence[str], submission: Submission) -> dict[str, str]:
    """Those that the job's files name and that are set here, and those that were asked for."""
    for name in (*submission.variables, *submission.secrets):
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise InputError(f"--env, --secret: received {name!r}; allowed: the name of an environment variable")
    unset = [name for name in submission.variables if name not in os.environ]
    if unset:
        raise InputError(f"--env {unset[0]}: not set here; set it, or take --secret for one that the cluster has")
    texts = [*map(storage.read_text, files), *submission.overrides]
    named = {name for text in texts for name in config.variables(text)} - set(submission.secrets)
    going = {name: os.environ[name] for name in sorted({*named, *submission.variables}) if name in os.environ}
    return {**going, "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_S)}


# --- what comes back ----------------------------------------------------------------------------------------------


@dataclass
class Log:
    """A job's log, which is handed on as it comes, once, less the JSON object that it ends with."""

    write: Callable[[str], object]
    """Called with lines."""
    _seen: int = 0
    _position: int = 0
    _line: str = ""
    _held: list[str] = field(default_factory=list)

    def rewind(self) -> None:
        """What comes next is the log from its beginning: so much of it is known."""
        self._position = 0

    def take(self, text: str) -> None:
        """The next piece of it."""
        fresh = text[max(0, self._seen - self._position) :]
        self._position += len(text)
        self._seen = max(self._seen, self._position)
        *lines, self._line = (self._line + fresh).split("\n")
        for line in lines:
            self._take(line)

    def _take(self, line: str) -> None:
        if line == "{":
            self.release()
        if line == "{" or (self._held and self._held[-1] != "}"):
            self._held.append(line)
        else:
            self.write(f"{line}\n")

    def release(self) -> None:
        """What was held back is no result."""
        for line in self._held:
            self.write(f"{line}\n")
        self._held = []

    def result(self) -> dict[str, Any] | None:
        """The object that the log ends with; the log is over."""
        if self._line:
            self._take(self._line)
        try:
            found: dict[str, Any] = json.loads("\n".join(self._held))
        except json.JSONDecodeError:
            self.release()
            return None
        return found


def _row(details: JobDetails) -> dict[str, Any]:
    started, ended = details.start_time, details.end_time
    return {
        "id": details.submission_id,
        "job": (details.metadata or {}).get("raysseg", details.entrypoint),
        "status": str(details.status.value),
        "started": None if started is None else started / 1000,
        "seconds": None if started is None else round((ended or time.time() * 1000) / 1000 - started / 1000, 1),
    }


def write_log(text: str) -> None:
    """To stderr, as a local run's log."""
    sys.stderr.write(text)
    sys.stderr.flush()
