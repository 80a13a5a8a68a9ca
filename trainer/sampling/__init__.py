"""Drawing images: what is asked for, the ranks that draw it, and what is written."""
