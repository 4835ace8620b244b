"""The study of a search: Optuna's, kept on the run's storage. No Ray, no torch."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend, JournalFileOpenLock
from optuna.study import StudyDirection

from raysseg import storage
from raysseg.config import TuneJob
from raysseg.schema import InputError
from raysseg.search import build_pruner, quiet
from raysseg.storage import StorageError

_PAUSE_S = 30.0  # for which a storage that went away is left alone

logger = logging.getLogger(__name__)


def open_study(job: TuneJob) -> optuna.Study:
    """The study `job.name` in <run>/study.log, a journal of Optuna's; made where there is none.

    Locally, that file is written; on other storage it is put whole after each change. Nobody else may write it.

    Raises:
        InputError: its file is damaged.
        StorageError: the storage refuses.
    """
    uri = storage.join(job.run_uri, "study.log")
    journal = _RemoteJournal(uri) if storage.is_remote(uri) else _local_journal(uri)
    try:
        journal_storage = JournalStorage(journal)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{uri}: damaged: {error}. Delete the folder, or give the job another name.") from error
    with quiet():
        if job.name in optuna.get_all_study_names(journal_storage):
            return optuna.load_study(study_name=job.name, storage=journal_storage, pruner=build_pruner(job))
        directions = [_direction(objective.mode) for objective in job.objectives]
        study = optuna.create_study(
            study_name=job.name, storage=journal_storage, directions=directions, pruner=build_pruner(job)
        )
        study.set_metric_names([objective.metric for objective in job.objectives])
        return study


def close_study(study: optuna.Study) -> None:
    """Puts what a storage that went away has not got yet.

    Raises:
        StorageError: it is still away, or refuses.
    """
    journal = _remote_journal(study)
    if journal is not None:
        journal.flush()


@contextmanager
def together(study: optuna.Study) -> Iterator[None]:
    """The changes of the block reach a remote storage in one go."""
    journal = _remote_journal(study)
    if journal is None:
        yield
        return
    journal.is_held = True
    try:
        yield
    finally:
        journal.is_held = False
        journal.save()


def _remote_journal(study: optuna.Study) -> _RemoteJournal | None:
    journal = study._storage._backend if isinstance(study._storage, JournalStorage) else None
    return journal if isinstance(journal, _RemoteJournal) else None


def _direction(mode: str) -> StudyDirection:
    return StudyDirection.MAXIMIZE if mode == "max" else StudyDirection.MINIMIZE


class _NoLock(JournalFileOpenLock):
    """The search is the only writer, and a lock file would outlive a kill."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


class _LocalJournal(JournalFileBackend):
    """A local file, whose errors are a StorageError."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with storage.translated(self._file_path):
            super().append_logs(logs)


def _local_journal(uri: str) -> _LocalJournal:
    path = Path(storage.absolute(uri))
    with storage.translated(uri):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            os.truncate(path, len(_whole_lines(path.read_bytes())))
        return _LocalJournal(str(path), _NoLock(str(path)))


class _RemoteJournal(BaseJournalBackend):
    """A journal in memory, in the format of Optuna's file, and put whole after each change.

    A storage that goes away does not end the search: it is tried again with a change half a minute later, and by
    `flush`.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._content = _whole_lines(storage.read_bytes(uri)) if storage.exists(uri) else b""
        self._logs: list[dict[str, Any]] | None = None
        self._is_saved = True
        self._not_before = 0.0
        self.is_held = False

    def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
        if self._logs is None:
            self._logs = [json.loads(line) for line in self._content.splitlines()]
        return self._logs[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = [json.dumps(log, separators=(",", ":")) for log in logs]
        self.read_logs(0)
        assert self._logs is not None
        self._logs += [json.loads(line) for line in lines]
        self._content += "".join(f"{line}\n" for line in lines).encode()
        self._is_saved = False
        self.save()

    def save(self) -> None:
        """Puts what is not on storage yet, unless changes are held back or the storage has just failed."""
        if self.is_held or time.monotonic() < self._not_before:
            return
        try:
            self.flush()
        except StorageError as error:
            if not error.is_transient:
                raise
            self._not_before = time.monotonic() + _PAUSE_S
            logger.warning("the study is not saved yet; once more with a later change: %s", error)

    def flush(self) -> None:
        """Puts what is not on storage yet."""
        if not self._is_saved:
            storage.write_bytes(self._uri, self._content)
            self._is_saved = True


def _whole_lines(content: bytes) -> bytes:
    """Less a last line that a kill has cut off: the next one would be joined to it, and Optuna read neither."""
    return content[: content.rfind(b"\n") + 1]
