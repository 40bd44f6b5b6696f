"""Noise with the spectrum of images.

If such noise and the images have the same root mean square, the outputs of any linear filter over a few pixels have about the same root
mean square on both.

The spectrum is that of the discrete cosine transform (DCT-II), which is the Fourier transform of images continued by their mirror images,
so that the opposite borders of an image do not meet. For each frequency it is the matrix `S = E[d d^T]` of the images' coefficients `d`
of all channels. Noise whose coefficients are `sqrt(S) e`, with white `e`, has the same `S`, and so the same covariance of any two pixels of
the mirrored images, averaged over their positions. All of it is computed in float64.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

BLOCK = 250  # images that are read and transformed at once, which bounds the memory


def transformed(images: Float[np.ndarray, "n h w c"], inverse: bool = False) -> Float[np.ndarray, "n h w c"]:
    """The coefficients of images by frequency and channel; or, with `inverse`, the images that have these coefficients."""
    import scipy.fft  # takes a third of a second, which every command would wait for

    transform = scipy.fft.idctn if inverse else scipy.fft.dctn
    return transform(np.asarray(images, np.float64), axes=(1, 2), norm="ortho")


def spectrum_root(images: Any, prepare: Callable[[Any], Any] = np.asarray) -> Float[np.ndarray, "h w c c"]:
    """The symmetric square root of `S` at each frequency.

    Args:
        images: `[n, h, w, c]`, of which a block is read at a time.
        prepare: makes the images that count from a block of these, without changing its shape.
    """
    total = np.zeros((*images.shape[1:], images.shape[3]))
    for first in range(0, len(images), BLOCK):
        found = transformed(np.asarray(prepare(images[first : first + BLOCK])))
        total += np.einsum("nhwc,nhwd->hwcd", found, found)
    values, vectors = np.linalg.eigh(total / len(images))
    return np.einsum("hwci,hwi,hwdi->hwcd", vectors, np.sqrt(np.maximum(values, 0)), vectors)


def filtered(noise: Float[np.ndarray, "n h w c"], root: Float[np.ndarray, "h w c c"]) -> Float[np.ndarray, "n h w c"]:
    """White noise, filtered to the spectrum whose root this is, with each image of noise scaled to a root mean square of 1."""
    out = transformed(np.einsum("hwcd,nhwd->nhwc", root, transformed(noise)), inverse=True)
    size = np.sqrt(np.mean(out**2, axis=(1, 2, 3), keepdims=True))
    return out / np.maximum(size, np.finfo(np.float64).tiny)  # images of zeros give no noise
