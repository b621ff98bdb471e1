"""`python -m dimo`, as `torchrun -m dimo` needs it."""

from dimo.cli import main

main()
