"""The command line: thin, made from config.py, and without torch until a command needs it."""
