"""Access control: cluster key, API keys, administrators, checks against web pages, and addresses of workers."""
