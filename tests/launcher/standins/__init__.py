"""Services in place of the real ones: same command line, same log line, same health route, and up at once."""
