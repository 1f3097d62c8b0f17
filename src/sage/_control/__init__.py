"""The command line, and what it needs to run, watch and explain a program."""
