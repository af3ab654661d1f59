"""Services as processes: plan, start, watch, restart, find and end them."""
