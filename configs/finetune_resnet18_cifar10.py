"""Fine-tunes an ImageNet ResNet-18 on CIFAR-10, group by group: four groups by width, no back-propagation across them.

    pip install -e ".[hub]"                                                    # the weights are downloaded from Hugging Face, once
    python train.py --config configs/finetune_resnet18_cifar10.py                 # GPU or TPU

`--config.init_from=FILE` takes weights of torchvision, timm or transformers. `--config.rule=head --config.grouping=all` is the
same by back-propagation.

    python train.py --config configs/finetune_resnet18_cifar10.py:narrow --config.init_from=FILE   # 2 CPU cores, minutes

narrow: 2,000 training images, from the narrow_cifar100 weights of configs/resnet18.py or from scratch. MEASURED below has the test errors:
mean and standard deviation over n seeds. Both rules start from those weights, which VFF has trained; VFF's four heads have 76,840
parameters, back-propagation's one head 5,130.

Not trained at full size: no weights could be downloaded. What was checked is that weights of this layout compute what
PyTorch computes (tests/test_pretrained.py), and that no gradient crosses a group (tests/test_locality.py). Settings are our guess.
"""

import ml_collections

from vffjax.config import default_config

VARIANTS = ("full", "narrow")
# Test errors by variant and rule, older than the ledger. `vffjax configs` shows them.
MEASURED = {
    "narrow": {
        "vff": "46.5 ± 0.4 % (n = 3)",
        "back-propagation": "48.4 ± 0.3 % (n = 3)",
        "vff from scratch": "51.9 ± 1.0 % (n = 3)",
        "back-propagation from scratch": "54.7 ± 2.1 % (n = 3)",
    }
}


def get_config(variant: str = "full") -> ml_collections.ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    config = default_config()
    config.dataset = "cifar10"
    config.network = "resnet18"
    config.stem = "imagenet"
    config.image_size = 224  # pixels per side, as the weights were trained; resized on device
    config.pixel_statistics = "imagenet"
    config.init_from = "hf://timm/resnet18.a1_in1k"
    config.head_grid = 0  # by width: every head has at most 4,096 inputs
    config.flip = True
    config.crop_padding = 4  # pixels of the 32x32 image
    config.copies_per_class = 1  # 10 labelled copies in a step beside 64 images
    config.head_weight = 1.0  # of the head's gradient, beside CSCL's
    config.epochs = 10
    config.batch_size = 64  # images
    config.eval_batch_size = 100  # images
    config.learning_rate = 3e-4
    config.group_decay = 0.7  # of the next group's learning rate: edges and colours serve as they are
    config.warmup_epochs = 1.0  # epochs
    config.weight_decay = 0.01  # of kernels
    if variant == "narrow":
        config.train_examples = 4_000  # images
        config.val_fraction = 0.5  # so 2,000 train, and as many choose
        config.width_factor = 0.25
        config.image_size = 64  # pixels per side
        config.pixel_statistics = "data"
        config.init_from = ""  # to be given; empty is from scratch
        config.epochs = 10
        config.learning_rate = 4e-3
    return config
