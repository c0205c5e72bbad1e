"""The benchmark: ztmtls beside hand-written TLS and plain HTTP, interleaved in one run, as ratios."""
