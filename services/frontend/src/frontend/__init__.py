"""The frontend service: pages for people, orders over mutual TLS, and the evidence of every hop."""
