"""The payments service: charges and refunds, each exactly once."""

SERVICE = "payments"
"""What this service is called in logs and in evidence."""
