"""When numbers went wrong: what is done, and whose fault it is."""
