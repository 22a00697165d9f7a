"""One benchmark per operator, and the suite that runs them: `python -m bench ops`."""
