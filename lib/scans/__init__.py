"""A user's own folder of scans: masks for all of them from masks for a few."""
