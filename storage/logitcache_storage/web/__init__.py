"""The web view: server-rendered pages over one cache, or two of the same corpus."""
