"""raysseg <verb> job.yaml [dotted.key=value ...]: reads the job first, imports the stage afterwards."""

from __future__ import annotations

import argparse
import json
import math
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysseg.schema import InputError, JobEnded, RunStopped

if TYPE_CHECKING:
    from raysseg.config import Job
    from raysseg.findings.fingerprint import Fingerprint

JOB_VERBS = {
    "train": "train a model, or go on with a run that stopped",
    "tune": "search a train job's settings, or go on with a search that stopped",
    "plan": "what a train job takes: memory, batch, time and cost on GPUs, before any is rented",
    "evaluate": "score a bundle, or stored predictions, over a data set",
    "predict": "segment images with a bundle: COCO, PNG masks, COCO panoptic or shards",
    "serve": "answer requests over HTTP with bundles and prompted models, and show the playground",
    "inspect": "what a data set holds, what is wrong with it and what to do about it; also: IMAGES MASKS, or FOLDER",
    "shard": "write a data set as Parquet shards, or --to another format",
    "export": "write a bundle as an ONNX graph; also: export BUNDLE OUT.onnx",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns 0 when done, 2 for what the user can mend, 1 for a bug, 128 and more after a signal."""
    options = _parser().parse_args(arguments)
    try:
        with redirect_stdout(sys.stderr):  # what libraries print, and Ray's workers, is no result
            result = _run(options)
    except InputError as error:
        print(f"raysseg: {error}", file=sys.stderr)
        return 2
    except RunStopped as stop:
        print(f"raysseg: stopped: {stop.message}", file=sys.stderr)
        return 128 + stop.signal
    except JobEnded as ended:
        print(f"raysseg: {ended.message}", file=sys.stderr)
        return ended.exit_code
    except KeyboardInterrupt:
        print("raysseg: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except Exception:
        traceback.print_exc()
        print("raysseg: this is a bug; please report it with the lines above", file=sys.stderr)
        return 1
    if result is not None:
        print(json.dumps(_jsonable(result), indent=2) if options.json else _as_text(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="raysseg", description="Image segmentation on a Ray cluster.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, help_text in JOB_VERBS.items():
        part = verbs.add_parser(verb, help=help_text)
        more = {"inspect": ", or a folder", "export": ", or a bundle"}.get(verb, "")
        part.add_argument("job", help=f"job file: YAML, local or s3://{more}")
        part.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="wins over the file")
        part.add_argument("--json", action="store_true", help="print the result as one JSON object")
        if verb == "shard":
            part.add_argument("--to", metavar="FORMAT", help="output.format: shards, masks, coco or coco_panoptic")
        if verb == "inspect":
            part.add_argument("--write-job", metavar="PATH", help="write a train job that follows the advice")
        if verb == "plan":
            _add_plan(part)
    _add_recommend(verbs.add_parser("recommend", help="which model to begin with, why, and what it costs"))
    _add_submit(verbs.add_parser("submit", help="run any job file on a Ray cluster, and follow it to its end"))
    example = verbs.add_parser("example", help="draw the example data set, for all three tasks")
    example.add_argument("out", type=Path, help="folder to write")
    example.add_argument("--train", type=int, default=160, help="training scenes (default: %(default)s)")
    example.add_argument("--val", type=int, default=40, help="validation scenes (default: %(default)s)")
    example.add_argument("--size", type=int, nargs=2, default=(192, 256), metavar=("HEIGHT", "WIDTH"))
    example.add_argument("--seed", type=int, default=0)
    example.add_argument("--json", action="store_true", help="print the result as one JSON object")
    schema = verbs.add_parser("schema", help="print the JSON Schema of job files, for editors")
    schema.set_defaults(json=True)
    return parser


def _add_recommend(part: argparse.ArgumentParser) -> None:
    what = (
        "fingerprint.json, IMAGES MASKS, a folder of both, or an inspect job's file; dotted.key=value changes that job"
    )
    part.add_argument("data", nargs="*", metavar="DATA", help=what)
    part.add_argument("--task", choices=("semantic", "instance", "panoptic", "prompt"))
    part.add_argument("--priority", choices=("accuracy", "speed", "small-objects", "interactive"))
    part.add_argument("--use-case", choices=("medical", "driving", "editing", "inspection"))
    part.add_argument("--gpu-memory", metavar="SIZE", help="models that can't be trained in it are ruled out: 12GiB")
    part.add_argument("--latency", metavar="TIME", help="models that take longer an image are ruled out: 50ms")
    part.add_argument("--gpu", metavar="NAME", help="whose memory and speed count")
    part.add_argument("--write-job", metavar="PATH", help="write a job for the first one: to train it, or to serve SAM")
    part.add_argument("--json", action="store_true", help="print the result as one JSON object")


def _add_plan(part: argparse.ArgumentParser) -> None:
    part.add_argument("--gpu", metavar="NAME", help="plan for this GPU alone, such as A10G (default: all known ones)")
    part.add_argument("--memory", metavar="SIZE", help="of a GPU that is not known, such as 24GiB")
    part.add_argument("--workers", type=int, metavar="N", help="a GPU each (default: the job's)")
    part.add_argument("--price", type=float, metavar="DOLLARS", help="of a GPU, an hour (default: about what it costs)")
    part.add_argument(
        "--measure", action="store_true", help="train ten steps where the job would run, and throw them away"
    )


def _add_submit(part: argparse.ArgumentParser) -> None:
    what = part.add_mutually_exclusive_group(required=True)
    what.add_argument("job", nargs="?", help="job file of any kind: YAML, local or s3://")
    what.add_argument("--list", action="store_true", help="the cluster's jobs, the newest first")
    what.add_argument("--follow", metavar="ID", help="the log of a job from its beginning, to its end")
    what.add_argument("--stop", metavar="ID", help="let a job save and end")
    part.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="wins over the file")
    part.add_argument("--address", metavar="URL", help="the head's dashboard, such as http://head:8265")
    part.add_argument("--no-wait", action="store_true", help="print the job's id, and do not wait for its end")
    part.add_argument(
        "--env", action="append", default=[], metavar="NAME", help="an environment variable that goes along, readably"
    )
    part.add_argument(
        "--secret", action="append", default=[], metavar="NAME", help="one that the cluster must have, and keeps"
    )
    part.add_argument("--code", action="store_true", help="send this installation's raysseg along, too")
    part.add_argument("--json", action="store_true", help="print the result as one JSON object")


def _run(options: argparse.Namespace) -> dict[str, Any] | None:
    if options.verb == "schema":
        from raysseg import config

        return config.json_schema()
    if options.verb == "example":
        from raysseg.data.example import draw_example

        draw_example(
            options.out, num_train=options.train, num_val=options.val, size=tuple(options.size), seed=options.seed
        )
        return {"data": str(options.out.resolve()), "train": options.train, "val": options.val, "seed": options.seed}
    if options.verb == "submit":
        return _submit(options)
    if options.verb == "recommend":
        return _recommend(options)
    overrides = [*options.overrides, *([f"output.format={options.to}"] if getattr(options, "to", None) else [])]
    job = _load_job(options.verb, options.job, overrides)
    from raysseg.runtime import log_to_stderr

    log_to_stderr()
    if options.verb == "plan":
        return {"kind": "plan", **_plan(job, options)}
    return {"kind": job.kind, **_run_job(job, getattr(options, "write_job", None))}


def _plan(job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """Plans a train job, or the one that a search varies."""
    from raysseg import config
    from raysseg.advice.plan import Ask, plan

    train_job = job.train_job({}) if isinstance(job, config.TuneJob) else job
    assert isinstance(train_job, config.TrainJob)
    planned = asdict(plan(train_job, Ask(options.gpu, options.memory, options.workers, options.price)))
    if not options.measure:
        return planned
    from raysseg.rehearsal import rehearse

    return {**planned, "trial": asdict(rehearse(train_job))}


def _submit(options: argparse.Namespace) -> dict[str, Any]:
    """Sends a job, or looks after one that was sent."""
    from raysseg.submit import Cluster, Submission, write_log

    cluster = Cluster(options.address)
    if options.list:
        return {"jobs": cluster.jobs()}
    job_id = options.follow or options.stop
    if options.stop:
        cluster.stop(job_id)
    elif not options.follow:
        job_id = cluster.submit(
            Submission(options.job, options.overrides, options.env, options.secret, code=options.code)
        )
        write_log(f"raysseg: {job_id} is submitted; Ctrl-C leaves it running\n")
    if options.no_wait:
        return {"id": job_id}
    try:
        ended = cluster.follow(job_id, write_log)
    except KeyboardInterrupt:
        message = f"{job_id} goes on; `raysseg submit --follow {job_id}` shows it, `--stop {job_id}` ends it"
        raise JobEnded(message, 130) from None
    except JobEnded as stopped:
        if options.stop:
            return {"id": job_id, "status": stopped.message}
        raise
    return {"id": job_id, **(ended.result or {})}


def _recommend(options: argparse.Namespace) -> dict[str, Any]:
    """Ranks models for what is asked, and for the data if any are named."""
    from raysseg import storage
    from raysseg.advice.amounts import to_bytes, to_seconds
    from raysseg.advice.draft import to_job
    from raysseg.advice.recommend import recommend
    from raysseg.advice.situation import Ask

    ask = Ask(
        options.task,
        options.priority,
        options.use_case,
        options.gpu_memory and to_bytes(options.gpu_memory, "--gpu-memory"),
        options.latency and to_seconds(options.latency, "--latency"),
        options.gpu,
    )
    found = _fingerprint_of(options.data) if options.data else None
    answer = recommend(ask, found)
    shown = {"kind": "recommend", **asdict(answer)}
    if options.write_job is None:
        return shown
    storage.write_text(storage.absolute(options.write_job), to_job(answer, found))
    return {**shown, "job": options.write_job}


def _fingerprint_of(data: Sequence[str]) -> Fingerprint:
    """The fingerprint in a file, or of data that are inspected now."""
    if data[0].endswith(".json") and len(data) == 1:
        from raysseg.findings.fingerprint import read_fingerprint

        return read_fingerprint(data[0])
    job = _load_job("inspect", data[0], data[1:])
    from raysseg.config import InspectJob
    from raysseg.fingerprint import inspect
    from raysseg.runtime import log_to_stderr

    assert isinstance(job, InspectJob)
    log_to_stderr()
    return inspect(job).fingerprint


def _load_job(verb: str, path: str, overrides: Sequence[str]) -> Job:
    """The job of a file; to inspect and to export, two paths will do."""
    from raysseg import config

    plain = {"inspect": config.plain_inspect, "export": config.plain_export}.get(verb)
    if plain is not None and overrides and "=" not in overrides[0]:
        return plain(path, overrides[0], overrides[1:])
    if verb == "inspect" and Path(path).is_dir():
        return config.plain_folder(path, overrides)
    job = config.load(path, overrides)
    if job.kind != verb and not (verb == "plan" and job.kind in ("train", "tune")):
        raise InputError(f"{path}: kind is {job.kind!r}: run it as `raysseg {job.kind} {path}`")
    return job


def _run_job(job: Job, write_job: str | None) -> dict[str, Any]:
    from raysseg import config

    match job:
        case config.TrainJob():
            from raysseg.train import train

            return asdict(train(job))
        case config.TuneJob():
            from raysseg.tune import tune

            return asdict(tune(job))
        case config.EvaluateJob():
            from raysseg.evaluate import evaluate

            return asdict(evaluate(job))
        case config.PredictJob():
            from raysseg.predict import predict

            return asdict(predict(job))
        case config.ServeJob():
            from raysseg.serve import serve

            return asdict(serve(job))
        case config.ShardJob():
            from raysseg.shard import shard

            return asdict(shard(job))
        case config.ExportJob():
            from raysseg.export import export

            return asdict(export(job))
        case config.InspectJob():
            from raysseg import storage
            from raysseg.fingerprint import inspect

            result = inspect(job)
            shown = {**asdict(result.fingerprint), "report": result.report, "run": result.run}
            if write_job is None:
                return shown
            storage.write_text(storage.absolute(write_job), result.train_job)
            return {**shown, "train_job": write_job}


def _jsonable(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, dict):
        return {key: _jsonable(part) for key, part in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _as_text(result: dict[str, Any]) -> str:
    """The result for people: a table of metrics, then the rest line by line."""
    if result.get("kind") == "recommend":
        from raysseg.advice import recommended

        return recommended.as_text(result)
    if result.get("kind") == "plan":
        from raysseg.advice import planned

        return planned.as_text(result)
    if "findings" in result:
        return _fingerprint_as_text(result)
    if "jobs" in result:
        return _jobs_as_text(result["jobs"])
    lines = []
    metrics: dict[str, float] = result.get("metrics", {})
    totals = {name: value for name, value in metrics.items() if "iou/" not in name and "dice/" not in name}
    width = max([len(name) for name in totals] + [10])
    lines += [f"{name:{width}}  {value:.4f}" for name, value in totals.items()]
    names = [name.rpartition("iou/")[2] for name in metrics if "iou/" in name]
    if names:
        prefix = next(name for name in metrics if "iou/" in name).rpartition("iou/")[0]
        width = max(len(name) for name in [*names, "class"])
        lines += ["", f"{'class':{width}}     IoU    Dice"]
        for name in names:
            scores = [metrics[f"{prefix}{kind}/{name}"] for kind in ("iou", "dice")]
            lines.append(f"{name:{width}}  " + "  ".join("absent" if math.isnan(s) else f"{s:.4f}" for s in scores))
    rest = {key: value for key, value in result.items() if key != "metrics" and value not in (None, [])}
    lines += [""] * bool(metrics) + [f"{key}: {_say(value)}" for key, value in rest.items()]
    return "\n".join(lines)


def _say(value: Any) -> str:
    """A part of the result for people: numbers in six digits."""
    if isinstance(value, dict):
        return ", ".join(f"{key}={_say(part)}" for key, part in value.items()) or "none"
    if isinstance(value, list):
        return f"[{', '.join(map(_say, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _jobs_as_text(jobs: Sequence[dict[str, Any]]) -> str:
    rows = [("id", "job", "status", "started", "minutes")]
    for job in jobs:
        started = "-" if job["started"] is None else f"{datetime.fromtimestamp(job['started']):%Y-%m-%d %H:%M}"
        minutes = "-" if job["seconds"] is None else f"{job['seconds'] / 60:.1f}"
        rows.append((job["id"], job["job"], job["status"], started, minutes))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:{n}}" for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows)


def _fingerprint_as_text(result: dict[str, Any]) -> str:
    lines = []
    for split in result["splits"]:
        height, width = split["height"][1], split["width"][1]
        lines.append(
            f"{split['name']}: {split['num_usable']} usable samples of {split['num_samples']}, {width}x{height}"
        )
    for finding in result["findings"]:
        shown = ", ".join(finding["sample_ids"][:4]) + (", ..." if len(finding["sample_ids"]) > 4 else "")
        lines += ["", f"{finding['severity']} {finding['kind']}: {finding['message']}", f"  {shown}"]
        lines.append(f"  mend: {finding['mend']}")
    lines += [""] if result["findings"] else ["no findings"]
    width = max(len(choice["key"]) for choice in result["advice"]["choices"])
    for choice in result["advice"]["choices"]:
        lines.append(f"{choice['key']:{width}}  {json.dumps(choice['value'])}  # {choice['reason']}")
    lines += [f"# {remark}" for remark in result["advice"]["remarks"]]
    return "\n".join(
        [*lines, "", *(f"{key}: {result[key]}" for key in ("report", "run", "train_job") if key in result)]
    )


if __name__ == "__main__":
    sys.exit(main())
