"""Jobs on a Ray cluster: Ray places, owns and ends the processes, which speak to each other by themselves."""
