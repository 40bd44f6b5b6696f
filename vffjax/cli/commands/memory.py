"""Shows the memory of a training step, beside that of back-propagation.

The figures are in MB, as the compiler plans the step: for back-propagation, for back-propagation that recomputes its feature maps
(checkpointed) or takes its batch in four parts (accumulated), and for the configuration's own rule. Nothing is trained and no data set
is read. Of several devices the table shows what one of them takes, without the row of accumulated gradients.
"""

import sys

from vffjax.cli import flags, options
from vffjax.config import MAX_LAYERS
from vffjax.errors import UserError, notice


def run(arguments: list[str]) -> None:
    parser = options.parser_with_config("memory", __doc__, "[--depths 2,4,8] [--batches 128,512] [--target here|cpu|h100|v5e|...]")
    depths = "numbers of layers to measure, each layer a group of the first width, without pooling; default: the configured network"
    parser.add_argument("--depths", default="", metavar="N,N", help=depths)
    parser.add_argument("--batches", default="", metavar="N,N", help="numbers of images in a step; default: config.batch_size")
    target = (
        "here, the default: JAX's first device; cpu; or a device that need not be there: a GPU a100, b200, h100 or t4 (pip install -e "
        "'.[cuda-compiler]', Python >= 3.12) or a TPU v4, v5e (also tpu), v5p or v6e (pip install -e '.[tpu-compiler]'); or several that "
        "share each batch: v5e:2x2, h100:4"
    )
    parser.add_argument("--target", default="here", help=target)
    a, config, name = flags.parse_with_config(parser, arguments)
    wanted = options.whole_numbers("--depths", a.depths, MAX_LAYERS), options.whole_numbers("--batches", a.batches)
    config = flags.ready(config)
    import jax

    from vffjax.costs import fits, ledger, memory, targets

    cases, network, device = ledger.cases(config, *wanted), ledger.network_of(config, wanted[0]), targets.find(a.target)
    if device.number > 1:  # the parts of a batch would have to be cut across the parts of the devices
        cases = [case for case in cases if case.method != ledger.ACCUMULATED]
    for case in cases:
        if case.config.batch_size % device.number:
            problem = f"a batch of {case.config.batch_size} images cannot be divided by its {device.number} devices"
            raise UserError(f"--target={a.target}: {problem}; give other --batches, or another target")
    if words := fits.about_precision(config, device.device):
        notice(words)
    rows = []
    for case in cases:
        if sys.stderr.isatty():
            notice(f"== {case}")
        rows.append(memory.measure(case, device))
    ledger.compare(rows)
    text = ledger.table(rows) if network["own"] else f"network: {network['measured']}\n{ledger.table(rows)}"
    options.give(a, {"config": name, "network": network, "target": a.target, "jax": jax.__version__, "rows": rows}, text)
