"""The benchmark: ztmtls beside hand-written TLS and plain HTTP, interleaved in one run, as ratios. Beside it,
programs of their own: `soak` (one server, many rotations) and `rotation` (the stack, while passwords rotate)."""
