"""`spiffe` and `spiffe-tls` beside `ztmtls`: the same peers, the same agent, the same questions."""
