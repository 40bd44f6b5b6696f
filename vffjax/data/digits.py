"""The digits of scikit-learn: 1,797 grey images of 8x8 pixels, in the package itself."""

import numpy as np

from vffjax.config import Config
from vffjax.data.sets import Sizes, Source, Split, take
from vffjax.errors import bad_key, said


def read(config: Config) -> tuple[Split, Split, tuple[str, ...]]:
    """Training and test images, and the classes' names. Pixels of 0 to 16 become 0 to 255."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        problem = f"scikit-learn is not installed ({said(error, 300)})"
        raise bad_key("dataset", config.dataset, problem, "pip install scikit-learn") from None
    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    both = Split(images, labels.astype(np.int32))
    return take(both, np.asarray(train)), take(both, np.asarray(test)), tuple(map(str, range(10)))


SOURCE = Source(Sizes(train_images=1_437, image_shape=(8, 8, 1), classes=10), read, reads_data_dir=False)
