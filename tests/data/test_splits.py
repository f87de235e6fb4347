"""Splits: reading by index, the training order, batches read ahead."""

import threading
import time

import numpy as np
import pytest
from pictures import one_line

from saccade.data import decoding, pipeline
from saccade.data import splits as image_splits


def numbered(count, reads=None, broken=()):
    def read(indices):
        if reads is not None:
            reads.append(indices.tolist())
        if set(indices.tolist()) & set(broken):
            raise decoding.CorruptImageError("seven.jpg", "broken")
        return np.float32(indices)[:, None, None, None]

    return image_splits.Split(
        "train", np.arange(count, dtype=np.int32) * 2, read
    )


def test_epoch_order_is_a_permutation_of_seed_and_epoch():
    orders = [
        image_splits.epoch_order(50, *k) for k in ((0, 0), (0, 1), (1, 0))
    ]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(50))
    assert len({order.tobytes() for order in orders}) == 3
    np.testing.assert_array_equal(orders[1], image_splits.epoch_order(50, 0, 1))


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("first_batch", [0, 2, 4, 9])
def test_batches_keep_order_and_lose_nothing(prefetch, first_batch):
    order = image_splits.epoch_order(30, 0, 0)
    got = list(
        pipeline.batches(
            numbered(30), order, 8, first_batch=first_batch, prefetch=prefetch
        )
    )
    sizes = [8, 8, 8, 6][first_batch:]
    assert [len(indices) for _, _, indices in got] == sizes
    if got:
        images, labels, indices = map(np.concatenate, zip(*got, strict=True))
        np.testing.assert_array_equal(indices, order[8 * first_batch :])
        np.testing.assert_array_equal(images.ravel(), indices)
        np.testing.assert_array_equal(labels, indices * 2)
        assert images.dtype == np.float32
        assert labels.dtype == indices.dtype == np.int32


def test_batches_read_ahead_but_not_far():
    reads = []
    iterator = pipeline.batches(numbered(100, reads), range(100), 5, prefetch=2)
    assert not reads
    next(iterator)
    next(iterator)
    assert len(reads) <= 4
    iterator.close()


def test_batches_stopped_early_leave_no_thread():
    before = set(threading.enumerate())
    for _ in pipeline.batches(numbered(1000), range(1000), 2):
        break
    iterator = pipeline.batches(numbered(1000), range(1000), 2)
    next(iterator)
    iterator.close()
    until = time.monotonic() + 10
    while not set(threading.enumerate()) <= before:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_an_error_while_reading_is_raised_at_its_batch():
    iterator = pipeline.batches(numbered(30, broken=[17]), range(30), 10)
    assert len(next(iterator)[0]) == 10
    with pytest.raises(decoding.CorruptImageError, match="seven.jpg") as error:
        next(iterator)
    assert error.value.path == "seven.jpg"


def test_batches_refuse_nonsense():
    with pytest.raises(ValueError, match="batch_size=0") as error:
        pipeline.batches(numbered(3), range(3), 0)
    one_line(error)


def test_split_reads_by_index_and_subsets_compose():
    split = numbered(20)
    part = split.subset([5, 3, 9]).subset([2, 0])
    np.testing.assert_array_equal(part.read([0, 1]).ravel(), [9, 5])
    np.testing.assert_array_equal(part.labels, [18, 10])
    for bad in ([20], [-1], [0, 25]):
        with pytest.raises(IndexError, match="20"):
            split.read(bad)


def test_fingerprint_tells_splits_apart():
    rng = np.random.default_rng(0)
    images = rng.random((20, 4, 4, 1)).astype("float32")
    labels = np.arange(20, dtype="int32") % 3

    def fingerprint(images, labels):
        return image_splits.Split(
            "test", labels, lambda i: images[i]
        ).fingerprint()

    found = fingerprint(images, labels)
    assert found == fingerprint(images, labels)
    assert len(found["means"]) == 16
    assert abs(found["means"][0] - images[0].mean()) < 1e-3
    assert abs(found["means"][-1] - images[-1].mean()) < 1e-3
    assert found["means"] != fingerprint(images * 0.9, labels)["means"]
    other = fingerprint(images, labels[::-1])
    assert found["labels_sha256"] != other["labels_sha256"]


def test_the_identity_is_of_images_labels_and_order_alone():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 4, 4, 1), np.uint8)
    labels = np.arange(6) % 3

    def made(images=images, labels=labels, **more):
        return image_splits.Split("a", labels, images.__getitem__, **more)

    split = made()
    whole = split.sha256()
    assert whole == made().sha256() == split.subset(range(6)).sha256()
    assert split.sha256([4, 1]) == split.subset([4, 1]).sha256()
    assert split.sha256([4, 1]) != split.sha256([1, 4])
    changed = images.copy()
    changed[5, 3, 3] ^= 1
    assert made(changed).sha256() != whole
    assert made(changed).sha256([0, 4]) == split.sha256([0, 4])
    assert made(labels=labels[::-1]).sha256() != whole
    # Bytes of files stand for the pixels, in a part of a split too.
    files = made(content=lambda i: bytes([i]))
    assert files.sha256() != whole
    assert files.subset([3, 2]).sha256([1]) == files.sha256([2])
