"""Operators: functions from batch to batch."""
