"""What serving is made of: batches, what is kept, forms of answers, addresses that are never asked."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from raysseg.config import JobError, ServeJob, compose
from raysseg.data.decode import decode_image
from raysseg.hosting import Http
from raysseg.schema import InputError
from raysseg.serve import fetch
from raysseg.serve.answers import choose_form, to_polygons
from raysseg.serve.batcher import Batcher
from raysseg.serve.cache import Cache
from raysseg.serve.intake import check_image
from raysseg.serve.refusal import Refusal
from raysseg.serve.thread import ModelThread


class Model:
    """Notes its batches; the first one waits until it may go on."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.may_go_on = threading.Event()

    def run(self, items: Sequence[str]) -> list[str]:
        self.batches.append(list(items))
        assert self.may_go_on.wait(5)
        if "bad" in items:
            raise ValueError("bad")
        return [item.upper() for item in items]


async def submit(batcher: Batcher[str, str], *entries: tuple[str, str, int]) -> list[asyncio.Task[str]]:
    tasks = []
    for item, group, pixels in entries:
        tasks.append(asyncio.create_task(batcher.submit(item, group, pixels)))
        await asyncio.sleep(0)
    await asyncio.sleep(0.05)
    return tasks


def test_what_waits_goes_together_by_shape_and_pixels() -> None:
    async def check() -> None:
        model = Model()
        batcher = Batcher(model.run, ModelThread("test"), max_pixels=10)
        entries = [("first", "s", 4), ("a", "s", 4), ("b", "t", 4), ("c", "s", 4), ("d", "s", 4), ("huge", "s", 99)]
        tasks = await submit(batcher, *entries)
        model.may_go_on.set()
        assert await asyncio.gather(*tasks) == [item.upper() for item, _, _ in entries]
        assert model.batches == [["first"], ["a", "c"], ["b"], ["d"], ["huge"]]

    asyncio.run(check())


def test_one_that_fails_takes_no_other_along() -> None:
    async def check() -> None:
        model = Model()
        batcher = Batcher(model.run, ModelThread("test"), max_pixels=10)
        tasks = await submit(batcher, ("first", "s", 1), ("a", "s", 1), ("bad", "s", 1), ("c", "s", 1))
        model.may_go_on.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert results[0] == "FIRST"
        assert results[1] == "A"
        assert isinstance(results[2], ValueError)
        assert results[3] == "C"
        assert model.batches == [["first"], ["a", "bad", "c"], ["a"], ["bad"], ["c"]]

    asyncio.run(check())


def test_who_goes_away_is_left_out() -> None:
    async def check() -> None:
        model = Model()
        batcher = Batcher(model.run, ModelThread("test"), max_pixels=10)
        tasks = await submit(batcher, ("first", "s", 1), ("a", "s", 1), ("b", "s", 1))
        tasks[1].cancel()
        await asyncio.sleep(0)
        model.may_go_on.set()
        assert await tasks[0] == "FIRST"
        assert await tasks[2] == "B"
        assert model.batches == [["first"], ["b"]]

    asyncio.run(check())


def test_a_model_is_probed_only_when_it_is_not_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        thread, probes = ModelThread("test"), []

        async def probe() -> None:
            probes.append(await thread.run(lambda: "fine"))

        await thread.check(probe)
        await thread.check(probe)
        assert probes == ["fine"]  # which was a moment ago
        release = threading.Event()
        busy = asyncio.create_task(thread.run(release.wait, 5))
        await asyncio.sleep(0.05)
        await thread.check(probe)
        monkeypatch.setattr("raysseg.serve.thread._STUCK_AFTER_S", 0.01)
        with pytest.raises(RuntimeError, match="has been running"):
            await thread.check(probe)
        release.set()
        assert await busy
        monkeypatch.setattr("raysseg.serve.thread._PROBE_AFTER_S", 0.0)
        await thread.check(probe)
        assert len(probes) == 2

    asyncio.run(check())


def test_a_value_is_made_once_for_all_who_ask() -> None:
    async def check() -> None:
        cache: Cache[bytes] = Cache(len, max_bytes=10)
        calls = []

        async def make() -> bytes:
            calls.append(time.monotonic())
            await asyncio.sleep(0.05)
            return b"1234"

        tasks = [asyncio.create_task(cache.get("a", make)) for _ in range(50)]
        await asyncio.sleep(0.01)
        tasks[0].cancel()  # who asked first goes away: the others still get it
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert results[1:] == [b"1234"] * 49
        assert len(calls) == cache.num_made == 1

    asyncio.run(check())


def test_the_least_recently_used_goes_first() -> None:
    async def check() -> None:
        cache: Cache[bytes] = Cache(len, max_bytes=10)

        async def make() -> bytes:
            return b"1234"

        await cache.get("a", make)
        await cache.get("b", make)
        assert cache.find("a") == b"1234"
        await cache.get("c", make)
        assert [cache.find(key) for key in "abc"] == [b"1234", None, b"1234"]

        async def make_huge() -> bytes:
            return b"1" * 11

        assert await cache.get("d", make_huge) == b"1" * 11
        assert [cache.find(key) for key in "acd"] == [b"1234", b"1234", None]

    asyncio.run(check())


