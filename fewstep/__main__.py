"""`python -m fewstep`, and `torchrun -m fewstep`."""

from fewstep.cli import main

main()
