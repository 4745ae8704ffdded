"""What is run by hand: ``python -m tools.NAME --help``. Of the long checks the tests have short versions."""
