"""A cluster of a head and two nodes that loses one: what becomes of a train job's samples, and of requests?

Usage: python -m benchmarks.bench_nodes --part train|serve [--silent]

The nodes are raylets with addresses of their own, in network namespaces where this machine has them; see nodes.py. The
head has no room for work. Jobs are sent to it by `raysseg submit`; they read and write an S3 server that the nodes know
from the job file alone. A node is killed with all that runs on it, and a new one comes.

Parts:
    train  an elastic run of two workers. The node of the first rank is killed in the middle of an epoch; the run goes
           on with one worker, and with two once the new node is there. Samples are counted as in bench_survival.
    serve  two replicas, and two processes that take requests in, under four clients, which go to both nodes in turns,
           and ask once more where nothing came. There is no room for the killed replica until the new node comes.

With --silent the network of the node goes first: nobody is told of its end, as where a machine loses its power.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import nullcontext
from pathlib import Path

from benchmarks.nodes import enter_namespaces, ground


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("train", "serve"), required=True)
    parser.add_argument("--silent", action="store_true")
    parser.add_argument("--rows", type=Path, help="where the rows go as JSON; default: benchmarks/results/")
    parser.add_argument("--folder", type=Path, help="a short path, for what is local; default: a temporary folder")
    options = parser.parse_args()
    enter_namespaces()
    from benchmarks import nodes_serve, nodes_train  # these take long, and the process above has ended
    from benchmarks.results import device_name, print_rows, write_result

    part = {"train": nodes_train, "serve": nodes_serve}[options.part]
    folder = tempfile.TemporaryDirectory(prefix="rs-") if options.folder is None else nullcontext(options.folder)
    with folder as path:
        with ground(Path(path), part.ENVIRONMENT) as there:
            rows = part.measure(there, silent=options.silent)
        settings = {"silent": options.silent, "namespaces": there.cluster.network.is_real}
    if options.rows is None:
        write_result(f"nodes-{options.part}{'-silent' * options.silent}", device_name(), rows, settings)
    else:
        options.rows.write_text(json.dumps({"settings": settings, "rows": rows}))
        print_rows(rows)


if __name__ == "__main__":
    main()
