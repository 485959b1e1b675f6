"""The sub-commands of this package; each module is light to import and loads what it needs when it runs."""
