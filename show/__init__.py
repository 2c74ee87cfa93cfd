"""What people see: the rules of the command line, text in a terminal, pictures, the page of a report."""
