"""Speed beside other programs, in turns, each in a process of its own."""
