"""`raysseg inspect`: one pass over a data set, spread over the cluster, to its fingerprint and its page."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain

from raysseg import storage
from raysseg.config import InspectJob
from raysseg.data import FORMATS, read_class_map
from raysseg.data.classes import to_categories, to_class_list
from raysseg.findings.advice import START, advise, to_train_job, to_tree
from raysseg.findings.facts import SampleFacts
from raysseg.findings.fingerprint import Fingerprint
from raysseg.findings.kinds import Finding, to_findings
from raysseg.findings.page import InspectPage, picked, render
from raysseg.findings.pictures import Wanted, iter_shots
from raysseg.findings.reading import Task, iter_share, open_index, unpaired
from raysseg.findings.rules import flag_all
from raysseg.findings.store import FactStore
from raysseg.findings.summary import summarise
from raysseg.report import Picture
from raysseg.runtime import num_shares, spread
from raysseg.schema import ClassMap, InputError

logger = logging.getLogger(__name__)

_PROGRESS = 500  # samples between two lines of the log


@dataclass(frozen=True)
class InspectResult:
    """What `raysseg inspect` prints.

    Attributes:
        fingerprint: of the data set.
        train_job: a job file to train on it, YAML.
        run: the folder of fingerprint.json.
        report: the page.
    """

    fingerprint: Fingerprint
    train_job: str
    run: str
    report: str


def inspect(job: InspectJob) -> InspectResult:
    """Looks at every sample once, and writes fingerprint.json and the page to <storage>/<name>.

    The same for any number of workers, to the byte: facts are sorted by their places before anything follows from them.

    Raises:
        InputError: a source or the class list can't be read at all; what is wrong with samples is a finding.
        StorageError: a source can't be reached.
    """
    indices = {name: open_index(source) for name, source in job.splits.items()}
    listed = _listed_classes(job)
    task = Task(indices, listed, num_shares(job.scaling))
    facts = _look(job, task)
    classes = listed or derive_classes(facts)
    splits = {name: facts.split(name) for name in indices}
    findings = to_findings(flag_all(splits, classes), {name: len(part) for name, part in splits.items()})
    summaries = [summarise(name, part, classes) for name, part in splits.items()]
    advice = advise(summaries[0], findings)
    fingerprint = Fingerprint(
        name=job.name,
        task=job.task,
        classes=to_categories(classes),
        ignore_index=classes.ignore_index,
        data={split: to_tree(source) for split, source in job.splits.items()},
        listed=_classes_to_train(job, listed, classes),
        splits=summaries,
        findings=findings,
        advice=advice,
    )
    pictures = _draw(job, replace(task, classes=classes), facts, findings)
    page = InspectPage(job.name, job.task, classes, summaries, findings, advice, pictures)
    report_uri = storage.join(job.run_uri, "report.html")
    storage.write_text(storage.join(job.run_uri, "fingerprint.json"), json.dumps(asdict(fingerprint), indent=1))
    storage.write_text(report_uri, render(page))
    scaling = job.scaling.model_dump(mode="json", exclude_defaults=True)
    train_job = to_train_job(
        fingerprint,
        START,
        storage=job.storage if storage.is_remote(job.storage) else "runs",
        scaling=scaling if any(value not in (None, 0) for value in scaling.values()) else None,
    )
    return InspectResult(fingerprint, train_job, job.run_uri, report_uri)


def derive_classes(facts: Iterable[SampleFacts]) -> ClassMap:
    """The ids that label images hold as classes, 255 as ignored, where nobody says what they mean."""
    found = set(chain.from_iterable(sample.labels.ids.tolist() for sample in facts if sample.labels))
    ids = sorted(found - {255}) or [0]
    return replace(read_class_map([str(i) for i in ids]), ids=tuple(ids), ignore_index=255)


def _listed_classes(job: InspectJob) -> ClassMap | None:
    """The class list of the job or of the data set, None where neither has one."""
    source = next(iter(job.splits.values()))
    if job.classes is None and FORMATS[source.format].read_vocabulary(source) is None:
        return None
    return read_class_map(job.classes, source)


def _look(job: InspectJob, task: Task) -> FactStore:
    """The facts of all samples."""
    blocks = [unpaired(name, index) for name, index in task.indices.items()]
    total, seen, reported = sum(map(len, task.indices.values())), 0, 0
    for block in spread(iter_share, task, range(task.num_shares), job.scaling):
        blocks.append(block)
        seen += block.number
        if seen - reported >= _PROGRESS:
            reported = seen
            logger.info("inspect: %d of %d samples", seen, total)
    if not total:
        raise InputError("data: the source holds no sample; is it the right one?")
    return FactStore(blocks)


def _draw(
    job: InspectJob, task: Task, facts: Iterable[SampleFacts], findings: Sequence[Finding]
) -> Mapping[tuple[int, str], Picture]:
    """Pictures of some samples of each finding, by the finding's place and the sample's id."""
    shown = {(finding.split, finding.sample_ids[i]) for finding in findings for i in picked(finding)}
    keys = ((sample.split, sample.sample_id, sample.row) for sample in facts if sample.row >= 0)
    rows = {(split, sample_id): row for split, sample_id, row in keys if (split, sample_id) in shown}
    wanted: dict[Wanted, list[tuple[int, str]]] = {}
    for place, finding in enumerate(findings):
        for i in picked(finding):
            key = (finding.split, finding.sample_ids[i])
            if key in rows:
                item = Wanted(finding.split, rows[key], finding.segments[i])
                wanted.setdefault(item, []).append((place, finding.sample_ids[i]))
    items = list(wanted)
    shots = spread(iter_shots, task, [items[share :: task.num_shares] for share in range(task.num_shares)], job.scaling)
    return {key: shot.picture for shot in shots for key in wanted[shot.wanted]}


def _classes_to_train(job: InspectJob, listed: ClassMap | None, classes: ClassMap) -> str | list[str] | None:
    """The class list for a train job; one that nobody has written yet goes beside the fingerprint."""
    if listed is not None:
        return list(job.classes) if isinstance(job.classes, tuple) else job.classes
    uri = storage.join(job.run_uri, "classes.json")
    storage.write_text(uri, json.dumps(to_class_list(classes), indent=1))
    return uri
