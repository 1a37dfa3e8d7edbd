"""Optional scripts, run as `python -m extras.NAME`. flm.py imports none of them."""
