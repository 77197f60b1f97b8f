"""What both parties must agree on, byte for byte: values, no files, sockets, clocks or torch."""
