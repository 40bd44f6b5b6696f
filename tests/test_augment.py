"""Augmentation: every view is one of those that the settings allow, each allowed view occurs, and the key decides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracles import config_of, quick_jit, small_run
from vffjax.errors import UserError
from vffjax.training.augment import augment, augmented, cut_out, erase, mix_up, normalise
from vffjax.training.photo_augment import color_jitter, random_resized_crop

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


# --- random erasing


def erased(key, images, probability=1.0):
    return np.asarray(quick_jit(lambda k, x: erase(k, x, probability))(key, images))


@pytest.mark.parametrize("shape", [(32, 32, 3), (24, 40, 1)], ids=str)
def test_erasing_zeroes_one_rectangle_of_the_shares_and_aspects_asked(shape, key):
    n, (h, w, _) = 2_000, shape
    x = np.random.default_rng(0).normal(size=(n, *shape)).astype(np.float32)
    out = erased(key, jnp.asarray(x))
    cut = (out == 0).all(-1)
    np.testing.assert_array_equal(out, np.where(cut[..., None], 0, x))
    rows, columns = cut.any(2), cut.any(1)
    np.testing.assert_array_equal(cut, rows[:, :, None] & columns[:, None])
    height, width = rows.sum(1), columns.sum(1)
    for hit, length in ((rows, height), (columns, width)):
        assert ((np.diff(np.pad(hit, ((0, 0), (1, 1))).astype(int), axis=1) == 1).sum(1) == 1).all() and (length > 0).all()  # one run
        assert hit.any(0).all()
    # Half a pixel of rounding on each side; sides as long as the image may have been cut.
    whole = (height < h) & (width < w)
    assert whole.mean() > 0.9
    least, most = ((height + d) * (width + d) / (h * w) for d in (-0.5, 0.5))
    assert (most[whole] >= 0.02).all() and (least[whole] <= 0.33).all()
    assert ((height + 0.5) / (width - 0.5))[whole].min() >= 0.3 and ((height - 0.5) / (width + 0.5))[whole].max() <= 3.3
    # The shares are uniform, aspects as often above 1 as below, and places everywhere alike.
    assert abs((height * width / (h * w))[whole].mean() - 0.17) < 0.02
    if h == w:
        assert abs(np.log(height / width).mean()) < 5 * 0.7 / np.sqrt(n)
    for hit in (rows, columns):
        middle = (hit * np.arange(hit.shape[1])).sum(1) / hit.sum(1)
        assert abs(middle.mean() - (hit.shape[1] - 1) / 2) < 5 * hit.shape[1] / 4 / np.sqrt(n)


def test_erasing_hits_as_many_images_as_asked(key, images):
    assert abs((erased(key, images, 0.25) == 0).any((1, 2, 3)).mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / N)
    np.testing.assert_array_equal(erased(key, images, 0.0), images)
    assert (erased(jax.random.key(1), images) != erased(jax.random.key(2), images)).any()
    assert (erased(key, images[:, :1, :1]) == 0).all()  # at least one pixel


# --- mixup


def test_mixup_is_the_sum_of_two_images_by_one_share_and_keeps_both_labels(key, images):
    labels = jnp.asarray(np.arange(N) % 7, jnp.int32)
    mixed, mixture = quick_jit(lambda k, x, y: mix_up(k, x, y, 0.7))(key, images, labels)
    x, share = np.asarray(images, np.float64), float(mixture.share)
    expected = [share * x[i] + (1 - share) * x[i - 1] for i in range(N)]
    np.testing.assert_allclose(mixed, expected, rtol=1e-5)
    np.testing.assert_array_equal(mixture.labels, [labels[i - 1] for i in range(N)])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_are_the_larger_part_of_a_beta_distribution(alpha):
    image, label = jnp.zeros((1, 1, 1, 1)), jnp.zeros(1, jnp.int32)
    keys = jax.random.split(jax.random.key(0), 2_000)
    shares = np.asarray(quick_jit(jax.vmap(lambda k: mix_up(k, image, label, alpha)[1].share))(keys), np.float64)
    drawn = np.random.default_rng(0).beta(alpha, alpha, 200_000)
    wanted = np.maximum(drawn, 1 - drawn)
    assert (shares >= 0.5).all() and (shares <= 1).all()
    for power in (1, 2, 3):
        assert abs((shares**power).mean() - (wanted**power).mean()) < 5 * (wanted**power).std() / np.sqrt(len(shares))


def test_no_mixup_changes_no_bit(key, images):
    labels = jnp.zeros(N, jnp.int32)
    mixed, mixture = mix_up(key, images, labels, 0.0)
    assert mixed is images and mixture is None


# --- all of them together


# --- parts and colours of photographs


def as_bytes(function, key, images, amount):
    return np.asarray(quick_jit(lambda k, x: function(k, x, amount))(key, jnp.asarray(images)))


def test_a_random_part_fills_the_image_as_an_affine_map_of_positions(key):
    """On images whose brightness grows along one side, each result is a line whose slope is the part's length, and its ends its place."""
    n, h, w, smallest = 500, 32, 48, 0.2
    along_rows = np.broadcast_to(np.arange(h).reshape(1, h, 1, 1) * 6, (n, h, w, 1)).astype(np.uint8)
    along_columns = np.broadcast_to(np.arange(w).reshape(1, 1, w, 1) * 5, (n, h, w, 1)).astype(np.uint8)
    rows = as_bytes(random_resized_crop, key, along_rows, smallest)[..., 0] / 6.0
    columns = as_bytes(random_resized_crop, key, along_columns, smallest)[..., 0] / 5.0
    assert (rows == rows[:, :, :1]).all() and (columns == columns[:, :1]).all()
    found = []
    for lines, side in ((rows[:, :, 0], h), (columns[:, 0], w)):
        inner = slice(side // 4, -(side // 4))  # away from the border, whose pixels are repeated
        slope, first = np.polyfit(np.arange(side)[inner] + 0.5, lines[:, inner].T, 1)
        np.testing.assert_allclose(lines[:, inner], first[:, None] + slope[:, None] * (np.arange(side)[inner] + 0.5), atol=0.25)
        length, start = slope * side, first + 0.5  # pixel p has its centre at p + 0.5
        assert length.max() <= side + 0.5 and start.min() > -0.6 and (start + length).max() < side + 0.6
        found.append(length)
    share, aspect = found[0] * found[1] / (h * w), found[0] / found[1]
    whole = (found[0] < h - 0.5) & (found[1] < w - 0.5)  # not cut to the image
    assert share[whole].min() > smallest - 0.02 and share.max() < 1.03
    assert aspect[whole].min() > 0.74 and aspect[whole].max() < 1.36
    never_cut = share < 0.48
    assert abs(np.log(aspect[never_cut]).mean()) < 5 * 0.17 / np.sqrt(never_cut.sum())


def test_the_whole_image_stays_to_the_bit_where_the_part_is_all_of_it(key, images):
    square = (np.asarray(images) * 20).astype(np.uint8)[:8]
    found = as_bytes(random_resized_crop, key, np.repeat(square[:, :1, :1], 8, axis=1).repeat(8, axis=2), 1.0)
    np.testing.assert_array_equal(found, np.repeat(square[:, :1, :1], 8, axis=1).repeat(8, axis=2))


def test_colours_change_by_the_factors_asked(key):
    n, strength = 400, 0.4
    x = np.random.default_rng(0).integers(90, 130, (n, 6, 5, 3)).astype(np.uint8)
    out = as_bytes(color_jitter, key, x, strength).astype(np.float64)
    luma = np.array([0.299, 0.587, 0.114])
    before, after = x @ luma, out @ luma
    brightness = after.mean((1, 2)) / before.mean((1, 2))  # neither contrast nor saturation changes the mean grey
    contrast = after.std((1, 2)) / before.std((1, 2)) / brightness
    colour = (out - after[..., None]).std((1, 2, 3)) / (x - before[..., None]).std((1, 2, 3)) / brightness / contrast
    for factor in (brightness, contrast, colour):
        assert factor.min() > 0.55 and factor.max() < 1.45  # rounding to bytes blurs the ends
        assert abs(factor.mean() - 1) < 0.06 and factor.std() == pytest.approx(strength / np.sqrt(3), rel=0.2)
    assert abs(np.corrcoef([brightness, contrast, colour])[np.triu_indices(3, 1)]).max() < 0.2


def test_grey_images_have_no_colour_to_change(key):
    x = np.random.default_rng(0).integers(0, 256, (16, 4, 4, 1)).astype(np.uint8)
    colour = as_bytes(color_jitter, key, np.repeat(x, 3, axis=3), 0.5)
    assert (colour == colour[..., :1]).all() and (colour[..., :1] != x).any()
    np.testing.assert_array_equal(as_bytes(color_jitter, key, x, 0.0), x)


ALL = {"flip": True, "crop_padding": 1, "cutout": 2, "random_erasing": 0.5, "trivial_augment": True, "mixup": 1.0}
ALL |= {"random_resized_crop": 0.5, "color_jitter": 0.25}


def test_a_step_draws_the_same_whichever_others_are_asked(key):
    """Each has a key of its own: the bytes, and what is erased and mixed, are those of the parts one after the other."""
    run = small_run(config_of(**ALL, batch_size=24))
    batch = jax.tree.map(jnp.asarray, run.batch(key=key))
    together, mixture = quick_jit(lambda b: augmented(run.plan.config, run.task, b))(batch)
    own, x = jax.random.fold_in(key, 0), batch.images
    for changes in ({"random_resized_crop": 0.5}, {"color_jitter": 0.25}, {"trivial_augment": True}, {"flip": True}, {"crop_padding": 1}):
        x = augment(own, x, batch.ids, batch.epoch, config_of(**changes))
    x = erase(own, cut_out(own, normalise(x, run.task.mean, run.task.std), 2), 0.5)
    x, alone = mix_up(own, x, batch.labels, 1.0)
    np.testing.assert_allclose(together, x, rtol=1e-5, atol=1e-6)
    assert float(mixture.share) == pytest.approx(float(alone.share), rel=1e-6)


@pytest.mark.parametrize("name", ["random_erasing", "trivial_augment", "mixup", "random_resized_crop", "color_jitter"])
def test_kept_features_refuse_what_changes_images(name):
    with pytest.raises(UserError, match=rf"config\.feature_cache='host': .* {name}={ALL[name]}; use {name}=.*, or feature_cache=none"):
        config_of(schedule="sequential", feature_cache="host", **{name: ALL[name]})
