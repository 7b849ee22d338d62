"""The explorer: a page that shows a published grid, straight from its bucket. `make .venv/ready` builds it from `src/`.

`bundle` puts the page into a storage; `server` serves it, and grids, on this machine.
"""
