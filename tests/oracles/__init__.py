"""Scripts that run other projects' code and print what tests compare ours with, since it cannot be installed here."""
