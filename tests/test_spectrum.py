"""Class noise with the spectrum of images: the transform and the filter by their definitions, and what a whitening layer makes of it."""

import jax
import numpy as np
import pytest

from oracles import config_of
from runs import assert_same_bits
from vffjax.networks.layers import whitening_kernel
from vffjax.ops import spectrum
from vffjax.training.plan import make_task, noise_root, task_of_epoch

PIXELS = ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))  # means and deviations


def correlated(n=60, h=6, w=8, channels=3, seed=0):
    """Images whose neighbouring pixels and channels are alike."""
    rng = np.random.default_rng(seed)
    white = rng.normal(size=(n, h + 2, w + 2, channels))
    smooth = sum(white[:, i : i + h, j : j + w] for i in range(3) for j in range(3)) / 3
    return smooth @ np.linalg.cholesky(0.9 + 0.1 * np.eye(channels)) + 0.2


def as_bytes(images):
    mean, std = (np.array(values) for values in PIXELS)
    return np.clip(255 * (0.5 * images * std + mean), 0, 255).astype(np.uint8)


def coefficients(image):
    """The DCT-II of each channel, one sum of products at a time."""
    h, w, _ = image.shape
    out = np.zeros_like(image)
    for k in range(h):
        for m in range(w):
            weight = np.sqrt((1 + (k > 0)) / h * (1 + (m > 0)) / w)
            for r in range(h):
                for s in range(w):
                    out[k, m] += weight * np.cos(np.pi * (r + 0.5) * k / h) * np.cos(np.pi * (s + 0.5) * m / w) * image[r, s]
    return out


def test_the_transform_equals_its_definition_and_has_an_inverse():
    images = correlated(3, 4, 5)
    found = spectrum.transformed(images)
    np.testing.assert_allclose(found, [coefficients(image) for image in images], atol=1e-12)
    np.testing.assert_allclose(spectrum.transformed(found, inverse=True), images, atol=1e-12)


@pytest.mark.parametrize("block", [250, 2])
def test_the_root_is_that_of_the_mean_product_of_coefficients(block, monkeypatch):
    monkeypatch.setattr(spectrum, "BLOCK", block)
    images = correlated(5, 3, 4, 2)
    root = spectrum.spectrum_root(images)
    products = [np.einsum("hwc,hwd->hwcd", d, d) for d in map(coefficients, images)]
    np.testing.assert_allclose(root @ root, np.mean(products, axis=0), atol=1e-12)
    np.testing.assert_allclose(root, np.swapaxes(root, 2, 3), atol=1e-12)


def covariances(images):
    """Of the pixels at each distance, and of their channels, averaged over images and over positions of the mirrored images."""
    whole = np.concatenate([images, images[:, ::-1]], axis=1)
    whole = np.concatenate([whole, whole[:, :, ::-1]], axis=2)
    distances = [(r, s) for r in range(3) for s in range(-2, 3)]
    shifted = [np.roll(whole, distance, axis=(1, 2)) for distance in distances]
    return np.array([np.einsum("nhwc,nhwd->cd", whole, other) for other in shifted]) / whole[..., 0].size


def test_filtered_noise_has_the_covariances_of_the_images_exactly():
    """White noise has the covariance of all unit vectors together. Scaling each image of noise is left out here."""
    images = correlated(20, 4, 5, 2)
    size = images[0].size
    units = np.eye(size).reshape(size, *images.shape[1:])
    root = spectrum.spectrum_root(images)
    filtered = spectrum.transformed(np.einsum("hwcd,nhwd->nhwc", root, spectrum.transformed(units)), inverse=True)
    np.testing.assert_allclose(size * covariances(filtered), covariances(images), atol=1e-12)
    scaled = spectrum.filtered(units, root)
    np.testing.assert_allclose(scaled * np.sqrt((filtered**2).mean(axis=(1, 2, 3), keepdims=True)), filtered, atol=1e-12)
    np.testing.assert_allclose((scaled**2).mean(axis=(1, 2, 3)), 1)


def test_a_whitening_layer_does_not_amplify_it_and_amplifies_white_noise():
    images, white = correlated(400, 12, 12), np.random.default_rng(1).normal(size=(400, 12, 12, 3))
    filtered = spectrum.filtered(white, spectrum.spectrum_root(images))
    images /= np.sqrt((images**2).mean())
    kernel = whitening_kernel(images, 2, smallest=0.0)[..., :12].reshape(-1, 12)

    def strengths(x):
        patches = np.lib.stride_tricks.sliding_window_view(x, (2, 2), axis=(1, 2)).transpose(0, 1, 2, 4, 5, 3)
        return ((patches.reshape(-1, 12) @ kernel) ** 2).mean(axis=0)

    np.testing.assert_allclose(strengths(images), 1, rtol=1e-3)
    assert np.all((strengths(filtered) > 0.5) & (strengths(filtered) < 2))
    assert strengths(white / np.sqrt((white**2).mean())).max() > 10


def test_images_that_are_all_zero_give_no_noise():
    root = spectrum.spectrum_root(np.zeros((3, 4, 4, 1)))
    np.testing.assert_array_equal(spectrum.filtered(np.ones((2, 4, 4, 1)), root), 0)


@pytest.mark.parametrize("redrawn", ["never", "epoch"])
def test_the_codebook_of_a_run_is_white_noise_filtered_and_scaled(redrawn):
    images = as_bytes(correlated())
    config = config_of(network="mlp", widths=(4,), noise_scale=2.0, noise_spectrum="images", noise_redrawn=redrawn)
    found = make_task(config, 5, images.shape[1:], *PIXELS, images)
    plain = config_of(network="mlp", widths=(4,), noise_scale=1.0, noise_redrawn=redrawn)
    white = np.asarray(make_task(plain, 5, images.shape[1:], *PIXELS, images).codebook)
    assert_same_bits(white, make_task(plain, 5, images.shape[1:], *PIXELS).codebook)
    normalised = (images / 255 - PIXELS[0]) / PIXELS[1]
    expected = 2 * spectrum.filtered(white, spectrum.spectrum_root(normalised))
    np.testing.assert_allclose(found.codebook, expected, rtol=1e-3, atol=1e-4)
    assert found.codebook.dtype == jax.numpy.float32

    root = noise_root(config, images, found.mean, found.std)
    later = task_of_epoch(config, found, 3, root)
    assert np.array_equal(later.codebook, found.codebook) == (redrawn == "never")
    np.testing.assert_allclose(np.square(later.codebook).mean(axis=(1, 2, 3)), 4, rtol=1e-5)
    assert_same_bits(task_of_epoch(config, later, 0, root), found if redrawn == "epoch" else later)
    assert noise_root(plain, images, found.mean, found.std) is None
