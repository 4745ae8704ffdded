"""Long checks that are run by hand, from the repository's root: `python -m tools.NAME --help`."""
