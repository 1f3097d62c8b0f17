"""Services and tasks in other processes: how these ask each other, and the program that they run."""
