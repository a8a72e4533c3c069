"""Real processes, files, sockets and signals."""
