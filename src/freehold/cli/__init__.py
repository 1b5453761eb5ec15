"""The command line: one thin file a command. `main.py` says how a command is added."""
