"""`python -m untether` is the command `untether`."""

from untether.sim.terminal.cli import main

main()
