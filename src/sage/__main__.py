"""`python -m sage`: the command `sage`, also where its script is not on the path."""

from sage._control import main

main(prog_name="sage")
