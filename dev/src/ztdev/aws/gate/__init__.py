"""The stand-in for AWS: ministack behind a front door, with an STS that verifies web identity tokens.

This package runs in an environment of its own (../requirements.txt) and imports nothing of the rest of the
tree: `tokens` verifies tokens, `front` decides which requests reach the emulator at all, `emulator` and
`versions` close the emulator's gaps, `__main__` starts it.
"""

#: Exit statuses (sysexits.h where it has one).
EX_UNAVAILABLE, EX_CONFIG, EX_PORT_IN_USE = 69, 78, 98
