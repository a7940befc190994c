"""What comes out: scores, statistics, tables and figures."""
