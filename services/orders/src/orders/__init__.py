"""The orders service: takes orders and has each paid for, exactly once."""

SERVICE = "orders"
"""What this service is called in logs and in evidence."""
