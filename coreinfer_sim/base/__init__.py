"""What every room needs: checked settings, errors, files, memory, processes, progress, plots, and the rows of a corpus."""
