"""The commands of ``ztmtls``: one module each, with `add` (its arguments) and `run` (its work).

`run` returns the exit status. What went wrong on the way is raised as `output.CommandError`.
"""
