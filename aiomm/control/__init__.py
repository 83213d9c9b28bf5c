"""The control channel: how packets travel between two endpoints, over ZeroMQ or a Unix stream."""
