"""Small tools that every room may use: progress bars, files, processes, records, memory."""
