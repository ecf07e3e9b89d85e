"""What all programs share: command line, frame, files, statistics and tables."""
