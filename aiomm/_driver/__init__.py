"""The driver: runs the protocol's commands, and turns each thing that ends into one event."""
