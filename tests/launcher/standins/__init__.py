"""Stand-ins for the services: same command line, log line and health route, but they start at once."""
