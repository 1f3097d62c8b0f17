"""Ends what a job started when its driver is gone: a process beside the driver, and the journal between them."""
