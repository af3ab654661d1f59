"""Who may call a service: cluster key, API keys, administrators, web pages, and the addresses that workers may have."""
