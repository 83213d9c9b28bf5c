"""What a user would pick instead of aiomm to move a tensor between two processes of one host."""
