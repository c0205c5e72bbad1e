"""The schema of the orders database, one step a file; `python -m orders migrate` runs them."""
