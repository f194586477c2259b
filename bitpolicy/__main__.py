"""`python -m bitpolicy`, which `accelerate launch -m bitpolicy` needs."""

from bitpolicy.cli.main import main

main()
