"""What long work that keeps results on disk needs: whose results they are, one writer at a time, whole files.

Imports nothing else of the package, so that every layer may use it.
"""
