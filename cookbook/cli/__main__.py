"""`python -m cookbook.cli`, the same as `cookbook`."""

from cookbook.cli import main

main()
