"""The payments service: charges and refunds, each exactly once."""
