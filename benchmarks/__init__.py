"""Speed and memory, measured side by side; results stand beside the command that made them."""
