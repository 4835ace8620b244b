from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from PIL import Image
from scipy.stats import chisquare

from raysseg import masks
from raysseg.config import Augment, MasksSource, parse
from raysseg.config import Batch as BatchConfig
from raysseg.data import batches, read_class_map, read_index, read_samples
from raysseg.data.batches import Batch, Feed, Recipe
from raysseg.data.index import Failure, SampleIndex
from raysseg.data.sampling import Factors, epoch_order, num_positions, num_windows, order_hash, repeat_factors
from raysseg.inputs import _count
from raysseg.ledger import Ledger, deal, num_steps
from raysseg.schema import InputError, Sample


def index_of(group_sizes: Sequence[int]) -> SampleIndex:
    """An index of nothing, in groups of these sizes."""
    groups = np.repeat(np.arange(len(group_sizes)), group_sizes)
    names = [f"{i:04d}" for i in range(len(groups))]
    return SampleIndex(MasksSource(masks="/d"), pa.table({"sample_id": names}), groups)


FILES = [1] * 23
EVEN = [8] * 12
UNEVEN = [8, 8, 3, 8, 8, 8, 5, 8, 8, 1]
ORDERS = pytest.mark.parametrize(
    ("sizes", "open_groups"),
    [(FILES, 4), (FILES, 100), (EVEN, 4), (EVEN, 5), (UNEVEN, 4), (UNEVEN, 1), ([7], 4), ([1], 1)],
    ids=["files", "files, all open", "even", "even, 5 open", "uneven", "1 open", "one group", "one sample"],
)


# ---- the order of an epoch


@ORDERS
def test_order_is_a_permutation(sizes: list[int], open_groups: int) -> None:
    index = index_of(sizes)
    for epoch in range(3):
        order = epoch_order(index, open_groups=open_groups, seed=1, epoch=epoch)
        assert len(order) == len(index)
        assert sorted(order.rows.tolist()) == list(range(len(index)))


