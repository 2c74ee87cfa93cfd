"""What people see: the command line, text in a terminal, pictures and the page of a report."""

__version__ = "1.0.0"
