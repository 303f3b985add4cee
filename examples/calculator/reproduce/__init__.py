"""Is the learning real? The calculator on several seeds, with ablations. Start with `__main__.py`."""
