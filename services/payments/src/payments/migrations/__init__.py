"""The schema of the payments database, one step a file; `python -m payments migrate` runs them."""
