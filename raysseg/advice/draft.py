"""The job that `raysseg recommend --write-job` writes."""

from __future__ import annotations

from collections.abc import Iterator

from raysseg.advice.amounts import in_gib
from raysseg.advice.estimates import Cost
from raysseg.advice.recommend import Ranked, Recommendation
from raysseg.findings.advice import Start, to_train_job, to_yaml
from raysseg.findings.fingerprint import Choice, Fingerprint, Tree
from raysseg.schema import InputError


def to_job(answer: Recommendation, found: Fingerprint | None) -> str:
    """A complete job for the first model, YAML with the reasons as comments: to train it, or to serve one with prompts.

    Raises:
        InputError: every model is ruled out, or there are no data to train on.
    """
    if not answer.models:
        raise InputError("--write-job: every model is ruled out; see what brings them back")
    best = answer.models[0]
    lines = [f"{reason.points:+d}  {reason.reason} ({reason.source})" for reason in best.reasons]
    licence = [f"Licence of the weights: {best.licence}."] if best.licence else []
    reason = "\n".join([f"{best.points} points:", *lines, *licence])
    if answer.task == "prompt":
        return _to_serve_job(best, reason)
    if found is None:
        raise InputError("--write-job: a train job wants data: name a fingerprint.json, a folder or an inspect job")
    start = Start(
        answer.task, best.name, best.weights, reason, "recommend", list(_choose_batch(best.cost)), answer.remarks
    )
    return to_train_job(found, start, storage="runs")


def _to_serve_job(best: Ranked, reason: str) -> str:
    http: Tree = {"host": "127.0.0.1", "port": 8000}
    models: Tree = {"sam": {"prompt": best.name, "weights": best.weights}}
    comments = {
        "kind": "Written by `raysseg recommend`; run it with `raysseg serve`, change what you know better.",
        "models.sam": reason,
        "http": "Beyond this machine: host: 0.0.0.0, and token_variable.",
    }
    return to_yaml({"kind": "serve", "name": "prompts", "models": models, "http": http}, comments)


def _choose_batch(cost: Cost | None) -> Iterator[Choice]:
    if cost is None or cost.batch is None:
        yield Choice("batch.per_worker", "auto", "As many as fit, worked out when training starts; see `raysseg plan`.")
    else:
        text = f"Takes about {in_gib(cost.training_bytes(cost.batch))}, by estimate; see `raysseg plan`."
        yield Choice("batch.per_worker", cost.batch, text)
