"""The memory of conversations."""
