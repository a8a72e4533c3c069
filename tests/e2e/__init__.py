"""End-to-end tests on a real Kubernetes: `make e2e`."""
