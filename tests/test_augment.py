"""Augmentation: every view is one of those that the settings allow, each allowed view occurs, and the key decides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracles import config_of, quick_jit
from vffjax.errors import UserError
from vffjax.training.augment import augment, cut_out, normalise

H, W, N = 6, 8, 300


@pytest.fixture
def images():
    return jnp.asarray(np.random.default_rng(0).normal(size=(N, H, W, 2)) + 5, jnp.float32)


def views(key, images, ids=None, epoch=0, **changes):
    config, ids = config_of(**changes), np.arange(len(images)) if ids is None else ids
    view = quick_jit(lambda k, x, ids, epoch: cut_out(k, augment(k, x, ids, epoch, config), config.cutout))
    return np.asarray(view(key, images, jnp.asarray(ids, jnp.int32), jnp.int32(epoch)))


def test_normalise_gives_mean_0_and_deviation_1_per_channel():
    images = np.random.default_rng(0).integers(0, 256, (9, 5, 5, 3), dtype=np.uint8)
    mean, std = (images / 255).mean((0, 1, 2)), (images / 255).std((0, 1, 2))
    out = np.asarray(normalise(jnp.asarray(images), jnp.asarray(mean), jnp.asarray(std)))
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, (images / 255 - mean) / std, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(out.std((0, 1, 2)), 1, atol=1e-5)


def test_bytes_stay_bytes_and_padding_is_black(key):
    out = views(key, jnp.full((N, H, W, 1), 200, jnp.uint8), flip=True, crop_padding=2)
    assert out.dtype == np.uint8
    assert set(np.unique(out)) == {0, 200}


def test_no_augmentation_changes_no_bit(key, images):
    np.testing.assert_array_equal(views(key, images), images)


@pytest.mark.parametrize("changes", [{"flip": True}, {"crop_padding": 2}, {"cutout": 3}], ids=lambda c: next(iter(c)))
def test_the_key_decides(changes, images):
    one, again, other = (views(jax.random.key(seed), images, **changes) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


def test_flips_mirror_half_of_the_images_left_to_right(key, images):
    out, x = views(key, images, flip=True), np.asarray(images)
    same = (out == x).all((1, 2, 3))
    mirrored = (out == x[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert abs(mirrored.mean() - 0.5) < 5 * 0.5 / np.sqrt(N)


def test_crops_are_all_windows_of_the_padded_image(key, images):
    padding, x = 2, np.asarray(images)
    out = views(key, images, crop_padding=padding)
    padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    seen = np.zeros((2 * padding + 1, 2 * padding + 1), int)
    for view, source in zip(out, padded, strict=True):
        found = [(i, j) for i, j in np.ndindex(seen.shape) if (view == source[i : i + H, j : j + W]).all()]
        assert len(found) == 1
        seen[found[0]] += 1
    assert (seen > 0).all()  # 12 expected of each: none missing but once in 10,000 keys


@pytest.mark.parametrize("side", [1, 3, 4])
def test_cutout_zeroes_one_square_of_the_side_asked(side, key, images):
    out, x = views(key, images, cutout=side), np.asarray(images)
    cut = (out == 0).all(-1)
    np.testing.assert_array_equal(out, np.where(cut[..., None], 0, x))
    rows, columns = cut.any(2), cut.any(1)
    np.testing.assert_array_equal(cut, rows[:, :, None] & columns[:, None])  # a rectangle, if each side is one run
    for hit, length in ((rows, H), (columns, W)):
        for line in hit:
            where = np.flatnonzero(line)
            assert where[-1] - where[0] + 1 == len(where)
            # Whole inside the image, and up to half of it lost over an edge.
            assert len(where) == side or (side // 2 <= len(where) < side and (where[0] == 0 or where[-1] == length - 1))
        assert hit.any(0).all()  # every row and column is reached
    assert (cut.sum((1, 2)) == side * side).any()


def test_draws_of_the_three_are_independent_and_in_order(key, images):
    """Flip, then crop, then cutout: padding shows zeros too, so compare with the parts."""
    together = views(key, images, flip=True, crop_padding=1, cutout=2)
    parts = views(key, jnp.asarray(views(key, jnp.asarray(views(key, images, flip=True)), crop_padding=1)), cutout=2)
    np.testing.assert_array_equal(together, parts)
    flips = (views(key, images, flip=True) == np.asarray(images)).all((1, 2, 3))
    left = (views(key, images, cutout=2) == 0).all(-1).any(1)[:, : W // 2].any(1)
    assert abs(np.corrcoef(flips, left)[0, 1]) < 0.25


# --- alternating flips


def mirrored_in(images, ids, epoch, key):
    """Whether each of the images came out mirrored; no image is its own mirror image."""
    out, x = views(key, images, ids, epoch, flip=True, alternating_flip=True), np.asarray(images)
    same, mirrored = ((out == other).all((1, 2, 3)) for other in (x, x[:, :, ::-1]))
    assert (same ^ mirrored).all()
    return mirrored


def test_alternating_flips_mirror_each_image_in_every_other_epoch(images):
    found = [mirrored_in(images, np.arange(N), epoch, jax.random.key(epoch)) for epoch in range(4)]
    for epoch in range(3):
        np.testing.assert_array_equal(found[epoch + 1], ~found[epoch])
    assert abs(found[0].mean() - 0.5) < 5 * 0.5 / np.sqrt(N)


@pytest.mark.parametrize("first", [0, 10**6, 2**31 - N])
@pytest.mark.parametrize("stride", [1, 2, 64])
def test_about_half_of_any_images_are_mirrored_in_an_epoch(first, stride, images, key):
    """Also where every other image is of one class, and whatever comes before in the data set."""
    ids = (first + stride * np.arange(N)) % 2**31
    assert abs(mirrored_in(images, ids, 0, key).mean() - 0.5) < 5 * 0.5 / np.sqrt(N)


def test_alternating_flips_depend_on_no_key_no_order_and_no_company(images):
    ids = np.random.default_rng(1).permutation(5 * N)[:N]
    found = mirrored_in(images, ids, 3, jax.random.key(0))
    np.testing.assert_array_equal(mirrored_in(images, ids, 3, jax.random.key(1)), found)
    some = np.random.default_rng(2).permutation(N)[: N // 3]
    np.testing.assert_array_equal(mirrored_in(images[some], ids[some], 3, jax.random.key(2)), found[some])


def test_a_crop_draws_the_same_whichever_way_images_are_flipped(key, images):
    """Alternating flips come before the crop, as the others do, and take nothing from its draws."""
    plain = views(key, images, flip=True, alternating_flip=True)
    together = views(key, images, flip=True, alternating_flip=True, crop_padding=2)
    np.testing.assert_array_equal(together, views(key, jnp.asarray(plain), crop_padding=2))


def test_alternating_flips_without_flips_are_refused():
    with pytest.raises(UserError, match=r"config\.alternating_flip=True: .*; set flip=True too"):
        config_of(alternating_flip=True)
    assert config_of(alternating_flip=True, flip=True).alternating_flip
