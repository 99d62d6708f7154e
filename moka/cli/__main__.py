"""`python -m moka.cli` is the same as `moka`."""

from . import main

main()
