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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysseg.schema import InputError, RunStopped

if TYPE_CHECKING:
    from raysseg.config import Job

JOB_VERBS = {
    "train": "train a model, or go on with a run that stopped",
    "tune": "search a train job's settings, or go on with a search that stopped",
    "evaluate": "score a bundle, or stored predictions, over a data set",
    "predict": "segment images with a bundle: COCO, PNG masks, COCO panoptic or shards",
    "serve": "answer requests over HTTP with bundles and prompted models, and show the playground",
    "inspect": "what a data set holds, what is wrong with it and what to do about it; also: inspect IMAGES MASKS",
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
    overrides = [*options.overrides, *([f"output.format={options.to}"] if getattr(options, "to", None) else [])]
    job = _load_job(options.verb, options.job, overrides)
    from raysseg.runtime import log_to_stderr

    log_to_stderr()
    return {"kind": job.kind, **_run_job(job, getattr(options, "write_job", None))}


def _load_job(verb: str, path: str, overrides: Sequence[str]) -> Job:
    """The job of a file; to inspect and to export, two paths will do."""
    from raysseg import config

    plain = {"inspect": config.plain_inspect, "export": config.plain_export}.get(verb)
    if plain is not None and overrides and "=" not in overrides[0]:
        return plain(path, overrides[0], overrides[1:])
    job = config.load(path, overrides)
    if job.kind != verb:
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
    if "findings" in result:
        return _fingerprint_as_text(result)
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
    lines += [""] * bool(metrics) + [f"{key}: {value}" for key, value in rest.items()]
    return "\n".join(lines)


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
