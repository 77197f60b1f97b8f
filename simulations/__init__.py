"""Many sites on one machine, running the real client and server code."""
