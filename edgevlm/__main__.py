"""`python -m edgevlm` is the `edgevlm` command."""

from edgevlm.cli import main

main()
