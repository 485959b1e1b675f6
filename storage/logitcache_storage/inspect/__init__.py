"""Looking at a cache: what to show of it (`data`), and how it is drawn on a terminal (`draw`)."""
