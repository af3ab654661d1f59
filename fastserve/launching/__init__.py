"""Services as processes: planned, started, watched, started again, found and ended."""
