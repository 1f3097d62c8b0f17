"""Tasks, channels, and the lifecycle of a job."""
