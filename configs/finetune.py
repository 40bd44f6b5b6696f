"""The other fine-tunings: what configs/finetune_resnet18_cifar10.py does, of ImageNet ResNets on CIFAR-10 and CIFAR-100.

    pip install -e ".[hub]"                                                  # the weights are downloaded from Hugging Face, once
    python train.py --config configs/finetune.py:resnet50_cifar100           # GPU or TPU
    python train.py --config configs/finetune.py:resnet50_cifar100 --config.rule=head --config.grouping=all   # by back-propagation

Not trained: no weights could be downloaded. What was checked is that weights of this layout compute what PyTorch computes
(tests/test_pretrained.py), and that no gradient crosses a group (tests/test_locality.py). Settings are our guess.
"""

import ml_collections

from vffjax.config import default_config

VARIANTS = ("resnet34_cifar10", "resnet50_cifar10", "resnet18_cifar100", "resnet34_cifar100", "resnet50_cifar100")


def get_config(variant: str = "resnet34_cifar10") -> ml_collections.ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    config = default_config()
    config.network, config.dataset = variant.split("_")
    config.init_from = f"hf://timm/{config.network}.a1_in1k"
    config.stem = "imagenet"
    config.image_size = 224  # pixels per side, as the weights were trained; resized on device
    config.pixel_statistics = "imagenet"
    config.head_grid = 0  # by width: every head has at most 4,096 inputs
    config.flip = True
    config.crop_padding = 4  # pixels of the 32x32 image
    config.copies_per_class = 1  # 10 or 100 labelled copies in a step beside 64 images
    config.head_weight = 1.0  # of the head's gradient, beside CSCL's
    config.epochs = 10
    config.batch_size = 64  # images
    config.eval_batch_size = 100  # images
    config.learning_rate = 3e-4
    config.group_decay = 0.7  # of the next group's learning rate: edges and colours serve as they are
    config.warmup_epochs = 1.0  # epochs
    config.weight_decay = 0.01  # of kernels
    return config
