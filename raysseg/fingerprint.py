"""`raysseg inspect`: one pass over a data set, spread over the cluster, to its fingerprint and its page."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from itertools import chain

from raysseg.config import InspectJob
from raysseg.data import FORMATS, read_class_map
from raysseg.findings.facts import SampleFacts
from raysseg.findings.kinds import Finding, to_findings
from raysseg.findings.reading import Task, iter_share, open_index, sorted_facts, unpaired
from raysseg.findings.rules import flag_all
from raysseg.findings.summary import SplitFacts, summarise
from raysseg.runtime import num_shares, spread
from raysseg.schema import ClassMap

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InspectResult:
    """What `raysseg inspect` prints."""

    name: str
    findings: list[Finding]
    splits: list[SplitFacts]


def inspect(job: InspectJob) -> InspectResult:
    """Looks at a data set."""
    indices = {name: open_index(source) for name, source in job.splits.items()}
    source = next(iter(job.splits.values()))
    has_words = job.classes is not None or FORMATS[source.format].read_vocabulary(source) is not None
    classes = read_class_map(job.classes, source) if has_words else None
    task = Task(indices, classes, num_shares(job.scaling))
    facts = [sample for name, index in indices.items() for sample in unpaired(name, index)]
    for part in spread(iter_share, task, range(task.num_shares), job.scaling):
        facts += part
    facts = sorted_facts(facts)
    classes = classes or derive_classes(facts)
    splits = {name: [sample for sample in facts if sample.split == name] for name in indices}
    findings = to_findings(flag_all(splits, classes), {name: len(part) for name, part in splits.items()})
    return InspectResult(job.name, findings, [summarise(name, part, classes) for name, part in splits.items()])


def derive_classes(facts: list[SampleFacts]) -> ClassMap:
    """The ids that label images hold as classes, 255 as ignored, where nobody says what they mean."""
    found = set(chain.from_iterable(sample.labels.ids.tolist() for sample in facts if sample.labels))
    ids = sorted(found - {255}) or [0]
    return replace(read_class_map([str(i) for i in ids]), ids=tuple(ids), ignore_index=255)
