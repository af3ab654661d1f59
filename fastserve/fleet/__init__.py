"""Services on the machines of a Ray cluster: what to run, the processes, and the actors that keep them running."""
