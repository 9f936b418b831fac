"""Speed: contenders that alternate in one run, each in a process of its own. Quality is measured in `evaluation`."""