def test_what_could_not_be_made_is_tried_again() -> None:
    async def check() -> None:
        cache: Cache[bytes] = Cache(len, max_bytes=10)

        async def fail() -> bytes:
            raise ValueError("no")

        async def make() -> bytes:
            return b"1"

        with pytest.raises(ValueError, match="no"):
            await cache.get("a", fail)
        assert await cache.get("a", make) == b"1"

    asyncio.run(check())


def pixels_within(polygons: list[list[list[tuple[int, int]]]], shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Pixels from whose middle a ray to the left crosses the outlines an odd number of times."""
    crossings = np.zeros((shape[0], shape[1] + 1), int)
    for ring in (ring for polygon in polygons for ring in polygon):
        assert ring[0] == ring[-1]
        for (x0, y0), (x1, y1) in pairwise(ring):
            assert (x0 == x1) != (y0 == y1), "outlines go along the edges of pixels"
            if x0 == x1:
                crossings[min(y0, y1) : max(y0, y1), x0] += 1
    return (crossings.cumsum(1)[:, :-1] % 2).astype(bool)


@pytest.mark.parametrize("seed", range(20))
def test_polygons_are_the_mask_to_the_pixel(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((23, 31)) < rng.uniform(0.05, 0.95)
    polygons = to_polygons(mask)
    assert (pixels_within(polygons, mask.shape) == mask).all()


def test_polygons_have_holes_of_their_own() -> None:
    mask = np.ones((9, 9), bool)
    mask[2:5, 2:5] = False
    mask[3, 3] = True
    assert sorted(map(len, to_polygons(mask))) == [1, 2]
    assert to_polygons(np.zeros((4, 4), bool)) == []


def test_forms_of_answers() -> None:
    assert choose_form("", None) == "json"
    assert choose_form("*/*", None) == "json"
    assert choose_form("image/png", None) == "ids"
    assert choose_form("image/png; as=overlay", None) == "overlay"
    assert choose_form("application/json;q=0.1, application/geo+json", None) == "polygons"
    assert choose_form("text/html, image/png;q=0", "overlay") == "overlay"
    with pytest.raises(Refusal, match="Accept") as refused:
        choose_form("text/html, image/png;q=0", None)
    assert refused.value.status == 406
    with pytest.raises(Refusal, match="allowed: json, ids"):
        choose_form("", "svg")


@pytest.mark.filterwarnings("ignore")  # of Pillow, about damaged tags
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_damaged_files_raise_what_can_be_mended(kind: str) -> None:
    rng, http, sink = np.random.default_rng(0), Http(), io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (32, 40, 3), np.uint8)).save(sink, kind, exif=Image.Exif())
    whole = np.frombuffer(sink.getvalue(), np.uint8)
    num_refused = 0
    for _ in range(1500):
        damaged = whole.copy()
        places = rng.integers(0, min(len(whole), 400) if rng.random() < 0.7 else len(whole), rng.integers(1, 6))
        damaged[places] = rng.integers(0, 256, len(places))
        try:
            check_image(damaged.tobytes(), http)
            decode_image(damaged.tobytes())
        except InputError:
            num_refused += 1
    assert num_refused > 100


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.1",
        "192.168.1.1",
        "172.16.0.1",
        "169.254.169.254",
        "0.0.0.0",
        "100.64.0.1",
        "::1",
        "fe80::1%eth0",
        "fc00::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b:1::1",
        "2002:7f00:1::",
    ],
)
def test_private_addresses(address: str) -> None:
    assert not fetch.is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses(address: str) -> None:
    assert fetch.is_public(address)


def serve_job(**keys: object) -> ServeJob:
    job = compose({"kind": "serve", "name": "x", "models": {"a": {"bundle": "/b"}}, **keys}, [])
    assert isinstance(job, ServeJob)
    return job


def test_a_job_says_what_does_not_fit() -> None:
    with pytest.raises(JobError, match=r"models: received \{\}; allowed: 1 or more"):
        serve_job(models={})
    with pytest.raises(JobError, match=r"models.a.replicas: received \[3, 2\]; allowed: \[smallest, largest\]"):
        serve_job(models={"a": {"bundle": "/b", "replicas": [3, 2]}})
    with pytest.raises(JobError, match=r"models.a.prompt: received \"sam\"; allowed: 'sam-vit-base'"):
        serve_job(models={"a": {"prompt": "sam"}})
    with pytest.raises(JobError, match=r"models.a.weights: there is no such key"):
        serve_job(models={"a": {"bundle": "/b", "weights": "x"}})
    with pytest.raises(JobError, match=r"http.fetch.0: received \"https://example.org\""):
        serve_job(http={"fetch": ["https://example.org"]})  # example.org.evil.com begins with it
