"""The toy computer: a guest, its vCPUs, and demand-paged RAM."""
