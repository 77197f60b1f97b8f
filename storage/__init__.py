"""What either party keeps on its disk: files that are whole, logs that only grow, private keys."""
