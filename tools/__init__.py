"""Long checks to run by hand: ``python -m tools.NAME --help``. Short versions of them are among the tests."""
