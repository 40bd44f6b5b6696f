"""Proves that no gradient crosses from one group to another, on the program that trains.

The proof is confirmed numerically on random images, and what each group learns from is listed. The exit status is 1 if a gradient
crosses, or if something does not learn, which would make the proof empty. Nothing is trained and no data set is read.
"""

from vffjax.cli import flags, options


def run(arguments: list[str]) -> int:
    parser = options.parser_with_config("locality", __doc__, "[--structure]")
    parser.add_argument("--structure", action="store_true", help="prove it on the traced program only; nothing is compiled or computed")
    a, config, name = flags.parse_with_config(parser, arguments)
    config = flags.ready(config)
    import jax

    from vffjax.proofs import locality

    certificate = locality.certify(config, numeric=not a.structure)
    options.give(a, {"config": name, "jax": jax.__version__} | certificate, f"{name}: {locality.text(certificate)}")
    return 0 if certificate["local"] else 1
