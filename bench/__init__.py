"""The benchmark: ztmtls beside hand-written TLS and plain HTTP, interleaved in one run, as ratios.

`soak` (one server, many rotations of its identity) and `rotation` (the stack, while its database passwords
rotate) are programs of their own.
"""
