"""Ten smooth colour patterns, made on the spot."""

import numpy as np

from vffjax.config import Config
from vffjax.data.sets import Sizes, Source, Split, take


def read(config: Config) -> tuple[Split, Split, tuple[str, ...]]:
    """Ten smooth colour patterns; each image has its own shift, contrast, smooth disturbance and pixel noise.

    A linear classifier makes 9 % errors on the test images.
    """
    rng = np.random.default_rng(1616)
    classes, side, cells, sizes = 10, 16, 4, (2_000, 500)
    distance = np.abs((np.arange(side) + 0.5)[:, None] * cells / side - 0.5 - np.arange(cells))
    weight = np.maximum(0, 1 - np.minimum(distance, cells - distance))  # bilinear, and periodic so that a shift has no edge

    def smooth(n: int) -> np.ndarray:
        return np.einsum("ia,jb,nabc->nijc", weight, weight, rng.normal(size=(n, cells, cells, 3)))

    patterns, n = smooth(classes), sum(sizes)
    labels = np.concatenate([rng.permutation(np.arange(size) % classes) for size in sizes]).astype(np.int32)
    rows, columns = ((np.arange(side) + rng.integers(-2, 3, (n, 1))) % side for _ in range(2))
    pixels = patterns[labels[:, None, None], rows[:, :, None], columns[:, None, :]] * rng.uniform(0.5, 1.5, (n, 1, 1, 1))
    pixels += smooth(n) + rng.normal(size=pixels.shape)
    images = np.clip(np.rint(128 + 40 * pixels), 0, 255).astype(np.uint8)
    parts = np.split(np.arange(n), [sizes[0]])
    return take(Split(images, labels), parts[0]), take(Split(images, labels), parts[1]), tuple(f"pattern{k}" for k in range(classes))


SOURCE = Source(Sizes(train_images=2_000, image_shape=(16, 16, 3), classes=10), read, reads_data_dir=False)
