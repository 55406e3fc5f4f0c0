"""Which rows a query sees, and with which weights."""
