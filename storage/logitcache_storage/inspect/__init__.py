"""Looking at a cache: what to show of it, and how it is drawn.

`data`, `overview`, `doubtful` and `search` give plain values. `draw` draws them on a terminal, `html` and `figures` as
parts of a page; `report` makes one file of those, `notebook` what a cell shows, and `logitcache_storage.web` the pages.
"""