@pytest.mark.parametrize("sizes", [FILES, EVEN, UNEVEN], ids=["files", "even", "uneven"])
def test_order_follows_from_seed_and_epoch(sizes: list[int]) -> None:
    index = index_of(sizes)

    def rows(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(epoch_order(index, open_groups=4, seed=seed, epoch=epoch).rows.tolist())

    assert rows(3, 1) == rows(3, 1)
    assert len({rows(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9


@ORDERS
def test_windows_touch_few_groups_and_each_group_lies_in_one(sizes: list[int], open_groups: int) -> None:
    index = index_of(sizes)
    order = epoch_order(index, open_groups=open_groups, seed=0, epoch=0)
    assert order.windows[0] == 0
    assert len(order.windows) == -(-len(sizes) // open_groups)
    touched = [set(index.groups[part].tolist()) for part in np.split(order.rows, order.windows[1:])]
    assert max(len(groups) for groups in touched) <= open_groups
    assert sum(len(groups) for groups in touched) == len(sizes)


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_a_group_is_read_by_one_worker_alone(num_workers: int) -> None:
    index = index_of(EVEN)
    order = epoch_order(index, open_groups=4, seed=5, epoch=2)
    readers: dict[int, set[int]] = {}
    for start in range(0, len(order), 16):
        for rank in range(num_workers):
            for positions in deal(start, start + 16, per_worker=2, rank=rank, num_workers=num_workers):
                for group in index.groups[order.rows[positions]].tolist():
                    readers.setdefault(group, set()).add(rank)
    assert sorted(readers) == list(range(12))
    assert all(len(ranks) == 1 for ranks in readers.values())


def test_every_batch_mixes_the_open_groups() -> None:
    index = index_of(EVEN)
    order = epoch_order(index, open_groups=4, seed=5, epoch=2)
    for start in range(0, len(order), 4):
        assert len(set(index.groups[order.rows[start : start + 4]].tolist())) == 4


def test_order_hash_changes_with_all_that_orders_follow_from() -> None:
    index = index_of(EVEN)
    hashes = [
        order_hash(index, open_groups=4, seed=0),
        order_hash(index, open_groups=5, seed=0),
        order_hash(index, open_groups=4, seed=1),
        order_hash(index_of([6] * 16), open_groups=4, seed=0),
        order_hash(index.take(np.arange(95)), open_groups=4, seed=0),
    ]
    assert len(set(hashes)) == len(hashes)
    assert order_hash(index_of(EVEN), open_groups=4, seed=0) == hashes[0]


def test_orders_without_factors_stay_as_they_were() -> None:
    """Checkpoints of runs that are under way hold positions in them."""
    digest = hashlib.sha256()
    for sizes, open_groups in ((FILES, 4), (FILES, 100), (EVEN, 4), (EVEN, 5), (UNEVEN, 4), (UNEVEN, 1), ([7], 4)):
        for epoch in range(3):
            order = epoch_order(index_of(sizes), open_groups=open_groups, seed=1, epoch=epoch)
            digest.update(order.rows.tobytes() + order.windows.tobytes())
    assert digest.hexdigest()[:16] == "f6eff82778c22d3d"
    assert order_hash(index_of(EVEN), open_groups=4, seed=0) == "327649f372f6c052"


# ---- oversampling


def test_repeat_factors_by_hand() -> None:
    presence = np.zeros((16, 4), bool)  # the last class is held by no image, the last image holds no class
    presence[:15, 0] = True
    presence[:4, 1] = True
    presence[3:5, 2] = True
    factors = repeat_factors(presence, 0.5)
    root = 2**0.5  # sqrt(0.5 / 0.25), and sqrt(0.5 / 0.125) = 2
    assert factors == pytest.approx([root, root, root, 2, 2, *[1] * 11], rel=1e-15)
    assert num_positions(index_of([1] * 16), factors) == 19  # 3 * 1.414 + 2 * 2 + 11 = 19.24
    assert (repeat_factors(presence, 0.1) == 1).all()


def some_factors(num_samples: int, seed: int = 0) -> Factors:
    """A third of the samples come more than once, up to 5 times."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(num_samples) < 1 / 3, rng.uniform(1, 5, num_samples), 1.0)


@ORDERS
def test_oversampled_epochs_have_one_length_and_whole_repeats(sizes: list[int], open_groups: int) -> None:
    index = index_of(sizes)
    factors = some_factors(len(index))
    length = num_positions(index, factors)
    assert length == round(factors.sum())
    scaled = np.ones(len(index))
    if length > len(index):
        scaled += (factors - 1) * (length - len(index)) / (factors - 1).sum()
    for epoch in range(20):
        order = epoch_order(index, open_groups=open_groups, seed=1, epoch=epoch, factors=factors)
        times = np.bincount(order.rows, minlength=len(index))
        assert len(order) == length
        assert (times >= np.floor(scaled)).all()
        assert (times <= np.ceil(scaled)).all()
        assert len(order.windows) == num_windows(index, open_groups=open_groups, factors=factors)
        touched = [set(index.groups[part].tolist()) for part in np.split(order.rows, order.windows[1:])]
        assert max(len(groups) for groups in touched) <= open_groups


def test_factors_of_one_are_no_oversampling() -> None:
    index = index_of(UNEVEN)
    plain = epoch_order(index, open_groups=4, seed=1, epoch=2)
    ones = epoch_order(index, open_groups=4, seed=1, epoch=2, factors=np.ones(len(index)))
    assert sorted(ones.rows) == sorted(plain.rows)
    assert num_positions(index, np.ones(len(index))) == num_positions(index) == len(index)


@pytest.mark.parametrize("sizes", [[1] * 400, [8] * 50], ids=["files", "even"])
def test_repeats_lie_far_apart(sizes: list[int]) -> None:
    index = index_of(sizes)
    factors = np.where(np.arange(400) % 10 == 0, 3.0, 1.0)
    for epoch in range(20):
        order = epoch_order(index, open_groups=4, seed=1, epoch=epoch, factors=factors)
        window = np.searchsorted(order.windows, np.arange(len(order)), side="right")
        for row in range(0, 400, 10):
            (places,) = np.nonzero(order.rows == row)
            assert np.diff(places).min() > len(order) / 5
            assert len(set(window[places])) == 3


def test_which_samples_repeat_is_as_likely_as_their_factors_say() -> None:
    """Cumulative extras 0.5 0.5 0.8 1.5 1.75 2 and an offset u: the pairs change at u = 0.2, 0.25 and 0.5."""
    index, factors = index_of([1] * 6), np.array([1.5, 1, 1.3, 1.7, 1.25, 1.25])
    chances = {(3, 5): 0.2, (2, 5): 0.05, (2, 4): 0.25, (0, 3): 0.5}
    found = dict.fromkeys(chances, 0)
    for epoch in range(4000):
        times = np.bincount(epoch_order(index, open_groups=4, seed=3, epoch=epoch, factors=factors).rows)
        found[tuple(np.flatnonzero(times == 2).tolist())] += 1
    assert chisquare(list(found.values()), [4000 * chance for chance in chances.values()]).pvalue > 0.01


def test_rare_classes_come_as_often_as_their_factors_say() -> None:
    """Each sample's count over many epochs is binomial about its factor: a chi-square test of each."""
    rng = np.random.default_rng(1)
    presence = rng.random((120, 4)) < [0.9, 0.3, 0.1, 0.03]
    index, factors = index_of([8] * 15), repeat_factors(presence, 0.5)
    extra = factors - 1
    expected = 1 + extra * round(extra.sum()) / extra.sum()
    epochs = 1000
    times = sum(
        np.bincount(epoch_order(index, open_groups=4, seed=3, epoch=epoch, factors=factors).rows, minlength=120)
        for epoch in range(epochs)
    )
    share = expected % 1  # of the epochs in which it comes once more
    is_random = share > 1e-6
    assert (times[~is_random] == epochs * expected[~is_random].round()).all()
    more = times[is_random] - epochs * np.floor(expected[is_random])
    chances = np.stack([share[is_random], 1 - share[is_random]])
    pvalues = chisquare(np.stack([more, epochs - more]), epochs * chances).pvalue
    assert pvalues.min() > 0.01 / is_random.sum()


def test_order_hash_changes_with_the_factors() -> None:
    index = index_of(EVEN)
    hashes = [
        order_hash(index, open_groups=4, seed=0, factors=factors)
        for factors in (None, some_factors(96), some_factors(96, seed=1))
    ]
    assert len(set(hashes)) == 3
    assert order_hash(index, open_groups=4, seed=0, factors=some_factors(96)) == hashes[1]


# ---- dealing, and the ledger


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5])
@pytest.mark.parametrize("per_worker", [1, 3, 4])
@pytest.mark.parametrize(("start", "stop"), [(0, 16), (16, 32), (32, 33), (32, 39)])
def test_deal_gives_every_position_to_one_rank(num_workers: int, per_worker: int, start: int, stop: int) -> None:
    shares = [
        deal(start, stop, per_worker=per_worker, rank=rank, num_workers=num_workers) for rank in range(num_workers)
    ]
    assert len({len(share) for share in shares}) == 1, "every rank runs as many passes"
    assert len(shares[0]) == -(-(stop - start) // (num_workers * per_worker)), "and no pass more than needed"
    assert max(len(positions) for share in shares for positions in share) <= per_worker
    dealt = [position for share in shares for positions in share for position in positions.tolist()]
    assert sorted(dealt) == list(range(start, stop))
    assert all(
        p % num_workers == (start + rank) % num_workers for rank in range(num_workers) for m in shares[rank] for p in m
    )


def test_number_of_steps_counts_the_last_smaller_batch() -> None:
    assert [num_steps(n, 8) for n in (1, 7, 8, 9, 16, 17)] == [1, 1, 1, 2, 2, 3]


# ---- batches


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """23 images, each of one colour (its number in red) beside a little noise, and their masks."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for i in range(23):
        pixels = rng.integers(0, 256, (12, 14, 3), np.uint8)
        pixels[..., 0] = i
        labels = rng.integers(0, 2, (12, 14)).astype(np.uint8)
        for kind, array in (("images", pixels), ("masks", labels)):
            (root / kind).mkdir(exist_ok=True)
            Image.fromarray(array).save(root / kind / f"{i:02d}.png")
    return str(root)


def source(folder: str, **more: str) -> MasksSource:
    return MasksSource.model_validate({"images": f"{folder}/images", "masks": f"{folder}/masks", **more})


COLOURLESS = Augment(brightness=0, contrast=0, saturation=0, hue=0, rotation=10)
RECIPE = Recipe(read_class_map(["a", "b"]), "semantic", None, (8, 10), COLOURLESS, seed=3)
EPOCHS = 3
BEGIN = Ledger()


def feed_of(
    index: SampleIndex,
    *,
    start: Ledger = BEGIN,
    rank: int = 0,
    num_workers: int = 1,
    global_size: int = 6,
    factors: Factors | None = None,
) -> Feed:
    batch = BatchConfig(global_size=global_size, per_worker=2)
    return Feed(
        index,
        RECIPE,
        batch,
        open_groups=4,
        epochs=EPOCHS,
        start=start,
        rank=rank,
        num_workers=num_workers,
        factors=factors,
    )


Row = tuple[npt.NDArray[np.uint8], masks.IdMap]


def run(
    index: SampleIndex, start: Ledger, num_workers: int, global_size: int = 6, factors: Factors | None = None
) -> Iterator[list[list[Batch]]]:
    """Steps of all ranks together: for each global batch, each rank's micro-batches."""
    feeds = [
        feed_of(index, start=start, rank=rank, num_workers=num_workers, global_size=global_size, factors=factors)
        for rank in range(num_workers)
    ]
    steps = [batches.iter_batches(feed, batches.iter_chunks(feed)) for feed in feeds]
    yield from (list(ranks) for ranks in zip(*steps, strict=True))


def global_batches(
    index: SampleIndex,
    start: Ledger = BEGIN,
    num_workers: int = 1,
    global_size: int = 6,
    factors: Factors | None = None,
) -> list[dict[int, Row]]:
    """Each global batch as position -> its row."""
    out = []
    for ranks in run(index, start, num_workers, global_size, factors):
        assert len({len(micro_batches) for micro_batches in ranks}) == 1, "all ranks run as many passes"
        rows: dict[int, Row] = {}
        for batch in (batch for micro_batches in ranks for batch in micro_batches):
            assert 1 <= len(batch) <= 2
            assert batch.images.shape == (len(batch), 8, 10, 3)
            assert batch.labels.shape == (len(batch), 8, 10)
            for row, position in enumerate(batch.positions.tolist()):
                assert batch.weights[row] == (position >= 0)
                if position < 0:
                    assert (batch.labels[row] == 255).all(), "a stand-in carries no label"
                    continue
                assert position not in rows
                rows[position] = (batch.images[row], batch.labels[row])
        out.append(rows)
    return out


def groups_of(index: SampleIndex, *sizes: int) -> SampleIndex:
    return replace(index, groups=np.repeat(np.arange(len(sizes)), sizes))


@pytest.fixture(params=["files", "row groups"])
def index(request: pytest.FixtureRequest, folder: str) -> SampleIndex:
    files = read_index(source(folder))
    return files if request.param == "files" else groups_of(files, 4, 4, 4, 4, 4, 3)


def plan(start: Ledger, num_samples: int, global_size: int) -> list[list[int]]:
    """The positions of each global batch from a ledger to the end."""
    return [
        list(range(first, min(first + global_size, num_samples)))
        for epoch in range(start.epoch, EPOCHS)
        for first in range(start.position if epoch == start.epoch else 0, num_samples, global_size)
    ]


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("start", [Ledger(), Ledger(1, 12), Ledger(2, 18), Ledger(1, 7)])
def test_positions_are_used_once_for_any_number_of_workers(index: SampleIndex, start: Ledger, num_workers: int) -> None:
    found = global_batches(index, start, num_workers)
    assert [sorted(rows) for rows in found] == plan(start, 23, 6)


@pytest.mark.parametrize("global_size", [1, 5, 16, 64])
def test_positions_are_used_once_for_any_global_batch(index: SampleIndex, global_size: int) -> None:
    start = Ledger(2, 3)
    found = global_batches(index, start, 2, global_size)
    assert [sorted(rows) for rows in found] == plan(start, 23, global_size)


@pytest.mark.parametrize(
    ("num_workers", "start"), [(2, Ledger()), (3, Ledger()), (2, Ledger(1, 12)), (3, Ledger(2, 6))]
)
def test_pixels_of_a_position_do_not_depend_on_workers_or_on_resuming(
    index: SampleIndex, num_workers: int, start: Ledger
) -> None:
    reference = global_batches(index)[-len(plan(start, 23, 6)) :]
    found = global_batches(index, start, num_workers)
    assert len(found) == len(reference)
    for rows, expected in zip(found, reference, strict=True):
        assert rows.keys() == expected.keys()
        for position, (image, labels) in rows.items():
            assert np.array_equal(image, expected[position][0])
            assert np.array_equal(labels, expected[position][1])


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("factor", [1.0, 2.4], ids=["plain", "oversampled"])
def test_going_on_reads_the_rest_and_nothing_before(
    index: SampleIndex, factor: float, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    factors = None if factor == 1 else np.where(np.arange(23) % 3 == 0, factor, 1.0)
    length = num_positions(index, factors)
    orders = [epoch_order(index, open_groups=4, seed=3, epoch=epoch, factors=factors).rows for epoch in (1, 2)]
    whole = [entry for rows in global_batches(index, Ledger(1), factors=factors) for entry in sorted(rows.items())]
    assert [position for position, _ in whole] == [*range(length)] * 2

    read: list[int] = []

    def note(part: SampleIndex) -> list[Sample | Failure]:
        read.extend(map(int, part.sample_ids))
        return read_samples(part)

    monkeypatch.setattr(batches, "read_samples", note)
    monkeypatch.setattr(batches, "CHUNK_ROWS", 2)  # several chunks an epoch
    for position in (1, 6, 12, 17, length - 5, length - 1):
        read.clear()
        found = global_batches(index, Ledger(1, position), num_workers, factors=factors)
        rest = [entry for rows in found for entry in sorted(rows.items())]
        assert [p for p, _ in rest] == [p for p, _ in whole[position:]]
        for (_, row), (_, expected) in zip(rest, whole[position:], strict=True):
            assert all(map(np.array_equal, row, expected))
        assert sorted(read) == sorted(np.concatenate(orders)[position:].tolist())


@pytest.mark.parametrize("num_workers", [1, 3])
def test_chunks_wholly_before_the_start_are_none(
    index: SampleIndex, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "CHUNK_ROWS", 2)
    whole = feed_of(index, start=Ledger(2), num_workers=num_workers)
    assert whole.num_chunks == whole.chunks_per_epoch > 1
    for position in range(23):
        feeds = [feed_of(index, start=Ledger(2, position), rank=r, num_workers=num_workers) for r in range(num_workers)]
        (num_chunks,) = {feed.num_chunks for feed in feeds}
        chunks = [
            np.sort(np.concatenate([batches.request_chunk(feed, number).positions for feed in feeds]))
            for number in range(num_chunks)
        ]
        assert np.concatenate(chunks).tolist() == list(range(position, 23))
        assert all(map(len, chunks))


def numbers_of(rows: dict[int, Row]) -> list[int]:
    """The sample at each position: its red, which blends with the padding at edges."""
    return [int(np.bincount(rows[p][0][..., 0][rows[p][1] != 255]).argmax()) for p in sorted(rows)]


def test_every_sample_comes_once_an_epoch_and_at_its_position(index: SampleIndex) -> None:
    found = global_batches(index)
    per_epoch = num_steps(23, 6)
    seen = []
    for epoch in range(EPOCHS):
        rows = {p: row for step in found[epoch * per_epoch : (epoch + 1) * per_epoch] for p, row in step.items()}
        numbers = numbers_of(rows)
        assert numbers == epoch_order(index, open_groups=4, seed=3, epoch=epoch).rows.tolist()
        seen.append(numbers)
    assert seen[0] != seen[1]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 4), (4, 1)])
def test_oversampled_epochs_are_the_same_for_any_number_of_workers_and_resume(
    index: SampleIndex, before: int, after: int
) -> None:
    factors = some_factors(23)
    length = num_positions(index, factors)
    orders = [epoch_order(index, open_groups=4, seed=3, epoch=epoch, factors=factors).rows for epoch in range(EPOCHS)]
    assert length > 23 + 6
    break_off = Ledger(1, 12)
    begun = global_batches(index, BEGIN, before, factors=factors)[: num_steps(length, 6) + 2]
    found = begun + global_batches(index, break_off, after, factors=factors)
    assert [sorted(rows) for rows in found] == plan(BEGIN, length, 6)
    assert [number for rows in found for number in numbers_of(rows)] == np.concatenate(orders).tolist()


def test_repeats_of_a_sample_are_augmented_anew(folder: str) -> None:
    one = read_index(source(folder)).take(np.array([0]))
    rows = global_batches(one, factors=np.array([4.0]))[0]
    assert len({image.tobytes() for image, _ in rows.values()}) == 4


def test_a_sample_is_augmented_anew_every_epoch(folder: str) -> None:
    one = read_index(source(folder)).take(np.array([0]))
    first, second, third = (rows[0][0] for rows in global_batches(one))
    assert not np.array_equal(first, second)
    assert not np.array_equal(second, third)


def test_order_of_the_ranks_rows_is_the_dealers(folder: str) -> None:
    index = read_index(source(folder))
    for rank in range(3):
        feed = feed_of(index, start=Ledger(2, 0), rank=rank, num_workers=3)
        steps = list(batches.iter_batches(feed, batches.iter_chunks(feed)))
        for step, micro_batches in enumerate(steps):
            shares = deal(step * 6, min(step * 6 + 6, 23), per_worker=2, rank=rank, num_workers=3)
            assert [batch.positions.tolist() for batch in micro_batches] == [share.tolist() or [-1] for share in shares]


def test_parts_end_where_micro_batches_do(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index = read_index(source(folder))
    feed = feed_of(index, start=Ledger(2, 3), rank=1, num_workers=3)
    row_bytes = 4 * RECIPE.crop[0] * RECIPE.crop[1]
    for most_rows in (1, 2, 4, 100):
        monkeypatch.setattr(batches, "PART_BYTES", most_rows * row_bytes)
        for number in range(feed.num_chunks):
            chunk = batches.read_chunk(batches.request_chunk(feed, number))
            parts = [part.positions.tolist() for part in batches.iter_parts(feed, chunk)]
            assert [p for part in parts for p in part] == chunk.positions.tolist()
            assert max(map(len, parts)) <= max(2, most_rows)
            begin = 3 if chunk.epoch == 2 else 0
            micro = [{((p - begin) // 6, (p - begin) % 6 // 3 // 2) for p in part} for part in parts]
            assert all(not a & b for a, b in pairwise(micro))


def test_a_run_that_is_over_has_no_chunks(folder: str) -> None:
    feed = feed_of(read_index(source(folder)), start=Ledger(EPOCHS))
    assert feed.num_chunks == 0
    assert list(batches.iter_batches(feed, batches.iter_chunks(feed))) == []


def test_augmenting_off_gives_the_top_left_corner(folder: str) -> None:
    index = read_index(source(folder))
    feed = replace(feed_of(index), recipe=replace(RECIPE, augment=None))
    chunk = batches.decode_chunk(feed, batches.read_chunk(batches.request_chunk(feed, 0)))
    rows = epoch_order(index, open_groups=4, seed=3, epoch=0).rows
    for row, position in enumerate(chunk.positions.tolist()):
        with Image.open(f"{folder}/images/{rows[position]:02d}.png") as image:
            assert np.array_equal(chunk.images[row], np.array(image)[:8, :10])


def test_feed_of_a_job(folder: str) -> None:
    data = {"format": "masks", "images": f"{folder}/images", "masks": f"{folder}/masks"}
    job = parse(
        {
            "kind": "train",
            "name": "check",
            "task": "semantic",
            "classes": ["a", "b"],
            "data": {"train": data, "val": data, "size": [50, 60], "crop": [32, 40], "open_shards": 3},
            "model": {"name": "segformer-b0", "weights": None},
            "schedule": {"epochs": 4},
            "seed": 9,
            "storage": "/runs",
        }
    )
    assert job.kind == "train"
    feed = batches.build_feed(job, read_index(source(folder)), RECIPE.classes, Ledger(1, 4), rank=1, num_workers=2)
    assert feed.recipe == Recipe(RECIPE.classes, "semantic", (50, 60), (32, 40), Augment(), 9)
    assert (feed.open_groups, feed.epochs, feed.start, feed.rank, feed.num_workers) == (3, 4, Ledger(1, 4), 1, 2)
    assert feed.num_chunks == 3 * feed.chunks_per_epoch


# ---- samples that can't be used


@pytest.fixture
def damaged(folder: str, tmp_path: Path) -> str:
    """The same files, of which 05's image is no image and 11's mask holds an unknown id."""
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        for path in (Path(folder) / kind).iterdir():
            (tmp_path / kind / path.name).write_bytes(path.read_bytes())
    (tmp_path / "images" / "05.png").write_bytes(b"<html>")
    out = io.BytesIO()
    Image.fromarray(np.full((12, 14), 77, np.uint8)).save(out, "PNG")
    (tmp_path / "masks" / "11.png").write_bytes(out.getvalue())
    return str(tmp_path)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_skipped_samples_weigh_nothing_and_are_listed(damaged: str, num_workers: int) -> None:
    index = read_index(source(damaged, on_error="skip"))
    rows = epoch_order(index, open_groups=4, seed=3, epoch=2).rows
    lost = {int(np.flatnonzero(rows == 5)[0]), int(np.flatnonzero(rows == 11)[0])}
    positions, weightless, failures = [], set(), []
    for ranks in run(index, Ledger(2), num_workers):
        for batch in (batch for micro_batches in ranks for batch in micro_batches):
            failures += batch.failures
            for row, position in enumerate(batch.positions.tolist()):
                if position < 0:
                    continue
                positions.append(position)
                if batch.weights[row] == 0:
                    weightless.add(position)
                    assert (batch.labels[row] == 255).all()
    assert sorted(positions) == list(range(23))
    assert weightless == lost
    assert {failure.sample_id for failure in failures} == {"05", "11"}
    reasons = {failure.sample_id: failure.reason for failure in failures}
    assert reasons["05"].startswith("05: the image can't be decoded")
    assert reasons["11"].startswith("11: the mask holds ids that the class list lacks: 77")


def test_classes_are_counted_by_sample_and_a_skipped_one_holds_none(damaged: str) -> None:
    data = {"format": "masks", "images": f"{damaged}/images", "masks": f"{damaged}/masks", "on_error": "skip"}
    job = parse(
        {
            "kind": "train",
            "name": "check",
            "task": "semantic",
            "classes": ["a", "b", "c"],
            "data": {"train": data, "val": data, "oversample": 0.5},
            "model": {"name": "segformer-b0", "weights": None},
            "scaling": {"workers": 0},
            "storage": "/runs",
        }
    )
    assert job.kind == "train"
    pixels, presence = _count(job, "train", read_index(job.data.train), read_class_map(["a", "b", "c"]), is_whole=True)
    assert (pixels.num_images, pixels.images.tolist()) == (22, [22, 22, 0])
    assert presence[:, :2].sum(axis=1).tolist() == [2] * 11 + [0] + [2] * 11
    assert not presence[:, 2].any()
    assert repeat_factors(presence, 1.0)[11] == 1


def test_bad_sample_stops_and_is_named(damaged: str) -> None:
    index = read_index(source(damaged))
    with pytest.raises(InputError, match=r"^(05: the image can't be decoded|11: the mask holds ids)"):
        list(run(index, Ledger(2), 1))
    for number, message in ((5, "^05: the image"), (11, "^11: the mask")):
        feed = feed_of(index.take(np.array([number])))
        feed = replace(feed, index=replace(feed.index, groups=np.zeros(1, np.int64)))
        with pytest.raises(InputError, match=message):
            batches.decode_chunk(feed, batches.read_chunk(batches.request_chunk(feed, 0)))


def test_evaluation_batches_are_fixed_by_the_index(damaged: str) -> None:
    index = read_index(source(damaged, on_error="skip"))
    classes = RECIPE.classes
    whole = list(batches.iter_pairs(index, classes, rows=4))
    assert [len(part) for part in whole] == [4, 4, 4, 4, 4, 3]
    assert [pair.sample_id for part in whole for pair in part] == index.sample_ids
    shares = [list(batches.iter_pairs(index, classes, rows=4, share=s, num_shares=4)) for s in range(4)]
    assert [[pair.sample_id for pair in part] for part in shares[1]] == [
        [pair.sample_id for pair in whole[i]] for i in (1, 5)
    ]
    assert sum(len(share) for share in shares) == 6
    with pytest.raises(InputError, match=r"^05: the image"):
        list(batches.iter_pairs(read_index(source(damaged)), classes, rows=4))
