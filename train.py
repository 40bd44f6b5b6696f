"""Trains a network in groups of layers, without back-propagation across groups.

python train.py --config configs/digits.py [--config.KEY=VALUE ...] [--workdir DIR]; --help lists the keys.
"""

from vffjax.cli.main import main

if __name__ == "__main__":
    import sys

    main(["train", *sys.argv[1:]])
