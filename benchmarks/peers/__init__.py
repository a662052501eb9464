"""Other engines to measure beside ours, each in a process and an environment of its own."""
