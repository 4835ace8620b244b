"""What the control path costs by the number of samples and of workers; docs/scale.md goes on from there to many more.

Usage: python -m benchmarks.bench_scale [--part order reading ...]

Nothing is trained: ranks are real processes that agree, restore or read and do no step. Indexes are made up, and code
of ours orders, deals out, lists, reads, pickles and merges them. "before" is what was done until it was measured, in
the same run. More than two ranks share two cores: wall time is then theirs, CPU time a rank's own.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import boto3

from benchmarks import scale_data, scale_ranks
from benchmarks.results import device_name, write_result
from benchmarks.scale_data import Row
from jobs.s3_server import s3_server
from raysseg import runtime, storage
from tests.faults import faulty_proxy


@contextmanager
def counted_bucket() -> Iterator[tuple[str, list[str]]]:
    """A bucket, and the requests that it gets from us."""
    with s3_server() as endpoint, faulty_proxy(endpoint) as proxy:
        os.environ |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
        boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="scale")
        storage.use_s3(endpoint=proxy.endpoint, region="us-east-1")
        yield "s3://scale", proxy.requests


def on_s3(measure: Callable[[str, list[str]], Iterator[Row]]) -> Iterator[Row]:
    with counted_bucket() as (bucket, requests):
        yield from measure(bucket, requests)


def on_ray(measure: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    runtime.connect()
    yield from measure()


PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    "order": partial(scale_data.order_rows, (10**5, 10**6, 10**7)),
    "reading": scale_data.reading_rows,
    "index": scale_data.index_rows,
    "balance": scale_data.balance_rows,
    "metrics": partial(scale_data.metrics_rows, (10**5, 10**6)),
    "agreement": scale_ranks.agreement_rows,
    "conductor": scale_ranks.conductor_rows,
    "checkpoint": partial(on_s3, scale_ranks.checkpoint_rows),
    "listing": partial(on_s3, scale_data.listing_rows),
    "reports": partial(on_ray, scale_ranks.reports_rows),
    "spread": partial(on_ray, scale_ranks.spread_rows),
    "stream": partial(on_ray, scale_ranks.stream_rows),
    "handover": partial(on_ray, scale_ranks.handover_rows),
}
"""Those that fork processes come before those in which this one is a client of S3 or of Ray."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    rows: list[Row] = []
    for part in (name for name in PARTS if name in options.part):
        started = time.perf_counter()
        for found in PARTS[part]():
            rows.append(found)
            print(*found.values(), file=sys.stderr, flush=True)
        print(f"{part}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    whole = options.part == list(PARTS)
    write_result("scale" if whole else f"scale-{'-'.join(options.part)}", device_name(), rows, vars(options))


if __name__ == "__main__":
    main()
