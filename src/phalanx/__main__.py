"""`python -m phalanx` is the same as `phalanx`."""

from phalanx.cli.main import main

main()
