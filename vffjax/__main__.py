"""`python -m vffjax` is the command `vffjax`."""

from vffjax.cli.main import main

if __name__ == "__main__":
    main()
