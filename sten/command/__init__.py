"""The commands of `python -m sten`, one a file."""
