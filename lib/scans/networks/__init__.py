"""Networks for a folder of scans: trained, kept in a file, applied to cases."""
