"""Graphs and plans as values."""
