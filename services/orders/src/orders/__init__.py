"""The orders service: takes orders and has each paid for, exactly once."""
