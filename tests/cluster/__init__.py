"""A real Kubernetes for tests, on one Linux machine and without Docker; see README.md beside this file."""
