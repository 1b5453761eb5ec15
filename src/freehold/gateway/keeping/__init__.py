"""What outlives the process: the ledger and its readers, keys, reservations, the audit log, on SQLite or PostgreSQL."""
