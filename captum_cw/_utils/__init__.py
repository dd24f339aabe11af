"""Small tools for all packages: progress bars, files, processes, records, memory, suggestions."""
