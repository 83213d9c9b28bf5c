"""The goals that aiomm has set itself for speed, and whether this machine sees them met."""
