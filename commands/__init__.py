"""What the shell asks for: each command stands on helpers.py and is known by run.py alone."""
