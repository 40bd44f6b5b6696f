"""The digits of scikit-learn: 1,797 grey images of 8x8 pixels, in the package itself."""

import numpy as np

from vffjax.data import tfds_files
from vffjax.data.sets import Split, take
from vffjax.errors import bad_key


def digits() -> tuple[Split, Split, tuple[str, ...]]:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        problem = f"scikit-learn is not installed ({tfds_files.one_line(error)})"
        raise bad_key("dataset", "digits", problem, "pip install scikit-learn") from None
    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    both = Split(images, labels.astype(np.int32))
    return take(both, np.asarray(train)), take(both, np.asarray(test)), tuple(map(str, range(10)))
