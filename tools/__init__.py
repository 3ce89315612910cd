"""Tools that need the repository: generators and records. Not installed."""
