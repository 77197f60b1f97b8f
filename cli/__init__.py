"""What people type: one module per group of commands, no logic."""
