"""The main job from beginning to end on one machine: `python -m jobs.demo` (or `make demo`).

Draws the example data set, starts an S3 server on loopback, puts the data there, and runs
jobs/example-segformer-semantic.yaml on it: Ray Data reads, Ray Train trains on two CPU workers, checkpoints and the
bundle go back to S3. What is left to look at lies in demo/.
"""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3

from jobs.s3_server import s3_server
from raysseg import cli, storage
from raysseg.data.example import draw_example

OUT = Path("demo")
BUCKET = "s3://demo"


def main() -> int:
    """Runs the demo; arguments are overrides of its job."""
    started = time.monotonic()

    def tell(text: str) -> None:
        print(f"[{time.monotonic() - started:4.0f} s] {text}", file=sys.stderr, flush=True)

    tell(f"drawing the example data set into {OUT}/data")
    draw_example(OUT / "data")
    with s3_server() as endpoint:
        tell(f"an S3 server listens on {endpoint}; putting the data there")
        os.environ |= {"AWS_ENDPOINT_URL_S3": endpoint, "AWS_REGION": "us-east-1"}
        os.environ |= {"AWS_ACCESS_KEY_ID": "demo", "AWS_SECRET_ACCESS_KEY": "demo"}  # any will do there
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=BUCKET.removeprefix("s3://"))
        _upload(OUT / "data", f"{BUCKET}/example")
        os.environ |= {"EXAMPLE": f"{BUCKET}/example", "RUNS": f"{BUCKET}/runs"}
        tell("raysseg train jobs/example-segformer-semantic.yaml")
        status = cli.main(["train", "jobs/example-segformer-semantic.yaml", *sys.argv[1:]])
        if status == 0:
            run = f"{BUCKET}/runs/example-segformer"
            names = [entry.path for entry in storage.list_files(run)]
            tell(f"{run} holds {len(names)} files; copying the bundle, the report and the logs to {OUT}")
            for name in names:
                if name.startswith("bundle/") or "/" not in name:
                    storage.write_bytes(str(OUT / name), storage.read_bytes(f"{run}/{name}"))
            tell(f"done; open {(OUT / 'report.html').resolve()}")
    return status


def _upload(folder: Path, uri: str) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda p: storage.write_bytes(f"{uri}/{p.relative_to(folder)}", p.read_bytes()), files))


if __name__ == "__main__":
    sys.exit(main())
