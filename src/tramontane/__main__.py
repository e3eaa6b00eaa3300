"""`python -m tramontane`: the shell, as the installed command is."""

from tramontane.cli import main

main()
